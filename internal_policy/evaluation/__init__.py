"""Evaluate checkpoints: Avg@K and Pass@K on benchmarks, and paired comparisons (arXiv 2512.19673v3, section 5).

from internal_policy.evaluation import compare, evaluate

before, after = (evaluate(model, "math500", output="data/evaluations") for model in ("Qwen/Qwen3-4B", "./checkpoint"))
print(after.avg, after.pass_at_k, compare(after, before))

Importing this package loads neither torch nor transformers; ``evaluate`` does, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from internal_policy.quiet import import_quietly

if TYPE_CHECKING:
    from internal_policy.evaluation.benchmarks import BENCHMARKS
    from internal_policy.evaluation.comparison import Comparison, compare
    from internal_policy.evaluation.metrics import pass_at_k
    from internal_policy.evaluation.results import Evaluation
    from internal_policy.evaluation.run import evaluate

_HOME = {
    "BENCHMARKS": "benchmarks",
    "Comparison": "comparison",
    "Evaluation": "results",
    "compare": "comparison",
    "evaluate": "run",
    "pass_at_k": "metrics",
}

__all__ = ["BENCHMARKS", "Comparison", "Evaluation", "compare", "evaluate", "pass_at_k"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOME:
        return getattr(import_quietly(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
