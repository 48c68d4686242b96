"""What a part of ``gpu_checks.py`` writes while it runs: guarded steps, whose results are on disk after each."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from internal_policy.utils.io import write_text

T = TypeVar("T")
GIB = 2**30


class Recorder:
    """Runs the steps of a part, keeps what each gave or why it gave nothing, and never raises because of one."""

    def __init__(self, path: Path, device: str, quick: bool, deadline: float) -> None:
        self.path = path
        self.device = device
        """A torch device, ``cuda`` or ``cpu``."""
        self.quick = quick
        """Whether sizes are tiny."""
        self.deadline = deadline
        """When the part has to end, by ``time.monotonic``."""
        self._found: dict[str, dict[str, Any]] = {"figures": {}, "errors": {}, "skipped": {}}
        self._write()

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device == "cuda"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def step(self, name: str, run: Callable[[], Any], needs: float = 3.0) -> Any:
        """Run a step if there is time for it, and keep its figures.

        Args:
            name: of the step; the key of its figures.
            run: returns the figures, or None if there are none to keep.
            needs: seconds without which the step is not begun.

        Returns:
            What ``run`` returned; None if it was skipped or failed.
        """
        return self.largest(name, [None], lambda _: run(), lambda _: needs)

    def largest(
        self, name: str, sizes: Sequence[T], run: Callable[[T], Any], needs: Callable[[T], float] = lambda _: 3.0
    ) -> Any:
        """Run a step at the first of several sizes for which there is memory.

        Args:
            name: of the step; the key of its figures.
            sizes: what to try, the largest first.
            run: returns the figures at a size.
            needs: seconds without which a size is not begun.

        Returns:
            What ``run`` returned; None if all sizes were skipped or failed.
        """
        for size in sizes:
            if self.left() < needs(size):
                left = f"{max(0.0, self.left()):.0f} s were left, and it takes about {needs(size):.0f} s"
                self.keep("skipped", name if size is None else f"{name}, {size}", left)
                continue
            started = time.monotonic()
            try:
                found = run(size)
            # A part that fails must not take the figures of the others with it.
            except Exception as error:
                self.keep("errors", name if size is None else f"{name}, {size}", in_short(error))
                without_memory = is_out_of_memory(error)
            else:
                if found is not None:
                    # The step's own clock is kept too: what is measured is a share of it.
                    took = round(time.monotonic() - started, 2)
                    self.keep("figures", name, {**found, "step_seconds": took} if isinstance(found, dict) else found)
                return found
            finally:
                # Outside of the handler, whose traceback holds the tensors.
                self.clean()
            if not without_memory:
                return None
        return None

    def skip(self, name: str, reason: str) -> None:
        """Keep why a step was not run."""
        self.keep("skipped", name, reason)

    def clean(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        torch = sys.modules.get("torch")
        if self.on_gpu and torch is not None:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            # After a fault of the device every call fails; what was stored stays.
            except Exception as error:
                self.keep("errors", "device", in_short(error))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int = 3, warm_up: bool = True) -> list[float]:
        """Time a call, its work on the device included.

        Args:
            run: what is timed.
            repeats: how often at most; no repeat but the first starts after the deadline.
            warm_up: whether the first call is not counted.

        Returns:
            Seconds of each repeat.
        """
        if warm_up:
            run()
        times: list[float] = []
        while len(times) < repeats and not (times and self.left() < 1.5 * times[-1]):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return times

    @contextmanager
    def peak(self, figures: dict[str, Any]) -> Iterator[None]:
        """Put the peak of the device's memory within the context into figures, in GiB: in all, and what was added."""
        if not self.on_gpu:
            yield
            return
        import torch

        self.clean()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield
        most = torch.cuda.max_memory_allocated()
        figures |= {**self.most(), "added_gib": round((most - before) / GIB, 3)}

    def most(self) -> dict[str, float]:
        """The peak of the device's memory so far, in GiB, within a context of ``peak``; nothing on a CPU."""
        if not self.on_gpu:
            return {}
        import torch

        return {"peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3)}

    def keep(self, kind: str, name: str, value: Any) -> None:
        """Write one result at once, under ``figures``, ``errors`` or ``skipped``."""
        self._found[kind][name] = value
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._found, indent=1, default=str))


def in_short(error: BaseException) -> str:
    """An error as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's or the machine's memory did not suffice."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "alloc_failed" in text
