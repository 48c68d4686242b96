"""The data-parallel processes of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

_PATIENCE = 24 * 3600


@dataclass(frozen=True)
class Processes:
    """The data-parallel processes of this run, as accelerate started them."""

    state: PartialState
    sharded: bool
    """Whether FSDP or DeepSpeed spreads the weights, so that no process has the whole model."""

    @property
    def number(self) -> int:
        """How many."""
        return int(self.state.num_processes)

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self.state.device
        return device

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the results."""
        return bool(self.state.is_main_process)

    def wait_for_everyone(self) -> None:
        """Wait until all processes are here."""
        self.state.wait_for_everyone()

    def broadcast(self, value: Any) -> Any:
        """Hand the main process's value to all.

        Args:
            value: what the main process has; ignored elsewhere.

        Returns:
            The main process's value.
        """
        return broadcast_object_list([value])[0] if self.number > 1 else value


def processes(options: Mapping[str, Any]) -> Processes:
    """Find out how this run was launched.

    Args:
        options: the trainer's options.

    Returns:
        The processes.
    """
    cpu = bool(options.get("use_cpu")) or not torch.cuda.is_available()
    launched = any(os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true" for kind in ("FSDP", "DEEPSPEED"))
    # The main process analyses and evaluates alone, for as long as that takes; a process that died is the launcher's.
    timeout = timedelta(seconds=float(options.get("ddp_timeout") or _PATIENCE))
    return Processes(
        PartialState(cpu=cpu, timeout=timeout), launched or bool(options.get("fsdp") or options.get("deepspeed"))
    )
