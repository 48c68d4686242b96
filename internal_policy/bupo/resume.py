"""The directory of a run in progress: which run it belongs to, and the checkpoint from which the run resumes.

transformers writes a checkpoint file by file and resumes from whatever it finds. Here the last file of a checkpoint
lists the digests of all others: without it the checkpoint is incomplete, and with it a missing or changed file is
detected before a run resumes.
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
from internal_policy.bupo.config import EVALUATION_SETTINGS
from internal_policy.bupo.critic import CRITIC
from internal_policy.bupo.dynamics import FIXED_RESPONSES
from internal_policy.bupo.run import (
    ADAPTER,
    ANALYSIS,
    CHECKPOINTS,
    DYNAMICS,
    DYNAMICS_LAYERS,
    EVALUATIONS,
    HISTORY,
    LAYER_ACCURACY,
    MANIFEST,
    MODEL,
    RUN,
    TRANSFER,
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
"""Everything that determines the result of the run in a directory; written before anything else."""
FILES = "checkpoint_files.json"
"""The digests of a checkpoint's files; written after all of them."""
_RANDOM_STATES = "rng_state*"
_RESUME_FILES = ("optimizer*", "global_step*", "scheduler.pt", "scaler.pt", _RANDOM_STATES, CRITIC)
"""Files of a checkpoint that are needed only to resume; ``global_step*`` is DeepSpeed's."""
_N_RESUMABLE = 2
"""Number of newest checkpoints that keep these files; a killed run may leave the newest one incomplete."""
_NAME = re.compile(r"checkpoint-(\d+)")


class RunDirectory:
    """The directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def begun(self) -> bool:
        """Whether it contains a run, finished or not."""
        return any((self.path / name).is_file() for name in (MANIFEST, SETTINGS))

    def check(self, overwrite: bool) -> None:
        """Refuse early a directory of something else, one that is not writable, and a broken run."""
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
        """Read the finished run, and refuse one with other settings."""
        run = Run.load(self.path)
        # Settings that only one of them has are compared too.
        wanted = _of_training({**dict.fromkeys(run.config), **settings})
        RUN.check_settings(self.path, _of_training(run.config), wanted)
        if evaluation := {name: settings[name] for name in EVALUATION_SETTINGS if name in settings}:
            found = run.evaluation
            made = (None, None) if found is None else (found.n_samples, found.config.get("max_problems"))
            if differing := describe_differences(dict(zip(EVALUATION_SETTINGS, made, strict=True)), evaluation):
                raise UserError(
                    f"{self.path}: this run is finished, and was not evaluated in this way ({differing}); evaluate the "
                    f"trained model: internal-policy evaluate --model {self.path / MODEL}"
                )
        warn_complete(self.path)
        return run

    def open(self, settings: dict[str, Any], updates_per_step: int, overwrite: bool, processes: int) -> Path | None:
        """Begin the run and return None, or return the checkpoint from which it resumes.

        An unfinished run with other settings or another number of processes is refused.
        """
        checkpoints = self.path / CHECKPOINTS
        if overwrite or not (self.path / SETTINGS).is_file():
            self._begin(settings, clear=overwrite)
            return None
        before = self._read_settings(settings)
        if differing := describe_differences(_of_training(before), _of_training(settings)):
            if not any(checkpoints.glob(f"checkpoint-*/{FILES}")):
                # Nothing was trained yet, so nothing is lost by starting over.
                self._begin(settings, clear=True)
                return None
            raise UserError(
                f"{self.path}: holds an unfinished run with other settings ({differing}); repeat its command, "
                "choose another --output directory, or add --overwrite to start over"
            )
        if describe_differences(before, settings):
            logger.warning("%s: is now evaluated in another way; evaluations that are there are made again", self.path)
            shutil.rmtree(self.path / EVALUATIONS, ignore_errors=True)
            self._begin(settings, clear=False)
        checkpoint = last_checkpoint(checkpoints, before, updates_per_step, processes)
        if checkpoint is None:
            logger.warning("%s: there is no complete checkpoint; training from the first step", self.path)
        else:
            step = int(checkpoint.name.rpartition("-")[2]) // updates_per_step
            logger.warning("%s: resuming after step %d", self.path, step)
        return checkpoint

    def _read_settings(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Read the settings of the unfinished run; if they are damaged, compare the digests in its checkpoints."""
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
                f"{stored}: damaged, and the checkpoints have other settings than these; repeat the run's command, "
                "choose another --output directory, or add --overwrite to start over"
            )
        # Copied, not renamed: if this is interrupted, the file still marks the directory as that of a run.
        aside = shutil.copyfile(stored, name_aside(stored))
        logger.warning("%s: damaged; kept as %s, and made again", stored, aside.name)
        self._begin(wanted, clear=False)
        return wanted

    def _begin(self, settings: dict[str, Any], *, clear: bool) -> None:
        if clear:
            # Only files of an earlier run, the manifest first. The settings stay until they are replaced, because they
            # mark the directory as that of a run if this is interrupted.
            for name in (MANIFEST, HISTORY, DYNAMICS, DYNAMICS_LAYERS, LAYER_ACCURACY, FIXED_RESPONSES, REPORT):
                (self.path / name).unlink(missing_ok=True)
            for name in (CHECKPOINTS, EVALUATIONS, MODEL, f".{MODEL}.tmp", ADAPTER, ANALYSIS, TRANSFER):
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def write_digests(checkpoint: Path, settings: dict[str, Any], processes: int) -> None:
    """Write the digests of a checkpoint's files, which mark it as complete."""
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != FILES)
    with ThreadPoolExecutor() as pool:
        files = {
            str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, pool.map(sha256_of, paths), strict=True)
        }
    _write_list(checkpoint, {"settings": settings_digest(settings), "processes": processes, "files": files})


def drop_optimizer_states(directory: Path) -> None:
    """Delete all files but the weights from checkpoints, except from the newest two, from which a run may resume."""
    for _, checkpoint in sorted(_checkpoints(directory))[:-_N_RESUMABLE]:
        listed = _read_list(checkpoint)
        if listed is not None and any(map(_is_resume_file, listed["files"])):
            # The list first, so that it never contains a file that does not exist.
            kept = {name: known for name, known in listed["files"].items() if not _is_resume_file(name)}
            _write_list(checkpoint, {**listed, "files": kept})
        for path in (path for pattern in _RESUME_FILES for path in checkpoint.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def last_checkpoint(
    directory: Path, settings: dict[str, Any], updates_per_step: int = 1, processes: int = 1
) -> Path | None:
    """Find the newest checkpoint from which a run can resume exactly; None if there is none.

    Incomplete checkpoints are skipped and written again later. Also skipped are older ones of which only the weights
    were kept, and those between two updates of a step, whose rollouts they do not contain. A checkpoint that is damaged
    or has other settings is renamed. One of another number of processes is refused, because each process has its own
    random numbers.
    """
    for update, checkpoint in sorted(_checkpoints(directory), reverse=True):
        if update % updates_per_step:
            continue
        if not (checkpoint / FILES).is_file():
            logger.warning("%s: was not written to its end; passed over", checkpoint)
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
                f"{checkpoint}: was written by {listed['processes']} processes, each with its own random numbers, and "
                f"the number now is {processes}; start as many, or add --overwrite to start over"
            )
        return checkpoint
    return None


def _of_training(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings on which a training depends; how it is evaluated is one if a layer is evaluated along the run."""
    left_out = () if settings.get("eval_layer") is not None else EVALUATION_SETTINGS
    return {name: value for name, value in settings.items() if name not in left_out}


def settings_digest(settings: dict[str, Any]) -> str:
    """Digest a run's settings; a missing setting is equivalent to None."""
    known = {name: value for name, value in _of_training(settings).items() if value is not None}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _is_resume_file(name: str) -> bool:
    return any(fnmatch(Path(name).parts[0], pattern) for pattern in _RESUME_FILES)


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    found = ((_NAME.fullmatch(path.name), path) for path in directory.glob("checkpoint-*") if path.is_dir())
    return [(int(match[1]), path) for match, path in found if match is not None]


def _write_list(checkpoint: Path, listed: dict[str, Any]) -> None:
    write_text(checkpoint / FILES, json.dumps({**listed, "sha256": _list_digest(listed)}, indent=2) + "\n")


def _read_list(checkpoint: Path) -> dict[str, Any] | None:
    """Read the list of a checkpoint's files; None if it is missing or damaged."""
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
    # Sizes first, because digests of large files are slow.
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
