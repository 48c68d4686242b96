"""The page of a comparison: the curves overlaid, the differences, how each entropy falls, boundaries and notes."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pandas as pd

from internal_policy.comparison.figure_data import depth_data, difference_data, in_order, shown_names, steps_known
from internal_policy.comparison.tables import other_lenses_of, under_other_lenses
from internal_policy.report import reproduce
from internal_policy.report.charts import Chart, series_look, shade
from internal_policy.report.page import clean, interval, number, render, setting
from internal_policy.utils.console import of_resamples
from internal_policy.utils.palette import N_SERIES

if TYPE_CHECKING:
    from internal_policy.comparison.results import AnalysisComparison

MAX_BANDS = 6
"""More lines than this have no bands: they would hide one another."""
MAX_LINES = N_SERIES
"""At most so many analyses are drawn; the tables have all."""
_ADVERBS = {
    "progressive": "converge progressively",
    "abrupt": "converge abruptly",
    "mixed": "do neither",
    "none": "have no reading",
}
_SOURCE = ("model", "path", "weights", "inputs")
_MAPS = {"entropy": "Entropy of the layers", "attn": "Entropy change of ATTN", "ffn": "Entropy change of FFN"}


def page(comparison: AnalysisComparison) -> str:
    """Return the page of a comparison as HTML."""
    drawn = _drawn(comparison)
    looks = _looks(comparison, drawn)
    groups = {
        "overlay": _overlays(comparison, looks),
        "fall": [_fall(comparison, looks)],
        "difference": _differences(comparison, looks),
    }
    ids = (f"c{i}" for i in count(1))
    shown = {name: {next(ids): chart for chart in charts} for name, charts in groups.items()}
    n = len(comparison.labels)
    cut = f"{len(drawn)} of {n} analyses are drawn, evenly chosen, so that the curves can be distinguished; the tables "
    return render(
        "comparison.html.j2",
        title=f"{n} analyses compared with {comparison.baseline}",
        charts={key: chart for charts in shown.values() for key, chart in charts.items()},
        summary=summary(comparison),
        shown=shown,
        cut=cut + "have all." if len(drawn) < n else None,
        bands=len(drawn) <= MAX_BANDS,
        boundaries=_boundaries(comparison),
        other_lenses=", ".join(other_lenses_of(comparison.boundaries)),
        convergence=_convergence(comparison),
        largest=_largest(comparison),
        stepped=comparison.steps_from != "order",
        unit=comparison.unit,
        baseline=clean(comparison.baseline),
        lens=comparison.lens,
        notes=[clean(note) for note in comparison.notes],
        differing=[
            {"label": clean(label), "name": clean(name), "one": setting(one), "other": setting(other)}
            for label, settings in comparison.differing.items()
            for name, (one, other) in settings.items()
        ],
        sources=[
            {"label": clean(label), **{key: setting(source.get(key)) for key in _SOURCE}}
            for label, source in zip(comparison.labels, comparison.sources, strict=True)
        ],
        again=reproduce.comparison_commands(comparison.manifest(), comparison.path),
    )


def summary(comparison: AnalysisComparison) -> str:
    """Return what the comparison found in sentences that can be quoted."""
    others = [label for label in comparison.labels if label != comparison.baseline]
    who = f"{clean(others[0])} was compared" if len(others) == 1 else f"{len(others)} analyses were compared"
    pairs = sum(comparison.paired[label] for label in others)
    how = "on the same responses" if pairs == len(others) else f"{pairs or 'none'} of them on the same responses"
    if not pairs:
        how = "on other responses"
    rows = comparison.boundaries.to_dict("records")
    falls = {str(row["label"]): str(row["reading"]) for row in comparison.convergence.to_dict("records")}
    if len(rows) > 3:
        moved = sorted({int(row["boundary_layer"]) for row in rows if not pd.isna(row["boundary_layer"])})
        where = f"from {moved[0]} to {moved[-1]}" if len(moved) > 1 else f"at {moved[0]}" if moved else "nowhere"
        readings = list(falls.values())
        counts = ", ".join(f"{readings.count(r)} {_ADVERBS[r]}" for r in dict.fromkeys(readings))
        return (
            f"{who} with {clean(comparison.baseline)}, {how}. Boundary layers lie {where}; of the {len(rows)} "
            f"entropies {counts}."
        )
    sentences = []
    for row in rows:
        name, boundary = clean(row["label"]), row["boundary_layer"]
        at = "no boundary layer" if pd.isna(boundary) else f"boundary layer {int(boundary)} of {row['n_layers']}"
        reading = falls[str(row["label"])]
        sentences.append(f"{name} has {at} and {'no reading of' if reading == 'none' else f'{reading}'} convergence")
    return f"{who} with {clean(comparison.baseline)}, {how}. {'; '.join(sentences)}."


def _drawn(comparison: AnalysisComparison) -> list[str]:
    """Return the labels that are drawn: the baseline, the ends, and others evenly between."""
    labels = in_order(comparison)
    if len(labels) <= MAX_LINES:
        return labels
    chosen = {round(i * (len(labels) - 1) / (MAX_LINES - 2)) for i in range(MAX_LINES - 1)}
    return [label for i, label in enumerate(labels) if i in chosen or label == comparison.baseline]


def _looks(comparison: AnalysisComparison, drawn: list[str]) -> dict[str, dict[str, Any]]:
    """Return the name of each line and how it is drawn, in shades if steps give an order."""
    names = shown_names(comparison)
    if steps_known(comparison):
        return {label: {"name": names[label], "color": shade(i, len(drawn))} for i, label in enumerate(drawn)}
    return {label: {"name": names[label], **series_look(i)} for i, label in enumerate(drawn)}


def _lines(chart: Chart, frame: pd.DataFrame, x: str, y: str, looks: dict[str, Any], form: str, unit: str) -> None:
    for label, drawn in looks.items():
        rows = frame[frame["label"] == label]
        if rows.empty:
            continue
        few = len(looks) <= MAX_BANDS
        ends = (rows["low"], rows["high"])
        chart.curve(x=rows[x], y=rows[y], ends=ends, **drawn, format=form, unit=unit, markers=few, band=few)


def _overlays(comparison: AnalysisComparison, looks: dict[str, Any]) -> list[Chart]:
    frame = depth_data(comparison)
    charts = []
    for unit, y, form, ends in (
        ("nats", "Entropy (nats)", ".3f", " nats"),
        ("share", "Entropy / ln V", ".3f", ""),
    ):
        what = "in nats" if unit == "nats" else "as a share of ln V"
        chart = Chart(
            f"Entropy of the residual stream {what}",
            "Relative depth, layer / L",
            y,
            f"Entropy of the residual stream {what} by relative depth, a line for each analysis.",
        )
        rows = frame[frame["unit"] == unit]
        _lines(chart, rows, "relative_depth", "value", looks, form, ends)
        at = rows[rows["boundary"] & rows["label"].isin(list(looks))]
        if len(at):
            colors = [looks[str(label)]["color"] for label in at["label"]]
            more: dict[str, Any] = {"marker": {"line": {"color": "var(--fg)", "width": 1.5}}, "hoverinfo": "skip"}
            chart.points("boundary layer", at["relative_depth"], at["value"], colors, "boundary", 11, **more)
        chart.depth_axis()
        chart.figure.update_yaxes(rangemode="tozero")
        charts.append(chart)
    return charts


def _fall(comparison: AnalysisComparison, looks: dict[str, Any]) -> Chart:
    chart = Chart(
        "Share of the drop so far",
        "Relative depth, layer / L",
        "Share of the drop",
        "Share of the total drop of the entropy that has fallen by each relative depth, a line for each analysis.",
    )
    chart.level(0.5)
    _lines(chart, comparison.fall, "relative_depth", "fallen", looks, ".2f", "")
    chart.depth_axis()
    return chart


def _differences(comparison: AnalysisComparison, looks: dict[str, Any]) -> list[Chart]:
    base = comparison.baseline
    others = {label: drawn for label, drawn in looks.items() if label != base}
    charts = []
    if not comparison.differences.empty:
        frame = difference_data(comparison)
        for name, title in _MAPS.items():
            described = f"{title}, each analysis less the baseline, over the layers."
            chart = Chart(f"{title}, less the baseline", "Layer", "Difference (nats)", described)
            chart.level(0.0, dash="solid")
            _lines(chart, frame[frame["map"] == name], "layer", "difference", others, "+.3f", " nats")
            chart.layer_axis(int(frame["layer"].max()))
            charts.append(chart)
        return charts
    for quantity, title, unit in (
        ("entropy", "Entropy by relative depth", " nats"),
        ("entropy_share", "Entropy / ln V by relative depth", ""),
    ):
        described = f"{title}, each analysis less the baseline."
        y = "Difference (nats)" if unit else "Difference (of ln V)"
        chart = Chart(f"{title}, less the baseline", "Relative depth, layer / L", y, described)
        chart.level(0.0, dash="solid")
        rows = comparison.depths[comparison.depths["quantity"] == quantity]
        _lines(chart, rows, "relative_depth", "difference", others, "+.3f", unit)
        chart.depth_axis()
        charts.append(chart)
    return charts


def _boundaries(comparison: AnalysisComparison) -> list[dict[str, Any]]:
    rows, lenses = [], other_lenses_of(comparison.boundaries)
    for row in comparison.boundaries.to_dict("records"):
        label, boundary = str(row["label"]), row["boundary_layer"]
        moved = "0" if row["move"] is not pd.NA and row["move"] == 0 else number(row["move"], "+.0f")
        if pd.isna(row["move"]) and not pd.isna(row["depth_move"]):
            moved = f"{number(row['depth_move'], '+.2f')} L"
        rows.append(
            {
                "label": clean(label),
                "step": f"{row['step']:g}",
                "n_layers": row["n_layers"],
                "boundary": "none" if pd.isna(boundary) else str(int(boundary)),
                "other_lenses": under_other_lenses(row, lenses),
                "confidence": of_resamples(row["confidence"]),
                "runner_up": "none" if pd.isna(row["runner_up"]) else str(int(row["runner_up"])),
                "stages": "/".join(str(row[f"n_{s}"]) for s in ("exploration", "integration", "convergence")),
                "move": "baseline" if label == comparison.baseline else moved,
                "paired": comparison.paired[label],
            }
        )
    return rows


def _convergence(comparison: AnalysisComparison) -> list[dict[str, Any]]:
    rows = []
    for row in comparison.convergence.to_dict("records"):
        cells = [
            {"value": number(row[name], form), "interval": interval(row[f"{name}_low"], row[f"{name}_high"], form)}
            for name, form in (("total_drop", ".3f"), ("half_drop_depth", ".3f"), ("last_three_share", ".1%"))
        ]
        sure = of_resamples(row["reading_share"])
        rows.append({"label": clean(row["label"]), "cells": cells, "reading": row["reading"], "sure": sure})
    return rows


def _largest(comparison: AnalysisComparison) -> list[dict[str, Any]]:
    """Return where each analysis differs most from the baseline, for each quantity, with its interval."""
    frame = comparison.differences
    if frame.empty:
        return []
    sites = (("layer", "entropy_out"), ("attn", "change"), ("ffn", "change"))
    rows = []
    for label in dict.fromkeys(frame["label"]):
        cells = []
        for site, quantity in sites:
            own = frame[(frame["label"] == label) & (frame["site"] == site) & (frame["quantity"] == quantity)]
            most = max(own.to_dict("records"), key=lambda row: abs(row["difference"]), default=None)
            ends = "" if most is None else interval(most["low"], most["high"], "+.3f")
            text = number(None) if most is None else f"layer {most['layer']}: {number(most['difference'], '+.3f')}"
            cells.append({"value": text, "interval": ends})
        rows.append({"label": clean(label), "cells": cells})
    return rows
