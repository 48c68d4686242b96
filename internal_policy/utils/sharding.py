"""Which process works on which items, and what is left of them after an interruption."""

from __future__ import annotations

from collections.abc import Sequence

from internal_policy.utils.distributed import Processes
from internal_policy.utils.errors import UserError
from internal_policy.utils.workspace import Workspace


def batches(lengths: Sequence[int], size: int, state: Processes) -> list[list[int]]:
    """This process's batches of similar length, the longest first, to fail early.

    Who has which is settled without regard to what is done: a process that looks a little later sees more of it.

    Args:
        lengths: ids of each item.
        size: items in a batch.
        state: the processes.

    Returns:
        Places of the items in each batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + size] for start in range(0, len(order), size)][state.rank :: state.number]


def left(shared: Sequence[list[int]], done: set[int]) -> list[list[int]]:
    """Leave out what is done.

    Args:
        shared: batches.
        done: places of the items that are done.

    Returns:
        What is left of each batch; none that is empty.
    """
    return [some for batch in shared if (some := [i for i in batch if i not in done])]


def require_all(found: int, wanted: int, workspace: Workspace) -> None:
    """Refuse to go on with less than all processes should have written.

    Args:
        found: responses on disk.
        wanted: responses that should be there.
        workspace: where.

    Raises:
        UserError: some are missing.
    """
    if found < wanted:
        raise UserError(
            f"{workspace.directory}: {found} of {wanted} responses are there after all processes have finished; needed "
            "is an --output directory that all of them share"
        )
