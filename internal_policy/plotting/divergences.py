"""How far the policy of each layer is from the final one and from the others (``--divergences``).

    figure = layer_divergences(analysis)     # KL(pi_theta || pi^l), KL(pi^l || pi^(l+1)), agreement of the top tokens
    figure = divergence_matrix(analysis)     # KL(pi^l || pi^m) of all pairs of layers

Divergences span several orders of magnitude, so that they are drawn on logarithmic scales; a divergence of 0, such as
that of the last layer under the logit lens, is not drawn. Nothing here needs a model or torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, PercentFormatter

from internal_policy.analysis.figure_data import (
    OneOrMany,
    divergence_data,
    divergence_matrix_data,
    listed,
    require_some,
)
from internal_policy.plotting import marks, style
from internal_policy.plotting.scales import label_decades
from internal_policy.utils.palette import LOOKS

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

__all__ = [
    "divergence_data",
    "divergence_matrix",
    "divergence_matrix_data",
    "layer_divergences",
    "plot_divergence_matrix",
    "plot_layer_divergences",
    "plot_top1_agreement",
    "save_divergence_figures",
]

LABELS = {
    "kl_policy": r"$\mathrm{KL}(\pi_\theta \,\Vert\, \pi^l)$",
    "kl_next": r"$\mathrm{KL}(\pi^l \,\Vert\, \pi^{l+1})$",
}
AGREEMENT_LABEL = "Same top token\nas $\\pi_\\theta$"
_LOOKS = {"kl_policy": LOOKS["policy"], "kl_next": LOOKS["stream"], "top1": LOOKS["policy"]}
_BAR_PAD = 0.02
"""Between the panels and the colour bar, as a share of the figure's width."""
_LOWEST = 1e-4
"""Nats that are drawn at least: float32 does not resolve much less."""


@style.paper_style()
def plot_layer_divergences(
    analysis: Analysis, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw KL(pi_theta || pi^l) and KL(pi^l || pi^(l+1)) over the layers, on a logarithmic scale.

    Args:
        analysis: The model's analysis, measured with ``--divergences``.
        ax: Where to draw, also over another analysis; by default a new figure with a legend.
        label: Name of the analysis in the legend, needed where several share a panel.
        color: Colour of its lines, whose markers distinguish them.

    Returns:
        The axes.

    Raises:
        UserError: The analysis has no divergences.
    """
    return _plot(analysis, ("kl_policy", "kl_next"), ax, label, color)


@style.paper_style()
def plot_top1_agreement(
    analysis: Analysis, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw over the layers in which share of the tokens pi^l and pi_theta have the same most probable token.

    Args:
        analysis: The model's analysis, measured with ``--divergences``.
        ax: Where to draw, also over another analysis; by default a new figure with a legend.
        label: Name of the analysis in the legend, needed where several share a panel.
        color: Colour of its line.

    Returns:
        The axes.

    Raises:
        UserError: The analysis has no divergences.
    """
    return _plot(analysis, ("top1",), ax, label, color)


def _plot(analysis: Analysis, quantities: tuple[str, ...], ax: Axes | None, label: str | None, color: Any) -> Axes:
    frame, figure = divergence_data(analysis), None
    frame = frame[frame["quantity"].isin(quantities)]
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1)
    (own,), first = marks.check_colors(color, 1, "analysis"), marks.is_first(ax)
    shares = quantities == ("top1",)
    for quantity in quantities:
        rows = frame[frame["quantity"] == quantity]
        if not shares:
            rows = rows.assign(low=rows["low"].clip(_LOWEST)).where(rows["value"] >= _LOWEST)
        # The panel of the agreement has one line, which its axis names.
        name = label if shares else ", ".join(filter(None, (label, LABELS[quantity])))
        look = marks.with_color(style.marker_style(_LOOKS[quantity]), own)
        # A star needs more room than a circle to be seen as one.
        size = marks.marker_size(frame) * (1.6 if look["marker"] == "*" else 1.0)
        marks.line(ax, rows, "layer", "value", label=name, markersize=size, markeredgewidth=0.0, **look)
    if first:
        style.set_layer_axis(ax, analysis.n_layers)
        ax.set_xlabel("Layer")
        ax.set_ylabel(AGREEMENT_LABEL if shares else "Divergence (nats)", linespacing=1.0)
        if shares:
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            ax.set_yscale("log")
            label_decades(ax.yaxis, *ax.get_ylim())
        marks.set_titles([ax], [analysis], label)
    if figure is not None:
        style.figure_legend(figure, [ax], tuple(LABELS.values()), band=bool(frame["low"].notna().any()))
    return ax


@style.paper_style()
def layer_divergences(
    analyses: OneOrMany[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw the divergences and the agreement of the top tokens: side by side for one model, else in a column for each.

    Args:
        analyses: One analysis, or one for each column, measured with ``--divergences``.
        ax: Where to draw: a panel of divergences for each of n analyses, then the panels of the agreement; by default a
            new figure with a legend.
        label: Title of the model's panels, or of each model's.
        color: Colour of the lines, or of those of each model.

    Returns:
        The figure.

    Raises:
        UserError: An analysis has no divergences, or the number of axes, labels or colours does not fit.
    """
    given, figure = listed(analyses), None
    require_some(given)
    n = len(given)
    if ax is not None:
        panels = marks.check_axes(ax, 2 * n, f"the divergences' for each of {n} analyses, then the agreement's")
    elif n == 1:
        figure = style.new_figure(style.TWO_COLUMNS, 2.3, space=0.04)
        panels = list(figure.subplots(1, 2))
    else:
        figure, columns = style.panel_grid(n, n_stacked=2, panel_height=1.2)
        panels = [column[k] for k in (0, 1) for column in columns]
    top, bottom = panels[:n], panels[n:]
    for analysis, kl, agreement, own in zip(given, top, bottom, marks.check_colors(color, n, "analyses"), strict=True):
        plot_layer_divergences(analysis, kl, color=own)
        plot_top1_agreement(analysis, agreement, color=own)
    marks.set_titles(top, given, label)
    marks.set_titles(bottom, given, label)
    if figure is None:
        return style.root_figure(panels[0])
    if n > 1:
        n_columns = style.grid_shape(n)[1]
        for place, pair in enumerate(zip(top, bottom, strict=True)):
            for panel in pair:
                panel.set_xlabel("")
                if place % n_columns:
                    panel.set_ylabel("")
            pair[0].tick_params(labelbottom=False)
            pair[1].set_title("")
        figure.supxlabel("Layer")
        figure.align_ylabels()
    band = bool(divergence_data(given)["low"].notna().any())
    style.figure_legend(figure, panels, tuple(LABELS.values()), band=band)
    return figure


@style.paper_style()
def plot_divergence_matrix(
    analysis: Analysis,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: str | Colormap | None = None,
) -> Axes:
    """Draw KL(pi^l || pi^m) of all pairs of layers as a heat map on a logarithmic scale, layer 1 at the lower left.

    Args:
        analysis: The model's analysis, measured with ``--divergences``.
        ax: Where to draw; by default a new figure.
        label: Title of the panel.
        color: Colour map, or its name.

    Returns:
        The axes, with a colour bar next to them.

    Raises:
        UserError: The analysis has no divergences, or there is no such colour map.
    """
    if ax is None:
        return divergence_matrix(analysis, label=label, color=color).axes[0]
    table = _matrix(analysis)
    colormap = marks.check_colormap(color)
    _heat_map(ax, table, _norm([table]), colormap)
    bar = style.root_figure(ax).colorbar(ax.collections[0], ax=ax)
    label_decades(bar.ax.yaxis, *bar.ax.get_ylim())
    _set_matrix_axes(ax, analysis, label)
    return ax


@style.paper_style()
def divergence_matrix(
    analyses: OneOrMany[Analysis],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: str | Colormap | None = None,
) -> Figure:
    """Draw a heat map for each model, with one colour bar.

    Args:
        analyses: One analysis, or one for each panel, measured with ``--divergences``.
        ax: Where to draw, one axes for each analysis; by default a new figure.
        label: Title of the panel, or of each.
        color: Colour map, or its name.

    Returns:
        The figure.

    Raises:
        UserError: An analysis has no divergences, the number of axes or labels is not that of the analyses, or there is
            no such colour map.
    """
    given = listed(analyses)
    require_some(given)
    names = marks.check_labels(label, marks.short_names([a.name for a in given]), "analyses")
    if ax is not None:
        panels = marks.check_axes(ax, len(given), "one for each analysis")
        for analysis, panel, name in zip(given, panels, names, strict=True):
            plot_divergence_matrix(analysis, panel, label=name, color=color)
        return style.root_figure(panels[0])
    tables, colormap = [_matrix(analysis) for analysis in given], marks.check_colormap(color)
    n_rows, n_columns = style.grid_shape(len(given))
    width = style.ONE_COLUMN if len(given) == 1 else style.TWO_COLUMNS
    # Nearly square panels, with room for a colour bar on the right and for labels.
    side = (width - 0.75) / n_columns - 0.3
    figure = style.new_figure(width, n_rows * (side + 0.45) + 0.3)
    panels = [figure.add_subplot(n_rows, n_columns, k + 1) for k in range(len(given))]
    norm = _norm(tables)
    for analysis, table, panel in zip(given, tables, panels, strict=True):
        _heat_map(panel, table, norm, colormap)
        _set_matrix_axes(panel, analysis, None)
    marks.set_titles(panels, given, label)
    if len(given) > 1:
        style.share_labels(figure, panels)
    bar = figure.colorbar(panels[0].collections[0], ax=panels, fraction=0.05, pad=_BAR_PAD, aspect=20 * n_rows)
    # The layout makes no room for what is between the panels and a bar.
    cast(ConstrainedLayoutEngine, figure.get_layout_engine()).set(rect=(0.0, 0.0, 1.0 - _BAR_PAD, 1.0))
    bar.set_label(r"$\mathrm{KL}(\pi^l \,\Vert\, \pi^m)$ (nats)")
    bar.outline.set_linewidth(0.4)
    label_decades(bar.ax.yaxis, *bar.ax.get_ylim())
    return figure


def save_divergence_figures(analyses: OneOrMany[Analysis], directory: Path) -> list[Path]:
    """Write the figures of the divergences as PNG and PDF, if any analysis has them.

    Args:
        analyses: One analysis, or one for each model; those without divergences are left out.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    given = [analysis for analysis in listed(analyses) if "divergences" in analysis.additions]
    if not given:
        return []
    drawings = {"divergences": lambda: layer_divergences(given), "divergence_matrix": lambda: divergence_matrix(given)}
    return style.save_figures(directory, drawings)


def _matrix(analysis: Analysis) -> pd.DataFrame:
    """Return KL(pi^l || pi^m) with a row for each l and a column for each m, both from layer 1."""
    table = divergence_matrix_data(analysis).pivot_table(index="layer", columns="other", values="kl")
    # The diagonal is 0, which a logarithmic scale does not have.
    return table.mask(np.eye(len(table), dtype=bool)).clip(lower=_LOWEST)


def _norm(tables: list[pd.DataFrame]) -> LogNorm:
    values = np.concatenate([table.to_numpy().ravel() for table in tables])
    known = values[np.isfinite(values)]
    # A model of one layer has no pairs.
    low, high = (float(known.min()), float(known.max())) if len(known) else (_LOWEST, 1.0)
    return LogNorm(low, high if high > low else 10 * low)


def _heat_map(ax: Axes, table: pd.DataFrame, norm: LogNorm, colormap: Colormap) -> None:
    options: dict[str, Any] = {"cbar": False, "xticklabels": False, "yticklabels": False, "rasterized": True}
    sns.heatmap(table, ax=ax, norm=norm, cmap=colormap, **options)
    ax.set_facecolor("0.9")
    ax.spines[:].set_visible(True)


def _set_matrix_axes(ax: Axes, analysis: Analysis, label: str | None) -> None:
    n_layers = analysis.n_layers
    style.set_layer_axis(ax, n_layers, first=0.5)
    # The panel is nearly square, so that the ticks of one axis fit the other.
    ax.set_ylim(ax.get_xlim())
    ax.yaxis.set_major_locator(style.LayerLocator(n_layers, 0.5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y + 0.5:.0f}"))
    ax.tick_params(axis="y", labelrotation=0)
    ax.set(xlabel="Layer $m$", ylabel="Layer $l$")
    marks.set_titles([ax], [analysis], label)
