"""Pass@K figures of evaluations (arXiv 2512.19673v3, figs. 6 and 15), and the numbers in them as a table.

    figure = pass_at_k([before, after])               # fig. 6: one panel, several benchmarks averaged
    figure = pass_at_k_by_benchmark([before, after])  # fig. 15: one panel for each benchmark
    numbers = pass_at_k_data([before, after])         # exactly what they draw

Bands are 95% intervals over problems. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from internal_policy.analysis.figure_data import OneOrMany, listed
from internal_policy.data.benchmarks import title
from internal_policy.plotting import marks, style
from internal_policy.utils import palette
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.evaluation.results import Evaluation

__all__ = ["pass_at_k", "pass_at_k_by_benchmark", "pass_at_k_data", "plot_pass_at_k", "save_evaluation_figures"]

AVERAGE = "Average"
_MAX_TICKS = 6
_HEIGHT = 1.6
"""Of a single panel with its labels, inches."""
_LEGEND_LINE_SIZES = 4.5
"""Width of a line in the legend and the gap after it, in sizes of its font."""


def pass_at_k_data(evaluations: OneOrMany[Evaluation], *, label: OneOrMany[str] | None = None) -> pd.DataFrame:
    """Return the numbers of figs. 6 and 15.

    The average over B benchmarks is that of their values, each benchmark of equal weight. They are independent, so the
    ends of its interval lie as far from it as the root of the sum of squares of theirs, over B (Zou and Donner 2008).

    Args:
        evaluations: One evaluation, or any number of models on any number of benchmarks.
        label: Name of the model, or that of each evaluation.

    Returns:
        A row for each model, benchmark and K: model, benchmark, k, value, low, high, rates from 0 to 1. Where there are
        several benchmarks, rows of the benchmark ``Average`` follow: for the benchmarks that all models have, and the K
        that all of these have.

    Raises:
        UserError: There is no evaluation, one name refers to different problems, a model is given twice on one
            benchmark, or the number of labels is not that of the evaluations.
    """
    given = listed(evaluations)
    if not given:
        raise UserError("there is no evaluation to draw; needed is at least one")
    names = _names(given, label)
    parts = []
    digests: dict[str, str] = {}
    for name, evaluation in zip(names, given, strict=True):
        if digests.setdefault(evaluation.benchmark, evaluation.digest()) != evaluation.digest():
            raise UserError(
                f"{evaluation.name} was evaluated on other problems called {evaluation.benchmark} than the others; "
                "evaluate all of them with the same --benchmark and --max-problems, or draw them apart"
            )
        columns = {"model": name, "benchmark": title(evaluation.benchmark)}
        parts.append(evaluation.pass_at_k[["k", "value", "low", "high"]].assign(**columns))
    frame = pd.concat(parts, ignore_index=True)[["model", "benchmark", "k", "value", "low", "high"]]
    return pd.concat([frame, _average(frame)], ignore_index=True) if len(digests) > 1 else frame


def plot_pass_at_k(
    evaluations: OneOrMany[Evaluation],
    ax: Axes | None = None,
    *,
    benchmark: str | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Axes:
    """Draw one panel: Pass@K against K, a line with its 95% band for each model.

    Args:
        evaluations: The models.
        ax: Where to draw; by default a new figure with a legend.
        benchmark: Which benchmark; by default the average where there are several.
        label: Name of the model, or that of each evaluation.
        color: Colour of the line, or of each in the order of the legend.

    Returns:
        The axes.

    Raises:
        UserError: No model was evaluated on the benchmark, or the models share too few benchmarks for an average.
    """
    frame = pass_at_k_data(evaluations, label=label)
    chosen = title(benchmark) if benchmark is not None else _summary(frame)
    if ax is not None:
        return _plot(frame, chosen, ax, color)
    figure, ((panel,),) = style.panel_grid(1, panel_height=_HEIGHT)
    _plot(frame, chosen, panel, color)
    style.figure_legend(figure, [panel], band=bool(frame["low"].notna().any()))
    return panel


def pass_at_k(
    evaluations: OneOrMany[Evaluation],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 6: Pass@K against K in one panel, for one benchmark or the average of several.

    Args:
        evaluations: The models on their benchmarks.
        ax: Where to draw, one axes; by default a new figure with a legend.
        label: Name of the model, or that of each evaluation.
        color: Colour of the line, or of each in the order of the legend.

    Returns:
        The figure.
    """
    panel = None if ax is None else marks.check_axes(ax, 1, "this figure has one panel")[0]
    return style.root_figure(plot_pass_at_k(evaluations, panel, label=label, color=color))


@style.paper_style()
def pass_at_k_by_benchmark(
    evaluations: OneOrMany[Evaluation],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw fig. 15: Pass@K against K, a panel for each benchmark.

    Args:
        evaluations: The models on their benchmarks.
        ax: Where to draw, one axes for each benchmark in order of first appearance; by default a new figure with a
            legend.
        label: Name of the model, or that of each evaluation.
        color: Colour of the line, or of each in the order of the legend.

    Returns:
        The figure.
    """
    frame, figure = pass_at_k_data(evaluations, label=label), None
    benchmarks = [b for b in dict.fromkeys(frame["benchmark"]) if b != AVERAGE]
    if ax is None:
        figure, columns = style.panel_grid(len(benchmarks), panel_height=_HEIGHT if len(benchmarks) == 1 else 1.45)
        panels = [column[0] for column in columns]
    else:
        panels = marks.check_axes(ax, len(benchmarks), "one for each benchmark")
    for benchmark, panel in zip(benchmarks, panels, strict=True):
        _plot(frame, benchmark, panel, color)
    if figure is None:
        return style.root_figure(panels[0])
    style.share_labels(figure, panels)
    style.figure_legend(figure, panels, band=bool(frame["low"].notna().any()))
    return figure


def save_evaluation_figures(evaluations: OneOrMany[Evaluation], directory: Path) -> list[Path]:
    """Write figs. 6 and 15 as PNG and PDF. The same evaluations give the same bytes.

    Fig. 6 is left out of several benchmarks of which the models share fewer than two, because there is no average.

    Args:
        evaluations: The models on their benchmarks.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    figures = {"fig6_pass_at_k": pass_at_k, "fig15_pass_at_k_by_benchmark": pass_at_k_by_benchmark}
    benchmarks = set(pass_at_k_data(evaluations)["benchmark"])
    if len(benchmarks) > 1 and AVERAGE not in benchmarks:
        del figures["fig6_pass_at_k"]
    return style.save_figures(directory, {stem: partial(draw, evaluations) for stem, draw in figures.items()})


def _names(evaluations: Sequence[Evaluation], label: OneOrMany[str] | None) -> list[str]:
    """Return as much of the end of each model's name as distinguishes the models, or the user's labels."""
    names = marks.check_labels(label, [e.name for e in evaluations], "evaluations")
    pairs = [(name, e.benchmark) for name, e in zip(names, evaluations, strict=True)]
    if twice := next((pair for pair in pairs if pairs.count(pair) > 1), None):
        raise UserError(f"{twice[0]} was given twice on {twice[1]}; give each model once, or draw them apart")
    return names if label is not None else marks.short_names(names)


def _average(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows of the average over the benchmarks that all models have; none where these are fewer than two."""
    models = dict.fromkeys(frame["model"])
    sets = [set(frame.loc[frame["model"] == model, "benchmark"]) for model in models]
    shared = frame[frame["benchmark"].isin(set.intersection(*sets))]
    n = shared["benchmark"].nunique()
    if n < 2:
        return frame.iloc[:0]
    rows = []
    for model in models:
        for k, group in shared[shared["model"] == model].groupby("k"):
            if len(group) == n:
                value = group["value"].mean()
                reach = [np.sqrt(((group[end] - group["value"]) ** 2).sum(skipna=False)) / n for end in ("low", "high")]
                ends = {"low": value - reach[0], "high": value + reach[1]}
                rows.append({"model": model, "benchmark": AVERAGE, "k": k, "value": value, **ends})
    return pd.DataFrame(rows, columns=frame.columns)


def _summary(frame: pd.DataFrame) -> str:
    benchmarks: list[str] = list(dict.fromkeys(frame["benchmark"]))
    if AVERAGE not in benchmarks and len(benchmarks) > 1:
        raise UserError(
            f"the models share fewer than two of the benchmarks {', '.join(benchmarks)}, which leaves no average to "
            "draw; choose one benchmark, or evaluate all models on the same"
        )
    return benchmarks[-1]


@style.paper_style()
def _plot(frame: pd.DataFrame, benchmark: str, ax: Axes, color: Any) -> Axes:
    shown = frame[frame["benchmark"] == benchmark]
    if shown.empty:
        raise UserError(
            f"no model was evaluated on {benchmark}; there are {', '.join(dict.fromkeys(frame['benchmark']))}"
        )
    labels = _fitted(list(dict.fromkeys(frame["model"])), ax)
    colors = marks.check_colors(color, len(labels), "models")
    for place, ((model, label), own) in enumerate(zip(labels.items(), colors, strict=True)):
        look = marks.with_color(style.marker_style(palette.series(place)), own)
        rows = shown[shown["model"] == model].sort_values("k")
        if len(rows) == 1:
            reach = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
            ax.errorbar(rows["k"], rows["value"], reach, color=look["color"], alpha=0.4, linewidth=2.5)
        point: dict[str, Any] = {"label": label, "zorder": 3, "markersize": 3, "clip_on": False}
        marks.line(ax, rows, "k", "value", alpha=0.15, **point, **look)
    _set_k_axis(ax, sorted(set(shown["k"])))
    _set_rate_axis(ax, shown)
    ax.set(xlabel="K", ylabel="Pass@K (%)")
    style.set_title(ax, benchmark)
    return ax


def _set_k_axis(ax: Axes, ks: Sequence[int]) -> None:
    """Make the axis logarithmic to base 2, with few enough round ticks to be read and no minor ones."""
    ax.set_xscale("log", base=2)
    low, high = np.log2(ks[0]), np.log2(ks[-1])
    step = 1 if high - low < _MAX_TICKS else 2
    ticks = [2.0**e for e in range(0, int(high) + 1, step) if e >= low]
    ax.set_xticks(ticks if len(ticks) > 1 else list(ks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    margin = 0.06 * max(high - low, 1.0)
    ax.set_xlim(2.0 ** (low - margin), 2.0 ** (high + margin))


def _set_rate_axis(ax: Axes, rows: pd.DataFrame) -> None:
    """Label the axis in percent, never beyond what a rate can be."""
    ends = rows[["value", "low", "high"]].to_numpy(dtype=float)
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = max(0.05 * (high - low), 0.01)
    ax.set_ylim(max(0.0, low - margin), min(1.0, high + margin))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.4g}"))


def _fitted(names: Sequence[str], ax: Axes) -> dict[str, str]:
    """Leave out the middle of names that are too wide for a legend; number them where two would then be the same."""
    size = style.RC["legend.fontsize"]
    room = style.figure_width(style.root_figure(ax)) - _LEGEND_LINE_SIZES * size
    short = {name: style.shorten(name, room, size) for name in names}
    if len(set(short.values())) == len(names):
        return short
    return {name: f"({i}) {short[name]}" for i, name in enumerate(names, start=1)}
