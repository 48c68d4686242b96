"""Time of an update of the first phase against its floor and against a full update, without sampling.

python benchmarks/benchmark_update.py                    # the floor at Qwen3-0.6B's width, then the older comparison
OMP_NUM_THREADS=1 python benchmarks/benchmark_update.py --only floor --cpu-seconds    # on a shared machine

**Floor.** The minimal operations of an update of pi^l, each timed alone in turn with the update itself:

- l of L layers: l/L of forward and backward through a decoder of all layers, from a random gradient of its output;
- embedding: looking tokens up, and the gradient of the table;
- head: the products of the scored states with E_u, in blocks of the size that the head uses, and nothing else. A head
  that stores [tokens, V] has three (logits, gradient of the states, gradient of E_u); one that never stores it computes
  the logits twice, so four. Both floors are printed. The limit applies to the floor of four, because three products
  would require storing [tokens, V].

Neither side steps the optimiser: AdamW costs both the same, and skips layers above l, which have no gradient.

**Against a full update**, with the optimiser: the embedded model, and Qwen3-4B's proportions (36 layers, the head 11%
of the layers' weights) at a width that fits a laptop.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from internal_policy.bupo import BuPOConfig, BuPOTrainer
from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, block_sizes
from internal_policy.models import load

SHAPES: dict[str, dict[str, int]] = {
    "testbed/qwen3": {},
    "Qwen3-4B proportions, d = 192": {
        "hidden_size": 192,
        "num_hidden_layers": 36,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "intermediate_size": 730,
        "vocab_size": 11_000,
    },
}
FLOOR_SHAPE = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 20_011,
}
"""Qwen3-0.6B's layers; fewer of them and less vocabulary, so that it runs in a minute. V is prime: ragged blocks."""

LIMIT = 0.45
"""Most that an update at a quarter of the layers may take, as a share of a full one."""
FLOOR_LIMIT = 1.15
"""Most that an update may take, as a multiple of its floor."""


def build(shape: dict[str, int], name: str = "") -> Any:
    """Make a model.

    Args:
        shape: fields of the configuration; none for the embedded model.
        name: of the embedded model.

    Returns:
        A Qwen3 with random weights, or the embedded one.
    """
    if not shape:
        return load(name).model
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", tie_word_embeddings=True, max_position_embeddings=512, **shape)
    )


def trainer_of(model: Any, layer: int, args: argparse.Namespace) -> Any:
    """Make a trainer, ready for updates.

    Args:
        model: the model.
        layer: l, from 1.
        args: the command line.

    Returns:
        A ``BuPOTrainer`` in training mode.
    """
    with tempfile.TemporaryDirectory() as scratch:
        trainer = BuPOTrainer(
            model=model,
            reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
            args=BuPOConfig(
                output_dir=scratch,
                method="bupo",
                layer=layer,
                ipa_steps=1,
                max_steps=2,
                per_device_train_batch_size=args.sequences,
                num_generations=args.sequences,
                gradient_checkpointing=False,
                report_to="none",
                use_cpu=True,
                entropy_sequences=0,
            ),
            train_dataset=Dataset.from_list([{"prompt": "a=1,b=a+1;b?"}] * 4),
            processing_class=load("testbed/qwen3").tokenizer,
        )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def batch_of(vocab: int, args: argparse.Namespace) -> dict[str, Any]:
    """Make a mini-batch of rollouts with a gradient at every token.

    Args:
        vocab: V.
        args: the command line.

    Returns:
        The inputs that TRL passes to the loss.
    """
    n = args.sequences
    generator = torch.Generator().manual_seed(0)
    return {
        "prompt_ids": torch.randint(vocab, (n, args.prompt), generator=generator),
        "prompt_mask": torch.ones(n, args.prompt, dtype=torch.long),
        "completion_ids": torch.randint(vocab, (n, args.completion), generator=generator),
        "completion_mask": torch.ones(n, args.completion, dtype=torch.long),
        "advantages": torch.randn(n, generator=generator),
        "num_items_in_batch": torch.tensor(n * args.completion),
    }


def update(trainer: Any, batch: dict[str, Any], aligns: bool) -> None:
    """Compute the loss and its gradients.

    Args:
        trainer: a ``BuPOTrainer``.
        batch: a mini-batch of rollouts.
        aligns: whether it belongs to the first phase.
    """
    trainer._compute_loss(trainer.model, {**batch, "aligns": torch.tensor(aligns)}).backward()


def seconds(work: Callable[[], None], clean: Callable[[], None], clock: Callable[[], float]) -> float:
    """Time one call.

    Args:
        work: what is timed.
        clean: what follows, untimed.
        clock: wall or processor time.

    Returns:
        Seconds.
    """
    gc.collect()
    start = clock()
    work()
    taken = clock() - start
    clean()
    return taken


def products(states: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, recomputed: bool) -> None:
    """The head's products alone: vocabulary outside, states inside, as the head orders them.

    Args:
        states: [N, d].
        weight: [V, d].
        gradient: [n, v], stands for the gradient of each block of logits.
        recomputed: whether the logits are made again for backward.
    """
    n, v = gradient.shape
    to_states, to_weight = torch.zeros_like(states), torch.empty_like(weight)
    logits = torch.empty_like(gradient).flatten()
    for backward in (False, True):
        for first in range(0, len(weight), v):
            e = weight[first : first + v]
            for start in range(0, len(states), n):
                x = states[start : start + n]
                if not backward or recomputed:
                    torch.mm(x, e.T, out=logits[: len(x) * len(e)].view(len(x), len(e)))
                if backward:
                    g = gradient[: len(x), : len(e)]
                    to_states[start : start + n].addmm_(g, e)
                    to_weight[first : first + v].addmm_(g.T, x, beta=float(start > 0))


def floor(args: argparse.Namespace) -> float:
    """Measure an update and its floor in turn.

    Args:
        args: the command line.

    Returns:
        The median of update / floor of four products, over the rounds.
    """
    model = build(FLOOR_SHAPE)
    full, vocab, d = model.config.num_hidden_layers, model.config.vocab_size, model.config.hidden_size
    layer = args.layer or full // 4
    trainer, batch = trainer_of(model, layer, args), batch_of(vocab, args)
    n, length = args.sequences, args.prompt + args.completion
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.ones_like(ids)
    embedded = torch.randn(n, length, d, requires_grad=True)
    to_output, to_embedded = torch.randn(n, length, d), torch.randn(n, length, d)
    rows, columns = block_sizes(d, vocab, DEFAULT_MEMORY_BUDGET, torch.device("cpu"))
    scored = torch.randn(n * args.completion, d)
    gradient = torch.randn(min(rows, len(scored)), columns)
    weight, table = model.lm_head.weight.detach(), model.get_input_embeddings()

    def layers() -> None:
        decoded = model.model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state
        decoded.backward(to_output)

    pieces: dict[str, Callable[[], None]] = {
        "update": lambda: update(trainer, batch, True),
        "layers": layers,
        "embedding": lambda: table(ids).backward(to_embedded),
        "head of 4 products": lambda: products(scored, weight, gradient, True),
        "head of 3 products": lambda: products(scored, weight, gradient, False),
    }

    def clean() -> None:
        model.zero_grad(set_to_none=True)
        embedded.grad = None

    rounds: list[dict[str, float]] = []
    for _ in range(args.repeats + 1):
        taken = {name: seconds(work, clean, args.clock) for name, work in pieces.items()}
        taken["layers"] *= layer / full
        rounds.append(taken)
    # The first is slower.
    rounds = rounds[1:]
    print(
        f"floor: l = {layer} of {full}, d = {d}, V = {vocab}, {n} sequences of {args.prompt} + {args.completion} "
        "tokens; " + ", ".join(f"{name} {statistics.median(r[name] for r in rounds):.3f} s" for name in pieces)
    )
    ratios = {}
    for k in (3, 4):
        ratios[k] = statistics.median(
            r["update"] / (r["layers"] + r["embedding"] + r[f"head of {k} products"]) for r in rounds
        )
        print(f"floor with a head of {k} products: update / floor = {ratios[k]:.3f} (median of {len(rounds)} rounds)")
    return ratios[4]


def against_full(args: argparse.Namespace) -> float:
    """Measure updates of both phases in turn, with the optimiser.

    Args:
        args: the command line.

    Returns:
        The largest ratio at a quarter of the layers.
    """
    slowest = 0.0
    for name, shape in SHAPES.items():
        full_layers = build(shape, name).config.num_hidden_layers
        for layer in (full_layers // 4, full_layers // 2):
            model = build(shape, name)
            trainer, batch = trainer_of(model, layer, args), batch_of(model.config.vocab_size, args)
            optimizer = trainer.create_optimizer()

            def step(
                aligns: bool, trainer: Any = trainer, batch: Any = batch, optimizer: Any = optimizer
            ) -> Callable[[], None]:
                def work() -> None:
                    update(trainer, batch, aligns)
                    optimizer.step()
                    optimizer.zero_grad()

                return work

            internal, full = [], []
            # In turn, so that other load affects both; the first of each is slower.
            for _ in range(args.repeats + 1):
                internal.append(seconds(step(True), lambda: None, args.clock))
                full.append(seconds(step(False), lambda: None, args.clock))
            ratio = statistics.median(internal[1:]) / statistics.median(full[1:])
            print(
                f"{name}: l = {layer} of {full_layers}: internal {statistics.median(internal[1:]):.3f} s, "
                f"full {statistics.median(full[1:]):.3f} s, ratio {ratio:.3f}"
            )
            if layer == full_layers // 4:
                slowest = max(slowest, ratio)
    return slowest


def main() -> None:
    """Print seconds and ratios, and fail if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("floor", "full"))
    parser.add_argument("--layer", type=int, help="l of the floor; a quarter of the layers by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument(
        "--cpu-seconds", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter
    )
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--completion", type=int, default=64, help="completion tokens")
    args = parser.parse_args()
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    failed = []
    if args.only != "full" and (over := floor(args)) > FLOOR_LIMIT:
        failed.append(f"an update takes {over:.3f} times its floor; needed is {FLOOR_LIMIT}")
    if args.only != "floor" and (share := against_full(args)) > LIMIT:
        failed.append(f"at a quarter of the layers an update takes {share:.3f} of a full one; needed is {LIMIT}")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
