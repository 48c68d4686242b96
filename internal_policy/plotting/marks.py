"""Building blocks of the figures: a user's axes, labels and colours; lines with bands; stages; names of models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, is_color_like
from matplotlib.figure import Figure

from internal_policy.analysis.figure_data import ModuleSite, OneOrMany, baseline_data, require_some
from internal_policy.plotting import style
from internal_policy.utils.errors import UserError
from internal_policy.utils.palette import LOOKS, STAGES

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

BASELINE_LABEL = "random weights"
EMBEDDED = "testbed/"
LENS_TITLES = {"policy": "", "logit-lens": "logit lens", "unit-norm": "unit norm"}
SMALL = 6.5
"""Font size of text inside a panel, points."""
_SIZE_IN_NAME = re.compile(r"\d[bm]\b", re.IGNORECASE)
_DRAWN = "internal_policy"


def check_axes(ax: OneOrMany[Axes], n: int, needed: str) -> list[Axes]:
    """Return the axes that a user gave as a list of `n`; a grid, as `Figure.subplots` makes it, row by row.

    `needed` says in the message what they are for.

    Raises:
        UserError: There are more or fewer.
    """
    grid: Any = [ax] if isinstance(ax, Axes) else ax
    axes: list[Axes] = np.asarray(grid, dtype=object).ravel().tolist()
    if len(axes) != n:
        raise UserError(f"got {len(axes)} axes in ax; needed are {n}: {needed}")
    return axes


def check_labels(label: OneOrMany[str] | None, names: Sequence[str], what: str) -> list[str]:
    """Return a label for each of the things in a figure: the user's (one for all, or one for each), or `names`.

    `what` says in the message what the things are.

    Raises:
        UserError: There are more or fewer labels than things.
    """
    if label is None:
        return list(names)
    labels = [label] * len(names) if isinstance(label, str) else list(label)
    if len(labels) != len(names):
        raise UserError(f"got {len(labels)} labels for {len(names)} {what}; give one for all, or one for each")
    return labels


def check_colors(color: Any, n: int, what: str) -> list[Any]:
    """Return a colour for each of the `n` things in a figure: the user's (one for all, or one for each), or None.

    `what` says in the message what the things are.

    Raises:
        UserError: There are more or fewer colours than things, or one is not a colour.
    """
    one = color is None or isinstance(color, str) or is_color_like(color) or not isinstance(color, Iterable)
    colors = [color] * n if one else list(color)
    if len(colors) != n:
        raise UserError(f"got {len(colors)} colours for {n} {what}; give one for all, or one for each")
    if bad := [each for each in colors if each is not None and not is_color_like(each)]:
        raise UserError(f"color: {bad[0]!r} is no colour of matplotlib; give a name such as 'tab:blue'")
    return colors


def check_colormap(color: str | Colormap | None, default: str = "viridis") -> Colormap:
    """Return the user's colour map, given as such or by its name, or that called `default`.

    Raises:
        UserError: matplotlib has no colour map of this name.
    """
    if isinstance(color, Colormap):
        return color
    name = default if color is None else color
    if name not in mpl.colormaps:
        raise UserError(f"color: {name!r} is no colour map of matplotlib, which this figure needs; such as 'viridis'")
    return mpl.colormaps[name]


def with_color(marks: dict[str, Any], color: Any) -> dict[str, Any]:
    """Return the arguments of a line with the user's colour, if there is one, in place of its own."""
    return marks if color is None else {**marks, "color": color}


def site_style(site: ModuleSite, color: Any = None) -> dict[str, Any]:
    """Return the arguments of `line` for a module (attn or ffn)."""
    return with_color(style.marker_style(LOOKS[site]), color)


def is_first(ax: Axes) -> bool:
    """Return whether a panel shows no analysis yet, whatever else the user drew there, and mark that it does now."""
    first = ax.get_gid() != _DRAWN
    ax.set_gid(_DRAWN)
    return first


def widen_limits(ax: Axes, rows: pd.DataFrame, y: str) -> None:
    """Make room for another analysis, with a column `layer` and values `y`, in limits that fit the first."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    margin = 0.05 * (high - low)
    ax.set_xlim(left, max(right, rows["layer"].max() + 0.5))
    ax.set_ylim(min(low, rows[y].min() - margin), max(high, rows[y].max() + margin))


def line(ax: Axes, rows: pd.DataFrame, x: str, y: str, *, alpha: float = 0.2, bands: bool = True, **marks: Any) -> None:
    """Draw a line with the band of its 95% intervals, in columns `low` and `high`, on a panel.

    An empty table draws nothing; without intervals, or without room for `bands`, there is no band. `marks` are
    arguments of `Axes.plot`.
    """
    if rows.empty:
        return
    numbers = rows[[x, y, "low", "high"]].astype(float)
    if bands and numbers["low"].notna().any():
        ends = (numbers["low"], numbers["high"])
        ax.fill_between(numbers[x], *ends, color=marks["color"], alpha=alpha, linewidth=0, zorder=2)
    ax.plot(numbers[x], numbers[y], **{"zorder": 2.5, **marks})


def marker_size(rows: pd.DataFrame) -> float:
    """Return the size of markers in points, small enough that those of a deep model stay apart."""
    return float(np.clip(60 / max(1, rows["layer"].nunique()), 1.6, 2.6))


def baseline(ax: Axes, analysis: Analysis, site: str, quantity: str, offset: float = 0.0) -> None:
    """Draw in grey what the same responses give with random weights, if that was measured.

    The points are `offset` layers to the right of their layer's tick.
    """
    rows = baseline_data([analysis])
    rows = rows[(rows["site"] == site) & (rows["quantity"] == quantity)]
    rows = rows.assign(position=rows["layer"] + offset)
    marks: dict[str, Any] = {"color": style.NEUTRAL, "marker": "x", "markeredgewidth": 0.6, "label": BASELINE_LABEL}
    line(ax, rows, "position", "value", markersize=marker_size(rows), **marks)


def zero_line(ax: Axes) -> None:
    """Draw a line where nothing changes."""
    ax.axhline(0.0, color=style.NEUTRAL, linewidth=0.6, zorder=1)


def short_name(name: str) -> str:
    """Return the last part of a model's name; an embedded model keeps its whole name.

    Without the first part, ``testbed/qwen3`` would read as the family that it resembles.
    """
    whole = name.strip("/")
    return whole if whole.startswith(EMBEDDED) else whole.split("/")[-1]


def short_names(names: Sequence[str]) -> list[str]:
    """Return as much of the end of each model's name as distinguishes the models; embedded models keep the whole."""
    parts = [[n] if (n := name.strip("/")).startswith(EMBEDDED) else n.split("/") for name in names]
    n_models = len({tuple(part) for part in parts})
    depths = range(1, 1 + max(map(len, parts)))
    depth = next(d for d in depths if len({tuple(part[-d:]) for part in parts}) == n_models)
    return ["/".join(part[-depth:]) for part in parts]


def set_titles(axes: Sequence[Axes], analyses: Sequence[Analysis], label: OneOrMany[str] | None = None) -> None:
    """Title each panel with its model's name or the user's label, its size if the name does not say it, and its lens.

    Raises:
        UserError: There are more or fewer labels than analyses.
    """
    names = check_labels(label, short_names([a.name for a in analyses]), "analyses")
    for ax, name, analysis in zip(axes, names, analyses, strict=True):
        size = f"({size_of(analysis)})" if label is None and size_of(analysis) else ""
        notes = [lens_title(analysis.lens)]
        title = f"{name} {size}".strip()
        if style.text_width(title, ax.title.get_fontproperties()) > style.panel_width(ax):
            title, notes = name, [size, *notes]
        style.set_title(ax, title, "\n".join(filter(None, notes)))


def lens_title(lens: str) -> str:
    """Return what a figure says of a lens: nothing of the paper's, and "lens NAME" of a user's own."""
    return LENS_TITLES.get(lens, f"lens {lens}")


def set_axes(
    ax: Axes, analysis: Analysis, label: str | None, y_label: str, margins: tuple[float, float] = (0.5, 0.5)
) -> None:
    """Give a panel of one analysis its axis of layers, title and labels; `margins` as for `style.set_layer_axis`."""
    style.set_layer_axis(ax, analysis.n_layers, margins)
    set_titles([ax], [analysis], label)
    ax.set(xlabel="Layer", ylabel=y_label)


def module_panels(
    analyses: Sequence[Analysis],
    plot: Callable[..., Axes],
    ax: OneOrMany[Axes] | None,
    label: OneOrMany[str] | None,
    color: Any,
) -> tuple[Figure, list[Axes]]:
    """Draw two panels for each analysis: what ATTN does (top) and what FFN does (bottom).

    `plot` draws one, with the arguments analysis, site, axes and `color`; `ax`, `label` and `color` are the user's.

    Returns:
        The figure and the panels. A new figure lacks only its legend.

    Raises:
        UserError: The number of axes, labels or colours does not fit that of the analyses.
    """
    require_some(analyses)
    n = len(analyses)
    columns: list[list[Axes]] = []
    if ax is None:
        figure, columns = style.panel_grid(n, n_stacked=2, panel_height=1.12)
        top, bottom = ([column[k] for column in columns] for k in (0, 1))
    else:
        panels = check_axes(ax, 2 * n, f"ATTN's for each of {n} analyses, then FFN's")
        top, bottom = panels[:n], panels[n:]
    for analysis, attn, ffn, own in zip(analyses, top, bottom, check_colors(color, n, "analyses"), strict=True):
        plot(analysis, "attn", attn, color=own)
        plot(analysis, "ffn", ffn, color=own)
    set_titles(top, analyses, label)
    if ax is not None:
        set_titles(bottom, analyses, label)
        return style.root_figure(top[0]), [*top, *bottom]
    for place, column in enumerate(columns):
        for panel in column:
            panel.set_xlabel("")
            if place % style.grid_shape(n)[1]:
                panel.set_ylabel("")
        column[0].tick_params(labelbottom=False)
        column[1].set_title("")
    figure.supxlabel("Layer")
    figure.align_ylabels()
    return figure, [panel for column in columns for panel in column]


def size_of(analysis: Analysis) -> str:
    """Return the number of parameters as text; nothing if the name says it or it was not recorded."""
    n = analysis.n_parameters
    if n is None or _SIZE_IN_NAME.search(analysis.name):
        return ""
    unit, scale = ("B", 1e9) if n >= 1e9 else ("M", 1e6) if n >= 1e5 else ("k", 1e3)
    value = n / scale
    return f"{value:.{2 if value < 1 else 1 if value < 10 else 0}f} {unit} parameters"


def stage_strip(ax: Axes, rows: pd.DataFrame, place: float, name: str, color: Any = None) -> None:
    """Draw a model's layers as one strip from the embedding (left) to the top, coloured by stage.

    A row of `rows` is a layer: its `stage`, its `start` and `end` in relative depth, and whether it is the `boundary`,
    where a line in `color` is drawn. `place` is the strip's middle, and `name` is written above it.
    """
    text_style: dict[str, Any] = {"fontfamily": ax.title.get_fontfamily(), "parse_math": False}
    room = style.panel_width(ax)
    ax.text(0.0, place - 0.3, style.shorten(name, room, 7.5), va="bottom", fontsize=7.5, **text_style)
    for stage, group in groupby(rows.to_dict("records"), key=lambda row: str(row["stage"])):
        run = list(group)
        (start, first), (end, last) = (run[0]["start"], run[0]["layer"]), (run[-1]["end"], run[-1]["layer"])
        bar: dict[str, Any] = {"color": STAGES[stage].light, "edgecolor": "white", "linewidth": 0.8, "label": stage}
        ax.barh(place, end - start, 0.5, start, **bar)
        text = f"{first}" if first == last else f"{first}\N{EN DASH}{last}"
        if style.text_width(text, SMALL) < (end - start) * room:
            ax.text((start + end) / 2, place, text, ha="center", va="center", fontsize=SMALL, **text_style)
    marks = with_color({"color": LOOKS["boundary"].light, "linewidth": 1.2, "label": "boundary layer"}, color)
    for end in rows.loc[rows["boundary"], "end"]:
        ax.plot([end, end], [place - 0.25, place + 0.4], **marks)


def shade_stages(ax: Axes, rows: pd.DataFrame) -> None:
    """Shade the stages behind a panel; a row of `rows` has a `layer` and its `stage`."""
    for stage, group in groupby(zip(rows["stage"], rows["layer"], strict=True), key=lambda pair: pair[0]):
        layers = [layer for _, layer in group]
        ax.axvspan(layers[0] - 0.5, layers[-1] + 0.5, color=STAGES[stage].light, label=stage, lw=0, zorder=0)


def name_boundary(ax: Axes, boundary_layer: int | None, n_layers: int) -> None:
    """Name the boundary layer next to its line, or say that there is none, in room made above the data."""
    text_style: dict[str, Any] = {"fontsize": SMALL, "fontfamily": ax.title.get_fontfamily(), "va": "top"}
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))
    if boundary_layer is None:
        middle: dict[str, Any] = {"transform": ax.transAxes, "ha": "center", "color": "0.35"}
        ax.text(0.5, 0.97, "no boundary layer", **middle, **text_style)
        return
    right = boundary_layer <= n_layers / 2
    share = (n_layers + 0.5 - boundary_layer if right else boundary_layer - 0.5) / n_layers
    text = f"boundary layer {boundary_layer}"
    if style.text_width(text, SMALL) + 4 > share * style.panel_width(ax):
        text = f"layer {boundary_layer}"
    ax.annotate(
        text,
        (boundary_layer, 0.97),
        xycoords=ax.get_xaxis_transform(),
        xytext=(2 if right else -2, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        **text_style,
    )
