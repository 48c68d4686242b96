r"""Exact divergences and log-probabilities that never hold [tokens, V]: online sums over blocks of vocabulary.

With the running maxima a, b of two rows of logits z and y, three sums suffice::

    s = sum_j exp(z_j - a)      u = sum_j exp(y_j - b)      t = sum_j exp(z_j - a) ((z_j - a) - (y_j - b))

    KL(softmax(z) || softmax(y)) = t / s - log s + log u

When a block raises the maxima by ``da = a_old - a_new <= 0`` and ``db = b_old - b_new <= 0``, they are carried over
exactly::

    t <- (t + (da - db) s) exp(da)      s <- s exp(da)      u <- u exp(db)

All differences are taken from the maxima, so that logits of any size lose nothing but their own rounding.

Shape legend: N states, n of them in a block, V vocabulary, v of it in a block, d residual width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, block_sizes, check_shapes, check_targets, fused


@dataclass(frozen=True)
class _Head:
    """E_u with the model's own transform of logits, read in blocks of vocabulary."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype

    def logits(self, x_nd: Tensor, first: int, v: int, buffer: Tensor) -> Tensor:
        """Write the logits of one block into a buffer; [n, v], fewer columns in the last block."""
        e_vd = self.weight[first : first + v].to(self.dtype)
        z_nv = buffer[: len(x_nd) * len(e_vd)].view(len(x_nd), len(e_vd))
        torch.mm(x_nd, e_vd.T, out=z_nv)
        if self.bias is not None:
            z_nv += self.bias[first : first + v].to(self.dtype)
        if self.scale != 1.0:
            z_nv *= self.scale
        if self.softcap is not None:
            z_nv.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_nv


@torch.no_grad()
def policy_divergence(
    p_states: Tensor,
    q_states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""Kullback-Leibler divergence of two policies, block by block.

    .. math:: KL(p, q) = \sum_j p_j (\log p_j - \log q_j), \quad p = \mathrm{softmax}(x_p E_u^T)

    Products and sums run in float32 (float64 if an operand is float64), regardless of the operands' dtype. It is
    negative only by rounding. A state that holds NaN or inf has divergence NaN.

    Args:
        p_states: [N, d] states of the policy over which the mean is taken.
        q_states: [N, d] states of the other policy, on the same device.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        memory_budget: bytes of working memory, independent of N and V.

    Returns:
        [N] divergences in nats, float32 (float64 if an operand is float64).

    Raises:
        ValueError: the shapes do not fit, or the budget is too small for a single row.

    Source: arXiv 2512.19673v3, fig. 5d.
    """
    if p_states.shape != q_states.shape:
        raise ValueError(f"got states {tuple(p_states.shape)} and {tuple(q_states.shape)}; needed are equal shapes")
    head = _head(p_states, unembedding, bias, scale, softcap, q_states.dtype)
    vocab, d = unembedding.shape
    # There are two of everything that a block of entropies holds, so each number counts twice.
    n, v = block_sizes(d, vocab, memory_budget, p_states.device, 2 * head.dtype.itemsize)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=head.dtype, device=p_states.device)

    divergences = empty(len(p_states))
    z_buffer, y_buffer, exp_buffer = empty(n * v), empty(n * v), empty(n * v)
    for start in range(0, len(p_states), n):
        x_nd, w_nd = (states[start : start + n].to(head.dtype) for states in (p_states, q_states))
        a = torch.full((len(x_nd), 1), -torch.inf, dtype=head.dtype, device=p_states.device)
        b = a.clone()
        s, u, t = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
        for first in range(0, vocab, v):
            z_nv = head.logits(x_nd, first, v, z_buffer)
            y_nv = head.logits(w_nd, first, v, y_buffer)
            a_new = torch.maximum(a, z_nv.amax(dim=1, keepdim=True))
            b_new = torch.maximum(b, y_nv.amax(dim=1, keepdim=True))
            if first > 0:
                da, db = a - a_new, b - b_new
                t = (t + (da - db) * s) * da.exp()
                s, u = s * da.exp(), u * db.exp()
            a, b = a_new, b_new
            z_nv -= a
            y_nv -= b
            exp_nv = torch.exp(z_nv, out=exp_buffer[: z_nv.numel()].view_as(z_nv))
            s += exp_nv.sum(dim=1, keepdim=True)
            t += z_nv.sub_(y_nv).mul_(exp_nv).sum(dim=1, keepdim=True)
            u += y_nv.exp_().sum(dim=1, keepdim=True)
        divergences[start : start + n] = (t / s - s.log() + u.log()).squeeze(1)
    return divergences


@torch.no_grad()
def token_log_probs(
    states: Tensor,
    targets: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""Log-probability that each state's policy gives to one token, block by block.

    Products and sums run in float32 (float64 if an operand is float64), regardless of the operands' dtype. A state that
    holds NaN or inf has log-probability NaN.

    Args:
        states: [N, d] states.
        targets: [N] token ids, on the same device.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        memory_budget: bytes of working memory, independent of N and V.

    Returns:
        [N] log-probabilities in nats, at most 0, float32 (float64 if an operand is float64).

    Raises:
        ValueError: the shapes do not fit, an id is beyond the vocabulary, or the budget is too small for a single row.

    Source: the factors of arXiv 2512.19673v3, eq. 1.
    """
    head = _head(states, unembedding, bias, scale, softcap, states.dtype)
    vocab, d = unembedding.shape
    check_targets(states, targets, vocab)
    options = {"scale": scale, "softcap": softcap, "memory_budget": memory_budget}
    if (by_kernel := fused("token_log_probs", states, unembedding, targets, bias, **options)) is not None:
        return by_kernel
    n, v = block_sizes(d, vocab, memory_budget, states.device, head.dtype.itemsize)
    log_probs = torch.empty(len(states), dtype=head.dtype, device=states.device)
    buffer = torch.empty(n * v, dtype=head.dtype, device=states.device)
    for start in range(0, len(states), n):
        x_nd, target = states[start : start + n].to(head.dtype), targets[start : start + n, None]
        m = torch.full((len(x_nd), 1), -torch.inf, dtype=head.dtype, device=states.device)
        s, chosen = torch.zeros_like(m), torch.zeros_like(m)
        for first in range(0, vocab, v):
            z_nv = head.logits(x_nd, first, v, buffer)
            # Taken from the same product as the sum, so that rounding never makes a token more than certain.
            inside = (target >= first) & (target < first + z_nv.shape[1])
            chosen = torch.where(inside, z_nv.gather(1, (target - first).clamp(0, z_nv.shape[1] - 1)), chosen)
            m_new = torch.maximum(m, z_nv.amax(dim=1, keepdim=True))
            s = s * (m - m_new).exp() if first > 0 else s
            m = m_new
            s += z_nv.sub_(m).exp_().sum(dim=1, keepdim=True)
        log_probs[start : start + n] = (chosen - m - s.log()).squeeze(1)
    return log_probs


@torch.no_grad()
def top_tokens(
    states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""Most probable token of each state's policy, block by block.

    A soft cap does not change the order of logits, and makes large ones equal; it is therefore left out. Products run
    in float32 (float64 if an operand is float64), regardless of the operands' dtype.

    Args:
        states: [N, d] states.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        memory_budget: bytes of working memory, independent of N and V.

    Returns:
        [N] token ids, int64; the first of several that are equally probable.

    Raises:
        ValueError: the shapes do not fit, or the budget is too small for a single row.
    """
    head = _head(states, unembedding, bias, scale, None, states.dtype)
    vocab, d = unembedding.shape
    n, v = block_sizes(d, vocab, memory_budget, states.device, head.dtype.itemsize)
    found = torch.empty(len(states), dtype=torch.int64, device=states.device)
    buffer = torch.empty(n * v, dtype=head.dtype, device=states.device)
    for start in range(0, len(states), n):
        x_nd = states[start : start + n].to(head.dtype)
        largest = torch.full((len(x_nd),), -torch.inf, dtype=head.dtype, device=states.device)
        top = torch.zeros(len(x_nd), dtype=torch.int64, device=states.device)
        for first in range(0, vocab, v):
            here, place = head.logits(x_nd, first, v, buffer).max(dim=1)
            top = torch.where(here > largest, place + first, top)
            largest = torch.maximum(largest, here)
        found[start : start + n] = top
    return found


def _head(
    states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    other: torch.dtype,
) -> _Head:
    """Check shapes and choose the dtype of products and sums."""
    check_shapes(states, unembedding, bias)
    dtype = torch.float64 if torch.float64 in (states.dtype, unembedding.dtype, other) else torch.float32
    return _Head(unembedding, bias, scale, softcap, dtype)
