"""Checkpoints of a training that are known to be whole: a list of their files with digests, written when all are there.

transformers writes a checkpoint file by file and goes on from what it finds. Without the list a checkpoint was not
written to its end; with it, whatever is missing or changed is noticed before a run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from internal_policy.utils.errors import UserError
from internal_policy.utils.io import remove_stale, set_aside, write_text

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer

logger = logging.getLogger(__name__)

FILES = "checkpoint_files.json"
"""The list; of a checkpoint it is the last file."""
_RANDOM_STATES = "rng_state*"
_FOR_GOING_ON = ("optimizer*", "global_step*", "scheduler.pt", "scaler.pt", _RANDOM_STATES)
"""What of a checkpoint only the trainer needs; ``global_step*`` is DeepSpeed's."""
_WHOLE = 2
"""So many of the newest checkpoints keep all of it: the newest may be half-written when a run is killed."""
_NAME = re.compile(r"checkpoint-(\d+)")


class Seal(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Writes the list of each checkpoint, and only then lets older checkpoints go."""

    def __init__(self, trainer: BuPOTrainer, settings: dict[str, Any]) -> None:
        self._trainer = trainer
        self._settings = settings
        # transformers would delete the older ones before the new one is known to be whole.
        self._kept, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint when every process has written its part."""
        accelerator = self._trainer.accelerator
        accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._settings, accelerator.num_processes)
            rotate_checkpoints(output_dir=args.output_dir, save_total_limit=self._kept)


def seal(checkpoint: Path, settings: dict[str, Any], processes: int) -> None:
    """Write the list of a checkpoint's files.

    Args:
        checkpoint: its directory, with all of them.
        settings: of the run.
        processes: how many trained.
    """
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != FILES)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest, paths)
        files = {
            str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    _write(checkpoint, {"settings": settings_digest(settings), "processes": processes, "files": files})


def drop_optimiser_states(directory: Path) -> None:
    """Leave older checkpoints their weights, for a sweep, and the newest two all that a run needs to go on.

    Args:
        directory: where the trainer puts them.
    """
    for _, checkpoint in sorted(_checkpoints(directory))[:-_WHOLE]:
        told = _read(checkpoint) if (checkpoint / FILES).is_file() else None
        if told is not None and any(map(_is_for_going_on, told["files"])):
            # First, so that at no time a file is listed that is not there.
            kept = {name: known for name, known in told["files"].items() if not _is_for_going_on(name)}
            _write(checkpoint, {**told, "files": kept})
        for path in (path for pattern in _FOR_GOING_ON for path in checkpoint.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_for_going_on(name: str) -> bool:
    return any(fnmatch(Path(name).parts[0], pattern) for pattern in _FOR_GOING_ON)


def _write(checkpoint: Path, told: dict[str, Any]) -> None:
    write_text(checkpoint / FILES, json.dumps({**told, "sha256": _told_digest(told)}, indent=2) + "\n")


def last_checkpoint(
    directory: Path, settings: dict[str, Any], updates_per_step: int = 1, processes: int = 1
) -> Path | None:
    """Find the newest checkpoint from which a run can go on as if it had not stopped.

    One that was not written to its end is passed over, and written again in its turn; so is an older one that has kept
    its weights only. One that was damaged, or is of other settings, is set aside.

    Args:
        directory: where the trainer puts them.
        settings: of the run.
        updates_per_step: updates on a batch of rollouts. A checkpoint from between two of them is passed over, for the
            rollouts of that step are not in it.
        processes: how many train now.

    Returns:
        It, or None.

    Raises:
        UserError: it is of another number of processes, each of which has random numbers of its own.
    """
    for update, checkpoint in sorted(_checkpoints(directory), reverse=True):
        if update % updates_per_step:
            continue
        if not (checkpoint / FILES).is_file():
            logger.warning("%s: was not written to its end; passed over", checkpoint)
            # It is written again in its turn, over what is there.
            remove_stale(checkpoint)
            continue
        told = _read(checkpoint)
        why = f"{FILES} is damaged" if told is None else _fault(checkpoint, told, settings)
        if told is None or why is not None:
            logger.warning("%s: %s; kept as %s", checkpoint, why, set_aside(checkpoint).name)
            continue
        if not any(fnmatch(name, _RANDOM_STATES) for name in told["files"]):
            logger.warning("%s: holds its weights only; passed over", checkpoint)
            continue
        if told["processes"] != processes:
            raise UserError(
                f"{checkpoint}: is of {told['processes']} processes, each with random numbers of its own, and "
                f"{processes} train now; start as many, or add --overwrite to start over"
            )
        return checkpoint
    return None


def sealed_settings(directory: Path) -> list[str]:
    """Tell of which settings the checkpoints are.

    Args:
        directory: where the trainer puts them.

    Returns:
        Of each that has a list its `settings_digest`.
    """
    lists = [_read(checkpoint) for _, checkpoint in _checkpoints(directory) if (checkpoint / FILES).is_file()]
    return [told["settings"] for told in lists if told is not None]


def settings_digest(settings: dict[str, Any]) -> str:
    """Make a digest of a run's settings.

    Args:
        settings: what decides the result.

    Returns:
        The same for equal settings.
    """
    told = {name: value for name, value in flat(settings).items() if value is not None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Put a run's settings side by side.

    Args:
        settings: with those of the plan and of the trainer below them.

    Returns:
        All of them; one that is not there means the same as None.
    """
    return {**settings, **settings.get("plan", {}), **settings.get("trainer", {}), "plan": None, "trainer": None}


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in directory.glob("checkpoint-*") if path.is_dir())
    return [(int(match[1]), path) for match, path in found if match is not None]


def _read(checkpoint: Path) -> dict[str, Any] | None:
    """The list; None where it is not what was written."""
    try:
        told = json.loads((checkpoint / FILES).read_bytes())
        known = told.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return told if known == _told_digest(told) else None


def _fault(checkpoint: Path, told: dict[str, Any], settings: dict[str, Any]) -> str | None:
    if told["settings"] != settings_digest(settings):
        return "is of other settings"
    paths = {name: checkpoint / name for name in told["files"]}
    for name, path in paths.items():
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != told["files"][name]["bytes"]:
            return f"{name} is damaged"
    with ThreadPoolExecutor() as pool:
        for (name, known), digest in zip(told["files"].items(), pool.map(_digest, paths.values()), strict=True):
            if digest != known["sha256"]:
                return f"{name} is damaged"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _told_digest(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
