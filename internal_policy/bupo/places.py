"""Paths and addresses, which a public page of a run does not tell: they name people, clients and machines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from internal_policy.data.records import SUFFIXES

_ABSOLUTE = re.compile(r"[/~]|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\")
_SETTINGS = re.compile(
    r"(^|_)(dir|path|file|url|host|port|repo|token)(_|$)|^(hub|trackio)_|^(deepspeed|fsdp_config|run_name|project)$"
)
_FILES = (*SUFFIXES, ".yaml", ".yml", ".toml", ".py")
_LONGEST = 255


def named(name: str, from_hub: bool | None) -> str:
    """Name a model or a data set without the directories above it.

    Args:
        name: what it was called: a name of the hub, an embedded model, a path.
        from_hub: whether it was taken from the hub; None where that is not known.

    Returns:
        The name; the last part of it where it is a path.
    """
    if name.startswith("testbed/") or from_hub or (from_hub is None and not _is_place(name)):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def tells(setting: str, value: Any) -> bool:
    """Tell whether a setting says where something lies.

    Args:
        setting: its name.
        value: its value.

    Returns:
        True for paths and addresses, also within a longer value.
    """
    words = re.split(r"[\s'\"=,;()\[\]{}]+", str(value))
    return bool(_SETTINGS.search(setting)) or any(_is_place(word) for word in words if word)


def _is_place(word: str) -> bool:
    if _ABSOLUTE.match(word) or "://" in word or word.endswith(_FILES) or word.count("/") > 1:
        return True
    # A text may be too long for a name of a file, which pathlib takes for an error.
    return "/" in word and len(word) < _LONGEST and Path(word).exists()
