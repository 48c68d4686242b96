"""How the figures look: sizes, fonts, colours, panel grids and reproducible files. No pyplot, no global state."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
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
from matplotlib.textpath import text_to_path
from matplotlib.ticker import Locator

from internal_policy.utils.io import write_atomically
from internal_policy.utils.palette import LOOKS, Look

ONE_COLUMN = 3.25
"""Width of a figure in one column of a two-column paper, inches."""
TWO_COLUMNS = 6.75
"""Width of a figure over both columns, inches."""
MAX_COLUMNS = 4
"""Most panels side by side."""
SMALLEST = 4.5
"""Smallest type that can be read in print, points."""
POINTS_PER_INCH = 72.0

STREAM, ATTENTION, FEED_FORWARD, POLICY, NEUTRAL = (
    LOOKS[name].light for name in ("stream", "attn", "ffn", "policy", "neutral")
)
"""The colour of each quantity in every figure."""

DASHES: Mapping[str, Any] = MappingProxyType(
    {"solid": "-", "dash": (0, (4, 1.2)), "dot": (0, (1, 1)), "dashdot": (0, (5, 1.2, 1, 1.2))}
)
"""matplotlib's patterns of the dashes of `palette`."""

MARKERS: Mapping[str, str] = MappingProxyType(
    {
        **{"circle": "o", "square": "s", "triangle-up": "^", "triangle-down": "v"},
        **{"diamond": "D", "star": "*", "cross": "P", "x": "X"},
    }
)
"""matplotlib's names of the markers of `palette`."""

RC: Mapping[str, Any] = MappingProxyType(
    {
        # Shipped with matplotlib, so that a figure is the same on every machine; the second for what the first lacks.
        "font.family": ["STIXGeneral", "DejaVu Sans"],
        "mathtext.fontset": "stix",
        "font.size": 8.0,
        "axes.titlesize": 8.0,
        "axes.labelsize": 8.0,
        "xtick.labelsize": 7.0,
        "ytick.labelsize": 7.0,
        "legend.fontsize": 7.5,
        "figure.titlesize": 8.0,
        "figure.labelsize": 8.0,
        "axes.linewidth": 0.6,
        "axes.titlepad": 3.0,
        "axes.labelpad": 2.5,
        "axes.grid": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "axes.formatter.useoffset": False,
        "xtick.major.size": 2.0,
        "ytick.major.size": 2.0,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "xtick.major.pad": 2.0,
        "ytick.major.pad": 2.0,
        "lines.linewidth": 1.0,
        "lines.markersize": 2.6,
        "hatch.linewidth": 0.4,
        "legend.frameon": False,
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.2,
        "legend.handletextpad": 0.5,
        "legend.borderaxespad": 0.2,
        "text.usetex": False,
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "savefig.facecolor": "white",
        "savefig.dpi": 300,
        "savefig.bbox": None,
        "pdf.fonttype": 42,
        "pdf.compression": 6,
        "path.simplify": False,
    }
)
"""What differs from matplotlib's own defaults."""


def line_marks(look: Look) -> dict[str, Any]:
    """Return the arguments that draw a line in a look of `palette`: its colour and dash.

    Args:
        look: Of the line.

    Returns:
        Arguments of `Axes.plot`.
    """
    return {"color": look.light, "linestyle": DASHES[look.dash]}


def marked_line(look: Look) -> dict[str, Any]:
    """Return the arguments that draw a line with markers in a look of `palette`.

    Args:
        look: Of the line.

    Returns:
        Arguments of `Axes.plot`.
    """
    return {**line_marks(look), "marker": MARKERS[look.marker]}


@contextmanager
def paper_style() -> Iterator[None]:
    """Apply the paper's style over matplotlib's defaults, and give the user's rcParams back on any exit."""
    with mpl.rc_context():
        # The backend is a key of the defaults; touching it would start or end a notebook's one.
        mpl.rcParams.update({key: value for key, value in mpl.rcParamsDefault.items() if not key.startswith("backend")})
        mpl.rcParams.update(cast(Any, RC))
        yield


class PaperFigure(Figure):
    """A figure that keeps the paper's style whenever it is drawn, saved or shown.

    matplotlib makes ticks and finds fonts as late as the drawing, when a context manager around the plotting code
    has long been left. It belongs to no pyplot state; a notebook shows it as its cell's value.
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


class LayerLocator(Locator):
    """Ticks of a layer axis: layer 1, multiples of a round step, and the last layer, as many as there is room for."""

    STEPS = (1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 500, 1000)

    def __init__(self, n_layers: int) -> None:
        """Make the ticks of a model of `n_layers` layers."""
        self.n_layers = n_layers

    def __call__(self) -> list[float]:
        """Return the ticks for the axis as wide as it is now."""
        axis = self.axis
        if not isinstance(axis, Axis):
            return self.tick_values(1, self.n_layers)
        low, high = sorted(axis.axes.get_xlim())
        width = axis.axes.bbox.width / root_figure(axis.axes).dpi * POINTS_PER_INCH
        font = axis.get_major_ticks(1)[0].label1.get_fontproperties()
        label = text_width(f"{self.n_layers}", font) + 0.6 * font.get_size_in_points()
        return self._ticks(label * (high - low) / max(width, 1.0))

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Return the ticks between two positions, with room for about eight."""
        return self._ticks((vmax - vmin) / 8)

    def _ticks(self, gap: float) -> list[float]:
        """Return ticks no nearer than `gap` layers to one another."""
        # The first gap is the shortest: from layer 1 to the first multiple.
        step = next((step for step in self.STEPS if step - 1 >= gap or step == 1 >= gap), self.n_layers)
        between = [layer for layer in range(step, self.n_layers, step) if layer > 1]
        # A short gap at the end looks like a mistake, even where the labels are clear of each other.
        between = [layer for layer in between if self.n_layers - layer >= max(gap, 0.5 * step)]
        return [float(layer) for layer in dict.fromkeys([1, *between, self.n_layers])]


def grid_shape(n_panels: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels: rows as even as can be, of `MAX_COLUMNS` at most."""
    n_rows = ceil(n_panels / MAX_COLUMNS)
    return n_rows, ceil(n_panels / n_rows)


def panel_grid(n_panels: int, n_stacked: int = 1, panel_height: float = 1.45) -> tuple[PaperFigure, list[list[Axes]]]:
    """Make a figure with a column of panels for each model, in blocks of up to `MAX_COLUMNS` models.

    Args:
        n_panels: Number of models.
        n_stacked: Panels one above the other for each model.
        panel_height: Height of a panel with its labels, inches.

    Returns:
        The figure, and for each model its `n_stacked` axes from the top.
    """
    n_rows, n_columns = grid_shape(n_panels)
    width = ONE_COLUMN if n_panels == 1 else TWO_COLUMNS
    height = panel_height * max(1.0, 1.0 + 0.2 * (3 - n_columns)) * n_rows * n_stacked + 0.55
    with paper_style():
        layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
        figure = PaperFigure(figsize=(width, height), layout=layout)
        grid = figure.add_gridspec(n_rows * n_stacked, n_columns)
        columns = []
        for panel in range(n_panels):
            row, column = divmod(panel, n_columns)
            columns.append([figure.add_subplot(grid[row * n_stacked + k, column]) for k in range(n_stacked)])
    return figure, columns


def root_figure(ax: Axes) -> Figure:
    """Return the figure that an axes stands in, subfigures passed over."""
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ValueError("Got axes that have been removed from their figure; make new ones.")
    return figure


def text_width(text: str, font: FontProperties | float, *, math: bool = False) -> float:
    """Return the width of a line of text, in a font or in the style's own at a size in points; points."""
    properties = font if isinstance(font, FontProperties) else FontProperties(size=font)
    width, _, _ = text_to_path.get_text_width_height_descent(text, properties, ismath=math)
    return float(width)


def panel_width(ax: Axes) -> float:
    """Return about how wide a panel will be, points; its true width is known only after the layout."""
    figure, spec = root_figure(ax), ax.get_subplotspec()
    n_columns = spec.get_topmost_subplotspec().get_gridspec().ncols if spec is not None else 1
    width = 0.77 * figure.bbox.width / n_columns if n_columns > 1 else ax.bbox.width
    return width / figure.dpi * POINTS_PER_INCH


def set_title(ax: Axes, name: str, note: str = "") -> None:
    """Set a panel's title so that it stays clear of its neighbours': broken at hyphens, shrunk, and cut at last.

    Args:
        ax: The panel.
        name: The model's name.
        note: A line to stand below the name, such as the lens.
    """
    room, font = panel_width(ax), ax.title.get_fontproperties().copy()
    lines = _break_in_two(name, font) if text_width(name, font) > room else [name]
    widest = max(text_width(line, font) for line in lines)
    size = font.get_size_in_points()
    font.set_size(max(SMALLEST, size * min(1.0, room / widest)))
    lines = [cut(line, room, font) for line in lines]
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


def cut(line: str, room: float, font: FontProperties | float) -> str:
    """Take out the middle of a line that has no room; a checkpoint's name tells most at its ends.

    Args:
        line: The text.
        room: Its room, points.
        font: Its font, or its size in the style's own, points.

    Returns:
        The text, or its ends: two characters of each at least.
    """
    kept = line
    for n in range(len(line) // 2, 1, -1):
        if text_width(kept, font) <= room:
            break
        kept = f"{line[:n]}…{line[-n:]}"
    return kept


def set_layer_axis(ax: Axes, n_layers: int, margins: tuple[float, float] = (0.5, 0.5)) -> None:
    """Give an axis the layers 1 to `n_layers`.

    Args:
        ax: The panel.
        n_layers: Number of layers of the model.
        margins: Room before the first layer and after the last, layers.
    """
    ax.set_xlim(1 - margins[0], n_layers + margins[1])
    ax.xaxis.set_major_locator(LayerLocator(n_layers))
    ax.xaxis.set_major_formatter("{x:.0f}")


def figure_legend(figure: Figure, axes: Sequence[Axes], order: Sequence[str], extra: Sequence[Artist] = ()) -> None:
    """Put one legend above the panels, each label once, in as few even rows as the width allows.

    Args:
        figure: A figure with constrained layout.
        axes: The panels whose labelled artists are gathered.
        order: Labels in the order in which they are to stand; others follow.
        extra: Labelled artists that stand in no panel.
    """
    handles: dict[str, Artist] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    handles.update({str(artist.get_label()): artist for artist in extra})
    if not handles:
        return
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    size = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    widths = [text_width(label, size, math="$" in label) + 4.0 * size for label in labels]
    room = figure.bbox.width / figure.dpi * POINTS_PER_INCH
    fits = [n for n in range(2, len(labels) + 1) if sum(max(c) for c in np.array_split(widths, n)) < room]
    # Of the widths that give as few rows, the narrowest leaves the rows most even.
    n_columns = ceil(len(labels) / ceil(len(labels) / max(fits, default=1)))
    figure.legend([handles[label] for label in labels], labels, loc="outside upper center", ncols=n_columns)


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and PDF; the same figure gives the same bytes, and no reader sees half a file.

    Args:
        figure: The figure.
        stem: Path without its suffix; missing folders are made.

    Returns:
        The PNG's path and the PDF's.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
        path = stem.with_name(f"{stem.name}.{kind}")
        write_atomically(path, partial(figure.savefig, format=kind, metadata=metadata))
        paths.append(path)
    return paths
