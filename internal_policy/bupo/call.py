"""What a call of ``bupo.train`` said, as far as it can be written down: from it the same run can be asked for again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internal_policy.results import Analysis


def call_of(words: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Write a call down.

    Args:
        words: the named arguments of ``train``; None where one was not given.
        options: its other keyword arguments.

    Returns:
        ``words``: values that JSON can hold, by name; ``objects``: names of arguments that were given as objects, which
        only Python can give again.
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
    return {"words": told, "objects": objects}


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
