"""The libraries that speak HTTP below the hub's client: which of them it is changes from release to release."""

from __future__ import annotations

HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
"""Named and never imported: the hub's client brings one of them, and their exceptions have no class in common."""


def is_of_http(error: BaseException) -> bool:
    """Tell whether an exception is one of an HTTP library.

    Args:
        error: the exception.

    Returns:
        True where no answer came, or none that could be read: an answer that refuses is the hub's own exception.
    """
    return type(error).__module__.partition(".")[0] in HTTP_LIBRARIES
