"""How long an update of the first phase takes against a full one: forward and backward of the loss, no sampling.

python benchmarks/benchmark_update.py

Shapes: the embedded model; and Qwen3-4B's proportions (36 layers, the head 11% of the layers' weights) at a width that
a laptop holds. The update of an internal policy computes layers 1..l and the head; the head is what is left at l = 0.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from internal_policy.bupo import BuPOConfig, BuPOTrainer
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


LIMIT = 0.45
"""Most that an update at a quarter of the layers may take, as a share of a full one."""


def build(shape: str) -> Any:
    """Make a model.

    Args:
        shape: a key of `SHAPES`.

    Returns:
        A Qwen3 with random weights, or the embedded one.
    """
    if not SHAPES[shape]:
        return load(shape).model
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3", tie_word_embeddings=True, max_position_embeddings=512, **SHAPES[shape])
    )


def seconds(trainer: Any, batch: dict[str, Any], aligns: bool, repeats: int) -> list[float]:
    """Time updates.

    Args:
        trainer: a ``BuPOTrainer``.
        batch: a mini-batch of rollouts.
        aligns: whether it belongs to the first phase.
        repeats: how many.

    Returns:
        Seconds of each.
    """
    optimizer = trainer.create_optimizer()
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss = trainer._compute_loss(trainer.model, {**batch, "aligns": torch.tensor(aligns)})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - start)
    return taken[1:]


def main() -> None:
    """Print seconds and ratio for each shape and layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens")
    parser.add_argument("--completion", type=int, default=64, help="completion tokens")
    asked = parser.parse_args()
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32")
    print(f"{asked.sequences} sequences of {asked.prompt} + {asked.completion} tokens, medians of {asked.repeats}")
    tokenizer = load("testbed/qwen3").tokenizer
    slowest = 0.0
    for shape in SHAPES:
        full_layers = build(shape).config.num_hidden_layers
        for layer in (full_layers // 4, full_layers // 2):
            model = build(shape)
            with tempfile.TemporaryDirectory() as scratch:
                config = BuPOConfig(
                    output_dir=scratch,
                    method="bupo",
                    layer=layer,
                    ipa_steps=1,
                    max_steps=2,
                    per_device_train_batch_size=asked.sequences,
                    num_generations=asked.sequences,
                    gradient_checkpointing=False,
                    report_to="none",
                    use_cpu=True,
                    entropy_sequences=0,
                )
                trainer = BuPOTrainer(
                    model=model,
                    reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
                    args=config,
                    train_dataset=Dataset.from_list([{"prompt": "a=1,b=a+1;b?"}] * 4),
                    processing_class=tokenizer,
                )
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            n, vocab = asked.sequences, model.config.vocab_size
            generator = torch.Generator().manual_seed(0)
            batch = {
                "prompt_ids": torch.randint(vocab, (n, asked.prompt), generator=generator),
                "prompt_mask": torch.ones(n, asked.prompt, dtype=torch.long),
                "completion_ids": torch.randint(vocab, (n, asked.completion), generator=generator),
                "completion_mask": torch.ones(n, asked.completion, dtype=torch.long),
                "advantages": torch.randn(n, generator=generator),
                "num_items_in_batch": torch.tensor(n * asked.completion),
            }
            # In turn, so that what else the machine does falls on both.
            internal, full = [], []
            for _ in range(asked.repeats):
                internal += seconds(trainer, batch, True, 1)
                full += seconds(trainer, batch, False, 1)
            ratio = statistics.median(internal) / statistics.median(full)
            print(
                f"{shape}: l = {layer} of {full_layers}: internal {statistics.median(internal):.3f} s, "
                f"full {statistics.median(full):.3f} s, ratio {ratio:.3f}"
            )
            if layer == full_layers // 4:
                slowest = max(slowest, ratio)
    if slowest > LIMIT:
        raise SystemExit(f"at a quarter of the layers an update takes {slowest:.3f} of a full one; needed is {LIMIT}")


if __name__ == "__main__":
    main()
