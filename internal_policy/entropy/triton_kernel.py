"""Entropies and log-probabilities in one kernel: product, bias, scale, soft cap and online sums, forward only.

A program of the kernel holds a block of rows, walks over a slice of the vocabulary tile by tile, and keeps the running
maximum m and the sums s and t of ``streaming`` in registers. Logits exist as one tile a program, never in memory. Each
program writes three numbers per row; the slices of a row are merged exactly, as blocks are merged in ``streaming``.

A state at another length f |x| has f times the products of x. With a factor for each row, the same sums are kept for
the products times f, so that one product serves two lengths. Bias and soft cap are not linear; they follow the factor.

Products of 16-bit operands of one dtype are exact in the float32 in which they are summed, so nothing is widened in
memory. Operands of two dtypes are widened tile by tile in registers and multiplied as float32: the numbers are those of
the CPU. float32 products are rounded to TF32 only where ``torch.backends.cuda.matmul`` allows it.

Import this module only where triton is installed. With ``TRITON_INTERPRET=1`` it runs on CPU tensors.

Shape legend: N states, V vocabulary, S slices of it, d residual width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from internal_policy.entropy import tiles, triton_source

_MEMORY_BUDGET = 32 * 2**20

# Row blocks that walk over one slice at a time: their states (16 x 128 x d) stay in L2 while E_u streams through it.
_GROUP = 16


@dataclass(frozen=True)
class Sums:
    """The online sums of every row over the whole vocabulary, each [N] float32."""

    m: Tensor
    s: Tensor
    t: Tensor
    chosen: Tensor
    """Logits of the targets, where targets were given."""
    other: Sums | None = None
    """The sums at the other lengths, where lengths were given; the targets' logits are at the states' own."""

    def entropy(self) -> Tensor:
        """[N] entropies in nats."""
        return self.s.log() - self.t / self.s

    def log_probs(self) -> Tensor:
        """[N] log-probabilities of the targets in nats, at most 0."""
        return self.chosen - self.m - self.s.log()


_kernel = triton.heuristics({"EVEN_K": lambda meta: meta["d"] % meta["BLOCK_K"] == 0})(triton_source.online_sums)
INTERPRETED = not isinstance(triton_source.online_sums, triton.JITFunction)
"""Whether ``TRITON_INTERPRET=1`` was set when this module was imported."""


def policy_entropy(states: Tensor, unembedding: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """Compute [N] entropies of ``softmax(states @ unembedding.T)`` in nats; see ``online_sums``."""
    return online_sums(states, unembedding, bias, **options).entropy()


def policy_entropies_at_lengths(
    states: Tensor, lengths: Tensor, unembedding: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute [2, N] entropies in nats: of the states, and of ``lengths[:, None] * states``; see ``online_sums``."""
    sums = online_sums(states, unembedding, bias, lengths=lengths, **options)
    assert sums.other is not None
    return torch.stack([sums.entropy(), sums.other.entropy()])


def token_log_probs(
    states: Tensor, targets: Tensor, unembedding: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Compute the [N] log-probabilities of one token per state in nats; see ``online_sums``."""
    return online_sums(states, unembedding, bias, targets, **options).log_probs()


@torch.no_grad()
def online_sums(
    states: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    targets: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    memory_budget: int = _MEMORY_BUDGET,
    blocks: tiles.Blocks | None = None,
    slices: int | None = None,
) -> Sums:
    """Run the kernel on states [N, d] and E_u [V, d] of 16-bit or float32, and merge the slices of the vocabulary.

    ``bias`` is [V]. ``targets`` are [N] ids of the tokens whose logits are returned as ``chosen``. The logits are
    ``scale * z``, or ``c * tanh(scale * z / c)`` with c = ``softcap``. ``lengths`` are [N] factors on the states, from
    0 up: the sums of ``lengths[:, None] * states`` are returned as ``other``, and come from the same products (in
    float32, so that 16-bit states are not rounded at the other length). A ``ValueError`` says that there is not one a
    state. ``memory_budget`` limits the bytes of the sums of all slices. By default ``blocks`` are the fastest of a few,
    and ``slices`` as many as fill the device.
    """
    n, d = states.shape
    vocab = len(unembedding)
    if lengths is not None:
        if lengths.shape != (n,):
            raise ValueError(f"got lengths {tuple(lengths.shape)} for {n} states; needed is one factor a state")
        lengths = lengths.float().contiguous()
    sets = 1 if lengths is None else 2
    chosen = torch.empty(n, dtype=torch.float32, device=states.device)
    if n == 0:
        empty = Sums(chosen, chosen, chosen, chosen)
        return empty if lengths is None else replace(empty, other=empty)
    # The interpreter has no bfloat16 products of its own; those of float32 are the same numbers.
    widen = states.dtype != unembedding.dtype or (INTERPRETED and states.dtype == torch.bfloat16)
    half = not widen and states.dtype != torch.float32
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    choices = tiles.choices(n, half=half, tf32=tf32, lengths=lengths is not None)
    if INTERPRETED and blocks is None:
        blocks = tiles.INTERPRETED
    if slices is None:
        processors = _processors(states.device)
        slices = tiles.slices_of_vocabulary(n, vocab, processors, blocks or choices[0], memory_budget // sets)
    sums = torch.empty(sets, 3, slices, n, dtype=torch.float32, device=states.device)
    arguments = (
        states,
        unembedding,
        # What is absent is never read, but a pointer has to be there.
        states if bias is None else bias.contiguous(),
        states if targets is None else targets.contiguous(),
        states if lengths is None else lengths,
        sums,
        chosen,
        n,
        vocab,
        d,
        *states.stride(),
        *unembedding.stride(),
        float(scale),
        1.0 if softcap is None else float(softcap),
        slices,
    )
    meta: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_TARGET": targets is not None,
        "HAS_LENGTHS": lengths is not None,
        "WIDEN": widen,
        "PRECISION": "tf32" if tf32 and not half else "ieee",
        "GROUP": _GROUP,
    }
    kernel = _kernel
    if blocks is None:
        kernel = _tuned(choices)
    else:
        meta |= blocks.meta() | {"num_warps": blocks.warps, "num_stages": blocks.stages}
    # Triton launches on the current device, which need not be that of the operands.
    with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
        kernel[lambda chosen_meta: (triton.cdiv(n, chosen_meta["BLOCK_N"]) * slices,)](*arguments, **meta)
    own, *other = (Sums(*_merged(of_one_length), chosen) for of_one_length in sums)
    return replace(own, other=other[0]) if other else own


def _merged(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge [3, S, N] sums of slices, each relative to its own maximum, into three of [N]."""
    m, s, t = sums
    top = m.amax(dim=0)
    # A slice without a finite logit has nothing to carry over; -inf times the 0 that it sums to would be NaN.
    delta = torch.where(m == -torch.inf, 0.0, m - top)
    shrink = delta.exp()
    return top, (s * shrink).sum(dim=0), ((t + delta * s) * shrink).sum(dim=0)


def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; a few for the interpreter, so that it cuts the vocabulary too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def _tuned(choices: tuple[tiles.Blocks, ...]) -> Any:
    """The kernel with the fastest blocks, which are measured once for each d, V and dtype."""
    configs = [triton.Config(b.meta(), num_warps=b.warps, num_stages=b.stages) for b in choices]
    key = ["d", "vocab", "HAS_BIAS", "HAS_SOFTCAP", "HAS_TARGET", "HAS_LENGTHS"]
    return triton.autotune(configs, key=key, do_bench=_milliseconds)(_kernel)


def _milliseconds(launch: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
    """Time a launch; triton's own timer would allocate 256 MiB, beyond the memory budget, to empty the cache."""
    launch()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return [sorted(times)[1]] * len(quantiles)
