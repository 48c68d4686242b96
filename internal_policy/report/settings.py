"""Settings and versions, as rows of a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from internal_policy.report.page import clean

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.bupo.run import Run

_MOST = 400


def settings_of(thing: Analysis | Run) -> list[dict[str, Any]]:
    """Lay out model, settings, versions and timings of a result.

    Args:
        thing: the result.

    Returns:
        Tables: a heading, and rows of name and value as text.
    """
    tables: dict[str, Mapping[str, Any]] = {}
    if hasattr(thing, "model"):
        tables["Model"] = thing.model
    tables["Settings"] = thing.config
    tables["Seconds"] = {name: f"{seconds:.1f}" for name, seconds in thing.timings.items()}
    tables["Versions"] = thing.versions
    return [{"title": name, "rows": [_row(*pair) for pair in table.items()]} for name, table in tables.items() if table]


def _row(name: str, value: Any) -> dict[str, str]:
    if value is None:
        text = "none"
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        text = clean(value)
    else:
        text = clean(json.dumps(value, ensure_ascii=False, default=str))
    return {"name": clean(name), "value": text if len(text) <= _MOST else f"{text[:_MOST]} […]"}
