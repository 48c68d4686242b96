"""E1: what alignment alone does to a model, over its steps (arXiv 2512.19673v3, figs. 4 and 5)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from jobs import CONTROL_RATE, E1_LAYERS, E1_STEPS
from tables import Tables, over_seeds

from internal_policy.bupo.dynamics import alignment_end

BY = ["model", "layer", "rate"]
WINDOW = 10
"""Steps over which a reward is averaged: a step has 64 responses, so that its standard error is about 0.06."""
FALL = 0.1
"""The reward has begun to fall where its mean over ``WINDOW`` steps is this far below the highest, as in P5."""
UPPER, LOSS = 6, 0.02
"""The first of the upper layers, and a change of accuracy beyond what the measurement of the start may be off by."""
OVER_CONTROL = ("reward", "length")
"""Quantities that the prompts of a step decide; those of the control, which has the same prompts, are subtracted."""

_DYNAMICS = {"log_perplexity": "log_perplexity_start", "change": "change"}
_PERPLEXITIES = ("log_perplexity_solutions", "log_perplexity_own", "own_length")
_HISTORY = ("reward", "policy_entropy", "length", "truncated")


def aligned(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the runs that align: neither GRPO nor the control, which changes no weight."""
    return table[(table["method"] == "bupo") & (table["rate"] != CONTROL_RATE)]


def quantities(tables: Tables) -> pd.DataFrame:
    """Collect everything that was followed along the runs that align.

    Args:
        tables: of E1.

    Returns:
        A row per run, step and quantity: run, model, layer, rate, seed, step, quantity, value. ``cosine`` and ``kl``
        are means over the later layers; log-perplexities are in nats per token, on the start's responses, on right
        solutions and on the model's own new samples; reward, policy_entropy, length and truncated are of the step's
        rollouts. ``reward_over_control`` and ``length_over_control`` are less those of the control with the same
        prompts, and missing where it was not run.
    """
    keys = ["run", *BY, "seed", "step"]
    parts = []
    layers = aligned(tables["dynamics_layers"])
    if len(layers):
        means = layers.groupby(keys, sort=False)[["cosine", "kl"]].mean().reset_index()
        parts.append(means)
    for name, columns in (("dynamics", tuple(_DYNAMICS)), ("perplexities", _PERPLEXITIES), ("histories", _HISTORY)):
        table = aligned(tables[name])
        if len(table):
            parts.append(table[[*keys, *(c for c in columns if c in table)]].rename(columns=_DYNAMICS))
    if not parts:
        return pd.DataFrame(columns=[*keys, "quantity", "value"])
    long = [part.melt(keys, var_name="quantity") for part in [*parts, _over_control(tables["histories"], keys)]]
    return pd.concat(long, ignore_index=True)


def _over_control(histories: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    control = histories.loc[histories["rate"] == CONTROL_RATE, ["model", "seed", "step", *OVER_CONTROL]]
    both = aligned(histories).merge(control, on=["model", "seed", "step"], suffixes=("", "_control"))
    less = {f"{name}_over_control": both[name] - both[f"{name}_control"] for name in OVER_CONTROL}
    return both[keys].assign(**less)


def outcomes(tables: Tables) -> pd.DataFrame:
    """Held-out accuracy before and after the alignment, and after as many steps of GRPO.

    Args:
        tables: of E1.

    Returns:
        A row per method (bupo, grpo), model, layer, rate and measure (avg, pass16): start, value after all steps, gain
        with low and high over seeds, seeds; over_grpo, the difference from GRPO after as many steps, paired by seed,
        with its ends and seeds (NaN for GRPO, which has no layer). All runs of a model share the measurement of its
        start.
    """
    runs = tables["runs"]
    by = ["method", *BY]
    found = []
    for measure in ("avg", "pass16"):
        if runs.empty:
            continue
        trained = pd.concat([aligned(runs), runs[runs["method"] == "grpo"]], ignore_index=True)
        gains = trained.assign(gain=trained[measure] - trained[f"{measure}_start"], start=trained[f"{measure}_start"])
        table = over_seeds(gains, by, "gain").rename(columns={"value": "gain"})
        means = gains.groupby(by, sort=False, dropna=False)[["start", measure]].mean().reset_index()
        table = table.merge(means.rename(columns={measure: "value"}), on=by)
        plain = runs.loc[runs["method"] == "grpo", ["model", "seed", measure]]
        against = aligned(runs).merge(plain, on=["model", "seed"], suffixes=("", "_grpo"))
        against = over_seeds(against.assign(over=against[measure] - against[f"{measure}_grpo"]), by, "over")
        names = {"value": "over_grpo", **{end: f"over_grpo_{end}" for end in ("low", "high", "seeds")}}
        found.append(table.merge(against.rename(columns=names), on=by, how="left").assign(measure=measure))
    over = ["over_grpo", "over_grpo_low", "over_grpo_high", "over_grpo_seeds"]
    columns = [*by, "measure", "start", "value", "gain", "low", "high", "seeds", *over]
    return pd.concat(found, ignore_index=True)[columns] if found else pd.DataFrame(columns=columns)


def means_of_layers(tables: Tables) -> pd.DataFrame:
    """Gain in held-out Avg@1, the mean over the layers, which decides more than a layer by itself.

    Args:
        tables: of E1.

    Returns:
        A row per model and rate: value, low, high, seeds; of seeds that aligned every layer.
    """
    runs = aligned(tables["runs"])
    by = ["model", "rate", "seed"]
    if runs.empty:
        return over_seeds(runs, by[:2])
    gains = runs.assign(value=runs["avg"] - runs["avg_start"]).groupby(by, sort=False)["value"].agg(["mean", "size"])
    whole = gains[gains["size"] == len(E1_LAYERS)].rename(columns={"mean": "value"}).reset_index()
    return over_seeds(whole, by[:2])


def changes(tables: Tables) -> pd.DataFrame:
    """The numbers that the predictions on E1 are about, of each run.

    Args:
        tables: of E1.

    Returns:
        A row per run: model, layer, rate, seed, and
        cosine_30, cosine at step 30 less that of the start; kl_fall, lowest KL after the start less that of the start;
        kl_rise, last KL over the lowest of all, less 1; perplexity_60, log-perplexity on the start's responses less
        that of the start; length, mean of the last ten steps less that of the first ten; reward_rise, best mean of ten
        steps less that of the first ten; reward_fall, best mean of ten steps less that of the last ten.
        Less the control (NaN where it was not run): length_over_control, mean of the last ten steps; rise_over_control,
        best mean of ten steps; fall_over_control, that less the mean of the last ten.
        Beside the predictions, and each at the end less the start: solutions_60 and own_60, log-perplexities on right
        solutions and on own samples, and own_length, the length of samples for the same problems.
    """
    rows = []
    long = quantities(tables)
    for key, group in long.groupby(["run", *BY, "seed"], sort=False):
        series = {str(name): g.set_index("step")["value"].sort_index() for name, g in group.groupby("quantity")}
        kl, cosine, perplexity = series["kl"], series["cosine"], series["log_perplexity_start"]
        length, smooth = series["length"], _windows(series["reward"])
        over = {"length_over_control": np.nan, "rise_over_control": np.nan, "fall_over_control": np.nan}
        if "reward_over_control" in series:
            gained = _windows(series["reward_over_control"])
            over["length_over_control"] = series["length_over_control"].iloc[-WINDOW:].mean()
            over |= {"rise_over_control": gained.max(), "fall_over_control": gained.max() - gained.iloc[-1]}
        rows.append(
            {
                **dict(zip(["run", *BY, "seed"], key, strict=True)),
                "cosine_30": cosine.loc[E1_STEPS // 2] - cosine.loc[0],
                "kl_fall": kl.loc[1:].min() - kl.loc[0],
                "kl_rise": kl.iloc[-1] / kl.min() - 1,
                "perplexity_60": perplexity.iloc[-1] - perplexity.loc[0],
                "length": length.iloc[-WINDOW:].mean() - length.iloc[:WINDOW].mean(),
                "reward_rise": smooth.max() - smooth.iloc[0],
                "reward_fall": smooth.max() - smooth.iloc[-1],
                **over,
                "solutions_60": _gain(series["log_perplexity_solutions"]),
                "own_60": _gain(series["log_perplexity_own"]),
                "own_length": _gain(series["own_length"]),
            }
        )
    return pd.DataFrame(rows)


def _windows(series: pd.Series) -> pd.Series:
    """Means of ``WINDOW`` steps, by their last step."""
    return series.rolling(WINDOW).mean().dropna()


def _gain(series: pd.Series) -> float:
    return float(series.iloc[-1] - series.iloc[0])


def rule(tables: Tables) -> pd.DataFrame:
    """Where ``ipa_steps="auto"`` would have ended the alignment, and where the reward was highest and began to fall.

    Args:
        tables: of E1, whose dynamics were measured every three steps.

    Returns:
        A row per run: model, layer, rate, seed; stop, the step at which the rule ends the alignment, and sign, which of
        its two signs did (perplexity or KL; NaN and "" if it never does); peak, the middle of the ten steps of highest
        mean reward, less the control's where that was run; fall, the middle of the first later ten whose mean is at
        least ``FALL`` below (NaN if none is); late, stop less peak, in steps, where a rule that never stops counts as
        the last step.
    """
    rows = []
    long = quantities(tables)
    rewards = {
        name: long[long["quantity"] == name].set_index(["run", "step"])["value"].sort_index()
        for name in ("reward", "reward_over_control")
    }
    for key, group in aligned(tables["dynamics"]).groupby(["run", *BY, "seed"], sort=False):
        measured = group.sort_values("step").to_dict("records")
        stop, sign = np.nan, ""
        for end in range(2, len(measured) + 1):
            reason = alignment_end([{str(k): v for k, v in row.items()} for row in measured[:end]])
            if reason is not None:
                stop, sign = measured[end - 1]["step"], "perplexity" if "perplexity" in reason else "KL"
                break
        run = str(key[0])
        compared = run in rewards["reward_over_control"].index.get_level_values("run")
        reward = rewards["reward_over_control" if compared else "reward"].loc[run]
        smooth = _windows(reward)
        middle = smooth.index.to_numpy() - (WINDOW - 1) / 2
        best = int(smooth.to_numpy().argmax())
        below = np.flatnonzero(smooth.to_numpy()[best:] <= smooth.iloc[best] - FALL)
        last = reward.index.max()
        rows.append(
            {
                **dict(zip(["run", *BY, "seed"], key, strict=True)),
                "stop": stop,
                "sign": sign,
                "peak": middle[best],
                "fall": middle[best + below[0]] if len(below) else np.nan,
                "late": (last if np.isnan(stop) else stop) - middle[best],
            }
        )
    return pd.DataFrame(rows)


def rule_counts(tables: Tables) -> pd.DataFrame:
    """Count what the rule would have done in runs that lost accuracy and in the others.

    Args:
        tables: of E1.

    Returns:
        A row per rate and layers (lower, upper: below and from ``UPPER`` on): runs; stopped, those that the rule would
        have ended; lost, those that end more than ``LOSS`` below the start on held-out problems, and of these in_time,
        which the rule would have ended before the reward began to fall; gained, those that end as much above it, and of
        these early, which it would have ended before the highest reward.
    """
    found = rule(tables)
    columns = ["rate", "layers", "runs", "stopped", "lost", "in_time", "gained", "early"]
    if found.empty:
        return pd.DataFrame(columns=columns)
    runs = tables["runs"].set_index("run")
    gain = found["run"].map(runs["avg"] - runs["avg_start"])
    stopped = found["stop"].notna()
    lost, gained = gain < -LOSS, gain > LOSS
    counted = found.assign(
        layers=np.where(found["layer"] >= UPPER, "upper", "lower"),
        runs=1,
        stopped=stopped,
        lost=lost,
        in_time=lost & stopped & ~(found["stop"] > found["fall"]),
        gained=gained,
        early=gained & stopped & (found["stop"] < found["peak"]),
    )
    return counted.groupby(["rate", "layers"])[columns[2:]].sum().astype(int).reset_index()
