"""Heat maps of one prompt: layer against token, coloured by entropy, with the most probable token in each cell.

    figure = inspection_map(look)                        # layer, ATTN and FFN one above the other
    figure = inspection_map(look, ["ffn"], tokens="1:20")
    numbers = inspection_data(look, tokens="1:20")       # exactly what it draws

A column is a token that was read; its cells predict the token after it, which is written above. Nothing here needs
torch. The cells are not seaborn's heat map, as the final policy is a separate row above a narrow gap, and each token
has its own font size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from internal_policy.analysis.figure_data import OneOrMany
from internal_policy.inspection.config import SITES, Site, Span
from internal_policy.inspection.figure_data import inspection_data
from internal_policy.plotting import style
from internal_policy.plotting.marks import check_axes, check_colormap, lens_title

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from internal_policy.inspection.results import Inspection

__all__ = ["inspection_data", "inspection_map", "plot_inspection", "save_inspection_figures"]

MAX_COLUMNS = 24
"""Most tokens side by side, at the smallest font that can be read."""
TITLES: dict[Site, str] = {"layer": "Layer", "attn": "ATTN", "ffn": "FFN"}
STATES: dict[Site, str] = {"layer": "H^l", "attn": "A^l", "ffn": "F^l"}
POLICY_LABEL = "$\\pi_\\theta$"
_FONTS = ("STIXGeneral", "DejaVu Sans")
_SYSTEM_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo"),
    *("Microsoft YaHei", "SimHei", "MS Gothic", "Yu Gothic", "Malgun Gothic", "IPAGothic", "NanumGothic"),
    *("Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali"),
    *("Noto Sans Tamil", "Noto Sans Thai", "FreeSans", "FreeSerif", "Arial Unicode MS", "Tahoma", "Nirmala UI"),
    *("Noto Emoji", "Noto Sans Symbols", "Noto Sans Symbols 2", "Symbola", "Segoe UI Symbol", "Unifont"),
)
"""Fonts that come with matplotlib, and those of systems for what these lack; colour emoji fonts cannot be drawn."""
_GAP = 0.35
"""Between layer L and the final policy, rows."""
_MAX_LABEL_WIDTH = 38.0
"""Of a token next to the map, points."""
_MARGINS, _TITLE, _BAR = 0.32, 0.2, 0.75
"""Inches: labels of a panel, its title, and what is next to the map."""
_PROMPT, _RESPONSE = "0.45", "black"


@style.paper_style()
def plot_inspection(
    inspection: Inspection,
    site: Site = "layer",
    ax: Axes | None = None,
    *,
    tokens: Span | None = None,
    last: int | None = None,
    label: str | None = None,
    color: str | Colormap | None = None,
) -> Axes:
    """Draw one heat map: layer 1 at the bottom, the final policy at the top, a column for each token.

    Args:
        inspection: The inspection.
        site: ``layer``, ``attn`` or ``ffn``.
        ax: Where to draw; by default a new figure with a colour bar.
        tokens: Positions of the tokens, from 1.
        last: Number of tokens at the end; 24 if neither is given.
        label: Name of the model in the title.
        color: Colour map of the entropies, or its name.

    Returns:
        The axes.

    Raises:
        UserError: There is no such token or colour map.
    """
    if ax is None:
        return inspection_map(inspection, site, tokens=tokens, last=last, label=label, color=color).axes[0]
    frame = inspection_data(inspection, [site], tokens=tokens, last=last)
    cell = ax.bbox.width / style.root_figure(ax).dpi * style.POINTS_PER_INCH / frame["position"].nunique()
    _panel(ax, frame, site, inspection, cell, ends=(True, True), name=label, colormap=check_colormap(color))
    return ax


@style.paper_style()
def inspection_map(
    inspection: Inspection,
    sites: OneOrMany[Site] = SITES,
    *,
    tokens: Span | None = None,
    last: int | None = None,
    ax: OneOrMany[Axes] | None = None,
    label: str | None = None,
    color: str | Colormap | None = None,
) -> Figure:
    """Draw heat maps one above the other, with one colour bar from 0 to ln V.

    Args:
        inspection: The inspection.
        sites: Which policies, one or several.
        tokens: Positions of the tokens, from 1; more than 24 make a wider figure.
        last: Number of tokens at the end; 24 if neither is given.
        ax: Where to draw, one axes for each site; by default a new figure with a colour bar.
        label: Name of the model in the title.
        color: Colour map of the entropies, or its name.

    Returns:
        The figure.

    Raises:
        UserError: There is no such token or colour map, or the number of axes is not that of the sites.
    """
    sites = [sites] if isinstance(sites, str) else list(sites)
    if ax is not None:
        panels = check_axes(ax, len(sites), "one for each site")
        for site, panel in zip(sites, panels, strict=True):
            plot_inspection(inspection, site, panel, tokens=tokens, last=last, label=label, color=color)
        return style.root_figure(panels[0])
    colormap = check_colormap(color)
    frame = inspection_data(inspection, sites, tokens=tokens, last=last)
    read = frame["position"].unique()
    n = len(read)
    narrow = style.ONE_COLUMN if n <= 6 else style.TWO_COLUMNS
    width = max(narrow, _BAR + (style.TWO_COLUMNS - _BAR) * n / MAX_COLUMNS)
    cell = (width - _BAR) / n * style.POINTS_PER_INCH
    size = _font_size(cell)
    row = 1.5 * size / style.POINTS_PER_INCH
    height = len(sites) * ((inspection.n_layers + 1 + _GAP) * row + _TITLE) + _MARGINS
    height += sum(_label_height(_labels(inspection, read + shift, size), cell, size) for shift in (0, 1))
    figure = style.new_figure(width, height, pad=0.02, space=0.01)
    panels = [figure.add_subplot(len(sites), 1, k + 1) for k in range(len(sites))]
    for k, (site, panel) in enumerate(zip(sites, panels, strict=True)):
        ends = (k == 0, k == len(sites) - 1)
        _panel(panel, frame, site, inspection, cell, ends=ends, name=label, colormap=colormap)
    _color_bar(figure, panels, inspection.vocab_size, colormap)
    return figure


def save_inspection_figures(
    inspection: Inspection, directory: Path, *, tokens: Span | None = None, last: int | None = None
) -> list[Path]:
    """Write a heat map for each of layer, ATTN and FFN as PNG and PDF; more than 24 tokens on several pages.

    Args:
        inspection: The inspection.
        directory: Where; pages of an earlier call are removed.
        tokens: Positions of the tokens, from 1.
        last: Number of tokens at the end; 24 if neither is given.

    Returns:
        The files: ``inspect_layer.png``, or ``inspect_layer_1.png`` and so on.
    """
    places = inspection.positions(tokens, last)
    n_pages = math.ceil(len(places) / MAX_COLUMNS)
    pages = [part.tolist() for part in np.array_split(np.asarray(places), n_pages)]
    paths = []
    for site in SITES:
        for number, page in enumerate(pages, start=1):
            figure = inspection_map(inspection, [site], tokens=(page[0], page[-1]))
            stem = f"inspect_{site}_{number}" if len(pages) > 1 else f"inspect_{site}"
            paths += style.save_figure(figure, directory / stem)
    for old in directory.glob("inspect_*.p??"):
        if old not in paths and old.suffix in {".png", ".pdf"}:
            old.unlink()
    return paths


def cell_colors(
    entropy: NDArray[np.floating], vocab_size: int, colormap: Colormap | None = None
) -> tuple[NDArray[np.floating], NDArray[np.str_]]:
    """Return the colours of cells by their entropy, and of the text on them.

    The entropies are [n] in nats, on a scale from 0 to ln V. The colours are [n, 3] from 0 to 1; the text is [n] black
    or white, whichever has the greater contrast (WCAG 2.2, relative luminance).
    """
    rgb = (colormap or check_colormap(None))(Normalize(0.0, math.log(vocab_size))(entropy))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    return rgb, np.where((luminance + 0.05) ** 2 > 1.05 * 0.05, "black", "white")


def _panel(
    ax: Axes,
    frame: pd.DataFrame,
    site: Site,
    inspection: Inspection,
    cell: float,
    *,
    ends: tuple[bool, bool],
    name: str | None,
    colormap: Colormap,
) -> None:
    """Draw one site; `ends`: whether it has the labels above and below; `cell`: width of a column, points."""
    n_layers, own = inspection.n_layers, frame[frame["site"].isin([site, "policy"])]
    places = own["position"].unique()
    x = own["position"].to_numpy() - places[0]
    final = own["site"].to_numpy() == "policy"
    y = np.where(final, n_layers + 1 + _GAP, own["layer"].to_numpy())
    fills, ink = cell_colors(own["entropy"].to_numpy(), inspection.vocab_size, colormap)
    corners = np.stack([x, y], axis=1)[:, None, :] + 0.5 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    ax.add_collection(PolyCollection(list(corners), facecolors=fills, edgecolors="white", linewidths=0.25))
    hit = own["hit"].to_numpy()
    centres = np.stack([x, y], axis=1)[hit][:, None, :]
    inner = centres + 0.86 * (corners[hit] - centres)
    ax.add_collection(PolyCollection(list(inner), facecolors="none", edgecolors=ink[hit].tolist(), linewidths=0.8))
    size = _font_size(cell)
    for column, line, text, token_id, color in zip(x, y, own["top1_token"], own["top1_id"], ink, strict=True):
        whole, room = drawable(text, int(token_id)), 0.88 * cell
        # A token that is a little too long is written smaller; a longer one is cut.
        points = max(style.MIN_FONT_SIZE, size * min(1.0, room / max(style.text_width(whole, font(size)), 1e-9)))
        shown = fit(whole, room, points)
        label = ax.text(column, line, shown, color=color, font=font(points), parse_math=False, clip_on=True)
        label.set(horizontalalignment="center", verticalalignment="center_baseline")
        label.set_in_layout(False)
    ax.set_xlim(-0.5, len(places) - 0.5)
    ax.set_ylim(0.5, n_layers + 1.5 + _GAP)
    ax.set_yticks([*range(1, n_layers + 1), n_layers + 1 + _GAP], [*map(str, range(1, n_layers + 1)), POLICY_LABEL])
    ax.tick_params(axis="both", length=0, labelsize=max(size, style.MIN_FONT_SIZE))
    ax.spines[:].set_visible(False)
    ax.set_ylabel("Layer")
    _token_labels(ax, own, inspection, cell, ends)
    first, end = int(places[0]), int(places[-1])
    start = inspection.prompt_length - first + 0.5
    # At the right edge there is no response to begin.
    if 0 < start < len(places) - 0.5:
        # White next to black is visible on dark cells and on light ones.
        ax.axvline(start, color="white", linewidth=2.6)
        ax.axvline(start, color="black", linewidth=1.0)
    note = f", {title}" if (title := lens_title(inspection.lens)) else ""
    span = f"tokens {first} to {end} of {inspection.n_tokens}" if end > first else f"token {first}"
    state = STATES[site].replace("^", "$^") + "$"
    name = (inspection.name if name is None else name).replace("$", r"\$")
    kind = "layer" if site == "layer" else TITLES[site]
    title = f"{name}, {kind} policies (of {state[0]}{state[1:]}{note}), {span}"
    ax.set_title(title if ends[0] else f"{TITLES[site]} policies", fontsize=8.0)


def _token_labels(ax: Axes, own: pd.DataFrame, inspection: Inspection, cell: float, ends: tuple[bool, bool]) -> None:
    """Write what was read below and what came next above the map, in grey where it belongs to the prompt."""
    read = own["position"].unique()
    size = _font_size(cell)

    def write(axis_of: Any, positions: NDArray[np.integer], title: str) -> None:
        axis_of.set_xticks(range(len(positions)), _labels(inspection, positions, size))
        for tick, position in zip(axis_of.get_xticklabels(), positions, strict=True):
            grey = position <= inspection.prompt_length
            tick.set(font=font(size), parse_math=False, color=_PROMPT if grey else _RESPONSE)
            # Labels that fit stay horizontal, which is easier to read.
            tick.set_rotation(90 if style.text_width(tick.get_text(), font(size)) > 0.95 * cell else 0)
        axis_of.set_xlabel(title, fontsize=7.0)
        axis_of.tick_params(length=0, pad=1.5)

    if ends[1]:
        undrawn = any(drawable(text, 0) != text for text in (*own["top1_token"], *own["token"], *own["next_token"]))
        note = "; #…: the id of a token that no font here has" if undrawn else ""
        write(ax, read, f"token read (grey: prompt); cells: the top token, framed where it came next{note}")
    else:
        ax.set_xticks([])
    if ends[0]:
        above = ax.secondary_xaxis("top")
        above.spines[:].set_visible(False)
        write(above, read + 1, "token that came next")


def _labels(inspection: Inspection, positions: NDArray[np.integer], size: float) -> list[str]:
    """Return the tokens at some positions as they are written next to the map; nothing beyond the last."""
    rows = inspection.tokens.set_index("position").reindex(positions)
    return [
        "" if pd.isna(token_id) else fit(drawable(str(text), int(token_id)), _MAX_LABEL_WIDTH, size)
        for text, token_id in zip(rows["token"], rows["id"], strict=True)
    ]


def _color_bar(figure: Figure, panels: Sequence[Axes], vocab_size: int, colormap: Colormap) -> None:
    top = math.log(vocab_size)
    mappable = ScalarMappable(Normalize(0.0, top), colormap)
    bar = figure.colorbar(mappable, ax=list(panels), fraction=0.03, pad=0.01, aspect=30 * len(panels))
    step = next(s for s in (0.5, 1, 2, 5) if top / s <= 6)
    ticks = [k * step for k in range(math.ceil(top / step)) if top - k * step > 0.6 * step]
    bar.set_ticks([*ticks, top], labels=[*(f"{t:g}" for t in ticks), "$\\ln V$"])
    bar.set_label("Entropy (nats)")
    bar.outline.set_visible(False)


def _font_size(cell: float) -> float:
    """Return the font size for cells of a width, both in points: a token of about five letters fits."""
    return min(7.0, max(5.0, cell / 3.2))


def _label_height(labels: Sequence[str], cell: float, size: float) -> float:
    """Return the height in inches of labels next to the map; one that is wider than its cell is written upright."""
    widest = max(style.text_width(label or "x", font(size)) for label in labels)
    return (widest if widest > 0.95 * cell else size) / style.POINTS_PER_INCH + 0.05


@cache
def _families() -> tuple[str, ...]:
    """Return the fonts to draw tokens in; the first that has a character draws it."""
    installed = {entry.name for entry in fontManager.ttflist}
    return (*_FONTS, *(name for name in _SYSTEM_FONTS if name in installed))


@lru_cache(maxsize=64)
def font(size: float) -> FontProperties:
    """Return the font of tokens at a size in points; it is shared and must not be changed."""
    return FontProperties(family=list(_families()), size=size)


@cache
def _characters() -> frozenset[int]:
    paths = (findfont(FontProperties(family=name), fallback_to_default=False) for name in _families())
    return frozenset().union(*(get_font(path).get_charmap() for path in paths))


def drawable(text: str, token_id: int) -> str:
    """Return a token's text, or ``#1234`` with its id if no font here has its characters."""
    return text if all(ord(character) in _characters() for character in text) else f"#{token_id}"


@lru_cache(maxsize=65536)
def fit(text: str, room: float, size: float) -> str:
    """Return a token, or its beginning and an ellipsis if it is wider than `room`; room and font size in points."""
    if style.text_width(text, font(size)) <= room:
        return text
    low, high = 1, max(1, len(text) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if style.text_width(f"{text[:middle]}…", font(size)) <= room else (low, middle - 1)
    return f"{text[:low]}…"
