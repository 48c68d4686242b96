"""The paper's figures of an analysis (arXiv 2512.19673v3, figs. 1c, 2, 3 and 12), and the numbers in them as tables.

    figure = entropy_flow([analysis])            # fig. 2; one panel a model
    numbers = entropy_flow_data([analysis])      # exactly what it draws
    plot_entropy_change(analysis, "ffn", ax=ax)  # one panel, on your own axes

A `plot_*` function draws one panel for one model and returns its axes (`.figure` shows or saves it); the function
without `plot_` lays one out for each model. Bands are 95% intervals. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from internal_policy import figure_marks as drawing
from internal_policy import style
from internal_policy.figure_data import (
    SITE_LABELS,
    ModuleSite,
    baseline_data,
    entropy_change_data,
    entropy_flow_data,
    policy_gap,
    require_some,
    residual_cosine_data,
    stage_sketch_data,
)

if TYPE_CHECKING:
    from internal_policy.results import Analysis

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
    "save_all",
    "stage_sketch",
    "stage_sketch_data",
]

POLICY_LABEL, UNIFORM_LABEL = "policy $\\pi_\\theta$", "uniform, $\\ln V$"
LEGEND_ORDER = (
    *("input", "ATTN", "FFN", "output", *style.STAGE_COLOURS, "boundary layer", POLICY_LABEL, UNIFORM_LABEL),
    drawing.BASELINE_LABEL,
)


def plot_entropy_flow(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """Draw one panel of fig. 2: each layer's entropies at its input, ATTN, FFN and output, in order.

    Args:
        analysis: The model's analysis.
        ax: Where to draw; without it a figure of its own with a legend is made.

    Returns:
        The axes.
    """
    if ax is None:
        return entropy_flow([analysis]).axes[0]
    frame = entropy_flow_data([analysis])
    with style.paper_style():
        modules = frame[frame["point"].isin(["input", "ATTN", "FFN", "output"])].sort_values("position")
        ax.plot(modules["position"], modules["entropy"], color=style.NEUTRAL, linewidth=0.4, alpha=0.6, zorder=1.5)
        stream = modules[modules["point"].isin(["input", "output"])]
        drawing.line(ax, stream, "position", "entropy", color=style.STREAM, linewidth=0.8)
        marks: dict[str, Any] = {"color": style.STREAM, "marker": "o", "linestyle": "none", "markeredgewidth": 0.4}
        for point, fill in (("input", "white"), ("output", style.STREAM)):
            rows = modules[modules["point"] == point]
            marks |= {"markerfacecolor": fill, "markersize": drawing.marker_size(rows), "label": point}
            ax.plot(rows["position"], rows["entropy"], zorder=3, **marks)
        for site, label in SITE_LABELS.items():
            drawing.line(
                ax, modules[modules["point"] == label], "position", "entropy", label=label, **drawing.SITE_MARKS[site]
            )
        policy = frame[frame["point"] == "policy"]
        ends = [policy["entropy"] - policy["low"], policy["high"] - policy["entropy"]]
        error = None if policy["low"].isna().all() else ends
        marks = {"color": style.POLICY, "linestyle": "none", "marker": "*", "ms": 6, "mec": style.STREAM, "mew": 0.4}
        ax.errorbar(policy["position"], policy["entropy"], error, label=POLICY_LABEL, **marks)
        uniform = float(frame.loc[frame["point"] == "uniform", "entropy"].iloc[0])
        ax.axhline(uniform, color=style.NEUTRAL, linewidth=0.6, linestyle=":", label=UNIFORM_LABEL, zorder=1)
        drawing.baseline(ax, analysis, "layer", "entropy", offset=0.375)
        gap = policy_gap(analysis.n_layers)
        style.set_layer_axis(ax, analysis.n_layers, (0.375 + gap / 4, 0.5 + gap))
        low, high = ax.get_ylim()
        # Zero is where a policy is certain and ln V where it knows nothing; room beyond keeps the marks there whole.
        ax.set_ylim(min(low, -0.03 * high), max(high, 1.04 * uniform))
        drawing.label(ax, analysis, "Entropy (nats)")
    return ax


def plot_entropy_change(analysis: Analysis, site: ModuleSite = "ffn", ax: Axes | None = None) -> Axes:
    """Draw one panel of fig. 3: the entropy change that a module makes, over the layers.

    Args:
        analysis: The model's analysis.
        site: `attn` (eq. 12) or `ffn` (eq. 13); the stages, which eq. 13 defines, are shown for `ffn`.
        ax: Where to draw; without it a figure of its own with a legend is made.

    Returns:
        The axes.
    """
    if ax is None:
        figure, axes = style.panel_grid(1)
        plot_entropy_change(analysis, site, axes[0][0])
        _legend(figure, axes[0], entropy_change_data([analysis]))
        return axes[0][0]
    frame = entropy_change_data([analysis])
    rows = frame[frame["site"] == site]
    with style.paper_style():
        drawing.zero_line(ax)
        drawing.line(ax, rows, "layer", "change", label=SITE_LABELS[site], **drawing.SITE_MARKS[site])
        drawing.baseline(ax, analysis, site, "change")
        style.set_layer_axis(ax, analysis.n_layers)
        boundary = rows.loc[rows["boundary"], "layer"]
        for layer in boundary:
            ax.axvline(layer, color="0.25", linewidth=0.6, linestyle="-.", label="boundary layer", zorder=2)
        if site == "ffn":
            drawing.shade_stages(ax, rows)
            drawing.name_boundary(ax, int(boundary.iloc[0]) if len(boundary) else None, analysis.n_layers)
        drawing.label(ax, analysis, rf"$\Delta H_{{\mathrm{{{SITE_LABELS[site]}}}}}^{{\,l}}$ (nats)")
    return ax


def plot_residual_cosine(analysis: Analysis, ax: Axes | None = None) -> Axes:
    """Draw one panel of fig. 12: the cosine similarity of each module's write with the residual stream.

    Args:
        analysis: The model's analysis.
        ax: Where to draw; without it a figure of its own with a legend is made.

    Returns:
        The axes.
    """
    if ax is None:
        return residual_cosine([analysis]).axes[0]
    frame = residual_cosine_data([analysis])
    with style.paper_style():
        drawing.zero_line(ax)
        for site, label in SITE_LABELS.items():
            drawing.line(ax, frame[frame["site"] == site], "layer", "cosine", label=label, **drawing.SITE_MARKS[site])
        style.set_layer_axis(ax, analysis.n_layers)
        drawing.label(ax, analysis, "Cosine similarity")
    return ax


def entropy_flow(analyses: Sequence[Analysis], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw fig. 2, a panel for each model.

    Args:
        analyses: One analysis for each panel.
        axes: Where to draw, one for each analysis; without it a figure with a legend is made.

    Returns:
        The figure.
    """
    return _one_row(analyses, plot_entropy_flow, entropy_flow_data, axes)


def entropy_change(analyses: Sequence[Analysis], *, axes: Sequence[Sequence[Axes]] | None = None) -> Figure:
    """Draw fig. 3, for each model the change that ATTN makes (top) and that FFN makes (bottom).

    Args:
        analyses: One analysis for each column of panels.
        axes: Where to draw: the top panels and the bottom panels, one of each for each analysis; without it a figure
            with a legend is made.

    Returns:
        The figure.
    """
    require_some(analyses)
    if axes is not None:
        for analysis, *pair in zip(analyses, *axes, strict=True):
            for site, ax in zip(SITE_LABELS, pair, strict=True):
                plot_entropy_change(analysis, site, ax)
        return style.root_figure(axes[0][0])
    figure, columns = style.panel_grid(len(analyses), n_stacked=2, panel_height=1.12)
    n_columns = style.grid_shape(len(analyses))[1]
    for panel, (analysis, column) in enumerate(zip(analyses, columns, strict=True)):
        for site, ax in zip(SITE_LABELS, column, strict=True):
            plot_entropy_change(analysis, site, ax)
            ax.set_xlabel("")
            if panel % n_columns:
                ax.set_ylabel("")
        column[0].tick_params(labelbottom=False)
        column[1].set_title("")
    with style.paper_style():
        drawing.set_titles([column[0] for column in columns], analyses)
        figure.supxlabel("Layer")
        figure.align_ylabels()
    _legend(figure, [ax for column in columns for ax in column], entropy_change_data(analyses))
    return figure


def residual_cosine(analyses: Sequence[Analysis], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw fig. 12, a panel for each model.

    Args:
        analyses: One analysis for each panel.
        axes: Where to draw, one for each analysis; without it a figure with a legend is made.

    Returns:
        The figure.
    """
    return _one_row(analyses, plot_residual_cosine, residual_cosine_data, axes)


def stage_sketch(analyses: Sequence[Analysis], *, ax: Axes | None = None) -> Axes:
    """Draw fig. 1c as a sketch: for each model a strip of its layers, coloured by stage, with the boundary layer.

    Args:
        analyses: One analysis for each strip.
        ax: Where to draw; without it a figure of its own with a legend is made.

    Returns:
        The axes.
    """
    frame = stage_sketch_data(analyses)
    own = ax is None
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1, panel_height=(0.36 * len(analyses) + 0.3) / 1.4)
    with style.paper_style():
        for (panel, rows), name in zip(frame.groupby("panel"), drawing.short_names(analyses), strict=True):
            drawing.stage_strip(ax, rows, float(str(panel)), name)
        ax.set(xlim=(0, 1), ylim=(len(analyses) + 0.4, 0.3), yticks=[], xlabel="Relative depth $l/L$")
        ax.spines["left"].set_visible(False)
        if own:
            style.figure_legend(figure, [ax], LEGEND_ORDER)
    return ax


def save_all(analyses: Sequence[Analysis], directory: Path) -> list[Path]:
    """Write figs. 2, 3 and 12 as PNG and PDF. The same analyses give the same bytes.

    Args:
        analyses: One analysis for each model.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    stems = ("fig2_entropy_flow", "fig3_entropy_change", "fig12_residual_cosine")
    drawings = (entropy_flow(analyses), entropy_change(analyses), residual_cosine(analyses))
    return [
        p for stem, figure in zip(stems, drawings, strict=True) for p in style.save_figure(figure, directory / stem)
    ]


def _legend(figure: Figure, axes: Sequence[Axes], frame: pd.DataFrame) -> None:
    band = [Patch(color=style.NEUTRAL, alpha=0.35, linewidth=0, label="95% interval")]
    with style.paper_style():
        style.figure_legend(figure, axes, LEGEND_ORDER, band if frame["low"].notna().any() else [])


def _one_row(
    analyses: Sequence[Analysis],
    plot: Callable[[Analysis, Axes], Axes],
    data: Callable[[Sequence[Analysis]], pd.DataFrame],
    axes: Sequence[Axes] | None,
) -> Figure:
    """Draw one panel for each analysis, with the labels that all share and a legend if the figure is our own."""
    require_some(analyses)
    if axes is not None:
        for analysis, ax in zip(analyses, axes, strict=True):
            plot(analysis, ax)
        return style.root_figure(axes[0])
    figure, columns = style.panel_grid(len(analyses))
    panels = [column[0] for column in columns]
    for analysis, ax in zip(analyses, panels, strict=True):
        plot(analysis, ax)
    with style.paper_style():
        drawing.set_titles(panels, analyses)
        figure.supxlabel(panels[0].get_xlabel())
        figure.supylabel(panels[0].get_ylabel())
    for ax in panels:
        ax.set(xlabel="", ylabel="")
    _legend(figure, panels, data(analyses))
    return figure
