"""Rewards for training with TRL and for evaluation: the built-in ones, and a guard around the user's own.

TRL calls ``reward(prompts=..., completions=..., **columns)`` with one entry per sample in every list and wants one
number per sample, or None for "no score".
"""

from __future__ import annotations

import asyncio
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internal_policy.data import arithmetic as tasks
from internal_policy.data.prompts import answer_text
from internal_policy.rewards.guard import Guarded, GuardedAsync, is_module, one_line
from internal_policy.rewards.math_verifier import Failures, MathVerifier, boxed_answer
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.imports import require_package

__all__ = [
    "ExactReward",
    "Failures",
    "Guarded",
    "MathReward",
    "MathVerifier",
    "as_rewards",
    "boxed_answer",
    "compare",
    "failures_of",
    "score",
]


class MathReward:
    r"""1 where the last ``\boxed{}`` is mathematically the answer, else 0.

    Args:
        time_limit: Seconds that one comparison may take.
        workers: Processes that compare; None for as many as there are processors, at most 4.

    Raises:
        UserError: math-verify is not installed.
    """

    def __init__(self, time_limit: float = 5.0, workers: int | None = None) -> None:
        # Before the responses are sampled, not when the first of them is to be compared.
        require_package("math_verify", "the reward math", "train")
        self.__name__ = "math_reward"
        self.verifier = MathVerifier(time_limit, workers)

    @property
    def failures(self) -> Failures:
        """How many comparisons crashed or took too long."""
        return self.verifier.failures

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Score completions against the column ``answer``.

        Args:
            prompts: The questions; not looked at.
            completions: Texts or chats.
            kwargs: The data set's columns, of which ``answer`` is needed.

        Returns:
            1.0 or 0.0 for each.

        Raises:
            UserError: No answers, or math-verify cannot be used.
        """
        answers = _answers(kwargs, len(completions), self.__name__)
        return [float(right) for right in self.verifier.check_many([_text(c) for c in completions], answers)]


class ExactReward:
    r"""1 where the last ``\boxed{}`` is the answer letter by letter, else 0."""

    def __init__(self) -> None:
        self.__name__ = "exact_reward"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Score completions against the column ``answer``.

        Args:
            prompts: The questions; not looked at.
            completions: Texts or chats.
            kwargs: The data set's columns, of which ``answer`` is needed.

        Returns:
            1.0 or 0.0 for each.

        Raises:
            UserError: No answers.
        """
        answers = _answers(kwargs, len(completions), self.__name__)
        return [float(tasks.check(_text(c), a)) for c, a in zip(completions, answers, strict=True)]


def _answers(columns: dict[str, Any], n: int, name: str) -> list[str]:
    answers = columns.get("answer")
    if answers is None:
        present = sorted(key for key, value in columns.items() if isinstance(value, list))
        raise UserError(f"{name} needs a column 'answer'; the data have {present}: rename one or give another reward")
    if len(answers) != n:
        raise UserError(
            f"{name} got {counted(len(answers), 'answer')} to {counted(n, 'completion')}; needed is one for each"
        )
    missing = next((i for i, answer in enumerate(answers) if answer is None), None)
    if missing is not None:
        raise UserError(f"{name}: sample {missing + 1} of {n} has no answer; leave such prompts out of the data")
    try:
        return [answer_text(answer) or "" for answer in answers]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} got {error}") from error


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return content or ""


_NAMED: dict[str, Callable[[], Callable[..., Any]]] = {"math": MathReward, "exact": ExactReward}


def as_rewards(reward: Any, *, exact: bool) -> list[Callable[..., Any]]:
    """Make what TRL takes from what a user gives.

    Args:
        reward: None, a name (``math``, ``exact``), ``module:function``, a callable, or a list of these.
        exact: Whether None means the exact comparison, as for the embedded models' tasks, or the mathematical one.

    Returns:
        The reward functions, guarded.

    Raises:
        UserError: It is something else, or cannot be imported.
    """
    if reward is None:
        reward = "exact" if exact else "math"
    if isinstance(reward, (list, tuple)) and reward:
        return [made for item in reward for made in as_rewards(item, exact=exact)]
    if isinstance(reward, str) and reward in _NAMED:
        return [Guarded(_NAMED[reward]())]
    if isinstance(reward, str) and ":" in reward:
        return [Guarded(_imported(reward))]
    if callable(reward):
        return [reward if isinstance(reward, Guarded) else Guarded(reward)]
    got = repr(reward) if isinstance(reward, str) else f"a {type(reward).__name__}"
    raise UserError(f"reward {got} is unknown; use {', '.join(_NAMED)}, module:function, a callable or a list of these")


def _imported(place: str) -> Callable[..., Any]:
    module_name, _, attribute = place.partition(":")
    here = str(Path.cwd())
    # As with python -m: the user's own file comes first.
    if here not in sys.path:
        sys.path.insert(0, here)
    # A file written since the last look at the folder.
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            raise UserError(f"reward {place!r}: there is no module {module_name!r} here or installed") from error
        raise UserError(
            f"reward {place!r}: the module {module_name!r} cannot be imported: {one_line(error)}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "has no" if function is None else "has something that cannot be called as"
        raise UserError(f"reward {place!r}: the module {module_name!r} {what} {attribute!r}; needed is a function")
    return function  # type: ignore[no-any-return]


def failures_of(rewards: Iterable[Any]) -> dict[str, int]:
    """Add up what went wrong in rewards since they were made.

    Args:
        rewards: Reward functions; those that count nothing add nothing.

    Returns:
        ``crashes`` and ``timeouts``, in samples.
    """
    counts = [f for f in (getattr(r, "failures", None) for r in rewards) if isinstance(f, Failures)]
    return {"crashes": sum(f.crashes for f in counts), "timeouts": sum(f.timeouts for f in counts)}


def compare(rewards: Iterable[Any]) -> bool:
    """Say whether a reward of `as_rewards` compares with reference answers.

    Args:
        rewards: Reward functions.

    Returns:
        True where one of them is a built-in verifier.
    """
    return any(isinstance(getattr(r, "reward", r), (MathReward, ExactReward)) for r in rewards)


def score(
    reward: Callable[..., Any], texts: Sequence[str], answers: Sequence[Any], prompts: Sequence[Any] | None = None
) -> list[float]:
    """Score plain responses with a reward function, as TRL would in training.

    Args:
        reward: One of `as_rewards`.
        texts: The responses.
        answers: Their reference answers, the column ``answer``.
        prompts: Their prompts; where one is a chat, so is the completion that the function gets.

    Returns:
        A number for each; NaN where the function gave no score.

    Raises:
        UserError: The function's result cannot be used, or it is a reward model.
    """
    if is_module(reward):
        raise UserError("a reward model cannot score an evaluation; give a reward function")
    prompts = list(prompts) if prompts is not None else [""] * len(texts)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    guarded = reward if isinstance(reward, Guarded) else Guarded(reward)
    arguments = {"prompts": prompts, "completions": completions, "answer": list(answers)}
    if isinstance(guarded, GuardedAsync):
        # In a notebook this thread has an event loop already.
        with ThreadPoolExecutor(1) as pool:
            values = pool.submit(lambda: asyncio.run(guarded(**arguments))).result()
    else:
        values = guarded(**arguments)
    return [math.nan if value is None else value for value in values]
