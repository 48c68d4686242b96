r"""The process that compares answers: it reads JSON lines ``[boxed, answer]`` and writes ``1`` or ``0`` for each.

It runs as a script of its own (``python -P math_verifier_worker.py SECONDS BYTES``), imports nothing of this package,
and ends itself when a comparison takes too long, so that no worker outlives a parent that was killed.

What it reads was written by a model, so nothing in it may ever run as a program. SymPy turns strings into expressions
with ``eval`` (``parse_expr``, behind ``sympify`` and ``Number``). math-verify gets there in two ways: by its
`ExprExtractionConfig`, which is not used here, and by the number tokens of the LaTeX grammar. Here `parse_expr` is
replaced by a reader of numbers, so that no text reaches ``eval`` at all. Should a future version find another way, the
audit hook is still there: Python asks it before it compiles, writes, connects or starts anything, and it cannot be
removed.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import logging
import os
import re
import signal
import sys
from contextlib import suppress
from typing import Any

START_LIMIT = 120
"""Seconds that a worker may take to import math-verify."""

_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)

_FORMATTING = [
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!\s*"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|textit|mbox|mathrm)\s*\{([^{}\\]*)\}"), r"\1"),
    (re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    # Between two words or numbers a space has a meaning.
    (re.compile(r"\s+(?![0-9a-zA-Z])|(?<![0-9a-zA-Z])\s+"), ""),
    (re.compile(r"\s+"), " "),
]

_DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")]

# SymPy writes the arithmetic of monomials as source, with counted names and nothing else.
_MONOMIALS = re.compile(r"def monomial_[a-z]+\([ABk, ]+\):\n[\sa-zA-Z0-9(),=+*<>:-]*")
_ALLOWED_EVENTS = {
    "array.__new__",
    "builtins.id",
    "exec",  # needs a code object, and those come from `compile`
    "import",
    "marshal.loads",
    "object.__getattr__",
    "object.__setattr__",
    "os.listdir",
    "os.scandir",
    "sys._getframe",
    "sys.excepthook",
    "sys.unraisablehook",
}


def parse_number(text: str, *_: Any, **__: Any) -> Any:
    """Replace SymPy's `parse_expr`, for numbers only.

    Args:
        text: A number of the LaTeX grammar.

    Returns:
        The SymPy number.

    Raises:
        ValueError: The text is anything else.
    """
    sympy = importlib.import_module("sympy")
    text = str(text).strip()
    if _INTEGER.fullmatch(text):
        return sympy.Integer(int(text))
    if _DECIMAL.fullmatch(text):
        return sympy.Float(text)
    raise ValueError("not a number")


def deny(event: str, args: tuple[Any, ...]) -> None:
    """Refuse, as an audit hook, everything that a comparison does not need.

    Args:
        event: What Python is about to do.
        args: The arguments of the event.

    Raises:
        PermissionError: The event is not on the short list.
    """
    if event in _ALLOWED_EVENTS or event.startswith(("cpython.", "gc.")):
        return
    # Importing reads a file, and compiles it where there is no .pyc.
    if event == "open" and args[1] in ("r", "rb"):
        return
    if event == "compile":
        source, name = args[0], args[1]
        if isinstance(name, str) and name.endswith(".py"):
            return
        if isinstance(source, bytes):
            source = source.decode("utf-8", "replace")
        if isinstance(source, str) and "__" not in source and _MONOMIALS.fullmatch(source):
            return
    raise PermissionError(event)


def enter_sandbox(memory: int) -> None:
    """Irrevocably forbid this process what a comparison does not need, and more address space than ``memory`` bytes."""
    # SymPy's units, which `simplify` imports, compile strings, and that is refused from here on.
    importlib.import_module("math_verify")
    importlib.import_module("sympy.physics.units")
    importlib.import_module("sympy.parsing.sympy_parser").parse_expr = parse_number  # type: ignore[attr-defined]
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        for kind, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # macOS cannot set RLIMIT_AS; the time limit still applies there.
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, (value, value))
    sys.addaudithook(deny)


def strip_delimiters(text: str) -> str:
    r"""Remove the delimiters around an answer.

    Args:
        text: An answer, perhaps inside ``$ $``, ``\( \)``, ``\[ \]`` or ``\boxed{ }``.

    Returns:
        The LaTeX inside.
    """
    inner: str | None = text.strip()
    while inner is not None:
        text = inner
        inner = next((i for i in (_inside(text, *pair) for pair in _DELIMITERS) if i is not None), None)
    return text


def _inside(text: str, start: str, end: str) -> str | None:
    if len(text) <= len(start) + len(end) or not (text.startswith(start) and text.endswith(end)):
        return None
    inner = text[len(start) : len(text) - len(end)].strip()
    # "$1$ and $2$" is not one pair of delimiters.
    return inner if inner and start not in inner and _balanced(inner) else None


def normalize(text: str) -> str:
    r"""Remove from an answer what changes its appearance only: delimiters, spacing, sizes of brackets, fonts of words.

    Args:
        text: An answer in LaTeX.

    Returns:
        The answer. Two that are equal now mean the same, even if they are not mathematics (``\text{Evelyn}``).
    """
    text = strip_delimiters(text).replace("{,}", ",")
    for pattern, replacement in _FORMATTING:
        text = pattern.sub(replacement, text)
    return text.strip()


def _balanced(text: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


@functools.lru_cache(maxsize=512)
def _parse(latex: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    return tuple(parse(rf"\boxed{{{latex}}}", [config], parsing_timeout=None))


def is_equal(boxed: str, answer: str) -> bool:
    """Return whether the content of a response's box is mathematically equal to the reference answer."""
    from math_verify import verify

    return bool(
        verify(list(_parse(strip_delimiters(answer))), list(_parse(strip_delimiters(boxed))), timeout_seconds=None)
    )


def _set_timer(seconds: float) -> None:
    """Let this process be ended after so many seconds; 0 cancels it."""
    if hasattr(signal, "setitimer"):
        # By the kernel, as the default action of the signal: a handler would wait for the end of a C function.
        signal.setitimer(signal.ITIMER_REAL, seconds)
    elif seconds:  # Windows
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """Answer until the input ends."""
    time_limit, memory_limit = float(sys.argv[1]), int(sys.argv[2])
    if hasattr(signal, "SIGALRM"):
        # A parent may have ignored or blocked the signal, which its children inherit.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _set_timer(START_LIMIT)
    # What a library prints must not get between the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    # A terminal's interrupt is for the parent, which closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import math_verify  # noqa: F401
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        replies.write(f"error {message}\n")
        return
    logging.disable(logging.CRITICAL)
    enter_sandbox(memory_limit)
    # The first comparison loads parts of SymPy, which must not count against the time limit of an answer.
    is_equal(r"\frac{1}{2}", "0.5")
    is_equal("(1,2)", "x=1")
    _set_timer(0)
    replies.write("ready\n")
    for line in sys.stdin:
        try:
            _set_timer(time_limit)
            equal = is_equal(*json.loads(line))
        except Exception:
            equal = False
        _set_timer(0)
        replies.write("1\n" if equal else "0\n")


if __name__ == "__main__":
    main()
