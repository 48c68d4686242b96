"""What a command prints on standard output: tables, one JSON document (--json), or nothing (--quiet).

With either option standard output contains only the document: what Python code prints is dropped, and what child
processes and compiled code write goes to standard error, or is dropped as well with --quiet.
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

_STDOUT_FD = 1
"""The file descriptor of standard output."""


class NullIO(io.StringIO):
    """A text stream that drops what is written to it."""

    def write(self, text: str) -> int:
        """Drop the text."""
        return len(text)


@dataclass
class _Mode:
    json: bool = False
    quiet: bool = False
    stdout: TextIO | None = None
    files: dict[str, list[str]] = field(default_factory=dict)


_MODE = _Mode()


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
            _MODE.json, _MODE.quiet, _MODE.stdout = json, quiet, stdout
            sys.stdout = NullIO()
            yield
    finally:
        sys.stdout = before
        _MODE.json, _MODE.quiet, _MODE.stdout = False, False, None
        _MODE.files.clear()


@contextmanager
def redirect_stdout_fd(stdout: TextIO | None, quiet: bool) -> Iterator[TextIO | None]:
    """Redirect the descriptor of standard output, and yield a stream that still writes to standard output itself."""
    # In a notebook and in tests, standard output is not the descriptor that others write to.
    if stdout is None or not _is_stdout_fd(stdout):
        yield stdout
        return
    stdout.flush()
    kept = os.fdopen(os.dup(_STDOUT_FD), "w", encoding="utf-8")
    aside = os.open(os.devnull, os.O_WRONLY) if quiet else _duplicate_stderr()
    os.dup2(aside, _STDOUT_FD)
    os.close(aside)
    try:
        yield kept
    finally:
        # The content of a buffer would otherwise be written when the process ends.
        with suppress(OSError, ValueError):
            stdout.flush()
        # Compiled code has a buffer of its own.
        with suppress(AttributeError, OSError, TypeError):
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept.fileno(), _STDOUT_FD)
        # A closed pipe was noticed when the document was written.
        with suppress(OSError):
            kept.close()


def _is_stdout_fd(stdout: TextIO) -> bool:
    try:
        return stdout.fileno() == _STDOUT_FD
    except (AttributeError, OSError, ValueError):
        return False


def _duplicate_stderr() -> int:
    try:
        return os.dup(2)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def is_quiet() -> bool:
    """Whether only errors are printed (--quiet)."""
    return _MODE.quiet


def is_json() -> bool:
    """Whether one JSON document is printed (--json)."""
    return _MODE.json


def note_files(what: str, paths: Sequence[Path]) -> None:
    """List files of some kind, such as figures, in the JSON document."""
    if _MODE.json:
        known = _MODE.files.setdefault(what, [])
        known += [str(path) for path in paths if str(path) not in known]


def print_json(fields: Mapping[str, Any]) -> None:
    """Print the JSON document of a command, with the paths of its files; without --json nothing is printed."""
    if _MODE.json and _MODE.stdout is not None and is_main_process():
        document = to_plain({**fields, "files": _MODE.files})
        # In ASCII, which every terminal and pipe can encode.
        _MODE.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        _MODE.stdout.flush()


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
