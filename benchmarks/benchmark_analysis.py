"""Cost of an analysis: this package against other methods for the same entropies, and against the bare arithmetic.

python benchmarks/benchmark_analysis.py                    # all parts: some 40 minutes on two cores, 12 GiB of memory
python benchmarks/benchmark_analysis.py --parts embedded scaling
python benchmarks/benchmark_analysis.py --quick            # every part at small sizes, a few minutes, nothing kept
python benchmarks/benchmark_analysis.py --report           # only the page and the figure, from what was measured

Parts: ``embedded`` (testbed/qwen3 on its own responses), ``large`` (the shape of Qwen3-0.6B with random weights, a
few repeats), ``accuracy`` (the figures of a few tokens against float64), ``long`` (a longer response, once, for the
memory), ``sampled`` (several as long with a tolerance, once), ``scaling`` (cost against tokens, layers and V at a small
width), ``options`` (what each option adds, on testbed/qwen3 and at that small width) and ``training`` (analysis against
BuPO, as the paper's table 7). Each run of a contender is a process of its
own; repeats are interleaved. The figures go to ``data/benchmarks/analysis-<machine>.json``, part by part, and from
there to ``docs/benchmarks.md`` and ``figures/benchmarks``; with --quick to ``build/benchmarks``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import analysis_report as report
import numpy as np
import torch
from analysis_contenders import OPTIONS
from analysis_jobs import LARGE, MODEL, SMALL, Job, own_responses, random_response

from internal_policy import analyze
from internal_policy.utils.io import write_text
from internal_policy.utils.logging import quiet_libraries

LAYER = 7
"""Boundary layer of the embedded model, as `internal-policy analyze` finds it."""
SCALES = {
    "tokens": (64, 128, 256, 512, 1024),
    "num_hidden_layers": (2, 4, 8, 16, 32),
    "vocab_size": (8_192, 16_384, 32_768, 65_536, 131_072),
}
SCALING_TOKENS = 128
AGREEMENT = 2e-4
"""Nats by which the mean of any layer and state may differ between contenders. torch's own float32 softmax over 151936
logits is up to 1e-4 off float64 in the mean, and the other contenders inherit it; ours are within 2e-6 of float64."""
ACCURACY_TOKENS = 8
PARTS = ("embedded", "large", "accuracy", "long", "sampled", "scaling", "options", "training")
OPTION_TOKENS = 256
_EXACT = ("ours", "paper", "transformer-lens", "floor")


def run_contender(contender: str, jobs: Sequence[Job], directory: Path) -> list[dict[str, Any]]:
    """Run a contender in a subprocess.

    Args:
        contender: key of ``CONTENDERS``.
        jobs: what it does, one after the other.
        directory: where its ``found-<job>.npz`` go.

    Returns:
        What was measured of each job.
    """
    directory.mkdir(parents=True)
    given = directory / "jobs.json"
    given.write_text(json.dumps([asdict(job) for job in jobs]))
    worker = Path(__file__).with_name("analysis_worker.py")
    done = subprocess.run([sys.executable, worker, contender, given, directory], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stderr[-3000:]}")
    measured: list[dict[str, Any]] = json.loads((directory / "measured.json").read_text())
    for one in measured:
        memory = "unknown" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:.0f} MiB"
        print(f"  {contender}: {one['seconds']:.2f} s, {memory} above the model, {one['tokens']} tokens", flush=True)
    return measured


def side_by_side(job: Job, contenders: Sequence[str], repeats: int) -> dict[str, Any]:
    """Run contenders in turn on the same job and compare what they find.

    Args:
        job: what they do.
        contenders: keys of ``CONTENDERS``; "ours" is what the others are compared with.
        repeats: how often.

    Returns:
        A part of the results.
    """
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for repeat in range(repeats):
            for contender in contenders:
                directory = Path(scratch) / f"{contender}-{repeat}"
                runs += [{"contender": contender, "repeat": repeat, **run_contender(contender, [job], directory)[0]}]
        found = {name: dict(np.load(Path(scratch) / f"{name}-0" / "found-0.npz")) for name in contenders}
    ours = found["ours"]["entropies"].astype(np.float64)
    part = {"tokens": len(ours), "repeats": repeats, "threads": runs[0]["threads"], "runs": runs}
    part["agreement"] = {
        n: agreement(ours, f["entropies"]) for n, f in found.items() if n != "ours" and "entropies" in f
    }
    if "tolerance" in found:
        own = next(run for run in runs if run["contender"] == "tolerance")
        part["tolerance"] = {**within(ours, found["tolerance"]), **own}
    return part


def accuracy(job: Job) -> dict[str, Any]:
    """Measure how far the contenders are off the definition in float64.

    Args:
        job: a few tokens.

    Returns:
        A part of the results: for each contender the largest error of a layer's and state's mean, and of any token.
    """
    errors = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for contender in ("float64", "ours", "paper", "transformer-lens"):
            run_contender(contender, [job], Path(scratch) / contender)
            found = np.load(Path(scratch) / contender / "found-0.npz")["entropies"].astype(np.float64)
            if contender == "float64":
                truth = found
                continue
            off = found - truth
            errors[contender] = {"mean": float(np.abs(off.mean(axis=0)).max()), "token": float(np.abs(off).max())}
    return {"tokens": len(truth), "errors": errors}


def alone(job: Job, contender: str) -> dict[str, Any]:
    """Run one contender once.

    Args:
        job: what it does.
        contender: key of ``CONTENDERS``.

    Returns:
        A part of the results.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        return run_contender(contender, [job], Path(scratch) / contender)[0]


def agreement(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> dict[str, float]:
    """Compare two tables.

    Args:
        ours: [n, L, 6] nats.
        theirs: the same of another contender.

    Returns:
        mean: the largest difference of the means over tokens of any layer and state; token: that of any token.

    Raises:
        SystemExit: the means differ by more than ``AGREEMENT``.
    """
    mean = float(np.abs(ours.mean(axis=0, dtype=np.float64) - theirs.mean(axis=0, dtype=np.float64)).max())
    if not mean <= AGREEMENT:
        raise SystemExit(f"the contenders differ by {mean:.2e} nats; needed is at most {AGREEMENT:.0e}")
    return {"mean": mean, "token": float(np.abs(ours - theirs).max())}


def within(ours: np.ndarray[Any, Any], sampled: dict[str, np.ndarray[Any, Any]]) -> dict[str, int]:
    """Count the estimated changes whose interval covers the exact value.

    Args:
        ours: [n, L, 6] nats, exact.
        sampled: changes and half_widths, [L, 3].

    Returns:
        changes: how many there are; within: how many intervals cover it.
    """
    means = ours.mean(axis=0)
    off = np.abs(sampled["changes"] - (means[:, 1::2] - means[:, 0::2]))
    return {"changes": int(off.size), "within": int((off <= sampled["half_widths"]).sum())}


def scaling(repeats: int, device: str, points: int) -> dict[str, Any]:
    """Measure cost against tokens, layers and V.

    Args:
        repeats: how often.
        device: a torch device.
        points: of each axis, from its smallest value.

    Returns:
        A part of the results.
    """
    where, jobs = [], []
    for axis, values in SCALES.items():
        for value in values[:points]:
            shape = {**SMALL, **({axis: value} if axis in SMALL else {})}
            tokens = value if axis == "tokens" else SCALING_TOKENS
            where.append({"axis": axis, "value": value})
            jobs.append(Job(shape, [random_response(tokens, shape["vocab_size"])], device))
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        for repeat in range(repeats):
            for contender in ("ours", "paper", "floor"):
                measured = run_contender(contender, jobs, Path(scratch) / f"{contender}-{repeat}")
                own = {"contender": contender, "repeat": repeat}
                runs += [{**own, **at, **one} for at, one in zip(where, measured, strict=True)]
    return {
        "shape": SMALL,
        "tokens": SCALING_TOKENS,
        "repeats": repeats,
        "threads": runs[0]["threads"],
        "runs": runs,
    }


def training(steps: int, responses: int) -> dict[str, Any]:
    """Time an analysis and a training of the embedded model.

    Args:
        steps: of BuPO.
        responses: to analyse.

    Returns:
        A part of the results.
    """
    from internal_policy import bupo

    started = time.perf_counter()
    analyze(MODEL, max_responses=responses)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        options: dict[str, Any] = {"layer": LAYER, "max_steps": steps, "dynamics_every": 0, "eval_problems": 8}
        history = bupo.train(MODEL, output=Path(scratch) / "run", **options).history
    part = {"model": MODEL, "responses": responses, "steps": steps, "analysis_seconds": seconds}
    return {**part, "training_seconds": float(history["seconds"].sum())}


def machine(device: str) -> dict[str, Any]:
    """Describe this machine.

    Args:
        device: a torch device.

    Returns:
        name of the processor or GPU, cores that are ours, memory in GiB.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "cores": cores, "memory_gib": round(properties.total_memory / 2**30)}
    information = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+?)( Processor)?$", information, flags=re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"name": named[1] if named else "unknown CPU", "cores": cores, "memory_gib": round(memory / 2**30)}


def store(path: Path, where: dict[str, Any], name: str, part: dict[str, Any]) -> None:
    """Put one part into a machine's results; the others stay as they are.

    Args:
        path: the file.
        where: the machine.
        name: of the part.
        part: what was measured.
    """
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {"machine": where, "parts": {}}
    versions = {library: metadata.version(library) for library in ("torch", "transformers", "transformer-lens")}
    found["parts"][name] = {"date": date.today().isoformat(), "versions": versions, **part}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found, indent=1, sort_keys=True) + "\n")


@quiet_libraries()
def main() -> None:
    """Measure the requested parts, and write page and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--responses", type=int, default=256, help="of the embedded model")
    parser.add_argument("--tokens", type=int, default=128, help="of the large shape, with repeats")
    parser.add_argument("--long-tokens", type=int, default=1024, help="of the large shape, once")
    parser.add_argument("--sampled", type=int, default=16, help="responses of --long-tokens, with a tolerance")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.report:
        report.write_report()
        return
    large, points = LARGE, 5
    if args.quick:
        args.responses, args.tokens, args.long_tokens, args.sampled = 16, 16, 64, 3
        args.repeats, args.steps, large, points = 1, 2, SMALL, 2
    where = machine(args.device)
    slug = re.sub(r"[^a-z0-9]+", "-", f"{where['name']}-{where['cores']}-cores".lower()).strip("-")
    directory = report.ROOT / "build/benchmarks" if args.quick else report.DATA
    path = directory / f"analysis-{slug}.json"
    print(f"{where['name']}, {where['cores']} cores, torch {torch.__version__}, {date.today()}", flush=True)
    for name in args.parts:
        print(f"{name}:", flush=True)
        if name == "embedded":
            job = Job({}, own_responses(args.responses), args.device)
            part = side_by_side(job, (*_EXACT, "tolerance"), args.repeats)
        elif name == "large":
            job = Job(large, [random_response(args.tokens, large["vocab_size"])], args.device)
            part = side_by_side(job, _EXACT, args.repeats)
        elif name == "accuracy":
            part = accuracy(Job(large, [random_response(ACCURACY_TOKENS, large["vocab_size"])], args.device))
        elif name == "long":
            job = Job(large, [random_response(args.long_tokens, large["vocab_size"])], args.device)
            part = side_by_side(job, ("ours", "paper"), 1)
        elif name == "sampled":
            ids = [random_response(args.long_tokens, large["vocab_size"], seed) for seed in range(args.sampled)]
            part = {"responses": len(ids), **alone(Job(large, ids, args.device), "tolerance")}
        elif name == "scaling":
            part = scaling(args.repeats, args.device, points)
        elif name == "options":
            tokens = min(OPTION_TOKENS, args.long_tokens)
            jobs = {
                "embedded": Job({}, own_responses(args.responses), args.device),
                "small": Job(SMALL, [random_response(tokens, SMALL["vocab_size"])], args.device),
            }
            contenders = ("ours", "without-parts", *OPTIONS)
            part = {shape: side_by_side(job, contenders, args.repeats) for shape, job in jobs.items()}
        else:
            part = training(args.steps, args.responses)
        store(path, where, name, part)
    print(f"written to {path}")
    if args.quick:
        print(report.tables({path.stem: json.loads(path.read_text("utf-8"))}))
    else:
        report.write_report()


if __name__ == "__main__":
    main()
