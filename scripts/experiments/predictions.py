"""What came of the predictions in PREDICTIONS.md, setting by setting."""

from __future__ import annotations

from typing import Any

import dose as e2
import layers as e4
import mechanism as e1
import numpy as np
import pandas as pd
from jobs import E1_LAYERS, E1_RATES, E2_DOSES, E2_RATES, MODELS
from tables import Tables, t_interval

YES, NO, UNDECIDED, NOT_RUN = "yes", "no", "undecided", "not run"
COLUMNS = ["prediction", "model", "layer", "rate", "dose", "quantity", "bound"]
COLUMNS += ["value", "low", "high", "seeds", "holds", "agrees"]
NAMES = ("P1", "P2", "P3", "P4", "P4c", "P5", "P5c", "P6", "P7", "P8", "P9", "P9e", "P10", "P11", "P12")
"""P1 to P12, and three readings that were added after the first runs: P4c and P5c are P4 and P5 less the control, P9e
asks for an interval within one point, because an interval that contains zero may only be wide."""
POINT = 0.01
"""One percentage point of accuracy."""

_DIGIT = 1e-5
"""Accuracies are stored to six digits; narrower than this, an interval is only their rounding."""
_LESS = ("less_layer", "less_layer_low", "less_layer_high")
_WITHOUT_RUNS = {"value": np.nan, "low": np.nan, "high": np.nan, "seeds": 0, "holds": NOT_RUN, "agrees": False}

_E1: dict[str, tuple[tuple[str, str, float], ...]] = {
    # Prediction: quantities of `mechanism.changes`, the side on which they are predicted to be, and of what.
    "P1": (("cosine_30", "above", 0.0),),
    "P2": (("kl_fall", "below", 0.0), ("kl_rise", "above", 0.05)),
    "P3": (("perplexity_60", "above", 0.0),),
    "P4": (("length", "above", 0.0),),
    "P4c": (("length_over_control", "above", 0.0),),
    "P5": (("reward_rise", "above", 0.0), ("reward_fall", "above", 0.1)),
    "P5c": (("rise_over_control", "above", 0.0), ("fall_over_control", "above", 0.1)),
}


def judged(found: dict[str, float], side: str, bound: float) -> str:
    """Say whether an interval lies on the predicted side of a bound.

    Args:
        found: value, low, high and seeds.
        side: above, below, around: the interval contains the bound, or within: it is nearer to zero than the bound.
        bound: of the prediction.

    Returns:
        yes; no, if it lies on the other side; undecided, if it contains the bound or has no ends; or not run.
    """
    if not found["seeds"]:
        return NOT_RUN
    low, high = found["low"], found["high"]
    if np.isnan(low) or np.isnan(high):
        return UNDECIDED
    if side == "around":
        if low <= bound <= high:
            return YES
        # Seeds that agree to the last digit stored have no spread to judge by.
        return NO if high - low > _DIGIT else UNDECIDED
    if side == "within":
        inside = -bound <= low and high <= bound
        return YES if inside else NO if low > bound or high < -bound else UNDECIDED
    if side == "below":
        low, high, bound = -high, -low, -bound
    if low > bound:
        return YES
    return NO if high < bound or low == high else UNDECIDED


def _row(name: str, quantity: str, side: str, bound: float, values: object, **setting: object) -> dict[str, object]:
    found = values if isinstance(values, dict) else t_interval(np.asarray(values, dtype=np.float64))
    holds = judged(found, side, bound)
    value = found["value"]
    sides = {"above": value > bound, "below": value < bound, "around": holds == YES, "within": abs(value) <= bound}
    row = {"prediction": name, **setting, "quantity": quantity, "bound": bound, **found}
    return {**row, "holds": holds, "agrees": sides[side]}


def of_e1(tables: Tables) -> list[dict[str, object]]:
    """P1 to P6.

    Args:
        tables: of E1.

    Returns:
        A row per setting and quantity.
    """
    changes, runs = e1.changes(tables), tables["runs"]
    rows = []
    for name, parts in _E1.items():
        for model in MODELS:
            for layer in E1_LAYERS:
                for rate in E1_RATES:
                    own = changes
                    if len(changes):
                        is_own = (changes["model"] == model) & (changes["layer"] == layer) & (changes["rate"] == rate)
                        own = changes[is_own]
                    rows += [
                        _row(
                            name, part, side, bound, own[part] if len(own) else [], model=model, layer=layer, rate=rate
                        )
                        for part, side, bound in parts
                    ]
    for model in MODELS:
        for rate in E1_RATES:
            own = runs[(runs["model"] == model) & (runs["rate"] == rate)]
            seeds = {layer: own[own["layer"] == layer].set_index("seed") for layer in (2, 7)}
            gap: Any = (seeds[7]["avg"] - seeds[2]["avg"]).dropna() if len(own) else []
            rows.append(_row("P6", "avg of layer 7 less layer 2", "above", 0.0, gap, model=model, rate=rate))
    return rows


def of_e2(tables: Tables) -> list[dict[str, object]]:
    """P7 to P10.

    Args:
        tables: of E2.

    Returns:
        A row per setting and quantity.
    """
    paired = e2.paired(tables)
    by = ["model", "rate", "dose", "measure", "comparison"]
    values = {key: group["value"].to_numpy() for key, group in paired.groupby(by)}

    def of(model: str, rate: float, dose: int, measure: str, comparison: str) -> object:
        return values.get((model, rate, str(dose), measure, comparison), [])

    rows = []
    settings = [(model, rate, dose) for model in MODELS for rate in E2_RATES for dose in E2_DOSES]
    for model, rate, dose in settings:
        setting = {"model": model, "rate": rate, "dose": dose}
        rows.append(_row("P7", f"avg, {e2.TOTAL}", "below", POINT, of(model, rate, dose, "avg", e2.TOTAL), **setting))
        if dose >= 12:
            found = of(model, rate, dose, "avg", e2.OPTIMISED)
            rows.append(_row("P8", f"avg, {e2.OPTIMISED}", "above", 0.0, found, **setting))
        rows += [
            _row(name, f"pass16, {kind}", side, bound, of(model, rate, dose, "pass16", kind), **setting)
            for name, side, bound in (("P9", "around", 0.0), ("P9e", "within", POINT))
            for kind in (e2.TOTAL, e2.OPTIMISED)
        ]
    rows += [_least_cost(paired, model) for model in MODELS]
    return rows


def _least_cost(paired: pd.DataFrame, model: str) -> dict[str, object]:
    """P10: the fixed dose whose mean is highest at the higher rate; its interval holds those that may be as good."""
    rate = max(E2_RATES)
    own = paired[(paired["model"] == model) & (paired["rate"] == rate) & (paired["measure"] == "avg")]
    own = own[(own["comparison"] == e2.TOTAL) & (own["dose"] != e2.AUTO)]
    row: dict[str, object] = {"prediction": "P10", "model": model, "rate": rate, "bound": 12}
    row["quantity"] = "dose that costs least"
    grid = own.pivot_table(index="seed", columns="dose", values="value")
    grid = grid.reindex(columns=[str(dose) for dose in E2_DOSES]).dropna()
    if grid.empty:
        return {**row, **_WITHOUT_RUNS}
    best = str(grid.mean().idxmax())
    level = [int(d) for d in map(str, grid) if d == best or not t_interval(grid[best] - grid[d])["low"] > 0]
    row |= {"value": int(best), "low": min(level), "high": max(level), "seeds": len(grid)}
    holds = YES if max(level) <= 12 else NO if min(level) > 12 else UNDECIDED
    return {**row, "holds": holds, "agrees": int(best) <= 12}


def of_e4(tables: Tables, evidence: pd.DataFrame) -> list[dict[str, object]]:
    """P11 and P12; the intervals are t-intervals over the correlations of the seeds, from three seeds on.

    Args:
        tables: of E4 joined with those of E2.
        evidence: of `layers.measure`.

    Returns:
        A row per model and prediction.
    """
    found = e4.correlations(tables, evidence)
    found = found[found["outcome"] == e4.END]
    rows = []
    for name, predictor, columns, quantity, bound in (
        ("P11", "layer", ("value", "low", "high"), "Spearman of layer and avg, mean over seeds", 0.5),
        ("P12", "change", _LESS, "its size for dH_FFN less that for layer", 0.0),
    ):
        for model in MODELS:
            own = found[(found["model"] == model) & (found["predictor"] == predictor)]
            row: dict[str, object] = {"prediction": name, "model": model, "quantity": quantity, "bound": bound}
            if own.empty:
                rows.append({**row, **_WITHOUT_RUNS})
                continue
            value, low, high = (float(own[column].iloc[0]) for column in columns)
            interval = {"value": value, "low": low, "high": high, "seeds": int(own["seeds"].iloc[0])}
            if name == "P11":
                holds, agrees = judged(interval, "above", bound), float(own["of_means"].iloc[0]) > bound
            else:
                # A size that equals that of the layer's number is no better.
                holds, agrees = YES if high <= bound else judged(interval, "below", bound), value <= bound
            rows.append({**row, **interval, "holds": holds, "agrees": agrees})
    return rows


def predictions(mechanism: Tables, dose: Tables, every_layer: Tables, evidence: pd.DataFrame) -> pd.DataFrame:
    """Judge all predictions.

    Args:
        mechanism: tables of E1.
        dose: of E2.
        every_layer: of E4 joined with those of E2.
        evidence: of `layers.measure`.

    Returns:
        ``COLUMNS``; several rows for a setting whose prediction has several parts. ``agrees`` says whether the value is
        on the predicted side, whatever the interval; where an interval has to contain the bound, whether it does.
    """
    rows = [*of_e1(mechanism), *of_e2(dose), *of_e4(every_layer, evidence)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.sort_values("prediction", key=lambda names: names.map(NAMES.index), kind="stable", ignore_index=True)


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """Count the settings in which each prediction holds.

    Args:
        table: of `predictions`.

    Returns:
        A row per prediction: settings; yes, no, undecided and not run, numbers of settings; agrees, the number of those
        whose values agree, whatever the interval; seeds, the smallest and the largest number of those run, as text. A
        setting holds if all its parts do, and fails if one of them does.
    """
    rows = []
    for name, own in table.groupby("prediction", sort=False):
        setting = own.groupby(["model", "layer", "rate", "dose"], dropna=False, sort=False)["holds"]
        verdicts = setting.agg(_together)
        agree = own.groupby(["model", "layer", "rate", "dose"], dropna=False, sort=False)["agrees"].all()
        seeds = own.loc[own["seeds"] > 0, "seeds"]
        span = "" if seeds.empty else f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()}-{seeds.max()}"
        numbers = {verdict: int((verdicts == verdict).sum()) for verdict in (YES, NO, UNDECIDED, NOT_RUN)}
        agrees = int((agree & (verdicts != NOT_RUN)).sum())
        rows.append({"prediction": name, "settings": len(verdicts), **numbers, "agrees": agrees, "seeds": span})
    return pd.DataFrame(rows)


def _together(parts: pd.Series) -> str:
    found = set(parts)
    for verdict in (NOT_RUN, NO, UNDECIDED):
        if verdict in found:
            return verdict
    return YES
