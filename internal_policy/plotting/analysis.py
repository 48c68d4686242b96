"""The paper's figures of an analysis (arXiv 2512.19673v3, figs. 1c, 2, 3 and 12 to 14), and their numbers as tables.

    figure = entropy_flow(analysis)              # fig. 2; [one, other] gives a panel for each
    numbers = entropy_flow_data(analysis)        # exactly what it draws
    plot_entropy_change(analysis, "ffn", ax=ax)  # one panel, on your own axes

A `plot_*` function draws one panel for one model and returns its axes (`.figure` shows or saves it); on axes that show
an analysis already it adds another. The function without `plot_` lays out a panel for each model. Bands are 95%
intervals. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internal_policy.analysis.change_parts import has_parts
from internal_policy.analysis.figure_data import (
    SITE_LABELS,
    ModuleSite,
    OneOrMany,
    baseline_data,
    entropy_change_data,
    entropy_flow_data,
    listed,
    policy_gap,
    require_some,
    residual_cosine_data,
    stage_sketch_data,
)
from internal_policy.plotting import marks, style
from internal_policy.plotting.heads import map_drawings
from internal_policy.plotting.parts import change_parts
from internal_policy.plotting.token_groups import group_drawings
from internal_policy.utils.palette import LOOKS, STAGES

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

__all__ = [
    "baseline_data",
    "entropy_change",
    "entropy_change_data",
    "entropy_flow",
    "entropy_flow_data",
    "plot_entropy_change",
    "plot_entropy_flow",
    "plot_residual_cosine",
    "residual_cosine",
    "residual_cosine_data",
    "save_analysis_figures",
    "stage_sketch",
    "stage_sketch_data",
]

POLICY_LABEL, UNIFORM_LABEL = "policy $\\pi_\\theta$", "uniform, $\\ln V$"
LEGEND_ORDER = (
    *("input", "ATTN", "FFN", "output", *STAGES, "boundary layer", POLICY_LABEL, UNIFORM_LABEL),
    marks.BASELINE_LABEL,
)


@style.paper_style()
def plot_entropy_flow(
    analysis: Analysis, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw one panel of fig. 2: each layer's entropies at its input, ATTN, FFN and output, in order.

    Args:
        analysis: The model's analysis.
        ax: Where to draw, also over another analysis; by default a new figure with a legend.
        label: Name of the analysis in the legend, needed where several share a panel.
        color: Colour of its lines, whose markers and dashes distinguish them.

    Returns:
        The axes.
    """
    if ax is None:
        return _new_panel(partial(plot_entropy_flow, analysis, label=label, color=color), analysis)
    frame, first = entropy_flow_data(analysis), marks.is_first(ax)
    (own,) = marks.check_colors(color, 1, "analysis")
    prefix = f"{label}, " if label is not None else ""
    modules = frame[frame["point"].isin(["input", "ATTN", "FFN", "output"])].sort_values("position")
    ax.plot(modules["position"], modules["entropy"], color=style.NEUTRAL, linewidth=0.2, alpha=0.6, zorder=1.5)
    stream = modules[modules["point"].isin(["input", "output"])]
    stream_color = own if own is not None else style.STREAM
    marks.line(ax, stream, "position", "entropy", color=stream_color, linewidth=0.8)
    point_style: dict[str, Any] = {**style.marker_style(LOOKS["stream"]), "linestyle": "none", "color": stream_color}
    for point, fill in (("input", "white"), ("output", stream_color)):
        rows = modules[modules["point"] == point]
        size: dict[str, Any] = {"markerfacecolor": fill, "markersize": marks.marker_size(rows), "markeredgewidth": 0.4}
        ax.plot(rows["position"], rows["entropy"], zorder=3, label=prefix + point, **point_style, **size)
    for site, name in SITE_LABELS.items():
        rows, look = modules[modules["point"] == name], marks.site_style(site, own)
        marks.line(ax, rows, "position", "entropy", label=prefix + name, markersize=marks.marker_size(rows), **look)
    policy = frame[frame["point"] == "policy"]
    ends = [policy["entropy"] - policy["low"], policy["high"] - policy["entropy"]]
    star = marks.with_color({**style.marker_style(LOOKS["policy"]), "linestyle": "none", "ms": 6}, own)
    error = None if policy["low"].isna().all() else ends
    edge: dict[str, Any] = {"mec": style.STREAM, "mew": 0.4, "label": prefix + POLICY_LABEL}
    ax.errorbar(policy["position"], policy["entropy"], error, **star, **edge)
    uniform = float(frame.loc[frame["point"] == "uniform", "entropy"].iloc[0])
    ax.axhline(uniform, linewidth=0.6, label=UNIFORM_LABEL, zorder=1, **style.line_style(LOOKS["uniform"]))
    marks.baseline(ax, analysis, "layer", "entropy", offset=0.375)
    if first:
        gap = policy_gap(analysis.n_layers)
        marks.set_axes(ax, analysis, label, "Entropy (nats)", (0.375 + gap / 4, 0.5 + gap))
    else:
        marks.widen_limits(ax, modules, "entropy")
    low, high = ax.get_ylim()
    # A policy is certain at zero and knows nothing at ln V; room beyond keeps the markers there whole.
    ax.set_ylim(min(low, -0.03 * high), max(high, 1.04 * uniform))
    return ax


@style.paper_style()
def plot_entropy_change(
    analysis: Analysis,
    site: ModuleSite = "ffn",
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: Any = None,
) -> Axes:
    """Draw one panel of fig. 3: the entropy change that a module makes, over the layers.

    Args:
        analysis: The model's analysis.
        site: `attn` (eq. 12) or `ffn` (eq. 13); the stages, which eq. 13 defines, are shown for `ffn`.
        ax: Where to draw, also over another analysis, whose stages are kept; by default a new figure with a legend.
        label: Name of the line in the legend, in place of the module.
        color: Colour of the line.

    Returns:
        The axes.
    """
    if ax is None:
        return _new_panel(partial(plot_entropy_change, analysis, site, label=label, color=color), analysis)
    frame, first = entropy_change_data(analysis), marks.is_first(ax)
    rows = frame[frame["site"] == site]
    (own,) = marks.check_colors(color, 1, "analysis")
    look = {"label": SITE_LABELS[site] if label is None else label, **marks.site_style(site, own)}
    marks.line(ax, rows, "layer", "change", markersize=marks.marker_size(rows), **look)
    marks.baseline(ax, analysis, site, "change")
    boundary = rows.loc[rows["boundary"], "layer"]
    for layer in boundary:
        look = marks.with_color(style.line_style(LOOKS["boundary"]), own)
        ax.axvline(layer, linewidth=0.6, label="boundary layer" if first else None, zorder=2, **look)
    if not first:
        marks.widen_limits(ax, rows, "change")
        return ax
    marks.zero_line(ax)
    marks.set_axes(ax, analysis, label, rf"$\Delta H_{{\mathrm{{{SITE_LABELS[site]}}}}}^{{\,l}}$ (nats)")
    if site == "ffn":
        marks.shade_stages(ax, rows)
        marks.name_boundary(ax, int(boundary.iloc[0]) if len(boundary) else None, analysis.n_layers)
    return ax


@style.paper_style()
def plot_residual_cosine(
    analysis: Analysis, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw one panel of fig. 12: the cosine similarity of each module's write with the residual stream.

    Args:
        analysis: The model's analysis.
        ax: Where to draw, also over another analysis; by default a new figure with a legend.
        label: Name of the analysis in the legend, needed where several share a panel.
        color: Colour of its lines, whose markers and dashes distinguish them.

    Returns:
        The axes.
    """
    if ax is None:
        return _new_panel(partial(plot_residual_cosine, analysis, label=label, color=color), analysis)
    frame, first = residual_cosine_data(analysis), marks.is_first(ax)
    (own,) = marks.check_colors(color, 1, "analysis")
    prefix = f"{label}, " if label is not None else ""
    for site, name in SITE_LABELS.items():
        rows, look = frame[frame["site"] == site], marks.site_style(site, own)
        marks.line(ax, rows, "layer", "cosine", label=prefix + name, markersize=marks.marker_size(rows), **look)
    if first:
        marks.zero_line(ax)
        marks.set_axes(ax, analysis, label, "Cosine similarity")
    return ax


def entropy_flow(
    analyses: OneOrMany[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 2, a panel for each model.

    Args:
        analyses: One analysis, or one for each panel.
        ax: Where to draw, one axes for each analysis; by default a new figure with a legend.
        label: Title of the panel, or of each.
        color: Colour of the lines, or of those of each panel.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours is not that of the analyses.
    """
    return _panels(listed(analyses), plot_entropy_flow, entropy_flow_data, ax, label, color)


@style.paper_style()
def entropy_change(
    analyses: OneOrMany[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 3, for each model the change that ATTN makes (top) and that FFN makes (bottom).

    Args:
        analyses: One analysis, or one for each column of panels.
        ax: Where to draw, such as `Figure.subplots(2, n)`: a top panel for each of n analyses, then the bottom panels;
            by default a new figure with a legend.
        label: Title of the column, or of each.
        color: Colour of the lines, or of those of each column.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours does not fit that of the analyses.
    """
    given = listed(analyses)
    figure, panels = marks.module_panels(given, plot_entropy_change, ax, label, color)
    if ax is None:
        _add_legend(figure, panels, entropy_change_data(given))
    return figure


def residual_cosine(
    analyses: OneOrMany[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 12, a panel for each model.

    Args:
        analyses: One analysis, or one for each panel.
        ax: Where to draw, one axes for each analysis; by default a new figure with a legend.
        label: Title of the panel, or of each.
        color: Colour of the lines, or of those of each panel.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours is not that of the analyses.
    """
    return _panels(listed(analyses), plot_residual_cosine, residual_cosine_data, ax, label, color)


@style.paper_style()
def stage_sketch(
    analyses: OneOrMany[Analysis],
    *,
    ax: Axes | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Axes:
    """Draw fig. 1c as a sketch: for each model a strip of its layers, coloured by stage, with the boundary layer.

    Args:
        analyses: One analysis, or one for each strip.
        ax: Where to draw; by default a new figure with a legend.
        label: Name of the strip, or of each.
        color: Colour of the line at the boundary layer, or of each.

    Returns:
        The axes.

    Raises:
        UserError: The number of labels or colours is not that of the analyses.
    """
    given = listed(analyses)
    frame, figure = stage_sketch_data(given), None
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1, panel_height=(0.36 * len(given) + 0.3) / 1.4)
    names = marks.check_labels(label, marks.short_names([a.name for a in given]), "analyses")
    colors = marks.check_colors(color, len(given), "analyses")
    for (panel, rows), name, line_color in zip(frame.groupby("panel"), names, colors, strict=True):
        marks.stage_strip(ax, rows, float(str(panel)), name, line_color)
    ax.set(xlim=(0, 1), ylim=(len(given) + 0.4, 0.3), yticks=[], xlabel="Relative depth $l/L$")
    ax.spines["left"].set_visible(False)
    if figure is not None:
        style.figure_legend(figure, [ax], LEGEND_ORDER)
    return ax


def save_analysis_figures(analyses: OneOrMany[Analysis], directory: Path) -> list[Path]:
    """Write figs. 2, 3 and 12, the parts of the changes, and what was measured of heads, experts and groups of tokens.

    Each is written as PNG and PDF.

    The same analyses give the same bytes. Analyses from before the parts were measured are not in that figure; without
    any other it is not drawn.

    Args:
        analyses: One analysis, or one for each model.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    given = listed(analyses)
    drawings: dict[str, Callable[[], Figure]] = {
        "fig2_entropy_flow": partial(entropy_flow, given),
        "fig3_entropy_change": partial(entropy_change, given),
        "fig12_residual_cosine": partial(residual_cosine, given),
    }
    if measured := [analysis for analysis in given if has_parts(analysis.layers)]:
        drawings["change_parts"] = partial(change_parts, measured)
    return style.save_figures(directory, {**drawings, **map_drawings(given), **group_drawings(given)})


def _add_legend(figure: Figure, axes: Sequence[Axes], frame: pd.DataFrame) -> None:
    style.figure_legend(figure, axes, LEGEND_ORDER, band=bool(frame["low"].notna().any()))


def _new_panel(plot: Callable[..., Axes], analysis: Analysis) -> Axes:
    """Draw one panel on a new figure with a legend."""
    figure, ((ax,),) = style.panel_grid(1)
    plot(ax=ax)
    _add_legend(figure, [ax], entropy_change_data(analysis))
    return ax


@style.paper_style()
def _panels(
    analyses: list[Analysis],
    plot: Callable[..., Axes],
    data: Callable[[list[Analysis]], pd.DataFrame],
    ax: OneOrMany[Axes] | None,
    label: OneOrMany[str] | None,
    color: Any,
) -> Figure:
    """Draw one panel for each analysis; a new figure has shared axis labels and a legend."""
    require_some(analyses)
    n, figure = len(analyses), None
    if ax is None:
        figure, columns = style.panel_grid(n)
        panels = [column[0] for column in columns]
    else:
        panels = marks.check_axes(ax, n, "one for each analysis")
    for analysis, panel, own in zip(analyses, panels, marks.check_colors(color, n, "analyses"), strict=True):
        plot(analysis, panel, color=own)
    marks.set_titles(panels, analyses, label)
    if figure is None:
        return style.root_figure(panels[0])
    style.share_labels(figure, panels)
    _add_legend(figure, panels, data(analyses))
    return figure
