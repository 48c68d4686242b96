"""What the panels of `figures` are drawn with: lines with bands, stages, the boundary layer's name, titles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from internal_policy import style
from internal_policy.figure_data import ModuleSite, baseline_data

if TYPE_CHECKING:
    from internal_policy.results import Analysis

BASELINE_LABEL = "random weights"
LENS_TITLES = {"policy": "", "logit-lens": "logit lens"}
SITE_MARKS: dict[ModuleSite, dict[str, Any]] = {
    "attn": {"color": style.ATTENTION, "marker": "^", "linestyle": "-"},
    "ffn": {"color": style.FEED_FORWARD, "marker": "s", "linestyle": (0, (4, 1.2))},
}


def line(ax: Axes, rows: pd.DataFrame, x: str, y: str, **marks: Any) -> None:
    """Draw a line with its band; a site that was not measured has neither, an unknown standard error no band.

    Args:
        ax: The panel.
        rows: A row for each point, with `low` and `high` of its 95% interval.
        x: The column along the panel.
        y: The column up the panel.
        **marks: How the line looks.
    """
    if rows.empty:
        return
    if rows["low"].notna().any():
        ax.fill_between(rows[x], rows["low"], rows["high"], color=marks["color"], alpha=0.2, linewidth=0, zorder=2)
    ax.plot(rows[x], rows[y], zorder=2.5, markersize=marker_size(rows), **marks)


def baseline(ax: Axes, analysis: Analysis, site: str, quantity: str, offset: float = 0.0) -> None:
    """Draw in grey what the same responses give with random weights, where that was measured.

    Args:
        ax: The panel, with layers along it.
        analysis: What it shows.
        site: layer, attn or ffn.
        quantity: entropy or change.
        offset: Where the values stand about their layer's tick, layers.
    """
    rows = baseline_data([analysis])
    rows = rows[(rows["site"] == site) & (rows["quantity"] == quantity)]
    rows = rows.assign(position=rows["layer"] + offset)
    line(ax, rows, "position", "value", color=style.NEUTRAL, marker="x", markeredgewidth=0.6, label=BASELINE_LABEL)


def marker_size(rows: pd.DataFrame) -> float:
    """Choose the markers' size, small enough that a deep model's stay apart.

    Args:
        rows: A row for each point, with its `layer`.

    Returns:
        Points.
    """
    return float(np.clip(60 / max(1, rows["layer"].nunique()), 1.6, 2.6))


def zero_line(ax: Axes) -> None:
    """Draw where nothing changes.

    Args:
        ax: The panel.
    """
    ax.axhline(0.0, color=style.NEUTRAL, linewidth=0.6, zorder=1)


def label(ax: Axes, analysis: Analysis, y_label: str) -> None:
    """Title a panel by its model, and label its axes.

    Args:
        ax: The panel.
        analysis: What it shows.
        y_label: What goes up.
    """
    set_titles([ax], [analysis])
    ax.set_xlabel("Layer")
    ax.set_ylabel(y_label)


def set_titles(axes: Sequence[Axes], analyses: Sequence[Analysis]) -> None:
    """Title each panel with as much of the end of its model's name as tells the models apart, and its lens.

    Args:
        axes: The panels.
        analyses: What each shows.
    """
    for ax, name, analysis in zip(axes, short_names(analyses), analyses, strict=True):
        style.set_title(ax, name, LENS_TITLES.get(analysis.lens, analysis.lens))


def short_names(analyses: Sequence[Analysis]) -> list[str]:
    """Name each analysis by as much of the end of its model's name as tells the models apart.

    Args:
        analyses: The analyses.

    Returns:
        A name for each.
    """
    parts = [analysis.name.strip("/").split("/") for analysis in analyses]
    n_models = len({tuple(part) for part in parts})
    depths = range(1, 1 + max(map(len, parts)))
    depth = next(d for d in depths if len({tuple(part[-d:]) for part in parts}) == n_models)
    return ["/".join(part[-depth:]) for part in parts]


def stage_strip(ax: Axes, rows: pd.DataFrame, place: float, name: str) -> None:
    """Draw a model's layers as one strip from the embedding (left) to the top, coloured by stage.

    Args:
        ax: The panel, with relative depth along it.
        rows: A row for each layer, with its `stage`, `start` and `end` in relative depth, and `boundary`.
        place: The strip's middle.
        name: Stands above it.
    """
    note: dict[str, Any] = {"fontsize": 6.5, "fontfamily": ax.title.get_fontfamily(), "parse_math": False}
    room = style.panel_width(ax)
    ax.text(0.0, place - 0.3, style.cut(name, room, 7.5), va="bottom", **{**note, "fontsize": 7.5})
    for stage, run in groupby(rows.to_dict("records"), key=lambda row: str(row["stage"])):
        found = list(run)
        start, end = found[0]["start"], found[-1]["end"]
        colour = style.STAGE_COLOURS[stage]
        ax.barh(place, end - start, 0.5, start, color=colour, edgecolor="white", linewidth=0.8, label=stage)
        first, last = found[0]["layer"], found[-1]["layer"]
        text = f"{first}" if first == last else f"{first}\N{EN DASH}{last}"
        if style.text_width(text, 6.5) < (end - start) * room:
            ax.text((start + end) / 2, place, text, ha="center", va="center", **note)
    for end in rows.loc[rows["boundary"], "end"]:
        look: dict[str, Any] = {"color": "0.25", "linewidth": 1.2, "label": "boundary layer"}
        ax.plot([end, end], [place - 0.25, place + 0.4], **look)


def shade_stages(ax: Axes, rows: pd.DataFrame) -> None:
    """Shade the stages behind a panel.

    Args:
        ax: The panel, with layers along it.
        rows: A row for each layer, with its `stage`.
    """
    for stage, run in groupby(zip(rows["stage"], rows["layer"], strict=True), key=lambda pair: pair[0]):
        layers = [layer for _, layer in run]
        ax.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=style.STAGE_COLOURS[stage], label=stage, lw=0, zorder=0)


def name_boundary(ax: Axes, boundary_layer: int | None, n_layers: int) -> None:
    """Name the boundary layer beside its line, in room made for it above the data.

    Args:
        ax: The panel, with layers along it.
        boundary_layer: The layer, from 1; that there is none is said too.
        n_layers: L.
    """
    note: dict[str, Any] = {"fontsize": 6.5, "fontfamily": ax.title.get_fontfamily()}
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))
    if boundary_layer is None:
        ax.text(0.5, 0.97, "no boundary layer", transform=ax.transAxes, ha="center", va="top", color="0.35", **note)
        return
    right = boundary_layer <= n_layers / 2
    share = (n_layers + 0.5 - boundary_layer if right else boundary_layer - 0.5) / n_layers
    text = f"boundary layer {boundary_layer}"
    if style.text_width(text, note["fontsize"]) + 4 > share * style.panel_width(ax):
        text = f"layer {boundary_layer}"
    ax.annotate(
        text,
        (boundary_layer, 0.97),
        xycoords=ax.get_xaxis_transform(),
        xytext=(2 if right else -2, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        **note,
    )
