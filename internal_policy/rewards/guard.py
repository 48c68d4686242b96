"""A guard around reward functions that other people wrote: what they raise or return must not ruin a training."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import numbers
import sys
from collections.abc import Callable, Sequence
from typing import Any

from internal_policy.rewards.math_verifier import Failures
from internal_policy.utils.errors import UserError

logger = logging.getLogger(__name__)


class Guarded:
    """A reward function whose results are checked and whose exceptions cost one sample, not the training.

    A coroutine function stays one (the object made is of a subclass); a reward model (``nn.Module``) is given back as
    it is, for TRL calls it in a way of its own.

    Args:
        reward: Any callable in TRL's form.

    Attributes:
        reward: What was wrapped.
        own_failures: Samples on which it raised.
    """

    def __new__(cls, reward: Any) -> Any:
        """Choose the form that TRL will recognise."""
        if is_module(reward):
            return reward
        return super().__new__(GuardedAsync if _is_async(reward) else cls)

    def __init__(self, reward: Callable[..., Any]) -> None:
        self.reward = reward
        self.__name__ = _name(reward)
        self.own_failures = Failures()
        self._has_worked = False

    @property
    def failures(self) -> Failures:
        """The samples on which the function raised, and the failures it counted itself."""
        inner = getattr(self.reward, "failures", None)
        inner = inner if isinstance(inner, Failures) else Failures()
        own = self.own_failures
        return Failures(own.checked, own.crashes + inner.crashes, own.timeouts + inner.timeouts)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        """Score completions; what raises on a sample gives it 0.

        Args:
            prompts: The questions.
            completions: Texts or chats.
            kwargs: The data set's columns and what else TRL hands over.

        Returns:
            A float or None for each completion.

        Raises:
            UserError: The result is not one finite number for each completion, or the function has never worked.
        """
        batch = {"prompts": prompts, "completions": completions, **kwargs}
        n = len(completions)
        try:
            return self._whole(self.reward(**batch), n)
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
            return self._pieces(results)

    def _whole(self, result: Any, n: int) -> list[float | None]:
        values = _checked(result, n, self.__name__)
        self._has_worked = self._has_worked or n > 0
        self.own_failures.checked += n
        return values

    def _pieces(self, results: list[Any]) -> list[float | None]:
        errors = [result for result in results if isinstance(result, Exception)]
        if len(errors) == len(results) and not self._has_worked:
            first = one_line(errors[0]) if errors else "it raised on an empty batch"
            raise UserError(
                f"reward function {self.__name__!r} fails on every sample: {first}; "
                "it is called as f(prompts=..., completions=..., **columns) and returns a list of numbers"
            ) from (errors[0] if errors else None)
        values: list[float | None] = []
        for i, result in enumerate(results):
            fine = not isinstance(result, Exception)
            values += _checked(result, 1, self.__name__, first=i) if fine else [0.0]
        if errors and not self.own_failures.crashes:
            logger.warning(
                "reward function %r fails on some samples, which count as 0; the first: %s",
                self.__name__,
                one_line(errors[0]),
            )
        self._has_worked = True
        self.own_failures.checked += len(results)
        self.own_failures.crashes += len(errors)
        return values

    def __reduce__(self) -> tuple[Any, ...]:
        return Guarded, (self.reward,)


class GuardedAsync(Guarded):
    """A guard around a coroutine function, made by `Guarded`."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> Any:
        """Score completions as `Guarded` does."""
        batch = {"prompts": prompts, "completions": completions, **kwargs}
        n = len(completions)
        try:
            return self._whole(await self.reward(**batch), n)
        except UserError:
            raise
        except Exception:
            calls = [self.reward(**_sample(batch, i, n)) for i in range(n)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            # A cancellation and the like, and what is the user's to mend, are no failures of a sample.
            for result in results:
                if isinstance(result, UserError) or (
                    isinstance(result, BaseException) and not isinstance(result, Exception)
                ):
                    raise result from None
            return self._pieces(list(results))


def _sample(batch: dict[str, Any], i: int, n: int) -> dict[str, Any]:
    return {k: v[i : i + 1] if isinstance(v, (list, tuple)) and len(v) == n else v for k, v in batch.items()}


def _unwrapped(reward: Any) -> Any:
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


def _name(reward: Any) -> str:
    function = _unwrapped(reward)
    return str(getattr(function, "__name__", type(function).__name__))


def _is_async(reward: Any) -> bool:
    function = _unwrapped(reward)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def is_module(reward: Any) -> bool:
    """Say whether a reward is a model, which TRL calls in a way of its own.

    Args:
        reward: Anything.

    Returns:
        True for an ``nn.Module``.
    """
    # Who has a reward model has imported torch; nobody else should wait for it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(reward, torch.nn.Module)


def one_line(error: BaseException) -> str:
    """Put an exception in one line.

    Args:
        error: What was raised.

    Returns:
        Its type and the first line of its message.
    """
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _checked(result: Any, n: int, name: str, first: int = 0) -> list[float | None]:
    needed = f"needed is a list of {n} numbers, one for each completion" if n != 1 else "needed is a list of one number"
    if isinstance(result, (list, tuple)):
        values = list(result)
    elif hasattr(result, "tolist") and hasattr(result, "ndim"):
        if result.ndim != 1:
            raise UserError(f"reward function {name!r} returned shape {tuple(result.shape)}; {needed}")
        values = result.tolist()
    else:
        raise UserError(f"reward function {name!r} returned a {type(result).__name__}; {needed}")
    if len(values) != n:
        raise UserError(f"reward function {name!r} returned {len(values)} numbers; {needed}")
    return [_number(value, f"reward function {name!r}, sample {first + i + 1}") for i, value in enumerate(values)]


def _number(value: Any, where: str) -> float | None:
    if value is None:
        return None
    got = value
    # An element of an array or tensor.
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        got = value.item()
    if not isinstance(got, numbers.Real):
        raise UserError(f"{where}: returned a {type(value).__name__}; needed is a finite number, or None for no score")
    try:
        number = float(got)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{where}: returned {number}; needed is a finite number, or None for no score")
    return number
