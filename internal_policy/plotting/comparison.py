"""Figures of a comparison: what moves over the checkpoints, and models side by side by relative depth.

    figure = heat_maps(comparison)         # layer by checkpoint; [one, other] is compared first
    figure = layer_lines(comparison)       # a line for each layer over the steps
    figure = depth_overlay(comparison)     # models by relative depth, in nats and as a share of ln V
    figure = entropy_fall(comparison)      # progressive or abrupt: share of the total drop
    figure = layer_differences(comparison) # each analysis less the baseline

The numbers are in `comparison.figure_data`. Bands are 95% intervals. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from internal_policy.analysis.figure_data import OneOrMany
from internal_policy.comparison import figure_data
from internal_policy.comparison.results import AnalysisComparison, as_comparison
from internal_policy.plotting import marks, style
from internal_policy.plotting.marks import SMALL
from internal_policy.utils import palette
from internal_policy.utils.palette import LOOKS

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

__all__ = [
    "depth_differences",
    "depth_overlay",
    "entropy_fall",
    "heat_maps",
    "layer_differences",
    "layer_lines",
    "save_comparison_figures",
]

_MAP_TITLES = {"entropy": r"$H_{\mathrm{Layer}}^{\,l}$"} | {
    site.lower(): rf"$\Delta H_{{\mathrm{{{site}}}}}^{{\,l}}$" for site in ("ATTN", "FFN")
}
TITLES = _MAP_TITLES | {f"{name}_difference": f"{title}, difference" for name, title in _MAP_TITLES.items()}
"""Title of each map of `step_data`."""
MAX_NAMED = 12
"""Most analyses that a legend names one by one; more have a colour bar, and no bands."""
BOUNDARY: dict[str, Any] = {
    **{"marker": style.MARKERS[LOOKS["boundary"].marker], "linestyle": "none", "markersize": 3},
    **{"markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 4},
}
"""How a boundary layer is marked."""
_DEPTH_TITLES = {"nats": "Entropy (nats)", "share": r"Entropy / $\ln V$"}
_HEIGHT = 1.9
"""Of a panel with its labels, inches."""
_ROW_NAME_WIDTH, _TICK_NAME_WIDTH, _TICK_HEIGHT, _BASELINE_WIDTH = 80.0, 60.0, 18.0, 70.0
"""Points that names may take next to the rows of a map, below an axis (and what a tick takes there), and in a label."""
_LEGEND_LINE_SIZES = 4.5
"""Width of a line in the legend and the gap after it, in sizes of its font."""
_MAX_BAR_TICKS = 9


@style.paper_style()
def heat_maps(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw layer by checkpoint: entropy and the changes that the modules make, and below each less the baseline.

    Args:
        comparison: A comparison, or analyses, with the same number of layers.
        ax: Where to draw, six axes; by default a new figure.
        label: Name of each analysis, in the order of `comparison.labels`.
        color: Colour map of the entropies, or its name; changes and differences keep theirs.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes or labels does not fit, there is no such colour map, or the depths differ.
    """
    comparison = as_comparison(comparison, label)
    frame, labels, names = (
        figure_data.step_data(comparison),
        figure_data.in_order(comparison),
        figure_data.row_names(comparison),
    )
    panels = _panels(ax, 2, (1, 1, 1), max(1.2, 0.065 * len(labels) + 0.45))
    colormap = marks.check_colormap(color)
    for place, ((name, title), panel) in enumerate(zip(TITLES.items(), panels, strict=True)):
        table = frame[frame["map"] == name].pivot_table(index="label", columns="layer", values="value").loc[labels]
        shown = names if ax is not None or place % 3 == 0 else [""] * len(names)
        _heat_map(panel, table, shown, None if name != "entropy" else colormap)
        panel.set_title(f"{title} (nats)", pad=6)
        panel.set(xlabel="Layer" if ax is not None or place >= 3 else "", ylabel="")
    base = style.shorten(figure_data.shown_names(comparison)[comparison.baseline], _BASELINE_WIDTH, 8.0).replace(
        "$", r"\$"
    )
    for panel in panels[3:] if ax is not None else panels[3:4]:
        panel.set_ylabel(f"Less {base}")
    return style.root_figure(panels[0])


@style.paper_style()
def layer_lines(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw each layer's entropy, and the changes that its modules make, over the steps; a line for each layer.

    Args:
        comparison: A comparison, or analyses, with the same number of layers.
        ax: Where to draw, three axes; by default a new figure with a colour bar.
        label: Name of each analysis, in the order of `comparison.labels`.
        color: Name of the palette of the layers, a colour map of matplotlib.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes or labels does not fit, there is no such colour map, or the depths differ.
    """
    comparison = as_comparison(comparison, label)
    frame = figure_data.step_data(comparison)
    n_layers = int(frame["layer"].max())
    panels = _panels(ax, 1, (1, 1, 1))
    colors = _shades(n_layers, marks.check_colormap(color))
    stepped = comparison.steps_from != "order"
    for name, panel in zip(_MAP_TITLES, panels, strict=True):
        if name != "entropy":
            marks.zero_line(panel)
        for layer, line in frame[frame["map"] == name].groupby("layer"):
            size = 2.0 if n_layers <= MAX_NAMED and len(line) <= MAX_NAMED else 0.0
            look: dict[str, Any] = {"color": colors[int(str(layer)) - 1], "marker": "o", "markersize": size}
            # Without steps these are places, which are counted from 1.
            panel.plot(line["step"] + (not stepped), line["value"], linewidth=0.9, **look)
        panel.set(title=TITLES[name], xlabel=comparison.unit.capitalize() if stepped else "Analysis, in order")
        if not stepped:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("nats")
    if ax is None:
        ticks = style.LayerLocator(n_layers).tick_values(1, n_layers)
        _color_bar(panels, colors, {int(tick) - 1: f"{tick:.0f}" for tick in ticks}, "Layer")
    return style.root_figure(panels[0])


@style.paper_style()
def depth_overlay(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw the entropy of the residual stream by relative depth, in nats and as a share of ln V; boundaries marked.

    Args:
        comparison: The comparison, or the analyses, of which the first is then the baseline.
        ax: Where to draw, two axes; by default a new figure with a legend.
        label: Name of each analysis, in the order of `comparison.labels`.
        color: Colour of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit.
    """
    comparison = as_comparison(comparison, label)
    frame, looks = figure_data.depth_data(comparison), line_styles(comparison, color)
    panels = _panels(ax, 1, (1, 1))
    for (unit, title), panel in zip(_DEPTH_TITLES.items(), panels, strict=True):
        rows = frame[frame["unit"] == unit]
        _lines(panel, rows, "relative_depth", "value", looks)
        for name, look in looks.items():
            at = rows[(rows["label"] == name) & rows["boundary"]]
            panel.plot(at["relative_depth"], at["value"], color=look["color"], **BOUNDARY)
        panel.set_ylabel(title)
        _set_depth_axis(panel)
        panel.set_ylim(bottom=-0.03 * panel.get_ylim()[1])
    if ax is None:
        sign = Line2D([], [], color=style.NEUTRAL, label="boundary layer", **BOUNDARY)
        _add_legend(comparison, panels, looks, [sign] if frame["boundary"].any() else [], frame)
    return style.root_figure(panels[0])


@style.paper_style()
def entropy_fall(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw how much of the total drop has fallen by relative depth, half-drop marks, and the last three layers' share.

    Args:
        comparison: The comparison, or the analyses, of which the first is then the baseline.
        ax: Where to draw, two axes; by default a new figure with a legend.
        label: Name of each analysis, in the order of `comparison.labels`.
        color: Colour of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit.
    """
    comparison = as_comparison(comparison, label)
    panel, last = panels = _panels(ax, 1, (3, 1))
    looks = line_styles(comparison, color)
    table = {str(row["label"]): row for row in comparison.convergence.to_dict("records")}
    panel.axhline(0.5, color=style.NEUTRAL, linewidth=0.5, linestyle=":", zorder=1)
    # An even fall starts at layer 1, whose depth depends on how many there are: of the fewest, and of the most.
    depths = {int(row["n_layers"]) for row in table.values()} - {1}
    for n_layers in sorted({min(depths, default=2), max(depths, default=2)}):
        panel.plot([1 / n_layers, 1], [0, 1], color=style.NEUTRAL, linewidth=0.6, zorder=1)
    _lines(panel, comparison.fall, "relative_depth", "fallen", looks)
    for place, (name, look) in enumerate(looks.items()):
        row = table[name]
        _point(panel, row, "half_drop_depth", look["color"], y=0.5)
        _point(last, row, "last_three_share", look["color"], x=place)
        last.plot([place - 0.3, place + 0.3], [row["even_share"]] * 2, color=style.NEUTRAL, linewidth=0.6)
    panel.set_ylabel("Share of the drop so far")
    _set_depth_axis(panel)
    last.set_title("Last three layers' share")
    last.set_xlim(-0.7, len(looks) - 0.3)
    extra_height = _name_places(last, comparison, looks)
    # The right panel has its own scale, on which the intervals can be seen.
    panel.set_ylim(min(-0.03, panel.get_ylim()[0]), max(1.03, panel.get_ylim()[1]))
    if ax is None:
        figure = style.root_figure(panel)
        figure.set_figheight(figure.get_figheight() + extra_height)
        half = Line2D([], [], color=style.NEUTRAL, marker="o", linestyle="none", markersize=2.2, label="half drop")
        even = Line2D([], [], color=style.NEUTRAL, linewidth=0.6, label="even fall")
        _add_legend(comparison, panels, looks, [half, even], comparison.fall)
    return style.root_figure(panel)


@style.paper_style()
def layer_differences(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw each analysis less the baseline, per layer: entropy, and the changes that the modules make.

    Args:
        comparison: A comparison, or analyses, in which some analysis has as many layers as the baseline.
        ax: Where to draw, three axes; by default a new figure with a legend.
        label: Name of each analysis, in the order of `comparison.labels`.
        color: Colour of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit.
    """
    comparison = as_comparison(comparison, label)
    frame = figure_data.difference_data(comparison)
    panels = _panels(ax, 1, (1, 1, 1))
    looks = {k: v for k, v in line_styles(comparison, color).items() if (frame["label"] == k).any()}
    for name, panel in zip(_MAP_TITLES, panels, strict=True):
        marks.zero_line(panel)
        _lines(panel, frame[frame["map"] == name], "layer", "difference", looks)
        style.set_layer_axis(panel, int(frame["layer"].max()))
        panel.set(title=TITLES[name], xlabel="Layer")
    panels[0].set_ylabel(_difference_label(comparison, frame, "nats, "), linespacing=0.9)
    if ax is None:
        _add_legend(comparison, panels, looks, [], frame)
    return style.root_figure(panels[0])


@style.paper_style()
def depth_differences(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw each analysis less the baseline by relative depth, in nats and as a share of ln V.

    Args:
        comparison: The comparison, or the analyses, of which the first is then the baseline.
        ax: Where to draw, two axes; by default a new figure with a legend.
        label: Name of each analysis, in the order of `comparison.labels`.
        color: Colour of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit.
    """
    comparison = as_comparison(comparison, label)
    frame = comparison.depths
    panels = _panels(ax, 1, (1, 1))
    looks = {k: v for k, v in line_styles(comparison, color).items() if k != comparison.baseline}
    for quantity, title, panel in zip(("entropy", "entropy_share"), _DEPTH_TITLES.values(), panels, strict=True):
        marks.zero_line(panel)
        _lines(panel, frame[frame["quantity"] == quantity], "relative_depth", "difference", looks)
        panel.set_title(title)
        _set_depth_axis(panel)
    panels[0].set_ylabel(_difference_label(comparison, frame), linespacing=0.9)
    if ax is None:
        _add_legend(comparison, panels, looks, [], frame)
    return style.root_figure(panels[0])


def save_comparison_figures(comparison: AnalysisComparison, directory: Path) -> list[Path]:
    """Write every figure that the comparison has the numbers for, as PNG and PDF. The same numbers, the same bytes.

    Args:
        comparison: The comparison.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    same = figure_data.same_depth(comparison)
    # A line from one model to another would mean nothing.
    drawings = {
        **{"depth_overlay": (depth_overlay, True), "entropy_fall": (entropy_fall, True)},
        **{"heat_maps": (heat_maps, same), "layer_lines": (layer_lines, same and figure_data.steps_known(comparison))},
        "depth_differences": (depth_differences, not same),
        "layer_differences": (layer_differences, not comparison.differences.empty),
    }
    wanted = {f"compare_{k}": partial(draw, comparison) for k, (draw, wanted) in drawings.items() if wanted}
    return style.save_figures(directory, wanted)


def line_styles(comparison: AnalysisComparison, color: Any = None) -> dict[str, dict[str, Any]]:
    """Return the arguments of `Axes.plot` by label: shades in the order of the steps, colours and dashes for models."""
    labels = figure_data.in_order(comparison)
    n = len(labels)
    if figure_data.steps_known(comparison) or n > MAX_NAMED:
        looks = [{"color": shade, "linestyle": "-"} for shade in _shades(n)]
    else:
        looks = [style.line_style(palette.series(i)) for i in range(n)]
    colors = dict(zip(comparison.labels, marks.check_colors(color, n, "analyses"), strict=True))
    return {label: marks.with_color(look, colors[label]) for label, look in zip(labels, looks, strict=True)}


def _shades(n: int, colormap: Colormap | None = None) -> list[tuple[float, ...]]:
    """Return n evenly spaced colours without the pale end, which is lost on white paper."""
    return [tuple(color) for color in (colormap or mpl.colormaps["viridis"])(np.linspace(0.0, 0.9, n))]


def _panels(ax: OneOrMany[Axes] | None, n_rows: int, widths: Sequence[float], height: float = _HEIGHT) -> list[Axes]:
    """Return the user's panels, or those of a new figure over both columns, row by row."""
    if ax is not None:
        return marks.check_axes(ax, n_rows * len(widths), "one for each panel of this figure")
    figure = style.new_figure(style.TWO_COLUMNS, height * n_rows + 0.3, space=0.03)
    spec = figure.add_gridspec(n_rows, len(widths), width_ratios=list(widths))
    return [figure.add_subplot(spec[row, column]) for row in range(n_rows) for column in range(len(widths))]


def _heat_map(ax: Axes, table: pd.DataFrame, names: Sequence[str], colormap: Colormap | None) -> None:
    """Draw a map of [analyses, layers], the first analysis on top; without a colour map, colours diverge from zero."""
    n_rows, n_layers = table.shape
    reach = float(np.nanmax(np.abs(table.to_numpy(dtype=float)))) or 1.0
    # An entropy is never below zero, and zero is where a policy is certain.
    limits: dict[str, Any] = {"vmin": 0.0, "cmap": colormap} if colormap else {"vmin": -reach, "cmap": "RdBu_r"}
    bar = {"pad": 0.015, "fraction": 0.06, "aspect": 16}
    sns.heatmap(table, ax=ax, vmax=reach, rasterized=True, cbar_kws=bar, xticklabels=False, yticklabels=False, **limits)
    cast(Any, ax.collections[0].colorbar).outline.set_linewidth(0.4)
    ax.spines[:].set_visible(True)
    style.set_layer_axis(ax, n_layers, first=0.5)
    height = ax.bbox.height / style.root_figure(ax).dpi * style.POINTS_PER_INCH
    every = ceil(n_rows * (SMALL + 1.0) / (0.72 * height))
    ticks = list(range(0, n_rows, every))
    # The last checkpoint is the one that readers look for first.
    if ticks[-1] != n_rows - 1:
        ticks = [i for i in ticks if n_rows - 1 - i >= every] + [n_rows - 1]
    texts = [style.shorten_front(names[i], _ROW_NAME_WIDTH, SMALL) for i in ticks]
    ax.set_yticks([i + 0.5 for i in ticks], texts, fontsize=SMALL, parse_math=False, rotation=0)


def _lines(ax: Axes, rows: pd.DataFrame, x: str, y: str, looks: Mapping[str, dict[str, Any]]) -> None:
    """Draw a line for each analysis; bands only if they can be distinguished."""
    for label, look in looks.items():
        marks.line(ax, rows[rows["label"] == label], x, y, alpha=0.15, bands=len(looks) <= MAX_NAMED, **look)


def _point(ax: Axes, row: Any, name: str, color: Any, x: float | None = None, y: float | None = None) -> None:
    """Mark a measure, with its interval, along the axis that is not given."""
    value, low, high = (float(row[f"{name}{end}"]) for end in ("", "_low", "_high"))
    interval: dict[str, Any] = (
        {} if pd.isna(low) else {"xerr" if x is None else "yerr": [[value - low], [high - value]]}
    )
    dot: dict[str, Any] = {"color": color, "marker": "o", "markersize": 2.2, "linestyle": "none"}
    ax.errorbar(
        value if x is None else x,
        value if y is None else y,
        **interval,
        **dot,
        elinewidth=0.8,
        capsize=1.8,
        capthick=0.8,
        zorder=4,
    )


def _set_depth_axis(ax: Axes) -> None:
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("Relative depth, layer / $L$")


def _difference_label(comparison: AnalysisComparison, frame: pd.DataFrame, unit: str = "") -> str:
    """Name the baseline, and whether the differences are paired."""
    how = "paired" if frame["paired"].all() else "unpaired" if not frame["paired"].any() else "partly paired"
    name = style.shorten(figure_data.shown_names(comparison)[comparison.baseline], _BASELINE_WIDTH, 8.0)
    return f"Less {name}\n({unit}{how})".replace("$", r"\$")


def _name_places(ax: Axes, comparison: AnalysisComparison, looks: Mapping[str, Mapping[str, Any]]) -> float:
    """Name the places 0, 1, ... of an axis after the analyses; return the height in inches that a figure must add."""
    names = figure_data.shown_names(comparison)
    if len(looks) > MAX_NAMED or (figure_data.steps_known(comparison) and not comparison.labels_given):
        names, title = _step_names(comparison)
        ax.set_xlabel(title.split(" (")[0])
    labels = list(looks)
    places = range(0, len(labels), ceil(len(labels) / MAX_NAMED))
    texts = [style.shorten_front(names[labels[i]], _TICK_NAME_WIDTH, SMALL) for i in places]
    ax.set_xticks(list(places), texts, rotation=90, fontsize=SMALL, parse_math=False)
    for tick, place in zip(ax.get_xticklabels(), places, strict=True):
        tick.set_color(looks[labels[place]]["color"])
    # The names take no room from the panel: a new figure grows by what a tick does not have already.
    return max(0.0, max(style.text_width(text, SMALL) for text in texts) - _TICK_HEIGHT) / style.POINTS_PER_INCH


def _add_legend(
    comparison: AnalysisComparison,
    panels: Sequence[Axes],
    looks: Mapping[str, Mapping[str, Any]],
    extra: Sequence[Artist],
    frame: pd.DataFrame,
) -> None:
    """Name the lines above the panels, or by a colour bar if there are too many; `frame` is what is drawn."""
    figure, labels = style.root_figure(panels[0]), list(looks)
    if len(labels) > MAX_NAMED:
        names, title = _step_names(comparison)
        ticks = {i: names[labels[i]] for i in range(0, len(labels), ceil(len(labels) / _MAX_BAR_TICKS))}
        _color_bar(panels, [look["color"] for look in looks.values()], ticks, title)
        style.figure_legend(figure, [], extra=extra)
        return
    # More than three names are in at least two columns, and take no room from the panels.
    n_columns = 1 if len(labels) < 4 else 2
    size = style.RC["legend.fontsize"]
    names = figure_data.shown_names(comparison)
    texts = [
        style.shorten(names[label], style.figure_width(figure) / n_columns - _LEGEND_LINE_SIZES * size, size)
        for label in labels
    ]
    if len(set(texts)) < len(texts):
        texts = [f"({comparison.labels.index(k) + 1}) {text}" for k, text in zip(labels, texts, strict=True)]
    # A name is not a formula, and matplotlib hides labels that begin with an underscore.
    texts = [f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$") for text in texts]
    lines: list[Artist] = [Line2D([], [], label=text, **look) for text, look in zip(texts, looks.values(), strict=True)]
    band = bool(frame["low"].notna().any())
    style.figure_legend(figure, [], texts, [*lines, *extra], band=band)
    (legend,) = figure.legends
    rows = ceil((len(lines) + len(extra) + band) / getattr(legend, "_ncols", n_columns))
    figure.set_figheight(figure.get_figheight() + max(0, rows - 2) * 1.6 * size / style.POINTS_PER_INCH)


def _step_names(comparison: AnalysisComparison) -> tuple[dict[str, str], str]:
    """Return for each label its step, or else its number in the tables; and what that is."""
    if figure_data.steps_known(comparison):
        steps = zip(comparison.labels, comparison.steps, strict=True)
        return {label: f"{step:g}" for label, step in steps}, comparison.unit.capitalize()
    numbers = {label: f"{i}" for i, label in enumerate(comparison.labels, start=1)}
    return numbers, "Analysis (as in boundaries.csv)"


def _color_bar(panels: Sequence[Axes], colors: Sequence[Any], ticks: Mapping[int, str], title: str) -> None:
    """Draw a colour bar of separate colours, some of which are named, next to the panels."""
    norm = BoundaryNorm(np.arange(len(colors) + 1) - 0.5, len(colors))
    mappable = ScalarMappable(norm=norm, cmap=ListedColormap(list(colors)))
    bar = style.root_figure(panels[0]).colorbar(mappable, ax=list(panels), pad=0.01, fraction=0.03, aspect=30)
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.4)
    bar.set_label(title)
