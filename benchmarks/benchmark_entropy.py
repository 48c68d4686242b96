"""The streaming entropy against the bare matrix product in the same blocks: time and working memory.

    python benchmarks/benchmark_entropy.py [--tokens 256 1024] [--width 1024] [--vocabulary 151936] [--repeats 5]

Ratios are medians over repeats in which both run one after the other, so that a busy machine slows both alike. Working
memory is the growth of the process's peak resident size over the state before the call.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time

import torch

from internal_policy.entropy import DEFAULT_MEMORY_BUDGET, policy_entropy
from internal_policy.entropy.streaming import block_sizes


def bare_product(states: torch.Tensor, unembedding: torch.Tensor) -> None:
    """Compute all logits block by block and drop them: the floor of any method that projects every state."""
    vocab, d = unembedding.shape
    n, v = block_sizes(d, vocab, DEFAULT_MEMORY_BUDGET, states.device)
    buffer = torch.empty(n * v)
    for start in range(0, len(states), n):
        block = states[start : start + n]
        for first in range(0, vocab, v):
            rows = unembedding[first : first + v]
            torch.mm(block, rows.T, out=buffer[: len(block) * len(rows)].view(len(block), len(rows)))


def peak_mib() -> float:
    """Peak resident size of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print one line a number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    unembedding = torch.randn(options.vocabulary, options.width).mul_(0.02)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"d = {options.width}, V = {options.vocabulary}, float32, {options.repeats} repeats")
    for tokens in options.tokens:
        states = torch.randn(tokens, options.width)
        bare_product(states[:256], unembedding)
        before = peak_mib()
        policy_entropy(states, unembedding)
        memory = peak_mib() - before
        floors, ours = [], []
        for _ in range(options.repeats):
            start = time.perf_counter()
            bare_product(states, unembedding)
            middle = time.perf_counter()
            policy_entropy(states, unembedding)
            floors.append(middle - start)
            ours.append(time.perf_counter() - middle)
        ratio = statistics.median(o / f for o, f in zip(ours, floors, strict=True))
        print(
            f"{tokens:6d} tokens: product {statistics.median(floors):.2f} s, entropy {statistics.median(ours):.2f} s, "
            f"ratio {ratio:.3f}, working memory {memory:.0f} MiB"
        )


if __name__ == "__main__":
    main()
