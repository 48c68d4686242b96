"""What the figures of a comparison share: panels, a mark for each analysis, keys, colour bars and axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from internal_policy.comparison.figure_data import in_order, shown_names, steps_known
from internal_policy.plotting import style
from internal_policy.plotting.marks import colors_for
from internal_policy.statistics import Floats
from internal_policy.utils import palette

if TYPE_CHECKING:
    from internal_policy.comparison.results import AnalysisComparison

MOST_NAMED = 12
"""Most analyses that a key names one by one; more have a colour bar, and no bands."""
_SMALL = 6.5
_ROW_NAME_ROOM = 80.0
_TICK_NAME_ROOM = 60.0
_TICK_ROOM = 18.0
_KEY_SIGN = 4.5
_MOST_TICKS = 9
_FEW = 4
_ROWS_FREE = 2


def grid(n_rows: int, widths: Sequence[float], height: float) -> list[Axes]:
    """Make a figure over both columns.

    Args:
        n_rows: Rows of panels.
        widths: Relative width of each column of panels.
        height: Height of a panel with its labels, inches.

    Returns:
        The panels, row by row.
    """
    with style.paper_style():
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.03, hspace=0.03)
        figure = style.PaperFigure(figsize=(style.TWO_COLUMNS, height * n_rows + 0.3), layout=layout)
        spec = figure.add_gridspec(n_rows, len(widths), width_ratios=list(widths))
        return [figure.add_subplot(spec[row, column]) for row in range(n_rows) for column in range(len(widths))]


def series(comparison: AnalysisComparison, color: Any = None) -> dict[str, dict[str, Any]]:
    """Give each analysis a line of its own: shades in order of the steps, or colours and dashes for models.

    Args:
        comparison: The comparison.
        color: The user's colours: one, one for each of the comparison's labels, or None.

    Returns:
        Label, in order of the steps: arguments of a line.
    """
    labels = in_order(comparison)
    n = len(labels)
    if steps_known(comparison) or n > MOST_NAMED:
        found = {label: {"color": shade, "linestyle": "-"} for label, shade in zip(labels, _shades(n), strict=True)}
    else:
        found = {label: style.line_marks(palette.series(i)) for i, label in enumerate(labels)}
    for label, own in zip(comparison.labels, colors_for(color, n, "analyses"), strict=True):
        found[label] |= {} if own is None else {"color": own}
    return found


def line(ax: Axes, rows: pd.DataFrame, x: str, y: str, mark: Mapping[str, Any], *, bands: bool) -> None:
    """Draw a line, with its 95% band where it is known and wanted.

    Args:
        ax: The panel.
        rows: With the columns x, y, low and high.
        x: Column of the position.
        y: Column of the value.
        mark: Arguments of the line.
        bands: Whether there is room for bands.
    """
    if rows.empty:
        return
    if bands and rows["low"].notna().any():
        ends = (rows["low"].astype(float), rows["high"].astype(float))
        ax.fill_between(rows[x].astype(float), *ends, color=mark["color"], alpha=0.15, linewidth=0, zorder=2)
    ax.plot(rows[x].astype(float), rows[y].astype(float), zorder=2.5, **mark)


def depth_axis(ax: Axes) -> None:
    """Give a panel the relative depths 0 to 1.

    Args:
        ax: The panel.
    """
    ax.set_xlim(-0.02, 1.02)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_xlabel("Relative depth, layer / $L$")


def heat_map(ax: Axes, values: Floats, names: Sequence[str], *, centred: bool, named: bool, colours: Colormap) -> None:
    """Draw a map with a colour bar: a row an analysis, the first on top, a column a layer.

    Args:
        ax: The panel.
        values: [analyses, layers], nats.
        names: Of the rows.
        centred: Colours diverge from zero.
        named: Whether the names stand beside the rows.
        colours: Of a map that does not diverge.
    """
    n_rows, n_layers = values.shape
    reach = float(np.nanmax(np.abs(values))) or 1.0
    # An entropy is never below zero, and zero is where a policy is certain.
    limits: dict[str, Any] = (
        {"vmin": -reach, "vmax": reach, "cmap": "RdBu_r"} if centred else {"vmin": 0.0, "vmax": reach, "cmap": colours}
    )
    mesh = ax.pcolormesh(np.arange(n_layers + 1) + 0.5, np.arange(n_rows + 1) - 0.5, values, rasterized=True, **limits)
    style.root_figure(ax).colorbar(mesh, ax=ax, pad=0.015, fraction=0.06, aspect=16).outline.set_linewidth(0.4)
    style.set_layer_axis(ax, n_layers)
    ax.set_ylim(n_rows - 0.5, -0.5)
    every = ceil(n_rows * (_SMALL + 1.0) / (0.72 * ax.bbox.height / style.root_figure(ax).dpi * style.POINTS_PER_INCH))
    ticks = [i for i in range(n_rows) if i % every == 0]
    # The last checkpoint is the one that is asked for most.
    if ticks[-1] != n_rows - 1:
        ticks = [i for i in ticks if n_rows - 1 - i >= every] + [n_rows - 1]
    texts = [cut_front(names[i], _ROW_NAME_ROOM, _SMALL) for i in ticks] if named else []
    ax.set_yticks(ticks, texts if named else [""] * len(ticks), fontsize=_SMALL, parse_math=False)
    ax.spines[["top", "right"]].set_visible(True)


def cut_front(text: str, room: float, size: float) -> str:
    """Take out the beginning of a name that has no room: models of one family differ at the end.

    Args:
        text: The name.
        room: Its room, points.
        size: Of the style's own font, points.

    Returns:
        The name, or its end.
    """
    if style.text_width(text, size) <= room:
        return text
    ends = (f"…{text[i:]}" for i in range(1, len(text)))
    return next((end for end in ends if style.text_width(end, size) <= room), text[-1:])


def series_axis(ax: Axes, comparison: AnalysisComparison, marks: Mapping[str, Mapping[str, Any]]) -> float:
    """Name the places 0, 1, ... of an axis along which each analysis has one; in the colours of their lines.

    Args:
        ax: The panel.
        comparison: The comparison.
        marks: The lines, by label.

    Returns:
        By how much a figure should be higher for the names, inches.
    """
    names = shown_names(comparison)
    if len(marks) > MOST_NAMED or (steps_known(comparison) and not comparison.labels_given):
        names, title = _short_names(comparison)
        ax.set_xlabel(title.split(" (")[0])
    every = ceil(len(marks) / MOST_NAMED)
    places = list(range(0, len(marks), every))
    labels = list(marks)
    texts = [cut_front(names[labels[i]], _TICK_NAME_ROOM, _SMALL) for i in places]
    ax.set_xticks(places, texts, rotation=90, fontsize=_SMALL, parse_math=False)
    for tick, place in zip(ax.get_xticklabels(), places, strict=True):
        tick.set_color(marks[labels[place]]["color"])
    # The names take no room from the panel: a figure of its own grows by what a tick has not got already.
    extra = max(style.text_width(text, _SMALL) for text in texts) - _TICK_ROOM
    return max(0.0, extra) / style.POINTS_PER_INCH


def layer_colours(n_layers: int, colours: Colormap) -> ListedColormap:
    """Give each layer a shade, the first dark.

    Args:
        n_layers: L.
        colours: What the shades are taken from.

    Returns:
        The colours of layers 1 to L.
    """
    return ListedColormap(_shades(n_layers, colours))


def layer_bar(panels: Sequence[Axes], colours: ListedColormap) -> None:
    """Draw the colour bar of the layers beside the panels.

    Args:
        panels: The panels.
        colours: Of `layer_colours`.
    """
    n = colours.N
    step = next(s for s in (1, 2, 4, 5, 10, 20, 50, 100) if n / s <= _MOST_TICKS)
    ticks = list(dict.fromkeys([1, *(t for t in range(step, n, step) if n - t >= step / 2), n]))
    _bar(panels, colours, [t - 1 for t in ticks], [f"{t}" for t in ticks], "Layer")


def key(
    comparison: AnalysisComparison,
    panels: Sequence[Axes],
    marks: Mapping[str, Mapping[str, Any]],
    signs: Sequence[Artist],
    frame: pd.DataFrame,
) -> None:
    """Name the lines: one by one above the panels, or by a colour bar where there are too many.

    Args:
        comparison: The comparison.
        panels: The panels.
        marks: The lines that are drawn, by label.
        signs: Labelled artists that explain other marks.
        frame: What is drawn; with a column low, empty where no interval is known.
    """
    figure = style.root_figure(panels[0])
    extra = list(signs)
    if len(marks) > MOST_NAMED:
        names, title = _short_names(comparison)
        every = ceil(len(marks) / _MOST_TICKS)
        places = list(range(0, len(marks), every))
        texts = [names[list(marks)[i]] for i in places]
        shades = ListedColormap([mark["color"] for mark in marks.values()])
        _bar(panels, shades, places, texts, title)
        if extra:
            style.figure_legend(figure, [], [], extra)
        return
    # More than a few names stand in two columns at least, and take no room from the panels.
    n_columns = 1 if len(marks) < _FEW else 2
    size = style.RC["legend.fontsize"]
    room = figure.bbox.width / figure.dpi * style.POINTS_PER_INCH / n_columns - _KEY_SIGN * size
    named = shown_names(comparison)
    texts = [style.cut(named[label], room, size) for label in marks]
    if len(set(texts)) < len(texts):
        numbers = {label: i for i, label in enumerate(comparison.labels, start=1)}
        texts = [f"({numbers[label]}) {text}" for label, text in zip(marks, texts, strict=True)]
    # A name is not a formula, and one that begins with an underscore is no secret.
    texts = [f" {text}".replace("$", r"\$") if text.startswith("_") else text.replace("$", r"\$") for text in texts]
    lines: list[Artist] = [Line2D([], [], label=text, **mark) for text, mark in zip(texts, marks.values(), strict=True)]
    if frame["low"].notna().any():
        extra.append(Patch(color=style.NEUTRAL, alpha=0.35, linewidth=0, label="95% interval"))
    style.figure_legend(figure, [], texts, [*lines, *extra])
    (legend,) = figure.legends
    rows = ceil((len(lines) + len(extra)) / getattr(legend, "_ncols", n_columns))
    figure.set_figheight(figure.get_figheight() + max(0, rows - _ROWS_FREE) * 1.6 * size / style.POINTS_PER_INCH)


def _short_names(comparison: AnalysisComparison) -> tuple[dict[str, str], str]:
    """For each label its step, or else its number in the tables; and what that is."""
    if steps_known(comparison):
        return {k: f"{step:g}" for k, step in zip(comparison.labels, comparison.steps, strict=True)}, (
            comparison.unit.capitalize()
        )
    numbers = {label: f"{i}" for i, label in enumerate(comparison.labels, start=1)}
    return numbers, "Analysis (as in boundaries.csv)"


def _shades(n: int, colours: Colormap | None = None) -> list[tuple[float, ...]]:
    """Evenly spaced, without the pale end, which white paper swallows."""
    return [tuple(colour) for colour in (colours or mpl.colormaps["viridis"])(np.linspace(0.0, 0.9, n))]


def _bar(
    panels: Sequence[Axes], colours: ListedColormap, ticks: Sequence[int], texts: Sequence[str], title: str
) -> None:
    norm = BoundaryNorm(np.arange(colours.N + 1) - 0.5, colours.N)
    mappable = ScalarMappable(norm=norm, cmap=colours)
    bar = style.root_figure(panels[0]).colorbar(mappable, ax=list(panels), pad=0.01, fraction=0.03, aspect=30)
    bar.set_ticks(list(ticks), labels=list(texts))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.4)
    bar.set_label(title)
