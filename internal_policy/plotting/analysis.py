"""The paper's figures of an analysis (arXiv 2512.19673v3, figs. 1c, 2, 3 and 12), and the numbers in them as tables.

    figure = entropy_flow(analysis)              # fig. 2; [one, other] gives a panel for each
    numbers = entropy_flow_data(analysis)        # exactly what it draws
    plot_entropy_change(analysis, "ffn", ax=ax)  # one panel, on your own axes

A `plot_*` function draws one panel for one model and returns its axes (`.figure` shows or saves it); on axes that show
an analysis already it adds its own. The function without `plot_` lays out a panel for each model. Bands are 95%
intervals. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

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
from internal_policy.plotting import marks as drawing
from internal_policy.plotting import style
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
    drawing.BASELINE_LABEL,
)


def plot_entropy_flow(
    analysis: Analysis, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw one panel of fig. 2: each layer's entropies at its input, ATTN, FFN and output, in order.

    Args:
        analysis: The model's analysis.
        ax: Where to draw, also over another analysis; without it a figure of its own with a legend is made.
        label: What to call the analysis in the legend; needed where several share a panel.
        color: Of its lines, whose markers and dashes tell them apart.

    Returns:
        The axes.
    """
    if ax is None:
        return _own_panel(lambda panel: plot_entropy_flow(analysis, panel, label=label, color=color), analysis)
    frame, first = entropy_flow_data(analysis), drawing.is_first(ax)
    (own,) = drawing.colors_for(color, 1, "analysis")
    of = f"{label}, " if label is not None else ""
    with style.paper_style():
        modules = frame[frame["point"].isin(["input", "ATTN", "FFN", "output"])].sort_values("position")
        ax.plot(modules["position"], modules["entropy"], color=style.NEUTRAL, linewidth=0.2, alpha=0.6, zorder=1.5)
        stream = modules[modules["point"].isin(["input", "output"])]
        stream_color = own if own is not None else style.STREAM
        drawing.line(ax, stream, "position", "entropy", color=stream_color, linewidth=0.8)
        marks: dict[str, Any] = {**style.marked_line(LOOKS["stream"]), "linestyle": "none", "markeredgewidth": 0.4}
        for point, fill in (("input", "white"), ("output", stream_color)):
            rows = modules[modules["point"] == point]
            marks |= {"markerfacecolor": fill, "markersize": drawing.marker_size(rows), "label": of + point}
            ax.plot(rows["position"], rows["entropy"], zorder=3, **{**marks, "color": stream_color})
        for site, name in SITE_LABELS.items():
            marks = drawing.site_marks(site, own)
            drawing.line(ax, modules[modules["point"] == name], "position", "entropy", label=of + name, **marks)
        policy = frame[frame["point"] == "policy"]
        ends = [policy["entropy"] - policy["low"], policy["high"] - policy["entropy"]]
        error = None if policy["low"].isna().all() else ends
        marks = {**style.marked_line(LOOKS["policy"]), "linestyle": "none", "ms": 6, "mec": style.STREAM, "mew": 0.4}
        marks |= {"color": own} if own is not None else {}
        ax.errorbar(policy["position"], policy["entropy"], error, label=of + POLICY_LABEL, **marks)
        uniform = float(frame.loc[frame["point"] == "uniform", "entropy"].iloc[0])
        ax.axhline(uniform, linewidth=0.6, label=UNIFORM_LABEL, zorder=1, **style.line_marks(LOOKS["uniform"]))
        drawing.baseline(ax, analysis, "layer", "entropy", offset=0.375)
        if first:
            gap = policy_gap(analysis.n_layers)
            style.set_layer_axis(ax, analysis.n_layers, (0.375 + gap / 4, 0.5 + gap))
            drawing.set_titles([ax], [analysis], label)
            drawing.label_axes(ax, "Entropy (nats)")
        else:
            drawing.widen(ax, modules, "entropy")
        low, high = ax.get_ylim()
        # Zero is where a policy is certain and ln V where it knows nothing; room beyond keeps the marks there whole.
        ax.set_ylim(min(low, -0.03 * high), max(high, 1.04 * uniform))
    return ax


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
        ax: Where to draw, also over another analysis, whose stages then stay; without it a figure of its own with a
            legend is made.
        label: What to call the line in the legend, in place of the module.
        color: Of the line.

    Returns:
        The axes.
    """
    if ax is None:
        return _own_panel(lambda panel: plot_entropy_change(analysis, site, panel, label=label, color=color), analysis)
    frame, first = entropy_change_data(analysis), drawing.is_first(ax)
    rows = frame[frame["site"] == site]
    (own,) = drawing.colors_for(color, 1, "analysis")
    marks = drawing.site_marks(site, own)
    with style.paper_style():
        drawing.line(ax, rows, "layer", "change", label=SITE_LABELS[site] if label is None else label, **marks)
        drawing.baseline(ax, analysis, site, "change")
        boundary = rows.loc[rows["boundary"], "layer"]
        for layer in boundary:
            drawing.boundary_line(ax, layer, "boundary layer" if first else None, own)
        if first:
            drawing.zero_line(ax)
            style.set_layer_axis(ax, analysis.n_layers)
            drawing.set_titles([ax], [analysis], label)
            drawing.label_axes(ax, rf"$\Delta H_{{\mathrm{{{SITE_LABELS[site]}}}}}^{{\,l}}$ (nats)")
        if first and site == "ffn":
            drawing.shade_stages(ax, rows)
            drawing.name_boundary(ax, int(boundary.iloc[0]) if len(boundary) else None, analysis.n_layers)
        if not first:
            drawing.widen(ax, rows, "change")
    return ax


def plot_residual_cosine(
    analysis: Analysis, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw one panel of fig. 12: the cosine similarity of each module's write with the residual stream.

    Args:
        analysis: The model's analysis.
        ax: Where to draw, also over another analysis; without it a figure of its own with a legend is made.
        label: What to call the analysis in the legend; needed where several share a panel.
        color: Of its lines, whose markers and dashes tell them apart.

    Returns:
        The axes.
    """
    if ax is None:
        return _own_panel(lambda panel: plot_residual_cosine(analysis, panel, label=label, color=color), analysis)
    frame, first = residual_cosine_data(analysis), drawing.is_first(ax)
    (own,) = drawing.colors_for(color, 1, "analysis")
    of = f"{label}, " if label is not None else ""
    with style.paper_style():
        for site, name in SITE_LABELS.items():
            marks = drawing.site_marks(site, own)
            drawing.line(ax, frame[frame["site"] == site], "layer", "cosine", label=of + name, **marks)
        if first:
            drawing.zero_line(ax)
            style.set_layer_axis(ax, analysis.n_layers)
            drawing.set_titles([ax], [analysis], label)
            drawing.label_axes(ax, "Cosine similarity")
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
        ax: Where to draw, one for each analysis; without it a figure with a legend is made.
        label: The title of the panel, or of each.
        color: Of the lines, or of those of each panel.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than of analyses.
    """
    return _one_row(listed(analyses), plot_entropy_flow, entropy_flow_data, ax, label, color)


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
            without it a figure with a legend is made.
        label: The title of the column, or of each.
        color: Of the lines, or of those of each column.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than of analyses.
    """
    given = listed(analyses)
    require_some(given)
    n = len(given)
    if ax is not None:
        panels = drawing.panels_of(ax, 2 * n, f"ATTN's for each of {n} analyses, then FFN's")
        columns = [[panels[k], panels[n + k]] for k in range(n)]
    else:
        figure, columns = style.panel_grid(n, n_stacked=2, panel_height=1.12)
    for analysis, column, own in zip(given, columns, drawing.colors_for(color, n, "analyses"), strict=True):
        for site, panel in zip(SITE_LABELS, column, strict=True):
            plot_entropy_change(analysis, site, panel, color=own)
    with style.paper_style():
        drawing.set_titles([column[0] for column in columns], given, label)
    if ax is not None:
        with style.paper_style():
            drawing.set_titles([column[1] for column in columns], given, label)
        return style.root_figure(columns[0][0])
    n_columns = style.grid_shape(n)[1]
    for place, column in enumerate(columns):
        for panel in column:
            panel.set_xlabel("")
            if place % n_columns:
                panel.set_ylabel("")
        column[0].tick_params(labelbottom=False)
        column[1].set_title("")
    with style.paper_style():
        figure.supxlabel("Layer")
        figure.align_ylabels()
    _legend(figure, [panel for column in columns for panel in column], entropy_change_data(given))
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
        ax: Where to draw, one for each analysis; without it a figure with a legend is made.
        label: The title of the panel, or of each.
        color: Of the lines, or of those of each panel.

    Returns:
        The figure.

    Raises:
        UserError: another number of axes, labels or colours than of analyses.
    """
    return _one_row(listed(analyses), plot_residual_cosine, residual_cosine_data, ax, label, color)


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
        ax: Where to draw; without it a figure of its own with a legend is made.
        label: The name of the strip, or of each.
        color: Of the line at the boundary layer, or of each.

    Returns:
        The axes.

    Raises:
        UserError: another number of labels or colours than of analyses.
    """
    given, own = listed(analyses), ax is None
    frame = stage_sketch_data(given)
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1, panel_height=(0.36 * len(given) + 0.3) / 1.4)
    names = drawing.labels_for(label, drawing.short_names(given), "analyses")
    colors = drawing.colors_for(color, len(given), "analyses")
    with style.paper_style():
        for (panel, rows), name, line_color in zip(frame.groupby("panel"), names, colors, strict=True):
            drawing.stage_strip(ax, rows, float(str(panel)), name, line_color)
        ax.set(xlim=(0, 1), ylim=(len(given) + 0.4, 0.3), yticks=[], xlabel="Relative depth $l/L$")
        ax.spines["left"].set_visible(False)
        if own:
            style.figure_legend(figure, [ax], LEGEND_ORDER)
    return ax


def save_analysis_figures(analyses: OneOrMany[Analysis], directory: Path) -> list[Path]:
    """Write figs. 2, 3 and 12 as PNG and PDF. The same analyses give the same bytes.

    Args:
        analyses: One analysis, or one for each model.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    stems = ("fig2_entropy_flow", "fig3_entropy_change", "fig12_residual_cosine")
    given = listed(analyses)
    drawings = (entropy_flow(given), entropy_change(given), residual_cosine(given))
    return [
        p for stem, figure in zip(stems, drawings, strict=True) for p in style.save_figure(figure, directory / stem)
    ]


def _legend(figure: Figure, axes: Sequence[Axes], frame: pd.DataFrame) -> None:
    band = [Patch(color=style.NEUTRAL, alpha=0.35, linewidth=0, label="95% interval")]
    with style.paper_style():
        style.figure_legend(figure, axes, LEGEND_ORDER, band if frame["low"].notna().any() else [])


def _own_panel(plot: Callable[[Axes], Axes], analysis: Analysis) -> Axes:
    """Draw one panel on a figure of its own, with a legend."""
    figure, ((ax,),) = style.panel_grid(1)
    plot(ax)
    _legend(figure, [ax], entropy_change_data(analysis))
    return ax


def _one_row(
    analyses: list[Analysis],
    plot: Callable[..., Axes],
    data: Callable[[list[Analysis]], pd.DataFrame],
    ax: OneOrMany[Axes] | None,
    label: OneOrMany[str] | None,
    color: Any,
) -> Figure:
    """Draw one panel for each analysis, with the labels that all share and a legend if the figure is our own."""
    require_some(analyses)
    n = len(analyses)
    if ax is not None:
        panels = drawing.panels_of(ax, n, "one for each analysis")
    else:
        figure, columns = style.panel_grid(n)
        panels = [column[0] for column in columns]
    for analysis, panel, own in zip(analyses, panels, drawing.colors_for(color, n, "analyses"), strict=True):
        plot(analysis, panel, color=own)
    with style.paper_style():
        drawing.set_titles(panels, analyses, label)
    if ax is not None:
        return style.root_figure(panels[0])
    with style.paper_style():
        figure.supxlabel(panels[0].get_xlabel())
        figure.supylabel(panels[0].get_ylabel())
    for panel in panels:
        panel.set(xlabel="", ylabel="")
    _legend(figure, panels, data(analyses))
    return figure
