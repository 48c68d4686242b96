"""Internal policies of language models: entropies, boundary layer, training, figures (arXiv 2512.19673v3).

from internal_policy import analyze, bupo

analysis = analyze("testbed/qwen3")
analysis.layers            # DataFrame: entropies and entropy changes per layer and site, nats
analysis.boundary_layer    # from 1, or None: what BuPO aligns first
bupo.train("testbed/qwen3", layer=analysis)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from internal_policy.quiet import import_quietly

if TYPE_CHECKING:
    from internal_policy import bupo, figures
    from internal_policy.comparison.analyses import AnalysisComparison, compare
    from internal_policy.comparison.convergence import Convergence, convergence_table, measure_convergence
    from internal_policy.config import AnalyzeConfig
    from internal_policy.errors import UserError
    from internal_policy.evaluation import Evaluation, evaluate
    from internal_policy.inspection.look import inspect
    from internal_policy.inspection.results import Inspection
    from internal_policy.pipeline import analyze
    from internal_policy.report import write_report
    from internal_policy.results import Analysis
    from internal_policy.selection import Selection, select_layer
    from internal_policy.studies import study
    from internal_policy.study_results import Study
    from internal_policy.sweeps import sweep

__version__ = "0.1.0"

_HOME = {
    "Analysis": "results",
    "AnalysisComparison": "comparison.analyses",
    "AnalyzeConfig": "config",
    "Convergence": "comparison.convergence",
    "Evaluation": "evaluation",
    "Inspection": "inspection.results",
    "Selection": "selection",
    "Study": "study_results",
    "UserError": "errors",
    "analyze": "pipeline",
    "compare": "comparison.analyses",
    "convergence_table": "comparison.convergence",
    "evaluate": "evaluation",
    "inspect": "inspection.look",
    "measure_convergence": "comparison.convergence",
    "select_layer": "selection",
    "study": "studies",
    "sweep": "sweeps",
    "write_report": "report",
}

_MODULES = ("bupo", "evaluation", "figures", "models", "report", "testbed")
"""Also to be had from the package, as ``internal_policy.figures``, without an import of their own."""

__all__ = [
    "Analysis",
    "AnalysisComparison",
    "AnalyzeConfig",
    "Convergence",
    "Evaluation",
    "Inspection",
    "Selection",
    "Study",
    "UserError",
    "analyze",
    "bupo",
    "compare",
    "convergence_table",
    "evaluate",
    "figures",
    "inspect",
    "measure_convergence",
    "select_layer",
    "study",
    "sweep",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``import internal_policy`` costs nothing."""
    if name in _MODULES:
        return import_quietly(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(import_quietly(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
