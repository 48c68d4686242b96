"""Maps of attention heads and of routed experts: layer against head or expert, coloured by what its write does.

    figure = head_map(analysis)                           # entropy and attribution next to each other
    ax = plot_head_map(analysis, "cosine")                # one map
    figure = expert_map(analysis)                         # how many tokens go to each expert
    numbers = head_map_data(analysis)                     # exactly what is drawn

They need an analysis with ``--heads``. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from internal_policy.analysis.figure_data import OneOrMany, expert_map_data, head_map_data, listed
from internal_policy.plotting import marks, style
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

    from internal_policy.analysis.results import Analysis

__all__ = ["expert_map", "expert_map_data", "head_map", "head_map_data", "plot_expert_map", "plot_head_map"]

Part = Literal["head", "expert"]
Quantity = Literal["load", "weight", "entropy", "rms", "cosine", "attribution"]

_TITLES: dict[str, str] = {
    "load": "Load (share of tokens)",
    "weight": "Router weight",
    "entropy": "Entropy (nats)",
    "rms": "RMS of the write",
    "cosine": "Cosine with the stream",
    "attribution": "Attribution (logits)",
}
_SIGNED = ("cosine", "attribution")
"""Quantities of which zero is the middle."""
_OTHER: dict[Part, str] = {"head": "bias", "expert": "shared"}
"""What the part 0 is."""
_DATA: dict[Part, Callable[[OneOrMany[Any]], pd.DataFrame]] = {"head": head_map_data, "expert": expert_map_data}
_ROW, _MARGINS = 0.085, 0.75
"""Inches: the least height of a row, and what is above and below a map."""
_LEAST, _MOST = 1.0, 4.5
"""Height of a map, inches."""


@style.paper_style()
def plot_head_map(
    analysis: Analysis,
    quantity: Quantity = "attribution",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: str | Colormap | None = None,
) -> Axes:
    """Draw one map of the heads: layers from left to right, head 1 at the top, the bias at the bottom if there is one.

    Args:
        analysis: An analysis with ``--heads``.
        quantity: ``entropy``, ``rms``, ``cosine`` or ``attribution``.
        ax: Where to draw; by default a new figure.
        label: Name of the model in the title.
        color: Colour map, or its name.

    Returns:
        The axes.

    Raises:
        UserError: The heads were not measured, or there is no such colour map.
    """
    return _one(analysis, "head", quantity, ax, label, color)


@style.paper_style()
def plot_expert_map(
    analysis: Analysis,
    quantity: Quantity = "load",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: str | Colormap | None = None,
) -> Axes:
    """Draw one map of the experts: layers from left to right, expert 1 at the top, shared experts at the bottom.

    Args:
        analysis: An analysis with ``--heads`` of a mixture of experts.
        quantity: ``load``, ``weight``, ``entropy``, ``rms``, ``cosine`` or ``attribution``.
        ax: Where to draw; by default a new figure.
        label: Name of the model in the title.
        color: Colour map, or its name.

    Returns:
        The axes.

    Raises:
        UserError: The experts were not measured, or there is no such colour map.
    """
    return _one(analysis, "expert", quantity, ax, label, color)


@style.paper_style()
def head_map(
    analyses: OneOrMany[Analysis],
    quantities: OneOrMany[Quantity] = ("entropy", "attribution"),
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: str | Colormap | None = None,
) -> Figure:
    """Draw maps of the heads, a row for each analysis and a column for each quantity.

    Args:
        analyses: One analysis or several, with ``--heads``.
        quantities: Those of ``plot_head_map``, one or several.
        ax: Where to draw, one axes for each map, row by row; by default a new figure.
        label: Name of the model, or of each.
        color: Colour map of all maps, or its name.

    Returns:
        The figure.

    Raises:
        UserError: The heads were not measured, or the number of axes or labels does not fit.
    """
    return _grid(listed(analyses), "head", quantities, ax, label, color)


@style.paper_style()
def expert_map(
    analyses: OneOrMany[Analysis],
    quantities: OneOrMany[Quantity] = ("load", "entropy"),
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: str | Colormap | None = None,
) -> Figure:
    """Draw maps of the routed experts, a row for each analysis and a column for each quantity.

    Args:
        analyses: One analysis or several, with ``--heads``, of mixtures of experts.
        quantities: Those of ``plot_expert_map``, one or several.
        ax: Where to draw, one axes for each map, row by row; by default a new figure.
        label: Name of the model, or of each.
        color: Colour map of all maps, or its name.

    Returns:
        The figure.

    Raises:
        UserError: The experts were not measured, or the number of axes or labels does not fit.
    """
    return _grid(listed(analyses), "expert", quantities, ax, label, color)


def map_drawings(analyses: Sequence[Analysis]) -> dict[str, Callable[[], Figure]]:
    """Return what draws the maps that analyses have the numbers for, by the name of the file."""
    found: dict[str, Callable[[], Figure]] = {}
    for name, draw in (("heads", head_map), ("experts", expert_map)):
        if measured := [analysis for analysis in analyses if name in analysis.additions]:
            found[name] = partial(draw, measured)
    return found


def _one(analysis: Analysis, part: Part, quantity: Quantity, ax: Axes | None, label: str | None, color: Any) -> Axes:
    if ax is None:
        return _grid([analysis], part, quantity, None, label, color).axes[0]
    _map(ax, analysis, part, quantity, color)
    _set_title(ax, analysis, quantity, label or marks.short_name(analysis.name))
    return ax


def _grid(
    analyses: list[Analysis],
    part: Part,
    quantities: OneOrMany[Quantity],
    ax: OneOrMany[Axes] | None,
    label: OneOrMany[str] | None,
    color: Any,
) -> Figure:
    wanted: list[Quantity] = [quantities] if isinstance(quantities, str) else list(quantities)
    names = marks.check_labels(label, marks.short_names([a.name for a in analyses]), "analyses")
    heights = [np.clip(_ROW * len(_table(a, part, wanted[0])), _LEAST, _MOST) + _MARGINS for a in analyses]
    if ax is None:
        width = style.ONE_COLUMN if len(wanted) == 1 else style.TWO_COLUMNS
        figure = style.new_figure(width, float(sum(heights)), space=0.03)
        spec = figure.add_gridspec(len(analyses), len(wanted), height_ratios=heights)
        places = [(row, column) for row in range(len(analyses)) for column in range(len(wanted))]
        panels = [figure.add_subplot(spec[place]) for place in places]
    else:
        panels = marks.check_axes(ax, len(analyses) * len(wanted), "one for each map, row by row")
    maps = [(analysis, name, quantity) for analysis, name in zip(analyses, names, strict=True) for quantity in wanted]
    for panel, (analysis, name, quantity) in zip(panels, maps, strict=True):
        _map(panel, analysis, part, quantity, color)
        _set_title(panel, analysis, quantity, name)
    return style.root_figure(panels[0])


def _set_title(ax: Axes, analysis: Analysis, quantity: Quantity, name: str) -> None:
    lens = marks.LENS_TITLES.get(analysis.lens, analysis.lens)
    note = f"{_TITLES[quantity]}, {lens}" if lens and quantity == "entropy" else _TITLES[quantity]
    style.set_title(ax, name, note)


def _table(analysis: Analysis, part: Part, quantity: Quantity) -> pd.DataFrame:
    """Return the numbers of a map as [parts, L]: the parts from 1, then the part 0; NaN in layers that have none."""
    rows = _DATA[part]([analysis])
    if rows.empty:
        what = "experts; only --heads of a mixture of experts measures them" if part == "expert" else "heads"
        raise UserError(f"{analysis.name}: this analysis has no {what}; analyse it with --heads")
    if quantity in ("load", "weight"):
        # All tokens go to the shared experts, and the router has no weight for them.
        rows = rows[rows[part] > 0]
    table = rows.pivot_table(index=part, columns="layer", values=quantity, dropna=False)
    table = table.reindex(columns=range(1, analysis.n_layers + 1))
    return table.loc[sorted(table.index, key=lambda number: (number == 0, number))]


def _map(ax: Axes, analysis: Analysis, part: Part, quantity: Quantity, color: Any) -> None:
    # It imports pyplot, which figures without a map do without.
    import seaborn as sns

    table = _table(analysis, part, quantity)
    values = table.to_numpy(dtype=float)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if quantity in _SIGNED:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    elif quantity in ("load", "weight", "rms"):
        low = 0.0
    if high <= low:
        low, high = low - 0.5, high + 0.5
    limits = {"vmin": low, "vmax": high}
    colormap = marks.check_colormap(color, "RdBu_r" if quantity in _SIGNED else "viridis")
    # Ticks that depend on the height would change once it is laid out.
    ticks = [tick for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= tick <= high]
    tall = ax.bbox.height / style.root_figure(ax).dpi
    bar = {"pad": 0.015, "fraction": 0.06, "aspect": max(16.0, 14.0 * tall), "ticks": ticks}
    options: dict[str, Any] = {"rasterized": True, "xticklabels": False, "yticklabels": False, "cmap": colormap}
    sns.heatmap(table, ax=ax, cbar_kws=bar, **limits, **options)
    cast(Any, ax.collections[0].colorbar).outline.set_linewidth(0.4)
    ax.spines[:].set_visible(True)
    style.set_layer_axis(ax, analysis.n_layers, first=0.5)
    ax.set(xlabel="Layer", ylabel=part.capitalize())
    _name_rows(ax, list(table.index), _OTHER[part])


def _name_rows(ax: Axes, numbers: list[int], other: str) -> None:
    """Number as many rows as fit, always the first and the last, and name the part 0."""
    figure = style.root_figure(ax)
    height = ax.bbox.height / figure.dpi * style.POINTS_PER_INCH
    counted = [number for number in numbers if number]
    every = ceil(len(numbers) * (marks.SMALL + 1.0) / (0.6 * height))
    step = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, len(numbers) + 1) if s >= every)
    ticks = [number for number in counted if number == 1 or (number % step == 0)]
    if step > 1:
        # The first number is close to the second where steps are short, and the last to that before it.
        ticks = [n for n in ticks if n == 1 or (n - 1 >= every and (counted[-1] - n >= every or n == counted[-1]))]
        ticks += [counted[-1]] if counted[-1] not in ticks else []
    if 0 in numbers:
        ticks = [n for n in ticks if len(counted) - n >= every - 1 or step == 1]
        ticks.append(0)
    texts = [str(number) if number else other for number in ticks]
    places = [numbers.index(number) + 0.5 for number in ticks]
    ax.set_yticks(places, texts, fontsize=marks.SMALL, rotation=0)
