"""The checkpoints of a sweep: revisions of a hub model, or directories found by globs, in natural order.

TRL numbers checkpoints by optimiser updates, and a step is a batch of rollouts with all updates on it. Trainings with
``bupo`` store in each checkpoint how many updates a step has; other checkpoints do not contain it.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.sources import natural_key
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded

_CHECKPOINT = "checkpoint-*"
STATE = "trainer_state.json"
STEP_CALLBACK = "StepCallback"
"""The key, in ``stateful_callbacks`` of the trainer's state, of the callback that stores the updates per step."""


@dataclass(frozen=True)
class Target:
    """One checkpoint to analyse."""

    model: str
    """Hub id, directory, or embedded model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    def __str__(self) -> str:
        return self.model if self.revision is None else f"{self.model}@{self.revision}"


def list_targets(
    model: str | None, revisions: str | Sequence[str] = (), checkpoints: str | Path | Iterable[str | Path] = ()
) -> list[Target]:
    """List the checkpoints of a sweep: revisions in the given order, or directories in natural order.

    A model with `checkpoints` (see `find_checkpoints`) is the one from which their training started; it comes first.

    Raises:
        UserError: no checkpoints, both kinds, or a directory that is not a checkpoint.
    """
    patterns = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints)
    revisions = [revisions] if isinstance(revisions, str) else revisions
    if revisions and patterns:
        raise UserError("both --revision and --checkpoints were given; revisions are of a hub model, checkpoints local")
    if revisions:
        if model is None:
            raise UserError(f"--revision {revisions[0]} was given without --model; name the hub model that it is of")
        return [Target(model, revision) for revision in dict.fromkeys(revisions)]
    if not patterns:
        raise UserError("nothing to sweep over; give --revision several times, or --checkpoints 'RUN/checkpoint-*'")
    found = [Target(str(path)) for path in find_checkpoints(patterns)]
    return [*([Target(str(model))] if model is not None else []), *found]


def find_checkpoints(patterns: Iterable[str | Path]) -> list[Path]:
    """Find checkpoints on disk by directories and shell globs, in natural order (checkpoint-5 before checkpoint-10).

    A directory that contains ``checkpoint-*``, or ``checkpoints/checkpoint-*`` as a run of ``bupo`` does, is replaced
    by these; a final model next to them is ignored, because the last checkpoint is the same.

    Raises:
        UserError: a pattern that matches nothing, or a directory that is not a checkpoint.
    """
    found: dict[Path, Path] = {}
    for pattern in patterns:
        if not str(pattern):
            raise UserError("--checkpoints is empty; name a training run's directory, or quote a glob")
        for path in _match(str(expanded(pattern))):
            found |= {checkpoint.resolve(): checkpoint for checkpoint in _checkpoints_in(path)}
    return sorted(found.values(), key=lambda path: natural_key(str(path)))


def _match(pattern: str) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    if matches := glob.glob(pattern, recursive=True):  # noqa: PTH207 - pathlib refuses absolute patterns.
        return [Path(match) for match in matches]
    if glob.has_magic(pattern):
        raise UserError(f"--checkpoints {pattern}: matches nothing; name the run's directory, or quote another glob")
    advice = "a hub model's checkpoints are given by --model and --revision" if pattern.count("/") <= 1 else ""
    raise UserError(f"--checkpoints {pattern}: no such directory; {advice or 'name a run or its checkpoints'}")


def _checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints in a directory, or the directory itself if it is one."""
    for place in (path, path / "checkpoints"):
        if inside := [p for p in place.glob(_CHECKPOINT) if p.is_dir()]:
            return [checkpoint for p in inside for checkpoint in _require_checkpoint(p)]
    return _require_checkpoint(path)


def _require_checkpoint(path: Path) -> list[Path]:
    if (path / "config.json").is_file():
        return [path]
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: holds LoRA adapters without their base model; merge them first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...), and its tokenizer)"
        )
    if (path / "model" / "config.json").is_file():
        raise UserError(f"{path}: a run without checkpoints; its result is a model: give --model {path / 'model'}")
    raise UserError(
        f"{path}: is not a checkpoint (no config.json), nor a run with checkpoint-* directories; "
        "name a run, or a glob that matches checkpoints only"
    )


def require_distinct_outputs(configs: Iterable[AnalyzeConfig]) -> None:
    """Refuse different models or lenses whose analyses would be written to one directory.

    Repeating a model with its lens is allowed.
    """
    taken: dict[str, tuple[Target, Any]] = {}
    for config in configs:
        own = Target(config.model, config.revision), config.lens
        before = taken.setdefault(config.slug, own)
        if before != own:
            what = [str(target) for target, _ in (before, own)]
            if before[0] == own[0]:
                what = [f"the lens {lens if isinstance(lens, str) else config.lens_name}" for _, lens in (before, own)]
            raise UserError(
                f"{what[0]} and {what[1]} would both be written to {config.slug}; analyse them one by one, each with "
                "its own --output"
            )


def training_record(model: str | Path) -> dict[str, int] | None:
    """The ``updates`` and ``updates_per_step`` in the trainer's state of a checkpoint; None without both."""
    try:
        state = json.loads((expanded(model) / STATE).read_text(encoding="utf-8"))
        per_step = state["stateful_callbacks"][STEP_CALLBACK]["args"]["updates_per_step"]
        return {"updates": int(state["global_step"]), "updates_per_step": int(per_step)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
