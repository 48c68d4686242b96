"""What a base installation lacks: packages that an extra brings."""

from __future__ import annotations

from importlib.util import find_spec

from internal_policy.utils.errors import UserError


def require(package: str, what: str, extra: str) -> None:
    """Refuse what needs a package that is not installed; nothing is imported.

    Args:
        package: its name in Python.
        what: what needs it.
        extra: the extra of this package that brings it.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec(package) is None:
        name = package.replace("_", "-")
        raise UserError(
            f"{what} needs the package {name}, which is not installed; in a clone: pip install -e '.[{extra}]'"
        )
