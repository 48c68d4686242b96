"""A comparison of analyses on the terminal: one row an analysis, what differs most, and what moves most."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from internal_policy.comparison.results import AnalysisComparison
from internal_policy.comparison.tables import other_lens_of, under_other_lens
from internal_policy.utils.console import console as open_console
from internal_policy.utils.console import number, plus_minus, table

_SITES = (("H layer", "layer", "entropy_out"), ("ΔH ATTN", "attn", "change"), ("ΔH FFN", "ffn", "change"))
_MOST_NOTES = 6


def show_comparison(comparison: AnalysisComparison) -> None:
    """Print a comparison on standard output.

    Args:
        comparison: the comparison.
    """
    console = open_console()
    console.print(summary_table(comparison))
    if not comparison.differences.empty:
        console.print(difference_table(comparison))
    if not comparison.trends.empty:
        console.print(trend_table(comparison))
    for label, settings in comparison.differing.items():
        told = ", ".join(f"{name} {_setting(one)} against {_setting(other)}" for name, (one, other) in settings.items())
        console.print(Text(f"{label}: settings differ too: {told}", style="yellow"))
    for note in comparison.notes[:_MOST_NOTES]:
        console.print(Text(note, style="yellow"))
    if len(comparison.notes) > _MOST_NOTES:
        console.print(f"and {len(comparison.notes) - _MOST_NOTES} more notes, in comparison.json")


def summary_table(comparison: AnalysisComparison) -> Table:
    """Lay out boundary layer and convergence, one row an analysis.

    Args:
        comparison: the comparison.

    Returns:
        A rich table.
    """
    caption = "drop of H layer, nats; depth of half of it; last 3 layers' share"
    if not all(comparison.paired.values()):
        caption += "\n≠ other responses than the baseline"
    if lens := other_lens_of(comparison.boundaries):
        caption += f"\nboundary in brackets: of the same responses under the lens {lens}"
    stepped = comparison.steps_from != "order"
    shown = table(
        f"{len(comparison.labels)} analyses, lens {comparison.lens}, baseline {comparison.baseline}",
        caption,
        *(
            "analysis",
            *((comparison.unit,) if stepped else ()),
            "L",
            "boundary",
            "move",
            "drop",
            "half",
            "last 3",
            "reading",
        ),
        fold=("analysis",),
        left=("reading",),
    )
    rows = zip(comparison.boundaries.to_dict("records"), comparison.convergence.to_dict("records"), strict=True)
    for place, measures in rows:
        label = str(place["label"])
        mark = "" if comparison.paired[label] else " ≠"
        shown.add_row(
            label + mark,
            *((f"{place['step']:g}",) if stepped else ()),
            str(place["n_layers"]),
            _layer(place["boundary_layer"]) + (f" ({under_other_lens(place)})" if lens else ""),
            "" if label == comparison.baseline else _move(place),
            f"{measures['total_drop']:.2f}",
            number(measures["half_drop_depth"], ".2f"),
            number(measures["last_three_share"], ".0%"),
            str(measures["reading"]),
        )
    return shown


def difference_table(comparison: AnalysisComparison) -> Table:
    """Lay out where each analysis differs most from the baseline.

    Args:
        comparison: the comparison.

    Returns:
        A rich table.
    """
    shown = table(
        f"largest difference from {comparison.baseline}, nats",
        "layer: difference ± standard error",
        *("analysis", *(heading for heading, _, _ in _SITES)),
        fold=("analysis",),
    )
    frame = comparison.differences
    for label in dict.fromkeys(frame["label"]):
        cells = []
        for _, site, quantity in _SITES:
            rows = frame[(frame["label"] == label) & (frame["site"] == site) & (frame["quantity"] == quantity)]
            cells.append(_largest(rows) if len(rows) else "-")
        shown.add_row(str(label), *cells)
    return shown


def trend_table(comparison: AnalysisComparison) -> Table:
    """Lay out which layer moves most over the steps.

    Args:
        comparison: the comparison.

    Returns:
        A rich table.
    """
    shown = table(
        f"over {len(comparison.labels)} checkpoints, nats",
        f"steepest slope per 100 {comparison.unit}s ± standard error, largest move between two neighbours",
        *("", "layer", "slope", "layer", "largest move", f"{comparison.unit}s"),
    )
    frame = comparison.trends
    for name, site, quantity in _SITES:
        rows = frame[(frame["site"] == site) & (frame["quantity"] == quantity)]
        if rows.empty:
            continue
        steep, largest = _greatest(rows, "slope"), _greatest(rows, "largest_move")
        shown.add_row(
            name,
            str(steep["layer"]),
            f"{100 * steep['slope']:+.3f}{plus_minus(100 * steep['stderr'])}",
            str(largest["layer"]),
            f"{largest['largest_move']:+.3f}",
            f"{largest['from_step']:g} to {largest['to_step']:g}",
        )
    return shown


def _greatest(rows: pd.DataFrame, column: str) -> dict[Hashable, Any]:
    """The row whose value is furthest from zero."""
    found: dict[Hashable, Any] = max(rows.to_dict("records"), key=lambda row: abs(row[column]))
    return found


def _largest(rows: pd.DataFrame) -> str:
    row = _greatest(rows, "difference")
    return f"{row['layer']}: {row['difference']:+.3f}{plus_minus(row['stderr'])}"


def _setting(value: Any) -> str:
    return "none" if value is None else str(value)


def _layer(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)


def _move(row: dict[Hashable, Any]) -> str:
    """In layers where these are comparable, else in relative depth."""
    if not pd.isna(row["move"]):
        return f"{row['move']:+d}" if row["move"] else "0"
    return number(row["depth_move"], "+.2f") + (" L" if not pd.isna(row["depth_move"]) else "")
