"""The accuracy of an internal policy while a model is trained: before the first step, at intervals, and at the end.

Responses are sampled from pi^l of the model in training with no layer above l running, as by
``evaluation.evaluate(layer=l)``, and scored by the benchmark's own verifier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from transformers import TrainerCallback

from internal_policy.bupo.callbacks import current_phase, is_due
from internal_policy.bupo.config import TrainConfig
from internal_policy.bupo.dynamics import with_current_projection
from internal_policy.bupo.run import LAYER_ACCURACY, read_table, write_table
from internal_policy.data.prompts import TESTBED
from internal_policy.evaluation import evaluate
from internal_policy.evaluation.depth import depth_table
from internal_policy.models import LanguageModel
from internal_policy.utils.distributed import Processes

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer

MEASUREMENTS = 10
"""Default number of measurements in a run."""


def accuracy_interval(config: TrainConfig) -> int:
    """Return the number of steps between two measurements: that of the dynamics, or a tenth of the run."""
    return config.dynamics_every or -(-int(config.max_steps or 0) // MEASUREMENTS)


def measure_layer(
    model: LanguageModel, config: TrainConfig, samples: int | None, max_problems: int | None
) -> dict[str, Any]:
    """Evaluate pi^l of a model as it is now, without changing its mode, its weights or any random generator.

    Args:
        model: the model in training.
        config: the settings, with ``eval_layer``.
        samples: responses sampled per problem; None for the benchmark's own number.
        max_problems: largest number of problems.

    Returns:
        layer, site and lens; avg (Avg@K, 0 to 1) with avg_stderr, avg_low and avg_high; agreement and kl with pi_theta,
        length (tokens) and truncated (share), means; problems and samples, their numbers.
    """
    done = evaluate(
        with_current_projection(model),
        config.benchmark if config.benchmark is not None else TESTBED,
        layer=config.eval_layer,
        site=config.site,
        lens=config.lens,
        samples=samples,
        max_problems=max_problems,
        template=config.template or "chat",
        max_new_tokens=config.max_completion_length,
        seed=config.seed,
    )
    table = depth_table(done).set_index("quantity")
    avg = {"avg" if end == "value" else f"avg_{end}": table[end]["avg"] for end in ("value", "stderr", "low", "high")}
    others = {name: table["value"][name] for name in ("agreement", "kl", "length", "truncated")}
    numbers = {"problems": done.n_problems, "samples": done.n_samples}
    return {"layer": done.layer, "site": done.site, "lens": done.lens, **avg, **others, **numbers}


class LayerAccuracyCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Measures the accuracy of pi^l before the first step, at an interval, when alignment ends, and at the end."""

    def __init__(
        self,
        trainer: BuPOTrainer,
        measure: Callable[[], dict[str, Any]],
        every: int,
        directory: Path,
        state: Processes,
        resumed: Path | None = None,
    ) -> None:
        self._trainer, self._take, self._every = trainer, measure, every
        self._directory, self._state, self._resumed = directory, state, resumed
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the measurements of a resumed run, or make the first."""
        if self._resumed is not None:
            # From the checkpoint: steps after it are measured again.
            stored = read_table(self._resumed / LAYER_ACCURACY)
            self.rows = [{str(k): v for k, v in row.items()} for row in stored.to_dict("records")]
        if not self.rows:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the interval, at the end of the first phase and at the end of the run."""
        if is_due(self._trainer, state, self._every):
            self._measure(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the measurements so far in the checkpoint, for a run that resumes from it."""
        if state.is_world_process_zero:
            write_table(Path(args.output_dir) / f"checkpoint-{state.global_step}" / LAYER_ACCURACY, self.table())

    def table(self) -> pd.DataFrame:
        """Return the table, a row per measurement."""
        return pd.DataFrame(self.rows)

    def _measure(self, state: Any) -> None:
        step = int(state.global_step // self._trainer.args.updates_per_step)
        row = self._state.broadcast(self._take() if self._state.is_main_process else None)
        self.rows.append({"step": step, "phase": current_phase(self._trainer, state), **row})
        if state.global_step:
            self._trainer.log_metric("layer_accuracy", row["avg"])
        if state.is_world_process_zero:
            write_table(self._directory / LAYER_ACCURACY, self.table())


def watch_layer(
    trainer: BuPOTrainer,
    model: LanguageModel,
    config: TrainConfig,
    samples: int | None,
    state: Processes,
    resumed: Path | None,
) -> LayerAccuracyCallback | None:
    """Make the callback that ``eval_layer`` asks for; None without it."""
    if config.eval_layer is None:
        return None
    live = replace(model, model=trainer.policy_module)
    return LayerAccuracyCallback(
        trainer,
        lambda: measure_layer(live, config, samples, config.eval_problems),
        accuracy_interval(config),
        config.directory,
        state,
        resumed,
    )
