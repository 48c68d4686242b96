"""Figures of a comparison: what moves over the checkpoints, and models side by side by relative depth.

    figure = heat_maps(comparison)         # layer by checkpoint; [one, other] is compared first
    figure = layer_lines(comparison)       # a line a layer over the steps
    figure = depth_overlay(comparison)     # models by relative depth, in nats and as a share of ln V
    figure = entropy_fall(comparison)      # progressive or abrupt: share of the total drop
    figure = layer_differences(comparison) # each analysis less the baseline

The numbers are in `figure_data`. Bands are 95% intervals. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from internal_policy.analysis.figure_data import OneOrMany
from internal_policy.comparison.figure_data import (
    depth_data,
    difference_data,
    in_order,
    row_names,
    same_depth,
    shown_names,
    step_data,
    steps_known,
)
from internal_policy.comparison.results import AnalysisComparison, as_comparison
from internal_policy.plotting import comparison_marks as drawing
from internal_policy.plotting import marks as shared
from internal_policy.plotting import style
from internal_policy.utils.palette import LOOKS

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

TITLES = {
    "entropy": r"$H_{\mathrm{Layer}}^{\,l}$",
    "attn": r"$\Delta H_{\mathrm{ATTN}}^{\,l}$",
    "ffn": r"$\Delta H_{\mathrm{FFN}}^{\,l}$",
    "entropy_difference": r"$H_{\mathrm{Layer}}^{\,l}$, difference",
    "attn_difference": r"$\Delta H_{\mathrm{ATTN}}^{\,l}$, difference",
    "ffn_difference": r"$\Delta H_{\mathrm{FFN}}^{\,l}$, difference",
}
"""What each map of `step_data` is called."""
BOUNDARY: dict[str, Any] = {
    **{"marker": style.MARKERS[LOOKS["boundary"].marker], "linestyle": "none", "markersize": 3},
    **{"markeredgecolor": "white", "markeredgewidth": 0.4, "zorder": 4},
}
"""How a boundary layer is marked."""


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
        ax: Where to draw, six panels; without it a figure of its own is made.
        label: What to call each analysis, in the order of `comparison.labels`.
        color: The colour map of the entropies, by name; changes and differences keep theirs.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than are needed; models of different depth.
    """
    comparison = as_comparison(comparison, label)
    frame = step_data(comparison)
    labels = in_order(comparison)
    panels = _panels(ax, 2, (1, 1, 1), max(1.2, 0.065 * len(labels) + 0.45))
    names, colours = row_names(comparison), shared.color_map(color, "viridis")
    with style.paper_style():
        for place, ((name, title), panel) in enumerate(zip(TITLES.items(), panels, strict=True)):
            table = frame[frame["map"] == name].pivot_table(index="label", columns="layer", values="value")
            values = table.loc[labels].to_numpy(dtype=float)
            named = ax is not None or place % 3 == 0
            drawing.heat_map(panel, values, names, centred=name != "entropy", named=named, colours=colours)
            panel.set_title(f"{title} (nats)", pad=6)
            if ax is not None or place >= 3:
                panel.set_xlabel("Layer")
        base = style.cut(shown_names(comparison)[comparison.baseline], 70.0, 8.0).replace("$", r"\$")
        for panel in panels[3:] if ax is not None else panels[3:4]:
            panel.set_ylabel(f"Less {base}")
    return style.root_figure(panels[0])


def layer_lines(
    comparison: AnalysisComparison | Iterable[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: Iterable[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw each layer's entropy, and the changes that its modules make, over the steps; a line a layer.

    Args:
        comparison: A comparison, or analyses, with the same number of layers.
        ax: Where to draw, three panels; without it a figure with a colour bar is made.
        label: What to call each analysis, in the order of `comparison.labels`.
        color: The colour map that the layers have their shades from, by name.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than are needed; models of different depth.
    """
    comparison = as_comparison(comparison, label)
    frame = step_data(comparison)
    n_layers = int(frame["layer"].max())
    panels = _panels(ax, 1, (1, 1, 1), 1.9)
    colours = drawing.layer_colours(n_layers, shared.color_map(color, "viridis"))
    stepped = comparison.steps_from != "order"
    with style.paper_style():
        for name, panel in zip(("entropy", "attn", "ffn"), panels, strict=True):
            rows = frame[frame["map"] == name]
            if name != "entropy":
                panel.axhline(0.0, color=style.NEUTRAL, linewidth=0.6, zorder=1)
            for layer, line in rows.groupby("layer"):
                size = 2.0 if n_layers <= drawing.MOST_NAMED and len(line) <= drawing.MOST_NAMED else 0.0
                marks: dict[str, Any] = {"color": colours(int(str(layer)) - 1), "marker": "o", "markersize": size}
                # Without steps these are places, which are counted from 1.
                panel.plot(line["step"] + (not stepped), line["value"], linewidth=0.9, **marks)
            panel.set_title(TITLES[name])
            panel.set_xlabel(comparison.unit.capitalize() if stepped else "Analysis, in order")
            if not stepped:
                panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylabel("nats")
        if ax is None:
            drawing.layer_bar(panels, colours)
    return style.root_figure(panels[0])


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
        ax: Where to draw, two panels; without it a figure with a legend is made.
        label: What to call each analysis, in the order of `comparison.labels`.
        color: Of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than are needed.
    """
    comparison = as_comparison(comparison, label)
    frame = depth_data(comparison)
    panels = _panels(ax, 1, (1, 1), 1.9)
    marks = drawing.series(comparison, color)
    with style.paper_style():
        for unit, title, panel in zip(("nats", "share"), ("Entropy (nats)", r"Entropy / $\ln V$"), panels, strict=True):
            rows = frame[frame["unit"] == unit]
            _lines(panel, rows, "relative_depth", "value", marks)
            for label, mark in marks.items():
                at = rows[(rows["label"] == label) & rows["boundary"]]
                panel.plot(at["relative_depth"], at["value"], color=mark["color"], **BOUNDARY)
            panel.set_ylabel(title)
            drawing.depth_axis(panel)
            panel.set_ylim(bottom=-0.03 * panel.get_ylim()[1])
        if ax is None:
            sign = Line2D([], [], color=style.NEUTRAL, label="boundary layer", **BOUNDARY)
            drawing.key(comparison, panels, marks, [sign] if frame["boundary"].any() else [], frame)
    return style.root_figure(panels[0])


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
        ax: Where to draw, two panels; without it a figure with a legend is made.
        label: What to call each analysis, in the order of `comparison.labels`.
        color: Of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than are needed.
    """
    comparison = as_comparison(comparison, label)
    panels = _panels(ax, 1, (3, 1), 1.9)
    marks = drawing.series(comparison, color)
    table = {str(row["label"]): row for row in comparison.convergence.to_dict("records")}
    with style.paper_style():
        panel, last = panels
        panel.axhline(0.5, color=style.NEUTRAL, linewidth=0.5, linestyle=":", zorder=1)
        # An even fall starts at layer 1, whose depth depends on how many there are: of the fewest, and of the most.
        depths = {int(row["n_layers"]) for row in table.values()} - {1}
        for n_layers in sorted({min(depths, default=2), max(depths, default=2)}):
            panel.plot([1 / n_layers, 1], [0, 1], color=style.NEUTRAL, linewidth=0.6, zorder=1)
        _lines(panel, comparison.fall, "relative_depth", "fallen", marks)
        for place, (label, mark) in enumerate(marks.items()):
            row = table[label]
            _point(panel, float(row["half_drop_depth"]), 0.5, row, "half_drop_depth", mark, horizontal=True)
            _point(last, place, float(row["last_three_share"]), row, "last_three_share", mark, horizontal=False)
            last.plot([place - 0.3, place + 0.3], [row["even_share"]] * 2, color=style.NEUTRAL, linewidth=0.6)
        panel.set_ylabel("Share of the drop so far")
        drawing.depth_axis(panel)
        last.set_title("Last three layers' share")
        last.set_xlim(-0.7, len(marks) - 0.3)
        longer = drawing.series_axis(last, comparison, marks)
        # The right panel has a scale of its own, on which the intervals can be seen.
        panel.set_ylim(min(-0.03, panel.get_ylim()[0]), max(1.03, panel.get_ylim()[1]))
        if ax is None:
            figure = style.root_figure(panel)
            figure.set_figheight(figure.get_figheight() + longer)
            half = Line2D([], [], color=style.NEUTRAL, marker="o", linestyle="none", markersize=2.2, label="half drop")
            even = Line2D([], [], color=style.NEUTRAL, linewidth=0.6, label="even fall")
            drawing.key(comparison, panels, marks, [half, even], comparison.fall)
    return style.root_figure(panels[0])


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
        ax: Where to draw, three panels; without it a figure with a legend is made.
        label: What to call each analysis, in the order of `comparison.labels`.
        color: Of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than are needed.
    """
    comparison = as_comparison(comparison, label)
    frame = difference_data(comparison)
    panels = _panels(ax, 1, (1, 1, 1), 1.9)
    marks = {k: v for k, v in drawing.series(comparison, color).items() if (frame["label"] == k).any()}
    with style.paper_style():
        for name, panel in zip(("entropy", "attn", "ffn"), panels, strict=True):
            panel.axhline(0.0, color=style.NEUTRAL, linewidth=0.6, zorder=1)
            _lines(panel, frame[frame["map"] == name], "layer", "difference", marks)
            style.set_layer_axis(panel, int(frame["layer"].max()))
            panel.set_title(TITLES[name])
            panel.set_xlabel("Layer")
        panels[0].set_ylabel(_difference_label(comparison, frame, "nats, "), linespacing=0.9)
        if ax is None:
            drawing.key(comparison, panels, marks, [], frame)
    return style.root_figure(panels[0])


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
        ax: Where to draw, two panels; without it a figure with a legend is made.
        label: What to call each analysis, in the order of `comparison.labels`.
        color: Of the line of each analysis, in the same order, or of all lines.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than are needed.
    """
    comparison = as_comparison(comparison, label)
    frame = comparison.depths
    panels = _panels(ax, 1, (1, 1), 1.9)
    marks = {k: v for k, v in drawing.series(comparison, color).items() if k != comparison.baseline}
    titles = {"entropy": "Entropy (nats)", "entropy_share": r"Entropy / $\ln V$"}
    with style.paper_style():
        for (quantity, title), panel in zip(titles.items(), panels, strict=True):
            panel.axhline(0.0, color=style.NEUTRAL, linewidth=0.6, zorder=1)
            _lines(panel, frame[frame["quantity"] == quantity], "relative_depth", "difference", marks)
            panel.set_title(title)
            drawing.depth_axis(panel)
        panels[0].set_ylabel(_difference_label(comparison, frame), linespacing=0.9)
        if ax is None:
            drawing.key(comparison, panels, marks, [], frame)
    return style.root_figure(panels[0])


def save_comparison_figures(comparison: AnalysisComparison, directory: Path) -> list[Path]:
    """Write every figure that the comparison has the numbers for, as PNG and PDF. The same numbers, the same bytes.

    Args:
        comparison: The comparison.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    drawings = {"depth_overlay": depth_overlay, "entropy_fall": entropy_fall}
    if same_depth(comparison):
        drawings |= {"heat_maps": heat_maps}
        # A line from one model to another would mean nothing.
        if steps_known(comparison):
            drawings |= {"layer_lines": layer_lines}
    else:
        drawings |= {"depth_differences": depth_differences}
    if not comparison.differences.empty:
        drawings |= {"layer_differences": layer_differences}
    stems = {f"compare_{name}": draw for name, draw in drawings.items()}
    return [p for stem, draw in stems.items() for p in style.save_figure(draw(comparison), directory / stem)]


def _panels(ax: OneOrMany[Axes] | None, n_rows: int, widths: Sequence[float], height: float) -> list[Axes]:
    """The user's panels, or those of a figure of its own."""
    if ax is None:
        return drawing.grid(n_rows, widths, height)
    return shared.panels_of(ax, n_rows * len(widths), "one for each panel of this figure")


def _lines(ax: Axes, rows: pd.DataFrame, x: str, y: str, marks: dict[str, dict[str, Any]]) -> None:
    """Draw a line for each analysis; bands only where they can be told apart."""
    for label, mark in marks.items():
        drawing.line(ax, rows[rows["label"] == label], x, y, mark, bands=len(marks) <= drawing.MOST_NAMED)


def _point(
    ax: Axes, x: float, y: float, row: dict[Hashable, Any], name: str, mark: dict[str, Any], *, horizontal: bool
) -> None:
    """Mark a measure with its interval along one axis."""
    value = float(row[name])
    ends = [[value - float(row[f"{name}_low"])], [float(row[f"{name}_high"]) - value]]
    reach: dict[str, Any] = {} if pd.isna(ends[0][0]) else {"xerr" if horizontal else "yerr": ends}
    marks: dict[str, Any] = {"color": mark["color"], "marker": "o", "markersize": 2.2, "linestyle": "none"}
    ax.errorbar(x, y, **reach, **marks, elinewidth=0.8, capsize=1.8, capthick=0.8, zorder=4)


def _difference_label(comparison: AnalysisComparison, frame: pd.DataFrame, unit: str = "") -> str:
    """Name the baseline, and how the differences are had."""
    how = "paired" if frame["paired"].all() else "unpaired" if not frame["paired"].any() else "partly paired"
    name = style.cut(shown_names(comparison)[comparison.baseline], 70.0, 8.0)
    return f"Less {name}\n({unit}{how})".replace("$", r"\$")
