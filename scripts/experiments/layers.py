"""E4: training at every layer beside what the entropy curve and other measurements say about the layer.

python scripts/experiments/layers.py       # measures both embedded models, two minutes: data/experiments/e4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from jobs import E4_DOSE, LAYERS, LEARNING_RATE, MODELS
from scipy import stats
from store import DATA
from tables import Tables, t_interval

from internal_policy.bupo.run import read_table, write_table
from internal_policy.plotting.training import MIN_SEEDS

EVIDENCE = DATA / "e4" / "evidence.csv"
PREDICTORS = ("layer", "change", "change_direction", "across", "accuracy")
"""The layer's number, its FFN's entropy change and the direction part of it, the cosine of the gradients of alignment
and GRPO across halves of the prompts, and the accuracy of pi^l."""
RESPONSES, PROBLEMS, SAMPLES, PROMPTS = 96, 96, 4, 48
_RESAMPLES = 2000


def trained(tables: Tables) -> pd.DataFrame:
    """The runs that align a layer for E4's dose at E4's rate, those at the boundary layer included.

    Args:
        tables: of E4 joined with those of E2.

    Returns:
        Rows of ``runs``.
    """
    runs = tables["runs"]
    if runs.empty:
        return runs
    own = (runs["method"] == "bupo") & (runs["ipa_steps"] == str(E4_DOSE)) & (runs["rate"] == LEARNING_RATE)
    return runs[own].astype({"layer": int})


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


def correlations(tables: Tables, evidence: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations over the layers between what is known of a layer and what training at it ends with.

    Args:
        tables: of E4 joined with those of E2.
        evidence: of `measure`.

    Returns:
        A row per model and predictor: value, Spearman's correlation with the mean Avg@1; low and high, 95% of its
        bootstrap over seeds; less_layer, its size less the size of that of the layer's number, with ends; layers, the
        number of points; seeds. Only seeds that trained at all those layers count, and fewer than ``MIN_SEEDS`` have no
        ends, because they resample to little else.
    """
    runs = trained(tables)
    rows = []
    for model in MODELS if len(runs) else ():
        grid = runs[runs["model"] == model].pivot_table(index="seed", columns="layer", values="avg").dropna()
        own = evidence[evidence["model"] == model].set_index("layer") if len(evidence) else pd.DataFrame()
        if len(grid) == 0 or grid.shape[1] < LAYERS:
            continue
        by_layer = np.asarray(grid.columns, dtype=np.float64)
        draws = np.random.default_rng(0).integers(0, len(grid), (_RESAMPLES, len(grid)))
        resampled = grid.to_numpy()[draws].mean(axis=1)
        mean = grid.to_numpy().mean(axis=0)
        own_rank = _spearman(by_layer, mean[None])[0], _spearman(by_layer, resampled)
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
                    **{"model": model, "predictor": name, "value": value, "low": low, "high": high},
                    **{"less_layer": abs(value) - abs(own_rank[0]), "less_low": less_low, "less_high": less_high},
                    **{"layers": int(np.isfinite(known).sum()), "seeds": len(grid)},
                }
            )
    columns = ["model", "predictor", "value", "low", "high", "less_layer", "less_low", "less_high", "layers", "seeds"]
    return pd.DataFrame(rows, columns=columns)


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
