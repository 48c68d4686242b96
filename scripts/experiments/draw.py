"""Draw the figures of the experiments from their stored tables: seconds, no model.

python scripts/experiments/draw.py     # figures/experiments
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import dose
import layers
import mechanism
import numpy as np
import pandas as pd
from cells import rate_text
from jobs import BOUNDARY, E1_RATES, E2_DOSES, E2_RATES, LAYERS, MODELS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import Tables, joined, over_seeds, read_part

from internal_policy.plotting import style
from internal_policy.utils import palette

FIGURES = Path("figures/experiments")
SMOOTH = 5
"""Steps over which what a step's rollouts give is averaged in a figure."""
ROLLOUTS = {
    "reward": "Reward",
    "reward_over_control": "Reward less\nthe control's",
    "policy_entropy": r"$H(\pi_\theta)$ (nats)",
    "length": "Length (tokens)",
}
"""Figure 4 of the paper: quantities of the rollouts of each step."""
STATES = {
    "cosine": "Cosine with later layers",
    "kl": "KL to later layers (nats)",
    "log_perplexity_start": "Log-perplexity,\nstart's responses",
    "log_perplexity_solutions": "Log-perplexity,\nright solutions",
    "log_perplexity_own": "Log-perplexity,\nown samples",
}
"""Figure 5 of the paper, and log-perplexities (nats per token) on two other kinds of responses."""
_METHODS = {"grpo": "GRPO", "ppo": "PPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}
_PANEL = 1.25


def _grid(rows: int, columns: int, height: float = _PANEL) -> tuple[style.PaperFigure, np.ndarray]:
    figure = style.new_figure(style.TWO_COLUMNS, height * rows + 0.5)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _means_and_seeds(
    ax: Axes, means: pd.DataFrame, runs: pd.DataFrame, by: str, order: Sequence[Any], label: Callable[[Any], str]
) -> None:
    """A line for each value of a column over the steps, and each seed as a thin one."""
    for place, value in enumerate(order):
        own = means[means[by] == value].sort_values("step")
        if len(own):
            ax.plot(own["step"], own["value"], label=label(value), **style.line_style(palette.series(place)))
    for (value, _), run in runs.sort_values("step").groupby([by, "seed"]):
        color = style.line_style(palette.series(order.index(value)))["color"]
        ax.plot(run["step"], run["value"], color=color, linewidth=0.4, alpha=0.5)


def _smoothed(table: pd.DataFrame) -> pd.DataFrame:
    table = table.sort_values(["run", "quantity", "step"])
    means = table.groupby(["run", "quantity"], sort=False)["value"].rolling(SMOOTH).mean()
    return table.assign(value=means.droplevel([0, 1])).dropna(subset="value")


@style.paper_style()
def alignment(tables: Tables, model: str, shown: dict[str, str]) -> Figure:
    """Draw quantities along alignment alone: a row of panels for each, a column for each rate, a line for each layer.

    Args:
        tables: of E1.
        model: whose.
        shown: quantities of `mechanism.quantities` and the labels of their axes.

    Returns:
        The figure: means over seeds, and each seed as a thin line, because bands of several layers hide one another.
    """
    long = mechanism.quantities(tables)
    long = long[(long["model"] == model) & long["quantity"].isin(shown)]
    long = _smoothed(long) if set(shown) <= set(ROLLOUTS) else long
    table = over_seeds(long, [*mechanism.BY, "quantity", "step"])
    figure, axes = _grid(len(shown), len(E1_RATES))
    for row, (quantity, label) in enumerate(shown.items()):
        own = table[table["quantity"] == quantity]
        for column, rate in enumerate(E1_RATES):
            ax = axes[row, column]
            ax.sharex(axes[0, 0])
            ax.sharey(axes[row, 0])
            order = sorted(own["layer"].unique())
            runs = long[(long["quantity"] == quantity) & (long["rate"] == rate)]
            _means_and_seeds(ax, own[own["rate"] == rate], runs, "layer", order, lambda x: f"layer {x:.0f}")
            if not ax.lines:
                ax.text(0.5, 0.5, "not run", ha="center", va="center", transform=ax.transAxes, color=style.NEUTRAL)
            if row == 0:
                ax.set_title(f"alignment at {rate_text(rate)}")
            ax.tick_params(labelbottom=row == len(shown) - 1, labelleft=column == 0)
        # A seed that collapses may be many times as far away as what the means are about.
        _limit(axes[row], own["value"])
        axes[row, 0].set_ylabel(label)
    figure.supxlabel("Step")
    figure.align_ylabels(axes[:, 0])
    style.figure_legend(figure, axes.ravel().tolist())
    return figure


def _limit(axes: Iterable[Axes], values: pd.Series) -> None:
    if values.empty:
        return
    low, high = values.min(), values.max()
    room = 0.12 * (high - low) or 0.1
    for ax in axes:
        ax.set_ylim(low - room, high + room)


@style.paper_style()
def dose_curves(tables: Tables) -> Figure:
    """Draw held-out Avg@1 over the steps for each dose: a row for each model, a column for each rate.

    Args:
        tables: of E2.

    Returns:
        The figure: means over seeds, and each seed as a thin line.
    """
    table = dose.curves(tables)
    found = tables["curves"]
    runs = found.assign(dose=found["ipa_steps"].where(found["method"] == "bupo", "0"), value=100 * found["avg"])
    figure, axes = _grid(len(MODELS), len(E2_RATES), 1.7)
    order = ["0", *sorted((d for d in table["dose"].unique() if d not in ("0", dose.AUTO)), key=int), dose.AUTO]
    for row, model in enumerate(MODELS):
        for column, rate in enumerate(E2_RATES):
            ax = axes[row, column]
            own, seeds = (t[(t["model"] == model) & ((t["rate"] == rate) | (t["dose"] == "0"))] for t in (table, runs))
            _means_and_seeds(ax, own.assign(**_percent(own)), seeds, "dose", order, _dose_label)
            ax.sharey(axes[0, 0])
            ax.set_title(f"{model}, alignment at {rate_text(rate)}")
    figure.supxlabel("Step")
    figure.supylabel("Held-out Avg@1 (%)")
    style.figure_legend(figure, axes.ravel().tolist())
    return figure


def _dose_label(value: str) -> str:
    return {"0": "GRPO", dose.AUTO: "BuPO, auto"}.get(value, f"BuPO, {value} steps")


def _percent(table: pd.DataFrame) -> dict[str, pd.Series]:
    return {name: 100 * table[name] for name in ("value", "low", "high")}


@style.paper_style()
def dose_differences(tables: Tables) -> Figure:
    """Draw BuPO minus GRPO against the dose, at equal total and at equal GRPO steps.

    Args:
        tables: of E2.

    Returns:
        The figure: a row for Avg@1 and one for Pass@16, a column for each model and rate. Each panel has its own scale,
        because a single run that collapsed has an interval many times as wide as the others.
    """
    table = dose.differences(tables)
    table = table[table["dose"] != dose.AUTO]
    figure, axes = _grid(2, len(MODELS) * len(E2_RATES), 1.5)
    for row, (measure, label) in enumerate((("avg", "Avg@1 (points)"), ("pass16", "Pass@16 (points)"))):
        for column, (model, rate) in enumerate((m, r) for m in MODELS for r in E2_RATES):
            ax = axes[row, column]
            own = table[(table["model"] == model) & (table["rate"] == rate) & (table["measure"] == measure)]
            for place, comparison in enumerate((dose.TOTAL, dose.OPTIMISED)):
                rows = own[own["comparison"] == comparison].astype({"dose": int}).sort_values("dose")
                _points(ax, rows["dose"] + (2 * place - 1), rows, place, f"at {comparison}")
            ax.axhline(0, color=style.NEUTRAL, linewidth=0.6)
            low, high = ax.get_ylim()
            ax.set(xlim=(0, 52), xticks=E2_DOSES, ylim=(min(low, -1), max(high, 1)))
            ax.tick_params(labelbottom=row == 1)
            if row == 0:
                ax.set_title(f"{model}\nat {rate_text(rate)}")
        axes[row, 0].set_ylabel(label)
    figure.supxlabel("Steps of alignment, of 120")
    figure.supylabel("BuPO minus GRPO")
    style.figure_legend(figure, axes.ravel().tolist())
    return figure


def _points(ax: Axes, x: Any, rows: pd.DataFrame, place: int, label: str) -> None:
    """Points with their intervals, in percent."""
    look = palette.series(place)
    if rows.empty:
        return
    ends = np.stack([rows["value"] - rows["low"], rows["high"] - rows["value"]])
    ax.errorbar(
        x,
        100 * rows["value"],
        yerr=100 * np.nan_to_num(ends),
        linewidth=0.7,
        elinewidth=0.7,
        label=label,
        **style.marker_style(look),
    )


@style.paper_style()
def every_layer(tables: Tables, evidence: pd.DataFrame) -> Figure:
    """Draw what training at each layer brought above the entropy change of its FFN.

    Args:
        tables: of E4 joined with those of E2.
        evidence: of `layers.measure`.

    Returns:
        The figure, a column for each model.
    """
    found, along = layers.outcomes(tables), layers.along(tables)
    along = along[(along["comparison"] == dose.TOTAL) & (along["step"] == "mean")]
    figure, axes = _grid(2, len(MODELS), 1.6)
    for column, model in enumerate(MODELS):
        top, bottom = axes[0, column], axes[1, column]
        own = found[(found["model"] == model) & (found["measure"] == "avg")].sort_values("layer")
        shown = own.assign(value=own["over_grpo"], low=own["over_grpo_low"], high=own["over_grpo_high"])
        _points(top, shown["layer"] - 0.08, shown, 0, "BuPO minus GRPO, at the end")
        area = along[along["model"] == model].sort_values("layer")
        _points(top, area["layer"] + 0.08, area, 3, "along the run, 95% over seeds")
        top.set_title(model)
        known = evidence[evidence["model"] == model].sort_values("layer") if len(evidence) else evidence
        if len(known):
            looks = {"change": palette.LOOKS["ffn"], "change_direction": palette.LOOKS["direction"]}
            labels = {"change": r"$\Delta H_{\mathrm{FFN}}$", "change_direction": "its direction part"}
            for name, look in looks.items():
                bottom.plot(known["layer"], known[name], label=labels[name], **style.marker_style(look))
        for ax in (top, bottom):
            ax.axhline(0, color=style.NEUTRAL, linewidth=0.6)
            switch = style.line_style(palette.LOOKS["boundary"])
            ax.axvline(BOUNDARY[model], linewidth=0.7, label="boundary layer", **switch)
            style.set_layer_axis(ax, LAYERS)
    axes[0, 0].set_ylabel("Avg@1 (points)")
    axes[1, 0].set_ylabel("Entropy change (nats)")
    figure.supxlabel("Layer")
    style.figure_legend(figure, axes.ravel().tolist())
    return figure


@style.paper_style()
def methods(tables: Tables) -> Figure:
    """Draw held-out Avg@1 over the steps of each method, with the seeds that all of them have.

    Args:
        tables: of the part methods joined with those of E2.

    Returns:
        The figure, a column for each model: means over seeds, and each seed as a thin line.
    """
    found = tables["curves"]
    found = found[found["method"].isin(_METHODS)]
    there = found["method"].nunique()
    shared = found.groupby(["model", "seed"])["method"].transform("nunique") == there
    table = over_seeds(found[shared], ["model", "method", "step"], "avg")
    figure, axes = _grid(1, len(MODELS), 1.9)
    for column, model in enumerate(MODELS):
        own = table[table["model"] == model]
        shown = own.assign(**_percent(own))
        seeds = found[shared & (found["model"] == model)]
        seeds = seeds.assign(value=100 * seeds["avg"])
        _means_and_seeds(axes[0, column], shown, seeds, "method", list(_METHODS), lambda name: _METHODS[name])
        axes[0, column].set_title(model)
    axes[0, 0].set_ylabel("Held-out Avg@1 (%)")
    figure.supxlabel("Step")
    style.figure_legend(figure, axes.ravel().tolist())
    return figure


def draw(directory: Path = FIGURES, data: Path | None = None) -> list[Path]:
    """Draw what there is data for.

    Args:
        directory: where the figures go.
        data: where the parts are; by default data/experiments.

    Returns:
        The files.
    """
    at = {} if data is None else {"data": data}
    e1, e2, e4, others = (read_part(part, **at) for part in ("e1", "e2", "e4", "methods"))
    written: list[Path] = []
    for model in MODELS:
        short = model.split("/")[1]
        if len(e1["runs"]) and (e1["runs"]["model"] == model).any():
            written += style.save_figure(alignment(e1, model, ROLLOUTS), directory / f"fig4_alignment_{short}")
            written += style.save_figure(alignment(e1, model, STATES), directory / f"fig5_alignment_{short}")
    if len(e2["runs"]):
        written += style.save_figure(dose_curves(e2), directory / "dose_curves")
        written += style.save_figure(dose_differences(e2), directory / "dose_differences")
    evidence = layers.read_evidence(*([] if data is None else [data / "e4" / layers.EVIDENCE.name]))
    if len(e4["runs"]) and len(e2["runs"]):
        written += style.save_figure(every_layer(joined(e4, e2), evidence), directory / "every_layer")
    if len(others["runs"]):
        written += style.save_figure(methods(joined(others, e2)), directory / "methods")
    return written


if __name__ == "__main__":
    for path in draw():
        print(path)
