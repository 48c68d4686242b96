"""Reward functions for training with TRL and for evaluation: the built-in ones, and a guard around the user's own.

TRL calls ``reward(prompts=..., completions=..., **columns)`` with lists of one entry per sample and expects one number
per sample, or None for "no score". What a user's function raises or returns must not ruin a training.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import logging
import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from internal_policy.data import arithmetic as tasks
from internal_policy.data.prompts import answer_text
from internal_policy.rewards.math_verifier import Failures, MathVerifier
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.imports import require_package

logger = logging.getLogger(__name__)


class MathReward:
    r"""1 where the last ``\boxed{}`` is mathematically equal to the answer, else 0.

    Args:
        time_limit: Seconds that one comparison may take.
        workers: Number of processes that compare; by default one per processor, at most 4.

    Raises:
        UserError: math-verify is not installed.
    """

    def __init__(self, time_limit: float = 5.0, workers: int | None = None) -> None:
        # Raised here rather than after the responses have been sampled.
        require_package("math_verify", "the reward math", "train")
        self.__name__ = "math_reward"
        self.verifier = MathVerifier(time_limit, workers)

    @property
    def failures(self) -> Failures:
        """How many comparisons crashed or timed out."""
        return self.verifier.failures

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Score completions against the column ``answer``.

        Args:
            prompts: The questions; not used.
            completions: Texts or chats.
            kwargs: The data set's columns, of which ``answer`` is needed.

        Returns:
            1.0 or 0.0 for each.

        Raises:
            UserError: There are no answers, or math-verify cannot be used.
        """
        answers = _answers(kwargs, len(completions), self.__name__)
        return [float(right) for right in self.verifier.check_many([_text(c) for c in completions], answers)]


class ExactReward:
    r"""1 where the last ``\boxed{}`` is the answer, character by character, else 0."""

    def __init__(self) -> None:
        self.__name__ = "exact_reward"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """Score completions against the column ``answer``.

        Args:
            prompts: The questions; not used.
            completions: Texts or chats.
            kwargs: The data set's columns, of which ``answer`` is needed.

        Returns:
            1.0 or 0.0 for each.

        Raises:
            UserError: There are no answers.
        """
        answers = _answers(kwargs, len(completions), self.__name__)
        return [float(tasks.check(_text(c), a)) for c, a in zip(completions, answers, strict=True)]


_BUILT_IN: dict[str, Callable[[], Callable[..., Any]]] = {"math": MathReward, "exact": ExactReward}


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


class GuardedReward:
    """A reward function whose results are checked and whose exceptions cost one sample, not the training.

    A coroutine function remains one: the object is then an `AsyncGuardedReward`. A reward model (``nn.Module``) is
    returned as it is, because TRL calls it in its own way.

    Args:
        reward: Any callable in TRL's form.

    Attributes:
        reward: The callable.
        own_failures: Samples on which it raised.
    """

    def __new__(cls, reward: Any) -> Any:
        """Choose the form that TRL will recognise."""
        if _is_module(reward):
            return reward
        function = _without_partial(reward)
        is_async = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004
        return super().__new__(AsyncGuardedReward if is_async else cls)

    def __init__(self, reward: Callable[..., Any]) -> None:
        self.reward = reward
        function = _without_partial(reward)
        self.__name__ = str(getattr(function, "__name__", type(function).__name__))
        self.own_failures = Failures()
        self._has_worked = False

    @property
    def failures(self) -> Failures:
        """The samples on which the function raised, and the failures that it counted itself."""
        inner = getattr(self.reward, "failures", None)
        inner = inner if isinstance(inner, Failures) else Failures()
        own = self.own_failures
        return Failures(own.checked, own.crashes + inner.crashes, own.timeouts + inner.timeouts)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        """Score completions; a sample on which the function raises gets 0.

        Args:
            prompts: The questions.
            completions: Texts or chats.
            kwargs: The data set's columns and what else TRL passes.

        Returns:
            A float or None for each completion.

        Raises:
            UserError: The result is not one finite number for each completion, or the function has never worked.
        """
        batch = {"prompts": prompts, "completions": completions, **kwargs}
        n = len(completions)
        try:
            return self._check_batch(self.reward(**batch), n)
        except UserError:
            raise
        except Exception:
            results: list[Any] = []
            for i in range(n):
                try:
                    results.append(self.reward(**_sample(batch, i, n)))
                except UserError:
                    raise
                except Exception as error:
                    results.append(error)
            return self._check_samples(results)

    def _check_batch(self, result: Any, n: int) -> list[float | None]:
        values = _checked(result, n, self.__name__)
        self._has_worked = self._has_worked or n > 0
        self.own_failures.checked += n
        return values

    def _check_samples(self, results: list[Any]) -> list[float | None]:
        errors = [result for result in results if isinstance(result, Exception)]
        first = _summary(errors[0]) if errors else "it raised on an empty batch"
        if len(errors) == len(results) and not self._has_worked:
            raise UserError(
                f"reward function {self.__name__!r} fails on every sample: {first}; "
                "it is called as f(prompts=..., completions=..., **columns) and returns a list of numbers"
            ) from (errors[0] if errors else None)
        values: list[float | None] = []
        for i, result in enumerate(results):
            values += [0.0] if isinstance(result, Exception) else _checked(result, 1, self.__name__, first=i)
        if errors and not self.own_failures.crashes:
            message = "reward function %r fails on some samples, which count as 0; the first: %s"
            logger.warning(message, self.__name__, first)
        self._has_worked = True
        self.own_failures.checked += len(results)
        self.own_failures.crashes += len(errors)
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return GuardedReward, (self.reward,)


class AsyncGuardedReward(GuardedReward):
    """A guard around a coroutine function, made by `GuardedReward`."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        """Score completions as `GuardedReward` does."""
        batch = {"prompts": prompts, "completions": completions, **kwargs}
        n = len(completions)
        try:
            return self._check_batch(await self.reward(**batch), n)
        except UserError:
            raise
        except Exception:
            calls = [self.reward(**_sample(batch, i, n)) for i in range(n)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            # A cancellation, and what the user has to fix, are not failures of a sample.
            for result in results:
                if isinstance(result, BaseException) and (
                    isinstance(result, UserError) or not isinstance(result, Exception)
                ):
                    raise result from None
            return self._check_samples(list(results))


def _sample(batch: dict[str, Any], i: int, n: int) -> dict[str, Any]:
    return {k: v[i : i + 1] if isinstance(v, (list, tuple)) and len(v) == n else v for k, v in batch.items()}


def _without_partial(reward: Any) -> Any:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def _is_module(reward: Any) -> bool:
    # Whoever has a reward model has imported torch; nobody else should wait for it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(reward, torch.nn.Module)


def _summary(error: BaseException) -> str:
    """The type and the first line of the message of an exception."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _checked(result: Any, n: int, name: str, first: int = 0) -> list[float | None]:
    needed = f"needed is a list of {n} numbers, one for each completion" if n != 1 else "needed is a list of one number"
    if hasattr(result, "tolist") and hasattr(result, "ndim"):
        if result.ndim != 1:
            raise UserError(f"reward function {name!r} returned shape {tuple(result.shape)}; {needed}")
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise UserError(f"reward function {name!r} returned a {type(result).__name__}; {needed}")
    if len(result) != n:
        raise UserError(f"reward function {name!r} returned {len(result)} numbers; {needed}")
    return [_number(value, f"reward function {name!r}, sample {first + i + 1}") for i, value in enumerate(result)]


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    # An element of an array or tensor.
    got = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(got, numbers.Real):
        raise UserError(f"{where}: returned a {type(value).__name__}; needed is a finite number, or None for no score")
    try:
        number = float(got)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{where}: returned {number}; needed is a finite number, or None for no score")
    return number


def as_rewards(reward: Any, *, exact: bool) -> list[Callable[..., Any]]:
    """Convert what a user gives into the reward functions that TRL takes.

    Args:
        reward: None, a name (``math``, ``exact``), ``module:function``, a callable, or a list of these.
        exact: Whether None means the exact comparison, as for the embedded models' tasks, or the mathematical one.

    Returns:
        The reward functions, guarded.

    Raises:
        UserError: The reward is something else, or cannot be imported.
    """
    if reward is None:
        reward = "exact" if exact else "math"
    if isinstance(reward, (list, tuple)) and reward:
        return [made for item in reward for made in as_rewards(item, exact=exact)]
    if isinstance(reward, str) and reward in _BUILT_IN:
        return [GuardedReward(_BUILT_IN[reward]())]
    if isinstance(reward, str) and ":" in reward:
        return [GuardedReward(_import_function(reward))]
    if callable(reward):
        return [reward if isinstance(reward, GuardedReward) else GuardedReward(reward)]
    known = f"{', '.join(_BUILT_IN)}, module:function, a callable or a list of these"
    if isinstance(reward, str):
        raise UserError(f"reward {reward!r} is unknown; use {known}")
    got = "an empty list" if isinstance(reward, (list, tuple)) else f"of type {type(reward).__name__}"
    raise UserError(f"reward is {got}; use {known}")


def _import_function(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    # As with python -m, the user's own file comes first.
    if here not in sys.path:
        sys.path.insert(0, here)
    # The file may be newer than the last look at its folder.
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and (module_name == missing or module_name.startswith(missing + ".")):
            raise UserError(f"reward {path!r}: there is no module {module_name!r} here or installed") from error
        raise UserError(f"reward {path!r}: the module {module_name!r} cannot be imported: {_summary(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "has no" if function is None else "has something that cannot be called as"
        raise UserError(f"reward {path!r}: the module {module_name!r} {what} {attribute!r}; needed is a function")
    return function  # type: ignore[no-any-return]


def count_failures(rewards: Iterable[Any]) -> dict[str, int]:
    """Count the samples that reward functions could not score since they were made, as ``crashes`` and ``timeouts``."""
    counts = [f for f in (getattr(r, "failures", None) for r in rewards) if isinstance(f, Failures)]
    return {"crashes": sum(f.crashes for f in counts), "timeouts": sum(f.timeouts for f in counts)}


def needs_answers(rewards: Iterable[Any]) -> bool:
    """Return whether one of the rewards is a built-in verifier, which needs reference answers."""
    return any(isinstance(getattr(r, "reward", r), (MathReward, ExactReward)) for r in rewards)


def score(
    reward: Callable[..., Any], texts: Sequence[str], answers: Sequence[Any], prompts: Sequence[Any] | None = None
) -> list[float]:
    """Score plain responses with a reward function, as TRL would in training.

    Args:
        reward: One of `as_rewards`.
        texts: The responses.
        answers: Their reference answers, the column ``answer``.
        prompts: Their prompts; where one is a chat, the completion that the function gets is a chat, too.

    Returns:
        A number for each; NaN where the function gave no score.

    Raises:
        UserError: The function's result cannot be used, or it is a reward model.
    """
    if _is_module(reward):
        raise UserError("a reward model cannot score an evaluation; give a reward function")
    prompts = list(prompts) if prompts is not None else [""] * len(texts)
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    guarded = reward if isinstance(reward, GuardedReward) else GuardedReward(reward)
    arguments = {"prompts": prompts, "completions": completions, "answer": list(answers)}
    if isinstance(guarded, AsyncGuardedReward):
        # In a notebook this thread already has a running event loop.
        with ThreadPoolExecutor(1) as pool:
            values = pool.submit(lambda: asyncio.run(guarded(**arguments))).result()
    else:
        values = guarded(**arguments)
    return [math.nan if value is None else value for value in values]
