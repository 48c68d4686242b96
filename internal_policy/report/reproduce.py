"""How to make a result again: the command line, quoted for a shell, and the same call from Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.sources import labels_from
from internal_policy.report.page import clean
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import command_line_of, words_of

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

ANALYSES = "data/analyses"
COMPARISONS = "data/comparisons"
COMPARED = "compare--"
"""What the directory of a comparison begins with where the command wrote it."""
SAMPLING = ("prompts_split", "samples_per_prompt", "max_new_tokens", "temperature", "generator")
_GIVEN = re.compile(r"\d+ given")


@dataclass(frozen=True)
class Commands:
    """What to type, and what to know of it."""

    shell: str | None
    """The command line; None where only Python can say it."""
    python: str
    """The call from Python."""
    notes: tuple[str, ...] = ()
    """What else decides whether the same comes out."""


def analysis_commands(analysis: Analysis) -> Commands:
    """Rebuild the command that made an analysis from its settings.

    Args:
        analysis: the analysis.

    Returns:
        The command and the call. Where prompts or responses were given from memory, the ones that are stored with the
        analysis are read instead, which gives the same numbers.
    """
    config = analysis.config
    options = {
        f.name: config[f.name]
        for f in fields(AnalyzeConfig)
        if f.name != "model" and f.name in config and config[f.name] != f.default
    }
    notes = [
        "Where this analysis is finished in the output directory, it is read and nothing is computed: to compute it "
        "again, choose another output, or add --overwrite (overwrite=True in Python), which replaces it."
    ]
    stored = "responses.jsonl" if analysis.path is None else str(analysis.path / "responses.jsonl")
    if any(_GIVEN.fullmatch(str(config.get(name))) for name in ("prompts", "responses")):
        for name in ("prompts", *SAMPLING):
            options.pop(name, None)
        options["responses"] = stored
        where = f"they are read from {clean(stored)}" if analysis.path is not None else "save the analysis to read them"
        notes.append(f"Prompts or responses were given from Python: {where}, which gives the same numbers.")
    root = None if analysis.path is None else str(analysis.path.parent)
    place = None if root == ANALYSES else root
    model = str(config.get("model", analysis.model["id"]))
    notes += _about(analysis, model)
    config_again = AnalyzeConfig(model=model, **options)
    words = [
        "internal-policy",
        "analyze",
        *command_line_of(config_again, always=("model",)),
        *words_of("output", place),
    ]
    given = {**options, "output": root or ANALYSES}
    python = "from internal_policy import analyze\n\n" + call("analyze", [model], given)
    if _in_memory(analysis, model):
        loaded = "# model and tokenizer as they were in memory then\n"
        python = "from internal_policy import analyze\n\n" + loaded + call("analyze", [], given, "model, tokenizer")
        return Commands(None, clean(python), tuple(notes))
    return Commands(clean(shlex.join(words)), clean(python), tuple(notes))


def comparison_words(manifest: Mapping[str, Any], where: Any, root: str | None = None) -> list[str]:
    """Say which command makes a comparison again.

    Args:
        manifest: what ``comparison.json`` holds.
        where: its directory, for the message.
        root: what --output was; None of the default.

    Returns:
        The words of the command.

    Raises:
        UserError: its analyses were never on disk.
    """
    rows, baseline = manifest["analyses"], manifest["baseline"]
    paths = [row["path"] for row in rows]
    if None in paths:
        raise UserError(
            f"{where}: is a comparison of analyses in memory, whose curves are not in it; save the analyses, "
            "and compare their directories"
        )
    words = ["internal-policy", "compare", *paths]
    if _labels_given(manifest):
        words += [word for row in rows for word in words_of("label", row["label"])]
    if manifest["steps_from"] == "given":
        words += [word for row in rows for word in ("--step", f"{row['step']:g}")]
    if baseline != rows[0]["label"]:
        words += words_of("baseline", baseline)
    if manifest.get("seed"):
        words += ["--seed", str(manifest["seed"])]
    return words if root is None else [*words, *words_of("output", root)]


def _labels_given(manifest: Mapping[str, Any]) -> bool:
    """Whether labels are the user's own, of which older manifests say nothing, or others than the names would give."""
    rows = manifest["analyses"]
    found = labels_from([row["model"] for row in rows], [row["path"] and Path(row["path"]) for row in rows])
    return bool(manifest.get("labels_given")) or found != [row["label"] for row in rows]


def comparison_commands(manifest: Mapping[str, Any], path: Path | None = None) -> Commands:
    """Say how to make a comparison again.

    Args:
        manifest: what ``comparison.json`` holds.
        path: its directory; None of one in memory.

    Returns:
        The command and the call.
    """
    # Only what the command wrote itself is named so, and lies in what it was given.
    made = path is not None and path.name.startswith(COMPARED)
    root = str(path.parent) if path is not None and made and str(path.parent) != COMPARISONS else None
    try:
        shell = shlex.join(comparison_words(manifest, "this comparison", root))
    except UserError:
        note = "The analyses were compared in memory and have no directories; save them to compare them again."
        return Commands(None, "from internal_policy import compare\n\ncompare(analyses)", (note,))
    rows = manifest["analyses"]
    labels = [row["label"] for row in rows]
    options: dict[str, Any] = {"baseline": labels.index(manifest["baseline"])}
    if _labels_given(manifest):
        options["labels"] = labels
    if manifest["steps_from"] == "given":
        options["steps"] = [row["step"] for row in rows]
    if manifest.get("seed"):
        options["seed"] = manifest["seed"]
    python = call("compare", [row["path"] for row in rows], options)
    if path is not None:
        python += f".save({str(path)!r})"
    note = (
        "A comparison is computed from the analyses as they are in their directories now, and replaces the one that it "
        "finds in its own; another output keeps this one."
    )
    return Commands(clean(shell), clean(f"from internal_policy import compare\n\n{python}"), (note,))


def _about(analysis: Analysis, model: str) -> list[str]:
    found = []
    commit, told = analysis.model.get("revision"), analysis.config.get("revision")
    if commit and commit != told:
        name = clean(f"{model}: {commit}")
        found.append(f"Commit on the hub then: {name}. If the branch has moved since, give it with --revision.")
    if on := analysis.config.get("sampled_on"):
        found.append(f"Responses were sampled on {clean(on)}; another kind of device has other random streams.")
    found.append(f"Weights were in {clean(analysis.model.get('dtype'))}; their digest is in the settings.")
    if analysis.config.get("hooked"):
        found.append("The model had hooks or patches of the user's own, which no command repeats.")
    return found


def _in_memory(analysis: Analysis, model: str) -> bool:
    """A model that is neither on the hub, nor embedded, nor named by a path was an object."""
    named = analysis.model.get("revision") or analysis.config.get("remote") or "/" in model
    return not (named or Path(model).exists())


def call(function: str, arguments: list[Any], options: Mapping[str, Any], first: str = "") -> str:
    """Write a call in Python.

    Args:
        function: its name.
        arguments: values by place.
        options: values by name.
        first: what stands before them, as it is.

    Returns:
        Python, on several lines where one would be long.
    """
    parts = [*([first] if first else []), *map(repr, arguments), *(f"{k}={v!r}" for k, v in options.items())]
    line = f"{function}({', '.join(parts)})"
    return line if len(line) <= 90 else f"{function}(\n    " + ",\n    ".join(parts) + ",\n)"
