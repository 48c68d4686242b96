"""The trainings of `make demo`: ten steps of GRPO and of BuPO on an embedded model, evaluated on the same problems.

python benchmarks/demo_training.py     # a minute or two

Both runs start from the same checkpoint, see the same prompts, and are evaluated on the same held-out problems with the
same random streams. They are kept where the command ``train`` keeps its runs, in ``data/runs``; table and figures go to
``build/demo``. `scripts/experiments` has the experiments whose results are reported.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_summary
import pandas as pd
import torch

from internal_policy import bupo
from internal_policy.bupo.run import write_table
from internal_policy.cli.display import list_files
from internal_policy.evaluation import Evaluation, compare, evaluate
from internal_policy.plotting.style import save_figure
from internal_policy.plotting.training import alignment_dynamics, policy_entropy_curves, training_curves
from internal_policy.utils.errors import UserError

MODELS = ("testbed/qwen3", "testbed/llama")
"""Models that the demo has analysed before."""
MODEL, LAYER = "testbed/qwen3", 7
"""The trained model, and its boundary layer as found by `internal-policy analyze`."""
SETTING: dict[str, Any] = {
    "max_steps": 10,
    "prompts_per_step": 8,
    "num_generations": 8,
    "mini_batches": 2,
    "learning_rate": 1e-4,
    "entropy_sequences": 32,
}
PROBLEMS, SAMPLES = 128, 2
RUNS, DATA, FIGURES = Path("data/runs"), Path("build/demo/data"), Path("build/demo/figures")


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str = "grpo"
    layer: int | None = None
    ipa_steps: int = 0

    @property
    def name(self) -> str:
        """A directory's name."""
        short = MODEL.split("/")[1]
        how = self.method if self.method == "grpo" else f"{self.method}-l{self.layer}-s{self.ipa_steps}"
        return f"{short}-{how}-seed0"


JOBS = (Job(), Job("bupo", LAYER, 1))


def run_job(job: Job, start: Evaluation) -> tuple[bupo.Run, Evaluation]:
    """Train and evaluate, or read the stored run.

    Args:
        job: the run.
        start: the evaluation of the frozen start.

    Returns:
        The run, which has both evaluations, and that of its model.
    """
    aligned = job.method == "bupo"
    first: dict[str, Any] = {"ipa_steps": job.ipa_steps} if aligned else {}
    run = bupo.train(
        MODEL,
        method=job.method,
        layer=job.layer,
        output=RUNS / job.name,
        eval_samples=0,
        dynamics_every=1 if aligned else 0,
        save_steps=SETTING["max_steps"],
        **first,
        **SETTING,
    )
    end = measured(run.model_dir, RUNS / job.name / "held-out")
    return bupo.attach_evaluations(run, start, end), end


def measured(model: Path | str, output: Path) -> Evaluation:
    """Evaluate on the held-out problems.

    Args:
        model: a directory or an embedded model.
        output: where the evaluation is kept.

    Returns:
        The evaluation.
    """
    return evaluate(
        model, "testbed", samples=SAMPLES, max_problems=PROBLEMS, max_new_tokens=44, batch_size=256, output=output
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
        **{"run": job.name, "model": MODEL, "method": job.method, "layer": job.layer, "ipa_steps": job.ipa_steps},
        **{"accuracy_start": start.avg["mean"], "accuracy": end.avg["mean"]},
        **{"lift": lift.difference, "lift_low": lift.low, "lift_high": lift.high},
        **{"entropy_end": run.history["policy_entropy"].iloc[-1], "seconds": run.timings["training"]},
    }


def draw(runs: Sequence[bupo.Run], directory: Path) -> list[Path]:
    """Draw figures 4, 5 and 7.

    Args:
        runs: the trainings.
        directory: where the figures go.

    Returns:
        The files.
    """
    short = MODEL.split("/")[1]
    written = save_figure(training_curves(runs, smooth=5), directory / f"fig4_training_{short}")
    written += save_figure(policy_entropy_curves(runs, smooth=5), directory / f"fig7_entropy_{short}")
    for run in runs:
        if len(run.dynamics):
            written += save_figure(alignment_dynamics(run), directory / f"fig5_dynamics_{short}")
    return written


def main() -> None:
    """Run what is missing; write table and figures, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="torch threads; small models gain nothing from more")
    args = parser.parse_args()
    # Stored runs are recognised by their line of results.
    logging.getLogger("internal_policy").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    print(f"training {MODEL} for {SETTING['max_steps']} steps with GRPO, then with BuPO: a minute or two")
    start = measured(MODEL, DATA.parent / "start")
    rows, runs = [], []
    for number, job in enumerate(JOBS, start=1):
        try:
            run, end = run_job(job, start)
        except UserError as error:
            raise SystemExit(f"{job.name}: {error}") from error
        row = row_of(job, run, start, end)
        rows.append(row)
        runs.append(run)
        print(
            f"[{number}/{len(JOBS)}] {job.name}: {row['accuracy_start']:.3f} -> {row['accuracy']:.3f} "
            f"({row['lift']:+.3f}, 95% {row['lift_low']:+.3f} to {row['lift_high']:+.3f}), {row['seconds']:.0f} s",
            flush=True,
        )
    table = pd.DataFrame(rows)
    DATA.mkdir(parents=True, exist_ok=True)
    write_table(DATA / "runs.csv", table)
    list_files("figures", draw(runs, FIGURES))
    print(f"\n{demo_summary.shown(table)}")
    print(demo_summary.end(list(MODELS), runs))


if __name__ == "__main__":
    main()
