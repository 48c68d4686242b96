"""E4: training at every layer beside what the entropy curve and other measurements say about the layer.

python scripts/experiments/layers.py       # measures both embedded models, two minutes: data/experiments/e4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from dose import AREA_EVERY, TOTAL, curves_over_grpo, means_along
from jobs import E4_DOSE, LAYERS, LEARNING_RATE, MODELS
from scipy import stats
from store import DATA
from tables import Tables, over_seeds, t_interval

from internal_policy.bupo.run import read_table, write_table
from internal_policy.plotting.training import MIN_SEEDS

EVIDENCE = DATA / "e4" / "evidence.csv"
PREDICTORS = ("layer", "change", "change_direction", "across", "accuracy")
"""The layer's number, its FFN's entropy change and the direction part of it, the cosine of the gradients of alignment
and GRPO across halves of the prompts, and the accuracy of pi^l."""
RESPONSES, PROBLEMS, SAMPLES, PROMPTS = 96, 96, 4, 48
_RESAMPLES = 2000
END, ALONG = "end", "along"
"""Outcomes of training at a layer: accuracy after the last step, and its mean along the run."""


def trained(tables: Tables, name: str = "runs") -> pd.DataFrame:
    """The runs that align a layer for E4's dose at E4's rate, those at the boundary layer included.

    Args:
        tables: of E4 joined with those of E2.
        name: of the table.

    Returns:
        Its rows.
    """
    rows = tables[name]
    if rows.empty:
        return rows
    own = (rows["method"] == "bupo") & (rows["ipa_steps"] == str(E4_DOSE)) & (rows["rate"] == LEARNING_RATE)
    return rows[own].astype({"layer": int})


def outcomes(tables: Tables) -> pd.DataFrame:
    """What training at each layer ended with.

    Args:
        tables: of E4 joined with those of E2.

    Returns:
        A row per model, layer and measure (avg, pass16): value, low, high, seeds; over_grpo, the difference from GRPO
        paired by seed, with its ends and seeds.
    """
    runs = trained(tables)
    plain = tables["runs"][tables["runs"]["method"] == "grpo"] if len(runs) else runs
    rows = []
    for measure in ("avg", "pass16"):
        if runs.empty:
            continue
        base = plain.set_index(["model", "seed"])[measure]
        for (model, layer), group in runs.groupby(["model", "layer"]):
            against = group.set_index(["model", "seed"])[measure].sub(base).dropna()
            over = {f"over_grpo{'' if k == 'value' else '_' + k}": v for k, v in t_interval(against).items()}
            rows.append({"model": model, "layer": layer, "measure": measure, **t_interval(group[measure]), **over})
    ends = ["value", "low", "high", "seeds", "over_grpo", "over_grpo_low", "over_grpo_high", "over_grpo_seeds"]
    return pd.DataFrame(rows, columns=["model", "layer", "measure", *ends])


def along(tables: Tables) -> pd.DataFrame:
    """BuPO at each layer minus GRPO in held-out Avg@1 along the runs, paired by seed.

    Args:
        tables: of E4 joined with those of E2.

    Returns:
        A row per model, layer, comparison (equal total steps, equal GRPO steps) and step (text; "mean" is that over the
        steps that ``dose.AREA_EVERY`` divides): value, low, high, seeds. The step is GRPO's.
    """
    by = ["model", "layer", "comparison"]
    every = curves_over_grpo(trained(tables, "curves"), tables["curves"])
    if every.empty:
        return over_seeds(every, [*by, "step"])
    means = means_along(every, by).assign(step="mean")
    spaced = every[every["step"] % AREA_EVERY == 0].astype({"step": str})
    found = over_seeds(pd.concat([spaced[means.columns], means], ignore_index=True), [*by, "step"])
    return found.sort_values(["model", "layer"], kind="stable", ignore_index=True)


def _values(tables: Tables) -> dict[str, pd.DataFrame]:
    """What the layers' numbers are compared with: a row per model, layer and seed for each kind of outcome."""
    runs = trained(tables)
    every = curves_over_grpo(trained(tables, "curves"), tables["curves"])
    every = every[every["comparison"] == TOTAL]
    # A difference from the same GRPO run at each seed ranks the layers as their accuracies do.
    means = means_along(every, ["model", "layer"]) if len(every) else every
    return {END: runs.assign(value=runs["avg"]) if len(runs) else runs, ALONG: means}


def correlations(tables: Tables, evidence: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations over the layers between what is known of a layer and what training at it brings.

    Args:
        tables: of E4 joined with those of E2.
        evidence: of `measure`.

    Returns:
        A row per model, outcome ("end": Avg@1 at the end; "along": its mean along the run) and predictor: value,
        Spearman's correlation with the outcome's mean over seeds; low and high, 95% of its bootstrap over seeds;
        less_layer, its size less the size of that of the layer's number, with ends; layers, the number of points;
        seeds. Only seeds that trained at all those layers count, and fewer than ``MIN_SEEDS`` have no ends, because
        they resample to little else.
    """
    rows = []
    for outcome, values in _values(tables).items():
        for model in MODELS if len(values) else ():
            grid = values[values["model"] == model].pivot_table(index="seed", columns="layer", values="value").dropna()
            own = evidence[evidence["model"] == model].set_index("layer") if len(evidence) else pd.DataFrame()
            if len(grid) and grid.shape[1] == LAYERS:
                rows += [{"model": model, "outcome": outcome, **row} for row in _of_model(grid, own)]
    columns = ["model", "outcome", "predictor", "value", "low", "high", "less_layer", "less_low", "less_high"]
    return pd.DataFrame(rows, columns=[*columns, "layers", "seeds"])


def _of_model(grid: pd.DataFrame, own: pd.DataFrame) -> list[dict[str, object]]:
    """Rank correlations of one model and outcome, [S, L], with each predictor that is measured."""
    by_layer = np.asarray(grid.columns, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(grid), (_RESAMPLES, len(grid)))
    resampled = grid.to_numpy()[draws].mean(axis=1)
    mean = grid.to_numpy().mean(axis=0)
    own_rank = _spearman(by_layer, mean[None])[0], _spearman(by_layer, resampled)
    rows: list[dict[str, object]] = []
    for name in PREDICTORS:
        if name != "layer" and name not in own:
            continue
        known = by_layer if name == "layer" else own[name].reindex(grid.columns).to_numpy(dtype=np.float64)
        value, boot = _spearman(known, mean[None])[0], _spearman(known, resampled)
        less = np.abs(boot) - np.abs(own_rank[1])
        low, high = np.nanquantile(boot, [0.025, 0.975])
        less_low, less_high = np.nanquantile(less, [0.025, 0.975])
        if len(grid) < MIN_SEEDS:
            low = high = less_low = less_high = np.nan
        rows.append(
            {
                **{"predictor": name, "value": value, "low": low, "high": high},
                **{"less_layer": abs(value) - abs(own_rank[0]), "less_low": less_low, "less_high": less_high},
                **{"layers": int(np.isfinite(known).sum()), "seeds": len(grid)},
            }
        )
    return rows


def _spearman(known: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Spearman's correlation of a predictor, [L], with each row of outcomes, [N, L]; layers without it are left out."""
    there = np.isfinite(known)
    x = stats.rankdata(known[there])
    y = stats.rankdata(outcomes[:, there], axis=1)
    x, y = x - x.mean(), y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = (y @ x) / np.sqrt((x @ x) * (y * y).sum(axis=1))
    return found


def measure(model: str, work: Path) -> pd.DataFrame:
    """Measure every layer of a model.

    Args:
        model: an embedded model.
        work: where the results are kept, and read if they are there.

    Returns:
        A row per layer: model, layer and the columns of `internal_policy.bupo.layer_evidence`.
    """
    from internal_policy import analyze, bupo
    from internal_policy.evaluation import evaluate_layers
    from internal_policy.models import load

    short = model.split("/")[1]
    analysis = analyze(model, max_responses=RESPONSES, keep_tokens=0, output=work / f"{short}-analysis")
    found = evaluate_layers(load(model), layers="all", max_problems=PROBLEMS, samples=SAMPLES)
    transfer = bupo.transfer(model, max_prompts=PROMPTS, output=work / f"{short}-transfer")
    table = bupo.layer_evidence(analysis, evaluations=found, transfer=transfer)
    return table.reset_index().assign(model=model)


def read_evidence(path: Path = EVIDENCE) -> pd.DataFrame:
    """Read the stored measurements; an empty table if there are none."""
    return read_table(path)


def main(measured: Callable[[str, Path], pd.DataFrame] = measure) -> None:
    """Measure both embedded models and store the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/experiments/evidence"), help="where results are kept")
    args = parser.parse_args()
    table = pd.concat([measured(model, args.work) for model in MODELS], ignore_index=True)
    first = ["model", "layer"]
    EVIDENCE.parent.mkdir(parents=True, exist_ok=True)
    write_table(EVIDENCE, table[[*first, *table.columns.drop(first)]].round(6))
    print(f"{len(table)} layers in {EVIDENCE}")


if __name__ == "__main__":
    main()
