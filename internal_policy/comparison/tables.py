"""The tables of a comparison: differences from the baseline, trends over checkpoints, moves of boundary and stages."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from internal_policy.analysis.layer_selection import STAGES
from internal_policy.analysis.results import Analysis, find_other_lens
from internal_policy.comparison.pairing import DEPTHS, QUANTITIES, Item, combine, grouped, paired
from internal_policy.statistics import SITES, Floats, clustered_mean

TREND_COLUMNS = (
    *("layer", "site", "quantity", "slope", "stderr", "low", "high", "total_move", "total_low", "total_high"),
    *("largest_move", "from_step", "to_step", "paired", "n_checkpoints"),
)


def layer_rows(items: Sequence[Item]) -> pd.DataFrame:
    """Every analysis' own layers under one another.

    Args:
        items: the analyses.

    Returns:
        A row per analysis, layer and site: label, model, step, layer, relative_depth, site, stage, entropy_share, then
        each quantity with its `_stderr`, `_low` and `_high` (95% interval), and n_tokens.
    """
    parts = []
    for item in items:
        table = item.analysis.layers
        part = table.drop(columns=["layer", "site"])
        keys: dict[str, Any] = {
            "label": item.label,
            "model": item.analysis.name,
            "step": item.step,
            "layer": table["layer"],
            "relative_depth": table["layer"] / item.analysis.n_layers,
            "site": table["site"],
            "stage": [item.analysis.stages[layer - 1] for layer in table["layer"]],
            "entropy_share": table["entropy_out"] / item.log_vocabulary,
        }
        for place, (name, column) in enumerate(keys.items()):
            part.insert(place, name, column)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def difference_rows(items: Sequence[Item], baseline: Item) -> pd.DataFrame:
    """Each analysis less the baseline, layer by layer.

    Args:
        items: the analyses.
        baseline: one of them; analyses with another number of layers have no rows.

    Returns:
        A row per analysis, layer, site and quantity: label, step, layer, relative_depth, site, quantity, value,
        baseline_value, difference, stderr, low, high (95% interval), paired, same_vocabulary, n_responses.
    """
    parts = []
    for item in items:
        n_layers = item.analysis.n_layers
        if item is baseline or n_layers != baseline.analysis.n_layers:
            continue
        same = paired(item, baseline)
        layers = np.arange(1, n_layers + 1)
        for site in SITES:
            for quantity in QUANTITIES:
                mine, theirs = item.values(site, quantity), baseline.values(site, quantity)
                if mine is None or theirs is None:
                    continue
                keys = {"layer": layers, "relative_depth": layers / n_layers, "site": site, "quantity": quantity}
                parts.append(_difference(item, baseline, mine, theirs, same, keys))
    return _stacked(parts, ["layer", "relative_depth", "site", "quantity"])


def depth_rows(items: Sequence[Item], baseline: Item) -> pd.DataFrame:
    """Each analysis less the baseline at the same relative depths, whatever their numbers of layers.

    Args:
        items: the analyses.
        baseline: one of them.

    Returns:
        A row per analysis, depth and quantity: as `difference_rows`, without layer and site; the quantities are entropy
        (of the residual stream, nats) and entropy_share (over ln V).
    """
    parts = []
    for item in items:
        if item is baseline:
            continue
        same = paired(item, baseline)
        mine, theirs = item.at_depths(), baseline.at_depths()
        shares = mine / item.log_vocabulary, theirs / baseline.log_vocabulary
        for quantity, pair in (("entropy", (mine, theirs)), ("entropy_share", shares)):
            keys = {"relative_depth": DEPTHS, "quantity": quantity}
            parts.append(_difference(item, baseline, *pair, same, keys))
    return _stacked(parts, ["relative_depth", "quantity"])


def trend_rows(items: Sequence[Item]) -> pd.DataFrame:
    """How each layer moves over the checkpoints of a training.

    The slope is that of the least-squares line over the steps, sum_k w_k v_k with w_k = (s_k - s) / sum (s_k - s)^2:
    linear in the values, so each response has its own.

    Args:
        items: at least three analyses with the same number of layers at different steps.

    Returns:
        A row per layer, site and quantity: slope (per step) with stderr, low, high (95% interval); total_move from the
        first step to the last with its total_low and total_high; largest_move between successive checkpoints, and the
        steps from_step and to_step between which it is; paired, n_checkpoints. The largest is picked after the fact,
        so an interval of it would not mean what it says; it has none.
    """
    ordered = sorted(items, key=lambda item: item.step)
    steps = np.array([item.step for item in ordered])
    centred = steps - steps.mean()
    slopes, total = centred / (centred**2).sum(), np.zeros(len(steps))
    total[0], total[-1] = -1.0, 1.0
    groups = grouped(ordered)
    layers = np.arange(1, ordered[0].analysis.n_layers + 1)
    parts = []
    for site in SITES:
        for quantity in QUANTITIES:
            values = [v for item in ordered if (v := item.values(site, quantity)) is not None]
            if len(values) < len(ordered):
                continue
            slope, move = (combine(ordered, values, w.tolist(), groups) for w in (slopes, total))
            means = [clustered_mean(v, *item.tokens_and_prompts)[0] for v, item in zip(values, ordered, strict=True)]
            moves = np.diff(means, axis=0)
            largest = np.abs(moves).argmax(axis=0)
            columns = {
                **{"layer": layers, "site": site, "quantity": quantity, "slope": slope.pop("value"), **slope},
                **{"total_move": move["value"], "total_low": move["low"], "total_high": move["high"]},
                **{"largest_move": moves[largest, layers - 1], "from_step": steps[largest]},
                **{"to_step": steps[largest + 1], "paired": len(groups) == 1, "n_checkpoints": len(ordered)},
            }
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def boundary_rows(items: Sequence[Item], baseline: Item, aside: Sequence[Analysis] = ()) -> pd.DataFrame:
    """Where each analysis' boundary layer and stages lie, and how far from the baseline's.

    Args:
        items: the analyses.
        baseline: one of them.
        aside: analyses of the same responses under another lens; such as lie beside the others are found by themselves.

    Returns:
        A row per analysis: analysis (its number, from 1), label, step, n_layers, boundary_layer, relative_depth,
        confidence, runner_up, last_exploration, first_integration and first_convergence layer, the number of layers of
        each stage, move (in layers; empty where the numbers of layers differ) and depth_move (in relative depth);
        other_lens: under which other lens the same responses were analysed, if they were, and its
        other_lens_boundary_layer, empty where it has none.
    """
    rows, origin = [], baseline.analysis
    for number, item in enumerate(items, start=1):
        a, stages = item.analysis, item.analysis.stages
        layers = {s: [layer for layer, stage in enumerate(stages, start=1) if stage == s] for s in STAGES}
        mine, theirs = a.boundary_layer, origin.boundary_layer
        other = find_other_lens(a, aside)
        move, depth_move = None, np.nan
        if mine is not None and theirs is not None:
            depth_move = mine / a.n_layers - theirs / origin.n_layers
            move = mine - theirs if a.n_layers == origin.n_layers else None
        rows.append(
            {
                "analysis": number,
                "label": item.label,
                "step": item.step,
                "n_layers": a.n_layers,
                "boundary_layer": mine,
                "relative_depth": mine / a.n_layers if mine is not None else np.nan,
                "confidence": np.nan if a.selection.confidence is None else a.selection.confidence,
                "runner_up": a.selection.runner_up,
                "last_exploration": max(layers["exploration"], default=None),
                "first_integration": min(layers["integration"], default=None),
                "first_convergence": min(layers["convergence"], default=None),
                **{f"n_{stage}": len(layers[stage]) for stage in STAGES},
                "move": move,
                "depth_move": depth_move,
                "other_lens": np.nan if other is None else other.lens,
                "other_lens_boundary_layer": None if other is None else other.boundary_layer,
            }
        )
    ends = ("last_exploration", "first_integration", "first_convergence")
    whole = ("boundary_layer", "runner_up", *ends, "move", "other_lens_boundary_layer")
    return pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64"))


def stage_rows(items: Sequence[Item], baseline: Item) -> pd.DataFrame:
    """The stage of every layer, beside the baseline's.

    Args:
        items: the analyses.
        baseline: one of them.

    Returns:
        A row per analysis and layer: label, step, layer, relative_depth, stage, baseline_stage, changed; the last two
        are empty where the numbers of layers differ.
    """
    parts = []
    for item in items:
        stages, theirs = item.analysis.stages, baseline.analysis.stages
        layers = np.arange(1, len(stages) + 1)
        comparable = len(stages) == len(theirs)
        changed = [a != b for a, b in zip(stages, theirs, strict=False)]
        part = pd.DataFrame({"label": item.label, "step": item.step, "layer": layers})
        part["relative_depth"], part["stage"] = layers / len(stages), list(stages)
        part["baseline_stage"] = pd.array(theirs if comparable else [None] * len(stages), dtype="string")
        parts.append(part.assign(changed=pd.array(changed if comparable else [None] * len(stages), dtype="boolean")))
    return pd.concat(parts, ignore_index=True)


def _difference(
    item: Item, baseline: Item, mine: Floats, theirs: Floats, same: bool, keys: dict[str, Any]
) -> pd.DataFrame:
    found = combine((item, baseline), (mine, theirs), (1.0, -1.0), [[0, 1]] if same else [[0], [1]])
    return pd.DataFrame(
        {
            "label": item.label,
            "step": item.step,
            **keys,
            "value": clustered_mean(mine, *item.tokens_and_prompts)[0],
            "baseline_value": clustered_mean(theirs, *baseline.tokens_and_prompts)[0],
            "difference": found["value"],
            **{name: found[name] for name in ("stderr", "low", "high")},
            "paired": same,
            "same_vocabulary": item.analysis.vocab_size == baseline.analysis.vocab_size,
            "n_responses": item.analysis.n_responses,
        }
    )


def _stacked(parts: list[pd.DataFrame], keys: list[str]) -> pd.DataFrame:
    """The parts under one another; the columns without rows where there is none."""
    ends = ["value", "baseline_value", "difference", "stderr", "low", "high"]
    ends += ["paired", "same_vocabulary", "n_responses"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["label", "step", *keys, *ends])


def other_lens_of(boundaries: pd.DataFrame) -> str | None:
    """Name the other lens under which the same responses were analysed.

    Args:
        boundaries: of a comparison.

    Returns:
        The lens; None where none of the analyses was.
    """
    # Comparisons that are stored from before it was looked for lack the column.
    named = [lens for lens in boundaries.get("other_lens", ()) if not pd.isna(lens)]
    return str(named[0]) if named else None


def under_other_lens(row: dict[Hashable, Any]) -> str:
    """Write the boundary layer under the other lens.

    Args:
        row: of the boundaries of a comparison.

    Returns:
        The layer or ``none``; a stroke where it was not measured.
    """
    if pd.isna(row.get("other_lens")):
        return "-"
    layer = row["other_lens_boundary_layer"]
    return "none" if pd.isna(layer) else str(layer)
