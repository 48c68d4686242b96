"""The results that notebooks/05_paper_figures.ipynb draws, kept without weights from the runs of `bupo_experiment.py`.

python benchmarks/stored_results.py     # some minutes, after `python benchmarks/bupo_experiment.py`

Written to ``data/experiments``: ``runs`` (tables and settings of the main runs), ``analyses`` (both embedded models
before and after GRPO and BuPO) and ``evaluations`` (testbed/qwen3 before and after, a benchmark for each level).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from bupo_experiment import Job, jobs

from internal_policy import analyze, evaluate
from internal_policy.bupo.run import DYNAMICS, DYNAMICS_LAYERS, HISTORY, MANIFEST
from internal_policy.data import arithmetic as tasks

RUNS, TARGET = Path("build/bupo_experiment"), Path("data/experiments")
RESPONSES, PROBLEMS, SAMPLES = 48, 40, 16
LEVELS = (2, 3, 4)
SEED = 20_261_122
"""Seed of the evaluation problems, which differ from those used by `bupo_experiment.py`."""
EVALUATED = "testbed/qwen3"


def keep_run(job: Job) -> None:
    """Copy what `Run.load` reads.

    Args:
        job: the run.
    """
    target = TARGET / "runs" / job.name
    target.mkdir(parents=True, exist_ok=True)
    for name in (HISTORY, DYNAMICS, DYNAMICS_LAYERS, MANIFEST):
        shutil.copyfile(RUNS / job.name / name, target / name)


def states(model: str) -> dict[str, str]:
    """A model before its training and after, seed 0.

    Args:
        model: an embedded model.

    Returns:
        Paths of the weights by their name in the figures.
    """
    short = model.split("/")[1]
    main = [job for job in jobs() if job.part == "main" and job.seed == 0 and job.model == model]
    trained = {f"{short}, {job.method.replace('bupo', 'BuPO').replace('grpo', 'GRPO')}": job.name for job in main}
    return {f"{short}, start": model, **{name: str(RUNS / run / "model") for name, run in trained.items()}}


def keep_analysis(name: str, weights: str) -> None:
    """Analyse a model on its own responses.

    Args:
        name: what figures call it.
        weights: the embedded model, or a directory.
    """
    analysis = analyze(weights, max_responses=RESPONSES, keep_tokens=0)
    replace(analysis, name=name).save(TARGET / "analyses" / name.replace(", ", "-").lower())
    print(name, analysis.boundary_layer, flush=True)


def keep_evaluations(name: str, weights: str, problems: Path) -> None:
    """Evaluate a model on each level.

    Args:
        name: what figures call it.
        weights: the embedded model, or a directory.
        problems: where the problems of each level are.
    """
    for file in sorted(problems.iterdir()):
        found = evaluate(
            weights,
            str(file),
            samples=SAMPLES,
            k=(1, 2, 4, 8, SAMPLES),
            max_new_tokens=44,
            batch_size=256,
            reward="exact",
        )
        target = TARGET / "evaluations" / name.replace(", ", "-").lower() / file.stem.replace(" ", "-")
        replace(found, name=name).save(target)
        print(name, file.stem, found.avg["mean"], flush=True)


def main() -> None:
    """Keep runs, analyses and evaluations."""
    for job in jobs():
        if job.part == "main":
            keep_run(job)
    for model in ("testbed/qwen3", "testbed/llama"):
        for name, weights in states(model).items():
            keep_analysis(name, weights)
    with tempfile.TemporaryDirectory() as folder:
        for level in LEVELS:
            drawn = tasks.problems(PROBLEMS, seed=SEED + level, levels=(level,))
            lines = (json.dumps({"prompt": p.prompt, "answer": p.answer}) + "\n" for p in drawn)
            (Path(folder) / f"level {level}.jsonl").write_text("".join(lines), encoding="utf-8")
        for name, weights in states(EVALUATED).items():
            keep_evaluations(name, weights, Path(folder))


if __name__ == "__main__":
    main()
