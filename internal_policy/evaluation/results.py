"""The result of an evaluation, in memory and on disk.

A directory holds one evaluation: one checkpoint on one benchmark. ``evaluation.json`` is written last: a directory
without it is not an evaluation, so nothing half-written is ever read as whole.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.data import benchmarks
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import Kind, from_cells, read_rows, to_cells, write_rows
from internal_policy.utils.wording import counted

SCHEMA_VERSION = 1
MANIFEST = "evaluation.json"
_FILES = ("problems.csv", "pass_at_k.csv", "samples.jsonl")
RESULT_FILES = (*_FILES, MANIFEST)
EVALUATION = Kind("evaluation", "evaluations", "evaluate", "evaluate", MANIFEST, SCHEMA_VERSION, _FILES, depth=2)
_TEXTS = ("prompt", "answer")


@dataclass(frozen=True)
class Evaluation:
    """How often one checkpoint solves the problems of one benchmark. All rates are 0 to 1."""

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, dtype, device."""
    benchmark: str
    """The benchmark's name: ``math500``, a file's name, a hub id, ``given``."""
    config: dict[str, Any]
    """The settings, with digests of weights, problems and templated prompts."""
    problems: pd.DataFrame
    """A row a problem: problem (from 1), prompt (the bare question), answer, n, correct, mean_score, mean_length
    (tokens), truncated (responses that reached the limit of tokens)."""
    pass_at_k: pd.DataFrame
    """A row for each K: k, value, low, high (95% interval over problems)."""
    avg: dict[str, float]
    """Avg@K with K = all samples: mean, stderr (clustered by problem), low, high (95% interval)."""
    samples: pd.DataFrame
    """A row a response: problem, sample (both from 1), response, score, n_tokens, truncated."""
    failures: dict[str, int] = field(default_factory=dict)
    """Comparisons that went wrong in the verifier: crashes, timeouts. Such responses have score 0."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent on loading, sampling and scoring."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Where it is on disk."""

    @property
    def n_problems(self) -> int:
        """Number of problems."""
        return len(self.problems)

    @property
    def n_samples(self) -> int:
        """Samples of each problem: the K of Avg@K."""
        return int(self.problems["n"].iloc[0])

    @property
    def n_truncated(self) -> int:
        """Responses that reached the limit of tokens before they ended."""
        return int(self.problems["truncated"].sum())

    @property
    def mean_score(self) -> float:
        """Mean reward over all responses: above Avg@K where the reward gives parts of 1."""
        return float(self.samples["score"].mean())

    @property
    def mean_length(self) -> float:
        """Mean length of a response, tokens."""
        return float(self.samples["n_tokens"].mean())

    def digest(self) -> str:
        """A digest of questions and answers, by which evaluations of the same problems know one another.

        Returns:
            16 hexadecimal digits.
        """
        return benchmarks.digest(list(zip(self.problems["prompt"], self.problems["answer"], strict=True)))

    def save(self, directory: str | Path) -> Path:
        """Write the evaluation to a directory; the manifest last.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with EVALUATION.writing(directory, self.manifest()) as target:
            for name, table in (("problems.csv", self.problems), ("pass_at_k.csv", self.pass_at_k)):
                # A question may hold any line ending; in quotes it comes back as it was.
                write = partial(to_cells(table).to_csv, index=False, quoting=csv.QUOTE_NONNUMERIC)
                write_atomically(target / name, write)
            write_rows(target / "samples.jsonl", self.samples)
        return target

    def manifest(self) -> dict[str, Any]:
        """What ``evaluation.json`` holds.

        Returns:
            JSON-able fields; NaN is null.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "benchmark": self.benchmark,
            "model": self.model,
            "config": self.config,
            "n_problems": self.n_problems,
            "n_samples": self.n_samples,
            "n_truncated": self.n_truncated,
            "avg": {k: None if v != v else v for k, v in self.avg.items()},
            "pass_at_k": {str(int(k)): v for k, v in zip(self.pass_at_k["k"], self.pass_at_k["value"], strict=True)},
            "mean_score": self.mean_score,
            "mean_length": self.mean_length,
            "failures": self.failures,
            "timings": self.timings,
            "versions": self.versions,
        }

    @classmethod
    def load(cls, directory: str | Path) -> Evaluation:
        """Read an evaluation from disk.

        Args:
            directory: of one evaluation, or one that holds a single evaluation, up to two levels below.

        Returns:
            The evaluation.

        Raises:
            UserError: no evaluation there, unfinished, broken, or written by a newer version.
        """
        source = EVALUATION.find(expanded(directory))
        with EVALUATION.reading(source) as manifest:
            # An answer such as 007, 1e3 or NA is a text.
            problems = pd.read_csv(
                source / "problems.csv", dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=[]
            )
            return cls(
                name=manifest["name"],
                model=manifest["model"],
                benchmark=manifest["benchmark"],
                config=manifest["config"],
                problems=from_cells(problems),
                pass_at_k=pd.read_csv(source / "pass_at_k.csv"),
                avg={k: float("nan") if v is None else v for k, v in manifest["avg"].items()},
                samples=read_rows(source / "samples.jsonl"),
                failures=manifest["failures"],
                timings=manifest["timings"],
                versions=manifest["versions"],
                path=source,
            )

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import card

        def row(name: str, value: float, low: float, high: float) -> tuple[str, str, str]:
            span = "-" if low != low else f"{100 * low:.2f} to {100 * high:.2f}"
            return name, number(100 * value, ".2f"), span

        cells = [row(f"Avg@{self.n_samples}", self.avg["mean"], self.avg["low"], self.avg["high"])]
        cells += [
            row(f"Pass@{k}", value, low, high)
            for k, value, low, high in self.pass_at_k[["k", "value", "low", "high"]].itertuples(index=False)
        ]
        facts = (
            f"{counted(self.n_problems, 'problem')} x {counted(self.n_samples, 'sample')}",
            f"mean length {self.mean_length:.1f} tokens",
            f"{self.n_truncated} truncated" if self.n_truncated else "",
        )
        table = pd.DataFrame(cells, columns=["", "%", "95% interval"])
        return card("Evaluation", f"{self.name} on {self.benchmark}", facts, table, "percent; intervals over problems")

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.name!r} on {self.benchmark!r}, {counted(self.n_problems, 'problem')} x "
            f"{counted(self.n_samples, 'sample')}, "
            f"Avg@{self.n_samples} {self.avg['mean']:.4f})"
        )
