"""The paper's figures of training runs (arXiv 2512.19673v3, figs. 4, 5 and 7).

    figure = training_curves([bupo_run, grpo_run])     # fig. 4: reward, entropy and length against step
    numbers = training_curves_data([bupo_run])         # exactly what it draws
    alignment_dynamics(bupo_run).savefig("fig5.pdf")   # fig. 5, for one run

Single steps are thin lines with their trailing mean on top. Runs of one model that differ only in their seed are
averaged; from three seeds on, the mean has its 95% interval. Nothing here needs a model or torch.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, Locator, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from internal_policy.analysis.figure_data import FIRST_STEP, SMOOTH, OneOrMany, listed, trailing_mean, window_for
from internal_policy.bupo.run import last_alignment_step, why_no_dynamics
from internal_policy.plotting import marks, style
from internal_policy.utils import palette
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run

__all__ = [
    "alignment_dynamics",
    "policy_entropy_curves",
    "save_training_figures",
    "training_curves",
    "training_curves_data",
]

logger = logging.getLogger(__name__)

QUANTITIES = {"reward": "Reward", "policy_entropy": "Policy entropy (nats)", "length": "Response length (tokens)"}
"""Columns of a run's history in fig. 4, and the labels of their axes."""
MIN_SEEDS = 3
"""With two seeds a 95% interval extends 13 standard errors to each side: the seeds themselves are drawn instead."""
MAX_MEASUREMENTS = 16
"""Most measurements over the layers in fig. 5a; the eye cannot tell more apart by colour."""

SEED_LABEL, STEP_LABEL, START_LABEL = "each seed", "each step", "before any update"
MEAN_OF_STEPS, SWITCH_LABEL, MEAN_LABEL = "mean of the last {} steps", "end of alignment", "mean of later layers"
THIN: dict[str, Any] = {"linewidth": 0.4, "alpha": 0.6}
SWITCH: dict[str, Any] = {"linewidth": 0.7, "linestyle": style.DASHES[palette.LOOKS["switch"].dash]}
START: dict[str, Any] = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markeredgewidth": 0.6}
"""How step 1 is marked, which no mean reaches back to."""
_START_SIZES = (5.0, 3.5, 2.0)
_ROUND_STEPS = (1, 2, 2.5, 5, 10)


def training_curves_data(
    runs: OneOrMany[Run], quantities: Sequence[str] = tuple(QUANTITIES), *, smooth: int = SMOOTH
) -> pd.DataFrame:
    """Return the numbers of figs. 4 and 7.

    Args:
        runs: One run or several; those of one model that differ in nothing else are seeds.
        quantities: Columns of the runs' histories.
        smooth: Steps of the trailing mean, which is taken in each run before the mean over seeds. It never reaches back
            to step 1, which was sampled before any update. With 1, or in runs too short for two means, there is none.

    Returns:
        A row for each model, label, quantity and step that has a value: `raw`, that step's mean over the seeds; `mean`,
        the same of the trailing means, with `low` and `high` (95% t interval, NaN below `MIN_SEEDS`); and the number
        of `seeds`.

    Raises:
        UserError: There is no run, or `smooth` is below 1.
    """
    labelled = _with_settings(_checked(runs, smooth))
    return _curve_data(labelled, quantities, _window(labelled, smooth))


def training_curves(
    runs: OneOrMany[Run],
    *,
    smooth: int = SMOOTH,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 4: reward, entropy of pi_theta and response length against the step, a row of panels for each model.

    A dashed line in a run's colour marks where its internal policy alignment ended.

    Args:
        runs: One run or several; those of one model that differ in nothing else are seeds.
        smooth: Steps of the trailing mean that is drawn over the single steps, see `training_curves_data`.
        ax: Where to draw, three axes for each model; by default a new figure with a legend.
        label: Name of the run, or of each, in place of its method.
        color: Colour of the curve, or of each in the order of the legend.

    Returns:
        The figure.

    Raises:
        UserError: There is no run, `smooth` is below 1, or the number of axes, labels or colours does not fit.
    """
    return _curves(runs, QUANTITIES, smooth, ax, label, color)


def policy_entropy_curves(
    runs: OneOrMany[Run],
    *,
    smooth: int = SMOOTH,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 7: the entropy of pi_theta against the step, a panel for each model.

    Args:
        runs: One run or several; those of one model that differ in nothing else are seeds.
        smooth: Steps of the trailing mean that is drawn over the single steps, see `training_curves_data`.
        ax: Where to draw, one axes for each model; by default a new figure with a legend.
        label: Name of the run, or of each, in place of its method.
        color: Colour of the curve, or of each in the order of the legend.

    Returns:
        The figure.

    Raises:
        UserError: There is no run, `smooth` is below 1, or the number of axes, labels or colours does not fit.
    """
    return _curves(runs, {"policy_entropy": QUANTITIES["policy_entropy"]}, smooth, ax, label, color)


@style.paper_style()
def alignment_dynamics(
    run: Run, *, ax: OneOrMany[Axes] | None = None, label: str | None = None, color: Any = None
) -> Figure:
    """Draw fig. 5: what training does to layer l, to the layers after it, and to pi_theta, on fixed responses.

    (a) cosine of H^l with each later layer, a line for each measurement (at most `MAX_MEASUREMENTS`, half of them
    during alignment), or over the steps where there is a single later layer; (b) dH_Layer^l; (c) perplexity of
    pi_theta; (d) KL(pi^l || pi^m), a line for each later layer m, and their mean. There are no intervals: the responses
    are the same at every step, so their spread does not say how much a curve may move. (c) and (d) have a logarithmic
    axis where they span more than a factor of twenty.

    Args:
        run: A run of a layer that has layers above it, with measurements of its dynamics.
        ax: Where to draw, for (a) to (d); by default a new figure with a legend.
        label: Name of the run, in place of its model and method.
        color: Colour of the curves that are not coloured by step or layer.

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
        axes = marks.check_axes(ax, 4, "one for each of (a) to (d)")
    similarity, change, perplexity, divergence = axes
    table, later = run.dynamics.sort_values("step"), run.dynamics_layers.sort_values("step")
    layer, layers = int(table["layer"].iloc[0]), np.unique(later["layer"])
    (own,) = marks.check_colors(color, 1, "run")
    line_color = style.STREAM if own is None else own
    titles = ["(a) similarity to later layers", "(b) entropy change", "(c) perplexity", "(d) divergence"]
    if len(layers) == 1:
        titles[0] = "(a) similarity to the later layer"
        _plot_steps(similarity, later, "cosine", rf"Cosine of $H^{{{layer}}}$ and $H^{{{layers[0]}}}$", line_color)
        kl_label = rf"KL$(\pi^{{{layer}}}\,\Vert\,\pi^{{{layers[0]}}})$ (nats)"
        _plot_steps(divergence, table, "kl_mean", kl_label, line_color)
        _use_log_if_wide(divergence, table["kl_mean"])
    else:
        _plot_similarity(similarity, run, layer)
        _plot_divergence(divergence, run, table, layer, line_color)
    _plot_steps(change, table, "change", rf"$\Delta H_{{\mathrm{{Layer}}}}^{{\,{layer}}}$ (nats)", line_color)
    low, high = change.get_ylim()
    if low < 0 < high:
        marks.zero_line(change)
    _plot_steps(perplexity, table, "perplexity", r"Perplexity of $\pi_\theta$", line_color)
    _use_log_if_wide(perplexity, table["perplexity"])
    for panel, title in zip(axes, titles, strict=True):
        style.set_title(panel, title)
    for panel in axes if len(layers) == 1 else axes[1:]:
        _mark_switch(panel, run, label=SWITCH_LABEL)
    if figure is None:
        return style.root_figure(similarity)
    style.figure_legend(figure, axes, (MEAN_LABEL, SWITCH_LABEL))
    name = f"{marks.short_name(run.name)}: {run.label}" if label is None else label
    for legend in figure.legends:
        legend.set_title(name)
    if not figure.legends:
        figure.suptitle(name, parse_math=False)
    return figure


def save_training_figures(runs: Sequence[Run], directory: Path, *, smooth: int = SMOOTH) -> list[Path]:
    """Write figs. 4 and 7 of all runs, and fig. 5 of each that has one, as PNG and PDF.

    Args:
        runs: The runs.
        directory: Where to write; made if it is missing.
        smooth: Steps of the trailing mean in figs. 4 and 7.

    Returns:
        The paths written.

    Raises:
        UserError: There is no run, or `smooth` is below 1.
    """
    drawings = {
        "fig4_training": partial(training_curves, runs, smooth=smooth),
        "fig7_policy_entropy": partial(policy_entropy_curves, runs, smooth=smooth),
    }
    for run in runs:
        if why := why_no_dynamics(run):
            # A run without measurements was made without the option for them.
            if not run.dynamics.empty:
                logger.warning("%s", why)
            continue
        words = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{run.name.split('/')[-1]} {run.label}").strip("-").lower()[:100]
        stems = (f"fig5_alignment_{words}{f'_{number}' if number > 1 else ''}" for number in count(1))
        drawings[next(stem for stem in stems if stem not in drawings)] = partial(alignment_dynamics, run)
    return style.save_figures(directory, drawings)


class _LabelledRun:
    """A run with the label that distinguishes it from the others in the figure."""

    def __init__(self, run: Run | _LabelledRun, label: str) -> None:
        self._run, self.label = run, label

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def _with_settings(runs: Sequence[Run], label: OneOrMany[str] | None = None) -> list[Any]:
    """Add to each label the settings in which runs of that label differ, since only seeds may be averaged."""
    labels = marks.check_labels(label, [run.label for run in runs], "runs")
    names = [(run.name, text) for run, text in zip(runs, labels, strict=True)]
    labelled = []
    for run, name in zip(runs, names, strict=True):
        alike = [other.setting for other, its in zip(runs, names, strict=True) if its == name]
        keys = sorted({k for setting in alike for k in setting if any(o.get(k) != setting[k] for o in alike)})
        labelled.append(_LabelledRun(run, name[1] + "".join(f", {key} {run.setting.get(key)}" for key in keys)))
    return labelled


def _groups(runs: Sequence[Any]) -> dict[tuple[str, str], list[Any]]:
    groups: dict[tuple[str, str], list[Any]] = {}
    for run in runs:
        groups.setdefault((run.name, run.label), []).append(run)
    return groups


def _checked(runs: OneOrMany[Run], smooth: int) -> list[Run]:
    given = listed(runs)
    if not given:
        raise UserError("there is no run to draw; give at least one")
    if smooth < 1:
        raise UserError(f"smooth is {smooth}; needed is a number of steps from 1")
    return given


def _window(runs: Sequence[Any], smooth: int) -> int:
    return window_for(max(len(run.history) for run in runs), smooth)


def _curve_data(runs: Sequence[Any], quantities: Sequence[str], window: int) -> pd.DataFrame:
    from scipy.stats import t as scipy_t

    parts = []
    for (name, label), seeds in _groups(runs).items():
        for quantity in quantities:
            steps = [_steps_of(run.history, quantity) for run in seeds]
            raw = pd.concat(steps, axis=1).dropna(how="all").sort_index()
            wide = pd.concat([trailing_mean(values, window) for values in steps], axis=1).reindex(raw.index)
            n, mean = wide.notna().sum(axis=1), wide.mean(axis=1)
            enough = n.where(n >= MIN_SEEDS)
            half = scipy_t.ppf(0.975, enough - 1) * wide.std(axis=1) / np.sqrt(enough)
            ends = {"low": mean - half, "high": mean + half, "seeds": n}
            part = pd.DataFrame({"step": wide.index, "raw": raw.mean(axis=1), "mean": mean, **ends})
            parts.append(part.astype({"step": int}).assign(model=name, label=label, quantity=quantity))
    order = ["model", "label", "quantity", "step", "raw", "mean", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True)[order]


def _steps_of(history: pd.DataFrame, quantity: str) -> pd.Series:
    if quantity not in history.columns:
        return pd.Series(dtype=float, index=pd.Index([], dtype=int))
    return history.set_index("step")[quantity].astype(float).sort_index()


@style.paper_style()
def _curves(
    given: OneOrMany[Run],
    quantities: dict[str, str],
    smooth: int,
    ax: OneOrMany[Axes] | None,
    label: OneOrMany[str] | None,
    color: Any,
) -> Figure:
    runs = _with_settings(_checked(given, smooth), label)
    window = _window(runs, smooth)
    frame = _curve_data(runs, tuple(quantities), window)
    models = list(dict.fromkeys(run.name for run in runs))
    looks = _line_styles(list(dict.fromkeys(run.label for run in runs)), color)
    titles = [marks.short_name(model) for model in models]
    titles = titles if len(set(titles)) == len(models) else models
    figure = None
    if ax is None:
        side_by_side, rows = (len(quantities), len(models)) if len(quantities) > 1 else (len(models), 1)
        figure, columns = style.panel_grid(side_by_side, n_stacked=rows)
        axes = [column[row] for row in range(rows) for column in columns]
    else:
        axes = marks.check_axes(ax, len(models) * len(quantities), f"{len(quantities)} for each model")
    panels = [(model, quantity) for model in models for quantity in quantities]
    for number, (panel, (model, quantity)) in enumerate(zip(axes, panels, strict=True)):
        own = [run for run in runs if run.name == model]
        _plot_curves(panel, frame[(frame["model"] == model) & (frame["quantity"] == quantity)], looks, window)
        _plot_few_seeds(panel, own, quantity, looks)
        for (name, _), run in {(run.label, last_alignment_step(run)): run for run in own}.items():
            _mark_switch(panel, run, after=0.5, color=looks[name]["color"])
        panel.set(xlabel="Step", ylabel=quantities[quantity])
        # The name of a row of panels is above its middle.
        if len(quantities) == 1 or (len(models) > 1 and number % len(quantities) == len(quantities) // 2):
            style.set_title(panel, titles[models.index(model)])
    if figure is None:
        return style.root_figure(axes[0])
    order = (*looks, MEAN_OF_STEPS.format(window), STEP_LABEL, SEED_LABEL, START_LABEL, style.BAND_LABEL, SWITCH_LABEL)
    style.figure_legend(figure, axes, order, _legend_lines(runs, window), band=bool(frame["low"].notna().any()))
    return figure


def _line_styles(labels: Sequence[str], color: Any) -> dict[str, dict[str, Any]]:
    """Return the look of each label's curve; neighbours differ in colour and dash, for grey printers."""
    colors = marks.check_colors(color, len(labels), "curves")
    looks = (style.line_style(palette.series(place)) for place in range(len(labels)))
    return {label: marks.with_color(look, own) for label, look, own in zip(labels, looks, colors, strict=True)}


def _legend_lines(runs: Sequence[Any], window: int) -> list[Any]:
    """Return what the legend says of the lines that have no name."""
    sizes = [len(seeds) for seeds in _groups(runs).values()]
    few = [1 < size < MIN_SEEDS for size in sizes]
    looks: dict[str, dict[str, Any]] = {}
    if window > 1:
        looks[MEAN_OF_STEPS.format(window)] = {}
        looks |= {} if all(few) else {STEP_LABEL: THIN}
    looks |= {SEED_LABEL: THIN} if any(few) else {}
    looks |= {START_LABEL: {"markersize": 3, **START}} if window > 1 else {}
    looks |= {SWITCH_LABEL: SWITCH} if any(last_alignment_step(run) for run in runs) else {}
    return [Line2D([], [], color=style.NEUTRAL, label=label, **look) for label, look in looks.items()]


def _plot_curves(ax: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]], window: int) -> None:
    if rows.empty:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=style.NEUTRAL)
        ax.set_yticks([])
        return
    for place, (label, look) in enumerate(looks.items()):
        own, color = rows[rows["label"] == label], look["color"]
        if own.empty:
            continue
        if window > 1:
            start = own[own["step"] <= FIRST_STEP]
            if not 1 < own["seeds"].max() < MIN_SEEDS:
                ax.plot(own["step"], own["raw"], color=color, zorder=2.2, **THIN)
            reach = [start["mean"] - start["low"], start["high"] - start["mean"]]
            ax.errorbar(start["step"], start["mean"], reach, fmt="none", ecolor=color, elinewidth=0.6, alpha=0.5)
            # Runs of one model and seed start at the same point: rings around one another show them all.
            size = _START_SIZES[min(place, len(_START_SIZES) - 1)]
            ax.plot(start["step"], start["mean"], color=color, markersize=size, zorder=3, **START)
            own = own[own["step"] > FIRST_STEP]
        # In a long run every step is a zigzag, which a thinner line keeps readable.
        width, marker = 0.7 if len(own) > 150 and window == 1 else 1.0, "o" if len(own) == 1 else None
        marks.line(ax, own, "step", "mean", label=label, linewidth=width, marker=marker, **look)
    _set_step_axis(ax)


def _plot_few_seeds(ax: Axes, runs: Sequence[Any], quantity: str, looks: dict[str, dict[str, Any]]) -> None:
    for (_, label), seeds in _groups(runs).items():
        for run in seeds if 1 < len(seeds) < MIN_SEEDS else ():
            values = _steps_of(run.history, quantity)
            ax.plot(values.index, values, color=looks[label]["color"], **THIN)


def _mark_switch(
    ax: Axes, run: Run, *, after: float = 0.0, color: str = style.NEUTRAL, label: str | None = None
) -> None:
    """Draw a line where alignment ended, `after` its last step: rewards are measured within a step, dynamics after."""
    if (step := last_alignment_step(run)) is not None:
        ax.axvline(step + after, color=color, label=label, zorder=1.5, **SWITCH)


def _set_step_axis(ax: Axes) -> None:
    """Give a panel whole steps, and round ticks on both axes."""
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3, steps=_ROUND_STEPS))


def _plot_steps(ax: Axes, table: pd.DataFrame, column: str, y_label: str, color: Any) -> None:
    # More markers would hide the line.
    marker = "o" if len(table) <= 60 else None
    ax.plot(table["step"], table[column], color=color, marker=marker, markersize=2, zorder=2.5)
    ax.set(xlabel="Step", ylabel=y_label)
    _set_step_axis(ax)


def _plot_similarity(ax: Axes, run: Run, layer: int) -> None:
    table, switch = run.dynamics_layers, last_alignment_step(run)
    ax.set(xlabel="Later layer $m$", ylabel=rf"Cosine of $H^{{{layer}}}$ and $H^m$")
    steps, layers = np.unique(table["step"]), np.unique(table["layer"])
    first, last = int(steps[0]), int(steps[-1])
    norm = Normalize(first, max(last, first + 1))
    chosen = _spread(steps, MAX_MEASUREMENTS)
    if switch is not None and first < switch < last:
        # Alignment is short: on an even scale it would be one colour, and perhaps one line.
        norm = TwoSlopeNorm(switch, first, last)
        parts = (steps[steps <= switch], steps[steps > switch])
        chosen = np.concatenate([_spread(part, MAX_MEASUREMENTS // 2) for part in parts])
    colors = ListedColormap(sns.color_palette("viridis", 256)[:236])
    marker = "o" if len(layers) < 4 else None
    for step in chosen:
        rows = table[table["step"] == step].sort_values("layer")
        ax.plot(rows["layer"], rows["cosine"], color=colors(norm(step)), marker=marker, linewidth=0.8)
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
    ax.xaxis.set_major_locator(_layer_ticks(layers))
    ax.yaxis.set_major_locator(MaxNLocator(5, min_n_ticks=3, steps=_ROUND_STEPS))
    bar = _color_bar(ax, norm, colors, "Step")
    if isinstance(norm, TwoSlopeNorm):
        bar.set_ticks([first, *([round((first + norm.vcenter) / 2)] * (norm.vcenter > 7)), norm.vcenter, last])
        bar.ax.axhline(norm.vcenter, color="white", **SWITCH)
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))


def _plot_divergence(ax: Axes, run: Run, table: pd.DataFrame, layer: int, color: Any) -> None:
    later = run.dynamics_layers
    ax.set(xlabel="Step", ylabel=rf"KL$(\pi^{{{layer}}}\,\Vert\,\pi^m)$ (nats)")
    layers = np.unique(later["layer"])
    # The pale end of the palette is lost on white paper.
    colors = ListedColormap(sns.color_palette("YlOrBr", 2 * len(layers))[len(layers) :])
    norm = BoundaryNorm(np.arange(layers[0], layers[-1] + 2) - 0.5, colors.N)
    for m in layers:
        rows = later[later["layer"] == m].sort_values("step")
        ax.plot(rows["step"], rows["kl"], color=colors(norm(m)), linewidth=0.7)
    bar = _color_bar(ax, norm, colors, "Later layer $m$")
    bar.ax.yaxis.set_major_locator(_layer_ticks(layers))
    bar.ax.minorticks_off()
    ax.plot(table["step"], table["kl_mean"], color=color, linewidth=1.4, label=MEAN_LABEL, zorder=3)
    _set_step_axis(ax)
    _use_log_if_wide(ax, later["kl"])


def _spread(steps: npt.NDArray[Any], most: int) -> npt.NDArray[Any]:
    """Return at most `most` steps, evenly chosen, with the first and the last."""
    chosen: npt.NDArray[Any] = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), most)).round().astype(int))
    return np.asarray(steps[chosen])


def _layer_ticks(layers: npt.NDArray[Any]) -> Locator:
    if len(layers) <= 6:
        return FixedLocator(layers.tolist())
    return MaxNLocator(7, integer=True, steps=[1, 2, 5, 10])


def _color_bar(ax: Axes, norm: Normalize, colors: Colormap, label: str) -> Colorbar:
    bar = style.root_figure(ax).colorbar(ScalarMappable(norm, colors), ax=ax, pad=0.02, aspect=14)
    bar.set_label(label)
    bar.outline.set_linewidth(0.6)
    return bar


def _use_log_if_wide(ax: Axes, values: pd.Series) -> None:
    """Make an axis logarithmic for values that span more than a factor of 20: a collapse would hide the rest."""
    finite = values[np.isfinite(values)]
    span = finite.max() / finite.min() if len(finite) and finite.min() > 0 else 1.0
    if span > 20:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0,)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_formatter(NullFormatter())
