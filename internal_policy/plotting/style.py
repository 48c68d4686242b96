"""How the figures look: sizes, fonts, colours, panel grids, axes of layers and reproducible files.

Figures belong to no pyplot state, and the user's rcParams are the same before and after a call.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, Locator

from internal_policy.utils.io import write_atomically
from internal_policy.utils.palette import LOOKS, Look

ONE_COLUMN, TWO_COLUMNS = 3.25, 6.75
"""Width of a figure in one column and over both columns of a two-column paper, inches."""
MAX_COLUMNS = 4
"""Most panels side by side."""
MIN_FONT_SIZE = 4.5
"""Smallest font that can be read in print, points."""
POINTS_PER_INCH = 72.0
BAND_LABEL = "95% interval"

STREAM, ATTENTION, FEED_FORWARD, POLICY, NEUTRAL = (
    LOOKS[name].light for name in ("stream", "attn", "ffn", "policy", "neutral")
)
"""The colour of each quantity in every figure."""

DASHES: Mapping[str, Any] = MappingProxyType(
    {"solid": "-", "dash": (0, (4, 1.2)), "dot": (0, (1, 1)), "dashdot": (0, (5, 1.2, 1, 1.2))}
)
"""matplotlib's patterns for the dashes of `palette`."""
MARKERS: Mapping[str, str] = MappingProxyType(
    {
        **{"circle": "o", "square": "s", "triangle-up": "^", "triangle-down": "v"},
        **{"diamond": "D", "star": "*", "cross": "P", "x": "X"},
    }
)
"""matplotlib's names for the markers of `palette`."""

RC: Mapping[str, Any] = MappingProxyType(
    {
        # Both fonts come with matplotlib, so a figure is the same everywhere; the second has what the first lacks.
        "font.family": ["STIXGeneral", "DejaVu Sans"],
        "mathtext.fontset": "stix",
        **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize", "figure.titlesize", "figure.labelsize"), 8.0),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 7.0),
        "axes.linewidth": 0.6,
        "axes.titlepad": 3.0,
        "axes.labelpad": 2.5,
        "axes.grid": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "axes.formatter.useoffset": False,
        **{
            f"{axis}tick.major.{name}": value
            for axis in "xy"
            for name, value in (("size", 2.0), ("width", 0.6), ("pad", 2.0))
        },
        "lines.linewidth": 1.0,
        "lines.markersize": 2.6,
        "hatch.linewidth": 0.4,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.2,
        "legend.handletextpad": 0.5,
        "legend.borderaxespad": 0.2,
        "text.usetex": False,
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white"),
        "savefig.dpi": 300,
        "savefig.bbox": None,
        "pdf.fonttype": 42,
        "pdf.compression": 6,
        "path.simplify": False,
    }
)
"""The settings that differ from matplotlib's defaults."""


def line_style(look: Look) -> dict[str, Any]:
    """Return the arguments of `Axes.plot` for a line: its colour and dash."""
    return {"color": look.light, "linestyle": DASHES[look.dash]}


def marker_style(look: Look) -> dict[str, Any]:
    """Return the arguments of `Axes.plot` for a line with markers."""
    return {**line_style(look), "marker": MARKERS[look.marker]}


@contextmanager
def paper_style() -> Iterator[None]:
    """Apply the paper's style over matplotlib's defaults, and restore the user's rcParams on any exit."""
    with mpl.rc_context():
        # The backend is one of the defaults, and setting it would start a GUI or end a notebook's.
        mpl.rcParams.update({key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")})
        mpl.rcParams.update(cast(Any, RC))
        yield


class PaperFigure(Figure):
    """A figure that keeps the paper's style whenever it is drawn, saved or shown.

    matplotlib makes ticks and finds fonts only when it draws, which is after the plotting function has returned.
    """

    def draw(self, renderer: Any) -> None:
        """Draw on a renderer, in the paper's style."""
        with paper_style():
            super().draw(renderer)

    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """Save to a file as `Figure.savefig` does, in the paper's style."""
        with paper_style():
            super().savefig(*args, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=150)
        return buffer.getvalue()


@paper_style()
def new_figure(width: float, height: float, pad: float = 0.03, space: float = 0.02) -> PaperFigure:
    """Make an empty figure with a constrained layout; sizes and paddings in inches."""
    layout = ConstrainedLayoutEngine(w_pad=pad, h_pad=pad, wspace=space, hspace=space)
    return PaperFigure(figsize=(width, height), layout=layout)


class LayerLocator(Locator):
    """Ticks of an axis of layers: layer 1, multiples of a round step, and the last layer, as many as fit.

    `first` is the position of layer 1 on the axis.
    """

    STEPS = (1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 500, 1000)

    def __init__(self, n_layers: int, first: float = 1.0) -> None:
        self.n_layers, self.first = n_layers, first

    def __call__(self) -> list[float]:
        """Return the ticks for the axis at its present width."""
        axis = self.axis
        if not isinstance(axis, Axis):
            return self.tick_values(1, self.n_layers)
        low, high = sorted(axis.axes.get_xlim())
        width = axis.axes.bbox.width / root_figure(axis.axes).dpi * POINTS_PER_INCH
        font = axis.get_major_ticks(1)[0].label1.get_fontproperties()
        label = text_width(f"{self.n_layers}", font) + 0.6 * font.get_size_in_points()
        return self._ticks(label * (high - low) / max(width, 1.0))

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Return about eight ticks between two positions."""
        return self._ticks((vmax - vmin) / 8)

    def _ticks(self, gap: float) -> list[float]:
        """Return ticks that are at least `gap` layers apart."""
        # The first gap is the shortest: from layer 1 to the first multiple.
        step = next((step for step in self.STEPS if step - 1 >= gap or step == 1 >= gap), self.n_layers)
        between = [layer for layer in range(step, self.n_layers, step) if layer > 1]
        # A short gap at the end looks like a mistake even where the labels do not touch.
        between = [layer for layer in between if self.n_layers - layer >= max(gap, 0.5 * step)]
        return [layer - 1 + self.first for layer in dict.fromkeys([1, *between, self.n_layers])]


def grid_shape(n_panels: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels: rows as even as possible, of at most `MAX_COLUMNS`."""
    n_rows = ceil(n_panels / MAX_COLUMNS)
    return n_rows, ceil(n_panels / n_rows)


@paper_style()
def panel_grid(n_panels: int, n_stacked: int = 1, panel_height: float = 1.45) -> tuple[PaperFigure, list[list[Axes]]]:
    """Make a figure with a column of panels for each model, in blocks of up to `MAX_COLUMNS` models.

    `panel_height` is in inches and includes the labels.

    Returns:
        The figure, and for each model its `n_stacked` axes from the top.
    """
    n_rows, n_columns = grid_shape(n_panels)
    height = panel_height * max(1.0, 1.0 + 0.2 * (3 - n_columns)) * n_rows * n_stacked + 0.55
    figure = new_figure(ONE_COLUMN if n_panels == 1 else TWO_COLUMNS, height)
    grid = figure.add_gridspec(n_rows * n_stacked, n_columns)
    places = (divmod(panel, n_columns) for panel in range(n_panels))
    return figure, [
        [figure.add_subplot(grid[row * n_stacked + k, column]) for k in range(n_stacked)] for row, column in places
    ]


def root_figure(ax: Axes) -> Figure:
    """Return the figure that contains an axes, above any subfigures."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("Got axes that have been removed from their figure; make new ones.")
    return figure


def text_width(text: str, font: FontProperties | float, *, math: bool = False) -> float:
    """Return the width of a line of text in points, in a font or in the style's own font of a size."""
    properties = font if isinstance(font, FontProperties) else FontProperties(size=font)
    width, _, _ = text_to_path.get_text_width_height_descent(text, properties, ismath=math)
    return float(width)


def figure_width(figure: Figure) -> float:
    """Return the width of a figure, points."""
    return float(figure.get_figwidth() * POINTS_PER_INCH)


def panel_width(ax: Axes) -> float:
    """Return an estimate of a panel's width in points; the layout is computed only when the figure is drawn."""
    figure, spec = root_figure(ax), ax.get_subplotspec()
    n_columns = spec.get_topmost_subplotspec().get_gridspec().ncols if spec is not None else 1
    width = 0.77 * figure.bbox.width / n_columns if n_columns > 1 else ax.bbox.width
    return float(width / figure.dpi * POINTS_PER_INCH)


def set_title(ax: Axes, name: str, note: str = "") -> None:
    """Title a panel with a name that keeps clear of its neighbours' and, below it, a note such as the lens.

    A long name is broken in two, then drawn smaller, then cut in its middle.
    """
    room, font = panel_width(ax), ax.title.get_fontproperties().copy()
    lines = _break_in_two(name, font) if text_width(name, font) > room else [name]
    widest = max(text_width(line, font) for line in lines)
    font.set_size(max(MIN_FONT_SIZE, font.get_size_in_points() * min(1.0, room / widest)))
    lines = [shorten(line, room, font) for line in lines]
    # A name is not a formula, whatever characters it has.
    ax.set_title(
        "\n".join([*lines, note] if note else lines),
        fontsize=font.get_size_in_points(),
        parse_math=False,
        linespacing=1.05,
    )


def _break_in_two(name: str, font: FontProperties) -> list[str]:
    """Break a name after the separator that leaves the two lines most even, if it has one."""
    cuts = [k + 1 for k, character in enumerate(name[:-1]) if character in "-_/ "]
    halves = [[name[:cut].rstrip(" "), name[cut:]] for cut in cuts]
    return min(halves, key=lambda pair: max(text_width(line, font) for line in pair), default=[name])


def shorten(line: str, room: float, font: FontProperties | float) -> str:
    """Leave out the middle of a text that is wider than `room` points: the ends of a checkpoint's name tell most."""
    kept = line
    for n in range(len(line) // 2, 1, -1):
        if text_width(kept, font) <= room:
            break
        kept = f"{line[:n]}…{line[-n:]}"
    return kept


def shorten_front(text: str, room: float, size: float) -> str:
    """Leave out the front of a name wider than `room` points, as models of one family differ at the end."""
    if text_width(text, size) <= room:
        return text
    ends = (f"…{text[i:]}" for i in range(1, len(text)))
    return next((end for end in ends if text_width(end, size) <= room), text[-1:])


def set_layer_axis(ax: Axes, n_layers: int, margins: tuple[float, float] = (0.5, 0.5), first: float = 1.0) -> None:
    """Give a panel an x-axis of layers 1..L, with layer 1 at `first`.

    `margins` is the room before the first layer and after the last, in layers.
    """
    ax.set_xlim(first - margins[0], first + n_layers - 1 + margins[1])
    ax.xaxis.set_major_locator(LayerLocator(n_layers, first))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x - first + 1:.0f}"))


def share_labels(figure: Figure, panels: Sequence[Axes]) -> None:
    """Label a figure with the axis labels that its panels have in common, once."""
    figure.supxlabel(panels[0].get_xlabel())
    figure.supylabel(panels[0].get_ylabel())
    for panel in panels:
        panel.set(xlabel="", ylabel="")


@paper_style()
def figure_legend(
    figure: Figure, axes: Sequence[Axes], order: Sequence[str] = (), extra: Sequence[Artist] = (), *, band: bool = False
) -> None:
    """Put one legend above the panels, each label once, in as few even rows as the width allows.

    It names the labelled artists of the panels and those of `extra`, which are in no panel, and with `band` also the
    bands. The labels of `order` come first. The figure needs a constrained layout.
    """
    handles: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    bands = [Patch(color=NEUTRAL, alpha=0.35, linewidth=0, label=BAND_LABEL)] if band else []
    handles.update({str(artist.get_label()): artist for artist in (*extra, *bands)})
    if not handles:
        return
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    size = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    widths = [text_width(label, size, math="$" in label) + 4.0 * size for label in labels]
    fits = [n for n in range(2, len(labels) + 1) if sum(map(max, np.array_split(widths, n))) < figure_width(figure)]
    # Of the widths that give as few rows, the narrowest leaves the rows most even.
    n_columns = ceil(len(labels) / ceil(len(labels) / max(fits, default=1)))
    figure.legend([handles[label] for label in labels], labels, loc="outside upper center", ncols=n_columns)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF, atomically; the same figure gives the same bytes.

    Args:
        figure: The figure.
        stem: Path without its suffix; missing folders are made.

    Returns:
        The paths of the PNG and the PDF.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, partial(figure.savefig, format=kind, metadata=metadata))
        paths.append(path)
    return paths


def save_figures(directory: Path, drawings: Mapping[str, Callable[[], Figure]]) -> list[Path]:
    """Draw figures one after the other and write each under its name; return the paths."""
    return [path for stem, draw in drawings.items() for path in save_figure(draw(), directory / stem)]
