"""Evaluate checkpoints: Avg@K and Pass@K on benchmarks, and paired comparisons (arXiv 2512.19673v3, section 5).

from internal_policy.evaluation import compare, evaluate

before, after = (evaluate(model, "math500", output="data/evaluations") for model in ("Qwen/Qwen3-4B", "./checkpoint"))
print(after.avg, after.pass_at_k, compare(after, before))

Importing this package loads neither torch nor transformers; ``evaluate`` does, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy.evaluation.depth import depth_table
    from internal_policy.evaluation.metrics import pass_at_k
    from internal_policy.evaluation.paired_tests import Comparison, compare
    from internal_policy.evaluation.pipeline import evaluate, evaluate_layers
    from internal_policy.evaluation.results import Evaluation

__all__ = ["Comparison", "Evaluation", "compare", "depth_table", "evaluate", "evaluate_layers", "pass_at_k"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Comparison": "paired_tests",
        "Evaluation": "results",
        "compare": "paired_tests",
        "depth_table": "depth",
        "evaluate": "pipeline",
        "evaluate_layers": "pipeline",
        "pass_at_k": "metrics",
    },
)
