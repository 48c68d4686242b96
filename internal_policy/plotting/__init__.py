"""The figures of the paper and those of comparisons, inspections and evaluations; nothing here needs a model.

from internal_policy import plotting

plotting.entropy_change(analysis).savefig("change.pdf")
plotting.training_curves([bupo_run, grpo_run])

Every function that draws takes one result or several; ``NAME_data`` gives the numbers that ``NAME`` draws.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy.plotting.analysis import (
        baseline_data,
        entropy_change,
        entropy_change_data,
        entropy_flow,
        entropy_flow_data,
        plot_entropy_change,
        plot_entropy_flow,
        plot_residual_cosine,
        residual_cosine,
        residual_cosine_data,
        save_analysis_figures,
        stage_sketch,
        stage_sketch_data,
    )
    from internal_policy.plotting.comparison import (
        depth_differences,
        depth_overlay,
        entropy_fall,
        heat_maps,
        layer_differences,
        layer_lines,
        save_comparison_figures,
    )
    from internal_policy.plotting.evaluation import (
        pass_at_k,
        pass_at_k_by_benchmark,
        pass_at_k_data,
        plot_pass_at_k,
        save_evaluation_figures,
    )
    from internal_policy.plotting.inspection import (
        inspection_data,
        inspection_map,
        plot_inspection,
        save_inspection_figures,
    )
    from internal_policy.plotting.study import save_study
    from internal_policy.plotting.style import paper_style, save_figure
    from internal_policy.plotting.training import (
        alignment_dynamics,
        policy_entropy_curves,
        save_training_figures,
        training_curves,
        training_curves_data,
    )

_HOME = {
    "analysis": (
        "baseline_data",
        "entropy_change",
        "entropy_change_data",
        "entropy_flow",
        "entropy_flow_data",
        "plot_entropy_change",
        "plot_entropy_flow",
        "plot_residual_cosine",
        "residual_cosine",
        "residual_cosine_data",
        "save_analysis_figures",
        "stage_sketch",
        "stage_sketch_data",
    ),
    "comparison": (
        "depth_differences",
        "depth_overlay",
        "entropy_fall",
        "heat_maps",
        "layer_differences",
        "layer_lines",
        "save_comparison_figures",
    ),
    "evaluation": (
        "pass_at_k",
        "pass_at_k_by_benchmark",
        "pass_at_k_data",
        "plot_pass_at_k",
        "save_evaluation_figures",
    ),
    "inspection": ("inspection_data", "inspection_map", "plot_inspection", "save_inspection_figures"),
    "study": ("save_study",),
    "style": ("paper_style", "save_figure"),
    "training": (
        "alignment_dynamics",
        "policy_entropy_curves",
        "save_training_figures",
        "training_curves",
        "training_curves_data",
    ),
}

__all__ = [
    "alignment_dynamics",
    "baseline_data",
    "depth_differences",
    "depth_overlay",
    "entropy_change",
    "entropy_change_data",
    "entropy_fall",
    "entropy_flow",
    "entropy_flow_data",
    "heat_maps",
    "inspection_data",
    "inspection_map",
    "layer_differences",
    "layer_lines",
    "paper_style",
    "pass_at_k",
    "pass_at_k_by_benchmark",
    "pass_at_k_data",
    "plot_entropy_change",
    "plot_entropy_flow",
    "plot_inspection",
    "plot_pass_at_k",
    "plot_residual_cosine",
    "policy_entropy_curves",
    "residual_cosine",
    "residual_cosine_data",
    "save_analysis_figures",
    "save_comparison_figures",
    "save_evaluation_figures",
    "save_figure",
    "save_inspection_figures",
    "save_study",
    "save_training_figures",
    "stage_sketch",
    "stage_sketch_data",
    "training_curves",
    "training_curves_data",
]

__getattr__, __dir__ = lazy_names(__name__, {name: module for module, names in _HOME.items() for name in names})
