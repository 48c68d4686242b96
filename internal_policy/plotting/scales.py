"""Colour scales of maps whose numbers span several orders of magnitude, and the labels of logarithmic axes.

On a linear scale the layer with the largest effect is the only one that is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize, SymLogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import ArrayLike, NDArray

_LINEAR_SHARE = 0.01
"""Of the largest change in size: smaller ones are drawn linearly, and hardly seen."""
_LINEAR_DECADES = 0.5
"""Width of that linear part on each side of zero, in decades."""

_LABEL_SHARE = 0.13
"""Of a short colour bar's length: a label, which must not touch that of zero."""


@dataclass(frozen=True)
class Scale:
    """A colour scale, and the labels of its colour bar."""

    norm: Normalize
    """From numbers to colours."""
    drawn: NDArray[np.float64]
    """The numbers, raised to the lower end where a logarithm needs that."""
    extend: Literal["neither", "min", "max", "both"] = "neither"
    """The ends of the colour bar with an arrow, beyond which there are numbers."""
    ticks: Sequence[float] | None = None
    """What is labelled; None for powers of ten, with numbers between them if there are few."""

    def label(self, bar: Any) -> None:
        """Label a colour bar of this scale."""
        if self.ticks is None:
            label_decades(bar.ax.yaxis, bar.vmin, bar.vmax)
        else:
            bar.set_ticks(self.ticks, labels=[_text(tick) for tick in self.ticks])
        bar.ax.yaxis.set_minor_locator(NullLocator())


def logarithmic(values: ArrayLike, lowest: float) -> Scale:
    """Make the scale of numbers that are never negative.

    Args:
        values: The numbers, of any shape; NaN where there is none.
        lowest: What is told from zero at least; smaller numbers have the lowest colour.

    Returns:
        From the smallest number, but not below `lowest`, to the largest.
    """
    numbers = np.asarray(values, dtype=float)
    known = numbers[np.isfinite(numbers)]
    high = max(float(known.max(initial=lowest)), 10 * lowest)
    low = min(max(float(known.min(initial=high)), lowest), high / 10)
    below = bool((known < low).any())
    return Scale(LogNorm(low, high), np.maximum(numbers, low), "min" if below else "neither")


def symmetric_logarithmic(values: ArrayLike) -> Scale:
    """Make the scale of changes: zero is the middle, and both directions are logarithmic down to 1% of the largest.

    Args:
        values: The changes, of any shape; NaN where there is none.

    Returns:
        As far in both directions as the largest change in size.
    """
    numbers = np.asarray(values, dtype=float)
    known = np.abs(numbers[np.isfinite(numbers)])
    reach = float(known.max(initial=0.0)) or 1.0
    linear = _LINEAR_SHARE * reach
    exponents = range(math.ceil(math.log10(linear) - 1e-9), math.floor(math.log10(reach) + 1e-9) + 1)
    norm = SymLogNorm(linear, linscale=_LINEAR_DECADES, vmin=-reach, vmax=reach)
    powers = [power for power in (10.0**e for e in exponents) if float(norm(power)) >= 0.5 + _LABEL_SHARE]
    return Scale(norm, numbers, ticks=[*(-power for power in reversed(powers)), 0.0, *powers])


def clipped(values: ArrayLike, reach: float) -> Scale:
    """Make a linear scale around zero whose ends have arrows where numbers are beyond.

    Args:
        values: The numbers, of any shape; NaN where there is none.
        reach: The end in both directions.

    Returns:
        From ``-reach`` to ``reach``.
    """
    numbers = np.asarray(values, dtype=float)
    known = numbers[np.isfinite(numbers)]
    # What rounding adds to a recovery of 1 is not beyond it.
    beyond = 1.005 * reach
    low, high = bool((known < -beyond).any()), bool((known > beyond).any())
    extend: Any = {(True, True): "both", (True, False): "min", (False, True): "max"}.get((low, high), "neither")
    return Scale(Normalize(-reach, reach), numbers, extend, [-reach, -reach / 2, 0.0, reach / 2, reach])


def label_decades(axis: Axis, low: float, high: float) -> None:
    """Label the powers of ten on a logarithmic axis, and numbers between them if there are few."""
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _text(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")
