"""Internal policies of language models: entropies, boundary layer, training, figures (arXiv 2512.19673v3).

from internal_policy import analyze, bupo

analysis = analyze("testbed/qwen3")
analysis.layers            # DataFrame: entropies and entropy changes per layer and site, nats
analysis.boundary_layer    # from 1, or None: what BuPO aligns first
bupo.train("testbed/qwen3", layer=analysis)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.citation import __version__
from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy import bupo, plotting
    from internal_policy.analysis.config import AnalyzeConfig
    from internal_policy.analysis.layer_selection import Selection, select_layer
    from internal_policy.analysis.pipeline import analyze
    from internal_policy.analysis.results import Analysis
    from internal_policy.analysis.sources import load_analyses
    from internal_policy.analysis.sweep import sweep
    from internal_policy.comparison.convergence import Convergence, convergence_table, measure_convergence
    from internal_policy.comparison.results import AnalysisComparison, compare
    from internal_policy.comparison.study import study
    from internal_policy.comparison.study_results import Study
    from internal_policy.evaluation import Evaluation, evaluate
    from internal_policy.inspection.inspect import inspect
    from internal_policy.inspection.results import Inspection
    from internal_policy.interventions.ablation import ablate
    from internal_policy.interventions.patching import patch
    from internal_policy.interventions.patching_results import Patching
    from internal_policy.interventions.results import Ablation
    from internal_policy.report import write_report
    from internal_policy.utils.errors import UserError


_MODULES = ("bupo", "data", "evaluation", "models", "plotting", "report")
"""Also attributes of the package, as ``internal_policy.plotting``, without an import of their own."""

_HOME = {
    **dict.fromkeys(_MODULES, ""),
    "Ablation": "interventions.results",
    "Analysis": "analysis.results",
    "AnalysisComparison": "comparison.results",
    "AnalyzeConfig": "analysis.config",
    "Convergence": "comparison.convergence",
    "Evaluation": "evaluation.results",
    "Inspection": "inspection.results",
    "Patching": "interventions.patching_results",
    "Selection": "analysis.layer_selection",
    "Study": "comparison.study_results",
    "UserError": "utils.errors",
    "ablate": "interventions.ablation",
    "analyze": "analysis.pipeline",
    "compare": "comparison.results",
    "convergence_table": "comparison.convergence",
    "evaluate": "evaluation.pipeline",
    "inspect": "inspection.inspect",
    "load_analyses": "analysis.sources",
    "measure_convergence": "comparison.convergence",
    "patch": "interventions.patching",
    "select_layer": "analysis.layer_selection",
    "study": "comparison.study",
    "sweep": "analysis.sweep",
    "write_report": "report",
}

__all__ = [
    "Ablation",
    "Analysis",
    "AnalysisComparison",
    "AnalyzeConfig",
    "Convergence",
    "Evaluation",
    "Inspection",
    "Patching",
    "Selection",
    "Study",
    "UserError",
    "__version__",
    "ablate",
    "analyze",
    "bupo",
    "compare",
    "convergence_table",
    "evaluate",
    "inspect",
    "load_analyses",
    "measure_convergence",
    "patch",
    "plotting",
    "select_layer",
    "study",
    "sweep",
    "write_report",
]

__getattr__, __dir__ = lazy_names(__name__, _HOME)
