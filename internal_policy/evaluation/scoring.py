"""Score responses with a reward, and count the failures of its verifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from internal_policy.data.prompts import Prompt
from internal_policy.utils.errors import UserError, counted


def reward_name(reward: Any, *, exact: bool) -> str:
    """Name a reward in the settings of an evaluation.

    Args:
        reward: a name, a function, or None for the verifier of the benchmark.
        exact: whether that verifier is the exact one.

    Returns:
        The name; for a function, with its module.
    """
    if isinstance(reward, (list, tuple)) and len(reward) == 1:
        return reward_name(reward[0], exact=exact)
    if reward is None:
        return "exact" if exact else "math"
    if isinstance(reward, str):
        return reward
    name = getattr(reward, "__qualname__", None) or getattr(reward, "__name__", None) or type(reward).__qualname__
    return f"{getattr(reward, '__module__', type(reward).__module__)}.{name}"


class Scorer:
    """One reward, from 0 to 1; a response is correct if it is 1."""

    def __init__(self, reward: Any, *, exact: bool) -> None:
        """Find the reward.

        Args:
            reward: what `rewards.functions.as_rewards` takes; None for the verifier.
            exact: verify by the exact answer of the embedded tasks.

        Raises:
            UserError: there is no such reward, or several were given, which would leave open what is correct.
        """
        from internal_policy.rewards import functions

        found = functions.as_rewards(reward, exact=exact)
        if len(found) != 1:
            raise UserError(f"{len(found)} rewards were given; an evaluation needs one, which says what is correct")
        self._rewards = found

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], dict[str, int]]:
        """Score one batch.

        Args:
            prompts: the problem of each response, with its answer.
            texts: the responses.

        Returns:
            A score for each response, and how often the verifier failed, by kind.

        Raises:
            UserError: a score that is not from 0 to 1.
        """
        from internal_policy.rewards import functions

        before = self._failures()
        answers = [prompt.answer or "" for prompt in prompts]
        asked = [prompt.content for prompt in prompts]
        scores = [float(s) for s in functions.score(self._rewards[0], list(texts), answers, asked)]
        if len(scores) != len(texts):
            raise UserError(
                f"the reward gave {counted(len(scores), 'score')} for {counted(len(texts), 'response')}; "
                "needed is one for each"
            )
        if bad := [s for s in scores if not 0.0 <= s <= 1.0]:
            raise UserError(f"the reward gave {bad[0]}; needed for an evaluation is a score from 0 to 1 (correct is 1)")
        return scores, dict(self._failures() - before)

    def _failures(self) -> Counter[str]:
        from internal_policy.rewards import functions

        return Counter(functions.count_failures(self._rewards))
