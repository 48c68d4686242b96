"""Attention windows and scaled positions: results equal those of each sequence without batching."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from capture_checks import FLOAT32_NATS, captured, entropies_of_logits, wrapped
from tiny import FAMILY_OPTIONS, tiny_model

from internal_policy.bupo.dynamics import Dynamics
from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import read_responses
from internal_policy.generation import Request, sample
from internal_policy.models import context

# Attention over a window, and families that mix it with full attention.
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "phi3": {"sliding_window": 8, "pad_token_id": 0},
    **{
        name: {**FAMILY_OPTIONS[name], "layer_types": MIXED}
        for name in ("gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss")
    },
}


def long_records(lengths, seed=3):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(2, 61, size=n).tolist(), "prompt_length": 3} for n in lengths]


def check_batches_against_alone(model, records):
    for side in ("left", "right"):
        for record, values in zip(records, captured(model, records, side), strict=True):
            (alone,) = captured(model, [record])
            np.testing.assert_allclose(values.layers, alone.layers, rtol=0, atol=FLOAT32_NATS)
            np.testing.assert_allclose(
                values.policy[:, 1], entropies_of_logits(model, record), rtol=0, atol=FLOAT32_NATS
            )


@pytest.mark.parametrize("model_type", WINDOWS)
def test_windows_shorter_than_the_sequence(model_type):
    model, records = tiny_model(model_type, **WINDOWS[model_type]), long_records([31, 6, 19])
    check_batches_against_alone(model, records)
    # The window has an effect: a wider one changes the results.
    wide = tiny_model(model_type, **{**WINDOWS[model_type], "sliding_window": 64})
    assert np.abs(captured(wide, records)[0].policy - captured(model, records)[0].policy).max() > 0.01


ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
SCALED = {
    "llama3": ("llama", {**ROPE, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "yarn": ("qwen3", {**ROPE, "factor": 4.0}),
    "linear": ("llama", {"rope_theta": 10000.0, "factor": 4.0}),
    "dynamic": ("llama", {"rope_theta": 10000.0, "factor": 4.0}),
    "longrope": ("phi3", {**ROPE, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 5.0], "factor": 4.0}),
}


def scaled_model(rope_type, **config):
    model_type, rope = SCALED[rope_type]
    own = {"pad_token_id": 0, "original_max_position_embeddings": 16} if model_type == "phi3" else {}
    return tiny_model(model_type, rope_parameters={"rope_type": rope_type, **rope}, **own, **config)


@pytest.mark.parametrize("rope_type", SCALED)
def test_scaled_positions_match_unbatched_sequences(rope_type):
    # YaRN's checkpoints often leave the context at the length before stretching.
    model = scaled_model(rope_type, context=16 if rope_type == "yarn" else 64)
    # Sequences on either side of the original context, and just at it.
    check_batches_against_alone(model, long_records([40, 9, 16, 17, 12]))
    plain = tiny_model(SCALED[rope_type][0], **({"pad_token_id": 0} if rope_type == "longrope" else {}))
    if rope_type != "dynamic":  # which changes nothing within max_position_embeddings
        (record,) = long_records([40])
        assert np.abs(entropies_of_logits(model, record) - entropies_of_logits(plain, record)).max() > 0.001


def test_dynamics_do_not_depend_on_the_batch_with_length_dependent_frequencies():
    model = wrapped(scaled_model("longrope"))
    responses = read_responses(long_records([40, 9, 16, 17, 12]), model.tokenizer, "plain")
    one, all_together = (Dynamics(model, responses, 1, batch_size=n).measure() for n in (1, 5))
    assert one.kl_mean == pytest.approx(all_together.kl_mean, abs=FLOAT32_NATS)
    assert one.log_perplexity == pytest.approx(all_together.log_perplexity, abs=FLOAT32_NATS)


def test_the_longest_sequence_sets_the_scaling_of_positions():
    assert context.max_length(scaled_model("yarn", context=16).config) == 64
    assert context.max_length(scaled_model("yarn", context=64).config) == 64
    assert context.max_length(scaled_model("dynamic", context=16).config) == 16
    assert context.max_length(scaled_model("longrope").config) == 64
    assert context.max_length(tiny_model("gpt2").config) == 64
    assert context.max_length(tiny_model("gemma3_text").config) == 64
    assert context.length_switch(scaled_model("longrope").config) == 16
    assert context.length_switch(scaled_model("yarn").config) is None


@pytest.mark.parametrize("limit", [6, 24])
def test_samples_do_not_depend_on_the_batch_with_length_dependent_frequencies(limit):
    model = wrapped(scaled_model("longrope"))
    # Always short, across the switch with and without prompts of the same length, at it, and always long.
    prompts = [record["input_ids"] for record in long_records([5, 12, 12, 14, 16, 17, 30])]
    requests = [Request(Prompt(""), ids, number, 0) for number, ids in enumerate(prompts)]
    run = partial(sample, model, max_new_tokens=limit, temperature=1.0, seed=0)
    together = [response.input_ids for response in run(requests)]
    assert together == [response.input_ids for request in requests for response in run([request])]
    assert max(map(len, together)) > 30
