"""Numbers as the page writes them: nats with three decimals, intervals behind them, a dash where nothing is defined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

MISSING = "–"


def number(value: Any, form: str = ".3f") -> str:
    """Write a number.

    Args:
        value: the number; None and NaN where it is not defined.
        form: its format.

    Returns:
        The number with a true minus sign, or a dash.
    """
    if value is None or pd.isna(value):
        return MISSING
    return format(value, form).replace("-", "−") if form[-1] != "s" else str(value)


def interval(low: Any, high: Any, form: str = ".3f") -> str:
    """Write a 95% interval.

    Args:
        low: its lower end.
        high: its upper end.
        form: the format of both.

    Returns:
        ``[low, high]``; nothing where it is not defined.
    """
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return ""
    return f"[{number(low, form)}, {number(high, form)}]"


def plain(value: Any) -> float | None:
    """Turn a number into what JSON can hold, with as many digits as a figure shows.

    Args:
        value: the number.

    Returns:
        It, rounded to six decimals; None where it is not finite.
    """
    if value is None or pd.isna(value):
        return None
    found = float(value)
    return round(found, 6) if math.isfinite(found) else None


def plain_all(values: Sequence[Any] | pd.Series) -> list[float | None]:
    """Turn numbers into what JSON can hold.

    Args:
        values: the numbers.

    Returns:
        Each as `plain` has it.
    """
    return [plain(value) for value in values]


def spans(layers: Sequence[int]) -> str:
    """Write layers as ranges.

    Args:
        layers: layers in rising order, from 1.

    Returns:
        ``1–3, 5``.
    """
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][-1] + 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in found)
