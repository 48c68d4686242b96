"""Pass@K figures of evaluations (arXiv 2512.19673v3, figs. 6 and 15), and the numbers in them as a table.

    figure = pass_at_k([before, after])               # fig. 6: one panel, several benchmarks averaged
    figure = pass_at_k_by_benchmark([before, after])  # fig. 15: one panel a benchmark
    numbers = pass_at_k_data([before, after])         # exactly what they draw

Bands are 95% intervals over problems. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from internal_policy.analysis.figure_data import OneOrMany, listed
from internal_policy.data.benchmarks import title
from internal_policy.plotting import marks as drawing
from internal_policy.plotting import style
from internal_policy.utils import palette
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.evaluation.results import Evaluation

__all__ = ["pass_at_k", "pass_at_k_by_benchmark", "pass_at_k_data", "plot_pass_at_k", "save_evaluation_figures"]

AVERAGE = "Average"
_MOST_TICKS = 6
_LEGEND_SIGN = 4.5
"""Room for a line's sign in the legend and the gap after it, in sizes of its type."""


def pass_at_k_data(evaluations: OneOrMany[Evaluation], *, label: OneOrMany[str] | None = None) -> pd.DataFrame:
    """Return the numbers of figs. 6 and 15.

    The average over B benchmarks is that of their values, each benchmark of equal weight. They are independent, so the
    ends of its interval lie as far from it as the root of the sum of squares of theirs, over B (Zou and Donner 2008).

    Args:
        evaluations: One evaluation, or any number of models on any number of benchmarks.
        label: What to call the model, or that of each evaluation.

    Returns:
        A row for each model, benchmark and K: model, benchmark, k, value, low, high, rates from 0 to 1. Where there are
        several benchmarks, rows of the benchmark ``Average`` follow: for the benchmarks that all models have, and the K
        that all of these have.

    Raises:
        UserError: no evaluation, one name stands for different problems, a model is given twice on one benchmark, or
            there is another number of labels than of evaluations.
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
        ax: Where to draw; without it a figure of its own with a legend is made.
        benchmark: Which benchmark; without it their average where there are several.
        label: What to call the model, or that of each evaluation.
        color: Of the line, or of each in the order of the legend.

    Returns:
        The axes.
    """
    frame = pass_at_k_data(evaluations, label=label)
    chosen = title(benchmark) if benchmark is not None else _summary(frame)
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1, panel_height=1.6)
        _panel(frame, chosen, ax, color)
        _legend(figure, [ax], frame)
        return ax
    _panel(frame, chosen, ax, color)
    return ax


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
        ax: Where to draw, one panel; without it a figure with a legend is made.
        label: What to call the model, or that of each evaluation.
        color: Of the line, or of each in the order of the legend.

    Returns:
        The figure.
    """
    panel = None if ax is None else drawing.panels_of(ax, 1, "this figure has one panel")[0]
    return style.root_figure(plot_pass_at_k(evaluations, panel, label=label, color=color))


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
        ax: Where to draw, one for each benchmark in order of first appearance; without it a figure with a legend is
            made.
        label: What to call the model, or that of each evaluation.
        color: Of the line, or of each in the order of the legend.

    Returns:
        The figure.
    """
    frame = pass_at_k_data(evaluations, label=label)
    benchmarks = [b for b in dict.fromkeys(frame["benchmark"]) if b != AVERAGE]
    if ax is not None:
        panels = drawing.panels_of(ax, len(benchmarks), "one for each benchmark")
        for benchmark, panel in zip(benchmarks, panels, strict=True):
            _panel(frame, benchmark, panel, color)
        return style.root_figure(panels[0])
    figure, columns = style.panel_grid(len(benchmarks), panel_height=1.6 if len(benchmarks) == 1 else 1.45)
    panels = [column[0] for column in columns]
    for benchmark, panel in zip(benchmarks, panels, strict=True):
        _panel(frame, benchmark, panel, color)
    with style.paper_style():
        figure.supxlabel(panels[0].get_xlabel())
        figure.supylabel(panels[0].get_ylabel())
    for panel in panels:
        panel.set(xlabel="", ylabel="")
    _legend(figure, panels, frame)
    return figure


def save_evaluation_figures(evaluations: OneOrMany[Evaluation], directory: Path) -> list[Path]:
    """Write figs. 6 and 15 as PNG and PDF. The same evaluations give the same bytes.

    Args:
        evaluations: The models on their benchmarks.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    drawings = {"fig6_pass_at_k": pass_at_k, "fig15_pass_at_k_by_benchmark": pass_at_k_by_benchmark}
    return [p for stem, draw in drawings.items() for p in style.save_figure(draw(evaluations), directory / stem)]


def _names(evaluations: Sequence[Evaluation], label: OneOrMany[str] | None) -> list[str]:
    """As much of the end of each model's name as tells the models apart, or what the user calls them."""
    given = drawing.labels_for(label, [e.name for e in evaluations], "evaluations")
    seen = [(name, e.benchmark) for name, e in zip(given, evaluations, strict=True)]
    if twice := next((pair for pair in seen if seen.count(pair) > 1), None):
        raise UserError(f"{twice[0]} was given twice on {twice[1]}; give each model once, or draw them apart")
    if label is not None:
        return given
    parts = [name.strip("/").split("/") for name in given]
    n_models = len({tuple(part) for part in parts})
    depths = range(1, 1 + max(map(len, parts)))
    depth = next(d for d in depths if len({tuple(part[-d:]) for part in parts}) == n_models)
    return ["/".join(part[-depth:]) for part in parts]


def _average(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of the average over the benchmarks that all models have; none where they share fewer than two."""
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


def _panel(frame: pd.DataFrame, benchmark: str, ax: Axes, color: Any) -> None:
    shown = frame[frame["benchmark"] == benchmark]
    if shown.empty:
        raise UserError(
            f"no model was evaluated on {benchmark}; there are {', '.join(dict.fromkeys(frame['benchmark']))}"
        )
    labels = _fitted(list(dict.fromkeys(frame["model"])), ax)
    colors = drawing.colors_for(color, len(labels), "models")
    with style.paper_style():
        for place, ((model, label), own) in enumerate(zip(labels.items(), colors, strict=True)):
            marks = style.marked_line(palette.series(place)) | ({} if own is None else {"color": own})
            rows = shown[shown["model"] == model].sort_values("k")
            if rows.empty:
                continue
            if rows["low"].notna().any():
                ax.fill_between(rows["k"], rows["low"], rows["high"], color=marks["color"], alpha=0.15, linewidth=0)
            if len(rows) == 1:
                reach = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
                ax.errorbar(rows["k"], rows["value"], reach, color=marks["color"], alpha=0.4, linewidth=2.5)
            ax.plot(rows["k"], rows["value"], label=label, zorder=3, markersize=3, clip_on=False, **marks)
        _set_k_axis(ax, sorted(set(shown["k"])))
        _set_rate_axis(ax, shown)
        ax.set_xlabel("K")
        ax.set_ylabel("Pass@K (%)")
        style.set_title(ax, benchmark)


def _set_k_axis(ax: Axes, ks: Sequence[int]) -> None:
    """Logarithmic to base 2, with few enough round ticks to be read; between them there is nothing to name."""
    ax.set_xscale("log", base=2)
    exponents = [np.log2(k) for k in (ks[0], ks[-1])]
    step = 1 if exponents[1] - exponents[0] < _MOST_TICKS else 2
    ticks = [2.0**e for e in range(0, int(exponents[1]) + 1, step) if e >= exponents[0]]
    ax.set_xticks(ticks if len(ticks) > 1 else list(ks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:.0f}"))
    margin = 0.06 * max(exponents[1] - exponents[0], 1.0)
    ax.set_xlim(2.0 ** (exponents[0] - margin), 2.0 ** (exponents[1] + margin))


def _set_rate_axis(ax: Axes, rows: pd.DataFrame) -> None:
    """Percent, never beyond what a rate can be."""
    ends = rows[["value", "low", "high"]].to_numpy(dtype=float)
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = max(0.05 * (high - low), 0.01)
    ax.set_ylim(max(0.0, low - margin), min(1.0, high + margin))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.4g}"))


def _fitted(names: Sequence[str], ax: Axes) -> dict[str, str]:
    """Cut the middle out of names that a legend has no room for, unless two would then be the same."""
    figure = style.root_figure(ax)
    with style.paper_style():
        size = 7.5
        room = figure.bbox.width / figure.dpi * style.POINTS_PER_INCH - _LEGEND_SIGN * size
        cut = {name: style.cut(name, room, size) for name in names}
    if len(set(cut.values())) < len(names):
        return {name: f"({i}) {cut[name]}" for i, name in enumerate(names, start=1)}
    return cut


def _legend(figure: Figure, axes: Sequence[Axes], frame: pd.DataFrame) -> None:
    band = [Patch(color=style.NEUTRAL, alpha=0.35, linewidth=0, label="95% interval")]
    with style.paper_style():
        style.figure_legend(figure, axes, [], band if frame["low"].notna().any() else [])
