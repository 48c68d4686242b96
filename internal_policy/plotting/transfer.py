"""How far the alignment of each layer's policy moves the parameters as GRPO does (``bupo.transfer``).

    figure = layer_transfer(result)          # [one, other] gives a panel for each
    numbers = transfer_data(result)          # exactly what it draws

Nothing here needs a model or torch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internal_policy.analysis.figure_data import OneOrMany, listed, require_some
from internal_policy.bupo.transfer_results import transfer_data
from internal_policy.plotting import marks, style
from internal_policy.utils.palette import LOOKS, Look

if TYPE_CHECKING:
    from internal_policy.bupo.transfer_results import Transfer

__all__ = ["layer_transfer", "plot_layer_transfer", "save_transfer_figures", "transfer_data"]

LABELS = {
    "cosine": "alignment and GRPO",
    "across": "the same, across halves",
    "ceiling": "GRPO across halves",
    "own_ceiling": "alignment across halves",
}
_LOOKS: dict[str, Look] = {
    "cosine": LOOKS["stream"],
    "across": LOOKS["attn"],
    "ceiling": LOOKS["policy"],
    "own_ceiling": LOOKS["ffn"],
}
_Y_LABEL = "Cosine of gradients"


@style.paper_style()
def plot_layer_transfer(
    result: Transfer, ax: Axes | None = None, *, label: str | None = None, color: Any = None
) -> Axes:
    """Draw the cosine of alignment's gradient with GRPO's over the layers, and those across halves of the prompts.

    Args:
        result: What ``bupo.transfer`` returned.
        ax: Where to draw, also over another result; by default a new figure with a legend.
        label: Name of the result in the legend, needed where several share a panel.
        color: Colour of its lines, whose markers and dashes distinguish them.

    Returns:
        The axes.
    """
    frame, figure = transfer_data(result), None
    if ax is None:
        figure, ((ax,),) = style.panel_grid(1)
    (own,), first = marks.check_colors(color, 1, "result"), marks.is_first(ax)
    for quantity, name in LABELS.items():
        rows = frame[["layer", quantity]].rename(columns={quantity: "value"})
        # Only the cosine over all prompts has an interval.
        ends = frame[["low", "high"]] if quantity == "cosine" else frame[["low", "high"]] * float("nan")
        look = marks.with_color(style.marker_style(_LOOKS[quantity]), own)
        size = marks.marker_size(frame) * (1.6 if look["marker"] == "*" else 1.0)
        text = name if label is None else f"{label}, {name}"
        marks.line(ax, rows.join(ends), "layer", "value", label=text, markersize=size, markeredgewidth=0.0, **look)
    if first:
        marks.zero_line(ax)
        style.set_layer_axis(ax, result.n_layers)
        ax.set(xlabel="Layer", ylabel=_Y_LABEL)
        style.set_title(ax, label or marks.short_name(result.name))
    low = min(0.0, float(frame[["low", *LABELS]].min().min()))
    # A cosine of 1 is the same direction, and room beyond keeps the markers there whole.
    ax.set_ylim(min(low - 0.04, ax.get_ylim()[0] if not first else 0.0), 1.04)
    if figure is not None:
        style.figure_legend(figure, [ax], tuple(LABELS.values()), band=bool(frame["low"].notna().any()))
    return ax


@style.paper_style()
def layer_transfer(
    results: OneOrMany[Transfer],
    *,
    ax: OneOrMany[Axes] | None = None,
    label: OneOrMany[str] | None = None,
    color: Any = None,
) -> Figure:
    """Draw a panel for each model.

    Args:
        results: One result, or one for each panel.
        ax: Where to draw, one axes for each result; by default a new figure with a legend.
        label: Title of the panel, or of each.
        color: Colour of the lines, or of those of each panel.

    Returns:
        The figure.

    Raises:
        UserError: The number of axes, labels or colours is not that of the results.
    """
    given, figure = listed(results), None
    require_some(given)
    names = marks.check_labels(label, marks.short_names([each.name for each in given]), "results")
    if ax is None:
        figure, columns = style.panel_grid(len(given))
        panels = [column[0] for column in columns]
    else:
        panels = marks.check_axes(ax, len(given), "one for each result")
    colors = marks.check_colors(color, len(given), "results")
    for result, panel, name, own in zip(given, panels, names, colors, strict=True):
        plot_layer_transfer(result, panel, color=own)
        style.set_title(panel, name)
    if figure is None:
        return style.root_figure(panels[0])
    style.share_labels(figure, panels)
    band = bool(transfer_data(given)["low"].notna().any())
    style.figure_legend(figure, panels, tuple(LABELS.values()), band=band)
    return figure


def save_transfer_figures(results: OneOrMany[Transfer], directory: Path) -> list[Path]:
    """Write the figure as PNG and PDF; the same results give the same bytes.

    Args:
        results: One result, or one for each model.
        directory: Where to write; made if it is missing.

    Returns:
        The paths written.
    """
    return style.save_figures(directory, {"transfer": partial(layer_transfer, listed(results))})
