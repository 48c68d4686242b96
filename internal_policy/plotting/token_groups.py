"""The figure of groups of tokens: the entropy change of attention and FFN over the layers, a line for each group.

    figure = grouped_change(analysis.by("kind"))         # [one, other] gives a column of panels for each
    numbers = grouped_change_data(analysis.by("kind"))   # exactly what it draws
    plot_grouped_change(analysis.by("kind"), "ffn", ax)  # one panel, on your own axes

Bands are 95% intervals. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internal_policy.analysis.figure_data import SITE_LABELS, ModuleSite, OneOrMany, listed, require_some
from internal_policy.analysis.results import Analysis
from internal_policy.analysis.token_groups import TokenGroups
from internal_policy.analysis.token_labels import LABELS
from internal_policy.plotting import marks, style
from internal_policy.utils.palette import N_COLOURS, STAGES, series

__all__ = ["grouped_change", "grouped_change_data", "plot_grouped_change"]

_ENDS = ("stderr", "low", "high")
_MOST_BANDS = 4
"""With more lines than this, bands would hide them."""


def grouped_change_data(groups: OneOrMany[TokenGroups]) -> pd.DataFrame:
    """Return the numbers of the figure.

    Args:
        groups: The groups of one analysis, or of one for each column of panels.

    Returns:
        A row for each panel, group, site (attn, ffn) and layer: the entropy change in nats, its standard error and the
        ends of its 95% interval.
    """
    parts = []
    for panel, each in enumerate(listed(groups), start=1):
        rows = each.layers[each.layers["site"].isin(list(SITE_LABELS))]
        numbers = rows[["group", "site", "layer", "change"]].copy()
        for end in _ENDS:
            numbers[end] = rows[f"change_{end}"]
        numbers.insert(0, "panel", panel)
        numbers.insert(1, "model", each.name)
        numbers.insert(2, "grouping", each.grouping)
        parts.append(numbers)
    return pd.concat(parts, ignore_index=True)


@style.paper_style()
def plot_grouped_change(
    groups: TokenGroups,
    site: ModuleSite = "ffn",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw one panel: the entropy change that a module makes over the layers, a line for each group.

    Args:
        groups: The groups of an analysis.
        site: `attn` (arXiv 2512.19673v3, eq. 12) or `ffn` (eq. 13); for `ffn` the stages of the analysis are shown.
        ax: Where to draw; by default a new figure with a legend.
        label: Title of the panel, in place of the model's name.
        color: Colour of each group, in their order.

    Returns:
        The axes.
    """
    if ax is None:
        figure, ((panel,),) = style.panel_grid(1)
        plot_grouped_change(groups, site, panel, label=label, color=color)
        _add_legend(figure, [panel], [groups])
        return panel
    frame = grouped_change_data(groups)
    rows = frame[frame["site"] == site]
    own = marks.check_colors(color, len(groups.groups), "groups")
    for group, given, look in zip(groups.groups, own, _looks(groups), strict=True):
        part = rows[rows["group"] == group]
        drawn: dict[str, Any] = {"label": group, "markersize": marks.marker_size(part), **marks.with_color(look, given)}
        marks.line(ax, part, "layer", "change", alpha=0.15, bands=len(groups.groups) <= _MOST_BANDS, **drawn)
    marks.zero_line(ax)
    style.set_layer_axis(ax, groups.n_layers)
    _set_title(ax, groups, label)
    ax.set(xlabel="Layer", ylabel=rf"$\Delta H_{{\mathrm{{{SITE_LABELS[site]}}}}}^{{\,l}}$ (nats)")
    if site == "ffn" and groups.stages:
        layers = range(1, groups.n_layers + 1)
        marks.shade_stages(ax, pd.DataFrame({"layer": layers, "stage": list(groups.stages)}))
    return ax


@style.paper_style()
def grouped_change(
    groups: OneOrMany[TokenGroups],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw for each model the change that ATTN makes (top) and that FFN makes (bottom), a line for each group.

    Args:
        groups: The groups of one analysis, or of one for each column of panels.
        ax: Where to draw, such as `Figure.subplots(2, n)`: a top panel for each, then the bottom panels; by default a
            new figure with a legend.
        label: Title of the column, or of each.
        color: Colour of each group, in their order, in every column.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit.
    """
    given = listed(groups)
    require_some(given)
    n = len(given)
    names = marks.check_labels(label, marks.short_names([each.name for each in given]), "analyses")
    if ax is None:
        figure, columns = style.panel_grid(n, n_stacked=2, panel_height=1.12)
        top, bottom = ([column[k] for column in columns] for k in (0, 1))
    else:
        panels = marks.check_axes(ax, 2 * n, f"ATTN's for each of {n} analyses, then FFN's")
        top, bottom = panels[:n], panels[n:]
    for each, attn, ffn, name in zip(given, top, bottom, names, strict=True):
        plot_grouped_change(each, "attn", attn, label=name, color=color)
        plot_grouped_change(each, "ffn", ffn, label=name, color=color)
    if ax is not None:
        return style.root_figure(top[0])
    for place, (attn, ffn) in enumerate(zip(top, bottom, strict=True)):
        attn.tick_params(labelbottom=False)
        ffn.set_title("")
        for panel in (attn, ffn):
            panel.set_xlabel("")
            if place % style.grid_shape(n)[1]:
                panel.set_ylabel("")
    figure.supxlabel("Layer")
    figure.align_ylabels()
    _add_legend(figure, [*top, *bottom], given)
    return figure


def group_drawings(analyses: Sequence[Analysis]) -> dict[str, partial[Figure]]:
    """Return what draws a figure for each grouping that was measured on all responses, by the name of its file."""
    measured = {name: [a for a in analyses if name in a.groupings] for name in LABELS}
    return {f"groups_{name}": partial(_draw, having, name) for name, having in measured.items() if having}


def _draw(analyses: Sequence[Analysis], name: Any) -> Figure:
    return grouped_change([analysis.by(name) for analysis in analyses])


def _looks(groups: TokenGroups) -> list[dict[str, Any]]:
    """The colours, dashes and markers of the lines: steps of a scale for deciles and where there are many."""
    n = len(groups.groups)
    if groups.grouping != "position" and n <= N_COLOURS:
        return [style.marker_style(series(i)) for i in range(n)]
    shades = mpl.colormaps["viridis"]
    return [{"color": shades(0.9 * i / max(n - 1, 1)), "linestyle": "-", "marker": "o"} for i in range(n)]


def _set_title(ax: Axes, groups: TokenGroups, label: str | None) -> None:
    name = marks.short_name(groups.name) if label is None else label
    style.set_title(ax, name, marks.LENS_TITLES.get(groups.lens, groups.lens))


def _add_legend(figure: Figure, axes: Sequence[Axes], groups: Sequence[TokenGroups]) -> None:
    names = list(dict.fromkeys(name for each in groups for name in each.groups))
    bands = any(len(each.groups) <= _MOST_BANDS for each in groups)
    known = bands and bool(grouped_change_data(groups)["low"].notna().any())
    style.figure_legend(figure, axes, [*names, *STAGES], band=known)
