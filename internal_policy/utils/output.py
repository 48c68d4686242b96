"""What a command prints on standard output: tables, one JSON document (--json), or nothing (--quiet).

With either option a script reads the document and nothing else: what Python code prints is dropped, and what child
processes and compiled code write goes to standard error, or is dropped too with --quiet.
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
"""The file descriptor of standard output."""


class NullIO(io.StringIO):
    """A text stream that drops what is written to it."""

    def write(self, text: str) -> int:
        """Drop the text."""
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
    """Print one JSON document, or nothing, while a command runs.

    Args:
        json: print only what ``print_json`` is given.
        quiet: print no tables, progress or notices; errors are still reported.
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
    """Redirect the descriptor of standard output, and yield a stream that still writes to standard output itself."""
    # In a notebook and in tests, standard output is not the descriptor that others write to.
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
        # What is still in a buffer would otherwise be written when the process ends.
        with suppress(OSError, ValueError):
            stdout.flush()
        _flush_compiled()
        os.dup2(kept.fileno(), _DESCRIPTOR)
        # A reader that has left was noticed when the document was written.
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
    """Flush C's own buffer of standard output."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).fflush(None)


def is_quiet() -> bool:
    """Whether only errors are printed (--quiet)."""
    return _CHOICE.quiet


def is_json() -> bool:
    """Whether one JSON document is printed (--json)."""
    return _CHOICE.json


def note_files(what: str, paths: Sequence[Path]) -> None:
    """List files of some kind, such as figures, in the JSON document."""
    if _CHOICE.json:
        known = _CHOICE.files.setdefault(what, [])
        known += [str(path) for path in paths if str(path) not in known]


def print_json(fields: Mapping[str, Any]) -> None:
    """Print the JSON document of a command, with the paths of its files; without --json nothing is printed."""
    if _CHOICE.json and _CHOICE.stdout is not None and is_main_process():
        document = to_plain({**fields, "files": _CHOICE.files})
        # In ASCII, which every terminal and pipe can encode.
        _CHOICE.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        _CHOICE.stdout.flush()


def to_plain(value: Any) -> Any:
    """Convert a value to types of JSON: a table becomes a list of its rows; NaN and infinity become None."""
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
