"""What a command says on standard output: tables, one JSON document (--json), or nothing (--quiet).

While one of the two is chosen, standard output leads nowhere, whoever writes to it, so that a script reads the document
and nothing else. What child processes and compiled code write goes to standard error, and under --quiet nowhere.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from internal_policy.utils.shell import is_main_process

_DESCRIPTOR = 1
"""Of standard output, wherever a process is started."""


class NullIO(io.StringIO):
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


@contextmanager
def output_mode(*, json: bool = False, quiet: bool = False) -> Iterator[None]:
    """Print one JSON document, or nothing, for as long as a command runs.

    Args:
        json: print what ``print_json`` is given, and nothing else.
        quiet: no tables, no progress, no notices; errors are told all the same.
    """
    if not (json or quiet):
        yield
        return
    before = sys.stdout
    try:
        with redirect_stdout_fd(before, quiet) as stdout:
            _CHOICE.json, _CHOICE.quiet, _CHOICE.stdout = json, quiet, stdout
            sys.stdout = NullIO()
            yield
    finally:
        sys.stdout = before
        _CHOICE.json, _CHOICE.quiet, _CHOICE.stdout = False, False, None
        _CHOICE.files.clear()


@contextmanager
def redirect_stdout_fd(stdout: TextIO | None, quiet: bool) -> Iterator[TextIO | None]:
    """Lead the descriptor of standard output aside, and give what still leads to standard output itself."""
    # In a notebook, or where a test listens, standard output is no descriptor that others could write to.
    if stdout is None or not _is_descriptor(stdout):
        yield stdout
        return
    stdout.flush()
    kept = os.fdopen(os.dup(_DESCRIPTOR), "w", encoding="utf-8")
    aside = _nowhere() if quiet else _standard_error()
    os.dup2(aside, _DESCRIPTOR)
    os.close(aside)
    try:
        yield kept
    finally:
        # What is still in a buffer would be written when the process ends.
        with suppress(OSError, ValueError):
            stdout.flush()
        _flush_compiled()
        os.dup2(kept.fileno(), _DESCRIPTOR)
        # Who reads it may have left, which was told when the document was written.
        with suppress(OSError):
            kept.close()


def _is_descriptor(stdout: TextIO) -> bool:
    try:
        return stdout.fileno() == _DESCRIPTOR
    except (AttributeError, OSError, ValueError):
        return False


def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


def _standard_error() -> int:
    try:
        return os.dup(2)
    except OSError:
        return _nowhere()


def _flush_compiled() -> None:
    """Write out what C's own buffer of standard output holds."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


def is_quiet() -> bool:
    """Whether nothing but errors is to be told.

    Returns:
        True under --quiet.
    """
    return _CHOICE.quiet


def is_json() -> bool:
    """Whether a script reads what is printed.

    Returns:
        True under --json.
    """
    return _CHOICE.json


def note_files(what: str, paths: Sequence[Path]) -> None:
    """Note files for the JSON document.

    Args:
        what: what they are, such as figures.
        paths: the files.
    """
    if _CHOICE.json:
        known = _CHOICE.files.setdefault(what, [])
        known += [str(path) for path in paths if str(path) not in known]


def print_json(fields: Mapping[str, Any]) -> None:
    """Print the one JSON document of a command, where it was asked for.

    Args:
        fields: what it holds; ``files``, what was written, is added.
    """
    if _CHOICE.json and _CHOICE.stdout is not None and is_main_process():
        told = to_plain({**fields, "files": _CHOICE.files})
        # In ASCII: it is read whole wherever it is sent, whatever the terminal's encoding.
        _CHOICE.stdout.write(json.dumps(told, indent=2, allow_nan=False) + "\n")
        _CHOICE.stdout.flush()


def to_plain(value: Any) -> Any:
    """Turn a value into what JSON has.

    Args:
        value: any; a table becomes a list of its rows.

    Returns:
        Objects, lists, texts, numbers, true, false and null; null also for what is not a finite number.
    """
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return to_plain(value.to_dict("records"))
    if isinstance(value, Mapping):
        return {str(key): to_plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(each) for each in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    return str(value)
