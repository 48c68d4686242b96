"""What a call of ``bupo.train`` said, as far as it can be written down: from it the same run can be asked for again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internal_policy.records import SUFFIXES
from internal_policy.results import Analysis

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def call_of(words: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Write a call down.

    Args:
        words: the named arguments of ``train``; None where one was not given.
        options: its other keyword arguments.

    Returns:
        ``words``: values that JSON can hold, by name; ``objects``: names of arguments that were given as objects, which
        only Python can give again; ``from_hub``: which of model and prompts were taken from the hub.
    """
    told: dict[str, Any] = {}
    objects = []
    for name, value in {**words, **options}.items():
        if value is None:
            continue
        plain = _plain(value)
        if plain is None:
            objects.append(name)
        else:
            told[name] = plain
    # Only here and now can a repository's name be told from a directory's.
    from_hub = [name for name in ("model", "prompts") if _is_on_the_hub(words.get(name))]
    return {"words": told, "objects": objects, "from_hub": from_hub}


def _plain(value: Any) -> Any:
    """The value as JSON has it; None where it cannot be written down."""
    if isinstance(value, Analysis):
        return value.boundary_layer if value.path is None else str(value.path)
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, (str, bool, int, float, dict)):
        # A list may be prompts or rewards of any size and kind.
        return None
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return None


def _is_on_the_hub(value: Any) -> bool:
    if isinstance(value, (str, Path)):
        name = str(value)
        local = Path(name).exists() or name.endswith(SUFFIXES) or name.startswith("testbed/")
        return bool(_HUB_ID.fullmatch(name)) and not local
    # transformers notes the commit of what it loads from the hub, and of nothing else.
    commit = getattr(getattr(value, "config", None), "_commit_hash", None)
    return commit is not None and bool(_HUB_ID.fullmatch(str(getattr(value, "name_or_path", ""))))
