"""Whether the responses of an analysis will have rewards, told from its inputs before anything is loaded or sampled."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from internal_policy.analysis.token_labels import correctness, no_rewards
from internal_policy.data import records
from internal_policy.data.prompts import MATH_500, TESTBED
from internal_policy.utils.errors import UserError


def require_rewards(
    by: Collection[str], prompts: str | list[Any] | None, responses: str | list[Any] | None, limit: int | None = None
) -> None:
    """Refuse ``--by correct`` where no response can have a reward.

    Args:
        by: the groupings.
        prompts: a name, a path or the records; None for the default of the model, which only the model decides.
        responses: a path, or the records; None if they are sampled.
        limit: the most responses that are read.

    Raises:
        UserError: no given response has a reward, or the responses are sampled to prompts for which none is computed.
    """
    if "correct" not in by:
        return
    if responses is not None:
        given = records.read_file(Path(responses), limit) if isinstance(responses, str) else responses[:limit]
        # What is no record is refused where it is read.
        if all(isinstance(row, Mapping) for row in given):
            require_some_reward(row.get("reward") for row in given)
    elif prompts is not None and prompts != TESTBED:
        refuse_sampled("the prompts that were given" if isinstance(prompts, list) else prompts)


def require_some_reward(rewards: Iterable[Any]) -> None:
    """Refuse responses of which none has a reward."""
    known = list(rewards)
    if all(reward is None or (isinstance(reward, float) and correctness(reward) is None) for reward in known):
        raise no_rewards(len(known))


def refuse_sampled(prompts: str = MATH_500) -> None:
    """Refuse to sample responses that are to be grouped by rewards that nobody computes."""
    raise UserError(
        f"--by correct needs rewards, and responses that are sampled to {prompts} get none (only those to the embedded "
        "tasks are scored); give --responses with a reward each"
    )
