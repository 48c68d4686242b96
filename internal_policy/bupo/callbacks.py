"""What watches the training: the dynamics on fixed responses, tables and progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from internal_policy.bupo.checkpoint import drop_optimiser_states
from internal_policy.bupo.dynamics import Dynamics, alignment_end
from internal_policy.bupo.history import FAILURES, history_of
from internal_policy.bupo.presets import ALIGNMENT, AUTO, after_alignment
from internal_policy.bupo.results import DYNAMICS, DYNAMICS_LAYERS, HISTORY, read_table, write_table
from internal_policy.rewards.functions import count_failures

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer


class DynamicsWatch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Measures figure 5 on fixed responses, before the first step and then at chosen steps.

    With ``ipa_steps="auto"`` it ends the first phase. What it decides depends on the stored measurements alone, so that
    a resumed run decides the same.
    """

    def __init__(
        self, trainer: BuPOTrainer, dynamics: Dynamics, every: int, directory: Path, resumed: Path | None = None
    ) -> None:
        self._trainer = trainer
        self._dynamics = dynamics
        self._every = every
        self._directory = directory
        self._resumed = resumed
        self.rows: list[dict[str, Any]] = []
        self.layers: list[pd.DataFrame] = []
        self.reason: str | None = None
        """Why the first phase was ended, where this did it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the measurements of a resumed run, or make the first."""
        if self._resumed is not None:
            # Those of the checkpoint: a run that died later measures the steps since then anew.
            stored = read_table(self._resumed / DYNAMICS)
            self.rows = [{str(k): v for k, v in row.items()} for row in stored.to_dict("records")]
            layers = read_table(self._resumed / DYNAMICS_LAYERS)
            self.layers = [layers] if not layers.empty else []
            self._decide()
        if not self.rows:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the chosen steps."""
        if state.global_step % self._trainer.args.updates_per_step:
            return
        step = self._step(state)
        changed = self._trainer.args.ipa_steps == step
        if step % self._every == 0 or changed or state.global_step == state.max_steps:
            self._measure(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was measured so far with the checkpoint, for the run that goes on from there."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _step(self, state: Any) -> int:
        return int(state.global_step // self._trainer.args.updates_per_step)

    def _measure(self, state: Any) -> None:
        # Whether the step that led here was one of alignment; before the first, whether the next is.
        batch_aligned = self._trainer.last_aligned if state.global_step else self._trainer.in_alignment
        measured = self._dynamics.measure()
        step = self._step(state)
        row = measured.row()
        phase = ALIGNMENT if batch_aligned else after_alignment(self._trainer.args.method)
        self.rows.append({"step": step, "phase": phase, **row})
        self.layers.append(measured.layers.assign(step=step))
        self._decide()
        if state.global_step:
            for name in ("kl_mean", "policy_kl", "perplexity", "change"):
                self._trainer.log_metric(f"dynamics/{name}", row[name])
        if state.is_world_process_zero:
            self.write(self._directory)

    def _decide(self) -> None:
        trainer = self._trainer
        if trainer.args.ipa_steps != AUTO or trainer.alignment_ended:
            return
        self.reason = alignment_end([row for row in self.rows if row["phase"] == ALIGNMENT])
        trainer.alignment_ended = self.reason is not None

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """What was measured.

        Returns:
            A row a measurement; a row a measurement and later layer.
        """
        layers = pd.concat(self.layers, ignore_index=True) if self.layers else pd.DataFrame()
        return pd.DataFrame(self.rows), layers[["step", "layer", "cosine", "kl"]] if len(layers) else layers

    def write(self, directory: Path) -> None:
        """Write what was measured so far.

        Args:
            directory: the run's, or a checkpoint's.
        """
        rows, layers = self.tables()
        write_table(directory / DYNAMICS, rows)
        write_table(directory / DYNAMICS_LAYERS, layers)


class StepRecord(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is not typed here
    """Writes into the trainer's state, and so into each checkpoint, how many updates a step has."""

    def __init__(self, updates_per_step: int) -> None:
        self._updates_per_step = updates_per_step

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this.

        Returns:
            The arguments from which transformers could make it again.
        """
        return {"args": {"updates_per_step": self._updates_per_step}, "attributes": {}}


class Chronicle(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Writes the history while it grows, moves the progress bar, and keeps old checkpoints small."""

    def __init__(self, trainer: BuPOTrainer, directory: Path, advance: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._directory = directory
        self._advance = advance
        self._failures: dict[str, int] = {}

    def history(self) -> pd.DataFrame:
        """The history so far.

        Returns:
            A row a step.
        """
        args = self._trainer.args
        return history_of(self._trainer.state.log_history, args.updates_per_step, args.method, args.alignment_rate)

    def failures(self) -> dict[str, int]:
        """Rewards that failed in the whole run, over all processes.

        Returns:
            How many, by kind.
        """
        total: Counter[str] = Counter()
        for entry in self._trainer.state.log_history:
            kinds = {k.removeprefix(FAILURES): int(v) for k, v in entry.items() if k.startswith(FAILURES)}
            total.update(kinds)
        return dict(total)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step when all its updates are done, and the rewards that failed in it."""
        if state.global_step % self._trainer.args.updates_per_step == 0:
            # Each process scores its own share of the rollouts.
            total = count_failures(self._trainer.reward_funcs)
            since = torch.tensor([float(total[kind] - self._failures.get(kind, 0)) for kind in sorted(total)])
            everywhere = self._trainer.accelerator.reduce(since.to(self._trainer.accelerator.device), reduction="sum")
            for kind, number in zip(sorted(total), everywhere.tolist(), strict=True):
                self._trainer.log_metric(FAILURES + kind, number)
            self._failures = dict(total)
            self._advance(1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what no run goes on from."""
        if state.is_world_process_zero:
            drop_optimiser_states(Path(args.output_dir))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the table as it stands."""
        if state.is_world_process_zero:
            write_table(self._directory / HISTORY, self.history())
