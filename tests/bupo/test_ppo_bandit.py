"""PPO on a problem whose optimal policy and whose values are known."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny import VOCAB, tiny_model, tiny_tokenizer
from trainers import options

from internal_policy.bupo import BuPOConfig, BuPOTrainer


def bandit(tmp_path, model, words, steps, **changed):
    """One prompt; a response whose first word is one of these has a reward of 1, whatever follows, others of 0."""

    def hits(completions, **_):
        return [float(text.split()[:1] in [[f"w{word}"] for word in words]) for text in completions]

    settings = options(
        output_dir=str(tmp_path),
        method="ppo",
        **{"max_steps": steps, "critic_learning_rate": 1e-2, "max_completion_length": 2, "value_clip": 0.5},
        **{"per_device_train_batch_size": 64, "num_generations": 64, **changed},
    )
    trainer = BuPOTrainer(
        model=model,
        reward_funcs=[hits],
        args=BuPOConfig(**settings),
        train_dataset=Dataset.from_list([{"prompt": "w2 w3"}] * 64),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return trainer


@torch.no_grad()
def first_word(policy):
    """The probability of each word after the prompt."""
    return policy.eval()(torch.tensor([[2, 3]])).logits[0, -1].double().softmax(-1)


@pytest.mark.slow
def test_a_bandit_is_solved(tmp_path):
    model = tiny_model("qwen3", layers=2)
    assert first_word(model)[7] < 0.1
    bandit(tmp_path, model, [7], steps=40, learning_rate=1e-2)
    assert first_word(model)[7] > 0.9


@pytest.mark.slow
def test_the_values_of_a_bandit_are_its_expected_rewards(tmp_path):
    """Under a policy that stays as it is: V(prompt) = p, V after a rewarded word 1, and after any other 0."""
    model = tiny_model("qwen3", layers=2)
    probabilities = first_word(model)
    # Every other one of the words by their probability; words alone, since a text ends at <eos>.
    words = [word for word in probabilities.argsort(descending=True).tolist() if word > 1][::2]
    p = float(probabilities[words].sum())
    assert 0.3 < p < 0.7
    trainer = bandit(tmp_path, model, words, steps=60, learning_rate=1e-12, lr_scheduler_type="linear")
    assert torch.allclose(first_word(model), probabilities, atol=1e-6)
    ids = torch.tensor([[2, 3, word, 2] for word in range(VOCAB)])
    with torch.no_grad():
        values = trainer.critic_training.critic(ids, torch.ones_like(ids), 2)
    # The first position follows the prompt, the second the word. Words that are rarely drawn are rarely learned.
    assert float(values[0, 0]) == pytest.approx(p, abs=0.1)
    # Those of the prompt are part of every other state too, so that their embeddings learn more slowly.
    common = [word for word in range(4, VOCAB) if probabilities[word] > 0.02]
    expected = {word: float(word in words) for word in common}
    assert len(common) > 5
    assert {0.0, 1.0} == set(expected.values())
    assert {word: float(values[word, 1]) for word in common} == pytest.approx(expected, abs=0.15)
