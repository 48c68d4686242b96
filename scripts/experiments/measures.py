"""What is measured on a model while it is trained: held-out accuracy, and perplexities on three kinds of responses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import TrainerCallback

from internal_policy.bupo.dynamics import Dynamics, with_current_projection
from internal_policy.bupo.run import read_table, write_table
from internal_policy.data import arithmetic
from internal_policy.data.prompts import TESTBED, Prompt, render_all
from internal_policy.data.responses import Response
from internal_policy.evaluation import evaluate
from internal_policy.generation import Request, sample
from internal_policy.models import LanguageModel, eval_mode, wrap

MAX_NEW_TOKENS = 44
"""Longest response on the embedded tasks."""
CURVE_SAMPLES, FULL_SAMPLES = 2, 16
PROBLEMS, BATCH_SIZE = 256, 256
FIXED = 64
"""Responses on which perplexities are measured."""
SOLUTIONS_SEED = 171_001
"""Seed of the problems whose right solutions are read; no training draws from it."""


class HeldOut(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Evaluates pi_theta on held-out problems along a run, the same problems and random streams in every run."""

    def __init__(self, every: int, full_at: Collection[int], start: Path) -> None:
        """Choose when to measure.

        Args:
            every: steps between two points of the curve; 0 for none.
            full_at: steps at which all samples are drawn, for Pass@K.
            start: beginning of the name of the file with the measurement of the start, which all runs from the same
                weights share; made if it is missing.
        """
        self._every, self._full_at, self._start = every, {0, *full_at}, start
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, or read its measurement."""
        # Another model of the same name, or another number of problems, is another measurement.
        weights = wrap(kwargs["model"], kwargs["processing_class"], "model").fingerprint()
        constants = f"{PROBLEMS}-problems-{FULL_SAMPLES}-samples-{MAX_NEW_TOKENS}-tokens"
        path = self._start.with_name(f"{self._start.name}-{weights}-{constants}.csv")
        stored = read_table(path)
        if len(stored):
            self.rows = [{str(name): value for name, value in stored.iloc[0].items()}]
            return
        self._measure(0, kwargs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, pd.DataFrame(self.rows))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is due."""
        step, rest = divmod(state.global_step, args.updates_per_step)
        if not rest and (step in self._full_at or (self._every and step % self._every == 0)):
            self._measure(step, kwargs)

    def _measure(self, step: int, kwargs: dict[str, Any]) -> None:
        whole = step in self._full_at
        samples = FULL_SAMPLES if whole else CURVE_SAMPLES
        # Its mode is the trainer's, which files the logs of a step under it.
        with eval_mode(kwargs["model"]):
            model = wrap(kwargs["model"], kwargs["processing_class"], "model")
            found = evaluate(
                model,
                TESTBED,
                samples=samples,
                k=(1, samples),
                max_problems=PROBLEMS,
                max_new_tokens=MAX_NEW_TOKENS,
                batch_size=BATCH_SIZE,
            )
        table = found.pass_at_k.set_index("k")
        self.rows.append(
            {
                "step": step,
                "samples": samples,
                "avg": found.avg["mean"],
                "avg_stderr": found.avg["stderr"],
                f"pass{FULL_SAMPLES}": table["value"][samples] if whole else np.nan,
                "length": found.samples["n_tokens"].mean(),
                "truncated": found.samples["truncated"].mean(),
            }
        )


class Perplexities(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Log-perplexity of pi_theta on right solutions and on its own new responses, besides those of figure 5."""

    def __init__(self, every: int, layer: int, seed: int) -> None:
        """Choose when to measure.

        Args:
            every: steps between two measurements.
            layer: any layer; the perplexity does not depend on it.
            seed: of the responses that are sampled.
        """
        self._every, self._layer, self._seed = every, layer, seed
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start."""
        self._measure(0, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the interval."""
        step, rest = divmod(state.global_step, args.updates_per_step)
        if not rest and step % self._every == 0:
            self._measure(step, kwargs)

    def _measure(self, step: int, kwargs: dict[str, Any]) -> None:
        with eval_mode(kwargs["model"]):
            model = with_current_projection(wrap(kwargs["model"], kwargs["processing_class"], "model"))
            drawn = arithmetic.problems(FIXED, seed=SOLUTIONS_SEED)
            own = _sampled(model, drawn, self._seed)
            kinds = {"solutions": right_solutions(model, drawn), "own": [r for r in own if r.n_tokens > 0]}
            row: dict[str, Any] = {"step": step, "own_length": float(np.mean([r.n_tokens for r in own]))}
            for kind, responses in kinds.items():
                found = Dynamics(model, responses, self._layer, batch_size=FIXED).measure()
                row |= {f"log_perplexity_{kind}": found.log_perplexity, f"policy_entropy_{kind}": found.policy_entropy}
        self.rows.append(row)


def right_solutions(model: LanguageModel, drawn: Sequence[arithmetic.Problem]) -> list[Response]:
    """Write the worked solutions as responses, with the token that ends one.

    Args:
        model: for its tokenizer and template.
        drawn: problems with solutions.

    Returns:
        One response a problem.
    """
    tokenizer = model.tokenizer
    prompts = render_all([Prompt(p.prompt, p.answer) for p in drawn], "chat", tokenizer)
    end = [tokenizer.eos_token_id]
    written = [tokenizer.encode(p.solution, add_special_tokens=False) + end for p in drawn]
    return [
        Response(p.prompt, p.solution, [*ids, *solution], len(ids))
        for p, ids, solution in zip(drawn, prompts, written, strict=True)
    ]


def _sampled(model: LanguageModel, drawn: Sequence[arithmetic.Problem], seed: int) -> list[Response]:
    found = [Prompt(p.prompt, p.answer) for p in drawn]
    rendered = render_all(found, "chat", model.tokenizer)
    requests = [Request(p, ids, i, 0) for i, (p, ids) in enumerate(zip(found, rendered, strict=True))]
    return sample(model, requests, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=seed)
