r"""Exact divergences and log-probabilities that never hold [tokens, V]: online sums over blocks of vocabulary.

With the running maxima a, b of two rows of logits z and y, three sums suffice::

    s = sum_j exp(z_j - a)      u = sum_j exp(y_j - b)      t = sum_j exp(z_j - a) ((z_j - a) - (y_j - b))

    KL(softmax(z) || softmax(y)) = t / s - log s + log u

When a block raises the maxima by ``da = a_old - a_new <= 0`` and ``db = b_old - b_new <= 0``, they are carried over
exactly::

    t <- (t + (da - db) s) exp(da)      s <- s exp(da)      u <- u exp(db)

All differences are taken from the maxima, so that logits of any size lose nothing but their own rounding.

For the policies of S states at one position, t is split into cross terms, which make one matrix product of S rows by S
columns::

    c_kl = sum_j exp(z_kj - a_k) (z_lj - a_l)       KL(p_k || p_l) = (c_kk - c_kl) / s_k - log s_k + log s_l

That product costs S / d of the projection, so all S^2 divergences cost little more than the projections of S states.

Shape legend: N states or positions, n of them in a block, V vocabulary, v of it in a block, d residual width, S states
at each position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, block_sizes, check_shapes, check_targets, fused

_LOG2_E = 1.4426950408889634


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
def policy_divergences(
    states: Sequence[Tensor],
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor]:
    r"""Kullback-Leibler divergences between all policies at each position, for one projection of each state.

    .. math:: KL(p_k, p_l) = \sum_j p_{kj} (\log p_{kj} - \log p_{lj}), \quad p_k = \mathrm{softmax}(x_k E_u^T)

    Products and sums run in float32 (float64 if an operand is float64), regardless of the operands' dtype. A divergence
    is negative only by rounding, and exactly 0 on the diagonal. All divergences of a state that holds NaN or inf are
    NaN.

    Args:
        states: S states of the same N positions, [N, d] each.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one; positive.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        memory_budget: bytes of working memory, independent of N and V. The result takes N S^2 numbers besides.

    Returns:
        [N, S, S] divergences in nats, float32 (float64 if an operand is float64): entry [n, k, l] is KL(p_k || p_l) at
        position n. [N, S] the most probable token of each policy, int64; it is read before the cap, which makes large
        logits equal.

    Raises:
        ValueError: the shapes do not fit, or the budget is too small for a single position.

    Source: arXiv 2512.19673v3, fig. 5d, for every pair of layers.
    """
    # An NDIF server receives this function as source: it defines no class, and `_Head` would not exist there.
    check_shapes(states[0], unembedding, bias)
    if len(shapes := {tuple(state.shape) for state in states}) > 1:
        raise ValueError(f"got states of shapes {sorted(shapes)}; needed are equal shapes")
    n_states, n_positions, device = len(states), len(states[0]), states[0].device
    vocab, d = unembedding.shape
    dtype = torch.float64 if torch.float64 in (unembedding.dtype, *(s.dtype for s in states)) else torch.float32
    n, v = block_sizes(d, vocab, memory_budget, device, dtype.itemsize)
    positions = max(1, min(n // n_states, n_positions))

    def room(positions: int) -> int:
        """Vocabulary entries that fit: what is left by the states, the cross terms and the running sums."""
        fixed = positions * n_states * (d + 4 * n_states + 8)
        return (memory_budget // dtype.itemsize - fixed) // (2 * positions * n_states + d)

    while positions > 1 and room(positions) < v:
        positions //= 2
    v = min(v, room(positions))
    if v < 1:
        raise ValueError(f"memory_budget is {memory_budget} bytes; it does not hold {n_states} states of d = {d}")
    # Logits in units of log 2, which a CPU exponentiates faster; the factor is applied to the states or the cap.
    factor = scale * _LOG2_E if softcap is None else scale / softcap

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    divergences = empty(n_positions, n_states, n_states)
    top = torch.zeros(n_positions, n_states, dtype=torch.int64, device=device)
    x_buffer, e_buffer = empty(positions * n_states * d), None if unembedding.dtype == dtype else empty(v, d)
    logits_buffer, exp_buffer = empty(positions * n_states * v), empty(positions * n_states * v)
    for start in range(0, n_positions, positions):
        p = min(positions, n_positions - start)
        x_psd = x_buffer[: p * n_states * d].view(p, n_states, d)
        for place, state in enumerate(states):
            x_psd[:, place] = state[start : start + p]
        x_psd *= factor
        x_nd = x_psd.view(p * n_states, d)
        ids = top[start : start + p]
        # Before the cap the largest logit, after it the running maximum that is subtracted.
        largest = torch.full((p, n_states), -torch.inf, dtype=dtype, device=device)
        m, s = largest, torch.zeros_like(largest)
        c = torch.zeros(p, n_states, n_states, dtype=dtype, device=device)
        for first in range(0, vocab, v):
            e_vd = unembedding[first : first + v]
            if e_buffer is not None:
                e_vd = e_buffer[: len(e_vd)].copy_(e_vd)
            z_psv = logits_buffer[: len(x_nd) * len(e_vd)].view(p, n_states, len(e_vd))
            torch.mm(x_nd, e_vd.T, out=z_psv.view(len(x_nd), len(e_vd)))
            if bias is not None:
                z_psv += bias[first : first + v].to(dtype) * factor
            here, place_here = z_psv.max(dim=2)
            torch.where(here > largest, place_here + first, ids, out=ids)
            largest = torch.maximum(largest, here)
            m_new = largest
            if softcap is not None:
                z_psv.tanh_().mul_(softcap * _LOG2_E)
                m_new = torch.tanh(largest) * (softcap * _LOG2_E)
            if first > 0:
                delta = m - m_new
                shrink = delta.exp2()
                c = (c + s[:, :, None] * delta[:, None, :]) * shrink[:, :, None]
                s = s * shrink
            m = m_new
            z_psv -= m[:, :, None]
            p_psv = torch.exp2(z_psv, out=exp_buffer[: z_psv.numel()].view_as(z_psv))
            s += p_psv.sum(dim=2)
            c += torch.bmm(p_psv, z_psv.mT)
        own = torch.diagonal(c, dim1=1, dim2=2)
        log_s = s.log2()
        bits = (own[:, :, None] - c) / s[:, :, None] - log_s[:, :, None] + log_s[:, None, :]
        divergences[start : start + p] = bits / _LOG2_E
    return divergences, top


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
