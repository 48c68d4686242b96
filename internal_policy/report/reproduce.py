"""How to reproduce a result: the command line, quoted for a shell, and the same call from Python.

Both are written from the stored settings, which are the fields of the dataclass that the command takes.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.bupo.config import TrainConfig
from internal_policy.models.options import LENSES
from internal_policy.report.page import clean
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import command_line_of, options_of, words_of

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.bupo.run import Run

ANALYSES = "data/analyses"
COMPARISONS = "data/comparisons"
COMPARED = "compare--"
"""Prefix of the directory of a comparison that the command wrote."""
SAMPLING = ("prompts_split", "samples_per_prompt", "max_new_tokens", "temperature", "generator")
_GIVEN = re.compile(r"\d+ given")


class _Variable(str):
    """The name of a variable, which a call shows without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Commands:
    """The command and the call that reproduce a result, with remarks."""

    shell: str | None
    """The command line; None if only Python can express it."""
    python: str
    """The call from Python."""
    notes: tuple[str, ...] = ()
    """What else determines whether the result is the same."""


def analysis_commands(analysis: Analysis) -> Commands:
    """Return the command and the call that make an analysis.

    Prompts or responses that were given from memory are read from where they are stored with the analysis, which gives
    the same numbers.
    """
    # JSON has no tuples.
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in analysis.config.items()}
    options = {
        f.name: config[f.name]
        for f in fields(AnalyzeConfig)
        if f.name != "model" and f.name in config and config[f.name] != f.default
    }
    if "lens_path" in config:
        options["lens"] = config["lens_path"]
    notes = [
        "If this analysis is finished in the output directory, it is read and nothing is computed. To compute it "
        "again, choose another output, or add --overwrite (overwrite=True in Python), which replaces it."
    ]
    if any(_GIVEN.fullmatch(str(config.get(name))) for name in ("prompts", "responses")):
        stored = "responses.jsonl" if analysis.path is None else str(analysis.path / "responses.jsonl")
        options = {k: v for k, v in options.items() if k not in ("prompts", *SAMPLING)} | {"responses": stored}
        where = f"they are read from {clean(stored)}" if analysis.path is not None else "save the analysis to read them"
        notes.append(f"Prompts or responses were given from Python: {where}, which gives the same numbers.")
    root = ANALYSES if analysis.path is None else str(analysis.path.parent)
    model = str(config.get("model", analysis.model["id"]))
    notes += _notes_of(analysis, model)
    given, header = {**options, "output": root}, "from internal_policy import analyze\n\n"
    lens_in_memory = config["lens"] not in LENSES and "lens_path" not in config
    if lens_in_memory:
        header += f"# lens as the function {config['lens']} was in memory then\n"
        given["lens"] = _Variable("lens")
    # A model that is neither on the hub, nor embedded, nor named by a path was an object.
    named = analysis.model.get("revision") or config.get("remote") or "/" in model or Path(model).exists()
    if not named:
        header += "# model and tokenizer as they were in memory then\n"
        return Commands(None, clean(header + call("analyze", [], given, "model, tokenizer")), tuple(notes))
    if lens_in_memory:
        return Commands(None, clean(header + call("analyze", [model], given)), tuple(notes))
    words = command_line_of(AnalyzeConfig, {"model": model, **options}, always=("model",))
    words += [] if root == ANALYSES else words_of("output", root)
    shell = shlex.join(["internal-policy", "analyze", *words])
    return Commands(clean(shell), clean(header + call("analyze", [model], given)), tuple(notes))


def comparison_words(manifest: Mapping[str, Any], where: Any, root: str | None = None) -> list[str]:
    """Return the words, not yet quoted for a shell, of the command that makes a comparison.

    `manifest` is the content of ``comparison.json``, `where` its directory, for the message, and `root` the command's
    --output, None for the default.

    Raises:
        UserError: The analyses were never on disk.
    """
    rows, baseline = manifest["analyses"], manifest["baseline"]
    paths = [row["path"] for row in rows]
    if None in paths:
        raise UserError(
            f"{where}: is a comparison of analyses in memory, whose curves are not in it; save the analyses, "
            "and compare their directories"
        )
    words = ["internal-policy", "compare", *paths]
    if manifest["labels_given"]:
        words += words_of("label", [row["label"] for row in rows])
    if manifest["steps_from"] == "given":
        words += words_of("step", [f"{row['step']:g}" for row in rows])
    if baseline != rows[0]["label"]:
        words += words_of("baseline", baseline)
    return [*words, *words_of("seed", manifest.get("seed") or None), *words_of("output", root)]


def comparison_commands(manifest: Mapping[str, Any], path: Path | None = None) -> Commands:
    """Return the command and the call that make a comparison.

    `manifest` is the content of ``comparison.json`` and `path` its directory; None for a comparison in memory.
    """
    # The command names only its own comparisons so, and writes them below its --output.
    made = path is not None and path.name.startswith(COMPARED)
    root = str(path.parent) if path is not None and made and str(path.parent) != COMPARISONS else None
    header = "from internal_policy import compare\n\n"
    try:
        shell = shlex.join(comparison_words(manifest, "this comparison", root))
    except UserError:
        note = "The analyses were compared in memory and have no directories; save them to compare them again."
        return Commands(None, f"{header}compare(analyses)", (note,))
    rows = manifest["analyses"]
    labels = [row["label"] for row in rows]
    options: dict[str, Any] = {"baseline": labels.index(manifest["baseline"])}
    options |= {"labels": labels} if manifest["labels_given"] else {}
    options |= {"steps": [row["step"] for row in rows]} if manifest["steps_from"] == "given" else {}
    options |= {"seed": manifest["seed"]} if manifest.get("seed") else {}
    python = call("compare", [row["path"] for row in rows], options)
    python += "" if path is None else f".save({str(path)!r})"
    note = (
        "A comparison is computed from the analyses as they are in their directories now, and replaces the one that it "
        "finds in its own; another output keeps this one."
    )
    return Commands(clean(shell), clean(header + python), (note,))


def training_commands(run: Run) -> Commands:
    """Return the command and the call that made a run."""
    options, objects = run.call["options"], run.call["objects"]
    notes = [
        "If this run is finished in the output directory, it is read and nothing is trained; otherwise it is "
        "resumed. To train it again, choose another output, or add --overwrite (overwrite=True in Python), which "
        "replaces it.",
        "A GPU, or another number of processes, adds up in another order: the same to rounding, not to bits.",
    ]
    python = "from internal_policy import bupo\n\n"
    if objects:
        python += f"# given as objects then: {', '.join(objects)}\n"
        notes.append(f"Given as objects from Python: {', '.join(objects)}. A command cannot give them.")
    python += call("bupo.train", [], options, ", ".join(f"{name}={name}" for name in objects))
    others = {name: value for name, value in options.items() if name not in options_of(TrainConfig)}
    texts = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in others.items()]
    words = ["internal-policy", "train", *command_line_of(TrainConfig, options, always=("model",))]
    words += words_of("set", texts)
    return Commands(None if objects else clean(shlex.join(words)), clean(python), tuple(notes))


def _notes_of(analysis: Analysis, model: str) -> list[str]:
    notes = []
    commit, revision = analysis.model.get("revision"), analysis.config.get("revision")
    if commit and commit != revision:
        name = clean(f"{model}: {commit}")
        notes.append(f"Commit on the hub then: {name}. If the branch has moved since, give it with --revision.")
    if device := analysis.config.get("sampled_on"):
        notes.append(f"Responses were sampled on {clean(device)}; another kind of device has other random streams.")
    notes.append(f"Weights were in {clean(analysis.model.get('dtype'))}; their digest is in the settings.")
    if analysis.config.get("hooked"):
        notes.append("Hooks, patches or a lens of the user's own took part, which no command repeats.")
    return notes


def call(function: str, arguments: list[Any], options: Mapping[str, Any], first: str = "") -> str:
    """Write a call in Python, on several lines if one would be long; `first` are arguments written as they are."""
    parts = [*([first] if first else []), *map(repr, arguments), *(f"{k}={v!r}" for k, v in options.items())]
    line = f"{function}({', '.join(parts)})"
    return line if len(line) <= 90 else f"{function}(\n    " + ",\n    ".join(parts) + ",\n)"
