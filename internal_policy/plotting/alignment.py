"""Fig. 5 of the paper (arXiv 2512.19673v3): what internal policy alignment does, on fixed responses.

    alignment_dynamics(run).savefig("fig5.pdf")

Nothing here needs a model or torch.
"""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from internal_policy.analysis.figure_data import OneOrMany
from internal_policy.bupo.run import Run, last_alignment_step, why_no_dynamics
from internal_policy.plotting import marks as drawing
from internal_policy.plotting import style
from internal_policy.utils.errors import UserError
from internal_policy.utils.palette import LOOKS

SWITCH_LABEL = "end of alignment"
SWITCH: dict[str, Any] = {"linewidth": 0.7, "linestyle": style.DASHES[LOOKS["switch"].dash]}
MEAN_LABEL = "mean of later layers"
MOST_STEPS = 16
"""At most so many measurements are drawn over the layers; more than the eye can tell apart by colour."""

_ROUND_STEPS = (1, 2, 2.5, 5, 10)


def alignment_dynamics(
    run: Run, *, ax: OneOrMany[Axes] | None = None, label: str | None = None, color: Any = None
) -> Figure:
    """Draw fig. 5: what training does to layer l, to the layers after it, and to pi_theta, on fixed responses.

    (a) cosine of H^l with each later layer, a line a measurement (`MOST_STEPS` at most, half of them while pi^l is
    aligned), or over the steps where there is a single later layer; (b) dH_Layer^l; (c) perplexity of pi_theta;
    (d) KL(pi^l || pi^m), a line a later layer m, and their mean. There are no intervals: the responses are the same at
    every step, so that how much they differ says nothing about how a curve moves. (c) and (d) have a logarithmic axis
    where they span more than a factor of twenty.

    Args:
        run: A run of a layer that has layers above it, with measurements of its dynamics.
        ax: Where to draw, for (a) to (d); without it a figure with a legend is made.
        label: What to call the run, in place of its model and method.
        color: Of the curves that are not coloured by step or layer.

    Returns:
        The figure.

    Raises:
        UserError: The run has no such measurements, there are not four axes, or the colour is none.
    """
    if why := why_no_dynamics(run):
        raise UserError(why)
    figure = None
    if ax is None:
        figure, columns = style.panel_grid(2, n_stacked=2, panel_height=1.4)
        axes = [columns[0][0], columns[1][0], columns[0][1], columns[1][1]]
    else:
        axes = drawing.panels_of(ax, 4, "one for each of (a) to (d)")
    similarity, change, perplexity, divergence = axes
    table, later = run.dynamics.sort_values("step"), run.dynamics_layers.sort_values("step")
    layer, layers = int(table["layer"].iloc[0]), np.unique(later["layer"])
    (own,) = drawing.colors_for(color, 1, "run")
    line_color = style.STREAM if own is None else own
    titles = ["(a) similarity to later layers", "(b) entropy change", "(c) perplexity", "(d) divergence"]
    with style.paper_style():
        if len(layers) == 1:
            titles[0] = "(a) similarity to the later layer"
            _plot_steps(similarity, later, "cosine", rf"Cosine of $H^{{{layer}}}$ and $H^{{{layers[0]}}}$", line_color)
            kl_label = rf"KL$(\pi^{{{layer}}}\,\Vert\,\pi^{{{layers[0]}}})$ (nats)"
            _plot_steps(divergence, table, "kl_mean", kl_label, line_color)
            _log_where_wide(divergence, table["kl_mean"])
        else:
            _plot_similarity(similarity, run, layer)
            _plot_divergence(divergence, run, table, layer, line_color)
        _plot_steps(change, table, "change", rf"$\Delta H_{{\mathrm{{Layer}}}}^{{\,{layer}}}$ (nats)", line_color)
        low, high = change.get_ylim()
        if low < 0 < high:
            drawing.zero_line(change)
        _plot_steps(perplexity, table, "perplexity", r"Perplexity of $\pi_\theta$", line_color)
        _log_where_wide(perplexity, table["perplexity"])
        for panel, title in zip(axes, titles, strict=True):
            style.set_title(panel, title)
        for panel in axes if len(layers) == 1 else axes[1:]:
            mark_switch(panel, run, label=SWITCH_LABEL)
        if figure is None:
            return style.root_figure(similarity)
        style.figure_legend(figure, axes, (MEAN_LABEL, SWITCH_LABEL))
        name = f"{short_name(run.name)}: {run.label}" if label is None else label
        for legend in figure.legends:
            legend.set_title(name)
        if not figure.legends:
            figure.suptitle(name, parse_math=False)
    return figure


def short_name(name: str) -> str:
    """Return the end of a model's name, which tells most; an embedded model keeps the whole."""
    whole = name.strip("/")
    return whole if whole.startswith(drawing.EMBEDDED) else whole.split("/")[-1]


def mark_switch(
    ax: Axes, run: Run, *, after: float = 0.0, color: str = style.NEUTRAL, label: str | None = None
) -> None:
    """Draw the line where alignment ended.

    Args:
        ax: The panel, over the steps.
        run: The run.
        after: How far after the last step of alignment; measurements are taken after a step, rewards within it.
        color: Of the line.
        label: For the legend.
    """
    steps = last_alignment_step(run)
    if steps is not None:
        ax.axvline(steps + after, color=color, label=label, zorder=1.5, **SWITCH)


def set_step_axis(ax: Axes) -> None:
    """Give a panel whole steps, and round ticks on both axes."""
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3, steps=_ROUND_STEPS))


def _plot_steps(ax: Axes, table: pd.DataFrame, column: str, y_label: str, color: Any) -> None:
    # Beyond so many the marks would hide the line.
    marker = "o" if len(table) <= 60 else None
    ax.plot(table["step"], table[column], color=color, marker=marker, markersize=2, zorder=2.5)
    ax.set(xlabel="Step", ylabel=y_label)
    set_step_axis(ax)


def _plot_similarity(ax: Axes, run: Run, layer: int) -> None:
    table, switch = run.dynamics_layers, last_alignment_step(run)
    ax.set(xlabel="Later layer $m$", ylabel=rf"Cosine of $H^{{{layer}}}$ and $H^m$")
    steps, layers = np.unique(table["step"]), np.unique(table["layer"])
    first, last = int(steps[0]), int(steps[-1])
    norm = Normalize(first, max(last, first + 1))
    chosen = _spread(steps, MOST_STEPS)
    if switch is not None and first < switch < last:
        # Alignment is short: on an even scale it would be one colour, and perhaps one line.
        norm = TwoSlopeNorm(switch, first, last)
        parts = (_spread(part, MOST_STEPS // 2) for part in (steps[steps <= switch], steps[steps > switch]))
        chosen = np.concatenate(list(parts))
    colours = _colours("viridis", 0.0, 0.92)
    marker = "o" if len(layers) < 4 else None
    for step in chosen:
        rows = table[table["step"] == step].sort_values("layer")
        ax.plot(rows["layer"], rows["cosine"], color=colours(norm(step)), marker=marker, linewidth=0.8)
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ax.xaxis.set_major_locator(_layer_ticks(layers))
    ax.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3, steps=_ROUND_STEPS))
    bar = _colour_bar(ax, norm, colours, "Step")
    if isinstance(norm, TwoSlopeNorm):
        bar.set_ticks([first, *([round((first + norm.vcenter) / 2)] * (norm.vcenter > 7)), norm.vcenter, last])
        bar.ax.axhline(norm.vcenter, color="white", **SWITCH)
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def _plot_divergence(ax: Axes, run: Run, table: pd.DataFrame, layer: int, color: Any) -> None:
    later = run.dynamics_layers
    ax.set(xlabel="Step", ylabel=rf"KL$(\pi^{{{layer}}}\,\Vert\,\pi^m)$ (nats)")
    layers = np.unique(later["layer"])
    colours = _colours("YlOrBr", 0.4, 0.9)
    norm = BoundaryNorm(np.arange(layers[0], layers[-1] + 2) - 0.5, colours.N)
    for m in layers:
        rows = later[later["layer"] == m].sort_values("step")
        ax.plot(rows["step"], rows["kl"], color=colours(norm(m)), linewidth=0.7)
    bar = _colour_bar(ax, norm, colours, "Later layer $m$")
    bar.ax.yaxis.set_major_locator(_layer_ticks(layers))
    bar.ax.minorticks_off()
    ax.plot(table["step"], table["kl_mean"], color=color, linewidth=1.4, label=MEAN_LABEL, zorder=3)
    set_step_axis(ax)
    _log_where_wide(ax, later["kl"])


def _spread(steps: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """At most so many steps, evenly chosen, with the first and the last."""
    chosen: npt.NDArray[Any] = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), most)).round().astype(int))
    spread: npt.NDArray[Any] = steps[chosen]
    return spread


def _layer_ticks(layers: npt.NDArray[Any]) -> Locator:
    if len(layers) <= 6:
        return FixedLocator(layers.tolist())
    return MaxNLocator(7, integer=True, steps=[1, 2, 5, 10])


def _colours(name: str, low: float, high: float) -> Colormap:
    """A sequential colour map without the end that is lost on white paper."""
    return LinearSegmentedColormap.from_list(f"{name}_part", mpl.colormaps[name](np.linspace(low, high, 256)))


def _colour_bar(ax: Axes, norm: Normalize, colours: Colormap, label: str) -> Colorbar:
    bar = style.root_figure(ax).colorbar(ScalarMappable(norm, colours), ax=ax, pad=0.02, aspect=14)
    bar.set_label(label)
    bar.outline.set_linewidth(0.6)
    return bar


def _log_where_wide(ax: Axes, values: pd.Series) -> None:
    """A logarithmic axis for what spans more than a factor of twenty: a collapse would hide all that came before."""
    finite = values[np.isfinite(values)]
    span = finite.max() / finite.min() if len(finite) and finite.min() > 0 else 1.0
    if span > 20:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
