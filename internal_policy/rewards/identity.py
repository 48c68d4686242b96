"""How a reward is named and recognised in what is stored, so that a result is not taken for that of another reward."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
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
    script or a notebook, that of the function or class itself. Default arguments, what a function closes over, what
    `functools.partial` binds, and the arguments with which an object was made, where its attributes have their names,
    count too: plain values, collections of them, and functions. What a module imports, files that it reads, and the
    weights of a reward model do not.

    Args:
        rewards: those that `rewards.functions.as_rewards` returns.

    Returns:
        16 hexadecimal digits, the same in every process; None if all are built in.
    """
    # Imported here so that the command line can read this module quickly.
    from internal_policy.rewards.functions import ExactReward, MathReward

    unguarded = [getattr(reward, "reward", reward) for reward in rewards]
    own = [reward for reward in unguarded if not isinstance(reward, (ExactReward, MathReward))]
    if not own:
        return None
    return hashlib.sha256(json.dumps([_describe(reward, ()) for reward in own]).encode()).hexdigest()[:16]


def _describe(value: Any, above: tuple[int, ...]) -> Any:
    """JSON that tells values apart; ``above`` are the ids of what contains them: a function may refer to itself."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if id(value) in above:
        return "itself"
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return _sorted([_describe(key, above), _describe(each, above)] for key, each in value.items())
    if isinstance(value, (set, frozenset)):
        return _sorted(_describe(each, above) for each in value)
    if isinstance(value, (list, tuple)):
        return [_describe(each, above) for each in value]
    if isinstance(value, functools.partial):
        return [_describe(each, above) for each in (value.func, value.args, value.keywords)]
    if inspect.ismethod(value):
        return [value.__name__, _describe(value.__self__, above)]
    if inspect.isfunction(value):
        closed = dict(zip(value.__code__.co_freevars, map(_content, value.__closure__ or ()), strict=True))
        parts = (value.__defaults__, value.__kwdefaults__, closed, getattr(value, "__wrapped__", None))
        return [value.__qualname__, _source(value), *(_describe(each, above) for each in parts)]
    if isinstance(value, type):
        return [value.__qualname__, _source(value)]
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", None) == 0:
        # A number of numpy.
        return repr(value.item())
    if not callable(value):
        return type(value).__qualname__
    return [getattr(value, "__qualname__", ""), _describe(type(value), above), _describe(_made_with(value), above)]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # The name is not bound yet.
        return None


def _sorted(items: Iterable[Any]) -> list[Any]:
    return sorted(items, key=json.dumps)


def _made_with(made: Any) -> dict[str, Any]:
    """The attributes of an object that have the names of the arguments of its class; others may change with its use."""
    try:
        names = inspect.signature(type(made)).parameters
    except (TypeError, ValueError):
        return {}
    own = getattr(made, "__dict__", {})
    return {name: own[key] for name in names for key in (name, f"_{name}") if key in own}


def _source(target: Any) -> Any:
    """The source of a module or, in a script or a notebook, of a function or class; its bytecode if there is none."""
    module = sys.modules.get(target.__module__ or "")
    try:
        return inspect.getsource(target if module is None or target.__module__ == "__main__" else module)
    except (OSError, TypeError):
        code = getattr(target, "__code__", None)
        if code is not None:
            return _bytecode(code)
    members = [getattr(each, "__func__", getattr(each, "fget", each)) for each in vars(target).values()]
    methods = _sorted([each.__name__, _source(each)] for each in members if inspect.isfunction(each))
    above = [_source(base) for base in target.__bases__ if base.__module__ == "__main__"]
    return [f"{target.__module__}.{target.__qualname__}", methods, above]


def _bytecode(code: Any) -> list[Any]:
    return [code.co_code.hex(), [_constant(each) for each in code.co_consts], list(code.co_names)]


def _constant(value: Any) -> Any:
    if inspect.iscode(value):
        return _bytecode(value)
    if isinstance(value, frozenset):
        return _sorted(map(_constant, value))
    return [_constant(each) for each in value] if isinstance(value, tuple) else repr(value)
