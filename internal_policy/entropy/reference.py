"""Policies as the paper defines them, in float64: the reference against which every faster form is tested."""

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
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.

    Returns:
        [N] entropies in nats, float64.

    Source: arXiv 2512.19673v3, eq. 7.
    """
    log_p = _log_policy(states, unembedding, bias, scale, softcap)
    return -(log_p.exp() * log_p).sum(dim=-1)


def policy_divergence(
    p_states: Tensor,
    q_states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Divergence of two policies, written out in float64.

    .. math:: KL(p, q) = \sum_j p_j (\log p_j - \log q_j)

    Args:
        p_states: [N, d] states of the policy over which the mean is taken.
        q_states: [N, d] states of the other policy.
        unembedding: [V, d] unembedding matrix E_u.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.

    Returns:
        [N] divergences in nats, float64.
    """
    log_p = _log_policy(p_states, unembedding, bias, scale, softcap)
    log_q = _log_policy(q_states, unembedding, bias, scale, softcap)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def top_tokens(states: Tensor, unembedding: Tensor, bias: Tensor | None = None) -> Tensor:
    """Most probable token of each policy, written out in float64.

    A positive scale and a soft cap keep the order of the logits, so neither is an argument; with the cap, large logits
    would be equal even in float64.

    Args:
        states: [N, d] states.
        unembedding: [V, d] unembedding matrix E_u.
        bias: [V] bias of the unembedding, if the model has one.

    Returns:
        [N] ids.
    """
    return _log_policy(states, unembedding, bias, 1.0, None).argmax(dim=-1)


def token_log_probs(
    states: Tensor,
    targets: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probability that a policy gives to one token, written out in float64.

    Args:
        states: [N, d] states.
        targets: [N] token ids.
        unembedding: [V, d] unembedding matrix E_u.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.

    Returns:
        [N] log-probabilities in nats, float64.
    """
    return _log_policy(states, unembedding, bias, scale, softcap)[torch.arange(len(targets)), targets]


def _log_policy(
    states: Tensor, unembedding: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """[N, V] log-probabilities."""
    logits = states.double() @ unembedding.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, dim=-1)
