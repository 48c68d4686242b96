"""Figures of interventions: what ablating each module does to the final policy, and what patching recovers.

    figure = ablation_map(ablation)                  # module or head by layer: KL, entropy, log-probability, flips
    figure = ablation_bars(ablation, "ffn")          # one site, with 95% intervals
    figure = patching_map(patching)                  # layer by token: recovery

The numbers are in `interventions.figure_data`. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from internal_policy.analysis.figure_data import OneOrMany
from internal_policy.interventions.figure_data import (
    SHOWN,
    TITLES,
    ablation_data,
    describe_how,
    describe_writes,
    layers_changed,
    patching_data,
)
from internal_policy.plotting import marks, scales, style
from internal_policy.plotting.inspection import drawable, fit, font
from internal_policy.utils.errors import UserError
from internal_policy.utils.palette import LOOKS, series

if TYPE_CHECKING:
    from internal_policy.interventions.patching_results import Patching
    from internal_policy.interventions.results import Ablation

__all__ = [
    "ablation_bars",
    "ablation_data",
    "ablation_map",
    "patching_data",
    "patching_map",
    "save_ablation_figures",
    "save_patching_figures",
]

LABELS = {
    "kl": r"KL$(\pi_\theta \,\|\, \pi_\theta')$ (nats)",
    "entropy_change": "Change of entropy (nats)",
    "log_prob_change": "Change of log-probability (nats)",
    "flips": "Share of top tokens flipped",
    "accuracy_change": "Change of accuracy",
    "accuracy": "Accuracy",
}
_LOWEST = {"kl": 1e-4, "flips": 1e-3}
"""What is told from zero at least: float32 resolves hardly less, and few analyses have so many tokens."""
STATES = {"layer": "$H^l$", "attn": "$A^l$", "ffn": "$F^l$"}
_MAX_WRITTEN_ROWS = 16
"""Rows beyond which the cells of a map have no numbers."""
_MAX_SIDE_BY_SIDE = 16
"""Layers of a map beside which there is room for another."""
_MAX_BARS = 24
_ROW, _PANEL_EXTRA = 0.16, 0.6
"""Inches: a row of a map, and its title and labels."""
_TALLEST = 3.6
"""Inches of a map of many heads or experts."""
_TITLE_MARGIN = 12.0
"""Points that a title leaves free at both sides together."""
_MAX_LABEL = 60.0
"""Points that a token may take below a map."""


@style.paper_style()
def ablation_map(
    ablation: Ablation, *, ax: OneOrMany[Axes] | None = None, label: str | None = None, color: Any = None
) -> Figure:
    """Draw layers from left to right by module (or head, or expert) from the top: a map for each quantity.

    Args:
        ablation: The ablation.
        ax: Where to draw, one axes for each quantity; by default a new figure.
        label: Name of the model in the title.
        color: Colour map of the quantities that are never negative, or its name; changes keep theirs.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes does not fit, or there is no such colour map.
    """
    frame = ablation_data(ablation)
    quantities = [q for q in SHOWN if q in set(frame["quantity"])]
    together = layers_changed(ablation)
    if together is not None:
        frame = frame.assign(layer=together)
    colormap = marks.check_colormap(color)
    if ax is None:
        n_layers, n_names = frame["layer"].nunique(), frame["name"].nunique()
        n_columns = 2 if n_layers <= _MAX_SIDE_BY_SIDE else 1
        n_rows = ceil(len(quantities) / n_columns)
        height = min(max(n_names, 4) * _ROW, _TALLEST) + _PANEL_EXTRA
        figure = style.new_figure(style.TWO_COLUMNS, n_rows * height + 0.25, space=0.03)
        panels = [figure.add_subplot(n_rows, n_columns, k + 1) for k in range(len(quantities))]
        figure.suptitle(_title(ablation, label, style.figure_width(figure)), parse_math=False)
    else:
        panels = marks.check_axes(ax, len(quantities), "one for each quantity")
    for quantity, panel in zip(quantities, panels, strict=True):
        rows = frame[frame["quantity"] == quantity]
        names = list(dict.fromkeys(rows["name"]))
        table = rows.pivot_table(index="name", columns="layer", values="value").loc[names]
        values = table.to_numpy(dtype=float)
        changes = quantity not in _LOWEST
        scale = scales.symmetric_logarithmic(values) if changes else scales.logarithmic(values, _LOWEST[quantity])
        _map(panel, table, scale, "RdBu_r" if changes else colormap)
        panel.set_title(LABELS[quantity], pad=4)
        if together is not None:
            panel.set_xlabel("Layers, changed together")
    return style.root_figure(panels[0])


def _title(ablation: Ablation, label: str | None, width: float, end: str = "") -> str:
    """The title of a figure of some width in points; what the model's name leaves no room for shortens the name."""
    name = marks.short_name(ablation.name) if label is None else label
    rest = f": effect on the final policy of {describe_writes(ablation)} {describe_how(ablation)}{end}"
    size = style.RC["figure.titlesize"]
    return style.shorten(name, width - _TITLE_MARGIN - style.text_width(rest, size), size) + rest


def _map(ax: Axes, table: pd.DataFrame, scale: scales.Scale, colormap: Any) -> None:
    """Draw names by layers."""
    numbers = np.vectorize(_number)(table.to_numpy(dtype=float))
    cell = style.panel_width(ax) * 0.8 / table.shape[1]
    widest = max(style.text_width(text, marks.SMALL) for text in numbers.ravel())
    size = min(marks.SMALL, marks.SMALL * 0.92 * cell / widest)
    written = table.shape[0] <= _MAX_WRITTEN_ROWS and size >= style.MIN_FONT_SIZE
    sns.heatmap(
        pd.DataFrame(scale.drawn, table.index, table.columns),
        ax=ax,
        norm=scale.norm,
        cmap=colormap,
        annot=numbers if written else None,
        fmt="",
        annot_kws={"fontsize": size},
        linewidths=0.4,
        linecolor="white",
        cbar_kws={"pad": 0.02, "fraction": 0.06, "aspect": 18, "extend": scale.extend},
    )
    bar = cast(Any, ax.collections[0].colorbar)
    scale.label(bar)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=marks.SMALL, length=2)
    layers = list(table.columns)
    if layers == [*range(1, len(layers) + 1)]:
        style.set_layer_axis(ax, len(layers), first=0.5)
        ax.tick_params(axis="x", labelrotation=0)
    else:
        step = max(1, ceil((max(style.text_width(str(layer), 7.0) for layer in layers) + 3) / cell))
        columns = range(0, len(layers), step)
        ax.set_xticks([column + 0.5 for column in columns], [str(layers[c]) for c in columns], rotation=0)
    # Heads and experts are numbered; what they are is said once, beside them.
    parts = {str(name).partition(" ")[0] for name in table.index}
    part = next(iter(parts)) if len(parts) == 1 and parts <= {"head", "expert"} else None
    texts = [str(name).removeprefix(f"{part} ") for name in table.index]
    every = ceil((marks.SMALL + 1.0) * len(texts) / (0.9 * _TALLEST * style.POINTS_PER_INCH))
    rows = range(0, len(texts), every)
    ax.set_yticks([row + 0.5 for row in rows], texts[::every], rotation=0, fontsize=marks.SMALL)
    ax.tick_params(length=0)
    ax.set(xlabel="Layer", ylabel="" if part is None else part.capitalize())


def _number(value: float) -> str:
    """A number in a cell, with a true minus sign and none before a zero; small ones have one decimal more."""
    text = f"{value:.2f}" if round(abs(value), 3) >= 0.1 else f"{value:.3f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "\N{MINUS SIGN}")


@style.paper_style()
def ablation_bars(
    ablation: Ablation,
    site: str | None = None,
    quantity: OneOrMany[str] = ("kl", "entropy_change"),
    *,
    ax: OneOrMany[Axes] | None = None,
    label: str | None = None,
    color: Any = None,
) -> Figure:
    """Draw the effect of each intervention at one site as a bar with its 95% interval.

    Bars are layers, one for all of those that were changed together; of heads or experts they are the 24 with the
    largest divergence, named layer.head.

    Args:
        ablation: The ablation.
        site: attn, ffn or layer; by default the first that was changed.
        quantity: One or several of kl, entropy_change, log_prob_change, flips, accuracy and accuracy_change.
        ax: Where to draw, one axes for each quantity; by default a new figure.
        label: Name of the model in the title.
        color: Colour of the bars; by default the site's, or one for each way of changing a write.

    Returns:
        The figure.

    Raises:
        UserError: A site that was not changed, a quantity that there is not, or the number of axes does not fit.
    """
    wanted = [quantity] if isinstance(quantity, str) else list(quantity)
    data = ablation_data(ablation, wanted)
    sites = list(dict.fromkeys(data["site"]))
    site = sites[0] if site is None else site
    if site not in sites:
        raise UserError(f"site {site!r} was not changed; needed is one of {', '.join(sites)}")
    data = data[data["site"] == site]
    hows = list(dict.fromkeys(data["how"]))
    part = next((name for name in ("head", "expert") if name in data), None)
    together = layers_changed(ablation)
    if together is not None or (part is not None and isinstance(data[part].iloc[0], str)):
        # All parts were changed at once, and the title names them.
        data = data.assign(bar=data["layer"].astype(str) if together is None else together, order=0)
        part = None
    elif part is None:
        data = data.assign(bar=data["layer"].astype(str), order=data["layer"])
    else:
        data = data.assign(bar=[f"{layer}.{n}" for layer, n in zip(data["layer"], data[part], strict=True)])
        ranks = ablation_data(ablation, ["kl"]).groupby(["layer", part])["value"].max().sort_values(ascending=False)
        ranked = [f"{layer}.{n}" for layer, n in ranks.index[:_MAX_BARS]]
        places = {bar: place for place, bar in enumerate(ranked)}
        data = data[data["bar"].isin(ranked)]
        data = data.assign(order=data["bar"].map(places))
    if ax is None:
        figure = style.new_figure(style.TWO_COLUMNS, 2.0, pad=0.06)
        panels = [figure.add_subplot(1, len(wanted), k + 1) for k in range(len(wanted))]
        titles = "+".join(TITLES.get(s, s) for s in site.split("+")) if part is None else f"{part}s"
        figure.suptitle(_title(ablation, label, style.figure_width(figure), f" ({titles})"), parse_math=False)
    else:
        panels = marks.check_axes(ax, len(wanted), "one for each quantity")
    looks = [LOOKS[site].light if site in LOOKS else LOOKS["stream"].light]
    looks = [series(k).light for k in range(len(hows))] if len(hows) > 1 else looks
    for name, panel in zip(wanted, panels, strict=True):
        _bars(panel, data[data["quantity"] == name], hows, looks if color is None else [color] * len(hows))
        panel.set_title(LABELS[name])
        panel.set_xlabel("Layers, changed together" if together else "Layer" if part is None else f"Layer.{part}")
    if ax is None and len(hows) > 1:
        # Below, since a legend above the panels would be drawn over the title.
        style.root_figure(panels[0]).legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(hows)
        )
    return style.root_figure(panels[0])


def _bars(ax: Axes, rows: pd.DataFrame, hows: Sequence[str], colors: Sequence[Any]) -> None:
    bars = rows.drop_duplicates("order").sort_values("order")
    places = {order: place for place, order in enumerate(bars["order"])}
    width = 0.8 / len(hows)
    for k, (how, color) in enumerate(zip(hows, colors, strict=True)):
        own = rows[rows["how"] == how].sort_values("order")
        x = own["order"].map(places) + (k - (len(hows) - 1) / 2) * width
        value = own["value"].to_numpy(dtype=float)
        ends = np.nan_to_num(np.abs(np.stack([value - own["low"], own["high"] - value])))
        error: dict[str, Any] = {"elinewidth": 0.7, "ecolor": "black", "capsize": 0}
        ax.bar(x, value, width, yerr=ends, color=color, label=how, error_kw=error)
    marks.zero_line(ax)
    texts = list(bars["bar"])
    if "." in texts[0]:
        # Each head is named, because their order says nothing.
        ax.set_xticks(range(len(texts)), texts, rotation=90, fontsize=marks.SMALL)
        ax.tick_params(axis="x", length=0)
        return
    room = (max(style.text_width(text, 7.0) for text in texts) + 3) * len(texts)
    step = max(1, ceil(room / style.panel_width(ax)))
    ax.set_xticks(range(0, len(texts), step), texts[::step])
    ax.tick_params(axis="x", length=0)


@style.paper_style()
def patching_map(
    patching: Patching,
    sites: OneOrMany[str] | None = None,
    *,
    ax: OneOrMany[Axes] | None = None,
    label: str | None = None,
    color: Any = None,
) -> Figure:
    """Draw layer by token for each site, coloured by recovery, on one scale from -1 to 1.

    A recovery beyond, which an interplay of states may cause, has the colour of the end, and the bar there an arrow.

    Args:
        patching: The result.
        sites: Which of layer, attn and ffn, one or several; by default all that were patched.
        ax: Where to draw, one axes for each site; by default a new figure with a colour bar.
        label: Name of the model in the title.
        color: Colour map, or its name.

    Returns:
        The figure.

    Raises:
        UserError: A site that was not patched, the number of axes does not fit, or there is no such colour map.
    """
    sites = [sites] if isinstance(sites, str) else list(patching.sites if sites is None else sites)
    data = patching_data(patching, sites)
    colormap = marks.check_colormap(color, "RdBu_r")
    positions, layers = (sorted(data[name].unique()) for name in ("position", "layer"))
    scale = scales.clipped(data["recovery"], 1.0)
    if ax is None:
        width = min(14.0, max(style.ONE_COLUMN, 0.9 + 0.2 * len(positions)))
        height = len(sites) * (max(len(layers), 4) * 0.13 + 0.24) + 0.8
        figure = style.new_figure(width, height, pad=0.05, space=0.015)
        panels = [figure.add_subplot(len(sites), 1, k + 1) for k in range(len(sites))]
        name = marks.short_name(patching.name) if label is None else label
        title = f"{name}: recovery of the {patching.describe_metric()}"
        size = min(8.0, 8.0 * (width * 72 - 12) / style.text_width(title, 8.0))
        figure.suptitle(title, parse_math=False, fontproperties=font(size))
    else:
        panels = marks.check_axes(ax, len(sites), "one for each site")
    for k, (site, panel) in enumerate(zip(sites, panels, strict=True)):
        table = data[data["site"] == site].pivot_table(index="layer", columns="position", values="recovery")
        panel.pcolormesh(
            np.arange(len(positions) + 1) - 0.5,
            np.arange(len(layers) + 1) - 0.5,
            table.to_numpy(dtype=float),
            cmap=colormap,
            norm=scale.norm,
            rasterized=True,
        )
        every = max(1, ceil(len(layers) / 12))
        panel.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        panel.set_ylabel(f"Layer, {STATES[site]}")
        panel.tick_params(length=0)
        panel.spines[:].set_visible(True)
        panel.set_xticks([])
        if k == len(sites) - 1 or ax is not None:
            _token_ticks(panel, patching, positions)
    if ax is None:
        bar = style.root_figure(panels[0]).colorbar(
            ScalarMappable(scale.norm, colormap),
            ax=panels,
            extend=scale.extend,
            extendfrac=0.03,
            fraction=0.04,
            pad=0.015,
            aspect=14 * len(panels),
        )
        scale.label(bar)
        bar.outline.set_visible(False)
    return style.root_figure(panels[0])


def _token_ticks(ax: Axes, patching: Patching, positions: Sequence[int]) -> None:
    labels, size = patching.labels(), 6.5
    ids = patching.tokens.set_index("position")["clean_id"]
    texts = [fit(drawable(labels[p], int(ids[p])), _MAX_LABEL, size) for p in positions]
    cell = style.panel_width(ax) / len(positions)
    ax.set_xticks(range(len(positions)), texts)
    upright = max(style.text_width(text, font(size)) for text in texts) > 0.9 * cell
    changed = patching.tokens.set_index("position")
    for tick, position in zip(ax.get_xticklabels(), positions, strict=True):
        differs = changed["clean_id"][position] != changed["corrupted_id"][position]
        tick.set(font=font(size), parse_math=False, rotation=90 if upright else 0)
        tick.set_color(LOOKS["ffn"].light if differs else "black")
    ax.set_xlabel("Token (clean→corrupted where they differ)")


def save_ablation_figures(ablation: Ablation, directory: Path) -> list[Path]:
    """Write the map, and bars for each site, as PNG and PDF.

    Args:
        ablation: The ablation.
        directory: Where to write; made if it is missing.

    Returns:
        The files: ``ablation_map.png``, ``ablation_bars_attn.png`` and so on.
    """
    paths = style.save_figure(ablation_map(ablation), directory / "ablation_map")
    for site in dict.fromkeys(ablation.table["site"]):
        stem = f"ablation_bars_{site.replace('+', '_')}"
        paths += style.save_figure(ablation_bars(ablation, site), directory / stem)
    return paths


def save_patching_figures(patching: Patching, directory: Path) -> list[Path]:
    """Write the maps of all sites as PNG and PDF.

    Args:
        patching: The result.
        directory: Where to write; made if it is missing.

    Returns:
        The files, ``patching_map.png`` and ``patching_map.pdf``.
    """
    return style.save_figure(patching_map(patching), directory / "patching_map")
