"""One contender of ``benchmark_analysis.py`` in a subprocess.

python benchmarks/analysis_worker.py CONTENDER JOBS.json DIRECTORY

It writes ``measured.json``, a record a job, and ``found-<job>.npz`` with what was found.

Peak memory is how far the call raises the process over where it stood before, with model and libraries loaded and a few
tokens analysed to warm up. On Linux that is the resident size's high-water mark (VmHWM, which the kernel keeps exactly,
set back through /proc/self/clear_refs) less the resident size before; what glibc kept of earlier work is given back
first (malloc_trim), so that it cannot hide growth, and all blocks of a MiB or more are mapped apart (mallopt), so that
what is freed is gone: else aligned blocks below 32 MiB leave holes that the next one does not fit, and memory seems to
grow with every product. On CUDA it is what torch's allocator counts.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from analysis_contenders import CONTENDERS, Found
from analysis_jobs import Job, build

from internal_policy.data.responses import Response
from internal_policy.models import LanguageModel, limit_threads
from internal_policy.utils.io import write_text
from internal_policy.utils.logging import quiet_libraries

_WARM_UP_TOKENS = 8
_M_MMAP_THRESHOLD = -3


def measure(contender: str, model: LanguageModel, responses: Sequence[Response]) -> tuple[dict[str, Any], Found]:
    """Measure the time and memory of one call of a contender.

    Args:
        contender: key of ``CONTENDERS``.
        model: the model.
        responses: what it is given.

    Returns:
        seconds, peak_bytes (None if the system does not report it), tokens and the contender's own facts; the results.
    """
    with limit_threads(model):
        run = CONTENDERS[contender](model)
        run([_shortened(r) for r in responses[:2]])
        before = _settle(model.device)
        started = time.perf_counter()
        found = run(responses)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = _peak_bytes(model.device)
        threads = torch.get_num_threads()
    growth = None if peak is None or before is None else max(0, peak - before)
    tokens = sum(r.n_tokens for r in responses)
    return {"seconds": seconds, "peak_bytes": growth, "tokens": tokens, "threads": threads, **found.facts}, found


def map_large_blocks() -> None:
    """Make glibc return each block of a MiB or more to the system when it is freed."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 2**20)


def _shortened(response: Response) -> Response:
    return replace(response, input_ids=response.input_ids[: response.prompt_length + _WARM_UP_TOKENS])


def _settle(device: torch.device) -> int | None:
    """Release free memory, reset the high-water mark, and return the remaining memory in bytes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _status("VmRSS")


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


@quiet_libraries()
def main() -> None:
    """Run the jobs one after the other."""
    contender, jobs, directory = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    map_large_blocks()
    measured = []
    for number, record in enumerate(json.loads(jobs.read_text())):
        job = Job(**record)
        model = build(job.shape, job.device)
        figures, found = measure(contender, model, [Response(**fields) for fields in job.responses])
        measured.append(figures)
        arrays: dict[str, Any] = {n: value for n, value in asdict(found).items() if isinstance(value, np.ndarray)}
        np.savez(directory / f"found-{number}.npz", **arrays)
        del model
    write_text(directory / "measured.json", json.dumps(measured))


if __name__ == "__main__":
    main()
