"""The entropy of a policy as the paper defines it: the oracle that every faster form is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_entropy(
    states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Entropy of ``softmax(states @ unembedding.T)``, written out in float64.

    .. math:: H(x) = -\sum_j p_j \log p_j, \quad p = \mathrm{softmax}(x E_u^T)

    It holds all [N, V] logits at once: for tests and small vocabularies only.

    Args:
        states: [N, d] residual states or module writes.
        unembedding: [V, d] unembedding matrix E_u.
        bias: [V] bias of the unembedding, where the model has one.
        scale: factor on the logits, where the model has one.
        softcap: c in ``c * tanh(logits / c)``, where the model caps its logits.

    Returns:
        [N] entropies in nats, float64.

    Source: arXiv 2512.19673v3, eq. 7.
    """
    logits = states.double() @ unembedding.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)
