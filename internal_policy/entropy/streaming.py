r"""Exact entropies that never hold [tokens, V]: an online log-sum-exp over blocks of tokens and vocabulary.

With the running maximum m of a row's logits z, two sums suffice::

    s = sum_j exp(z_j - m)          t = sum_j exp(z_j - m) (z_j - m)          H = log s - t / s

When a block raises the maximum by ``delta = m_old - m_new <= 0``, both are carried over exactly::

    s <- s exp(delta)               t <- (t + delta s) exp(delta)

Shape legend: N states, n of them in a block, V vocabulary, v of it in a block, d residual width.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEFAULT_MEMORY_BUDGET = 128 * 2**20
"""Bytes of working memory: the buffers that exist beside the states and the unembedding."""

# A logit block of 256 x 2048 float32 (2 MiB) stays in a CPU's shared cache between the product and the passes of the
# online softmax; an accelerator needs larger blocks to fill its units.
_CPU_BLOCK = (256, 2048)
_ACCELERATOR_BLOCK = (4096, 8192)


def block_sizes(d: int, vocab: int, memory_budget: int, device: torch.device, element_size: int = 4) -> tuple[int, int]:
    """Choose the block of states and of vocabulary from a memory budget.

    Args:
        d: residual width.
        vocab: vocabulary size V.
        memory_budget: bytes of working memory.
        device: where the products run.
        element_size: bytes of one number in the products.

    Returns:
        (n, v): states and vocabulary entries in a block.

    Raises:
        ValueError: the budget does not hold a block of one state and one vocabulary entry.
    """
    n, v = _CPU_BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK
    v = min(v, vocab)

    def need(n: int, v: int) -> int:
        # Logits and their exponentials, one converted block of states and one of the unembedding, running sums.
        return element_size * (2 * n * v + (n + v) * d + 8 * n)

    while need(n, v) > memory_budget and (n > 1 or v > 1):
        if n * (2 * v + d) >= v * (2 * n + d) and n > 1:
            n //= 2
        else:
            v = max(1, v // 2)
    if need(n, v) > memory_budget:
        raise ValueError(f"memory_budget is {memory_budget} bytes; d = {d} needs at least {need(1, 1)}")
    return n, v


@torch.no_grad()
def policy_entropy(
    states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""Entropy of ``softmax(states @ unembedding.T)``, block by block.

    Products and sums run in float32 (float64 where an operand is float64), whatever the operands' dtype. A state that
    holds NaN or inf has entropy NaN.

    Args:
        states: [N, d] residual states or module writes.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, where the model has one.
        scale: factor on the logits, where the model has one.
        softcap: c in ``c * tanh(logits / c)``, where the model caps its logits.
        memory_budget: bytes of working memory, whatever N and V.

    Returns:
        [N] entropies in nats, float32 (float64 where an operand is float64).

    Raises:
        ValueError: the shapes do not fit, or the budget is too small for a single row.

    Source: arXiv 2512.19673v3, eq. 7.
    """
    if states.ndim != 2 or unembedding.ndim != 2 or states.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"got states {tuple(states.shape)} and unembedding {tuple(unembedding.shape)}; needed [N, d] and [V, d]"
        )
    vocab, d = unembedding.shape
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"got a bias of shape {tuple(bias.shape)}; needed [{vocab}]")
    dtype = torch.float64 if torch.float64 in (states.dtype, unembedding.dtype) else torch.float32
    n, v = block_sizes(d, vocab, memory_budget, states.device, dtype.itemsize)

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=states.device)

    entropies = empty(states.shape[0])
    logits_buffer, exp_buffer = empty(n * v), empty(n * v)
    for start in range(0, states.shape[0], n):
        x_nd = states[start : start + n].to(dtype)
        rows = x_nd.shape[0]
        m = torch.full((rows, 1), -torch.inf, dtype=dtype, device=states.device)
        s, t = torch.zeros_like(m), torch.zeros_like(m)
        for first in range(0, vocab, v):
            e_vd = unembedding[first : first + v].to(dtype)
            width = e_vd.shape[0]
            z_nv = logits_buffer[: rows * width].view(rows, width)
            torch.mm(x_nd, e_vd.T, out=z_nv)
            if bias is not None:
                z_nv += bias[first : first + v].to(dtype)
            if scale != 1.0:
                z_nv *= scale
            if softcap is not None:
                z_nv.div_(softcap).tanh_().mul_(softcap)
            m_new = torch.maximum(m, z_nv.amax(dim=1, keepdim=True))
            if first > 0:
                delta = m - m_new
                shrink = delta.exp()
                t = (t + delta * s) * shrink
                s = s * shrink
            m = m_new
            z_nv -= m
            p_nv = torch.exp(z_nv, out=exp_buffer[: rows * width].view(rows, width))
            s += p_nv.sum(dim=1, keepdim=True)
            t += z_nv.mul_(p_nv).sum(dim=1, keepdim=True)
        entropies[start : start + n] = (s.log() - t / s).squeeze(1)
    return entropies
