"""Running out of memory: try again with less, and say what to lower when nothing is left to halve."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from internal_policy.utils.errors import UserError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception means that memory ran out, on any device.

    Args:
        error: the exception.

    Returns:
        True for MemoryError, torch's own, and the CPU allocator's RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


def halving(items: Sequence[Item], run: Callable[[Sequence[Item]], list[Result]], advice: str) -> list[Result]:
    """Run a batch; where memory runs out, run its two halves instead, down to single items.

    Args:
        items: the batch.
        run: returns one result an item, in order.
        advice: what the user can lower when a single item does not fit.

    Returns:
        One result an item, in order.

    Raises:
        UserError: a single item does not fit.
    """
    try:
        return run(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise UserError(f"out of memory on a single sequence; {advice}") from error
    # Outside the handler, so that the traceback no longer holds the tensors of the failed try.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (len(items) + 1) // 2
    logger.warning("out of memory on a batch of %d; trying batches of %d", len(items), half)
    return halving(items[:half], run, advice) + halving(items[half:], run, advice)


def release() -> None:
    """Give back what a model held that is no longer used, before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
