"""Compare analyses: checkpoints of one training, or different models, per layer and by relative depth.

from internal_policy.comparison import compare, measure_convergence

comparison = compare("data/analyses/a", "data/analyses/b")
print(comparison.differences, comparison.convergence, measure_convergence(analysis).reading)

Importing this package loads nothing heavy, and nothing in it needs a model or torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy.comparison.convergence import Convergence, convergence_table, measure_convergence
    from internal_policy.comparison.results import AnalysisComparison, compare

__all__ = [
    "AnalysisComparison",
    "Convergence",
    "compare",
    "convergence_table",
    "measure_convergence",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AnalysisComparison": "results",
        "Convergence": "convergence",
        "compare": "results",
        "convergence_table": "convergence",
        "measure_convergence": "convergence",
    },
)
