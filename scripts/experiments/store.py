"""The tables of a part: what each finished run left, and all of them together in ``data/experiments``.

A run is finished if the part's ``runs.csv`` names it, or if its own directory holds a record. So a part goes on where
it stopped, on this machine or on another that has the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from jobs import Job, jobs

from internal_policy.bupo.run import read_table, write_table

DATA, WORK = Path("data/experiments"), Path("build/experiments")
TABLES = ("runs", "histories", "curves", "dynamics", "dynamics_layers", "perplexities")
_DIGITS = 6
_RECORD = "record"


def record_of(job: Job, work: Path = WORK) -> Path:
    """The directory in which a finished run leaves its tables."""
    return work / job.part / job.name / _RECORD


def write_record(job: Job, tables: Mapping[str, pd.DataFrame], work: Path = WORK) -> None:
    """Keep the tables of a finished run; ``runs`` comes last and says that it is whole.

    Args:
        job: the run.
        tables: by the names in ``TABLES``.
        work: where runs are kept.
    """
    directory = record_of(job, work)
    directory.mkdir(parents=True, exist_ok=True)
    for name in reversed(TABLES):
        if name in tables and len(tables[name]):
            write_table(directory / f"{name}.csv", tables[name])


def finished(part: str, data: Path = DATA, work: Path = WORK) -> set[str]:
    """Names of the runs of a part that need not be run again."""
    stored = read_table(data / part / "runs.csv")
    names = set(stored["run"]) if len(stored) else set()
    return names | {job.name for job in jobs(part) if (record_of(job, work) / "runs.csv").is_file()}


def collect(part: str, data: Path = DATA, work: Path = WORK) -> dict[str, pd.DataFrame]:
    """Join the records with the stored tables and write them, in the order of the jobs.

    Args:
        part: of the experiment.
        data: where the tables are stored.
        work: where runs are kept.

    Returns:
        The tables by name. A run that was stored is not replaced by a record of the same name.
    """
    order = {job.name: place for place, job in enumerate(jobs(part))}
    found: dict[str, pd.DataFrame] = {}
    stored = {name: read_table(data / part / f"{name}.csv") for name in TABLES}
    known = set(stored["runs"]["run"]) if len(stored["runs"]) else set()
    records = [record_of(job, work) for job in jobs(part) if job.name not in known]
    records = [record for record in records if (record / "runs.csv").is_file()]
    for name in TABLES:
        parts = [stored[name], *(read_table(record / f"{name}.csv") for record in records)]
        parts = [table for table in parts if len(table)]
        if not parts:
            continue
        table = pd.concat(parts, ignore_index=True)
        table = table.sort_values("run", key=lambda names: names.map(order), kind="stable", ignore_index=True)
        found[name] = table
        (data / part).mkdir(parents=True, exist_ok=True)
        write_table(data / part / f"{name}.csv", rounded(table))
    return found


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round numbers to ``_DIGITS`` significant digits, so that the last bits of a machine do not change a file."""
    return table.map(lambda value: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value)
