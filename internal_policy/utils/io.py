"""Write files completely or not at all, and detect later changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from itertools import count
from pathlib import Path

from internal_policy.utils.errors import UserError

_TEMPORARY = re.compile(r"\..+\.(\d+)\.internal-policy\.tmp")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write to a temporary path in the same directory, flush it to disk, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.internal-policy.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def require_writable(directory: Path) -> None:
    """Raise a `UserError` if a directory cannot be written to, or made, before anything long begins."""
    try:
        str(directory.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{directory}: holds bytes that are not UTF-8; choose another --output directory") from error
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        what = "is a directory that may not be written to" if existing.is_dir() else "is a file"
        raise UserError(f"{directory}: cannot be written ({existing} {what}); choose another --output directory")


def expanded(path: str | Path) -> Path:
    """Put a user's home directory in place of ``~`` or ``~name``; a `UserError` if none is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: no home directory is known for {Path(path).parts[0]!r}; give the whole path"
        ) from error


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `write_atomically` had not yet renamed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_stale(directory: Path) -> None:
    """Remove the temporary files that killed processes left in a directory, not below it."""
    for path in directory.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match is not None and not _is_running(int(match[1])):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def set_aside(path: Path) -> Path:
    """Rename a damaged file or directory, so that it is neither read nor lost, and return the new path."""
    return path.rename(name_aside(path))


def name_aside(path: Path) -> Path:
    """A free name next to a damaged file or directory, under which it is kept."""
    return next(p for n in count(1) if not (p := path.with_name(f"damaged-{n}-{path.name}")).exists())


def write_lines_sealed(path: Path, lines: list[str]) -> None:
    """Write lines of JSON atomically, with a digest of them as the last line."""
    text = "".join(f"{line}\n" for line in lines)
    write_text(path, text + json.dumps({"sha256": _digest(text)}) + "\n")


def read_lines_sealed(path: Path) -> list[str] | None:
    """Read what `write_lines_sealed` wrote; None if it has changed since."""
    try:
        # Not splitlines: a text may hold any other line ending, unescaped.
        *lines, seal, end = path.read_bytes().decode("utf-8").split("\n")
        known = json.loads(seal)["sha256"]
    except (ValueError, KeyError, TypeError):
        return None
    whole = end == "" and known == _digest("".join(f"{line}\n" for line in lines))
    return lines if whole else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
