r"""How other policies differ from one, exactly and without [tokens, V]: online sums over blocks of vocabulary.

Each state is projected once, and four questions are answered from the same logits. With z the logits of the first
policy, y those of another one, and a, b their running maxima::

    s = sum_j exp(z_j - a)      u = sum_j exp(y_j - b)      t = sum_j exp(z_j - a) ((z_j - a) - (y_j - b))

    KL(softmax(z) || softmax(y)) = t / s - log s + log u

When a block raises the maxima by ``da = a_old - a_new <= 0`` and ``db``, they are carried over exactly, as in
``divergence``. Each state has a product of its own: equal states then have equal logits, bit for bit.

Shape legend: N states, n of them in a block, V vocabulary, v of it in a block, d residual width; S policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, block_sizes, check_shapes, check_targets


class PolicyChanges(NamedTuple):
    """Several policies at the same N positions, and how far the first one is from each."""

    divergence: Tensor
    """[S, N] KL(p_0 || p_k), nats; exactly 0 for the first policy."""
    entropy: Tensor
    """[S, N] entropies, nats."""
    log_prob: Tensor
    """[S, N] log-probabilities of the targets, nats."""
    top: Tensor
    """[S, N] the most probable token of each policy, int64."""


@torch.no_grad()
def policy_changes(
    states: Sequence[Tensor],
    targets: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> PolicyChanges:
    r"""Compare the policies of several states with that of the first, for one projection of each state.

    .. math:: KL(p_0, p_k) = \sum_j p_{0j} (\log p_{0j} - \log p_{kj}), \quad p_k = \mathrm{softmax}(x_k E_u^T)

    Products and sums run in float32 (float64 if an operand is float64), regardless of the operands' dtype. A state that
    holds NaN or inf has NaN in everything but its most probable token.

    Args:
        states: S states of the same N positions, [N, d] each; the first is that of the policy to compare with.
        targets: [N] token ids, on the same device.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one; positive.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        memory_budget: bytes of working memory, independent of N and V.

    Returns:
        Divergences, entropies and log-probabilities in nats, float32 (float64 if an operand is float64), and the most
        probable tokens, which are read before the cap, since it makes large logits equal.

    Raises:
        ValueError: the shapes do not fit, an id is beyond the vocabulary, or the budget is too small for a single row.

    Source: arXiv 2512.19673v3, eq. 7 for the entropies and fig. 5d for the divergence.
    """
    first_state = states[0]
    check_shapes(first_state, unembedding, bias)
    if len(shapes := {tuple(state.shape) for state in states}) > 1:
        raise ValueError(f"got states of shapes {sorted(shapes)}; needed are equal shapes")
    vocab, d = unembedding.shape
    check_targets(first_state, targets, vocab)
    n_states, n_rows, device = len(states), len(first_state), first_state.device
    dtype = torch.float64 if torch.float64 in (unembedding.dtype, *(s.dtype for s in states)) else torch.float32
    n, v = block_sizes(d, vocab, memory_budget, device, n_states * dtype.itemsize)
    n = max(1, min(n, n_rows))

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    divergence, entropy, log_prob = (empty(n_states, n_rows) for _ in range(3))
    found = PolicyChanges(divergence, entropy, log_prob, torch.zeros_like(divergence, dtype=torch.int64))
    buffers, exp_buffer, product_buffer = [empty(n * v) for _ in states], empty(n * v), empty(n * v)
    for start in range(0, n_rows, n):
        rows = slice(start, min(start + n, n_rows))
        x_snd = [state[rows].to(dtype) for state in states]
        target = targets[rows, None]
        p = len(target)
        # Before the cap the largest logit, after it the running maximum that is subtracted.
        largest = torch.full((n_states, p, 1), -torch.inf, dtype=dtype, device=device)
        m, s = largest, torch.zeros_like(largest)
        # Sums of exp(z - m) (z - m), and of exp(z_0 - m_0) ((z_0 - m_0) - (z_k - m_k)).
        t, c, chosen = torch.zeros_like(s), torch.zeros_like(s), torch.zeros_like(s)
        for first in range(0, vocab, v):
            e_vd = unembedding[first : first + v].to(dtype)
            width = len(e_vd)
            inside = (target >= first) & (target < first + width)
            place = (target - first).clamp(0, width - 1)
            z_snv = []
            here = torch.empty_like(largest)
            for k, x_nd in enumerate(x_snd):
                z_nv = buffers[k][: p * width].view(p, width)
                torch.mm(x_nd, e_vd.T, out=z_nv)
                if bias is not None:
                    z_nv += bias[first : first + v].to(dtype)
                if scale != 1.0:
                    z_nv *= scale
                best, ids = z_nv.max(dim=1, keepdim=True)
                found.top[k, rows] = torch.where(best > largest[k], ids + first, found.top[k, rows, None]).squeeze(1)
                here[k] = torch.maximum(largest[k], best)
                if softcap is not None:
                    z_nv.div_(softcap).tanh_().mul_(softcap)
                chosen[k] = torch.where(inside, z_nv.gather(1, place), chosen[k])
                z_snv.append(z_nv)
            largest = here
            m_new = largest if softcap is None else softcap * torch.tanh(largest / softcap)
            if first > 0:
                delta = m - m_new
                shrink = delta.exp()
                c = (c + (delta[:1] - delta) * s[:1]) * shrink[:1]
                t = (t + delta * s) * shrink
                s = s * shrink
            m = m_new
            weights = exp_buffer[: p * width].view(p, width)
            product = product_buffer[: p * width].view(p, width)
            for k, z_nv in enumerate(z_snv):
                z_nv -= m[k]
                # The exponentials of the first policy weigh the differences of all others.
                exp_nv = torch.exp(z_nv, out=weights if k == 0 else product)
                s[k] += exp_nv.sum(dim=1, keepdim=True)
                t[k] += torch.mul(exp_nv, z_nv, out=product).sum(dim=1, keepdim=True)
                if k:
                    c[k] += torch.sub(z_snv[0], z_nv, out=product).mul_(weights).sum(dim=1, keepdim=True)
        log_s = s.log()
        found.divergence[:, rows] = (c / s[:1] - log_s[:1] + log_s).squeeze(2)
        found.entropy[:, rows] = (log_s - t / s).squeeze(2)
        found.log_prob[:, rows] = (chosen - m - log_s).squeeze(2)
    return found
