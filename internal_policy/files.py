"""Write files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from internal_policy.errors import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary name in the same directory, flush it to disk, then rename.

    Args:
        path: the file's final name.
        write: writes the whole content to the path that it is given.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8.

    Args:
        path: the file's final name.
        text: its content.
    """
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def expanded(path: str | Path) -> Path:
    """Put a user's home directory in place of ``~`` or ``~name``.

    Args:
        path: what was given.

    Returns:
        The path.

    Raises:
        UserError: there is no such user, or nobody's home is known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path}: no home directory is known for {Path(path).parts[0]!r}; give the whole path"
        ) from error
