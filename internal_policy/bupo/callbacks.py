"""Callbacks of a run's trainer: the history, the dynamics on fixed responses, and the digests of checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from internal_policy.bupo.config import ALIGNMENT, AUTO, second_phase
from internal_policy.bupo.dynamics import Dynamics, alignment_end
from internal_policy.bupo.resume import drop_optimizer_states, write_digests
from internal_policy.bupo.run import DYNAMICS, DYNAMICS_LAYERS, HISTORY, read_table, write_table
from internal_policy.rewards.functions import count_failures

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer

_FAILURES = "reward_failures/"
"""Prefix of the kinds of failures in the trainer's log."""
_COLUMNS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "policy_entropy": "policy_entropy",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clip_ratio": "clip_ratio/region_mean",
    "groups_without_signal": "frac_reward_zero_std",
    "grad_norm": "grad_norm",
    "loss": "loss",
}
"""Columns of the history, and TRL's names of them."""
_PPO_COLUMNS = {name: name for name in ("value_loss", "explained_variance", "critic_grad_norm")}
"""Further columns with a critic."""


def is_due(trainer: BuPOTrainer, state: Any, every: int) -> bool:
    """Whether something is measured after this update: at an interval, as alignment ends, and at the end of the run."""
    step, rest = divmod(state.global_step, trainer.args.updates_per_step)
    phase_ends = trainer.args.ipa_steps == step
    return not rest and (step % every == 0 or phase_ends or state.global_step == state.max_steps)


def current_phase(trainer: BuPOTrainer, state: Any) -> str:
    """Return the phase of the last step; before the first step, that of the next one."""
    aligned = trainer.last_aligned if state.global_step else trainer.in_alignment
    return ALIGNMENT if aligned else second_phase(trainer.args.method)


class DynamicsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Measures figure 5 on fixed responses, before the first step and then at regular intervals.

    With ``ipa_steps="auto"`` it ends the first phase. The decision depends only on the stored measurements, so a
    resumed run decides the same.
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
        """Why this callback ended the first phase, if it did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the measurements of a resumed run, or make the first."""
        if self._resumed is not None:
            # From the checkpoint: steps after it are measured again.
            stored = read_table(self._resumed / DYNAMICS)
            self.rows = [{str(k): v for k, v in row.items()} for row in stored.to_dict("records")]
            layers = read_table(self._resumed / DYNAMICS_LAYERS)
            self.layers = [layers] if not layers.empty else []
            self._decide()
        if not self.rows:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the interval, at the end of the first phase and at the end of the run."""
        if is_due(self._trainer, state, self._every):
            self._measure(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the measurements so far in the checkpoint, for a run that resumes from it."""
        if state.is_world_process_zero:
            self._write(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _measure(self, state: Any) -> None:
        trainer = self._trainer
        measured = self._dynamics.measure()
        row, step = measured.row(), int(state.global_step // trainer.args.updates_per_step)
        self.rows.append({"step": step, "phase": current_phase(trainer, state), **row})
        self.layers.append(measured.layers.assign(step=step))
        self._decide()
        if state.global_step:
            for name in ("kl_mean", "policy_kl", "perplexity", "change"):
                trainer.log_metric(f"dynamics/{name}", row[name])
        if state.is_world_process_zero:
            self._write(self._directory)

    def _decide(self) -> None:
        trainer = self._trainer
        if trainer.args.ipa_steps != AUTO or trainer.alignment_ended:
            return
        self.reason = alignment_end([row for row in self.rows if row["phase"] == ALIGNMENT])
        trainer.alignment_ended = self.reason is not None

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the tables: a row per measurement, and a row per measurement and later layer."""
        layers = pd.concat(self.layers, ignore_index=True) if self.layers else pd.DataFrame()
        return pd.DataFrame(self.rows), layers[["step", "layer", "cosine", "kl"]] if len(layers) else layers

    def _write(self, directory: Path) -> None:
        rows, layers = self.tables()
        write_table(directory / DYNAMICS, rows)
        write_table(directory / DYNAMICS_LAYERS, layers)


class StepCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is not typed here
    """Stores the number of updates per step in the trainer's state, and thus in each checkpoint."""

    def __init__(self, updates_per_step: int) -> None:
        self._updates_per_step = updates_per_step

    def state(self) -> dict[str, Any]:
        """Return the arguments from which transformers could recreate this callback."""
        return {"args": {"updates_per_step": self._updates_per_step}, "attributes": {}}


class HistoryCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Writes the history as it grows, counts failed rewards, and advances the progress bar."""

    def __init__(self, trainer: BuPOTrainer, directory: Path, advance: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._directory = directory
        self._advance = advance
        self._failures: dict[str, int] = {}

    def history(self) -> pd.DataFrame:
        """Convert the trainer's log to a table with a row per step."""
        args = self._trainer.args
        columns = {**_COLUMNS, **(_PPO_COLUMNS if args.method == "ppo" else {})}
        rows = []
        for entry in self._trainer.state.log_history:
            if "reward" not in entry:
                continue
            aligned = entry.get("aligns", 0.0) > 0.5
            rate = entry.get("learning_rate")
            row: dict[str, Any] = {
                "step": entry["step"] // args.updates_per_step,
                "phase": ALIGNMENT if aligned else second_phase(args.method),
                **{name: entry.get(source) for name, source in columns.items()},
                "learning_rate": None if rate is None else rate * (args.alignment_rate if aligned else 1.0),
            }
            if entry.get("step_time") is not None:
                row["seconds"] = entry["step_time"] * args.updates_per_step
            row.update({key: value for key, value in entry.items() if key.startswith("rewards/") and "/mean" in key})
            failed = [value for key, value in entry.items() if key.startswith(_FAILURES)]
            row["reward_failures"] = int(sum(failed)) if failed else None
            rows.append(row)
        return pd.DataFrame(rows)

    def failures(self) -> dict[str, int]:
        """Count the failed rewards of the whole run by kind, over all processes."""
        total: Counter[str] = Counter()
        for entry in self._trainer.state.log_history:
            total.update({k.removeprefix(_FAILURES): int(v) for k, v in entry.items() if k.startswith(_FAILURES)})
        return dict(total)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the last update of a step, advance the bar and count the rewards that failed in the step."""
        if state.global_step % self._trainer.args.updates_per_step == 0:
            # Each process scores its own share of the rollouts.
            total = count_failures(self._trainer.reward_funcs)
            since = torch.tensor([float(total[kind] - self._failures.get(kind, 0)) for kind in sorted(total)])
            everywhere = self._trainer.accelerator.reduce(since.to(self._trainer.accelerator.device), reduction="sum")
            for kind, number in zip(sorted(total), everywhere.tolist(), strict=True):
                self._trainer.log_metric(_FAILURES + kind, number)
            self._failures = dict(total)
            self._advance(1)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the current table."""
        if state.is_world_process_zero:
            write_table(self._directory / HISTORY, self.history())


class CheckpointDigestCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Records the digests of each checkpoint's files, and only then deletes older checkpoints.

    It must be the last callback, so that the files that other callbacks add to a checkpoint are included.
    """

    def __init__(self, trainer: BuPOTrainer, settings: dict[str, Any]) -> None:
        self._trainer = trainer
        self._settings = settings
        # transformers would delete the older ones before the new one is known to be complete.
        self._save_total_limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the files once every process has written its part."""
        accelerator = self._trainer.accelerator
        accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            directory = Path(args.output_dir)
            write_digests(directory / f"checkpoint-{state.global_step}", self._settings, accelerator.num_processes)
            rotate_checkpoints(output_dir=args.output_dir, save_total_limit=self._save_total_limit)
            drop_optimizer_states(directory)
