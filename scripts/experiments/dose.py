"""E2: BuPO at each dose of alignment against GRPO, at equal total steps and at equal steps of GRPO."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jobs import BOUNDARY, E2_STEPS, LEARNING_RATE
from scipy import optimize, stats
from tables import Tables, over_seeds, t_interval

MEASURES = ("avg", "pass16")
TOTAL, OPTIMISED = "equal total steps", "equal GRPO steps"
"""GRPO after as many steps as BuPO in all, or after as many as BuPO has of GRPO."""
AUTO = "auto"
BY = ["model", "rate", "dose"]


def measured(tables: Tables) -> pd.DataFrame:
    """Every run of GRPO and of BuPO at the boundary layer, with what was measured at its end.

    Args:
        tables: of E2.

    Returns:
        Rows of ``runs``, with dose: the alignment steps as text, "0" for GRPO.
    """
    runs = tables["runs"]
    if runs.empty:
        return runs.assign(dose=[])
    own = (runs["method"] == "grpo") | (runs["layer"] == runs["model"].map(BOUNDARY))
    dose = runs["ipa_steps"].where(runs["method"] == "bupo", "0")
    return runs.assign(dose=dose)[own & runs["method"].isin(["grpo", "bupo"]) & (runs["steps"] == E2_STEPS)]


def doses(tables: Tables) -> pd.DataFrame:
    """What each dose ends with.

    Args:
        tables: of E2.

    Returns:
        A row per model, rate, dose and measure (avg, pass16, truncated, entropy_end, length): value, low, high, seeds.
        GRPO has dose "0"; its rate is that of all runs.
    """
    runs = measured(tables)
    found = [
        over_seeds(runs, BY, name).assign(measure=name)
        for name in (*MEASURES, "truncated", "entropy_end", "length")
        if len(runs)
    ]
    columns = [*BY, "measure", "value", "low", "high", "seeds"]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def paired(tables: Tables) -> pd.DataFrame:
    """BuPO minus GRPO with the same model and seed.

    Args:
        tables: of E2.

    Returns:
        A row per run of BuPO, measure and comparison: model, rate, dose, seed, measure, comparison, value. For a dose
        that the rule chose, GRPO was measured only at equal total steps.
    """
    runs, curves = measured(tables), tables["curves"]
    columns = [*BY, "seed", "measure", "comparison", "value"]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    # Only measurements with all samples: one with two has another error, and no Pass@16.
    whole = curves[(curves["method"] == "grpo") & curves["pass16"].notna()]
    plain = whole.set_index(["model", "seed", "step"])
    rows = []
    for run in runs[runs["method"] == "bupo"].to_dict("records"):
        after = {TOTAL: E2_STEPS}
        if run["dose"] != AUTO:
            after[OPTIMISED] = E2_STEPS - int(run["dose"])
        for comparison, step in after.items():
            place = (run["model"], run["seed"], step)
            if place not in plain.index:
                continue
            rows += [
                {
                    **{name: run[name] for name in (*BY, "seed")},
                    "measure": measure,
                    "comparison": comparison,
                    "value": run[measure] - float(plain.loc[place, measure]),
                }
                for measure in MEASURES
            ]
    return pd.DataFrame(rows, columns=columns)


def differences(tables: Tables) -> pd.DataFrame:
    """BuPO minus GRPO, over seeds.

    Args:
        tables: of E2.

    Returns:
        A row per model, rate, dose, measure and comparison: value, low, high, seeds.
    """
    return over_seeds(paired(tables), [*BY, "measure", "comparison"])


def curves(tables: Tables) -> pd.DataFrame:
    """Held-out Avg@1 along the runs.

    Args:
        tables: of E2.

    Returns:
        A row per model, rate, dose and step: value, low, high, seeds.
    """
    found = tables["curves"]
    if found.empty:
        return over_seeds(found, [*BY, "step"])
    dose = found["ipa_steps"].where(found["method"] == "bupo", "0")
    return over_seeds(found.assign(dose=dose), [*BY, "step"], "avg")


def along(tables: Tables) -> pd.DataFrame:
    """BuPO minus GRPO in held-out Avg@1 along the runs, paired by seed.

    Args:
        tables: of E2.

    Returns:
        A row per model, rate, dose, comparison and step (text): value, low, high, seeds. It is GRPO's, so that at
        equal GRPO steps a run of BuPO has its dose more; there, doses are missing whose steps were not measured. Step
        "mean" is the mean over all measured steps but the start: the area between two curves.
    """
    found = tables["curves"]
    columns = [*BY, "comparison", "step", "value", "low", "high", "seeds"]
    aligned = found[(found["method"] == "bupo") & (found["layer"] == found["model"].map(BOUNDARY))]
    if aligned.empty:
        return pd.DataFrame(columns=columns)
    plain = found.loc[found["method"] == "grpo", ["model", "seed", "step", "avg"]]
    aligned = aligned.rename(columns={"ipa_steps": "dose"})
    parts = []
    for comparison in (TOTAL, OPTIMISED):
        own = aligned.assign(comparison=comparison)
        if comparison == OPTIMISED:
            own = own[own["dose"] != AUTO]
            own = own.assign(step=own["step"] - own["dose"].astype(int))
        own = own[own["step"] > 0].merge(plain, on=["model", "seed", "step"], suffixes=("", "_grpo"))
        own = own.assign(value=own["avg"] - own["avg_grpo"])
        # The last step is measured in every run; only where others are too is there a curve.
        steps = own.groupby([*BY, "seed"])["step"].transform("nunique")
        parts.append(own[steps > 1])
    every = pd.concat(parts, ignore_index=True).astype({"step": int}).astype({"step": str})
    by = [*BY, "comparison"]
    means = every.groupby([*by, "seed"], sort=False)["value"].mean().reset_index().assign(step="mean")
    return over_seeds(pd.concat([every, means], ignore_index=True), [*by, "step"])[columns]


def auto(tables: Tables) -> pd.DataFrame:
    """What the rule of ``ipa_steps="auto"`` did.

    Args:
        tables: of E2.

    Returns:
        A row per model and rate with such runs: stops, the steps at which it ended the alignment, in order; and the
        differences in Avg@1, paired by seed, of these runs from GRPO and from the fixed dose with the highest mean
        (best): over_grpo and over_best, each with ``_low`` and ``_high``; seeds.
    """
    runs = measured(tables)
    rows = []
    chosen = runs[runs["dose"] == AUTO]
    for (model, rate), group in chosen.groupby(["model", "rate"], sort=False):
        same = runs[(runs["model"] == model) & runs["seed"].isin(group["seed"])]
        by_seed = group.set_index("seed")["avg"]
        fixed = same[(same["method"] == "bupo") & (same["rate"] == rate) & (same["dose"] != AUTO)]
        plain = same[same["method"] == "grpo"].set_index("seed")["avg"]
        row = {"model": model, "rate": rate, "stops": " ".join(str(x) for x in sorted(group["alignment_steps"]))}
        row |= _named("over_grpo", by_seed - plain)
        best = fixed.groupby("dose")["avg"].mean().idxmax() if len(fixed) else ""
        row["best"] = best
        row |= _named("over_best", by_seed - fixed[fixed["dose"] == best].set_index("seed")["avg"])
        rows.append({**row, "seeds": len(group)})
    ends = [f"{name}{end}" for name in ("over_grpo", "over_best") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["model", "rate", "stops", "best", *ends, "seeds"])


def _named(name: str, values: pd.Series) -> dict[str, float]:
    found = t_interval(values)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def power(tables: Tables, seeds: int = 6, dose: str = "12") -> pd.DataFrame:
    """What difference a number of seeds would detect, given the spread of paired differences over seeds.

    Args:
        tables: of E2.
        seeds: of the planned comparison.
        dose: whose spread is taken; a tenth of the steps, as in E3.

    Returns:
        A row per model, rate and measure: spread, the standard deviation of BuPO minus GRPO over the seeds measured;
        detectable, the true difference that a two-sided paired t-test at 5% finds in four of five cases; seeds.
    """
    found = paired(tables)
    found = found[(found["dose"] == dose) & (found["comparison"] == TOTAL)]
    rows = []
    for (model, rate, measure), group in found.groupby(["model", "rate", "measure"], sort=False):
        spread = float(group["value"].std(ddof=1))
        rows.append(
            {
                **{"model": model, "rate": rate, "measure": measure, "spread": spread},
                "detectable": spread * detectable(seeds) if len(group) > 1 else np.nan,
                "seeds": len(group),
            }
        )
    return pd.DataFrame(rows, columns=["model", "rate", "measure", "spread", "detectable", "seeds"])


def detectable(n: int, wanted: float = 0.8, level: float = 0.05) -> float:
    """The true mean, in standard deviations, that a two-sided one-sample t-test detects with a given probability.

    Args:
        n: observations.
        wanted: probability of detection.
        level: of the test.

    Returns:
        Mean over standard deviation, by the noncentral t distribution.
    """
    bound = stats.t.ppf(1 - level / 2, n - 1)

    def missing(effect: float) -> float:
        shift = effect * np.sqrt(n)
        found = stats.nct.sf(bound, n - 1, shift) + np.nan_to_num(stats.nct.cdf(-bound, n - 1, shift))
        return float(found) - wanted

    return float(optimize.brentq(missing, 1e-3, 20.0))


def methods(tables: Tables) -> pd.DataFrame:
    """PPO, RLOO and REINFORCE++ beside GRPO with the same seeds.

    Args:
        tables: of the part methods joined with those of E2.

    Returns:
        A row per model, method and measure (avg, pass16, truncated, entropy_end, seconds): value, low, high, seeds;
        difference from GRPO paired by seed with its ends (NaN for GRPO).
    """
    runs = tables["runs"]
    columns = ["model", "method", "measure", "value", "low", "high", "seeds", "over_grpo", "over_grpo_low"]
    columns.append("over_grpo_high")
    if runs.empty:
        return pd.DataFrame(columns=columns)
    others = runs[~runs["method"].isin(["grpo", "bupo"])]
    plain = runs[(runs["method"] == "grpo") & (runs["rate"] == LEARNING_RATE)]
    rows = []
    for model in BOUNDARY:
        seeds = set(others.loc[others["model"] == model, "seed"])
        both = pd.concat([plain[(plain["model"] == model) & plain["seed"].isin(seeds)], others], ignore_index=True)
        both = both[both["model"] == model]
        for method, group in both.groupby("method", sort=False):
            own = group.set_index("seed")
            base = both[both["method"] == "grpo"].set_index("seed")
            for measure in (*MEASURES, "truncated", "entropy_end", "seconds"):
                against = own[measure] - base[measure] if method != "grpo" else pd.Series(dtype=float)
                row = {"model": model, "method": method, "measure": measure, **t_interval(own[measure])}
                rows.append({**row, **_named("over_grpo", against)})
    return pd.DataFrame(rows, columns=columns)
