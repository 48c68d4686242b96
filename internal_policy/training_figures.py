"""The paper's figures of training runs (arXiv 2512.19673v3, figs. 4, 5 and 7).

    figure = training_curves([bupo_run, grpo_run])     # fig. 4: reward, entropy and length against step
    numbers = training_curves_data([bupo_run])         # exactly what it draws
    alignment_dynamics(bupo_run).savefig("fig5.pdf")   # fig. 5, for one run

Runs of one model that differ in nothing but their seed are averaged, with the mean's 95% interval from three seeds on.
Nothing here needs a model or torch.
"""

from __future__ import annotations

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

from internal_policy import style
from internal_policy.alignment_figures import (
    SWITCH,
    SWITCH_LABEL,
    alignment_dynamics,
    last_alignment_step,
    mark_switch,
    set_step_axis,
    short_name,
)
from internal_policy.errors import UserError

if TYPE_CHECKING:
    from internal_policy.bupo.results import Run

__all__ = [
    "alignment_dynamics",
    "policy_entropy_curves",
    "save_run_figures",
    "training_curves",
    "training_curves_data",
]

QUANTITIES = {"reward": "Reward", "policy_entropy": "Policy entropy (nats)", "length": "Response length (tokens)"}
"""What fig. 4 draws of a run's history, and what the axis is called."""

BAND_LABEL, SEED_LABEL = "95% interval", "each seed"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("-", (0, (4, 1.2)), (0, (1, 1)), (0, (5, 1, 1, 1)))
SEED: dict[str, Any] = {"linewidth": 0.4, "alpha": 0.6}
FEWEST_SEEDS = 3
"""With two seeds a 95% interval is 13 standard errors to each side: the seeds themselves are drawn instead."""


def training_curves_data(
    runs: Sequence[Run], quantities: Sequence[str] = tuple(QUANTITIES), *, smooth: int = 1
) -> pd.DataFrame:
    """Return the numbers of figs. 4 and 7.

    Args:
        runs: The runs; those of one model that differ in nothing else are seeds.
        quantities: Columns of the runs' histories.
        smooth: Steps of a centred moving mean, taken in each run before the mean over seeds; 1 leaves them as they are.

    Returns:
        A row for each model, label, quantity and step that has a value: `mean` over the seeds, `low` and `high` (95% t
        interval of the mean, NaN below `FEWEST_SEEDS`) and the number of `seeds`.

    Raises:
        UserError: no run, or `smooth` below 1.
    """
    if not runs:
        raise UserError("there is no run to draw; give at least one")
    if smooth < 1:
        raise UserError(f"smooth is {smooth}; needed is a number of steps from 1")
    from scipy.stats import t as scipy_t

    runs = _distinguished(runs)
    parts = []
    for (name, label), seeds in _groups(runs).items():
        for quantity in quantities:
            columns = [_smoothed(run.history, quantity, smooth) for run in seeds]
            wide = pd.concat(columns, axis=1).dropna(how="all").sort_index()
            n, mean = wide.notna().sum(axis=1), wide.mean(axis=1)
            enough = n.where(n >= FEWEST_SEEDS)
            half = scipy_t.ppf(0.975, enough - 1) * wide.std(axis=1) / np.sqrt(enough)
            columns_of_part = {"step": wide.index, "mean": mean, "low": mean - half, "high": mean + half, "seeds": n}
            part = pd.DataFrame(columns_of_part).astype({"step": int})
            parts.append(part.assign(model=name, label=label, quantity=quantity))
    order = ["model", "label", "quantity", "step", "mean", "low", "high", "seeds"]
    return pd.concat(parts, ignore_index=True)[order]


def training_curves(runs: Sequence[Run], *, smooth: int = 1, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw fig. 4: reward, entropy of pi_theta and response length against the step, a row of panels for each model.

    A dashed line in a run's colour marks where its internal policy alignment ended.

    Args:
        runs: The runs; those of one model that differ in nothing else are seeds.
        smooth: Steps of a centred moving mean; 1 draws every step as it is.
        axes: Where to draw, three for each model; without it a figure with a legend is made.

    Returns:
        The figure.

    Raises:
        UserError: no run, or `smooth` below 1.
    """
    return _curves(runs, QUANTITIES, smooth, axes)


def policy_entropy_curves(runs: Sequence[Run], *, smooth: int = 1, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw fig. 7: the entropy of pi_theta against the step, a panel for each model.

    Args:
        runs: The runs; those of one model that differ in nothing else are seeds.
        smooth: Steps of a centred moving mean; 1 draws every step as it is.
        axes: Where to draw, one for each model; without it a figure with a legend is made.

    Returns:
        The figure.

    Raises:
        UserError: no run, or `smooth` below 1.
    """
    return _curves(runs, {"policy_entropy": QUANTITIES["policy_entropy"]}, smooth, axes)


def save_run_figures(runs: Sequence[Run], directory: Path, *, smooth: int = 1) -> list[Path]:
    """Write figs. 4 and 7 of all runs, and fig. 5 of each that measured its dynamics, as PNG and PDF.

    Args:
        runs: The runs.
        directory: Where to write; made if it is missing.
        smooth: Steps of a centred moving mean in figs. 4 and 7.

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
        if run.dynamics.empty:
            continue
        words = re.sub(r"[^A-Za-z0-9.+]+", "-", f"{short_name(run.name)} {run.label}").strip("-").lower()[:100]
        seeds = (f"fig5_alignment_{words}{f'_{number}' if number > 1 else ''}" for number in count(1))
        drawings[next(stem for stem in seeds if stem not in drawings)] = partial(alignment_dynamics, run)
    return [path for stem, draw in drawings.items() for path in style.save_figure(draw(), directory / stem)]


class _Drawn:
    """A run under the label that tells it from the others in the figure."""

    def __init__(self, run: Run, label: str) -> None:
        self._run = run
        self.label = label
        self.setting: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)


def _distinguished(runs: Sequence[Run]) -> list[Any]:
    """Add to a label the settings in which runs differ that would share it: only seeds may be averaged."""
    drawn = []
    for run in runs:
        alike = [other.setting for other in runs if (other.name, other.label) == (run.name, run.label)]
        keys = sorted({k for setting in alike for k in setting if any(o.get(k) != setting[k] for o in alike)})
        told = "".join(f", {key} {run.setting.get(key)}" for key in keys)
        drawn.append(_Drawn(run, run.label + told))
    return drawn


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.label), []).append(run)
    return groups


def _smoothed(history: pd.DataFrame, quantity: str, smooth: int) -> pd.Series:
    if quantity not in history.columns:
        return pd.Series(dtype=float, index=pd.Index([], dtype=int))
    values = history.set_index("step")[quantity].astype(float).sort_index()
    # Where a step was not measured there is nothing to draw, however near its neighbours are.
    return values.rolling(smooth, center=True, min_periods=1).mean().where(values.notna())


def _curves(runs: Sequence[Run], quantities: dict[str, str], smooth: int, axes: Sequence[Axes] | None) -> Figure:
    runs = _distinguished(runs)
    frame = training_curves_data(runs, tuple(quantities), smooth=smooth)
    models = list(dict.fromkeys(run.name for run in runs))
    labels = list(dict.fromkeys(run.label for run in runs))
    titles = [short_name(model) for model in models]
    titles = titles if len(set(titles)) == len(models) else models
    figure = None
    if axes is None:
        side_by_side, rows = (len(quantities), len(models)) if len(quantities) > 1 else (len(models), 1)
        figure, columns = style.panel_grid(side_by_side, n_stacked=rows)
        axes = [column[row] for row in range(rows) for column in columns]
    if len(axes) != len(models) * len(quantities):
        raise ValueError(f"got {len(axes)} axes; needed are {len(quantities)} for each of {len(models)} models")
    panels = [(model, quantity) for model in models for quantity in quantities]
    with style.paper_style():
        for number, (ax, (model, quantity)) in enumerate(zip(axes, panels, strict=True)):
            own = [run for run in runs if run.name == model]
            _plot_curves(ax, frame[(frame["model"] == model) & (frame["quantity"] == quantity)], labels)
            _plot_few_seeds(ax, own, quantity, labels, smooth)
            for (label, _), run in {(run.label, last_alignment_step(run)): run for run in own}.items():
                mark_switch(ax, run, after=0.5, color=_look(labels.index(label))["color"])
            ax.set(xlabel="Step", ylabel=quantities[quantity])
            # The name of a row of panels stands over its middle.
            if len(quantities) == 1 or (len(models) > 1 and number % len(quantities) == len(quantities) // 2):
                style.set_title(ax, titles[models.index(model)])
        if figure is None:
            return style.root_figure(axes[0])
        extra: list[Any] = []
        if frame["low"].notna().any():
            extra.append(Patch(color=style.NEUTRAL, alpha=0.35, linewidth=0, label=BAND_LABEL))
        if any(1 < len(seeds) < FEWEST_SEEDS for seeds in _groups(runs).values()):
            extra.append(Line2D([], [], color=style.NEUTRAL, label=SEED_LABEL, **SEED))
        if any(last_alignment_step(run) for run in runs):
            extra.append(Line2D([], [], color=style.NEUTRAL, label=SWITCH_LABEL, **SWITCH))
        style.figure_legend(figure, axes, [*labels, BAND_LABEL, SEED_LABEL, SWITCH_LABEL], extra)
    return figure


def _look(index: int) -> dict[str, Any]:
    """Colour and line of the index-th label; both differ between neighbours, for grey printers."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)]}


def _plot_curves(ax: Axes, rows: pd.DataFrame, labels: Sequence[str]) -> None:
    if rows.empty:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=style.NEUTRAL)
        ax.set_yticks([])
        return
    for index, label in enumerate(labels):
        own, look = rows[rows["label"] == label], _look(index)
        if own["low"].notna().any():
            ax.fill_between(own["step"], own["low"], own["high"], color=look["color"], alpha=0.2, linewidth=0, zorder=2)
        if len(own):
            # In a long run every step is a zigzag, which a thinner line keeps readable.
            width, marker = 0.7 if len(own) > 150 else 1.0, "o" if len(own) == 1 else None
            ax.plot(own["step"], own["mean"], label=label, linewidth=width, marker=marker, zorder=2.5, **look)
    set_step_axis(ax)


def _plot_few_seeds(ax: Axes, runs: Sequence[Run], quantity: str, labels: Sequence[str], smooth: int) -> None:
    for (_, label), seeds in _groups(runs).items():
        if 1 < len(seeds) < FEWEST_SEEDS:
            for run in seeds:
                values = _smoothed(run.history, quantity, smooth)
                ax.plot(values.index, values, color=_look(labels.index(label))["color"], **SEED)
