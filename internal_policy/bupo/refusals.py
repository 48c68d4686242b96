"""What stops a training from outside, told in one line: options that TRL refuses, memory, a disk that is full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from internal_policy.bupo.config import BuPOConfig
from internal_policy.bupo.rehearsal import refused
from internal_policy.utils.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    from internal_policy.bupo.trainer import BuPOTrainer

_NO_ROOM = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EFBIG: "File too large"}


@contextmanager
def refusing(config: BuPOConfig, directory: Path, trainer: BuPOTrainer | None = None) -> Iterator[None]:
    """Turn what TRL refuses, running out of memory, and a full disk into one line.

    Args:
        config: the trainer's configuration.
        directory: the run's.
        trainer: the trainer, once it is made. What it raises before its first update is done is about its options.

    Raises:
        UserError: in place of these.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        if trainer is not None and trainer.state.global_step:
            raise
        raise refused(error) from error
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if (why := _no_room(error)) is not None:
            raise UserError(
                f"{directory}: a file could not be written to its end ({why}); make room, then repeat the command: it "
                "goes on from the last whole checkpoint"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in training; lower per_device_train_batch_size (now {config.per_device_train_batch_size}) "
            "or max_completion_length, and start over with --overwrite"
        ) from error


def _no_room(error: BaseException) -> str | None:
    """Why a file could not be written; None where it is something else."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return _NO_ROOM[error.errno]
    told = str(error)
    if isinstance(error, SafetensorError):
        return next((why for why in _NO_ROOM.values() if why in told), None)
    # torch writes in C++, and does not say why it could not.
    return "PytorchStreamWriter failed" if "PytorchStreamWriter failed" in told or "inline_container" in told else None
