"""How a reward is named and recognised in what is stored, so that a result is not taken for that of another reward."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable
from typing import Any


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


def digest_code(rewards: Iterable[Any]) -> str | None:
    """Digest the code of the rewards that are not built in.

    For a function or a class of a module, that is the source of the whole module, so that its helpers count; in a
    script or a notebook, that of the function or class itself. Arguments that `functools.partial` binds, plain values
    that a function closes over, and plain public attributes of an object count too. What a module imports, files that
    it reads, and the weights of a reward model do not.

    Args:
        rewards: those that `rewards.functions.as_rewards` returns.

    Returns:
        16 hexadecimal digits; None if all are built in.
    """
    # Imported here so that the command line can read this module quickly.
    from internal_policy.rewards.functions import ExactReward, MathReward

    unguarded = [getattr(reward, "reward", reward) for reward in rewards]
    own = [reward for reward in unguarded if not isinstance(reward, (ExactReward, MathReward))]
    if not own:
        return None
    return hashlib.sha256(json.dumps([_describe(reward) for reward in own]).encode()).hexdigest()[:16]


def _describe(reward: Any) -> list[Any]:
    """The name, the source and the plain values of a reward."""
    if isinstance(reward, functools.partial):
        bound = {str(place): value for place, value in enumerate(reward.args)} | reward.keywords
        return [*_describe(reward.func), _plain(bound)]
    if inspect.ismethod(reward):
        return [reward.__name__, *_describe(reward.__self__)]
    if inspect.isfunction(reward):
        closed = dict(zip(reward.__code__.co_freevars, reward.__closure__ or (), strict=True))
        return [reward.__qualname__, _source(reward), _plain({name: _content(cell) for name, cell in closed.items()})]
    kind = reward if isinstance(reward, type) else type(reward)
    name = getattr(reward, "__qualname__", kind.__qualname__)
    public = {name: value for name, value in getattr(reward, "__dict__", {}).items() if not name.startswith("_")}
    return [name, _source(kind), {} if kind is reward else _plain(public)]


def _source(target: Any) -> str:
    """The source of a module or, in a script or a notebook, of a function or class; its bytecode if there is none."""
    module = sys.modules.get(target.__module__)
    try:
        return inspect.getsource(target if module is None or target.__module__ == "__main__" else module)
    except (OSError, TypeError):
        code = getattr(target, "__code__", None)
        return f"{target.__module__}.{target.__qualname__}" if code is None else _bytecode(code)


def _bytecode(code: Any) -> str:
    constants = [_bytecode(each) if inspect.iscode(each) else repr(each) for each in code.co_consts]
    return json.dumps([code.co_code.hex(), constants, code.co_names])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # A name that is not bound yet.
        return None


def _plain(values: dict[str, Any]) -> dict[str, str]:
    """Those values whose text is the same in every process."""
    return {name: repr(value) for name, value in sorted(values.items()) if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
