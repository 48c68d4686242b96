"""The results that notebooks/05_paper_figures.ipynb draws, kept without weights from runs of E1 and E2.

python scripts/experiments/stored_results.py     # some minutes, on the machine that has run.py's build/experiments

Written to ``data/experiments``: ``alignment`` (tables and settings of runs that only align, one a layer), ``runs`` (the
same of GRPO and of BuPO with a tenth of the steps for alignment, every seed that was run here), ``analyses`` (both
embedded models before and after GRPO and BuPO) and ``evaluations`` (testbed/qwen3 before and after, a benchmark for
each level). ``alignment`` is replaced if its runs are there, and the others if all runs of seed 0 are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from jobs import LEARNING_RATE, MODELS, Job, jobs
from store import DATA, WORK

from internal_policy import analyze, evaluate
from internal_policy.bupo.run import DYNAMICS, DYNAMICS_LAYERS, HISTORY, MANIFEST, Run
from internal_policy.data import arithmetic as tasks
from internal_policy.utils.errors import UserError

DOSE = 12
WATCHED_RATE = 1e-4
"""Rate of the runs of E1 that are drawn, a layer each."""
RESPONSES, PROBLEMS, SAMPLES = 48, 40, 16
LEVELS = (2, 3, 4)
SEED = 20_261_122
"""Seed of the evaluation problems, which differ from those on which runs are measured."""
EVALUATED = "testbed/qwen3"


def main_jobs() -> list[Job]:
    """GRPO, and BuPO at the boundary layer with a tenth of the steps, all seeds."""
    wanted = {"bupo": (DOSE, LEARNING_RATE), "grpo": (0, LEARNING_RATE)}
    return [job for job in jobs("e2") if wanted[job.method] == (job.ipa_steps, job.rate)]


def watched_jobs() -> list[Job]:
    """The runs of E1 that are drawn, one of each model and layer."""
    return [job for job in jobs("e1") if (job.method, job.rate, job.seed) == ("bupo", WATCHED_RATE, 0)]


def missing(needed: Sequence[Job], work: Path = WORK) -> list[Job]:
    """The runs that have not finished on this machine, whose model is gone, or whose tables are of another attempt."""
    return [job for job in needed if not ((_path(job, work) / "model").exists() and _is_whole(_path(job, work)))]


def _is_whole(path: Path) -> bool:
    try:
        Run.load(path)
    except UserError:
        return False
    return True


def _path(job: Job, work: Path = WORK) -> Path:
    return work / job.part / job.name


def keep_runs(found: Sequence[Job], target: Path, work: Path = WORK) -> None:
    """Copy what `Run.load` reads, in place of the runs that were kept before.

    Args:
        found: runs on this machine.
        target: the directory of all kept runs.
        work: where runs are.
    """
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        for job in found:
            (fresh / job.name).mkdir()
            for name in (HISTORY, DYNAMICS, DYNAMICS_LAYERS, MANIFEST):
                if (_path(job, work) / name).is_file():
                    shutil.copyfile(_path(job, work) / name, fresh / job.name / name)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(fresh, target)


def states(model: str, work: Path = WORK) -> dict[str, str]:
    """A model before its training and after, seed 0.

    Args:
        model: an embedded model.
        work: where runs are.

    Returns:
        Paths of the weights by their name in the figures.
    """
    short = model.split("/")[1]
    main = {job.method: job for job in main_jobs() if job.seed == 0 and job.model == model}
    labels = {"grpo": "GRPO", "bupo": "BuPO"}
    trained = {f"{short}, {label}": str(_path(main[method], work) / "model") for method, label in labels.items()}
    return {f"{short}, start": model, **trained}


def keep_analysis(name: str, weights: str) -> None:
    """Analyse a model on its own responses.

    Args:
        name: what figures call it.
        weights: the embedded model, or a directory.
    """
    analysis = analyze(weights, max_responses=RESPONSES, keep_tokens=0)
    replace(analysis, name=name).save(DATA / "analyses" / name.replace(", ", "-").lower())
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
        target = DATA / "evaluations" / name.replace(", ", "-").lower() / file.stem.replace(" ", "-")
        replace(found, name=name).save(target)
        print(name, file.stem, found.avg["mean"], flush=True)


def main() -> None:
    """Keep runs, analyses and evaluations."""
    if not missing(watched_jobs()):
        keep_runs(watched_jobs(), DATA / "alignment")
    first = [job for job in main_jobs() if job.seed == 0]
    if absent := missing([*first, *watched_jobs()]):
        print(
            f"{len(absent)} runs are not in {WORK} on this machine, such as {absent[0].name}; what is stored was left "
            f"as it is. To replace it, remove them from {DATA}/PART/runs.csv and run scripts/experiments/run.py"
        )
    if missing(first):
        return
    gone = {job.name for job in missing(main_jobs())}
    keep_runs([job for job in main_jobs() if job.name not in gone], DATA / "runs")
    for model in MODELS:
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
