"""What the panels of `figures` are drawn with: lines with bands, stages, the boundary layer's name, titles."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, is_color_like

from internal_policy.analysis.figure_data import ModuleSite, OneOrMany, baseline_data
from internal_policy.plotting import style
from internal_policy.utils.errors import UserError
from internal_policy.utils.palette import LOOKS, STAGES

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

BASELINE_LABEL = "random weights"
_SIZE_IN_NAME = re.compile(r"\d[bm]\b", re.IGNORECASE)
EMBEDDED = "testbed/"
LENS_TITLES = {"policy": "", "logit-lens": "logit lens"}
_DRAWN = "internal_policy"


def site_marks(site: ModuleSite, color: Any = None) -> dict[str, Any]:
    """Return how the line of a module looks.

    Args:
        site: attn or ffn.
        color: In place of the module's own.

    Returns:
        Arguments of `line`.
    """
    return style.marked_line(LOOKS[site]) | ({} if color is None else {"color": color})


def is_first(ax: Axes) -> bool:
    """Tell whether a panel shows no analysis yet, whatever else the user drew there, and remember that it does now.

    Args:
        ax: The panel.

    Returns:
        Whether titles, axes and stages are still to be drawn.
    """
    first = ax.get_gid() != _DRAWN
    ax.set_gid(_DRAWN)
    return first


def widen(ax: Axes, rows: pd.DataFrame, y: str) -> None:
    """Make room for a further analysis in a panel whose limits are those of the first.

    Args:
        ax: The panel.
        rows: What was drawn, with its `layer`.
        y: The column up the panel.
    """
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    margin = 0.05 * (high - low)
    ax.set_xlim(left, max(right, rows["layer"].max() + 0.5))
    ax.set_ylim(min(low, rows[y].min() - margin), max(high, rows[y].max() + margin))


def panels_of(ax: OneOrMany[Axes], n: int, needed: str) -> list[Axes]:
    """Return the panels that a user gave to draw on.

    Args:
        ax: One panel, several, or a grid of them as `Figure.subplots` gives it, row by row.
        n: How many the figure has.
        needed: What they are for, told where there are others.

    Returns:
        The panels.

    Raises:
        UserError: There are more or fewer.
    """
    grid: Any = [ax] if isinstance(ax, Axes) else ax
    axes: list[Axes] = np.asarray(grid, dtype=object).ravel().tolist()
    if len(axes) != n:
        raise UserError(f"got {len(axes)} axes in ax; needed are {n}: {needed}")
    return axes


def labels_for(label: OneOrMany[str] | None, names: Sequence[str], what: str) -> list[str]:
    """Name the things in a figure.

    Args:
        label: What the user calls them: one name, or one for each.
        names: Their own names.
        what: What they are, told where there is another number of labels.

    Returns:
        A name for each.

    Raises:
        UserError: There are more or fewer labels than things.
    """
    if label is None:
        return list(names)
    found = [label] * len(names) if isinstance(label, str) else list(label)
    if len(found) != len(names):
        raise UserError(f"got {len(found)} labels for {len(names)} {what}; give one for all, or one for each")
    return found


def colors_for(color: Any, n: int, what: str) -> list[Any]:
    """Colour the things in a figure.

    Args:
        color: The user's colours: one, one for each, or None.
        n: How many things there are.
        what: What they are, told where there is another number of colours.

    Returns:
        A colour for each; None where the user gave none.

    Raises:
        UserError: There are more or fewer colours than things, or one is no colour.
    """
    one = color is None or isinstance(color, str) or is_color_like(color) or not isinstance(color, Iterable)
    found = [color] * n if one else list(color)
    if len(found) != n:
        raise UserError(f"got {len(found)} colours for {n} {what}; give one for all, or one for each")
    if bad := [own for own in found if own is not None and not is_color_like(own)]:
        raise UserError(f"color: {bad[0]!r} is no colour of matplotlib; give a name such as 'tab:blue'")
    return found


def color_map(color: str | Colormap | None, default: str) -> Colormap:
    """Return the colour map of a figure whose colours are a scale.

    Args:
        color: The user's, by its name or itself.
        default: The name of what is used without one.

    Returns:
        The colour map.

    Raises:
        UserError: matplotlib has none of this name.
    """
    if isinstance(color, Colormap):
        return color
    name = default if color is None else color
    if name not in mpl.colormaps:
        raise UserError(f"color: {name!r} is no colour map of matplotlib, which this figure needs; such as 'viridis'")
    return mpl.colormaps[name]


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


def boundary_line(ax: Axes, layer: float, label: str | None, color: Any = None) -> None:
    """Draw the line of the boundary layer.

    Args:
        ax: The panel, with layers along it.
        layer: The layer, from 1.
        label: For the legend.
        color: In place of its own.
    """
    marks = style.line_marks(LOOKS["boundary"]) | ({} if color is None else {"color": color})
    ax.axvline(layer, linewidth=0.6, label=label, zorder=2, **marks)


def label_axes(ax: Axes, y_label: str) -> None:
    """Say what goes along a panel of layers and what goes up.

    Args:
        ax: The panel.
        y_label: What goes up.
    """
    ax.set_xlabel("Layer")
    ax.set_ylabel(y_label)


def set_titles(axes: Sequence[Axes], analyses: Sequence[Analysis], label: OneOrMany[str] | None = None) -> None:
    """Title each panel with its model's name, its size where the name does not tell it, and its lens.

    Args:
        axes: The panels.
        analyses: What each shows.
        label: What to call them instead.

    Raises:
        UserError: There are more or fewer labels than analyses.
    """
    names = labels_for(label, short_names(analyses), "analyses")
    for ax, name, analysis in zip(axes, names, analyses, strict=True):
        size = f"({size_of(analysis)})" if label is None and size_of(analysis) else ""
        notes = [LENS_TITLES.get(analysis.lens, analysis.lens)]
        whole = f"{name} {size}".strip()
        if style.text_width(whole, ax.title.get_fontproperties()) > style.panel_width(ax):
            whole, notes = name, [size, *notes]
        style.set_title(ax, whole, "\n".join(filter(None, notes)))


def size_of(analysis: Analysis) -> str:
    """Say how many parameters a model has.

    Args:
        analysis: The model's analysis.

    Returns:
        Such as ``0.67 M parameters``; nothing where the name says so already, or the number was not recorded.
    """
    n = analysis.n_parameters
    if n is None or _SIZE_IN_NAME.search(analysis.name):
        return ""
    unit, scale = ("B", 1e9) if n >= 1e9 else ("M", 1e6) if n >= 1e5 else ("k", 1e3)
    value = n / scale
    return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f} {unit} parameters"


def short_names(analyses: Sequence[Analysis]) -> list[str]:
    """Name each analysis by as much of the end of its model's name as tells the models apart.

    An embedded model keeps the whole of its name: without it, it would read as the family that it resembles.

    Args:
        analyses: The analyses.

    Returns:
        A name for each.
    """
    parts = [[n] if (n := analysis.name.strip("/")).startswith(EMBEDDED) else n.split("/") for analysis in analyses]
    n_models = len({tuple(part) for part in parts})
    depths = range(1, 1 + max(map(len, parts)))
    depth = next(d for d in depths if len({tuple(part[-d:]) for part in parts}) == n_models)
    return ["/".join(part[-depth:]) for part in parts]


def stage_strip(ax: Axes, rows: pd.DataFrame, place: float, name: str, color: Any = None) -> None:
    """Draw a model's layers as one strip from the embedding (left) to the top, coloured by stage.

    Args:
        ax: The panel, with relative depth along it.
        rows: A row for each layer, with its `stage`, `start` and `end` in relative depth, and `boundary`.
        place: The strip's middle.
        name: Stands above it.
        color: Of the line at the boundary layer.
    """
    note: dict[str, Any] = {"fontsize": 6.5, "fontfamily": ax.title.get_fontfamily(), "parse_math": False}
    room = style.panel_width(ax)
    ax.text(0.0, place - 0.3, style.cut(name, room, 7.5), va="bottom", **{**note, "fontsize": 7.5})
    for stage, run in groupby(rows.to_dict("records"), key=lambda row: str(row["stage"])):
        found = list(run)
        start, end = found[0]["start"], found[-1]["end"]
        colour = STAGES[stage].light
        ax.barh(place, end - start, 0.5, start, color=colour, edgecolor="white", linewidth=0.8, label=stage)
        first, last = found[0]["layer"], found[-1]["layer"]
        text = f"{first}" if first == last else f"{first}\N{EN DASH}{last}"
        if style.text_width(text, 6.5) < (end - start) * room:
            ax.text((start + end) / 2, place, text, ha="center", va="center", **note)
    for end in rows.loc[rows["boundary"], "end"]:
        look: dict[str, Any] = {"color": LOOKS["boundary"].light if color is None else color, "linewidth": 1.2}
        ax.plot([end, end], [place - 0.25, place + 0.4], label="boundary layer", **look)


def shade_stages(ax: Axes, rows: pd.DataFrame) -> None:
    """Shade the stages behind a panel.

    Args:
        ax: The panel, with layers along it.
        rows: A row for each layer, with its `stage`.
    """
    for stage, run in groupby(zip(rows["stage"], rows["layer"], strict=True), key=lambda pair: pair[0]):
        layers = [layer for _, layer in run]
        ax.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=STAGES[stage].light, label=stage, lw=0, zorder=0)


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
