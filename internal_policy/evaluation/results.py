"""The result of an evaluation, in memory and on disk, and how a finished one is recognised without its model.

A directory holds one evaluation: one checkpoint on one benchmark. ``evaluation.json`` is written last: a directory
without it is not an evaluation, so that nothing incomplete is ever read as a result.
"""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis.finished import source_digest
from internal_policy.data import benchmarks
from internal_policy.data.prompts import TESTBED
from internal_policy.evaluation import metrics
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.models.options import is_own_lens, lens_files
from internal_policy.rewards.identity import reward_name
from internal_policy.utils.errors import counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat, is_up_to_date
from internal_policy.utils.table_io import from_cells, read_rows, to_cells, write_rows
from internal_policy.utils.workspace import Workspace

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "evaluation.json"
_FILES = ("problems.csv", "pass_at_k.csv", "samples.jsonl")
EVALUATION = ResultFormat(
    "evaluation", "evaluations", "evaluate", "evaluate", MANIFEST, SCHEMA_VERSION, _FILES, depth=2
)
_TEXTS = ("prompt", "answer")


@dataclass(frozen=True)
class Evaluation:
    """How often one checkpoint solves the problems of one benchmark. All rates are from 0 to 1."""

    name: str
    """The model's name, followed by the layer if an internal policy was sampled: ``testbed/qwen3, layer 6``."""
    model: dict[str, Any]
    """id, revision, family, dtype, device."""
    benchmark: str
    """The benchmark's name: ``math500``, a file's name, a hub id, ``given``."""
    config: dict[str, Any]
    """The settings, with digests of weights, problems and templated prompts."""
    problems: pd.DataFrame
    """A row per problem: problem (from 1), prompt (the bare question), answer, n, correct, mean_score, mean_length
    (tokens), truncated (responses that reached the token limit)."""
    pass_at_k: pd.DataFrame
    """A row per K: k, value, low, high (95% interval over problems)."""
    avg: dict[str, float]
    """Avg@K with K = all samples: mean, stderr (clustered by problem), low, high (95% interval)."""
    samples: pd.DataFrame
    """A row per response: problem, sample (both from 1), response, score, n_tokens, truncated. Those of an internal
    policy have four more columns, means over the tokens of the response that compare it with pi_theta at temperature 1:
    agreement (share of the tokens at which both have the same most probable one), kl (KL(pi^l || pi_theta), nats),
    log_prob and policy_log_prob (log-probability of the tokens under the internal policy and under pi_theta, nats)."""
    failures: dict[str, int] = field(default_factory=dict)
    """Comparisons that failed in the verifier: crashes, timeouts. Such responses have score 0."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent on loading, sampling and scoring."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Its directory."""

    @property
    def layer(self) -> int | None:
        """Layer of the internal policy that was sampled from, counted from 1; None for the model's own policy."""
        return self.config.get("layer")

    @property
    def site(self) -> str | None:
        """Whose policy of the layer: layer, attn or ffn; None for the model's own policy."""
        return self.config.get("site")

    @property
    def lens(self) -> str | None:
        """The lens of the internal policy; None for the model's own policy."""
        return self.config.get("lens")

    @property
    def model_name(self) -> str:
        """The model's name without the layer."""
        return self.name if self.layer is None else self.name.rpartition(", ")[0]

    @property
    def policy_label(self) -> str:
        """What was sampled from: ``layer 6``; empty for the model's own policy."""
        return "" if self.layer is None else self.name.rpartition(", ")[2]

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
        """Responses that reached the token limit before they ended."""
        return int(self.problems["truncated"].sum())

    @property
    def mean_score(self) -> float:
        """Mean reward over all responses: above Avg@K if the reward gives fractions of 1."""
        return float(self.samples["score"].mean())

    @property
    def mean_length(self) -> float:
        """Mean length of a response, tokens."""
        return float(self.samples["n_tokens"].mean())

    def digest(self) -> str:
        """Digest the questions and answers, to recognise evaluations of the same problems.

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
                # A question may hold any line ending, which quotes preserve.
                write = partial(to_cells(table).to_csv, index=False, quoting=csv.QUOTE_NONNUMERIC)
                write_atomically(target / name, write)
            write_rows(target / "samples.jsonl", self.samples)
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``evaluation.json``.

        Returns:
            JSON-serialisable fields; NaN is null.
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
            # An answer such as 007, 1e3 or NA is text.
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


def find_finished(config: EvaluateConfig, source: str, root: Path) -> Evaluation | None:
    """Find the evaluation that a command would make again, without loading its model.

    Args:
        config: the settings that are asked for.
        source: the benchmark: a name, a file, or a hub id.
        root: holds a directory for each evaluation.

    Returns:
        The evaluation with the K that are asked for; None if there is none, or if the model has to be loaded to tell.

    Raises:
        UserError: an evaluation with other settings, or a broken one.
    """
    config = replace(config, reward=reward_name(config.reward, exact=source == TESTBED))
    directory = root / config.slug
    evaluation = load_finished(config, directory)
    if evaluation is None or evaluation.config.get("max_problems") != config.max_problems:
        return None
    if not is_up_to_date(evaluation.config, evaluation.versions, partial(config_digest, config, source)):
        return None
    return with_k(evaluation, config, directory)


def config_digest(config: EvaluateConfig, source: str) -> str | None:
    """Digest the files from which an evaluation is made: the model's, the problems, and this package's code.

    Args:
        config: the settings.
        source: the benchmark: a name, a file, or a hub id.

    Returns:
        64 hexadecimal digits; None if something else decides too: the hub, a GPU, another library, other code.
    """
    on_the_hub = source in benchmarks.BENCHMARKS and source != TESTBED
    foreign = config.trust_remote_code or config.generator != "transformers" or config.reward not in ("math", "exact")
    if on_the_hub or foreign or config.revision is not None:
        return None
    inputs = [source]
    if is_own_lens(config.lens):
        if not isinstance(config.lens, (str, Path)):
            return None
        inputs += map(str, lens_files(config.lens))
    return source_digest(config.model, inputs, config.device)


def load_finished(config: EvaluateConfig, directory: Path) -> Evaluation | None:
    """Load the evaluation that is already in a directory, if any; refuse one with other settings."""
    if not EVALUATION.is_in(directory):
        return None
    evaluation = Evaluation.load(directory)
    EVALUATION.check_settings(directory, evaluation.config, config.cache_key())
    return evaluation


def with_k(evaluation: Evaluation, config: EvaluateConfig, directory: Path) -> Evaluation:
    """Compute Pass@K of a finished evaluation for other K, which need no new samples, and write it again."""
    Workspace(directory, EVALUATION).close()
    logger.warning("%s: this evaluation is complete; nothing to sample", directory)
    if tuple(evaluation.pass_at_k["k"]) == config.ks:
        return evaluation
    table = metrics.pass_table(evaluation.problems, config.ks)
    changed = replace(evaluation, pass_at_k=table, config={**evaluation.config, "k": list(config.ks)})
    changed.save(directory)
    return changed
