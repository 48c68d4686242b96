"""Where the fused kernel of ``triton_kernel`` serves, and what is said where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
# Why the kernel is not tried again: what fails to compile once fails at every call.
_failures: set[str] = set()


def fused(
    quantity: Literal["policy_entropy", "token_log_probs"],
    states: Tensor,
    unembedding: Tensor,
    *rest: Any,
    **options: Any,
) -> Tensor | None:
    """Compute a quantity with the fused kernel, where it serves.

    Args:
        quantity: function of ``triton_kernel``.
        states: [N, d] states.
        unembedding: [V, d] unembedding matrix E_u.
        rest: targets where the quantity has any, and the bias or None.
        options: scale, softcap and memory_budget.

    Returns:
        [N] nats, or None where the blocks of torch are to do it.
    """
    if _failures or not serves(states, unembedding, *rest):
        return None
    try:
        from internal_policy.entropy import triton_kernel

        tensors = (states, *rest[:-1], unembedding, rest[-1])
        result: Tensor = getattr(triton_kernel, quantity)(*tensors, **options)
    except torch.OutOfMemoryError:
        # The caller makes its batches smaller.
        raise
    # Compilers, drivers and launchers fail in ways of their own, and the blocks give the same numbers.
    except Exception as error:
        reason = "triton is not installed" if isinstance(error, ImportError) else _first_line(error)
        _failures.add(reason)
        logger.warning("The fused kernel is not used (%s); entropies are computed block by block, slower.", reason)
        return None
    return result


def fused_entropies(
    states: Sequence[Tensor], unembedding: Tensor, bias: Tensor | None, **options: Any
) -> Tensor | None:
    """Entropies of several states at each position with the fused kernel, where it serves.

    Args:
        states: S states of the same N positions, [N, d] each.
        unembedding: [V, d] unembedding matrix E_u.
        bias: [V] bias of the unembedding, where the model has one.
        options: scale, softcap and memory_budget.

    Returns:
        [S, N] nats, or None where the blocks of torch are to do it.
    """
    if len({state.shape for state in states}) > 1:
        return None
    entropies = []
    for state in states:
        entropy = fused("policy_entropy", state, unembedding, bias, **options)
        if entropy is None:
            return None
        entropies.append(entropy)
    return torch.stack(entropies)


def serves(states: Tensor, unembedding: Tensor, *rest: Tensor | None) -> bool:
    """Whether the kernel is the faster way to these operands' numbers.

    That is on CUDA devices with bfloat16 products, for operands of one 16-bit dtype, and for float32 where torch may
    round products to TF32. Products in full float32 have no tensor cores to run on, and cuBLAS is the better compiler.

    Args:
        states: [N, d] states.
        unembedding: [V, d] unembedding matrix E_u.
        rest: targets where the quantity has any, and the bias or None.

    Returns:
        True where the kernel serves.
    """
    device, dtype = states.device, states.dtype
    if device.type != "cuda" or dtype != unembedding.dtype:
        return False
    # What does not fit is told by the checks of the functions that go block by block.
    if states.ndim != 2 or unembedding.ndim != 2 or states.shape[1] != unembedding.shape[1]:
        return False
    if any(other is not None and (other.device != device or other.ndim != 1) for other in rest):
        return False
    if unembedding.device != device or (rest[-1] is not None and len(rest[-1]) != len(unembedding)):
        return False
    if dtype not in _HALF and not (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"):
        return False
    return _has_matrix_units(device)


def _has_matrix_units(device: torch.device) -> bool:
    """Whether a device is NVIDIA's, Ampere or later; the kernel was compiled for no other."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def _first_line(error: Exception) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
