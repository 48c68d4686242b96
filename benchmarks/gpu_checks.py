"""What a GPU costs and whether it is right, in one run of at most nine minutes: figures, and reasons where none.

python benchmarks/gpu_checks.py                          # all parts; data/benchmarks/gpu-<card>.json
python benchmarks/gpu_checks.py --budget 900             # more time for every part; what does not fit is named
python benchmarks/gpu_checks.py --parts tests kernel-bfloat16      # the whole budget for these
python benchmarks/gpu_checks.py --device cpu --quick     # every part at tiny sizes on any machine; nothing is kept
python benchmarks/gpu_checks.py --document               # only the page, from what was measured

Parts, in the order in which they run: ``kernel-bfloat16`` (the fused kernel at one length and at two, against float64
and against one bare product of the same operands), ``tests`` (the tests that need CUDA), ``analysis-bfloat16`` (states
and entropies of a model at the shape of Qwen3-4B with random weights, against its forward pass), ``update`` (an update
of pi^l and of pi_theta with AdamW), ``train`` (two steps of ``bupo.train``, with their memory), ``analysis-float32``
and ``kernel-float32`` (also in TF32). Each part may take its share of the budget, and what it leaves goes to those
after it. Each is a process of its own, so that a fault of the device or a call that hangs ends that part alone; every
step is written as soon as it is done. Neither the package nor trl needs to be installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# As a script of a checkout that is not installed.
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "benchmarks")) if path not in sys.path]
# torch counts devices without starting CUDA in this process, from which the parts are forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

BUDGET = 540.0
"""Seconds of a whole run: within the ten minutes for which a machine is often lent."""
LEAST = 12.0
"""Seconds without which a part is not begun on a GPU."""
_MARGIN = 4.0
"""Seconds between the time a part is asked to end by and the time it is ended."""
_LIBRARIES = ("torch", "triton", "transformers", "tokenizers", "accelerate", "trl", "numpy", "pytest")
_PRELOADED = (
    "torch",
    "transformers",
    "transformers.models.qwen3.modeling_qwen3",
    "internal_policy.extractors",
    "internal_policy.entropy.log_probs",
    "benchmark_kernel",
)


@dataclass(frozen=True)
class Part:
    """A part of a run."""

    name: str
    """Its key in the results."""
    function: str
    """Module and function, which takes a ``Recorder``."""
    share: float
    """Of the budget, relative to the shares of the parts after it."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the function."""


PARTS = (
    Part("kernel-bfloat16", "gpu_parts:kernel", 0.12, ("bfloat16",)),
    Part("tests", "gpu_parts:cuda_tests", 0.15),
    Part("analysis-bfloat16", "gpu_parts:analysis", 0.13, ("bfloat16",)),
    Part("update", "gpu_update:update", 0.12),
    Part("train", "gpu_update:train", 0.20),
    Part("analysis-float32", "gpu_parts:analysis", 0.13, ("float32",)),
    Part("kernel-float32", "gpu_parts:kernel", 0.15, ("float32",)),
)
"""In the order in which they run: what a card is asked first comes first."""


def machine(device: str) -> dict[str, Any]:
    """Describe the machine, without starting CUDA here.

    Args:
        device: ``cuda`` or ``cpu``.

    Returns:
        date, device, card, driver, memory_mib, processors, load, python and the versions of libraries.

    Raises:
        SystemExit: there is no GPU, but one is needed.
    """
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "card": platform.processor() or platform.machine(),
        "driver": None,
        "memory_mib": None,
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {},
    }
    for name in _LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found["versions"][name] = metadata.version(name)
    if device == "cpu":
        return found
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        written = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        card, driver, memory = (field.strip() for field in written.strip().splitlines()[0].split(","))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                f"no GPU here (nvidia-smi: {type(error).__name__}; torch sees none); --device cpu --quick shows that "
                "this script works"
            ) from error
        return found | {"card": torch.cuda.get_device_name()}
    return found | {"card": card, "driver": driver, "memory_mib": int(float(memory))}


def slug(card: str) -> str:
    """A card's name in that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def allotted(left: float, shares: Sequence[float], least: float = LEAST) -> float | None:
    """Seconds that a part may take: its share of what is left, so that a larger budget gives more to every part.

    Args:
        left: seconds of the budget.
        shares: of the part and of those after it.
        least: without which a part is not begun; it gets them even where its share is less.

    Returns:
        The seconds; None if the part is to be skipped.
    """
    return max(least, left * shares[0] / sum(shares)) if left >= least else None


def run_part(part: Part, path: Path, device: str, quick: bool, deadline: float) -> None:
    """Run a part in this process, which is its own.

    Args:
        part: the part.
        path: where its results are written.
        device: ``cuda`` or ``cpu``.
        quick: whether sizes are tiny.
        deadline: when it has to end, by ``time.monotonic``.
    """
    from gpu_recorder import Recorder

    record = Recorder(path, device, quick, deadline)
    module, _, name = part.function.partition(":")

    def run() -> None:
        getattr(import_module(module), name)(record, *part.arguments)

    # A failure between the steps is kept like one of a step.
    record.step("part", run, 0.0)


def in_process(context: Any, target: Callable[[], None], seconds: float, meanwhile: Callable[[], None]) -> str | None:
    """Run a function in a process of its own.

    Args:
        context: of multiprocessing.
        target: the function.
        seconds: after which the process is ended.
        meanwhile: called every other second, and at the end.

    Returns:
        None if it ended well, otherwise how it ended.
    """
    process = context.Process(target=target)
    started = time.monotonic()
    process.start()
    try:
        while process.is_alive() and (left := seconds - (time.monotonic() - started)) > 0:
            process.join(min(2.0, left))
            meanwhile()
        if process.is_alive():
            return f"ended after {seconds:.0f} s"
        return None if process.exitcode == 0 else f"the process ended with {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        meanwhile()


def start_method(device: str, wanted: str | None) -> str:
    """How the parts start: forked with all that is imported, if a forked process can use the device."""
    if wanted or "fork" not in multiprocessing.get_all_start_methods():
        return wanted or "spawn"
    for name in _PRELOADED:
        # What cannot be imported is told by the part that needs it.
        with suppress(Exception):
            import_module(name)
    if device == "cpu":
        return "fork"
    failed = in_process(multiprocessing.get_context("fork"), _touch_device, 45.0, lambda: None)
    return "spawn" if failed else "fork"


def _touch_device() -> None:
    import torch

    torch.zeros(1, device="cuda").add_(1).item()


def run_all(options: argparse.Namespace, results: dict[str, Any], output: Path) -> None:
    """Run the parts one after the other, and write the results after each of their steps.

    Args:
        options: the command line.
        results: what is known so far, to which the parts are added.
        output: the file.
    """
    from internal_policy.utils.io import write_text

    end = results.pop("started") + options.budget
    results["start_method"] = method = start_method(options.device, options.start)
    context = multiprocessing.get_context(method)
    chosen = [part for part in PARTS if part.name in options.parts]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-checks-") as scratch:
        for place, part in enumerate(chosen):
            path = Path(scratch) / f"{part.name}.json"
            left = end - time.monotonic()
            least = 0.0 if options.device == "cpu" and left > 0 else LEAST
            seconds = allotted(left, [each.share for each in chosen[place:]], least)
            found: dict[str, Any] = {"figures": {}, "errors": {}, "skipped": {}}
            results["parts"][part.name] = found
            began = time.monotonic()

            def keep(path: Path = path, found: dict[str, Any] = found, began: float = began) -> None:
                if path.exists():
                    found.update(json.loads(path.read_text("utf-8")))
                found["seconds"] = round(time.monotonic() - began, 1)
                results["seconds"] = round(options.budget - (end - time.monotonic()), 1)
                write_text(output, json.dumps(results, indent=1, default=str) + "\n")

            if seconds is None:
                found["skipped"]["part"] = f"{max(0.0, left):.0f} s of {options.budget:.0f} s were left"
            else:
                run = partial(run_part, part, path, options.device, options.quick, began + max(1.0, seconds - _MARGIN))
                ended = in_process(context, run, seconds, keep)
                if ended:
                    found["errors"]["process"] = ended
            write_text(output, json.dumps(results, indent=1, default=str) + "\n")
            print(f"{part.name}: {one_line(found)}", flush=True)


def one_line(found: dict[str, Any]) -> str:
    """How a part went."""
    texts = [f"{found.get('seconds', 0):.0f} s, {len(found['figures'])} results"]
    texts += [f"{kind} {name}: {text}" for kind in ("errors", "skipped") for name, text in found[kind].items()]
    return "; ".join(texts)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; written to build/benchmarks")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of the whole run")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--output", type=Path, help="file, or directory of gpu-<card>.json; data/benchmarks by default")
    parser.add_argument("--conditions", default="", help="what else the machine does meanwhile, kept with the figures")
    parser.add_argument("--document", action="store_true", help="only write docs/benchmarks.md, from data/benchmarks")
    parser.add_argument(
        "--start", choices=multiprocessing.get_all_start_methods(), help="how the parts' processes start"
    )
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu is for --quick: the sizes of a GPU would take hours")
    return options


def main() -> None:
    """Run the parts and print their figures, or write the page."""
    started = time.monotonic()
    options = parse()
    import gpu_report as report

    if options.document:
        report.write_page()
        return
    if options.device == "cpu":
        # Read when triton is imported, which is after this; the fused kernel has no other way to run on a CPU.
        os.environ["TRITON_INTERPRET"] = "1"
    results: dict[str, Any] = machine(options.device)
    results |= {
        "conditions": options.conditions,
        "budget": options.budget,
        "quick": options.quick,
        "started": started,
        "parts": {},
    }
    kept = options.device == "cuda" and not options.quick
    folder = ROOT / ("data/benchmarks" if kept else "build/benchmarks")
    output = options.output or folder
    if output.suffix != ".json":
        output /= f"gpu-{slug(results['card'])}.json"
    print(f"{results['card']}, driver {results['driver']}, {results['versions']}", flush=True)
    run_all(options, results, output)
    if options.quick:
        print("tiny sizes, not those that the tables name: the times say nothing")
    try:
        report.print_tables(results)
    # The figures are on disk; how they look is less.
    except Exception as error:
        print(f"no tables: {type(error).__name__}: {error}")
    print(f"{results['seconds']:.0f} s; {output}")


if __name__ == "__main__":
    main()
