"""GRPO against BuPO on the embedded models: seeds, layers, lengths and learning rates of the first phase.

python benchmarks/bupo_experiment.py             # everything, about two hours on a free core; resumable
python benchmarks/bupo_experiment.py --short     # one model, one seed, a few minutes: part of `make demo`

Every run starts from the same checkpoint, sees the same prompts for the same seed, and is evaluated on the same
held-out problems with the same random streams. Runs are kept in ``build/bupo_experiment``; the tables go to
``data/experiments/bupo`` and the figures to ``figures/experiments/bupo``. Those of ``--short`` are kept where the
command ``train`` keeps its runs, in ``data/runs``, and their tables and figures go to ``build/demo``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import demo_summary
import numpy as np
import pandas as pd
import torch
from scipy import stats

from internal_policy import bupo
from internal_policy.bupo.run import write_table
from internal_policy.cli.display import list_files
from internal_policy.evaluation import Evaluation, compare, evaluate
from internal_policy.plotting.style import save_figure
from internal_policy.plotting.training import alignment_dynamics, policy_entropy_curves, training_curves
from internal_policy.utils.errors import UserError

BOUNDARY = {"testbed/qwen3": 7, "testbed/llama": 6}
"""The boundary layer found by `internal-policy analyze`."""
SETTING: dict[str, Any] = {
    "max_steps": 30,
    "prompts_per_step": 8,
    "num_generations": 8,
    "mini_batches": 2,
    "learning_rate": 1e-4,
    "entropy_sequences": 32,
}
ALIGNMENT_STEPS = 3
SEEDS = range(5)
FEWER_SEEDS = range(3)
PROBLEMS, SAMPLES = 512, 2


@dataclass(frozen=True)
class Job:
    """One run."""

    part: str
    """The part of the experiment: main, layers, steps, rate, lens or site."""
    model: str
    method: str = "grpo"
    layer: int | None = None
    ipa_steps: int = 0
    ipa_learning_rate: float | None = None
    site: str = "layer"
    lens: str = "policy"
    seed: int = 0

    @property
    def name(self) -> str:
        """A directory's name."""
        if self.method == "grpo":
            return f"{self.model.split('/')[1]}-grpo-seed{self.seed}"
        rate = "" if self.ipa_learning_rate is None else f"-lr{self.ipa_learning_rate:g}"
        other = "".join(f"-{x}" for x in (self.site, self.lens) if x not in ("layer", "policy"))
        return f"{self.model.split('/')[1]}-bupo-l{self.layer}-s{self.ipa_steps}{rate}{other}-seed{self.seed}"


def jobs() -> list[Job]:
    """List all runs, the most telling first.

    Returns:
        The jobs.
    """
    found: list[Job] = []
    for seed in SEEDS:
        for model, boundary in BOUNDARY.items():
            first = Job("main", model, "bupo", boundary, ALIGNMENT_STEPS, seed=seed)
            found += [Job("main", model, seed=seed), first]
            if seed in FEWER_SEEDS:
                found += [replace(first, part="steps", ipa_steps=n) for n in (1, 6, 15)]
                found += [replace(first, part="layers", layer=n) for n in (2, 4, 8)]
                found += [replace(first, part="rate", ipa_learning_rate=rate) for rate in (1e-5, 3e-4)]
            if seed == 0:
                found.append(replace(first, part="rate", ipa_learning_rate=1e-3))
                found.append(replace(first, part="lens", lens="logit-lens"))
                found += [replace(first, part="site", site=site) for site in ("attn", "ffn")]
    # The main comparison comes before the sweeps' further seeds.
    return sorted(found, key=lambda job: (job.seed > 0, job.part != "main"))


def run_job(
    job: Job, root: Path, setting: dict[str, Any], problems: int, start: Evaluation
) -> tuple[bupo.Run, Evaluation]:
    """Train and evaluate, or read the stored run.

    Args:
        job: the run.
        root: where runs are kept.
        setting: options of `bupo.train`.
        problems: held-out problems.
        start: the evaluation of the frozen start on these.

    Returns:
        The run, which has both evaluations, and that of its model.
    """
    watched = job.part == "main" and job.seed == 0 and job.method == "bupo"
    first: dict[str, Any] = (
        {} if job.method == "grpo" else {"ipa_steps": job.ipa_steps, "site": job.site, "lens": job.lens}
    )
    if job.ipa_learning_rate is not None:
        first["ipa_learning_rate"] = job.ipa_learning_rate
    run = bupo.train(
        job.model,
        method=job.method,
        layer=job.layer,
        seed=job.seed,
        output=root / job.name,
        eval_samples=0,
        dynamics_every=1 if watched else 0,
        save_steps=setting["max_steps"],
        **first,
        **setting,
    )
    end = measured(run.model_dir, root / job.name / "held-out", problems)
    return bupo.attach_evaluations(run, start, end), end


def measured(model: Path | str, output: Path, problems: int) -> Evaluation:
    """Evaluate on the held-out problems.

    Args:
        model: a directory or an embedded model.
        output: where the evaluation is kept.
        problems: how many.

    Returns:
        The evaluation.
    """
    return evaluate(
        model, "testbed", samples=SAMPLES, max_problems=problems, max_new_tokens=44, batch_size=256, output=output
    )


def row_of(job: Job, run: bupo.Run, start: Evaluation, end: Evaluation) -> dict[str, Any]:
    """One line of ``runs.csv``.

    Args:
        job: the run.
        run: its result.
        start: the frozen start on the held-out problems.
        end: the trained model on the same.

    Returns:
        Accuracy, lift over the frozen start with its 95% interval over problems, and what the run cost.
    """
    lift = compare(end, start)
    return {
        **asdict(job),
        "accuracy_start": start.avg["mean"],
        "accuracy": end.avg["mean"],
        "lift": lift.difference,
        "lift_low": lift.low,
        "lift_high": lift.high,
        "reward_mean": run.history["reward"].mean(),
        "entropy_end": run.history["policy_entropy"].iloc[-1],
        "length_end": run.history["length"].iloc[-1],
        "seconds": run.timings["training"],
    }


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and the difference from GRPO with the same seeds.

    Args:
        runs: ``runs.csv``.

    Returns:
        One row per setting: lift with 95% t-interval over seeds, difference from GRPO paired by seed with the same.
        They refer to these problems and this start, which all runs share.
    """
    setting = ["part", "model", "method", "layer", "ipa_steps", "ipa_learning_rate", "site", "lens"]
    grpo = runs[runs["method"] == "grpo"].set_index(["model", "seed"])["lift"]
    rows = []
    for key, group in runs.groupby(setting, dropna=False, sort=False):
        values: tuple[Any, ...] = key
        against = group.set_index(["model", "seed"])["lift"].sub(grpo).dropna()
        is_grpo = (group["method"] == "grpo").all()
        rows.append(
            {
                **dict(zip(setting, values, strict=True)),
                "seeds": len(group),
                **_interval("lift", group["lift"].to_numpy()),
                **_interval("over_grpo", np.array([]) if is_grpo else against.to_numpy()),
                "entropy_end": group["entropy_end"].mean(),
                "seconds": group["seconds"].median(),
            }
        )
    return pd.DataFrame(rows)


def _interval(name: str, values: Any) -> dict[str, float]:
    n = len(values)
    mean = float(np.mean(values)) if n else float("nan")
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def draw(done: Sequence[tuple[Job, bupo.Run]], directory: Path) -> list[Path]:
    """Draw figures 4, 5 and 7 of the main runs.

    Args:
        done: jobs with their runs.
        directory: where the figures go.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for model in BOUNDARY:
        runs = [run for job, run in done if job.part == "main" and job.model == model]
        if not runs:
            continue
        short = model.split("/")[1]
        written += save_figure(training_curves(runs, smooth=5), directory / f"fig4_training_{short}")
        written += save_figure(policy_entropy_curves(runs, smooth=5), directory / f"fig7_entropy_{short}")
        for run in runs:
            if len(run.dynamics):
                written += save_figure(alignment_dynamics(run), directory / f"fig5_dynamics_{short}")
    return written


def main() -> None:
    """Run the missing jobs; write tables and figures after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one model, one seed, ten steps")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; small models gain nothing from more")
    parser.add_argument("--only", default="", help="only the jobs whose name contains this")
    args = parser.parse_args()
    # Stored runs are recognised by their line of results.
    logging.getLogger("internal_policy").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    setting, todo, problems = dict(SETTING), jobs(), PROBLEMS
    root, data, figures = Path("build/bupo_experiment"), Path("data/experiments/bupo"), Path("figures/experiments/bupo")
    if args.short:
        setting["max_steps"], problems = 10, 128
        todo = [
            Job("main", "testbed/qwen3"),
            Job("main", "testbed/qwen3", "bupo", BOUNDARY["testbed/qwen3"], 1),
        ]
        root, data, figures = Path("data/runs"), Path("build/demo/data"), Path("build/demo/figures")
        print(f"training testbed/qwen3 for {setting['max_steps']} steps with GRPO, then with BuPO: a minute or two")
    order = {job.name: place for place, job in enumerate(todo)}
    # Stored results are read first, so that the tables never lose a finished run.
    todo.sort(key=lambda job: not (root / job.name / "run.json").is_file())
    todo = [job for job in todo if args.only in job.name]
    starts: dict[str, Evaluation] = {}
    rows, histories, done = [], [], []
    for number, job in enumerate(todo, start=1):
        fresh = not (root / job.name / "run.json").is_file()
        if job.model not in starts:
            starts[job.model] = measured(job.model, data.parent / "start" if args.short else root / "start", problems)
        try:
            run, end = run_job(job, root, setting, problems, starts[job.model])
        except UserError as error:
            raise SystemExit(f"{job.name}: {error}") from error
        rows.append({"run": job.name, **row_of(job, run, starts[job.model], end)})
        histories.append(run.history.assign(run=job.name, model=job.model, method=job.method, seed=job.seed))
        done.append((job, run))
        told = rows[-1]
        print(
            f"[{number}/{len(todo)}] {job.name}: {told['accuracy_start']:.3f} -> {told['accuracy']:.3f} "
            f"({told['lift']:+.3f}, 95% {told['lift_low']:+.3f} to {told['lift_high']:+.3f}), {told['seconds']:.0f} s",
            flush=True,
        )
        if (fresh or number == len(todo)) and not args.only:
            data.mkdir(parents=True, exist_ok=True)
            table = pd.DataFrame(rows).sort_values("run", key=lambda names: names.map(order), ignore_index=True)
            write_table(data / "runs.csv", table)
            write_table(data / "summary.csv", summary(table))
            write_table(data / "histories.csv", pd.concat(histories, ignore_index=True).round(5))
    list_files("figures", draw(done, figures))
    print(f"\n{demo_summary.shown(summary(pd.DataFrame(rows)))}")
    if args.short and not args.only:
        print(demo_summary.end(list(BOUNDARY), [run for _, run in done]))


if __name__ == "__main__":
    main()
