"""Score responses with a reward, and count the failures of its verifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from internal_policy.data.prompts import Prompt
from internal_policy.rewards.identity import digest_code
from internal_policy.utils.errors import UserError


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
        # Imported here so that the command line can read this module quickly.
        from internal_policy.rewards import functions

        rewards = functions.as_rewards(reward, exact=exact)
        if len(rewards) != 1:
            raise UserError(f"{len(rewards)} rewards were given; an evaluation needs one, which says what is correct")
        self.code = digest_code(rewards)
        """Digest of the reward's code; None for the verifiers."""
        self._score = partial(functions.score, rewards[0])
        self._count_failures = partial(functions.count_failures, rewards)

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
        before = Counter(self._count_failures())
        answers = [prompt.answer or "" for prompt in prompts]
        scores = self._score(list(texts), answers, [prompt.content for prompt in prompts])
        if bad := [s for s in scores if not 0.0 <= s <= 1.0]:
            raise UserError(f"the reward gave {bad[0]}; needed for an evaluation is a score from 0 to 1 (correct is 1)")
        return scores, dict(Counter(self._count_failures()) - before)
