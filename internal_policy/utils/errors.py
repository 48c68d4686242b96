"""The one exception that carries a message for the user."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can mend, told in one line.

    The message says what was got, what is needed and what to do next. The command line prints it without a
    traceback and exits with code 2; from Python it is an ordinary exception.
    """
