from __future__ import annotations

import math

import pytest
import torch
from trainers import make_trainer

from internal_policy.bupo.trainer import leave_one_out_advantages, whitened_advantages

NAN = math.nan


def loo(groups):
    """The definition, response by response."""
    out = []
    for group in groups:
        for i, own in enumerate(group):
            others = [r for j, r in enumerate(group) if j != i and not math.isnan(r)]
            out.append(own - sum(others) / len(others) if others and not math.isnan(own) else 0.0)
    return out


@pytest.mark.parametrize(
    "groups",
    [
        [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.5, 2.0, -1.0, 3.0]],
        [[1.0, NAN, 0.0], [NAN, NAN, 1.0], [NAN, NAN, NAN]],
    ],
)
def test_leave_one_out_advantage_is_reward_minus_mean_of_the_others(groups):
    rewards = torch.tensor(groups)
    found = leave_one_out_advantages(rewards.flatten(), rewards.shape[1])
    assert found.tolist() == pytest.approx(loo(groups), abs=1e-6)


def test_whitened_gives_every_token_its_standardised_reward():
    rewards, lengths = [1.0, 0.0, 0.0, NAN, 2.0], [3, 1, 5, 7, 2]
    tokens = [r for r, n in zip(rewards, lengths, strict=True) for _ in range(n) if not math.isnan(r)]
    mean = sum(tokens) / len(tokens)
    std = math.sqrt(sum((r - mean) ** 2 for r in tokens) / len(tokens))
    expected = [0.0 if math.isnan(r) else (r - mean) / std for r in rewards]
    assert whitened_advantages(torch.tensor(rewards), torch.tensor(lengths)).tolist() == pytest.approx(
        expected, abs=1e-5
    )


def test_equal_rewards_have_no_advantage():
    assert whitened_advantages(torch.ones(4), torch.tensor([1, 2, 3, 4])).tolist() == [0.0] * 4
    assert leave_one_out_advantages(torch.ones(4), 2).tolist() == [0.0] * 4


@pytest.mark.parametrize("method", ["rloo", "reinforce++"])
def test_each_rollout_gets_its_own_advantage(tmp_path, method):
    trainer = make_trainer(tmp_path, method=method, log_completions=True, num_completions_to_print=0)
    batches = []
    generate = trainer._generate_and_score_completions

    def keep(inputs):
        # Before TRL shuffles it.
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = keep
    trainer.train()
    (batch,) = batches
    rewards = trainer._rewards
    if method == "rloo":
        expected = loo(rewards.view(-1, 4).tolist())
    else:
        lengths = batch["completion_mask"].sum(1)
        weights = lengths / lengths.sum()
        mean = (weights * rewards).sum()
        expected = ((rewards - mean) / (weights * (rewards - mean) ** 2).sum().sqrt()).tolist()
    assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-4)
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-4)
