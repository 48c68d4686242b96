"""The page that asks whether the boundary layer matters: every measurement of each layer of one model."""

from __future__ import annotations

from typing import Any

import pandas as pd

from internal_policy.bupo.evidence import QUANTITIES, evidence_sentence
from internal_policy.report.charts import Chart, look
from internal_policy.report.page import clean, interval, number, render

PAGE = "layers.html"
"""The page's file, in the directory of the analysis."""
_CHARTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "change": ("Entropy change by the FFN", "ΔH FFN (nats)", {"change": "ffn", "change_direction": "direction"}),
    "accuracy": ("Accuracy of the layer's policy", "Accuracy", {"accuracy": "stream"}),
    "ablation": (
        "KL(π_θ ‖ π_θ') when a module of the layer writes nothing",
        "KL (nats)",
        {"ablation_attn": "attn", "ablation_ffn": "ffn"},
    ),
    "transfer": (
        "Cosine of the alignment's gradient with that of GRPO",
        "Cosine",
        {"cosine": "stream", "across": "policy", "ceiling": "uniform"},
    ),
    "training": ("What training at the layer did", "Outcome", {"training": "stream"}),
}
_NAMES = {**QUANTITIES, "ceiling": "ceiling: GRPO with itself across halves"}


def page(table: pd.DataFrame, name: str) -> str:
    """Return the page of a table of `bupo.layer_evidence` as HTML; `name` is the model's."""
    charts = {key: chart for key in _CHARTS if (chart := _chart(key, table)) is not None}
    columns = [column for column in QUANTITIES if _is_known(table, column)]
    rows = [
        {
            "layer": int(layer),
            "target": bool(table.loc[layer, "boundary"]),
            "cells": [_cell(table, int(layer), column) for column in columns],
        }
        for layer in table.index
    ]
    sentence = evidence_sentence(table)
    return render(
        "layers.html.j2",
        title=f"Does the boundary layer of {clean(name)} matter?",
        charts=charts,
        shown=charts,
        summary=f"{sentence[0].upper()}{sentence[1:]}.",
        headings=[QUANTITIES[column] for column in columns],
        rows=rows,
    )


def _is_known(table: pd.DataFrame, column: str) -> bool:
    return column in table and bool(table[column].notna().any())


def _chart(key: str, table: pd.DataFrame) -> Chart | None:
    title, axis, lines = _CHARTS[key]
    unit = " nats" if "nats" in axis else ""
    known = {column: what for column, what in lines.items() if _is_known(table, column)}
    if not known:
        return None
    chart = Chart(title, "Layer", axis, f"{title}, over the layers.")
    if key == "change":
        chart.level(0.0, dash="solid")
    for column, what in known.items():
        ends = [table.get(f"{column}_{end}", ()) for end in ("low", "high")]
        more: dict[str, Any] = {**look(what), "unit": unit}
        chart.curve(_NAMES[column], table.index, table[column], (ends[0], ends[1]), **more)
    chart.layer_axis(len(table))
    for layer in table.index[table["boundary"]]:
        chart.mark(int(layer), f"boundary layer {layer}", "boundary")
    return chart


def _cell(table: pd.DataFrame, layer: int, column: str) -> dict[str, str]:
    value = table.loc[layer, column]
    if f"{column}_low" not in table:
        return {"value": number(value, ".3f"), "interval": ""}
    low, high = table.loc[layer, f"{column}_low"], table.loc[layer, f"{column}_high"]
    return {"value": number(value, ".3f"), "interval": interval(low, high, ".3f")}
