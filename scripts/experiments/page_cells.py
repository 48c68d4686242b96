"""The cells of the tables of docs/results.md: numbers with their intervals, and nothing where no run is stored."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

NOTHING = "*No run of this part is stored.*"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, of texts."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounded(value: float, digits: int, scale: float, sign: bool) -> str:
    """A number times a scale."""
    # Minus zero reads like a mistake.
    found = round(scale * value, digits) + 0.0
    return f"{found:{'+' if sign else ''}.{digits}f}"


def cell(
    row: Mapping[Hashable, Any] | None, name: str = "", digits: int = 1, scale: float = 100, sign: bool = True
) -> str:
    """A value with its interval; a dash if there is none, and no interval with one seed."""
    if row is None:
        return "-"
    names = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    value, low, high = (float(row[n]) for n in names)
    if np.isnan(value):
        return "-"
    shown = rounded(value, digits, scale, sign)
    if np.isnan(low):
        return shown
    return f"{shown} ({rounded(low, digits, scale, sign)} to {rounded(high, digits, scale, sign)})"


def find_row(table: pd.DataFrame, **wanted: Any) -> Mapping[Hashable, Any] | None:
    """The first row with these values in its columns; None if there is none."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.iloc[0].to_dict() if len(table) else None


def brief(value: float) -> str:
    """A learning rate, such as 1e-4."""
    return f"{value:.0e}".replace("e-0", "e-")


def seeds(*rows: Mapping[Hashable, Any] | None) -> str:
    """The number of seeds of some rows, or the smallest and the largest."""
    numbers = {int(row["seeds"]) for row in rows if row is not None}
    return "-" if not numbers else "-".join(str(n) for n in sorted({min(numbers), max(numbers)}))
