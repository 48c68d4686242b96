"""The analyses of a comparison, from objects and directories, with a label and a training step for each."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from internal_policy.analysis.results import MANIFEST, Analysis
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded

StepsFrom = Literal["given", "name", "order"]
Unit = Literal["step", "update"]
"""What steps count: batches of rollouts, or the trainer's updates if the updates per step are unknown."""

_ARCHITECTURE = {
    **{"family": "model families", "layers": "numbers of layers", "vocabulary": "vocabularies"},
    "hidden_size": "hidden sizes",
}
_FIGURES_DIR = "figures"
_STEP = re.compile(r"(?:^|[^a-z0-9])(checkpoint|global[-_]?step|step|ckpt)[-_=]?(\d+)$", re.IGNORECASE)


def load_analyses(directory: str | Path) -> list[Analysis]:
    """Load every analysis below a directory, such as those of a sweep.

    Args:
        directory: of one analysis, or above several.

    Returns:
        The analyses, ordered by the training steps in their names if there are any, otherwise by name.

    Raises:
        UserError: no analysis there, or a broken one.
    """
    return collect_analyses([directory])


def collect_analyses(sources: Iterable[Any]) -> list[Analysis]:
    """Collect analyses from analyses, directories, or lists of them; a directory of several yields all of them.

    Those of one directory are ordered by the training steps in their names if all differ, otherwise in natural
    order. Among several sources a directory of figures is skipped: ``compare DIR/*`` includes the one that
    ``analyze --output DIR`` wrote.

    Raises:
        UserError: a directory without an analysis, or a source of another type.
    """
    found: list[Analysis] = []
    given = list(sources)
    for source in given:
        if isinstance(source, Analysis):
            found.append(source)
        elif isinstance(source, (str, Path)):
            directory = expanded(source)
            if len(given) > 1 and has_only_figures(directory):
                continue
            found += _sort_by_step([Analysis.load(path) for path in _analysis_dirs(directory)])
        elif isinstance(source, Iterable) and not isinstance(source, Mapping):
            found += collect_analyses(source)
        else:
            raise UserError(
                f"got a {type(source).__name__} to compare; needed are analyses or directories that analyze wrote"
            )
    return found


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts checkpoint-5 before checkpoint-10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]+)", text) if part]


def unique_labels(analyses: Sequence[Analysis], labels: Sequence[str] | None = None) -> list[str]:
    """Check the labels that the user gave, or choose them as `labels_from` does.

    Raises:
        UserError: not one label for each analysis, or two the same.
    """
    if labels is not None:
        given = [str(label) for label in labels]
        if len(given) != len(analyses):
            raise UserError(f"got {len(given)} labels for {len(analyses)} analyses; give one for each, in their order")
        if twice := next((label for label in given if given.count(label) > 1), None):
            raise UserError(f"the label {twice!r} was given twice; give every analysis a different one")
        return given
    return labels_from([a.name for a in analyses], [a.path for a in analyses])


def labels_from(names: Sequence[str], paths: Sequence[Path | None]) -> list[str]:
    """Choose short labels that differ from the names of models and the directories of their analyses (None in memory).

    They are the shortest ends of the names that all differ; failing that, of the directories; failing that, numbered.
    """
    models = [name.strip("/").split("/") for name in names]
    directories = [
        name.split("/") if path is None else list(path.resolve().parts[1:])
        for name, path in zip(names, paths, strict=True)
    ]
    for parts in (models, directories):
        for depth in range(1, 1 + max(map(len, parts), default=0)):
            tails = ["/".join(part[-depth:]) for part in parts]
            if len(set(tails)) == len(tails):
                return tails
    tails = ["/".join(model[-1:]) for model in models]
    return [f"{tail} ({tails[: i + 1].count(tail)})" for i, tail in enumerate(tails)]


def training_steps(
    analyses: Sequence[Analysis], steps: Sequence[float] | None = None
) -> tuple[list[float], StepsFrom, Unit]:
    """Find the training step of each analysis, where the steps come from, and their unit.

    Names such as checkpoint-40 count updates. They are converted to steps if every checkpoint recorded how many
    updates a step has, as those of ``bupo`` do; otherwise the numbers stay, and the unit says so.

    Returns:
        The steps; their origin; and their unit. The origin is ``given``, ``name`` (the end of each name:
        checkpoint-40, step_40, @step40; one analysis of the same architecture may have none and is then step 0, the
        start), or ``order`` if no steps are known and the indices from 0 are used.

    Raises:
        UserError: not one finite step for each.
    """
    if steps is not None:
        if len(steps) != len(analyses):
            raise UserError(f"got {len(steps)} steps for {len(analyses)} analyses; give one for each, in their order")
        given = [float(step) for step in steps]
        if not all(map(math.isfinite, given)):
            raise UserError(f"the steps are {', '.join(map(str, given))}; needed are finite numbers")
        return given, "given", "step"
    named, unit = _steps_from_names(analyses)
    known = [step for step in named if step is not None]
    alike = not architecture_differences(analyses)
    if len(known) == len(named) - 1 and min(known, default=0.0) > 0 and alike:
        # The model from which a training started has no step in its name.
        return [0.0 if step is None else step for step in named], "name", unit
    if len(known) == len(named):
        return known, "name", unit
    return [float(i) for i in range(len(analyses))], "order", "step"


def indices_without_step(analyses: Sequence[Analysis]) -> list[int]:
    """Indices of the analyses whose names contain no step."""
    return [i for i, analysis in enumerate(analyses) if _step_in_name(analysis) is None]


def architecture_differences(analyses: Sequence[Analysis]) -> list[str]:
    """What differs and rules out one training: family, layers, vocabulary or hidden size, with the values."""
    found = []
    for key, plural in _ARCHITECTURE.items():
        values = list(dict.fromkeys(v for a in analyses if (v := a.model.get(key)) is not None))
        if len(values) > 1:
            found.append(f"{plural} {', '.join(map(str, values))}")
    return found


def label_and_order(
    analyses: Sequence[Analysis], labels: Sequence[str] | None = None, steps: Sequence[float] | None = None
) -> tuple[list[Analysis], list[str], list[float], StepsFrom, Unit]:
    """Label analyses, find their steps, and put the model from which the training started first.

    Labels and steps that the user gave are in the order of `analyses`, which is kept if steps are given.

    Returns:
        The analyses, their labels, their steps, and the origin and unit of the steps.

    Raises:
        UserError: labels or steps that do not fit.
    """
    names = unique_labels(analyses, labels)
    numbers, steps_from, unit = training_steps(analyses, steps)
    start = indices_without_step(analyses) if steps_from == "name" else []
    order = [*start, *(i for i in range(len(analyses)) if i not in start)]
    return [analyses[i] for i in order], [names[i] for i in order], [numbers[i] for i in order], steps_from, unit


def baseline_index(baseline: int | str, labels: Sequence[str]) -> int:
    """Index of the analysis with which the others are compared, given by its label or index."""
    if isinstance(baseline, str):
        if baseline in labels:
            return list(labels).index(baseline)
        raise UserError(f"no analysis is called {baseline!r}; the baseline is one of {', '.join(labels)}")
    if not -len(labels) <= baseline < len(labels):
        raise UserError(f"baseline is {baseline}; there are {len(labels)} analyses, from 0 to {len(labels) - 1}")
    return baseline % len(labels)


def _analysis_dirs(directory: Path) -> list[Path]:
    """The directories of analyses in a directory; itself if it is one, or if there is none, for the message."""
    if (directory / MANIFEST).is_file():
        return [directory]
    for pattern in (f"*/{MANIFEST}", f"*/*/{MANIFEST}"):
        if found := [path.parent for path in directory.glob(pattern)]:
            return sorted(found, key=lambda path: natural_key(str(path.relative_to(directory))))
    return [directory]


def has_only_figures(directory: Path) -> bool:
    """Whether a directory contains only the figures that a command wrote next to its results."""
    empty = _analysis_dirs(directory) == [directory] and not (directory / MANIFEST).is_file()
    return directory.name == _FIGURES_DIR and directory.is_dir() and empty


def _sort_by_step(analyses: list[Analysis]) -> list[Analysis]:
    """Order analyses by their steps if these are known and differ, so that two runs are not mixed."""
    steps, steps_from, _ = training_steps(analyses)
    if steps_from == "order" or len(set(steps)) < len(steps):
        return analyses
    return [analyses[i] for i in sorted(range(len(steps)), key=steps.__getitem__)]


def _steps_from_names(analyses: Sequence[Analysis]) -> tuple[list[float | None], Unit]:
    """The number in each name, converted to steps if that is possible for all."""
    named = [_step_in_name(a) for a in analyses]
    steps = [None if name is None else _to_steps(a, *name) for a, name in zip(analyses, named, strict=True)]
    if all((step is None) == (name is None) for step, name in zip(steps, named, strict=True)):
        return steps, "step"
    return [None if name is None else name[1] for name in named], "update"


def _to_steps(analysis: Analysis, word: str, number: float) -> float | None:
    if "step" in word.lower():
        return number
    record = analysis.model.get("training") or {}
    return number / record["updates_per_step"] if record.get("updates") == number else None


def _step_in_name(analysis: Analysis) -> tuple[str, float] | None:
    """The word and the number at the end of the first of its names that has them."""
    names = (analysis.model.get("revision"), analysis.name, analysis.model.get("id"))
    directory = analysis.path.name if analysis.path is not None else None
    for name in (*names, directory):
        if name and (match := _STEP.search(str(name).rstrip("/"))):
            return match[1], float(match[2])
    return None
