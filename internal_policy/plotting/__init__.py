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
    from internal_policy.plotting.analysis import *  # noqa: F403
    from internal_policy.plotting.comparison import *  # noqa: F403
    from internal_policy.plotting.depth import *  # noqa: F403
    from internal_policy.plotting.divergences import *  # noqa: F403
    from internal_policy.plotting.evaluation import *  # noqa: F403
    from internal_policy.plotting.evidence import *  # noqa: F403
    from internal_policy.plotting.heads import *  # noqa: F403
    from internal_policy.plotting.inspection import *  # noqa: F403
    from internal_policy.plotting.interventions import *  # noqa: F403
    from internal_policy.plotting.parts import *  # noqa: F403
    from internal_policy.plotting.study import *  # noqa: F403
    from internal_policy.plotting.style import paper_style as paper_style
    from internal_policy.plotting.style import save_figure as save_figure
    from internal_policy.plotting.token_groups import *  # noqa: F403
    from internal_policy.plotting.training import *  # noqa: F403
    from internal_policy.plotting.transfer import *  # noqa: F403

_HOME = {
    "accuracy_over_depth": "depth",
    "accuracy_over_depth_data": "depth",
    "ablation_bars": "interventions",
    "ablation_data": "interventions",
    "ablation_map": "interventions",
    "alignment_dynamics": "training",
    "baseline_data": "analysis",
    "change_parts": "parts",
    "change_parts_data": "parts",
    "depth_differences": "comparison",
    "depth_overlay": "comparison",
    "divergence_data": "divergences",
    "divergence_matrix": "divergences",
    "divergence_matrix_data": "divergences",
    "entropy_change": "analysis",
    "entropy_change_data": "analysis",
    "entropy_fall": "comparison",
    "entropy_flow": "analysis",
    "entropy_flow_data": "analysis",
    "expert_map": "heads",
    "expert_map_data": "heads",
    "head_map": "heads",
    "head_map_data": "heads",
    "grouped_change": "token_groups",
    "grouped_change_data": "token_groups",
    "heat_maps": "comparison",
    "inspection_data": "inspection",
    "inspection_map": "inspection",
    "layer_differences": "comparison",
    "layer_evidence_figure": "evidence",
    "save_layer_evidence": "evidence",
    "layer_divergences": "divergences",
    "layer_lines": "comparison",
    "layer_accuracy": "depth",
    "layer_accuracy_data": "depth",
    "layer_transfer": "transfer",
    "paper_style": "style",
    "pass_at_k": "evaluation",
    "pass_at_k_by_benchmark": "evaluation",
    "pass_at_k_data": "evaluation",
    "plot_accuracy_over_depth": "depth",
    "patching_data": "interventions",
    "patching_map": "interventions",
    "plot_change_parts": "parts",
    "plot_divergence_matrix": "divergences",
    "plot_entropy_change": "analysis",
    "plot_entropy_flow": "analysis",
    "plot_expert_map": "heads",
    "plot_head_map": "heads",
    "plot_grouped_change": "token_groups",
    "plot_inspection": "inspection",
    "plot_layer_divergences": "divergences",
    "plot_layer_transfer": "transfer",
    "plot_pass_at_k": "evaluation",
    "plot_residual_cosine": "analysis",
    "plot_top1_agreement": "divergences",
    "policy_entropy_curves": "training",
    "residual_cosine": "analysis",
    "residual_cosine_data": "analysis",
    "save_ablation_figures": "interventions",
    "save_analysis_figures": "analysis",
    "save_comparison_figures": "comparison",
    "save_depth_figures": "depth",
    "save_divergence_figures": "divergences",
    "save_evaluation_figures": "evaluation",
    "save_figure": "style",
    "save_inspection_figures": "inspection",
    "save_patching_figures": "interventions",
    "save_study": "study",
    "save_training_figures": "training",
    "save_transfer_figures": "transfer",
    "stage_sketch": "analysis",
    "stage_sketch_data": "analysis",
    "training_curves": "training",
    "training_curves_data": "training",
    "transfer_data": "transfer",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_names(__name__, _HOME)
