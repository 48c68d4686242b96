"""What a command says on standard output: tables, one JSON document (--json), or nothing (--quiet).

While one of the two is chosen, standard output leads nowhere, whoever writes to it, so that a script reads the document
and nothing else.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from internal_policy.shell import is_main_process


class _Nowhere(io.StringIO):
    """Takes what is written, and keeps none of it."""

    def write(self, text: str) -> int:
        """Count the text."""
        return len(text)


@dataclass
class _Choice:
    json: bool = False
    quiet: bool = False
    stdout: TextIO | None = None
    files: dict[str, list[str]] = field(default_factory=dict)


_CHOICE = _Choice()


def choose(*, json: bool = False, quiet: bool = False) -> None:
    """Print one JSON document, or nothing, until ``restore`` is called; both may be chosen, one after the other.

    Args:
        json: print what ``document`` is given, and nothing else.
        quiet: no tables, no progress, no notices; errors are told all the same.
    """
    _CHOICE.json |= json
    _CHOICE.quiet |= quiet
    if (_CHOICE.json or _CHOICE.quiet) and _CHOICE.stdout is None:
        _CHOICE.stdout, sys.stdout = sys.stdout, _Nowhere()


def restore() -> None:
    """Print tables again."""
    if _CHOICE.stdout is not None:
        sys.stdout = _CHOICE.stdout
    _CHOICE.json, _CHOICE.quiet, _CHOICE.stdout = False, False, None
    _CHOICE.files.clear()


def is_quiet() -> bool:
    """Whether nothing but errors is to be told.

    Returns:
        True under --quiet.
    """
    return _CHOICE.quiet


def written(what: str, paths: Sequence[Path]) -> None:
    """Note files for the JSON document.

    Args:
        what: what they are, such as figures.
        paths: the files.
    """
    if _CHOICE.json:
        known = _CHOICE.files.setdefault(what, [])
        known += [str(path) for path in paths if str(path) not in known]


def document(fields: Mapping[str, Any]) -> None:
    """Print the one JSON document of a command, where it was asked for.

    Args:
        fields: what it holds; ``files``, what was written, is added.
    """
    if _CHOICE.json and _CHOICE.stdout is not None and is_main_process():
        told = plain({**fields, "files": _CHOICE.files})
        # In ASCII: it is read whole wherever it is sent, whatever the terminal's encoding.
        _CHOICE.stdout.write(json.dumps(told, indent=2, allow_nan=False) + "\n")
        _CHOICE.stdout.flush()


def plain(value: Any) -> Any:
    """Turn a value into what JSON has.

    Args:
        value: any; a table becomes a list of its rows.

    Returns:
        Objects, lists, texts, numbers, true, false and null; null also for what is not a finite number.
    """
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return plain(value.to_dict("records"))
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
