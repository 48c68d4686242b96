"""A run's directory while it is worked on: whose it is, and the checkpoint from which an interrupted run goes on.

transformers writes a checkpoint file by file and goes on from whatever it finds. Here a checkpoint ends with a list of
its files and their digests: without the list it was not written to its end, and with it whatever is missing or changed
is noticed before a run goes on from there.
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
from typing import Any

from internal_policy.analysis.results import REPORT
from internal_policy.bupo.dynamics import FIXED_RESPONSES
from internal_policy.bupo.run import (
    ADAPTER,
    ANALYSIS,
    CHECKPOINTS,
    DYNAMICS,
    DYNAMICS_LAYERS,
    EVALUATIONS,
    HISTORY,
    MANIFEST,
    MODEL,
    RUN,
    Run,
    warn_complete,
)
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import (
    is_temporary,
    name_aside,
    remove_stale,
    require_writable,
    set_aside,
    sha256_of,
    write_text,
)
from internal_policy.utils.locks import LOCK
from internal_policy.utils.result_format import describe_differences

logger = logging.getLogger(__name__)

SETTINGS = "run_settings.json"
"""What decides the result of the run in a directory, written before anything else."""
FILES = "checkpoint_files.json"
"""The digests of a checkpoint's files, written when all others are there."""
_RANDOM_STATES = "rng_state*"
_TO_GO_ON = ("optimizer*", "global_step*", "scheduler.pt", "scaler.pt", _RANDOM_STATES)
"""Files of a checkpoint that only the trainer needs; ``global_step*`` is DeepSpeed's."""
_KEPT_WHOLE = 2
"""So many of the newest checkpoints keep all files: the newest may be half-written when a run is killed."""
_NAME = re.compile(r"checkpoint-(\d+)")


class RunDirectory:
    """Where one run is written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def begun(self) -> bool:
        """Whether a run is there, finished or not."""
        return any((self.path / name).is_file() for name in (MANIFEST, SETTINGS))

    def check(self, overwrite: bool) -> None:
        """Refuse, before anything long begins, a directory that is not a run's or not writable, or a broken run."""
        require_writable(self.path)
        others = (
            [p for p in self.path.iterdir() if p.name != LOCK and not is_temporary(p)] if self.path.is_dir() else []
        )
        if others and not self.begun:
            raise UserError(
                f"{self.path}: is in use for something else (it holds {min(others).name}); choose another --output "
                "directory"
            )
        if not overwrite and (self.path / MANIFEST).is_file():
            Run.load(self.path)

    def finished(self, settings: dict[str, Any]) -> Run:
        """Read the finished run that is there, and refuse one of other settings."""
        run = Run.load(self.path)
        # A setting that one of them lacks is compared as well.
        RUN.check_settings(self.path, run.config, {**dict.fromkeys(run.config), **settings})
        warn_complete(self.path)
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
        checkpoints = self.path / CHECKPOINTS
        if overwrite or not (self.path / SETTINGS).is_file():
            self._begin(settings, clear=overwrite)
            return None
        before = self._read_settings(settings)
        if differing := describe_differences(before, settings):
            if not any(checkpoints.glob(f"checkpoint-*/{FILES}")):
                # Nothing was trained yet, so nothing is lost by starting over.
                self._begin(settings, clear=True)
                return None
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

    def _read_settings(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """The settings of the run that is there; where they are damaged, the checkpoints say whose it is."""
        stored = self.path / SETTINGS
        try:
            before = json.loads(stored.read_bytes())
        except ValueError:
            before = None
        if isinstance(before, dict):
            return before
        lists = (_read_list(checkpoint) for _, checkpoint in _checkpoints(self.path / CHECKPOINTS))
        if any(listed is not None and listed["settings"] != settings_digest(wanted) for listed in lists):
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
            # What an earlier run wrote, the manifest first, and nothing else. The settings stay until they are
            # replaced: they say whose directory it is, should this be interrupted.
            for name in (MANIFEST, HISTORY, DYNAMICS, DYNAMICS_LAYERS, FIXED_RESPONSES, REPORT):
                (self.path / name).unlink(missing_ok=True)
            for name in (CHECKPOINTS, EVALUATIONS, MODEL, f".{MODEL}.tmp", ADAPTER, ANALYSIS):
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def list_files(checkpoint: Path, settings: dict[str, Any], processes: int) -> None:
    """Write the list of a checkpoint's files, which makes it a whole one."""
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != FILES)
    with ThreadPoolExecutor() as pool:
        files = {
            str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True)
        }
    _write_list(checkpoint, {"settings": settings_digest(settings), "processes": processes, "files": files})


def drop_optimizer_states(directory: Path) -> None:
    """Leave older checkpoints only their weights, and the newest two all that a run needs to go on."""
    for _, checkpoint in sorted(_checkpoints(directory))[:-_KEPT_WHOLE]:
        listed = _read_list(checkpoint)
        if listed is not None and any(map(_is_to_go_on, listed["files"])):
            # First, so that at no time a file is listed that is not there.
            kept = {name: known for name, known in listed["files"].items() if not _is_to_go_on(name)}
            _write_list(checkpoint, {**listed, "files": kept})
        for path in (path for pattern in _TO_GO_ON for path in checkpoint.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def last_checkpoint(
    directory: Path, settings: dict[str, Any], updates_per_step: int = 1, processes: int = 1
) -> Path | None:
    """Find the newest checkpoint from which a run can go on as if it had not stopped; None where there is none.

    A checkpoint that was not written to its end is passed over, and written again in its turn; so is an older one of
    which only the weights were kept, and one between two updates of a step, whose rollouts are not in it. One that was
    damaged, or is of other settings, is set aside.

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
        listed = _read_list(checkpoint)
        fault = f"{FILES} is damaged" if listed is None else _fault(checkpoint, listed, settings)
        if listed is None or fault is not None:
            logger.warning("%s: %s; kept as %s", checkpoint, fault, set_aside(checkpoint).name)
            continue
        if not any(fnmatch(name, _RANDOM_STATES) for name in listed["files"]):
            logger.warning("%s: holds its weights only; passed over", checkpoint)
            continue
        if listed["processes"] != processes:
            raise UserError(
                f"{checkpoint}: is of {listed['processes']} processes, each with random numbers of its own, and "
                f"{processes} train now; start as many, or add --overwrite to start over"
            )
        return checkpoint
    return None


def settings_digest(settings: dict[str, Any]) -> str:
    """Digest a run's settings; one that is missing means the same as None."""
    known = {name: value for name, value in settings.items() if value is not None}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _is_to_go_on(name: str) -> bool:
    return any(fnmatch(Path(name).parts[0], pattern) for pattern in _TO_GO_ON)


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in directory.glob("checkpoint-*") if path.is_dir())
    return [(int(match[1]), path) for match, path in found if match is not None]


def _write_list(checkpoint: Path, listed: dict[str, Any]) -> None:
    write_text(checkpoint / FILES, json.dumps({**listed, "sha256": _list_digest(listed)}, indent=2) + "\n")


def _read_list(checkpoint: Path) -> dict[str, Any] | None:
    """The list of a checkpoint's files; None where there is none, or it is not what was written."""
    try:
        listed = json.loads((checkpoint / FILES).read_bytes())
        known = listed.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return listed if known == _list_digest(listed) else None


def _fault(checkpoint: Path, listed: dict[str, Any], settings: dict[str, Any]) -> str | None:
    if listed["settings"] != settings_digest(settings):
        return "is of other settings"
    paths = {name: checkpoint / name for name in listed["files"]}
    # Sizes first: digests of large files take their time.
    for name, path in paths.items():
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != listed["files"][name]["bytes"]:
            return f"{name} is damaged"
    with ThreadPoolExecutor() as pool:
        for (name, known), digest in zip(listed["files"].items(), pool.map(sha256_of, paths.values()), strict=True):
            if digest != known["sha256"]:
                return f"{name} is damaged"
    return None


def _list_digest(listed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
