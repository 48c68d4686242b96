r"""Exact entropies that never hold [tokens, V]: an online log-sum-exp over blocks of tokens and vocabulary.

With the running maximum m of a row's logits z, counted in units of log 2, two sums suffice::

    s = sum_j 2^(z_j - m)           t = sum_j 2^(z_j - m) (z_j - m)           H = log(2) (log2 s - t / s)

When a block raises the maximum by ``delta = m_old - m_new <= 0``, both are carried over exactly::

    s <- s 2^delta                  t <- (t + delta s) 2^delta

Base 2, because a CPU raises 2 to a power in two thirds of the time that it takes for e, and as exactly.

A linear projection gives a state at another length the same logits times a factor, so one product serves all lengths of
a state. Without a bias and a soft cap their differences from the maximum are multiples of one another, too.

Shape legend: N states, n of them in a block, V vocabulary, v of it in a block, d residual width; S states at each
position, R running sums of them, K further lengths of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_BUDGET = 128 * 2**20
"""Bytes of working memory: the buffers in addition to the states and the unembedding."""

# A logit block of 1024 x 1024 float32 (4 MiB) stays in a CPU's shared cache between the product and the passes of the
# online softmax, together with the 4 MiB of either operand at a width of 1024; half as many rows cost a product a tenth
# of its rate. An accelerator needs larger blocks to fill its units.
_CPU_BLOCK = (1024, 1024)
_ACCELERATOR_BLOCK = (4096, 8192)
_LOG2_E = 1.4426950408889634

_HALF = (torch.bfloat16, torch.float16)
_failures: set[str] = set()
"""The reasons not to try the fused kernel again: if it fails to compile once, it fails at every call."""


def check_shapes(states: Tensor, unembedding: Tensor, bias: Tensor | None) -> None:
    """Refuse operands that do not fit each other with a ``ValueError``."""
    if states.ndim != 2 or unembedding.ndim != 2 or states.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"got states {tuple(states.shape)} and unembedding {tuple(unembedding.shape)}; needed [N, d] and [V, d]"
        )
    if bias is not None and bias.shape != unembedding.shape[:1]:
        raise ValueError(f"got a bias of shape {tuple(bias.shape)}; needed [{len(unembedding)}]")


def check_targets(states: Tensor, targets: Tensor, vocab: int) -> None:
    """Refuse targets that are not one id of the vocabulary per state with a ``ValueError``."""
    if targets.shape != states.shape[:1]:
        raise ValueError(f"got targets {tuple(targets.shape)} for {len(states)} states; needed is one id a state")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab:
        raise ValueError(f"got ids from {int(targets.min())} to {int(targets.max())}; needed are 0 to {vocab - 1}")


def block_sizes(d: int, vocab: int, memory_budget: int, device: torch.device, element_size: int = 4) -> tuple[int, int]:
    """Choose n states and v vocabulary entries of a block, so that its buffers fit in ``memory_budget`` bytes.

    ``d`` is the residual width, and ``element_size`` the bytes of one number in the products. A ``ValueError`` says
    that the budget does not hold a block of one state and one vocabulary entry.
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

    Products and sums run in float32 (float64 if an operand is float64), regardless of the operands' dtype. A state that
    holds NaN or inf has entropy NaN.

    Args:
        states: [N, d] residual states or module writes.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        memory_budget: bytes of working memory, independent of N and V.

    Returns:
        [N] entropies in nats, float32 (float64 if an operand is float64).

    Raises:
        ValueError: the shapes do not fit, or the budget is too small for a single row.

    Source: arXiv 2512.19673v3, eq. 7.
    """
    return policy_entropies([states], unembedding, bias, scale=scale, softcap=softcap, memory_budget=memory_budget)[0]


@torch.no_grad()
def policy_entropies(
    states: Sequence[Tensor],
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    sums: Sequence[Sequence[int]] = (),
    lengths: Sequence[tuple[int, Tensor]] = (),
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""Entropies of several states at each position, of running sums of them and of both at other lengths.

    Only the states cost products. The projection is linear, so the logits of H^l = H^{l-1} + A^l + F^l (eq. 4) are the
    sum of the logits of its terms, all of which are projected anyway, and those of a state at another length are
    multiples of its own.

    Args:
        states: S states of the same N positions, [N, d] each.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        sums: R lists of indices into ``states``; the first sum is that of its two or more states, each later one adds
            its states to the one before.
        lengths: K pairs of an index into the states and then the sums, and the factors [N], at least 0, by which that
            state is multiplied at each position; in ascending order of the indices, each at most once. The bias and the
            soft cap of the logits are applied after the factor.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        memory_budget: bytes of working memory, independent of N and V.

    Returns:
        [S + R + K, N] entropies in nats, of the states, of the sums and of the further lengths; float32 (float64 if an
        operand is float64).

    Raises:
        ValueError: the shapes do not fit, or the budget is too small for a single row.

    Source: arXiv 2512.19673v3, eqs. 4 and 7.
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "memory_budget": memory_budget}
    for row, factors in lengths:
        if not 0 <= row < len(states) + len(sums) or factors.shape != states[0].shape[:1]:
            raise ValueError(
                f"got factors {tuple(factors.shape)} for row {row} of {len(states) + len(sums)}; needed is one a state"
            )
    if not sums and (found := _fused_entropies(states, unembedding, bias, lengths, **options)) is not None:
        return found
    return _block_by_block(states, unembedding, bias, sums=sums, lengths=lengths, **options)


def fused(
    quantity: Literal["policy_entropy", "policy_entropies_at_lengths", "token_log_probs"],
    states: Tensor,
    unembedding: Tensor,
    *rest: Any,
    **options: Any,
) -> Tensor | None:
    """Compute a quantity [N] or [2, N] in nats with ``triton_kernel``; None if the blocks of torch have to.

    ``rest`` holds the targets, if the quantity has any, and then the bias or None; ``options`` are scale, softcap and
    memory_budget.
    """
    if _failures or not kernel_is_faster(states, unembedding, *rest):
        return None
    try:
        from internal_policy.entropy import triton_kernel

        tensors = (states, *rest[:-1], unembedding, rest[-1])
        result: Tensor = getattr(triton_kernel, quantity)(*tensors, **options)
    except torch.OutOfMemoryError:
        # The caller reduces its batch size.
        raise
    # Compilers, drivers and launchers raise exceptions of their own, and the blocks give the same numbers.
    except Exception as error:
        reason = "triton is not installed" if isinstance(error, ImportError) else _first_line(error)
        _failures.add(reason)
        logger.warning("The fused kernel is not used (%s); entropies are computed block by block, slower.", reason)
        return None
    return result


def kernel_is_faster(states: Tensor, unembedding: Tensor, *rest: Tensor | None) -> bool:
    """Whether the fused kernel applies to these operands (see ``fused``) and is faster than the blocks of torch.

    It is on CUDA devices with bfloat16 products (Ampere or later), for operands of one 16-bit dtype, and for float32
    where torch may round products to TF32. For products in full float32, which no tensor cores compute, cuBLAS is
    faster. Operands that do not fit each other are left to the checks of the functions that go block by block.
    """
    device, dtype, bias = states.device, states.dtype, rest[-1]
    if device.type != "cuda" or dtype != unembedding.dtype or device != unembedding.device:
        return False
    if states.ndim != 2 or unembedding.ndim != 2 or states.shape[1] != unembedding.shape[1]:
        return False
    if any(other is not None and (other.device != device or other.ndim != 1) for other in rest):
        return False
    if bias is not None and len(bias) != len(unembedding):
        return False
    if dtype not in _HALF and not (dtype == torch.float32 and rounds_to_tf32()):
        return False
    return _has_matrix_units(device)


def rounds_to_tf32() -> bool:
    """Whether torch may round the factors of float32 products on CUDA devices to TF32.

    ``allow_tf32`` says the same, but raises once the precision was set by its newer name.
    """
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


def _has_matrix_units(device: torch.device) -> bool:
    """Whether a device is an NVIDIA GPU of Ampere or later, the only ones for which the kernel was compiled."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _fused_entropies(
    states: Sequence[Tensor],
    unembedding: Tensor,
    bias: Tensor | None,
    lengths: Sequence[tuple[int, Tensor]],
    **options: Any,
) -> Tensor | None:
    """[S + K, N] entropies of several states with the fused kernel, or None where it is not used."""
    if len({state.shape for state in states}) > 1:
        return None
    factors = dict(lengths)
    entropies, others = [], []
    for index, state in enumerate(states):
        if index in factors:
            both = fused("policy_entropies_at_lengths", state, unembedding, factors[index].float(), bias, **options)
            if both is None:
                return None
            entropy, other = both
            others.append(other)
        else:
            entropy = fused("policy_entropy", state, unembedding, bias, **options)
            if entropy is None:
                return None
        entropies.append(entropy)
    return torch.stack([*entropies, *others])


def _block_by_block(
    states: Sequence[Tensor],
    unembedding: Tensor,
    bias: Tensor | None,
    *,
    sums: Sequence[Sequence[int]],
    lengths: Sequence[tuple[int, Tensor]],
    scale: float,
    softcap: float | None,
    memory_budget: int,
) -> Tensor:
    first_state = states[0]
    check_shapes(first_state, unembedding, bias)
    if len(shapes := {tuple(state.shape) for state in states}) > 1:
        raise ValueError(f"got states of shapes {sorted(shapes)}; needed are equal shapes")
    vocab, d = unembedding.shape
    # Each sum starts from the previous one, whose logits are in the rows above its own.
    added = [[len(states) + i - 1, *terms] if i else list(terms) for i, terms in enumerate(sums)]
    device = first_state.device
    dtype = torch.float64 if torch.float64 in (unembedding.dtype, *(s.dtype for s in states)) else torch.float32
    n, v = block_sizes(d, vocab, memory_budget, device, dtype.itemsize)
    projected, rows = len(states), len(states) + len(sums)
    total = rows + len(lengths)
    # The maxima of a state's other lengths are multiples of its own if nothing but the product makes the logits.
    linear = bias is None and softcap is None
    searched = rows if linear else total
    # The product keeps its full height; the sums of its rows and their other lengths need room beyond it.
    positions = max(1, min(n // projected, len(first_state)))

    def fitting(positions: int) -> int:
        """Vocabulary entries for which the budget has room beside the states and the running sums."""
        room = memory_budget // dtype.itemsize - positions * (projected * d + 8 * total)
        return room // (2 * positions * total + d)

    # If the budget does not hold all rows of these positions, the blocks of vocabulary become smaller.
    while positions > 1 and fitting(positions) < 1:
        positions //= 2
    v = min(v, fitting(positions))
    if v < 1:
        raise ValueError(f"memory_budget is {memory_budget} bytes; it does not hold {projected} states of d = {d}")
    # Logits in units of log 2: the factor is applied to the states or the cap, where it costs no pass over the logits.
    factor_of_logits = scale * _LOG2_E if softcap is None else scale / softcap

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    entropies = empty(total, len(first_state))
    x_buffer, e_buffer = empty(projected * positions * d), None if unembedding.dtype == dtype else empty(v, d)
    logits_buffer, exp_buffer = empty(total * positions * v), empty(total * positions * v)
    for start in range(0, len(first_state), positions):
        p = min(positions, len(first_state) - start)
        x_spd = x_buffer[: projected * p * d].view(projected, p, d)
        for place, state in enumerate(states):
            x_spd[place] = state[start : start + p]
        x_spd *= factor_of_logits
        x_nd = x_spd.view(projected * p, d)
        factors = [(row, factor[start : start + p, None].to(dtype)) for row, factor in lengths]
        m = torch.full((total * p, 1), -torch.inf, dtype=dtype, device=device)
        s, t = torch.zeros_like(m), torch.zeros_like(m)
        for first in range(0, vocab, v):
            e_vd = unembedding[first : first + v]
            if e_buffer is not None:
                e_vd = e_buffer[: len(e_vd)].copy_(e_vd)
            width = len(e_vd)
            z_nv = logits_buffer[: total * p * width].view(total * p, width)
            torch.mm(x_nd, e_vd.T, out=z_nv[: projected * p])
            if first == 0 or width < v:
                # A view of each state's rows costs as much as a small sum: blocks of equal shape share the views.
                by_state = z_nv.view(total, p, width).unbind()
            for place, (one, other, *further) in enumerate(added, start=projected):
                torch.add(by_state[one], by_state[other], out=by_state[place])
                for term in further:
                    by_state[place].add_(by_state[term])
            if not linear:
                for place, (row, factor) in enumerate(factors, start=rows):
                    torch.mul(by_state[row], factor, out=by_state[place])
            if bias is not None:
                z_nv += bias[first : first + v].to(dtype) * factor_of_logits
            if softcap is not None:
                z_nv.tanh_().mul_(softcap * _LOG2_E)
            found_nv = z_nv[: searched * p]
            m_new = torch.maximum(m[: searched * p], found_nv.amax(dim=1, keepdim=True))
            found_nv -= m_new
            if linear:
                maxima = m_new.view(rows, p, 1)
                for place, (row, factor) in enumerate(factors, start=rows):
                    torch.mul(by_state[row], factor, out=by_state[place])
                m_new = torch.cat([m_new, *(maxima[row] * factor for row, factor in factors)])
            if first > 0:
                delta = m - m_new
                shrink = delta.exp2()
                t = (t + delta * s) * shrink
                s = s * shrink
            m = m_new
            p_nv = torch.exp2(z_nv, out=exp_buffer[: z_nv.numel()].view_as(z_nv))
            s += p_nv.sum(dim=1, keepdim=True)
            t += z_nv.mul_(p_nv).sum(dim=1, keepdim=True)
        entropies[:, start : start + p] = ((s.log2() - t / s) / _LOG2_E).view(total, p)
    return entropies


# An NDIF server receives this function as source, and has neither the kernel nor a logger.
policy_entropies.__wrapped__ = _block_by_block  # type: ignore[attr-defined]
