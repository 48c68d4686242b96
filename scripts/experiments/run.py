"""Run the experiments on BuPO: resumable, several runs side by side.

python scripts/experiments/run.py --part e1 --part e2     # what is missing of these parts
python scripts/experiments/run.py --list                  # how many runs each part has, and how many are done

Each run trains on one thread; ``--workers`` of them run at a time. With two at a time on an AMD EPYC, a run of E1 took
about two minutes of a core, and with twelve on a Xeon one of 120 steps took four to five. The tables go to
``data/experiments/PART``, the runs to ``build/experiments/PART``. The exit code is 1 if a run failed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import time
from collections.abc import Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import BATCH, E2_DOSES, PARTS, Job, jobs
from store import DATA, WORK, collect, finished, write_record

from internal_policy.utils.logging import progress

CURVE_EVERY, DYNAMICS_EVERY = 12, 3


def prepare_worker() -> None:
    """Settings of a process that does nothing but runs: one thread, and no word that the line of a run does not say."""
    import logging

    import torch

    logging.getLogger("internal_policy").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def run_job(job: Job, work: Path = WORK) -> str:
    """Train and measure one run, and keep its record.

    Args:
        job: the run.
        work: where runs are kept.

    Returns:
        A line about it.
    """
    import pandas as pd
    import torch
    from measures import FULL_SAMPLES, HeldOut, Perplexities

    from internal_policy import bupo

    started = time.perf_counter()
    mechanism = job.part == "e1"
    full_at = {job.steps}
    if job.part == "e2" and job.method == "grpo":
        # The same number of GRPO steps as in a run that aligned before.
        full_at |= {job.steps - dose for dose in E2_DOSES}
    held_out = HeldOut(0 if mechanism else CURVE_EVERY, full_at, work / "starts" / job.model.replace("/", "--"))
    callbacks: list[Any] = [held_out]
    perplexities = None
    if mechanism:
        perplexities = Perplexities(DYNAMICS_EVERY, job.layer or 1, seed=job.seed)
        callbacks.append(perplexities)
    first: dict[str, Any] = {}
    if job.method == "bupo":
        first = {"layer": job.layer, "ipa_steps": job.ipa_steps, "ipa_learning_rate": job.rate}
    every = DYNAMICS_EVERY if mechanism and job.method == "bupo" else int(job.ipa_steps == "auto")
    path = work / job.part / job.name
    # A run that was cut off begins anew, because the callbacks keep their measurements in memory.
    shutil.rmtree(path, ignore_errors=True)
    run = bupo.train(
        job.model,
        method=job.method,
        seed=job.seed,
        output=path,
        eval_samples=0,
        dynamics_every=every,
        max_steps=job.steps,
        save_steps=job.steps,
        callbacks=callbacks,
        **BATCH,
        **first,
    )
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    curve = pd.DataFrame(held_out.rows)
    start, end = curve.iloc[0], curve.iloc[-1]
    whole = f"pass{FULL_SAMPLES}"
    row = {
        **asdict(job),
        "alignment_steps": run.ipa_steps,
        "alignment_end": run.ipa_reason,
        **{f"{name}_start": start[name] for name in ("avg", whole)},
        **{name: end[name] for name in ("avg", "avg_stderr", whole, "length", "truncated")},
        "entropy_end": run.history["policy_entropy"].iloc[-10:].mean(),
        "seconds": time.perf_counter() - started,
        "torch": torch.__version__,
    }
    columns = ["step", "phase", "reward", "policy_entropy", "length", "truncated", "grad_norm", "clip_ratio"]
    tables = {
        "runs": pd.DataFrame([row]),
        "histories": run.history[[*columns, *(c for c in ("value_loss", "explained_variance") if c in run.history)]],
        "curves": curve,
        "dynamics": run.dynamics.drop(columns=["layer"], errors="ignore"),
        "dynamics_layers": run.dynamics_layers,
        "perplexities": pd.DataFrame(perplexities.rows if perplexities else []),
    }
    named = {name: table.assign(run=job.name) for name, table in tables.items()}
    first_column = {name: table[["run", *table.columns.drop("run")]] for name, table in named.items() if len(table)}
    write_record(job, first_column, work)
    return (
        f"{job.name}: {100 * start['avg']:.1f}% -> {100 * end['avg']:.1f}%, Pass@{FULL_SAMPLES} "
        f"{100 * end[whole]:.1f}%, {row['seconds']:.0f} s"
    )


def missing(parts: Sequence[str], only: str = "", seeds: Collection[int] = ()) -> list[Job]:
    """List the jobs that are still to be run, of some seeds or of all."""
    found = []
    for part in parts:
        done = finished(part)
        found += [job for job in jobs(part) if job.name not in done]
    return [job for job in found if only in job.name and (not seeds or job.seed in seeds)]


def next_job(todo: list[Job], seconds_left: float, step_seconds: float) -> Job | None:
    """Take the first job that will end in time from the list.

    Args:
        todo: jobs in their order; the one taken is removed.
        seconds_left: until the deadline.
        step_seconds: of a training step, measurements included.

    Returns:
        The job, or None if none fits.
    """
    for place, job in enumerate(todo):
        if job.steps * step_seconds <= seconds_left:
            return todo.pop(place)
    return None


def main() -> None:
    """Run what is missing, and write the tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="a part; all of them by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--only", default="", help="only the runs whose name contains this")
    parser.add_argument("--seed", type=int, action="append", default=[], help="only this seed; may be repeated")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run that will not end by then")
    parser.add_argument("--list", action="store_true", help="only say what is done")
    args = parser.parse_args()
    parts = args.part or list(PARTS)
    if args.list:
        for part in parts:
            print(f"{part}: {len(finished(part))} of {len(jobs(part))} runs done")
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    todo = missing(parts, args.only, args.seed)
    started, failed, step_seconds = time.monotonic(), 0, 0.0
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(args.workers, mp_context=context, initializer=prepare_worker) as pool,
        progress("runs of the experiments", len(todo)) as advance,
    ):
        running: dict[Future[str], tuple[Job, float]] = {}
        while True:
            left = started + 60 * args.minutes - time.monotonic()
            while len(running) < args.workers and (job := next_job(todo, left, step_seconds)) is not None:
                running[pool.submit(run_job, job)] = job, time.monotonic()
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                job, began = running.pop(future)
                # The longest, because a run that the deadline cuts off is lost.
                step_seconds = max(step_seconds, (time.monotonic() - began) / job.steps)
                try:
                    line = future.result()
                except Exception as error:
                    line, failed = f"{job.name}: failed: {type(error).__name__}: {error}", failed + 1
                print(line, flush=True)
                advance(1)
                collect(job.part)
    for part in parts:
        print(f"{part}: {len(finished(part))} of {len(jobs(part))} runs in {DATA / part}")
    if failed:
        raise SystemExit(f"{failed} failed; the same command tries them again")


if __name__ == "__main__":
    main()
