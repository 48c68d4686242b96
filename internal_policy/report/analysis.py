"""The page of one or several analyses: what can be quoted, stages, curves, tokens, how to do it again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internal_policy.analysis.layer_selection import COVERS, STAGES
from internal_policy.analysis.remarks import positions_line, remarks
from internal_policy.analysis.results import Analysis, other_lens_sentence
from internal_policy.comparison.convergence import Convergence, measure_convergence
from internal_policy.report import reproduce
from internal_policy.report.analysis_charts import change_chart, fall_chart, flow_chart
from internal_policy.report.numbers import interval, number, spans
from internal_policy.report.page import clean, render
from internal_policy.report.settings import settings_of
from internal_policy.report.tokens import token_view
from internal_policy.utils.console import few_prompts, of_resamples
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.palette import STAGES as STAGE_LOOKS


def page(analyses: Sequence[Analysis]) -> str:
    """Draw up the page.

    Args:
        analyses: the analyses.

    Returns:
        HTML.

    Raises:
        UserError: there is none.
    """
    if not analyses:
        raise UserError("there is no analysis to report on; give at least one")
    charts: dict[str, Any] = {}
    tokens: dict[str, Any] = {}
    parts = []
    for place, analysis in enumerate(analyses, start=1):
        parts.append(part_of(analysis, f"a{place}", charts, tokens))
    names = [str(a.name) for a in analyses]
    title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return render(
        "analysis.html.j2",
        title=f"Internal policies of {title}",
        charts=charts,
        tokens=tokens,
        parts=parts,
    )


def part_of(analysis: Analysis, key: str, charts: dict[str, Any], tokens: dict[str, Any]) -> dict[str, Any]:
    """Gather what the page shows of one analysis.

    Args:
        analysis: the analysis.
        key: what the ids of its elements begin with.
        charts: its figures are added here.
        tokens: its token view is added here.

    Returns:
        What the template fills in.
    """
    convergence = measure_convergence(analysis, seed=int(analysis.config.get("seed", 0)))
    drawn = {"flow": flow_chart(analysis), "change": change_chart(analysis), "fall": fall_chart(convergence)}
    charts.update({f"{key}-{name}": chart.spec() for name, chart in drawn.items()})
    view = token_view(analysis)
    if view is not None:
        tokens[f"{key}-tokens"] = view["data"]
    return {
        "key": key,
        "name": clean(analysis.name),
        "summary": summary(analysis, convergence),
        "target": target(analysis),
        "remarks": remarks(analysis),
        "other_lens": other_lens_sentence(analysis),
        "few": few_prompts(analysis.n_prompts),
        "positions": None if analysis.positions is None else positions_line(analysis.positions),
        "stages": stages(analysis),
        "strip": [
            {"layer": n, "stage": stage, "mark": STAGE_LOOKS[stage].sign, "target": n == analysis.boundary_layer}
            for n, stage in enumerate(analysis.stages, start=1)
        ],
        "charts": {name: {"title": c.title, "described": c.described} for name, c in drawn.items()},
        "rows": layer_rows(analysis),
        "convergence": convergence_rows(convergence),
        "reading": convergence.reading,
        "reason": convergence.reason,
        "tokens": None if view is None else view["told"],
        "settings": settings_of(analysis),
        "again": reproduce.analysis_commands(analysis),
    }


def summary(analysis: Analysis, convergence: Convergence) -> str:
    """Say in sentences that can be quoted what the analysis found.

    Args:
        analysis: the analysis.
        convergence: how its entropy falls.

    Returns:
        Text.
    """
    chosen, name = analysis.selection, clean(analysis.name)
    responses, _, tokens = analysis.extent.partition(", ")
    size = f"{responses} ({tokens})"
    if chosen.boundary_layer is None:
        found = f"it has no boundary layer, for {_why(chosen.reason)}"
    else:
        found = f"its boundary layer is {chosen.boundary_layer}"
    if chosen.agreement is not None:
        found += f" ({chosen.agreement}, {COVERS})"
    if other := other_lens_sentence(analysis):
        found += f"; {other}"
    falls = {
        "progressive": "progressively",
        "abrupt": "abruptly",
        "mixed": "neither progressively nor abruptly",
    }.get(convergence.reading)
    if falls is None:
        told = f"Whether its entropy converges progressively or abruptly cannot be said: {convergence.reason}."
    else:
        told = (
            f"Its entropy converges {falls}: half of the drop of {number(convergence.total_drop, '.2f')} nats has "
            f"fallen at depth {number(convergence.half_drop_depth, '.2f')}, and the last three layers take "
            f"{number(convergence.last_three_share, '.0%')} of it."
        )
    return f"{name} has {counted(analysis.n_layers, 'layer')}; on {size} {found}. {told}"


def _why(reason: str) -> str:
    """A reason without how many resamples share it; what comes before that may hold semicolons too."""
    told, _, last = reason.rpartition("; ")
    return told if told and "resamples" in last else reason


def target(analysis: Analysis) -> dict[str, Any]:
    """Gather what is said of the boundary layer.

    Args:
        analysis: the analysis.

    Returns:
        Texts by name.
    """
    chosen = analysis.selection
    runner_up = None
    if chosen.runner_up is not None:
        runner_up = f"layer {chosen.runner_up} ({number(chosen.runner_up_share, '.1%')} of the resamples)"
    agreed = chosen.agreement
    return {
        "layer": "none" if chosen.boundary_layer is None else str(chosen.boundary_layer),
        "confidence": "not known" if agreed is None else f"{agreed[0].upper()}{agreed[1:]}, {COVERS}",
        "runner_up": runner_up or "none in any resample" if chosen.confidence is not None else "not known",
        "reason": _why(chosen.reason),
        "candidates": ", ".join(map(str, chosen.candidates)),
    }


def stages(analysis: Analysis) -> list[dict[str, str]]:
    """Say which layers belong to each stage.

    Args:
        analysis: the analysis.

    Returns:
        Stage, its mark, its layers.
    """
    found = []
    for stage in STAGES:
        layers = [n for n, name in enumerate(analysis.stages, start=1) if name == stage]
        told = f"layer{'s' if len(layers) > 1 else ''} {spans(layers)}" if layers else "no layer"
        found.append({"stage": stage, "mark": STAGE_LOOKS[stage].sign, "layers": told})
    return found


def convergence_rows(convergence: Convergence) -> list[dict[str, str]]:
    """Lay out the convergence measures.

    Args:
        convergence: the measures.

    Returns:
        Measure, value, interval.
    """
    sure = of_resamples(convergence.reading_share)
    found = [
        ("highest entropy at", f"layer {convergence.peak_layer}", ""),
        ("total drop", f"{number(convergence.total_drop)} nats", interval(*convergence.total_drop_interval)),
        (
            "half has fallen at depth",
            number(convergence.half_drop_depth),
            interval(*convergence.half_drop_interval),
        ),
        (
            "share of the last three layers",
            number(convergence.last_three_share, ".1%"),
            interval(*convergence.last_three_interval, ".1%"),
        ),
        ("reading", convergence.reading, f"{sure} of the resamples of the prompts" if sure != "-" else ""),
    ]
    return [dict(zip(("measure", "value", "interval"), row, strict=True)) for row in found]


def layer_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Lay out the layers, one row each.

    Args:
        analysis: the analysis.

    Returns:
        Layer, stage, whether it is the boundary layer, and cells of value and interval.
    """
    columns = [("layer", "entropy_in", ".3f"), ("layer", "entropy_out", ".3f")]
    columns += [(site, "change", "+.3f") for site in ("layer", "attn", "ffn")]
    sites = {s: analysis.layers[analysis.layers["site"] == s].set_index("layer") for s in ("layer", "attn", "ffn")}
    rows = []
    for layer, stage in enumerate(analysis.stages, start=1):
        cells = []
        for site, column, form in columns:
            row = sites[site].loc[layer]
            ends = interval(row[f"{column}_low"], row[f"{column}_high"], form)
            cells.append({"value": number(row[column], form), "interval": ends})
        where = {
            "layer": layer,
            "stage": stage,
            "mark": STAGE_LOOKS[stage].sign,
            "target": layer == analysis.boundary_layer,
        }
        rows.append({**where, "cells": cells})
    return rows
