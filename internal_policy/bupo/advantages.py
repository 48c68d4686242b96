"""Advantages of the baselines, from the rewards of one batch of rollouts."""

from __future__ import annotations

import torch
from torch import Tensor

_NO_VARIANCE = 1e-8


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO: a response's reward less the mean reward of the other responses to its prompt.

    Args:
        rewards: [N], the responses to a prompt next to each other; NaN where a response could not be scored.
        group_size: G responses to each prompt.

    Returns:
        [N] advantages; 0 where there is no score, or no other response with one.

    Source: Ahmadian et al., arXiv 2402.14740, section 2.3.
    """
    groups = rewards.view(-1, group_size)
    others = groups.isfinite().sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others
    return torch.where(others > 0, groups - baseline, torch.zeros_like(groups)).nan_to_num(nan=0.0).view(-1)


def whitened(rewards: Tensor, lengths: Tensor) -> Tensor:
    """REINFORCE++: the reward of every response token, normalised over all response tokens of the batch.

    Args:
        rewards: [N]; NaN where a response could not be scored.
        lengths: [N] response tokens.

    Returns:
        [N] advantages, the same at each token of a response; 0 where there is no score.

    Source: Hu et al., arXiv 2501.03262, eq. 6 (its group-free form, without the penalty of beta).
    """
    weights = lengths.to(rewards.dtype) * rewards.isfinite()
    scores = rewards.nan_to_num(nan=0.0)
    total = weights.sum().clamp(min=1.0)
    mean = (weights * scores).sum() / total
    variance = (weights * (scores - mean) ** 2).sum() / total
    return torch.where(rewards.isfinite(), (scores - mean) / (variance + _NO_VARIANCE).sqrt(), torch.zeros_like(scores))
