"""The tables of a comparison, and the notes on what could not be compared.

Tables: differences from the baseline, trends over checkpoints, moves of boundary layer and stages.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from internal_policy.analysis.layer_selection import STAGES
from internal_policy.analysis.results import Analysis, find_other_lenses, with_other_lenses
from internal_policy.analysis.sources import StepsFrom, architecture_differences, indices_without_step
from internal_policy.comparison.pairing import (
    DEPTHS,
    QUANTITIES,
    Item,
    combine,
    group_paired,
    is_paired,
)
from internal_policy.statistics import SITES, Floats, clustered_mean
from internal_policy.utils import console

TREND_COLUMNS = (
    *("layer", "site", "quantity", "slope", "stderr", "low", "high", "total_move", "total_low", "total_high"),
    *("largest_move", "from_step", "to_step", "paired", "n_checkpoints"),
)
UPDATES = (
    "the numbers of the checkpoints count the trainer's updates: how many of them make a step, a batch of rollouts, is "
    "not recorded with them"
)
_SETTINGS = ("template", "temperature", "samples_per_prompt", "max_new_tokens", "generator")
_MODEL = ("dtype", "quantization", "device")
_MIN_TREND = 3
_MOST_NAMES = 4


def layer_rows(items: Sequence[Item]) -> pd.DataFrame:
    """Stack the layer tables of all analyses.

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
    """Subtract the baseline from each analysis, layer by layer.

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
        same = is_paired(item, baseline)
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
    """Subtract the baseline from each analysis at the same relative depths, whatever their numbers of layers.

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
        same = is_paired(item, baseline)
        mine, theirs = item.at_depths(), baseline.at_depths()
        shares = mine / item.log_vocabulary, theirs / baseline.log_vocabulary
        for quantity, pair in (("entropy", (mine, theirs)), ("entropy_share", shares)):
            keys = {"relative_depth": DEPTHS, "quantity": quantity}
            parts.append(_difference(item, baseline, *pair, same, keys))
    return _stacked(parts, ["relative_depth", "quantity"])


def trend_rows(items: Sequence[Item]) -> pd.DataFrame:
    """Compute how each layer moves over the checkpoints of a training.

    The slope is that of the least-squares line over the steps, sum_k w_k v_k with w_k = (s_k - s) / sum (s_k - s)^2:
    linear in the values, so each response has its own.

    Args:
        items: at least three analyses with the same number of layers at different steps.

    Returns:
        A row per layer, site and quantity: slope (per step) with stderr, low, high (95% interval); total_move from the
        first step to the last with its total_low and total_high; largest_move between successive checkpoints, and the
        steps from_step and to_step between which it lies; paired, n_checkpoints. The largest is selected after the
        fact, so that an interval for it would not be valid; it has none.
    """
    ordered = sorted(items, key=lambda item: item.step)
    steps = np.array([item.step for item in ordered])
    centred = steps - steps.mean()
    slopes, total = centred / (centred**2).sum(), np.zeros(len(steps))
    total[0], total[-1] = -1.0, 1.0
    groups = group_paired(ordered)
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
    """Locate the boundary layer and stages of each analysis, relative to the baseline's.

    Args:
        items: the analyses.
        baseline: one of them.
        aside: analyses of the same responses under another lens; those in the same directory are found automatically.

    Returns:
        A row per analysis: analysis (its number, from 1), label, step, n_layers, boundary_layer, relative_depth,
        confidence, runner_up, last_exploration, first_integration and first_convergence layer, the number of layers of
        each stage, move (in layers; empty if the numbers of layers differ) and depth_move (in relative depth);
        other_lenses, the boundary layers of the same responses under other lenses, such as "logit-lens: 1, unit-norm:
        none", empty if there is no other lens.
    """
    rows, origin = [], baseline.analysis
    for number, item in enumerate(items, start=1):
        others = find_other_lenses(item.analysis, aside)
        a, stages = with_other_lenses(item.analysis, others), item.analysis.stages
        layers = {s: [layer for layer, stage in enumerate(stages, start=1) if stage == s] for s in STAGES}
        mine, theirs = a.boundary_layer, origin.boundary_layer
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
                "other_lenses": ", ".join(f"{o.lens}: {_layer(o.boundary_layer)}" for o in others) or np.nan,
            }
        )
    ends = ("last_exploration", "first_integration", "first_convergence")
    whole = ("boundary_layer", "runner_up", *ends, "move")
    return pd.DataFrame(rows).astype(dict.fromkeys(whole, "Int64"))


def stage_rows(items: Sequence[Item], baseline: Item) -> pd.DataFrame:
    """Tabulate the stage of every layer and that of the baseline.

    Args:
        items: the analyses.
        baseline: one of them.

    Returns:
        A row per analysis and layer: label, step, layer, relative_depth, stage, baseline_stage, changed; the last two
        are empty if the numbers of layers differ.
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
    """Concatenate the parts; without any, return the columns without rows."""
    ends = ["value", "baseline_value", "difference", "stderr", "low", "high"]
    ends += ["paired", "same_vocabulary", "n_responses"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["label", "step", *keys, *ends])


def other_lenses_of(boundaries: pd.DataFrame) -> list[str]:
    """Name the other lenses under which the same responses were analysed."""
    return list(dict.fromkeys(lens for cell in boundaries["other_lenses"] for lens in _by_lens(cell)))


def under_other_lenses(row: dict[Hashable, Any], lenses: Sequence[str]) -> str:
    """Format the boundary layer under each of `lenses`: the layer, ``none``, or a dash if it was not measured."""
    layers = _by_lens(row["other_lenses"])
    return ", ".join(layers.get(lens, "-") for lens in lenses)


def _by_lens(cell: Any) -> dict[str, str]:
    """The boundary layer of each lens in a cell of the column other_lenses."""
    if pd.isna(cell):
        return {}
    return dict(part.rsplit(": ", 1) for part in str(cell).split(", "))


def _layer(layer: int | None) -> str:
    return "none" if layer is None else str(layer)


def differing_settings(analysis: Analysis, baseline: Analysis) -> dict[str, tuple[Any, Any]]:
    """Find settings that differ; those of the sampling matter only if both analyses sampled.

    Trained lenses of one name that differ are such a setting, since each model may have its own.

    Args:
        analysis: one analysis.
        baseline: the other.

    Returns:
        Values by name: (of the analysis, of the baseline).
    """
    a, b = analysis.config, baseline.config
    sampled = a.get("responses") is None and b.get("responses") is None
    names = (*(_SETTINGS if sampled else ()), "lens_digest")
    found = {n: (a.get(n), b.get(n)) for n in names if a.get(n) != b.get(n)}
    return found | {
        n: (analysis.model.get(n), baseline.model.get(n))
        for n in _MODEL
        if analysis.model.get(n) != baseline.model.get(n)
    }


def why_no_trends(items: Sequence[Item], steps_from: StepsFrom) -> str | None:
    """Return why there are no trends; None if there are some."""
    if len(items) < _MIN_TREND:
        return f"no trends: a trend needs at least {_MIN_TREND} checkpoints, and these are {len(items)} analyses"
    if differences := architecture_differences([item.analysis for item in items]):
        return f"no trends: not of one architecture ({'; '.join(differences)})"
    if steps_from == "order":
        lacking = [items[i].label for i in indices_without_step([item.analysis for item in items])]
        names = ", ".join(lacking[:_MOST_NAMES])
        if len(lacking) > _MOST_NAMES:
            names += f" and {len(lacking) - _MOST_NAMES} more"
        return f"no steps, so no trends: {names} {'has' if len(lacking) == 1 else 'have'} none in the name; give steps"
    if len({item.step for item in items}) < len(items):
        return "no trends: two analyses are of the same step"
    return None


def find_duplicates(items: Sequence[Item]) -> list[str]:
    """Return a sentence for each analysis that is in the comparison twice."""
    found = []
    for i, item in enumerate(items):
        if first := next((other for other in items[:i] if _same(other.analysis, item.analysis)), None):
            found.append(f"{first.label} and {item.label} are the same analysis")
    return found


def find_incomparable(items: Sequence[Item], baseline: Item, pairs: dict[str, bool]) -> list[str]:
    """Return sentences on what could not be compared with the baseline, and why."""
    notes = [_sampled_positions(item) for item in items if item.analysis.positions is not None]
    origin = baseline.analysis
    for item in items:
        a = item.analysis
        if not pairs[item.label]:
            notes.append(f"{item.label} is of other responses than {baseline.label}: unpaired")
        if a.n_layers != origin.n_layers:
            notes.append(
                f"{item.label} has {a.n_layers} layers and {baseline.label} {origin.n_layers}: no differences per "
                "layer, only by relative depth"
            )
        if a.vocab_size != origin.vocab_size:
            notes.append(
                f"{item.label} has {a.vocab_size} tokens and {baseline.label} {origin.vocab_size}: in nats a larger "
                "vocabulary has more entropy; entropy_share is in units of ln V"
            )
    return notes


def find_few_prompts(items: Sequence[Item]) -> list[str]:
    """Return a sentence for each number of prompts that is too small for the intervals."""
    labels: dict[int, list[str]] = {}
    for item in items:
        labels.setdefault(item.analysis.n_prompts, []).append(item.label)
    found = ((who, console.few_prompts(n)) for n, who in sorted(labels.items()))
    return [
        f"{'all analyses' if len(who) == len(items) else ', '.join(who)} {'has' if len(who) == 1 else 'have'} {few}"
        for who, few in found
        if few
    ]


def _sampled_positions(item: Item) -> str:
    found = item.analysis.positions or {}
    return (
        f"{item.label} was analysed at {found['analysed']} of {found['total']} positions (tolerance "
        f"{found['tolerance']:g}): its intervals hold that too, and single responses are estimates"
    )


def _same(one: Analysis, other: Analysis) -> bool:
    """Whether both are one object, one directory, or copies: an unchanged checkpoint would have another name."""
    if one is other:
        return True
    if one.path is not None and other.path is not None and one.path.resolve() == other.path.resolve():
        return True
    return (one.name, one.model, one.config) == (other.name, other.model, other.config) and one.layers.equals(
        other.layers
    )
