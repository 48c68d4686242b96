"""The processes of `accelerate launch` or torchrun among which work is divided, and batches that fit in memory."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from internal_policy.utils.errors import UserError, is_out_of_memory
from internal_policy.utils.shell import world_size

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 24 * 3600

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """The data-parallel processes of this run; by default only this one."""

    number: int = 1
    """Number of processes."""
    rank: int = 0
    """Index of this process, from 0."""
    device: torch.device = field(default_factory=lambda: _cpu())
    """This process's device, if there are several processes."""
    sharded: bool = False
    """Whether FSDP or DeepSpeed spreads the weights, so that no process has the whole model."""

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def wait_for_everyone(self) -> None:
        """Wait until all processes have arrived."""
        if self.number > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process; the values of the others are ignored."""
        if self.number == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def on_main(self, do: Callable[[], T]) -> T:
        """Call a function in the main process when all processes have arrived, and return its value in all of them.

        A `UserError` that it raises in the main process is raised in every process.
        """
        self.wait_for_everyone()
        value: Any = None
        if self.is_main_process:
            try:
                value = do()
            except UserError as error:
                self.broadcast((False, str(error)))
                raise
        fine, value = self.broadcast((True, value))
        if not fine:
            raise UserError(value)
        done: T = value
        return done


def _cpu() -> torch.device:
    import torch

    return torch.device("cpu")


def training_processes(options: Mapping[str, Any]) -> Processes:
    """How a training with these options was launched; FSDP and DeepSpeed shard the weights."""
    kinds = (os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("FSDP", "DEEPSPEED"))
    sharded = any(kinds) or bool(options.get("fsdp") or options.get("deepspeed"))
    # The main process analyses and evaluates alone, however long that takes; the launcher notices a dead process.
    timeout = float(options.get("ddp_timeout") or _TIMEOUT_SECONDS)
    return _start(bool(options.get("use_cpu")), timeout, sharded)


def launched_processes() -> Processes:
    """The processes that a launcher started for this program; a single one without a launcher."""
    return _start(False, _TIMEOUT_SECONDS, False) if world_size() > 1 else Processes()


def _start(on_cpu: bool, timeout: float, sharded: bool) -> Processes:
    import torch
    from accelerate import PartialState

    cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"} or not torch.cuda.is_available()
    try:
        state = PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{world_size()} processes were announced but cannot connect ({str(error).splitlines()[0][:150]}); "
            "start with accelerate launch or torchrun, or unset WORLD_SIZE"
        ) from error
    return Processes(int(state.num_processes), int(state.process_index), state.device, sharded)


def run_with_oom_retry(
    items: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]], advice: str
) -> list[Result]:
    """Run a batch; if memory runs out, run its two halves instead, down to single items.

    `run` returns one result for each item, in order, and so does this function. If a single item does not fit, a
    `UserError` gives the advice.
    """
    try:
        return run(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise UserError(f"out of memory on a single sequence; {advice}") from error
    # Outside the handler, so that the traceback no longer holds the tensors of the failed try.
    release_memory()
    half = (len(items) + 1) // 2
    logger.warning("out of memory on a batch of %d; trying batches of %d", len(items), half)
    return run_with_oom_retry(items[:half], run, advice) + run_with_oom_retry(items[half:], run, advice)


def release_memory() -> None:
    """Free the memory of a model that is no longer used, before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
