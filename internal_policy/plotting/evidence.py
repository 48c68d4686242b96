"""Whether the layer that an entropy curve points to matters: every measurement of a layer, one panel below the other.

    table = layer_evidence(analysis, evaluations=evaluations, ablation=ablation, transfer=transfer)
    figure = layer_evidence_figure(table, title=analysis.name)

Nothing here needs a model or torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internal_policy.plotting import marks, style
from internal_policy.utils.palette import LOOKS

__all__ = ["layer_evidence_figure", "save_layer_evidence"]

_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    r"$\Delta H_{\mathrm{FFN}}$ (nats)": {
        "change": ("entropy change", "ffn"),
        "change_direction": ("its direction part", "direction"),
    },
    "accuracy of $\\pi^l$": {"accuracy": ("accuracy of the layer's policy", "stream")},
    "KL without it (nats)": {
        "ablation_attn": ("without the attention", "attn"),
        "ablation_ffn": ("without the FFN", "ffn"),
    },
    "cosine with GRPO": {
        "cosine": ("cosine", "stream"),
        "across": ("across halves", "policy"),
        "ceiling": ("ceiling across halves", "uniform"),
    },
    "training there": {"training": ("outcome of training", "stream")},
}
"""The label of each panel, and its lines: column, name and look."""


@style.paper_style()
def layer_evidence_figure(table: pd.DataFrame, *, title: str | None = None) -> Figure:
    """Draw what was measured of each layer.

    Args:
        table: of `bupo.layer_evidence`; measurements that it lacks have no panel.
        title: The model's name.

    Returns:
        The figure: a panel for each kind of measurement over the layers, with 95% intervals and the boundary layers.
    """
    panels = {label: lines for label, lines in _PANELS.items() if any(_known(table, name) for name in lines)}
    figure, columns = style.panel_grid(1, len(panels), panel_height=1.1)
    for ax, (label, lines) in zip(columns[0], panels.items(), strict=True):
        _draw_panel(ax, table, lines, named=ax is columns[0][0])
        style.set_layer_axis(ax, len(table), (0.5, 0.5))
        ax.set_ylabel(label)
        if ax is not columns[0][-1]:
            ax.tick_params(labelbottom=False)
    columns[0][-1].set_xlabel("Layer")
    if title is not None:
        style.set_title(columns[0][0], title)
    return figure


def save_layer_evidence(table: pd.DataFrame, directory: Path, *, title: str | None = None) -> list[Path]:
    """Write the figure as PNG and PDF; the same table gives the same bytes.

    Args:
        table: of `bupo.layer_evidence`.
        directory: Where to write.
        title: The model's name.

    Returns:
        The paths.
    """
    return style.save_figures(directory, {"layer_evidence": lambda: layer_evidence_figure(table, title=title)})


def _known(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(table[name].notna().any())


def _draw_panel(ax: Axes, table: pd.DataFrame, lines: dict[str, tuple[str, str]], *, named: bool) -> None:
    layers = table.index.to_numpy()
    for column, (label, look) in lines.items():
        if not _known(table, column):
            continue
        drawn: dict[str, Any] = {**style.line_style(LOOKS[look]), "label": label, "linewidth": 0.9}
        known = table[column].notna().to_numpy()
        ax.plot(layers[known], table[column][known], marker="o", markersize=2.6, **drawn)
        if _known(table, f"{column}_low"):
            low, high = (table[f"{column}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
            ax.fill_between(layers[known], low[known], high[known], color=drawn["color"], alpha=0.18, linewidth=0)
    if (values := table[[c for c in lines if _known(table, c)]].to_numpy(dtype=float)).size and np.nanmin(values) < 0:
        marks.zero_line(ax)
    by_direction = table["boundary_by_direction"] & ~table["boundary"]
    for chosen, look, label in (
        (table["boundary"], "boundary", "boundary layer"),
        (by_direction, "direction", "boundary layer by direction"),
    ):
        for layer in table.index[chosen]:
            drawn = {**style.line_style(LOOKS[look]), "label": label if named else None}
            ax.axvline(layer, linewidth=0.6, zorder=1, **drawn)
    # Lines of the boundary layers run behind the names.
    ax.legend(loc="best", fontsize=marks.SMALL, frameon=True, framealpha=0.9, edgecolor="none", facecolor="white")
