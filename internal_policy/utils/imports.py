"""Lazy imports: public names on first use, modules without their notices, and packages of an extra."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from internal_policy.utils.errors import UserError
from internal_policy.utils.logging import quiet_libraries


def lazy_names(
    package: str, home: Mapping[str, str], need_trl: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package.

    `home` names, for each public name, the module of the package that defines it; an empty one for a module itself.
    Those in `need_trl` raise a `UserError` where trl is not installed.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in need_trl:
            require_package("trl", "training", "train")
        if not home[name]:
            return import_quietly(f"{package}.{name}")
        return getattr(import_quietly(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home)


def import_quietly(name: str) -> ModuleType:
    """Import a module by its full name, without the notices of the libraries that it imports."""
    with quiet_libraries(bars=False):
        return import_module(name)


def require_package(package: str, what: str, extra: str) -> None:
    """Raise a `UserError` if a package that an extra of this one brings is not installed; nothing is imported."""
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(
            f"{what} needs the package {name}, which is not installed; in a clone: pip install -e '.[{extra}]'"
        )
