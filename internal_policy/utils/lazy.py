"""Public names of a package that are imported on first use, so that importing the package costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from internal_policy.utils.quiet import import_quietly


def lazy_names(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its ``__name__``.
        home: the module, within the package, that each public name is defined in; an empty one for a module itself.

    Returns:
        Both functions.
    """

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not home[name]:
            return import_quietly(f"{package}.{name}")
        return getattr(import_quietly(f"{package}.{home[name]}"), name)

    return get, lambda: sorted(home)
