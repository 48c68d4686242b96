"""Analyses, comparisons and studies on the terminal, and the files of a result."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from internal_policy.analysis.change_parts import length_sentence
from internal_policy.analysis.layer_selection import STAGES as STAGE_NAMES
from internal_policy.analysis.remarks import positions_line, remarks
from internal_policy.analysis.results import REPORT, Analysis
from internal_policy.analysis.token_groups import TokenGroups
from internal_policy.comparison.results import AnalysisComparison
from internal_policy.comparison.tables import other_lenses_of, under_other_lenses
from internal_policy.utils.console import MIN_WIDTH, few_prompts, number, plus_minus, table
from internal_policy.utils.console import console as open_console
from internal_policy.utils.errors import counted
from internal_policy.utils.output import note_files
from internal_policy.utils.palette import BOUNDARY_SIGN, STAGES

_SITES = (("H layer", "layer", "entropy_out"), ("ΔH ATTN", "attn", "change"), ("ΔH FFN", "ffn", "change"))
_MOST_NOTES = 6


def show_analysis(analysis: Analysis) -> None:
    """Print an analysis on standard output."""
    console = open_console()
    console.print(layer_table(analysis))
    first, *others = remarks(analysis)
    console.print(first)
    if analysis.positions is not None:
        console.print(positions_line(analysis.positions))
    for remark in others:
        console.print(remark)
    boundary = "none" if analysis.boundary_layer is None else str(analysis.boundary_layer)
    console.print(Text.assemble((f"boundary layer: {boundary}", "bold"), f"  {analysis.selection.reason}"))
    console.print(Text(analysis.selection.agreement, style="yellow" if analysis.selection.disputed else ""))
    length = length_sentence(analysis.layers, analysis.selection, analysis.lens)
    for line in (length, few_prompts(analysis.n_prompts)):
        if line is not None:
            console.print(line)
    for name in analysis.groupings:
        groups = analysis.by(name)
        console.print(group_table(groups))
        if groups.nothing_to_compare is not None:
            console.print(groups.nothing_to_compare)
    if analysis.path is not None:
        list_files("analysis", files_of(analysis.path))


def layer_table(analysis: Analysis) -> Table:
    """Lay out the layers, one row each, with means in nats and standard errors."""
    table = Table(
        title=f"{analysis.name}: {analysis.extent}, lens {analysis.lens}",
        caption=f"means over tokens, nats ± standard error clustered by prompt; {BOUNDARY_SIGN} boundary layer",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("layer", "H layer", "ΔH layer", "ΔH ATTN", "ΔH FFN"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    names = ("layer", "attn", "ffn")
    sites = {site: analysis.layers[analysis.layers["site"] == site].set_index("layer") for site in names}
    for layer, stage in enumerate(analysis.stages, start=1):
        rows: list[Any] = [sites[site].loc[layer] for site in names]
        sign = f" {BOUNDARY_SIGN}" if layer == analysis.boundary_layer else ""
        table.add_row(
            str(layer),
            f"{rows[0]['entropy_out']:.3f}",
            *(f"{row['change']:+.3f}{plus_minus(row['change_stderr'])}" for row in rows),
            Text(f"{STAGES[stage].sign} {stage}{sign}", style=STAGES[stage].terminal),
        )
    return table


def group_table(groups: TokenGroups) -> Table:
    """Lay out the groups of a grouping, one row each: their tokens, policy entropy, and the change by the FFN."""
    layers = groups.exploration
    over = f"mean over the {counted(len(layers), 'layer')} of exploration" if layers else "no layer of exploration"
    shown = table(
        f"{groups.name}: tokens by {groups.grouping}" + (f", {groups.note}" if groups.note else ""),
        f"ΔH FFN: {over}; difference: from all other tokens; nats ± standard error clustered by prompt",
        *("group", "tokens", "share", "H(π_θ)", "ΔH FFN", "difference"),
        left=("group",),
        min_width=MIN_WIDTH,
    )
    for row in groups.summary.to_dict("records"):
        shown.add_row(
            str(row["group"]),
            str(row["n_tokens"]),
            number(row["share"], ".1%"),
            number(row["policy_entropy"]) + plus_minus(row["policy_entropy_stderr"]),
            number(row["change"], "+.3f") + plus_minus(row["change_stderr"]),
            number(row["difference"], "+.3f") + plus_minus(row["difference_stderr"]),
        )
    return shown


def show_line(analysis: Analysis) -> None:
    """Print the result of an analysis among several in one line on standard output."""
    boundary = "no boundary layer" if analysis.boundary_layer is None else f"boundary layer {analysis.boundary_layer}"
    where = "" if analysis.path is None else f"  ({analysis.path}/)"
    open_console().print(
        f"{analysis.name}: {analysis.extent}, H(π_θ) {analysis.policy_entropy['mean']:.4f} nats, {boundary}{where}",
        soft_wrap=True,
    )


def show_study(title: str, table: pd.DataFrame, convergence: pd.DataFrame) -> None:
    """Print what each analysis found and how its entropy falls, on standard output.

    `table` is that of ``Study.table``, and `convergence` is in the same order.
    """
    columns = ["reading", "half_drop_depth", "last_three_share"]
    rows = pd.concat([table, convergence[columns].reset_index(drop=True)], axis=1)
    shown = Table(
        title=title,
        caption="H(π_θ) in nats; E/I/C: layers of exploration, integration, convergence;\n"
        "falls: how the entropy falls; half: depth by which half of it has fallen;\n"
        "last 3: share of the drop in the last three layers",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        min_width=72,
    )
    # Names are shortened last, because they distinguish the rows.
    shown.add_column("", overflow="fold", min_width=min(22, max(len(str(label)) for label in table["label"])))
    for heading in ("H(π_θ)", "boundary", "E/I/C", "falls", "half", "last 3"):
        shown.add_column(heading, justify="left" if heading == "falls" else "right", no_wrap=True)
    for row in rows.to_dict("records"):
        boundary = row["boundary_layer"]
        shown.add_row(
            str(row["label"]),
            f"{row['policy_entropy']:.3f}",
            "none" if pd.isna(boundary) else f"{boundary}/{row['n_layers']}",
            "/".join(str(row[stage]) for stage in STAGE_NAMES),
            "-" if row["reading"] == "none" else str(row["reading"]),
            number(row["half_drop_depth"], ".2f"),
            number(row["last_three_share"], ".0%"),
        )
    open_console().print(shown)


def show_comparison(comparison: AnalysisComparison) -> None:
    """Print a comparison of analyses on standard output."""
    console = open_console()
    console.print(comparison_table(comparison))
    if not comparison.differences.empty:
        console.print(difference_table(comparison))
    if not comparison.trends.empty:
        console.print(trend_table(comparison))
    for label, settings in comparison.differing.items():
        shown = {name: ["none" if value is None else value for value in pair] for name, pair in settings.items()}
        pairs = [f"{name} {one} against {other}" for name, (one, other) in shown.items()]
        console.print(Text(f"{label}: settings differ too: {', '.join(pairs)}", style="yellow"))
    for note in comparison.notes[:_MOST_NOTES]:
        console.print(Text(note, style="yellow"))
    if len(comparison.notes) > _MOST_NOTES:
        console.print(f"and {len(comparison.notes) - _MOST_NOTES} more notes, in comparison.json")


def comparison_table(comparison: AnalysisComparison) -> Table:
    """Lay out boundary layer and convergence, one row per analysis."""
    caption = "drop of H layer, nats; depth of half of it; last 3 layers' share"
    if not all(comparison.paired.values()):
        caption += "\n≠ other responses than the baseline"
    if lenses := other_lenses_of(comparison.boundaries):
        caption += f"\nboundary in brackets: of the same responses under the lens {', '.join(lenses)}"
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
            _layer(place["boundary_layer"]) + (f" ({under_other_lenses(place, lenses)})" if lenses else ""),
            "" if label == comparison.baseline else _move(place),
            f"{measures['total_drop']:.2f}",
            number(measures["half_drop_depth"], ".2f"),
            number(measures["last_three_share"], ".0%"),
            str(measures["reading"]),
        )
    return shown


def difference_table(comparison: AnalysisComparison) -> Table:
    """Lay out where each analysis differs most from the baseline."""
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
    """Lay out which layer moves most over the steps."""
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


def _layer(value: Any) -> str:
    return "none" if pd.isna(value) else str(value)


def _move(row: dict[Hashable, Any]) -> str:
    """The move in layers if these are comparable, otherwise in relative depth."""
    if not pd.isna(row["move"]):
        return f"{row['move']:+d}" if row["move"] else "0"
    return number(row["depth_move"], "+.2f") + (" L" if not pd.isna(row["depth_move"]) else "")


def files_of(directory: Path) -> list[Path]:
    """The files of a result without its page, which is drawn after them and listed separately."""
    return sorted(p for p in directory.iterdir() if p.is_file() and p.name != REPORT and not p.name.startswith("."))


def list_files(what: str, paths: Sequence[Path]) -> None:
    """Print where the files of some kind are; all are in one directory."""
    note_files(what, paths)
    names = ", ".join(p.name for p in paths)
    open_console().print(f"{what}: {paths[0].parent}/ ({names})", soft_wrap=True)
