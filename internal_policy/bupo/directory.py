"""A run's directory while it is worked on: what is there, whose it is, and where an interrupted run goes on."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.results import REPORT
from internal_policy.bupo.call import tell_complete
from internal_policy.bupo.checkpoint import FILES, flat, last_checkpoint, sealed_settings, settings_digest
from internal_policy.bupo.results import (
    ADAPTER,
    CHECKPOINTS,
    DYNAMICS,
    DYNAMICS_LAYERS,
    EVALUATIONS,
    HISTORY,
    MANIFEST,
    MODEL,
    RUN,
    Run,
)
from internal_policy.bupo.rollouts import ANALYSIS, FIXED
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import is_temporary, name_aside, require_writable, write_text
from internal_policy.utils.locks import LOCK
from internal_policy.utils.result_format import describe_differences

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer

logger = logging.getLogger(__name__)

_SETTINGS = "run_settings.json"


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
        require_writable(self.path)
        held = sorted(p.name for p in self.path.iterdir() if not _passes(p)) if self.path.is_dir() else []
        if held:
            if not self.begun:
                raise UserError(
                    f"{self.path}: is in use for something else (it holds {held[0]}); choose another --output directory"
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
        # A setting that one of them lacks is compared as well.
        before = flat(run.config)
        RUN.check_settings(self.path, before, {**dict.fromkeys(before), **flat(settings)})
        tell_complete(self.path)
        return run

    def open(self, settings: dict[str, Any], updates_per_step: int, overwrite: bool, processes: int) -> Path | None:
        """Begin the run, or find the checkpoint from which it goes on.

        Args:
            settings: what was asked for.
            updates_per_step: updates on a batch of rollouts.
            overwrite: start over.
            processes: how many train.

        Returns:
            The checkpoint; None where the run begins.

        Raises:
            UserError: an unfinished run with other settings, or of another number of processes, is there.
        """
        stored, checkpoints = self.path / _SETTINGS, self.path / CHECKPOINTS
        if stored.is_file() and not overwrite:
            before = self._settings(settings)
            differing = _differing(before, settings)
            if differing and not any(checkpoints.glob(f"checkpoint-*/{FILES}")):
                # Nothing was trained yet, so nothing is lost by starting anew.
                self._begin(settings, clear=True)
                return None
            if differing:
                raise UserError(
                    f"{self.path}: holds an unfinished run with other settings ({differing}); repeat its command, "
                    "choose another --output directory, or add --overwrite to start over"
                )
            checkpoint = last_checkpoint(checkpoints, before, updates_per_step, processes)
            if checkpoint is None:
                logger.warning("%s: no whole checkpoint is there; training from the first step", self.path)
            else:
                step = int(checkpoint.name.rpartition("-")[2]) // updates_per_step
                logger.warning("%s: going on after step %d", self.path, step)
            return checkpoint
        self._begin(settings, clear=overwrite)
        return None

    def _settings(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The settings of the run that is there; where they are no longer legible, the checkpoints tell whose it is."""
        stored = self.path / _SETTINGS
        try:
            before = json.loads(stored.read_bytes())
        except ValueError:
            before = None
        if isinstance(before, dict):
            return before
        if any(known != settings_digest(wanted) for known in sealed_settings(self.path / CHECKPOINTS)):
            raise UserError(
                f"{stored}: damaged, and the checkpoints are of other settings than these; repeat the run's command, "
                "choose another --output directory, or add --overwrite to start over"
            )
        # Copied: were it renamed, and this interrupted, nothing would say that the directory is a run's.
        aside = shutil.copyfile(stored, name_aside(stored))
        logger.warning("%s: damaged; kept as %s, and made again", stored, aside.name)
        self._begin(wanted, clear=False)
        return wanted

    def _begin(self, settings: dict[str, Any], *, clear: bool) -> None:
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
        if trainer.is_world_process_zero():
            # A killed process may have left some of other files there.
            shutil.rmtree(temporary, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
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


def _passes(path: Path) -> bool:
    """Whether a file is no sign of other use: the lock, and what killed processes left unrenamed."""
    return path.name == LOCK or is_temporary(path)


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    return describe_differences(flat(before), flat(now))
