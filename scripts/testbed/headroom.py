"""Search for a start with headroom: ``python scripts/testbed/headroom.py --minutes 6 --out DIRECTORY``.

Each candidate is trained on right solutions. Every few steps its pass@1 on held-out problems of levels 5 to 8 is looked
at, and where that is near the gate, everything that the gate asks for is measured. A candidate that is far beyond the
gate leaves its place to the next one.

``--out`` receives ``gate.csv``, a row for each look, as it goes, and the best step of each of the best three
candidates, ``start-1.tar.gz`` and so on, each a directory that transformers loads. Everything else, every kept step and
what a later run goes on from, is below ``--work``: a command that was stopped, by ``--minutes`` or otherwise, is
repeated to go on.

On a GPU, several candidates share it, a process and a CPU core each, with steps of tens of milliseconds. On a CPU a
step takes 2 to 3 s of one thread and a full measurement 6 to 8 minutes, so that one candidate needs 1 to 2 hours up to
the gate: ``nice -n 19 python scripts/testbed/headroom.py --device cpu --candidates mixed-5 --minutes 240``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import multiprocessing
import queue
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from headroom_data import CANDIDATES
from headroom_gate import BEYOND, Gate, Measured, Measurement, as_row
from headroom_training import Training
from transformers.utils import logging as transformers_logging

logger = logging.getLogger(__name__)

COLUMNS = ["candidate", "step", "loss", "seconds", "ms_a_step", *(f.name for f in fields(Measured)), "passes", "failed"]
BEST = 3
_CLOSING_SECONDS = 8.0


@dataclass(frozen=True)
class Search:
    """What a worker needs to know.

    Attributes:
        work: The directory of all candidates.
        device: The torch device.
        every: Steps between looks.
        deadline: When to stop, in seconds of ``time.time``.
        measurement: How a step is measured.
        looked_at: Steps of each candidate that have a row.
    """

    work: Path
    device: str
    every: int
    deadline: float
    measurement: Measurement
    looked_at: dict[str, set[int]]


@dataclass(frozen=True)
class Look:
    """One row of the table.

    Attributes:
        candidate: The candidate.
        step: The step.
        loss: The mean loss since the look before, in nats.
        seconds: Since the process began to train.
        ms_a_step: Milliseconds of a training step since the look before.
        measured: The numbers.
    """

    candidate: str
    step: int
    loss: float
    seconds: float
    ms_a_step: float
    measured: Measured

    def row(self, gate: Gate) -> dict[str, Any]:
        """The row, with the verdict of a gate."""
        failed = gate.failed(self.measured)
        return {
            **{"candidate": self.candidate, "step": self.step, "loss": round(self.loss, 4)},
            **{"seconds": round(self.seconds, 1), "ms_a_step": round(self.ms_a_step, 1)},
            **as_row(self.measured),
            **{"passes": int(not failed), "failed": " ".join(failed)},
        }


def train_candidate(name: str, search: Search, looks: Any) -> None:
    """Train one candidate and look at its steps until the deadline, or until it is beyond the gate.

    Args:
        name: Its name.
        search: How.
        looks: The queue that receives each `Look`.
    """
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    training = Training(CANDIDATES[name], search.work / name, search.device)
    begun = before = time.time()
    at, beyond = training.step, 0
    for kept in training.run(search.every, lambda: time.time() > search.deadline):
        ms_a_step = (time.time() - before) * 1000 / max(1, kept.step - at)
        if kept.step not in search.looked_at.get(name, ()):
            measured = search.measurement.look(training.model, training.tokenizer, kept.loss)
            beyond = beyond + 1 if (measured.pass_at_1 or 0.0) > BEYOND else 0
            looks.put(Look(name, kept.step, kept.loss, time.time() - begun, ms_a_step, measured))
        if beyond == 2:
            break
        before, at = time.time(), kept.step


def search_starts(
    names: Sequence[str], search: Search, out: Path, jobs: int, gate: Gate | None = None
) -> list[dict[str, Any]]:
    """Run the candidates, some at a time, and write the table and the best starts.

    Args:
        names: The candidates, in the order in which they are begun.
        search: How.
        out: The directory of the results.
        jobs: Candidates at a time.
        gate: The conditions.

    Returns:
        The rows of the table, those of earlier runs too.
    """
    gate = gate or Gate()
    out.mkdir(parents=True, exist_ok=True)
    table, rows = out / "gate.csv", read_rows(out / "gate.csv")
    for row in rows:
        search.looked_at.setdefault(row["candidate"], set()).add(int(row["step"]))
    context = multiprocessing.get_context("spawn")
    looks: Any = context.Queue()
    waiting, running = list(names), list[Any]()
    packed: list[dict[str, Any]] = []
    while waiting or running:
        while waiting and len(running) < jobs and time.time() < search.deadline:
            process = context.Process(target=train_candidate, args=(waiting.pop(0), search, looks), daemon=True)
            process.start()
            running.append(process)
        if time.time() > search.deadline:
            waiting.clear()
        if time.time() > search.deadline + _CLOSING_SECONDS:
            for process in running:
                process.terminate()
        running = [process for process in running if process.is_alive()]
        rows += _received(looks, gate, table)
        if (best := best_rows(rows, search.work)) != packed:
            packed = best
            pack(best, search.work, out)
    rows += _received(looks, gate, table)
    pack(best_rows(rows, search.work), search.work, out)
    return rows


def _received(looks: Any, gate: Gate, table: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while True:
        try:
            look = looks.get(timeout=0.5)
        except queue.Empty:
            return rows
        row = {name: "" if value is None else str(value) for name, value in look.row(gate).items()}
        new = not table.exists()
        with table.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        shown = (
            "pass_at_1",
            "worked_at_1",
            "pass_at_k",
            "worked_at_k",
            "greedy",
            "entropy",
            "boundary_layer",
            "failed",
        )
        numbers = " ".join(f"{name} {row[name]}" for name in shown if row[name] != "")
        logger.info(
            "%s step %s loss %s ms %s %s", *(row[n] for n in ("candidate", "step", "loss", "ms_a_step")), numbers
        )
        rows.append(row)


def read_rows(table: Path) -> list[dict[str, Any]]:
    """Read the rows of a table, none if it is not there."""
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def best_rows(rows: Sequence[dict[str, Any]], work: Path, n: int = BEST) -> list[dict[str, Any]]:
    """Choose the starts that are kept: the best step of each of the best candidates.

    A start is better if fewer conditions fail, then if more problems are worked out in k samples.

    Args:
        rows: The rows of the table.
        work: Where the kept steps are; a row whose step was deleted is left out.
        n: How many.

    Returns:
        Their rows, best first.
    """
    full = [row for row in rows if row["worked_at_k"] != "" and _directory(row, work).is_dir()]
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(full, key=lambda row: (len(row["failed"].split()), -float(row["worked_at_k"]))):
        best.setdefault(row["candidate"], row)
    return list(best.values())[:n]


def pack(best: Sequence[dict[str, Any]], work: Path, out: Path) -> list[Path]:
    """Write each of the best starts as one archive, ``start-1.tar.gz`` the best.

    Args:
        best: Their rows.
        work: Where the kept steps are.
        out: Where the archives go.

    Returns:
        The archives.
    """
    paths = []
    for number, row in enumerate(best, start=1):
        path = out / f"start-{number}.tar.gz"
        partial = work / f"{path.name}.partial"
        with tarfile.open(partial, "w:gz", compresslevel=1) as archive:
            archive.add(_directory(row, work), arcname=f"{row['candidate']}-{row['step']}")
        path.write_bytes(partial.read_bytes())
        partial.unlink()
        paths.append(path)
    return paths


def _directory(row: dict[str, Any], work: Path) -> Path:
    return work / str(row["candidate"]) / f"step-{int(row['step']):05d}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Its arguments; the process's own by default.

    Returns:
        0, or 1 if no step was looked at.
    """
    begun = time.time()
    parser = argparse.ArgumentParser(
        prog="python scripts/testbed/headroom.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--candidates", default=",".join(CANDIDATES), help="names, comma-separated, in their order")
    parser.add_argument("--minutes", type=float, default=6.0, help="stop after this time, whatever was reached")
    parser.add_argument("--out", type=Path, default=Path("build/headroom"), help="the table and the best starts")
    parser.add_argument("--work", type=Path, default=Path("build/headroom/work"), help="every kept step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="candidates at a time; 4 on a GPU, else 1")
    parser.add_argument("--every", type=int, default=25, help="steps between looks")
    parser.add_argument(
        "--problems", type=int, default=Measurement.problems_per_level, help="held-out problems of each level"
    )
    parser.add_argument("--samples", type=int, default=Measurement.k, help="k of Pass@k")
    args = parser.parse_args(argv)
    names = args.candidates.split(",")
    if unknown := [name for name in names if name not in CANDIDATES]:
        parser.error(f"no candidate is called {unknown[0]!r}; there are {', '.join(CANDIDATES)}")
    if args.minutes <= 0 or min(args.every, args.problems, args.samples) < 1 or (args.jobs or 1) < 1:
        parser.error("--minutes must be above 0, and --every, --problems, --samples and --jobs at least 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    on_gpu = args.device.startswith("cuda")
    measurement = replace(Measurement(), problems_per_level=args.problems, k=args.samples, rows=8192 if on_gpu else 256)
    # The rest of the time is for a look that is under way, and for the archives.
    deadline = begun + max(args.minutes * 60 - 2 * _CLOSING_SECONDS, args.minutes * 30)
    search = Search(args.work, args.device, args.every, deadline, measurement, {})
    rows = search_starts(names, search, args.out, args.jobs or (4 if on_gpu else 1))
    passing = [row for row in rows if row["passes"] == "1"]
    logger.info("%d looks, %d pass the gate; %s", len(rows), len(passing), args.out / "gate.csv")
    for number, row in enumerate(best_rows(rows, args.work), start=1):
        logger.info(
            "start-%d: %s step %s, fails: %s", number, row["candidate"], row["step"], row["failed"] or "nothing"
        )
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
