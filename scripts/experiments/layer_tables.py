"""The tables of docs/results.md on E4: what is known of each layer, and what training at it brought."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from typing import Any

import dose
import layers
import pandas as pd
from cells import NOTHING, Found, cell, markdown_table, number, pick, seed_counts
from jobs import BOUNDARY, LAYERS, LEARNING_RATE, MODELS
from summaries import EVIDENCE

_PREDICTORS = {
    "layer": "the layer's number",
    "change": "entropy change of its FFN",
    "change_direction": "direction part of that change",
    "across": "cosine with the gradient of GRPO, across halves",
    "accuracy": "accuracy of its policy",
}
_OUTCOMES = {
    layers.END: "at the end",
    layers.ALONG: "along the run",
    layers.AFTERWARDS: "along the run from step 48",
}


def e4_layers(found: Found) -> str:
    """What training at each layer did at equal total steps."""
    ends, curves = found["e4_outcomes"], found["e4_along"]

    def cells(model: str, layer: int) -> list[str]:
        along = _along(curves, model, layer, dose.TOTAL, ("24", "mean"))
        last = [pick(ends, model=model, layer=layer, measure=measure) for measure in dose.MEASURES]
        return [*(cell(row) for row in along), *(cell(row, "over_grpo") for row in last), seed_counts(*along)]

    return _each_layer(ends, cells, ["step 24", "along the run", "at the end", "Pass@16 at the end", "seeds"])


def e4_optimised(found: Found) -> str:
    """What training at each layer did at equal GRPO steps, and what alignment alone did."""
    curves, alone = found["e4_along"], found["e1_outcomes"]

    def cells(model: str, layer: int) -> list[str]:
        along = _along(curves, model, layer, dose.OPTIMISED, ("24", "mean", "96"))
        first = pick(alone, method="bupo", model=model, layer=layer, rate=LEARNING_RATE, measure="avg")
        aligned = cell(first and {**first, "value": first["gain"]})
        return [*(cell(row) for row in along), seed_counts(*along), aligned]

    heads = ["after 24", "along the run", "after 96", "seeds", "60 steps of alignment alone (E1)"]
    return _each_layer(curves, cells, heads)


def e4_evidence(found: Found) -> str:
    """What is measured of each layer before any training."""
    known = found[EVIDENCE]
    shown = (("change", 3, 1.0), ("change_direction", 3, 1.0), ("across", 3, 1.0), ("accuracy", 1, 100.0))

    def cells(model: str, layer: int) -> list[str]:
        own = pick(known, model=model, layer=layer)
        return [] if own is None else [number(own[name], digits, x, name != "accuracy") for name, digits, x in shown]

    return _each_layer(known, cells, ["dH_FFN, nats", "its direction part", "gradient cosine", "accuracy of pi^l, %"])


def _each_layer(table: pd.DataFrame, cells: Callable[[str, int], list[str]], heads: Sequence[str]) -> str:
    """A row for each layer of each model that has cells; nothing if the table is empty."""
    if table.empty:
        return NOTHING
    rows = []
    for model, layer in product(MODELS, range(1, LAYERS + 1)):
        name = f"{layer}, boundary" if layer == BOUNDARY[model] else str(layer)
        if own := cells(model, layer):
            rows.append([f"`{model}`", name, *own])
    return markdown_table(["model", "layer", *heads], rows)


def _along(
    curves: pd.DataFrame, model: str, layer: int, comparison: str, steps: Sequence[str]
) -> list[Mapping[Hashable, Any] | None]:
    return [pick(curves, model=model, layer=layer, comparison=comparison, step=step) for step in steps]


def e4_correlations(found: Found) -> str:
    """Rank correlations over the layers."""
    table = found["e4_correlations"]
    if table.empty:
        return NOTHING
    rows = []
    settings = [(outcome, model) for outcome in _OUTCOMES for model in MODELS]
    for name, label in _PREDICTORS.items():
        own = [pick(table, model=model, outcome=outcome, predictor=name) for outcome, model in settings]
        if any(row is not None for row in own):
            rows.append([label, *(cell(row, "", 2, 1.0) for row in own), seed_counts(*own)])
    heads = [f"`{model}`, {_OUTCOMES[outcome]}" for outcome, model in settings]
    return markdown_table([f"Spearman with Avg@1 over {LAYERS} layers", *heads, "seeds"], rows)


def e4_over_boundary(found: Found) -> str:
    """What training at each layer did against training at the boundary layer."""
    table = found["e4_over_boundary"]
    if table.empty:
        return NOTHING
    rows = []
    for model in MODELS:
        for layer in range(1, LAYERS + 1):
            own = [pick(table, model=model, layer=layer, outcome=outcome) for outcome in _OUTCOMES]
            if any(row is not None for row in own):
                cells = [cell(row) for row in own]
                rows.append([f"`{model}`", f"{layer} minus {BOUNDARY[model]}", *cells, seed_counts(*own)])
    return markdown_table(["model", "layers", *_OUTCOMES.values(), "seeds"], rows)
