"""Make this package's code fit to travel to an NDIF server, where it is not installed.

nnsight sends a trace as source text with what it refers to: functions go as their source, so that client and server
may run different versions of Python. Two things have no source that it could find, and are given one here: the methods
that ``dataclass`` writes, and functions behind a decorator.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

PACKAGE = __name__.split(".")[0]


@contextmanager
def by_value() -> Iterator[None]:
    """Send this package's functions and classes whole instead of by name; as before on any exit."""
    cloudpickle, package = importlib.import_module("cloudpickle"), importlib.import_module(PACKAGE)
    known = PACKAGE in cloudpickle.list_registry_pickle_by_value()
    if not known:
        cloudpickle.register_pickle_by_value(package)
    try:
        yield
    finally:
        if not known:
            cloudpickle.unregister_pickle_by_value(package)


def plain(cls: type) -> type:
    """Rewrite a dataclass as a class that can be built from source on any version of Python.

    Args:
        cls: the dataclass.

    Returns:
        A class with the methods of ``cls`` whose fields are all given by keyword.
    """
    own = {
        name: _undecorated(member)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not (name.startswith("__") and name.endswith("__"))
    }
    return type(cls.__name__, (), {**own, "__init__": _take_fields})


def _take_fields(self: object, **fields: object) -> None:
    for name, value in fields.items():
        setattr(self, name, value)


def _undecorated(function: FunctionType) -> FunctionType:
    """Let a function refer to what is behind the decorators of this package's other functions.

    nnsight looks for the names that a decorated function uses where the decorator was written, and misses them.
    """
    names = {
        name: inspect.unwrap(value) if inspect.isfunction(value) and value.__module__.startswith(PACKAGE) else value
        for name, value in function.__globals__.items()
    }
    bare = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    bare.__kwdefaults__ = function.__kwdefaults__
    return bare
