"""Figures of internal policies that were sampled: accuracy against the layer, and against the step of a training.

    evaluations = evaluate_layers("testbed/qwen3", layers="all")
    accuracy_over_depth([*evaluations, evaluate("testbed/qwen3")])
    numbers = accuracy_over_depth_data(evaluations)  # exactly what it draws
    layer_accuracy(bupo.train("testbed/qwen3", layer=6, eval_layer=6))

Bands are 95% intervals over problems. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from internal_policy.analysis.figure_data import OneOrMany, listed
from internal_policy.bupo.run import last_alignment_step
from internal_policy.data.benchmarks import title
from internal_policy.evaluation.config import SITE_NAMES
from internal_policy.evaluation.depth import depth_table
from internal_policy.models.options import DEFAULT_LENS
from internal_policy.plotting import marks, style
from internal_policy.utils import palette
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run
    from internal_policy.evaluation.results import Evaluation

__all__ = [
    "accuracy_over_depth",
    "accuracy_over_depth_data",
    "layer_accuracy",
    "layer_accuracy_data",
    "plot_accuracy_over_depth",
    "save_depth_figures",
]

AXIS_LABELS = {"avg": "Avg@K (%)", "agreement": r"Agreement with $\pi_\theta$ (%)"}
"""The panels of the figure from the top, and the labels of their axes."""
POLICY_LABEL = r"$\pi_\theta$"
_POLICY_LINE: dict[str, Any] = {"linewidth": 0.8, "linestyle": style.DASHES["dot"], "zorder": 1}


def accuracy_over_depth_data(
    evaluations: OneOrMany[Evaluation], *, label: OneOrMany[str] | None = None
) -> pd.DataFrame:
    """Return the numbers of the figure.

    Args:
        evaluations: Of internal policies; those of pi_theta itself add a line for comparison.
        label: Name of the model, or that of each evaluation.

    Returns:
        The rows of ``evaluation.depth_table`` for Avg@K and the agreement, with a column `line`: the name of the line,
        which is the model, and its site and lens where they differ.

    Raises:
        UserError: No evaluation is of an internal policy, a policy is given twice on one benchmark, or the number of
            labels is not that of the evaluations.
    """
    given = listed(evaluations)
    if all(evaluation.layer is None for evaluation in given):
        raise UserError("there is no evaluation of an internal policy to draw; evaluate with --layer or --layers")
    names = marks.check_labels(label, marks.short_names([e.model_name for e in given]), "evaluations")
    tables = [depth_table(e).assign(line=name) for e, name in zip(given, names, strict=True)]
    table = pd.concat(tables, ignore_index=True)
    table = table[table["quantity"].isin(list(AXIS_LABELS))].reset_index(drop=True)
    keys = ["line", "benchmark", "site", "lens", "layer", "quantity"]
    if len(twice := table[table.duplicated(keys)]):
        row = twice.iloc[0]
        what = "pi_theta" if row["site"] == "policy" else f"{SITE_NAMES[row['site']]} {row['layer']}"
        raise UserError(f"{what} of {row['line']} was given twice on {row['benchmark']}; give each policy once")
    internal = table["site"] != "policy"
    for column, describe in (("site", _site_name), ("lens", _lens_name)):
        if len(set(table.loc[internal, column])) > 1:
            table.loc[internal, "line"] += table.loc[internal, column].map(describe)
    return table


def _site_name(site: str) -> str:
    return f", {SITE_NAMES[site]}"


def _lens_name(lens: str) -> str:
    return "" if lens == DEFAULT_LENS else f", {marks.lens_title(lens)}"


def plot_accuracy_over_depth(
    evaluations: OneOrMany[Evaluation],
    ax: Axes | None = None,
    *,
    quantity: str = "avg",
    benchmark: str | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Axes:
    """Draw one panel: a rate of internal policies against the layer, with its 95% band, and pi_theta's as a line.

    Args:
        evaluations: Of internal policies, and of pi_theta for comparison.
        ax: Where to draw; by default a new figure with a legend.
        quantity: `avg` (Avg@K) or `agreement` (share of tokens with the most probable token of pi_theta).
        benchmark: Which benchmark; by default the first.
        label: Name of the model, or that of each evaluation.
        color: Colour of the line, or of each in the order of the legend.

    Returns:
        The axes.

    Raises:
        UserError: See `accuracy_over_depth_data`; or no internal policy was evaluated on the benchmark.
    """
    if quantity not in AXIS_LABELS:
        raise UserError(f"quantity is {quantity!r}; needed is one of {', '.join(AXIS_LABELS)}")
    frame = accuracy_over_depth_data(evaluations, label=label)
    benchmarks = _benchmarks(frame)
    chosen = benchmarks[0] if benchmark is None else benchmark
    if chosen not in benchmarks:
        raise UserError(f"no internal policy was evaluated on {chosen}; there are {', '.join(benchmarks)}")
    if ax is not None:
        return _plot(frame, chosen, quantity, ax, color)
    figure, ((panel,),) = style.panel_grid(1)
    _plot(frame, chosen, quantity, panel, color)
    _legend(figure, [panel], frame)
    return panel


@style.paper_style()
def accuracy_over_depth(
    evaluations: OneOrMany[Evaluation],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw Avg@K (top) and the agreement with pi_theta (bottom) against the layer, a column for each benchmark.

    Args:
        evaluations: Of internal policies of one model or several; those of pi_theta itself add a dotted line.
        ax: Where to draw: a top panel for each benchmark in order of first appearance, then the bottom panels; by
            default a new figure with a legend.
        label: Name of the model, or that of each evaluation.
        color: Colour of the line, or of each in the order of the legend.

    Returns:
        The figure.

    Raises:
        UserError: See `accuracy_over_depth_data`.
    """
    frame, figure = accuracy_over_depth_data(evaluations, label=label), None
    benchmarks = _benchmarks(frame)
    n = len(benchmarks)
    if ax is None:
        figure, columns = style.panel_grid(n, n_stacked=2, panel_height=1.12)
        panels = [column[k] for k in (0, 1) for column in columns]
    else:
        panels = marks.check_axes(ax, 2 * n, f"Avg@K for each of {n} benchmarks, then the agreement")
    for row, quantity in enumerate(AXIS_LABELS):
        for benchmark, panel in zip(benchmarks, panels[row * n : (row + 1) * n], strict=True):
            _plot(frame, benchmark, quantity, panel, color)
    if figure is None:
        return style.root_figure(panels[0])
    for place in range(n):
        panels[place].set_xlabel("")
        panels[place].tick_params(labelbottom=False)
        panels[n + place].set_title("")
        if place % style.grid_shape(n)[1]:
            panels[place].set_ylabel("")
            panels[n + place].set_ylabel("")
    _legend(figure, panels, frame)
    return figure


def save_depth_figures(evaluations: OneOrMany[Evaluation], directory: Path) -> list[Path]:
    """Write the figure as PNG and PDF. The same evaluations give the same bytes.

    Args:
        evaluations: Of internal policies, and of pi_theta for comparison.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    return style.save_figures(directory, {"accuracy_over_depth": partial(accuracy_over_depth, evaluations)})


def layer_accuracy_data(runs: OneOrMany[Run], *, label: OneOrMany[str] | None = None) -> pd.DataFrame:
    """Return the accuracy of an internal policy over the trainings that measured it (``eval_layer``).

    Args:
        runs: Runs with such measurements.
        label: Name of the run, or of each.

    Returns:
        A row for each run and measurement: run (its name), step, phase, layer, site, lens, value (Avg@K, 0 to 1), low,
        high (95% interval over problems).

    Raises:
        UserError: A run has no such measurements, or the number of labels is not that of the runs.
    """
    given = listed(runs)
    if without := next((run for run in given if run.layer_accuracy.empty), None):
        raise UserError(f"{without.name}, {without.label}: no internal policy was evaluated; train with --eval-layer")
    names = marks.check_labels(label, [f"{run.name}, {run.label}" for run in given], "runs")
    renamed = {"avg": "value", "avg_low": "low", "avg_high": "high"}
    tables = [
        run.layer_accuracy.rename(columns=renamed).assign(run=name) for run, name in zip(given, names, strict=True)
    ]
    columns = ["run", "step", "phase", "layer", "site", "lens", "value", "low", "high"]
    return pd.concat(tables, ignore_index=True)[columns]


@style.paper_style()
def layer_accuracy(
    runs: OneOrMany[Run], *, ax: Axes | None = None, label: OneOrMany[str] | None = None, color: Any = None
) -> Figure:
    """Draw the accuracy of an internal policy against the step of the training, with its 95% band.

    A dashed line in a run's colour marks where its internal policy alignment ended.

    Args:
        runs: Runs with ``eval_layer``.
        ax: Where to draw; by default a new figure with a legend.
        label: Name of the run, or of each.
        color: Colour of the line, or of each.

    Returns:
        The figure.

    Raises:
        UserError: See `layer_accuracy_data`.
    """
    frame, given = layer_accuracy_data(runs, label=label), listed(runs)
    figure, panel = None, ax
    if panel is None:
        figure, ((panel,),) = style.panel_grid(1)
    colors = marks.check_colors(color, len(given), "runs")
    for place, (run, (name, rows), own) in enumerate(zip(given, frame.groupby("run", sort=False), colors, strict=True)):
        look = marks.with_color(style.marker_style(palette.series(place)), own)
        point: dict[str, Any] = {"label": name, "zorder": 3, "markersize": 2.6, "clip_on": False}
        marks.line(panel, rows, "step", "value", alpha=0.15, **point, **look)
        end = last_alignment_step(run)
        if end is not None:
            switch = style.DASHES[palette.LOOKS["switch"].dash]
            panel.axvline(end, color=look["color"], linewidth=0.7, linestyle=switch, zorder=1)
    _set_rates(panel, frame)
    policies = frame[["layer", "site", "lens"]].drop_duplicates()
    one = policies.iloc[0] if len(policies) == 1 else None
    whose = "internal policy" if one is None else f"{SITE_NAMES[one['site']]} {one['layer']}{_lens_name(one['lens'])}"
    panel.set(xlabel="Step", ylabel=f"Avg@K of {whose} (%)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if figure is not None:
        style.figure_legend(figure, [panel], band=bool(frame["low"].notna().any()))
    return style.root_figure(panel)


def _benchmarks(frame: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(frame.loc[frame["site"] != "policy", "benchmark"]))


def _legend(figure: Figure, panels: Sequence[Axes], frame: pd.DataFrame) -> None:
    policy = [Line2D([], [], color=style.NEUTRAL, label=POLICY_LABEL, **_POLICY_LINE)]
    compared = bool((frame["site"] == "policy").any())
    style.figure_legend(figure, panels, extra=policy if compared else (), band=bool(frame["low"].notna().any()))


@style.paper_style()
def _plot(frame: pd.DataFrame, benchmark: str, quantity: str, ax: Axes, color: Any) -> Axes:
    rows = frame[(frame["benchmark"] == benchmark) & (frame["quantity"] == quantity)]
    internal, policy = rows[rows["site"] != "policy"], rows[rows["site"] == "policy"]
    lines = list(dict.fromkeys(frame.loc[frame["site"] != "policy", "line"]))
    models = dict(zip(frame["line"], frame["model"], strict=True))
    colors = marks.check_colors(color, len(lines), "lines")
    looks = {
        name: marks.with_color(style.marker_style(palette.series(place)), own)
        for place, (name, own) in enumerate(zip(lines, colors, strict=True))
    }
    for name, look in looks.items():
        own = internal[internal["line"] == name].sort_values("layer").astype({"layer": int})
        point: dict[str, Any] = {"label": name, "zorder": 3, "markersize": marks.marker_size(own), "clip_on": False}
        marks.line(ax, own, "layer", "value", alpha=0.15, **point, **look)
    for row in policy.to_dict("records"):
        # Lines of one model that differ in site or lens share its pi_theta, which has the colour of the first.
        shown = next((look["color"] for name, look in looks.items() if models[name] == row["model"]), style.NEUTRAL)
        ax.axhline(row["value"], color=shown, **_POLICY_LINE)
    _set_rates(ax, rows)
    style.set_layer_axis(ax, int(frame["layer"].max()))
    ax.set(xlabel="Layer", ylabel=AXIS_LABELS[quantity])
    style.set_title(ax, title(benchmark))
    return ax


def _set_rates(ax: Axes, rows: pd.DataFrame) -> None:
    """Percent from 0 to as much as the panel needs."""
    ends = rows[["value", "high"]].max().max()
    ax.set_ylim(0.0, min(1.0, 1.05 * ends) if ends > 0.02 else 0.02)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.4g}"))
