"""Train the testbed models from scratch: ``python scripts/testbed/make.py``, about half an hour per model."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measure import accuracy, curves, respond
from recipe import ARCHITECTURES, Recipe, build_model, make_tokenizer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from train import train
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from internal_policy.data.arithmetic import problems

logger = logging.getLogger(__name__)

EVALUATION_SEED = 1_000_003


def make(short: str, out: Path, recipe: Recipe, n_eval: int = 1000, n_curves: int = 200) -> Path:
    """Train one model, measure it and write it as a directory that transformers loads.

    Args:
        short: ``"qwen3"`` or ``"llama"``.
        out: The directory above; what an earlier run wrote at ``out/short`` is replaced once all is ready. An
            interrupted run leaves a hidden checkpoint there, from which the next one goes on.
        recipe: The training.
        n_eval: Held-out problems for the accuracy.
        n_curves: The first of these, whose sampled responses give the entropies.

    Returns:
        ``out/short``, with ``measurements.json`` next to the weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    model = build_model(short, recipe, tokenizer)
    checkpoint = out / f".{short}.checkpoint"
    with _progress() as progress:
        task = progress.add_task(short, total=recipe.steps, loss="")

        def on_step(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=f"{loss:.3f} nats")
            if step % 100 == 0:
                logger.debug("%s step %d loss %.4f", short, step, loss)

        train(model, tokenizer, recipe, checkpoint, on_step)
    measured = measure(model, tokenizer, n_eval, n_curves)
    target = out / short
    _write(target, model, tokenizer, measured)
    checkpoint.unlink(missing_ok=True)
    logger.info("%s: pass@1 %.3f, greedy %.3f", target, *(measured[key]["all"]["mean"] for key in ("pass@1", "greedy")))
    return target


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n_eval: int, n_curves: int) -> dict[str, Any]:
    """Measure the values of the model card.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        n_eval: Held-out problems of levels 2 to 4.
        n_curves: The first of these, whose sampled responses give the entropies.

    Returns:
        `parameters`; `pass@1` (temperature 1) and `greedy`, each as `accuracy` gives it; `curves`.
    """
    held_out = problems(n_eval, EVALUATION_SEED)
    sampled = respond(model, tokenizer, held_out)
    return {
        "parameters": model.num_parameters(),
        "pass@1": accuracy(tokenizer, held_out, sampled),
        "greedy": accuracy(tokenizer, held_out, respond(model, tokenizer, held_out, greedy=True)),
        "curves": curves(model, sampled[:n_curves]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Its arguments; the process's own by default.
    """
    parser = argparse.ArgumentParser(prog="python scripts/testbed/make.py", description=__doc__)
    default = Recipe()
    parser.add_argument("--out", type=Path, default=Path("data/testbed"), help="the directory of both models")
    parser.add_argument("--models", nargs="+", choices=sorted(ARCHITECTURES), default=sorted(ARCHITECTURES))
    parser.add_argument("--steps", type=int, default=default.clean_steps, help="steps on right solutions")
    parser.add_argument("--restart-steps", type=int, default=default.restart_steps, help="more of them, annealed again")
    parser.add_argument("--slip-steps", type=int, default=default.slip_steps, help="steps on solutions that slip")
    parser.add_argument("--seed", type=int, default=default.seed, help="of the weights and of the problems")
    parser.add_argument("--eval", type=int, default=1000, help="held-out problems for the accuracy")
    args = parser.parse_args(argv)
    if min(args.steps, args.restart_steps, args.slip_steps) < 0 or args.eval < 1:
        parser.error("the steps must be at least 0, --eval at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=Console(stderr=True))])
    for library in ("httpx", "httpx2"):
        logging.getLogger(library).setLevel(logging.WARNING)
    recipe = replace(
        default,
        clean_steps=args.steps,
        restart_steps=args.restart_steps,
        slip_steps=args.slip_steps,
        seed=args.seed,
    )
    for short in args.models:
        make(short, args.out, recipe, args.eval, n_curves=min(args.eval, 200))


def _write(target: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, measured: dict[str, Any]) -> None:
    # Files are written to a temporary directory that is then renamed, so that no partial model is visible.
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "measurements.json").write_text(json.dumps(measured, indent=1) + "\n")
        # mkdtemp and safetensors create private files, but users of an installed package must be able to read them.
        partial.chmod(0o755)
        for file in partial.iterdir():
            file.chmod(0o644)
        old = target.with_name(f".{target.name}.old.{os.getpid()}")
        if target.exists():
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(stderr=True))


if __name__ == "__main__":
    main()
