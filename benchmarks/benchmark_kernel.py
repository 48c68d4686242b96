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
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

CHECKED_ROWS = 16
# Factors on the states: lengths at which the policy is flat, and at which it is peaked.
LENGTHS = (0.1, 30.0)


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


def measure(tokens: int, unembedding: Tensor, repeats: int) -> None:
    """Print the results for a number of tokens."""
    from internal_policy.entropy import reference, triton_kernel

    device, (vocab, width) = unembedding.device, unembedding.shape
    states = torch.randn(tokens, width, device=device).to(unembedding.dtype)
    # All logits at once if they fit in memory: products in slices are slower.
    buffer = torch.empty(tokens, min(vocab, 2**31 // tokens), dtype=states.dtype, device=device)
    lengths = other_lengths(states)
    ways: dict[str, Callable[[], object]] = {
        "product": lambda: bare_product(states, unembedding, buffer),
        "kernel": lambda: triton_kernel.policy_entropy(states, unembedding),
        "two lengths": lambda: triton_kernel.policy_entropies_at_lengths(states, lengths, unembedding),
        "blocks": lambda: by_blocks(states, unembedding),
    }
    # Rows from all over, since the factors grow from row to row.
    rows = torch.linspace(0, tokens - 1, min(tokens, CHECKED_ROWS), device=device).long()
    checked = states[rows].double()
    exact = [reference.policy_entropy(x, unembedding) for x in (checked, checked * lengths[rows, None].double())]
    one = triton_kernel.policy_entropy(states, unembedding)
    two = triton_kernel.policy_entropies_at_lengths(states, lengths, unembedding)
    errors = {
        "kernel": (one[rows].double() - exact[0]).abs().max().item(),
        "two lengths": (two[:, rows].double() - torch.stack(exact)).abs().max().item(),
    }
    if device.type != "cuda":
        print(line(tokens, errors))
        return
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        # Compilation and tuning are excluded from the rate.
        run()
    for _ in range(repeats):
        for name, run in ways.items():
            times[name].append(seconds(run, device))
    rate = {name: 2 * tokens * vocab * width / statistics.median(t) / 1e12 for name, t in times.items()}
    memory = {name: working_memory(ways[name], device) for name in ("kernel", "two lengths", "blocks")}
    print(line(tokens, errors, rate, memory))


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
        measure(tokens, unembedding, options.repeats)


if __name__ == "__main__":
    main()
