"""A comparison read back from its tables and its manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.utils.table_io import read_columns

_SOURCE = ("model", "path", "weights", "inputs")


def stored_fields(source: Path, manifest: Mapping[str, Any], tables: Sequence[str]) -> dict[str, Any]:
    """Read what a comparison is made of.

    Args:
        source: its directory.
        manifest: what ``comparison.json`` holds; older ones lack whether there is one architecture, whether the labels
            were given, the seed, the unit of the steps, and the kinds of the columns.
        tables: names of the tables.

    Returns:
        The fields of ``AnalysisComparison`` by name, without ``path``.
    """
    rows, notes = manifest["analyses"], tuple(manifest["notes"])
    kinds = manifest["tables"]
    found: dict[str, Any] = {name: _table(source / f"{name}.csv", name, kinds) for name in tables}
    lacking = None if len(found["trends"]) else next((note for note in notes if "no trends" in note), None)
    differing = {
        label: {name: (pair[0], pair[1]) for name, pair in settings.items()}
        for label, settings in manifest["differing"].items()
    }
    return {
        **found,
        "labels": tuple(row["label"] for row in rows),
        "baseline": manifest["baseline"],
        "lens": manifest["lens"],
        "steps": tuple(float(row["step"]) for row in rows),
        "steps_from": manifest["steps_from"],
        "unit": manifest.get("unit", "update" if manifest["steps_from"] == "name" else "step"),
        "paired": {row["label"]: bool(row["paired"]) for row in rows},
        "differing": differing,
        "notes": notes,
        "sources": tuple({key: row[key] for key in _SOURCE} for row in rows),
        "no_trends": lacking,
        "one_architecture": manifest.get("one_architecture", lacking is None),
        "labels_given": manifest.get("labels_given", False),
        "seed": manifest.get("seed", 0),
    }


def _table(path: Path, name: str, kinds: Mapping[str, Any] | Sequence[str]) -> pd.DataFrame:
    # A label such as 007 or NA is a text, also where nothing says the kinds of the columns.
    return read_columns(path, kinds[name] if isinstance(kinds, Mapping) else {"label": "text"})
