"""E4: training at every layer beside what the entropy curve and other measurements say about the layer.

python scripts/experiments/layers.py       # measures both embedded models, two minutes: data/experiments/e4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from dose import AREA_EVERY, OPTIMISED, TOTAL, curves_over_grpo, means_along
from jobs import BOUNDARY, E4_DOSE, LAYERS, LEARNING_RATE, MODELS
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
END, ALONG, AFTERWARDS = "end", "along", "afterwards"
"""Outcomes of training at a layer: accuracy after the last step, its mean along the run, and that without the first of
its steps, which no step of GRPO precedes."""


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
    """What training at the layers brought: a row per model, layer and seed for each kind of outcome."""
    runs = trained(tables)
    if runs.empty:
        return {}
    every = curves_over_grpo(trained(tables, "curves"), tables["curves"])
    found = {END: runs.assign(value=runs["avg"])}
    # A difference from the same GRPO run at each seed ranks the layers as their accuracies at the same steps do.
    for outcome, comparison in ((ALONG, TOTAL), (AFTERWARDS, OPTIMISED)):
        found[outcome] = means_along(every[every["comparison"] == comparison], ["model", "layer"])
    return found


def over_boundary(tables: Tables) -> pd.DataFrame:
    """Training at each layer minus training at the boundary layer with the same seed, in Avg@1.

    Args:
        tables: of E4 joined with those of E2.

    Returns:
        A row per model, other layer and outcome (end, along, afterwards; see `correlations`): value, low, high, seeds.
    """
    found = []
    for outcome, values in _values(tables).items():
        of_boundary = values[values["layer"] == values["model"].map(BOUNDARY)].set_index(["model", "seed"])["value"]
        others = values[values["layer"] != values["model"].map(BOUNDARY)]
        base = of_boundary.reindex(pd.MultiIndex.from_frame(others[["model", "seed"]])).to_numpy()
        found.append(others.assign(outcome=outcome, value=others["value"] - base))
    by = ["model", "layer", "outcome"]
    joined = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=[*by, "value"])
    return over_seeds(joined.dropna(subset=["value"]).sort_values(["model", "layer"], kind="stable"), by)


def correlations(tables: Tables, evidence: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations over the layers between what is known of a layer and what training at it brings.

    Args:
        tables: of E4 joined with those of E2.
        evidence: of `measure`.

    Returns:
        A row per model, outcome and predictor. The outcomes are Avg@1 at the end, its mean along the run (steps 24 to
        120), and its mean afterwards (steps 48 to 120, which all follow steps of GRPO). value is the mean over seeds of
        Spearman's correlation, low and high its t-interval; of_means is the correlation with the mean outcome of each
        layer; less_layer is the size of a seed's correlation less that of the layer's number, with ends; layers is the
        number of points. Only seeds that trained at all those layers count, and fewer than ``MIN_SEEDS`` have no ends.
    """
    rows = []
    for outcome, values in _values(tables).items():
        for model in MODELS:
            # Unlike a pivot table, this refuses a run that is there twice.
            grid = values[values["model"] == model].pivot(index="seed", columns="layer", values="value")  # noqa: PD010
            grid = grid.dropna()
            own = evidence[evidence["model"] == model].set_index("layer") if len(evidence) else pd.DataFrame()
            if len(grid) and grid.shape[1] == LAYERS:
                rows += [{"model": model, "outcome": outcome, **row} for row in _of_model(grid, own)]
    columns = ["model", "outcome", "predictor", "value", "low", "high", "of_means", "less_layer", "less_layer_low"]
    return pd.DataFrame(rows, columns=[*columns, "less_layer_high", "layers", "seeds"])


def _of_model(grid: pd.DataFrame, own: pd.DataFrame) -> list[dict[str, object]]:
    """Rank correlations of one model and outcome, [S, L], with each predictor that is measured."""
    by_layer = np.asarray(grid.columns, dtype=np.float64)
    outcomes = grid.to_numpy()
    of_number = np.abs(_spearman(by_layer, outcomes))
    rows: list[dict[str, object]] = []
    for name in PREDICTORS:
        if name != "layer" and name not in own:
            continue
        known = by_layer if name == "layer" else own[name].reindex(grid.columns).to_numpy(dtype=np.float64)
        each = _spearman(known, outcomes)
        row: dict[str, object] = {"predictor": name, **t_interval(each)}
        row["of_means"] = _spearman(known, outcomes.mean(axis=0)[None])[0]
        less = t_interval(np.abs(each) - of_number)
        row |= {f"less_layer{'' if k == 'value' else '_' + k}": less[k] for k in ("value", "low", "high")}
        if len(grid) < MIN_SEEDS:
            row |= dict.fromkeys(("low", "high", "less_layer_low", "less_layer_high"), np.nan)
        rows.append({**row, "layers": int(np.isfinite(known).sum())})
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
