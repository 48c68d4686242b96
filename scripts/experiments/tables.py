"""Read the tables of an experiment's part, and summarise values over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from jobs import PARTS, Job, jobs
from scipy import stats
from store import DATA, TABLES

from internal_policy.bupo.run import read_table

SETTING = ["model", "method", "layer", "ipa_steps", "rate", "steps"]
"""Columns of ``runs.csv`` that repetitions of a run share."""
_COLUMNS = ["run", "part", *SETTING, "seed"]

Tables = dict[str, pd.DataFrame]


def read_part(part: str, data: Path = DATA) -> Tables:
    """Read what is stored of a part.

    Args:
        part: e1, e2, e4 or methods.
        data: where the parts are.

    Returns:
        The tables by the names in ``TABLES``, each with the setting and the seed of its run; a table that is missing
        is empty. ``ipa_steps`` is text, since a dose may be "auto"; ``layer`` is the aligned one, and a later layer
        with which it is compared is called ``later``.
    """
    found = {name: read_table(data / part / f"{name}.csv") for name in TABLES}
    return with_settings(found)


def with_settings(tables: Tables) -> Tables:
    """Add the setting and the seed of the run to every table."""
    runs = tables.get("runs", pd.DataFrame())
    if runs.empty:
        return {name: pd.DataFrame(columns=_COLUMNS) for name in TABLES}
    runs = runs.assign(ipa_steps=runs["ipa_steps"].astype(str))
    setting = runs[_COLUMNS]
    found = {"runs": runs}
    for name in TABLES[1:]:
        table = tables.get(name, pd.DataFrame()).rename(columns={"layer": "later"})
        found[name] = table.merge(setting, on="run") if len(table) else pd.DataFrame(columns=_COLUMNS)
    return found


def joined(*parts: Tables) -> Tables:
    """Put the tables of several parts under one another."""
    found = {}
    for name in TABLES:
        filled = [part[name] for part in parts if len(part[name])]
        found[name] = pd.concat(filled, ignore_index=True) if filled else parts[0][name]
    return found


def t_interval(values: npt.ArrayLike) -> dict[str, float]:
    """Mean over seeds with its 95% t-interval.

    Args:
        values: [S], one of each seed; those that are NaN are left out.

    Returns:
        value, low, high and seeds, their number. The ends are NaN with fewer than two seeds.
    """
    given = np.asarray(values, dtype=np.float64)
    given = given[~np.isnan(given)]
    n = len(given)
    mean = float(given.mean()) if n else float("nan")
    half = float(_half_width(given.std(ddof=1), n)) if n > 1 else float("nan")
    return {"value": mean, "low": mean - half, "high": mean + half, "seeds": n}


def over_seeds(table: pd.DataFrame, by: Sequence[str], column: str = "value") -> pd.DataFrame:
    """Summarise a column over seeds.

    Args:
        table: a row of each run, or of each run and step.
        by: columns that a summary's row has.
        column: what is summarised.

    Returns:
        A row per group: ``by``, value, low, high, seeds.
    """
    columns = [*by, "value", "low", "high", "seeds"]
    if table.empty:
        return pd.DataFrame(columns=columns)
    found = table.groupby(list(by), dropna=False, sort=False)[column].agg(["mean", "std", "count"]).reset_index()
    n = found["count"].to_numpy()
    half = _half_width(found["std"].to_numpy(), n)
    found = found.assign(value=found["mean"], low=found["mean"] - half, high=found["mean"] + half, seeds=n)
    return found[columns]


def _half_width(deviation: npt.ArrayLike, n: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Half a 95% t-interval; NaN where the standard deviation is, which one value does not have."""
    counts = np.maximum(n, 2)
    half: npt.NDArray[np.float64] = stats.t.ppf(0.975, counts - 1) * np.asarray(deviation) / np.sqrt(counts)
    return half


def shared_steps(tables: Tables) -> pd.DataFrame:
    """Compare runs with different versions of torch over the first steps that they have in common.

    Runs of GRPO share all steps; runs that align the same layer at the same rate share those of the shorter alignment.

    Args:
        tables: of all parts.

    Returns:
        A row per pair of runs with the same model and seed: run, other, steps, and the largest absolute differences of
        reward, length and grad_norm in a step.
    """
    columns = ["reward", "length", "grad_norm"]
    rows: list[dict[str, object]] = []
    runs, histories = tables["runs"], tables["histories"]
    by_run = dict(tuple(histories.groupby("run"))) if len(histories) else {}
    own = runs[runs["method"].isin(["grpo", "bupo"])] if len(runs) else runs
    for _, group in own.groupby(["model", "seed", "method", "layer", "rate"], dropna=False, sort=False):
        for one, other in combinations(group.to_dict("records"), 2):
            if one["torch"] == other["torch"]:
                continue
            ends = [run["steps"] if run["method"] == "grpo" else run["alignment_steps"] for run in (one, other)]
            first, second = (
                by_run[run["run"]].query("step <= @last").set_index("step")[columns]
                for run, last in ((one, min(ends)), (other, min(ends)))
            )
            largest = (first - second).abs().max()
            differences = {name: largest[name] for name in columns}
            rows.append({"run": one["run"], "other": other["run"], "steps": int(min(ends)), **differences})
    return pd.DataFrame(rows, columns=["run", "other", "steps", *columns])


def completeness(parts: Iterable[str] = PARTS, data: Path = DATA) -> pd.DataFrame:
    """Count what was run of each part and what was not.

    Args:
        parts: of the experiment.
        data: where the parts are.

    Returns:
        A row per part: planned and done, numbers of runs; whole, the number of seeds all of whose runs are done;
        hours, of one core, that the missing runs would take at the median time of a step in those done, or in E2's if
        none is (NaN if there are none of E2 either).
    """
    rows = []
    for part in parts:
        planned = jobs(part)
        runs = read_table(data / part / "runs.csv")
        missing = missing_jobs(part, data)
        seeds = {job.seed for job in planned} - {job.seed for job in missing}
        timed = runs if len(runs) else read_table(data / "e2" / "runs.csv")
        step = float((timed["seconds"] / timed["steps"]).median()) if len(timed) else float("nan")
        rows.append(
            {
                "part": part,
                "planned": len(planned),
                "done": len(planned) - len(missing),
                "whole": len(seeds),
                "hours": step * sum(job.steps for job in missing) / 3600 if missing else 0.0,
            }
        )
    return pd.DataFrame(rows)


def missing_jobs(part: str, data: Path = DATA) -> list[Job]:
    """List the runs of a part that the stored tables lack."""
    runs = read_table(data / part / "runs.csv")
    done = set(runs["run"]) if len(runs) else set()
    return [job for job in jobs(part) if job.name not in done]
