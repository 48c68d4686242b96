"""One stored result of each kind, built without a model."""

from __future__ import annotations

from dataclasses import replace

from plotting_fixtures import make_inspection
from synthetic_analyses import make, progressive
from synthetic_evaluations import evaluation_of_counts
from synthetic_interventions import make_ablation, make_patching

from internal_policy import Study, compare, load_analyses
from internal_policy.comparison.study_presets import StudyModel


def save_one_of_each(root):
    """Two analyses with their study and comparison, an evaluation, an inspection, an ablation and a patching."""
    analyses = (make(progressive(6), name, prompts=4, seed=seed) for seed, name in enumerate(("some/007", "some/NA")))
    one, two = (replace(analysis, config={**analysis.config, "template": "chat"}) for analysis in analyses)
    one.save(root / "analyses" / "007")
    two.save(root / "analyses" / "NA")
    compare(root / "analyses").save(root / "comparison")
    evaluation_of_counts([3, 9, 16]).save(root / "evaluation")
    make_inspection(n_layers=3, n_tokens=12, prompt=5).save(root / "inspection")
    make_ablation(n_layers=3, samples=True).save(root / "ablation")
    make_patching(n_layers=3, n_tokens=5).save(root / "patching")
    rows = tuple(StudyModel(name, "chat") for name in ("some/007", "some/NA"))
    Study(rows, tuple(load_analyses(root / "analyses")), {"other": "why"}).record(root / "analyses")
    return root
