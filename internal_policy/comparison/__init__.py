"""Compare analyses: checkpoints of one training, or different models, per layer and by relative depth.

from internal_policy.comparison import compare, measure_convergence

comparison = compare("data/analyses/a", "data/analyses/b")
print(comparison.differences, comparison.convergence, measure_convergence(analysis).reading)

Importing this package loads nothing heavy, and nothing in it needs a model or torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internal_policy.comparison.analyses import AnalysisComparison, compare
    from internal_policy.comparison.convergence import Convergence, convergence_table, measure_convergence
    from internal_policy.comparison.figures import save_all_comparisons

_HOME = {
    "AnalysisComparison": "analyses",
    "Convergence": "convergence",
    "compare": "analyses",
    "convergence_table": "convergence",
    "measure_convergence": "convergence",
    "save_all_comparisons": "figures",
}

__all__ = [
    "AnalysisComparison",
    "Convergence",
    "compare",
    "convergence_table",
    "measure_convergence",
    "save_all_comparisons",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
