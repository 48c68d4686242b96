"""Words that follow a number."""

from __future__ import annotations

_PLURALS = {"analysis": "analyses", "process": "processes"}


def counted(number: int, noun: str) -> str:
    """Write a number of things.

    Args:
        number: how many.
        noun: one of them.

    Returns:
        ``1 response``, ``2 responses``.
    """
    return f"{number} {noun if number == 1 else _PLURALS.get(noun, noun + 's')}"
