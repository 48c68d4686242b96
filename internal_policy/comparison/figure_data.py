"""The numbers in the figures of a comparison, as tidy tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.comparison.results import AnalysisComparison

MAPS = {"entropy": ("layer", "entropy_out"), "attn": ("attn", "change"), "ffn": ("ffn", "change")}
"""Site and column of each quantity that is shown per layer and checkpoint."""


def steps_known(comparison: AnalysisComparison) -> bool:
    """Return whether the analyses form a sequence: one architecture, and a different step for each."""
    distinct = len(set(comparison.steps)) == len(comparison.steps)
    return comparison.steps_from != "order" and distinct and comparison.one_architecture


def in_order(comparison: AnalysisComparison) -> list[str]:
    """Return the labels, in the order of the steps if these are known."""
    if not steps_known(comparison):
        return list(comparison.labels)
    pairs = zip(comparison.steps, comparison.labels, strict=True)
    return [label for _, label in sorted(pairs, key=lambda pair: pair[0])]


def row_names(comparison: AnalysisComparison) -> list[str]:
    """Name the analyses, in the order of the steps, by the user's labels or else by known steps."""
    labels = in_order(comparison)
    if comparison.labels_given or not steps_known(comparison):
        return labels
    steps = dict(zip(comparison.labels, comparison.steps, strict=True))
    return [f"{comparison.unit} {steps[label]:g}" for label in labels]


def shown_names(comparison: AnalysisComparison) -> dict[str, str]:
    """Map each label to the name that figures show, in the order of the steps."""
    return dict(zip(in_order(comparison), row_names(comparison), strict=True))


def same_depth(comparison: AnalysisComparison) -> bool:
    """Return whether all analyses have the same number of layers."""
    return len(set(comparison.boundaries["n_layers"])) == 1


def step_data(comparison: AnalysisComparison) -> pd.DataFrame:
    """Return the numbers of the heat maps and of the lines over the steps.

    Args:
        comparison: analyses with the same number of layers.

    Returns:
        A row for each map, analysis (in order of the steps) and layer: map, label, step, layer, value, low, high, nats.
        The maps are entropy (of each layer's output), attn and ffn (the change that the module makes), and
        entropy_difference, attn_difference and ffn_difference (each less the baseline's, with its interval).

    Raises:
        UserError: the numbers of layers differ.
    """
    if not same_depth(comparison):
        raise UserError("the models have different numbers of layers; draw them by relative depth")
    rank = {label: i for i, label in enumerate(in_order(comparison))}
    columns = ["map", "label", "step", "layer", "value", "low", "high"]
    parts = []
    for name, (site, column) in MAPS.items():
        rows = comparison.layers[comparison.layers["site"] == site]
        ends = {column: "value", f"{column}_low": "low", f"{column}_high": "high"}
        parts.append(rows.rename(columns=ends).assign(map=name)[columns])
    differences = comparison.differences
    for (name, (site, column)), raw in zip(MAPS.items(), list(parts), strict=True):
        key = {"map": f"{name}_difference"}
        rows = differences[(differences["site"] == site) & (differences["quantity"] == column)]
        parts.append(raw[raw["label"] == comparison.baseline].assign(**key, value=0.0, low=0.0, high=0.0))
        parts.append(rows.assign(**key, value=rows["difference"])[columns])
    frame = pd.concat(parts, ignore_index=True)
    maps = [*MAPS, *(f"{name}_difference" for name in MAPS)]
    keys = {"map": {m: i for i, m in enumerate(maps)}, "label": rank}
    order = frame.assign(**{name: frame[name].map(ranks) for name, ranks in keys.items()})
    return frame.loc[order.sort_values([*keys, "layer"]).index].reset_index(drop=True)


def depth_data(comparison: AnalysisComparison) -> pd.DataFrame:
    """Return the numbers of the overlay by relative depth.

    Args:
        comparison: the comparison.

    Returns:
        A row for each unit (nats, and share of ln V), analysis and layer 0..L: unit, label, layer, relative_depth,
        value, low, high (95% interval), boundary (whether it is the boundary layer).
    """
    parts = []
    boundary = comparison.boundaries.set_index("label")["boundary_layer"]
    stream = comparison.layers[comparison.layers["site"] == "layer"]
    for label, rows in stream.groupby("label", sort=False):
        rows = rows.sort_values("layer")
        ends = ("", "_low", "_high")
        numbers = np.array([[rows[f"entropy_in{e}"].iloc[0], *rows[f"entropy_out{e}"]] for e in ends], dtype=float)
        layers = np.arange(numbers.shape[1])
        # The share and the entropy of one row give ln V.
        log_vocabulary = float(rows["entropy_out"].iloc[0] / rows["entropy_share"].iloc[0])
        own = boundary[label]
        for unit, scale in (("nats", 1.0), ("share", log_vocabulary)):
            value, low, high = numbers / scale
            part = pd.DataFrame({"unit": unit, "label": label, "layer": layers, "value": value, "low": low})
            part["high"], part["boundary"] = high, layers == (-1 if pd.isna(own) else int(own))
            part.insert(3, "relative_depth", layers / layers[-1])
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def difference_data(comparison: AnalysisComparison) -> pd.DataFrame:
    """Return the numbers of the differences per layer.

    Args:
        comparison: the comparison.

    Returns:
        A row for each map (entropy, attn, ffn), analysis other than the baseline, and layer: map, label, step, layer,
        difference, low, high (95% interval), paired.
    """
    rows = comparison.differences
    parts = [
        rows[(rows["site"] == site) & (rows["quantity"] == column)].assign(map=name)
        for name, (site, column) in MAPS.items()
    ]
    columns = ["map", "label", "step", "layer", "difference", "low", "high", "paired"]
    return pd.concat(parts, ignore_index=True)[columns]
