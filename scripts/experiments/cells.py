"""How numbers, intervals and verdicts are written in the tables of docs/results.md."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from internal_policy.plotting.training import MIN_SEEDS

Found = Mapping[str, pd.DataFrame]
NOTHING = "*No run of this part is stored.*"


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, digits: int, scale: float, sign: bool) -> str:
    """Write a number, times a scale, with a number of digits."""
    # Minus zero reads like a mistake.
    rounded = round(scale * value, digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def cell(
    row: Mapping[Hashable, Any] | None, name: str = "", digits: int = 1, scale: float = 100, sign: bool = True
) -> str:
    """Write a value with its interval; a dash if there is none, and no interval with one seed."""
    if row is None:
        return "-"
    names = (name, f"{name}_low", f"{name}_high") if name else ("value", "low", "high")
    value, low, high = (float(row[n]) for n in names)
    if np.isnan(value):
        return "-"
    shown = number(value, digits, scale, sign)
    if np.isnan(low):
        return shown
    ends = number(low, digits, scale, sign), number(high, digits, scale, sign)
    if ends[0] == ends[1]:
        # Values that happen to agree do not make an effect exact.
        return f"{shown} (all seeds)"
    return f"{shown} ({ends[0]} to {ends[1]})"


def pick(table: pd.DataFrame, **wanted: Any) -> Mapping[Hashable, Any] | None:
    """Take the row that has these values; None if there is none."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table.iloc[0].to_dict() if len(table) else None


def rate_text(value: float) -> str:
    """Write a learning rate."""
    return f"{value:.0e}".replace("e-0", "e-")


def seed_counts(*rows: Mapping[Hashable, Any] | None, name: str = "seeds") -> str:
    """Write how many seeds rows have, the least and the most if they differ."""
    numbers = {int(row[name]) for row in rows if row is not None and row[name] > 0}
    return "-" if not numbers else "-".join(str(n) for n in sorted({min(numbers), max(numbers)}))


def verdict(row: Mapping[Hashable, Any] | None, small: float, negligible: float) -> str:
    """Say what an interval says about an effect in accuracy.

    Args:
        row: value, low and high, as shares, and seeds.
        small: an effect is named only if it is larger than this, which is what its measurement may be off by.
        negligible: an effect whose interval lies nearer to zero than this is none.

    Returns:
        The word, and the value with its interval in points. Fewer than ``MIN_SEEDS`` get no word.
    """
    if row is None:
        return "not run"
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    shown = cell(row)
    if row["seeds"] < MIN_SEEDS:
        return f"{'one seed' if row['seeds'] == 1 else 'two seeds'}: {shown}"
    if abs(value) > small and (low > 0 or high < 0):
        return f"**{'helped' if value > 0 else 'harmed'}**: {shown}"
    if low >= -negligible and high <= negligible:
        return f"nothing: {shown}"
    return f"not decided: {shown}"
