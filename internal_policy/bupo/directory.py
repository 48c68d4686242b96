"""A run's directory while it is worked on: what is there, whose it is, and where an interrupted run goes on."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.bupo.call import tell_complete
from internal_policy.bupo.results import (
    ADAPTER,
    CHECKPOINTS,
    DYNAMICS,
    DYNAMICS_LAYERS,
    EVALUATIONS,
    HISTORY,
    MANIFEST,
    MODEL,
    Run,
)
from internal_policy.bupo.rollouts import ANALYSIS, FIXED
from internal_policy.comparison.sources import natural_key
from internal_policy.errors import UserError
from internal_policy.files import write_text
from internal_policy.results import REPORT
from internal_policy.training_record import STATE
from internal_policy.workspace import differences, in_use

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer

logger = logging.getLogger(__name__)

_SETTINGS = "run_settings.json"
_RANDOM_STATES = "rng_state*"
_FOR_GOING_ON = ("optimizer*", "global_step*", "scheduler.pt", "scaler.pt", _RANDOM_STATES)
"""What of a checkpoint only the trainer needs; ``global_step*`` is DeepSpeed's."""
_WHOLE = 2
"""So many of the newest checkpoints keep all of it: the newest may be half-written when a run is killed."""


class RunDirectory:
    """Where one run is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def begun(self) -> bool:
        """Whether a run is there, finished or not."""
        return any((self.path / name).is_file() for name in (MANIFEST, _SETTINGS))

    def check(self, overwrite: bool) -> None:
        """Refuse a directory that is not a run's or not writable, before anything long begins.

        Args:
            overwrite: whether what is there may be replaced.

        Raises:
            UserError: not writable, in use for something else, or a run that cannot be read.
        """
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            what = "is a directory that may not be written to" if existing.is_dir() else "is a file"
            raise UserError(f"{self.path}: cannot be written ({existing} {what}); choose another --output directory")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not self.begun:
                held = sorted(p.name for p in self.path.iterdir())[0]
                raise UserError(
                    f"{self.path}: is in use for something else (it holds {held}); choose another --output directory"
                )
            if not overwrite and (self.path / MANIFEST).is_file():
                Run.load(self.path)

    def finished(self, settings: dict[str, Any]) -> Run:
        """Read the finished run that is there.

        Args:
            settings: what was asked for.

        Returns:
            The run.

        Raises:
            UserError: it was made with other settings.
        """
        run = Run.load(self.path)
        if differing := _differing(run.config, settings):
            raise in_use(self.path, "a run", differing)
        tell_complete(self.path)
        return run

    def open(self, settings: dict[str, Any], updates_per_step: int, overwrite: bool, main: bool) -> Path | None:
        """Begin the run, or find the checkpoint from which it goes on.

        Args:
            settings: what was asked for.
            updates_per_step: updates on a batch of rollouts.
            overwrite: start over.
            main: whether this process writes.

        Returns:
            The checkpoint; None where the run begins.

        Raises:
            UserError: an unfinished run with other settings is there.
        """
        stored = self.path / _SETTINGS
        if stored.is_file() and not overwrite:
            try:
                before = json.loads(stored.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{stored}: cannot be read ({error}); add --overwrite to start over") from error
            differing = _differing(before, settings)
            if differing and last_checkpoint(self.path / CHECKPOINTS) is None:
                # Nothing was trained yet, so nothing is lost by starting anew.
                self._begin(settings, main, clear=True)
                return None
            if differing:
                raise UserError(
                    f"{self.path}: holds an unfinished run with other settings ({differing}); repeat its command, "
                    "choose another --output directory, or add --overwrite to start over"
                )
            checkpoint = last_checkpoint(self.path / CHECKPOINTS, updates_per_step)
            if checkpoint is not None:
                step = int(checkpoint.name.rpartition("-")[2]) // updates_per_step
                logger.warning("%s: going on after step %d", self.path, step)
            return checkpoint
        self._begin(settings, main, clear=overwrite)
        return None

    def _begin(self, settings: dict[str, Any], main: bool, *, clear: bool) -> None:
        if not main:
            return
        if clear:
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / _SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def _clear(self) -> None:
        """Remove what an earlier run wrote, the manifest first; nothing else that is there.

        The settings stay until they are replaced: they say whose directory it is, should this be interrupted.
        """
        for name in (MANIFEST, HISTORY, DYNAMICS, DYNAMICS_LAYERS, FIXED, REPORT):
            (self.path / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, EVALUATIONS, MODEL, f".{MODEL}.tmp", ADAPTER, ANALYSIS):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def save_model(self, trainer: BuPOTrainer, tokenizer: Any) -> None:
        """Write the model whole or not at all, with adapters merged, so that anything loads it.

        Args:
            trainer: the trainer, done.
            tokenizer: the model's.
        """
        target, temporary = self.path / MODEL, self.path / f".{MODEL}.tmp"
        unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(unwrapped, "merge_and_unload"):
            trainer.save_model(str(self.path / ADAPTER))
            if trainer.is_world_process_zero():
                unwrapped.merge_and_unload().save_pretrained(temporary)
        else:
            trainer.save_model(str(temporary))
        if trainer.is_world_process_zero():
            if not any(temporary.glob("*.safetensors")):
                raise UserError(
                    f"{temporary}: the launcher's configuration wrote no whole weights; use FULL_STATE_DICT (FSDP) or "
                    "zero3_save_16bit_model (DeepSpeed). The checkpoints are kept: the same command goes on from there"
                )
            tokenizer.save_pretrained(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    flat = [{**s, **s.get("plan", {}), **s.get("trainer", {}), "plan": None, "trainer": None} for s in (before, now)]
    return differences(*flat)


def drop_optimiser_states(checkpoints: Path) -> None:
    """Leave older checkpoints their weights, for a sweep, and the newest two all that a run needs to go on.

    Args:
        checkpoints: where the trainer puts them.
    """
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: natural_key(path.name))
    for path in (path for old in found[:-_WHOLE] for pattern in _FOR_GOING_ON for path in old.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def last_checkpoint(directory: Path, updates_per_step: int = 1) -> Path | None:
    """Find the newest checkpoint from which a run can go on as if it had not stopped.

    Args:
        directory: where the trainer puts them.
        updates_per_step: updates on a batch of rollouts.

    Returns:
        It, or None. The trainer's state is the last file of a checkpoint: without it the checkpoint is half-written.
        One from between two updates of a step is passed over, for the rollouts of that step are not in it, and so is
        one that holds the weights only.
    """
    found = []
    for checkpoint in directory.glob("checkpoint-*"):
        try:
            state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            update = int(state["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        if update % updates_per_step == 0 and any(checkpoint.glob(_RANDOM_STATES)):
            found.append((update, checkpoint))
    return max(found)[1] if found else None
