"""Short calls of `bupo.train` on a tiny saved model."""

from __future__ import annotations

import pytest
from training_calls import read_files

from internal_policy import UserError, bupo

RATE = 1e-3
PROMPTS = [{"prompt": f"w{i} w{i + 7}"} for i in range(2, 8)]


def high_words(completions, **_):
    return [sum(int(w[1:]) > 30 for w in c.split() if w[1:].isdigit()) / 6 for c in completions]


def train(place, output, prompts=PROMPTS, **options):
    return bupo.train(
        place / "model",
        prompts,
        output=place / output,
        **{
            **{"layer": 2, "ipa_steps": 1, "max_steps": 2, "prompts_per_step": 2, "num_generations": 4},
            **{"mini_batches": 1, "max_completion_length": 6, "dynamics_every": 0, "eval_samples": 0},
            **{"learning_rate": RATE, "template": "plain", "reward": high_words, **options},
        },
    )


def refused_here(place, output, **options):
    before = read_files(place / output)
    with pytest.raises(UserError) as info:
        train(place, output, **options)
    assert "\n" not in str(info.value)
    assert read_files(place / output) == before
    return str(info.value)
