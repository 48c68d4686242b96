"""Benchmarks: problems with reference answers, by name, from a file, from the hub or from a list."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internal_policy.data import records
from internal_policy.data.prompts import ANSWER_COLUMNS, TESTBED, Prompt, read_prompts
from internal_policy.utils.errors import UserError

DEFAULT_SAMPLES = 16
TESTBED_PROBLEMS = 256
TESTBED_SEED = 20_261_121
"""Seed of problems that differ from those of an analysis of an embedded model (`prompts.TESTBED_SEED`)."""
GIVEN = "given"
"""The name of a list of problems."""


@dataclass(frozen=True)
class Benchmark:
    """The source of a named benchmark, and how often the paper samples each problem."""

    title: str
    """As the paper writes it."""
    source: str
    """A hub data set id."""
    samples: int
    """K of Avg@K (arXiv 2512.19673v3, section 5 and appendix A.5)."""


BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark("MATH500", "HuggingFaceH4/MATH-500", 16),
    "amc23": Benchmark("AMC23", "math-ai/amc23", 16),
    # math-ai/aime24 has its answers only inside the solutions.
    "aime24": Benchmark("AIME24", "HuggingFaceH4/aime_2024", 32),
    "aime25": Benchmark("AIME25", "math-ai/aime25", 32),
    TESTBED: Benchmark("testbed", TESTBED, DEFAULT_SAMPLES),
}
"""The paper's four benchmarks, by their ids on the Hugging Face hub, and held-out problems of the embedded task."""


def label(source: str | Sequence[Any]) -> str:
    """Derive the name of a benchmark: its own, a file's name without suffix, a hub id, or ``given`` for a list."""
    if not isinstance(source, str):
        return GIVEN
    is_file = Path(source).suffix in records.SUFFIXES
    return source if source in BENCHMARKS or not is_file else Path(source).stem


def title(name: str) -> str:
    """Format a benchmark's name for figures and tables: ``MATH500`` for ``math500``; other names are unchanged."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def slug(name: str) -> str:
    """Make a benchmark's name safe in a path: ``owner--data`` for ``owner/data``."""
    return "".join(c if c.isalnum() or c in "-_.@" else "-" for c in name.replace("/", "--")).strip(".") or GIVEN


def default_samples(name: str) -> int:
    """Look up how often the paper samples each problem of a benchmark: 16 times, or 32 times for AIME."""
    return BENCHMARKS[name].samples if name in BENCHMARKS else DEFAULT_SAMPLES


def read_benchmark(source: str | Sequence[Any], limit: int | None = None) -> list[Prompt]:
    """Read at most ``limit`` problems with their answers, from the start.

    The source is a name of `BENCHMARKS`, a parquet, jsonl or json file, a hub data set id, or a list of records with a
    prompt (or problem, question) and an answer (or final_answer, reward_model.ground_truth).

    Raises:
        UserError: the source is unreadable or empty, or a problem has no answer.
    """
    if isinstance(source, str) and source == TESTBED:
        from internal_policy.data import arithmetic as tasks

        drawn = tasks.problems(limit or TESTBED_PROBLEMS, seed=TESTBED_SEED)
        return [Prompt(p.prompt, p.answer) for p in drawn]
    named = BENCHMARKS.get(source) if isinstance(source, str) else None
    found = read_prompts(named.source if named else source, limit=limit)
    for number, prompt in enumerate(found, start=1):
        if prompt.unusable or not (prompt.answer or "").strip():
            where = f"{source}: record" if isinstance(source, str) else "the list of problems: item"
            raise UserError(
                f"{where} {number} has {prompt.unusable or 'no answer'}; needed for scoring is one of "
                f"{', '.join(ANSWER_COLUMNS)}, reward_model.ground_truth"
            )
    return found


def digest(problems: Sequence[tuple[str, str]]) -> str:
    """Compute a digest of bare questions and answers, which identifies evaluations of the same problems."""
    return hashlib.sha256(json.dumps([list(p) for p in problems]).encode()).hexdigest()[:16]
