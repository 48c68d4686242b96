"""E2: BuPO at each dose of alignment against GRPO, at equal total steps and at equal steps of GRPO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jobs import BOUNDARY, E2_STEPS, LEARNING_RATE
from scipy import optimize, stats
from tables import Tables, over_seeds, t_interval

from internal_policy.plotting.training import MIN_SEEDS

MEASURES = ("avg", "pass16")
TOTAL, OPTIMISED = "equal total steps", "equal GRPO steps"
"""GRPO after as many steps as BuPO in all, or after as many as BuPO has of GRPO."""
AUTO = "auto"
AREA_EVERY = 24
"""Steps between two points of a curve that every run has."""
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


def paired_along(tables: Tables) -> pd.DataFrame:
    """BuPO minus GRPO in held-out Avg@1 along the runs, with the same model and seed.

    Args:
        tables: of E2.

    Returns:
        A row per model, rate, dose, comparison, seed and step: value. The step is GRPO's, so that at equal GRPO steps
        a run of BuPO has its dose more; there, doses are missing whose steps were not measured.
    """
    found = tables["curves"]
    bupo = found[(found["method"] == "bupo") & (found["layer"] == found["model"].map(BOUNDARY))]
    against = curves_over_grpo(bupo, found).rename(columns={"ipa_steps": "dose"})
    return against.reindex(columns=[*BY, "comparison", "seed", "step", "value"])


def curves_over_grpo(bupo: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Subtract the curve of GRPO with the same model and seed.

    Args:
        bupo: rows of ``curves``, of runs of BuPO.
        curves: those of GRPO, among others.

    Returns:
        ``bupo`` twice, without step 0, each row with comparison and value, the difference in Avg@1. The step is GRPO's,
        so that at equal GRPO steps a run of BuPO has its dose more.
    """
    if bupo.empty:
        return bupo.assign(comparison="", value=0.0)
    fixed = bupo[bupo["ipa_steps"] != AUTO]
    shifted = fixed.assign(step=fixed["step"] - fixed["ipa_steps"].astype(int), comparison=OPTIMISED)
    own = pd.concat([bupo.assign(comparison=TOTAL), shifted], ignore_index=True)
    plain = curves.loc[curves["method"] == "grpo", ["model", "seed", "step", "avg"]]
    own = own[own["step"] > 0].merge(plain, on=["model", "seed", "step"], suffixes=("", "_grpo"))
    return own.assign(value=own["avg"] - own["avg_grpo"]).astype({"step": int})


def means_along(every: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Average differences along each run over the steps that ``AREA_EVERY`` divides: the area between two curves.

    Args:
        every: of `curves_over_grpo`.
        by: columns that name a setting; the seed is added.

    Returns:
        A row per setting and seed with all such steps of its setting, if they are more than one: ``by``, seed, value.
    """
    spaced = every[every["step"] % AREA_EVERY == 0]
    means = spaced.groupby([*by, "seed"], sort=False)["value"].agg(["mean", "size"]).reset_index()
    # A mean over fewer steps than that of another seed would be one of another quantity.
    whole = means["size"] == means.groupby(list(by))["size"].transform("max")
    return means[whole & (means["size"] > 1)].rename(columns={"mean": "value"}).drop(columns="size")


def along(tables: Tables) -> pd.DataFrame:
    """BuPO minus GRPO in held-out Avg@1 along the runs, over seeds.

    Args:
        tables: of E2.

    Returns:
        A row per model, rate, dose, comparison and step (text): value, low, high, seeds. Step "mean" is the mean over
        the steps that ``AREA_EVERY`` divides: the area between two curves. The last step is measured in every run, and
        is left out where no other is.
    """
    every = paired_along(tables)
    by = [*BY, "comparison"]
    if every.empty:
        return over_seeds(every, [*by, "step"])
    means = means_along(every, by).assign(step="mean")
    curves_there = every.groupby([*by, "seed"])["step"].transform("nunique") > 1
    shown = every[curves_there].astype({"step": str})
    return over_seeds(pd.concat([shown, means[shown.columns]], ignore_index=True), [*by, "step"])


def auto(tables: Tables) -> pd.DataFrame:
    """What the rule of ``ipa_steps="auto"`` did.

    Args:
        tables: of E2.

    Returns:
        A row per model and rate with such runs: stops, the steps at which it ended the alignment, in order; and the
        differences in Avg@1, paired by seed, of these runs from GRPO and from the fixed dose with the highest mean
        (best): over_grpo and over_best, each with ``_low`` and ``_high``; seeds, the number of pairs with GRPO.
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
        rows.append({**row, "seeds": int((by_seed - plain).notna().sum())})
    ends = [f"{name}{end}" for name in ("over_grpo", "over_best") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["model", "rate", "stops", "best", *ends, "seeds"])


def _named(name: str, values: pd.Series) -> dict[str, float]:
    found = t_interval(values)
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def _with_means(tables: Tables) -> pd.DataFrame:
    """The runs with along and explained, means over their steps; NaN where nothing was measured."""
    runs, curves, histories = tables["runs"], tables["curves"], tables["histories"]
    if runs.empty:
        return runs
    spaced = curves[(curves["step"] > 0) & (curves["step"] % AREA_EVERY == 0)]
    late = histories[histories["step"] > E2_STEPS // 2].reindex(columns=["run", "explained_variance"])
    along = runs["run"].map(spaced.groupby("run")["avg"].mean())
    return runs.assign(along=along, explained=runs["run"].map(late.groupby("run")["explained_variance"].mean()))


def power(tables: Tables, seeds: int = 6, dose: str = "12") -> pd.DataFrame:
    """What difference a number of seeds would detect, given the spread of paired differences over seeds.

    Args:
        tables: of E2.
        seeds: of the planned comparison.
        dose: whose spread is taken; a tenth of the steps, as in E3.

    Returns:
        A row per model, rate and measure (avg and pass16 at the end; "avg, step 24", where accuracy is still far from
        its ceiling): spread, the standard deviation of BuPO minus GRPO over the seeds measured, with the ends of its
        95% interval by the chi-square distribution; detectable, the true difference that a two-sided paired t-test at
        5% finds in four of five cases; seeds. Only with ``MIN_SEEDS`` or more.
    """
    early = paired_along(tables)
    early = early[early["step"] == AREA_EVERY].assign(measure=f"avg, step {AREA_EVERY}")
    found = pd.concat([paired(tables), early], ignore_index=True)
    found = found[(found["dose"] == dose) & (found["comparison"] == TOTAL)]
    rows = []
    for (model, rate, measure), group in found.groupby(["model", "rate", "measure"], sort=False):
        n = len(group)
        if n < MIN_SEEDS:
            continue
        spread = float(group["value"].std(ddof=1))
        high, low = np.sqrt((n - 1) / stats.chi2.ppf([0.025, 0.975], n - 1))
        row = {"model": model, "rate": rate, "measure": measure, "spread": spread}
        row |= {"spread_low": low * spread, "spread_high": high * spread}
        rows.append({**row, "detectable": spread * detectable(seeds), "seeds": n})
    columns = ["model", "rate", "measure", "spread", "spread_low", "spread_high", "detectable", "seeds"]
    return pd.DataFrame(rows, columns=columns)


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
        A row per model, method and measure (avg, pass16, truncated, entropy_end, seconds; along, the mean of Avg@1 over
        the steps that ``AREA_EVERY`` divides; explained, the critic's explained variance in the second half of the
        run): value, low, high, seeds; over_grpo, the difference from GRPO paired by seed, with its ends and seeds (NaN
        and 0 for GRPO).
    """
    runs = _with_means(tables)
    columns = ["model", "method", "measure", "value", "low", "high", "seeds", "over_grpo", "over_grpo_low"]
    columns += ["over_grpo_high", "over_grpo_seeds"]
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
            for measure in (*MEASURES, "along", "truncated", "entropy_end", "seconds", "explained"):
                against = own[measure] - base[measure] if method != "grpo" else pd.Series(dtype=float)
                row = {"model": model, "method": method, "measure": measure, **t_interval(own[measure])}
                rows.append({**row, **_named("over_grpo", against), "over_grpo_seeds": int(against.notna().sum())})
    return pd.DataFrame(rows, columns=columns)
