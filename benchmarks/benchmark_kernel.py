"""The fused kernel against one large product of the same operands: rate, working memory and error, on a GPU.

    python benchmarks/benchmark_kernel.py [--tokens 1024 4096 8192] [--width 2560] [--vocabulary 151936] [--repeats 10]
    python benchmarks/benchmark_kernel.py --interpret       # a functional check on any machine: tiny sizes, no rates

The rate counts the operations of the product alone, 2 N V d, for all ways. Errors are those of some rows against the
definition in float64. Rates are medians over repeats in which all ways run one after the other; "blocks" is the torch
implementation used without the kernel. "two lengths" is the kernel that takes the entropy of every state at a second
length from the same product: its time is given relative to that of the kernel for one length. A product for each length
would take 2.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

CHECKED_ROWS = 16
# Factors on the states: lengths at which the policy is flat, and at which it is peaked.
LENGTHS = (0.1, 30.0)
KERNELS = ("kernel", "two lengths")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one call, its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def bare_product(states: Tensor, unembedding: Tensor, buffer: Tensor) -> None:
    """Compute all logits by slices as wide as the buffer and discard them, in the operands' dtype."""
    for first in range(0, len(unembedding), buffer.shape[1]):
        rows = unembedding[first : first + buffer.shape[1]]
        torch.mm(states, rows.T, out=buffer[:, : len(rows)])


def by_blocks(states: Tensor, unembedding: Tensor) -> Tensor:
    """Compute the entropies as without the kernel."""
    from internal_policy.entropy import policy_entropy, streaming

    with mock.patch.object(streaming, "kernel_is_faster", return_value=False):
        return policy_entropy(states, unembedding)


def other_lengths(states: Tensor) -> Tensor:
    """[N] factors on the states, spread over ``LENGTHS`` evenly by their logarithm."""
    low, high = (math.log10(factor) for factor in LENGTHS)
    return torch.logspace(low, high, len(states), device=states.device)


def working_memory(run: Callable[[], object], device: torch.device) -> float:
    """Additional MiB of device memory that a call takes."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@dataclass(frozen=True)
class Measured:
    """The results for a number of tokens."""

    tokens: int
    """N, states."""
    errors: dict[str, float]
    """Largest difference from the definition in float64 of some rows, nats, by kernel."""
    rate: dict[str, float] | None = None
    """TFLOP/s, counting the operations of one product, by way; None in the interpreter."""
    memory: dict[str, float] | None = None
    """Working memory in MiB by way; None in the interpreter."""
    seconds: dict[str, list[float]] | None = None
    """Every time that was taken, by way; None in the interpreter."""


def error_of(kernel: str, states: Tensor, unembedding: Tensor, rows: Tensor | None = None) -> float:
    """Largest difference in nats of a kernel, ``kernel`` or ``two lengths``, from the definition in float64.

    Args:
        kernel: which of the two.
        states: [N, d].
        unembedding: [V, d].
        rows: the rows that are compared; ``CHECKED_ROWS`` of them by default, spread evenly.
    """
    from internal_policy.entropy import reference, triton_kernel

    lengths = other_lengths(states)
    if rows is None:
        # Rows from all over, since the factors grow from row to row.
        last = len(states) - 1
        rows = torch.linspace(0, last, min(len(states), CHECKED_ROWS), device=states.device).long()
    checked = [states[rows].double()]
    if kernel == "kernel":
        found = triton_kernel.policy_entropy(states, unembedding)[None]
    else:
        found = triton_kernel.policy_entropies_at_lengths(states, lengths, unembedding)
        checked.append(checked[0] * lengths[rows, None].double())
    exact = torch.stack([reference.policy_entropy(x, unembedding) for x in checked])
    return (found[:, rows].double() - exact).abs().max().item()


def measure(
    tokens: int,
    unembedding: Tensor,
    repeats: int,
    kernels: Sequence[str] = KERNELS,
    until: float = math.inf,
) -> Measured:
    """Measure the ways for a number of tokens.

    Args:
        tokens: N.
        unembedding: [V, d].
        repeats: how often every way is timed.
        kernels: those of ``KERNELS`` that are to be measured.
        until: no repeat but the first starts after this, by ``time.monotonic``.

    Returns:
        Errors, and on a GPU rates and memory.
    """
    from internal_policy.entropy import triton_kernel

    device, (vocab, width) = unembedding.device, unembedding.shape
    states = torch.randn(tokens, width, device=device).to(unembedding.dtype)
    errors = {name: error_of(name, states, unembedding) for name in kernels}
    if device.type != "cuda":
        return Measured(tokens, errors)
    # All logits at once if they fit in memory: products in slices are slower.
    buffer = torch.empty(tokens, min(vocab, 2**31 // tokens), dtype=states.dtype, device=device)
    lengths = other_lengths(states)
    ways: dict[str, Callable[[], object]] = {
        "product": lambda: bare_product(states, unembedding, buffer),
        "kernel": lambda: triton_kernel.policy_entropy(states, unembedding),
        "two lengths": lambda: triton_kernel.policy_entropies_at_lengths(states, lengths, unembedding),
        "blocks": lambda: by_blocks(states, unembedding),
    }
    ways = {name: run for name, run in ways.items() if name in (*kernels, "product", "blocks")}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        # Compilation and tuning are excluded from the rate.
        run()
    for repeat in range(repeats):
        if repeat and time.monotonic() > until:
            break
        for name, run in ways.items():
            times[name].append(seconds(run, device))
    rate = {name: 2 * tokens * vocab * width / statistics.median(t) / 1e12 for name, t in times.items()}
    memory = {name: working_memory(ways[name], device) for name in ways if name != "product"}
    return Measured(tokens, errors, rate, memory, times)


def line(
    tokens: int, errors: dict[str, float], rate: dict[str, float] | None = None, memory: dict[str, float] | None = None
) -> str:
    """Put the results for a number of tokens into words: errors in nats, rates in TFLOP/s, working memory in MiB."""
    worst = f"largest error {errors['kernel']:.1e} nats, at two lengths {errors['two lengths']:.1e}"
    if rate is None or memory is None:
        return f"{tokens:6d} tokens: {worst} (interpreted: no rates)"
    return (
        f"{tokens:6d} tokens: product {rate['product']:.0f} TFLOP/s, kernel {rate['kernel']:.0f} "
        f"({rate['kernel'] / rate['product']:.2f} of it, {memory['kernel']:.1f} MiB), "
        f"two lengths {rate['two lengths']:.0f} ({rate['kernel'] / rate['two lengths']:.2f} of the time for one, "
        f"{memory['two lengths']:.1f} MiB), blocks {rate['blocks']:.0f} ({memory['blocks']:.0f} MiB), {worst}"
    )


def main() -> None:
    """Measure and print one line per number of tokens, or report why it is not possible."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--interpret", action="store_true")
    options = parser.parse_args()
    if options.interpret:
        # Read when the kernel's module is imported, which is after this.
        os.environ["TRITON_INTERPRET"] = "1"
        options.tokens, options.width, options.vocabulary = [20], 48, 1000
    elif not torch.cuda.is_available():
        print("no GPU here: the kernel is measured on one only; --interpret shows that this script works")
        return
    device = torch.device("cpu" if options.interpret else "cuda")
    torch.manual_seed(0)
    unembedding = torch.randn(options.vocabulary, options.width, device=device).mul_(0.02)
    unembedding = unembedding.to(getattr(torch, options.dtype))
    name = "triton's interpreter" if options.interpret else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}: d = {options.width}, V = {options.vocabulary}, {options.dtype}")
    for tokens in options.tokens:
        found = measure(tokens, unembedding, options.repeats)
        print(line(tokens, found.errors, found.rate, found.memory))


if __name__ == "__main__":
    main()
