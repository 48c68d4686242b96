"""The entropy changes of the modules, stacked into what direction makes and what length makes, and their numbers.

    figure = change_parts(analysis)              # ATTN above FFN; [one, other] gives a column for each
    numbers = change_parts_data(analysis)        # exactly what it draws
    plot_change_parts(analysis, "ffn", ax=ax)    # one panel, on your own axes

The lengths of a module's input and write are those in arXiv 2512.19673v3, eqs. 12 and 13; the two parts are not in the
paper (see `analysis.change_parts`). Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from internal_policy.analysis.change_parts import PARTS, boundary_texts
from internal_policy.analysis.figure_data import SITE_LABELS, ModuleSite, OneOrMany, change_parts_data, listed
from internal_policy.plotting import marks, style
from internal_policy.utils.palette import LOOKS

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

__all__ = ["change_parts", "change_parts_data", "plot_change_parts"]

PART_LABELS = {part: f"{part} part" for part in PARTS}
WHOLE_LABEL = r"whole change $\Delta H$"
BY_DIRECTION_LABEL = "boundary layer by direction"
_BOUNDARIES = {"boundary": "boundary layer", "direction": BY_DIRECTION_LABEL}
_ORDER = (*PART_LABELS.values(), WHOLE_LABEL, *_BOUNDARIES.values())
_WIDTH = 0.72
"""Width of a bar, in layers."""
_TOP = 0.86
"""Where the lines of boundary layers end, as a share of the panel's height; their layers are written above."""


@style.paper_style()
def plot_change_parts(
    analysis: Analysis,
    site: ModuleSite = "ffn",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw one panel: a module's entropy change over the layers, as bars of its two parts stacked on each other.

    Parts of opposite signs are stacked on either side of zero. The marker is the whole change, and each part has its
    95% interval.

    Args:
        analysis: The model's analysis.
        site: `attn` (eq. 12) or `ffn` (eq. 13), for which the boundary layer by direction is marked too.
        ax: Where to draw, of one analysis; by default a new figure with a legend.
        label: Title of the panel, in place of the model's name.
        color: Colour of the bars, of which those of the direction part are filled.

    Returns:
        The axes.

    Raises:
        ValueError: The analysis is from before the parts were measured.
    """
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1)
        plot_change_parts(analysis, site, ax, label=label, color=color)
        _add_legend(figure, [ax], change_parts_data(analysis))
        return ax
    frame, first = change_parts_data(analysis), marks.is_first(ax)
    rows = frame[frame["site"] == site]
    (own,) = marks.check_colors(color, 1, "analysis")
    whole = rows[rows["part"] == "whole"]
    for place, part in enumerate(PARTS):
        _bars(ax, rows[rows["part"] == part], part, own, 0.32 * (place - 0.5) * _WIDTH)
    marker: dict[str, Any] = {"marker": "D", "color": "black", "markeredgecolor": "white", "markeredgewidth": 0.35}
    size = marks.marker_size(whole) + 0.6
    ax.plot(whole["layer"], whole["value"], linestyle="none", zorder=4, label=WHOLE_LABEL, markersize=size, **marker)
    marks.zero_line(ax)
    if not first:
        return ax
    marks.set_axes(ax, analysis, label, rf"$\Delta H_{{\mathrm{{{SITE_LABELS[site]}}}}}^{{\,l}}$ (nats)")
    if site == "ffn":
        _mark_boundaries(ax, whole)
    else:
        _mark(ax, "boundary", whole.loc[whole["boundary"], "layer"], 1.0)
    return ax


@style.paper_style()
def change_parts(
    analyses: OneOrMany[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw for each model the changes that ATTN makes (top) and that FFN makes (bottom), stacked into their parts.

    Args:
        analyses: One analysis, or one for each column of panels.
        ax: Where to draw, such as `Figure.subplots(2, n)`: a top panel for each of n analyses, then the bottom panels;
            by default a new figure with a legend.
        label: Title of the column, or of each.
        color: Colour of the bars, or of those of each column.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit that of the analyses.
        ValueError: An analysis is from before the parts were measured.
    """
    given = listed(analyses)
    figure, panels = marks.module_panels(given, plot_change_parts, ax, label, color)
    if ax is None:
        _add_legend(figure, panels, change_parts_data(given))
    return figure


def _bars(ax: Axes, rows: pd.DataFrame, part: str, color: Any, offset: float) -> None:
    """Draw the bars of one part, and their intervals `offset` layers right of the middle of each bar."""
    look = LOOKS[part]
    ink = look.light if color is None else color
    fill: dict[str, Any] = {"facecolor": "white" if look.hatched else ink, "edgecolor": ink, "linewidth": 0.5}
    if look.hatched:
        fill["hatch"] = "/" * 6
    ax.bar(rows["layer"], rows["value"], _WIDTH, rows["base"], zorder=2, label=PART_LABELS[part], **fill)
    if rows["low"].notna().any():
        ends = np.abs(rows[["low", "high"]].to_numpy() - rows[["value"]].to_numpy()).T
        at = (rows["layer"] + offset, rows["base"] + rows["value"])
        ax.errorbar(*at, yerr=ends, fmt="none", ecolor="black", elinewidth=0.6, zorder=3)


def _mark_boundaries(ax: Axes, rows: pd.DataFrame) -> None:
    """Mark the FFN's boundary layer and that by direction alone, and write above the data which they are."""
    layers = {name: rows.loc[rows[name], "layer"] for name in ("boundary", "boundary_by_direction")}
    measured, by_direction = (next(iter(found), None) for found in layers.values())
    _mark(ax, "boundary", layers["boundary"], _TOP)
    if measured != by_direction:
        _mark(ax, "direction", layers["boundary_by_direction"], _TOP)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))
    text_style: dict[str, Any] = {"fontsize": marks.SMALL, "fontfamily": ax.title.get_fontfamily(), "va": "top"}
    texts = boundary_texts(measured, by_direction)
    fits = [text for text in texts if style.text_width(text, marks.SMALL) + 4 < style.panel_width(ax)]
    ax.text(0.5, 0.98, (fits or texts[-1:])[0], transform=ax.transAxes, ha="center", **text_style)


def _mark(ax: Axes, what: str, layers: pd.Series, top: float) -> None:
    """Draw a line up to a share of the panel's height, behind the bars, on whose fill it would be lost."""
    for layer in layers:
        look: dict[str, Any] = {**style.line_style(LOOKS[what]), "label": _BOUNDARIES[what]}
        ax.axvline(layer, ymax=top, linewidth=0.8, zorder=1.5, **look)


def _add_legend(figure: Figure, panels: Sequence[Axes], frame: pd.DataFrame) -> None:
    bars = [Line2D([], [], color="black", linewidth=0.6, label=style.BAND_LABEL)]
    style.figure_legend(figure, panels, _ORDER, bars if frame["low"].notna().any() else ())
