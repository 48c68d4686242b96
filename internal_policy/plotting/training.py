"""The paper's figures of training runs (arXiv 2512.19673v3, figs. 4, 5 and 7).

    figure = training_curves([bupo_run, grpo_run])     # fig. 4: reward, entropy and length against step
    numbers = training_curves_data([bupo_run])         # exactly what it draws
    alignment_dynamics(bupo_run).savefig("fig5.pdf")   # fig. 5, for one run

Single steps are thin lines with their trailing mean on top. Runs of one model that differ in nothing but their seed are
averaged, with the mean's 95% interval from three seeds on.
Nothing here needs a model or torch.
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
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from internal_policy.analysis.figure_data import FIRST_STEP, SMOOTH, OneOrMany, listed, trailing_mean, window_for
from internal_policy.bupo.run import last_alignment_step, why_no_dynamics
from internal_policy.plotting import marks as drawing
from internal_policy.plotting import style
from internal_policy.plotting.alignment import (
    SWITCH,
    SWITCH_LABEL,
    alignment_dynamics,
    mark_switch,
    set_step_axis,
    short_name,
)
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
"""What fig. 4 draws of a run's history, and what the axis is called."""

BAND_LABEL, SEED_LABEL, STEP_LABEL, START_LABEL = "95% interval", "each seed", "each step", "before any update"
THIN: dict[str, Any] = {"linewidth": 0.4, "alpha": 0.6}
START: dict[str, Any] = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markeredgewidth": 0.6}
"""How step 1 is marked, which no mean reaches back to."""
_LARGEST_START, _SMALLEST_START = 5.0, 2.0
FEWEST_SEEDS = 3
"""With two seeds a 95% interval is 13 standard errors to each side: the seeds themselves are drawn instead."""


def training_curves_data(
    runs: OneOrMany[Run], quantities: Sequence[str] = tuple(QUANTITIES), *, smooth: int = SMOOTH
) -> pd.DataFrame:
    """Return the numbers of figs. 4 and 7.

    Args:
        runs: One run or several; those of one model that differ in nothing else are seeds.
        quantities: Columns of the runs' histories.
        smooth: Steps of the trailing mean, which is taken in each run before the mean over seeds. It never reaches back
            to step 1, which was sampled before any update. 1 leaves every step as it is, and so do runs that are too
            short for two means.

    Returns:
        A row for each model, label, quantity and step that has a value: `raw`, that step's mean over the seeds; `mean`,
        the same of the trailing means, with `low` and `high` (95% t interval, NaN below `FEWEST_SEEDS`); and the number
        of `seeds`.

    Raises:
        UserError: no run, or `smooth` below 1.
    """
    drawn = _distinguished(_checked(runs, smooth))
    return _curve_data(drawn, quantities, _window(drawn, smooth))


def _curve_data(runs: Sequence[Run], quantities: Sequence[str], window: int) -> pd.DataFrame:
    from scipy.stats import t as scipy_t

    parts = []
    for (name, label), seeds in _groups(runs).items():
        for quantity in quantities:
            steps = [_steps_of(run.history, quantity) for run in seeds]
            raw = pd.concat(steps, axis=1).dropna(how="all").sort_index()
            wide = pd.concat([trailing_mean(values, window) for values in steps], axis=1).reindex(raw.index)
            n, mean = wide.notna().sum(axis=1), wide.mean(axis=1)
            enough = n.where(n >= FEWEST_SEEDS)
            half = scipy_t.ppf(0.975, enough - 1) * wide.std(axis=1) / np.sqrt(enough)
            ends = {"low": mean - half, "high": mean + half, "seeds": n}
            part = pd.DataFrame({"step": wide.index, "raw": raw.mean(axis=1), "mean": mean, **ends})
            parts.append(part.astype({"step": int}).assign(model=name, label=label, quantity=quantity))
    order = ["model", "label", "quantity", "step", "raw", "mean", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True)[order]


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
        smooth: Steps of the trailing mean that is drawn over the single steps; 1 draws these alone, see
            `training_curves_data`.
        ax: Where to draw, three for each model; without it a figure with a legend is made.
        label: What to call the run, or each of them, in place of its method.
        color: Of the curve, or of each in the order of the legend.

    Returns:
        The figure.

    Raises:
        UserError: no run, `smooth` below 1, or another number of labels or colours than there are.
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
        smooth: Steps of the trailing mean that is drawn over the single steps; 1 draws these alone, see
            `training_curves_data`.
        ax: Where to draw, one for each model; without it a figure with a legend is made.
        label: What to call the run, or each of them, in place of its method.
        color: Of the curve, or of each in the order of the legend.

    Returns:
        The figure.

    Raises:
        UserError: no run, `smooth` below 1, or another number of labels or colours than there are.
    """
    return _curves(runs, {"policy_entropy": QUANTITIES["policy_entropy"]}, smooth, ax, label, color)


def save_training_figures(runs: Sequence[Run], directory: Path, *, smooth: int = SMOOTH) -> list[Path]:
    """Write figs. 4 and 7 of all runs, and fig. 5 of each that has one, as PNG and PDF.

    Args:
        runs: The runs.
        directory: Where to write; made if it is missing.
        smooth: Steps of the trailing mean in figs. 4 and 7.

    Returns:
        The paths written.

    Raises:
        UserError: no run, or `smooth` below 1.
    """
    drawings = {
        "fig4_training": partial(training_curves, runs, smooth=smooth),
        "fig7_policy_entropy": partial(policy_entropy_curves, runs, smooth=smooth),
    }
    for run in runs:
        if why := why_no_dynamics(run):
            # Where nothing was measured, nothing was asked for.
            if not run.dynamics.empty:
                logger.warning("%s", why)
            continue
        words = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{run.name.split('/')[-1]} {run.label}").strip("-").lower()[:100]
        seeds = (f"fig5_alignment_{words}{f'_{number}' if number > 1 else ''}" for number in count(1))
        drawings[next(stem for stem in seeds if stem not in drawings)] = partial(alignment_dynamics, run)
    return [path for stem, draw in drawings.items() for path in style.save_figure(draw(), directory / stem)]


class _Drawn:
    """A run under the label that tells it from the others in the figure."""

    def __init__(self, run: Run | _Drawn, label: str, setting: dict[str, Any]) -> None:
        self._run = run
        self.label = label
        self.setting = setting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def _distinguished(given: Sequence[Run], label: OneOrMany[str] | None = None) -> list[Any]:
    """Add to a label the settings in which runs differ that would share it: only seeds may be averaged."""
    names = drawing.labels_for(label, [run.label for run in given], "runs")
    runs = [_Drawn(run, name, run.setting) for run, name in zip(given, names, strict=True)]
    drawn = []
    for run in runs:
        alike = [other.setting for other in runs if (other.name, other.label) == (run.name, run.label)]
        keys = sorted({k for setting in alike for k in setting if any(o.get(k) != setting[k] for o in alike)})
        told = "".join(f", {key} {run.setting.get(key)}" for key in keys)
        drawn.append(_Drawn(run, run.label + told, {}))
    return drawn


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.label), []).append(run)
    return groups


def _checked(runs: OneOrMany[Run], smooth: int) -> list[Run]:
    found = listed(runs)
    if not found:
        raise UserError("there is no run to draw; give at least one")
    if smooth < 1:
        raise UserError(f"smooth is {smooth}; needed is a number of steps from 1")
    return found


def _window(runs: Sequence[Run], smooth: int) -> int:
    return window_for(max(len(run.history) for run in runs), smooth)


def _steps_of(history: pd.DataFrame, quantity: str) -> pd.Series:
    if quantity not in history.columns:
        return pd.Series(dtype=float, index=pd.Index([], dtype=int))
    return history.set_index("step")[quantity].astype(float).sort_index()


def _curves(
    given: OneOrMany[Run],
    quantities: dict[str, str],
    smooth: int,
    ax: OneOrMany[Axes] | None,
    label: OneOrMany[str] | None,
    color: Any,
) -> Figure:
    runs = _distinguished(_checked(given, smooth), label)
    window = _window(runs, smooth)
    frame = _curve_data(runs, tuple(quantities), window)
    models = list(dict.fromkeys(run.name for run in runs))
    looks = _looks(list(dict.fromkeys(run.label for run in runs)), color)
    titles = [short_name(model) for model in models]
    titles = titles if len(set(titles)) == len(models) else models
    figure = None
    if ax is None:
        side_by_side, rows = (len(quantities), len(models)) if len(quantities) > 1 else (len(models), 1)
        figure, columns = style.panel_grid(side_by_side, n_stacked=rows)
        axes = [column[row] for row in range(rows) for column in columns]
    else:
        axes = drawing.panels_of(ax, len(models) * len(quantities), f"{len(quantities)} for each model")
    panels = [(model, quantity) for model in models for quantity in quantities]
    with style.paper_style():
        for number, (panel, (model, quantity)) in enumerate(zip(axes, panels, strict=True)):
            own = [run for run in runs if run.name == model]
            _plot_curves(panel, frame[(frame["model"] == model) & (frame["quantity"] == quantity)], looks, window)
            _plot_few_seeds(panel, own, quantity, looks)
            for (name, _), run in {(run.label, last_alignment_step(run)): run for run in own}.items():
                mark_switch(panel, run, after=0.5, color=looks[name]["color"])
            panel.set(xlabel="Step", ylabel=quantities[quantity])
            # The name of a row of panels stands over its middle.
            if len(quantities) == 1 or (len(models) > 1 and number % len(quantities) == len(quantities) // 2):
                style.set_title(panel, titles[models.index(model)])
        if figure is None:
            return style.root_figure(axes[0])
        extra = _signs(runs, window, bands=bool(frame["low"].notna().any()))
        style.figure_legend(figure, axes, [*looks, *(str(sign.get_label()) for sign in extra)], extra)
    return figure


def _looks(labels: Sequence[str], color: Any) -> dict[str, dict[str, Any]]:
    """How the curve of each label looks; colour and line differ between neighbours, for grey printers."""
    looks = {label: style.line_marks(palette.series(place)) for place, label in enumerate(labels)}
    for look, own in zip(looks.values(), drawing.colors_for(color, len(labels), "curves"), strict=True):
        look.update({"color": own} if own is not None else {})
    return looks


def _signs(runs: Sequence[Run], window: int, *, bands: bool) -> list[Any]:
    """What the legend tells of the lines that have no name."""
    grey = style.NEUTRAL
    sizes = [len(seeds) for seeds in _groups(runs).values()]
    few = [1 < size < FEWEST_SEEDS for size in sizes]
    found: list[Any] = []
    if window > 1:
        found.append(Line2D([], [], color=grey, label=f"mean of the last {window} steps"))
        found += [Line2D([], [], color=grey, label=STEP_LABEL, **THIN)] * (not all(few))
    if any(few):
        found.append(Line2D([], [], color=grey, label=SEED_LABEL, **THIN))
    if window > 1:
        found.append(Line2D([], [], color=grey, label=START_LABEL, markersize=3, **START))
    if bands:
        found.append(Patch(color=grey, alpha=0.35, linewidth=0, label=BAND_LABEL))
    if any(last_alignment_step(run) for run in runs):
        found.append(Line2D([], [], color=grey, label=SWITCH_LABEL, **SWITCH))
    return found


def _plot_curves(ax: Axes, rows: pd.DataFrame, looks: dict[str, dict[str, Any]], window: int) -> None:
    if rows.empty:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=style.NEUTRAL)
        ax.set_yticks([])
        return
    for place, (label, look) in enumerate(looks.items()):
        own = rows[rows["label"] == label]
        if own.empty:
            continue
        if window > 1:
            start = own[own["step"] <= FIRST_STEP]
            if not 1 < own["seeds"].max() < FEWEST_SEEDS:
                ax.plot(own["step"], own["raw"], color=look["color"], zorder=2.2, **THIN)
            reach = [start["mean"] - start["low"], start["high"] - start["mean"]]
            ax.errorbar(
                start["step"], start["mean"], reach, fmt="none", ecolor=look["color"], elinewidth=0.6, alpha=0.5
            )
            # Runs of one model and seed start alike: rings around one another show them all.
            size = max(_SMALLEST_START, _LARGEST_START - 1.5 * place)
            ax.plot(start["step"], start["mean"], color=look["color"], markersize=size, zorder=3, **START)
            own = own[own["step"] > FIRST_STEP]
        if own["low"].notna().any():
            ax.fill_between(own["step"], own["low"], own["high"], color=look["color"], alpha=0.2, linewidth=0, zorder=2)
        # In a long run every step is a zigzag, which a thinner line keeps readable.
        width, marker = 0.7 if len(own) > 150 and window == 1 else 1.0, "o" if len(own) == 1 else None
        ax.plot(own["step"], own["mean"], label=label, linewidth=width, marker=marker, zorder=2.5, **look)
    set_step_axis(ax)


def _plot_few_seeds(ax: Axes, runs: Sequence[Run], quantity: str, looks: dict[str, dict[str, Any]]) -> None:
    for (_, label), seeds in _groups(runs).items():
        if 1 < len(seeds) < FEWEST_SEEDS:
            for run in seeds:
                values = _steps_of(run.history, quantity)
                ax.plot(values.index, values, color=looks[label]["color"], **THIN)
