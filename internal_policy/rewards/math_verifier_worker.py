r"""The process that compares answers: reads a JSON line ``[boxed, answer]``, writes ``1`` or ``0``.

It runs as a script of its own (``python -P verifier_worker.py SECONDS BYTES``) and imports nothing of this package.

What it reads was written by a model, so nothing in it may ever run as a program. SymPy turns strings into expressions
with ``eval`` (``parse_expr``, behind ``sympify`` and ``Number``). math-verify gets there in two ways: by its
`ExprExtractionConfig`, which is not used here, and by the number tokens of the LaTeX grammar. Here `parse_expr` is
replaced by a reader of numbers, so that no text reaches ``eval`` at all. Should a future version find another way, the
audit hook is still there: Python asks it before it compiles, writes, connects or starts anything, and it cannot be
removed.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import signal
import sys
from typing import Any

_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", re.ASCII)

_LOOKS = [
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!\s*"), ""),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:text|textbf|textit|mbox|mathrm)\s*\{([^{}\\]*)\}"), r"\1"),
    (re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~"), " "),
    # Between two words or numbers a space has a meaning.
    (re.compile(r"\s+(?![0-9a-zA-Z])|(?<![0-9a-zA-Z])\s+"), ""),
    (re.compile(r"\s+"), " "),
]

_WRAPPINGS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")]

# SymPy writes the arithmetic of monomials as source, with counted names and nothing else.
_MONOMIALS = re.compile(r"def monomial_[a-z]+\([ABk, ]+\):\n[\sa-zA-Z0-9(),=+*<>:-]*")
_HARMLESS = {
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


def read_number(text: str, *_: Any, **__: Any) -> Any:
    """Stand in for SymPy's `parse_expr`, for numbers only.

    Args:
        text: A number as the LaTeX grammar has it.

    Returns:
        The SymPy number.

    Raises:
        ValueError: It is anything else.
    """
    sympy = importlib.import_module("sympy")
    text = str(text).strip()
    if _INTEGER.fullmatch(text):
        return sympy.Integer(int(text))
    if _DECIMAL.fullmatch(text):
        return sympy.Float(text)
    raise ValueError("not a number")


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """Refuse, as an audit hook, all that a comparison does not need.

    Args:
        event: What Python is about to do.
        args: With what.

    Raises:
        PermissionError: It is not on the short list.
    """
    if event in _HARMLESS or event.startswith(("cpython.", "gc.")):
        return
    # Importing is reading a file; where no .pyc is at hand, compiling it too.
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


def seal(memory: int) -> None:
    """Take from this process, for good, what a comparison does not need.

    Args:
        memory: The address space it may have, in bytes.
    """
    # What is imported later may not compile strings any more, and SymPy's units, which `simplify` wants, are made so.
    importlib.import_module("math_verify")
    importlib.import_module("sympy.physics.units")
    parser = importlib.import_module("sympy.parsing.sympy_parser")
    vars(parser)["parse_expr"] = read_number
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        limits = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
        for name, value in limits.items():
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            # A system may not know a limit (macOS has no RLIMIT_AS to set): the time limit holds all the same.
            try:
                resource.setrlimit(getattr(resource, name), (value, value))
            except (OSError, ValueError):
                continue
    sys.addaudithook(refuse)


def bare(text: str) -> str:
    r"""Take an answer out of its wrapping.

    Args:
        text: An answer, perhaps inside ``$ $``, ``\( \)``, ``\[ \]`` or ``\boxed{ }``.

    Returns:
        The LaTeX without that.
    """
    inner: str | None = text.strip()
    while inner is not None:
        text = inner
        inner = next((i for i in (_inside(text, *pair) for pair in _WRAPPINGS) if i is not None), None)
    return text


def _inside(text: str, start: str, end: str) -> str | None:
    if len(text) <= len(start) + len(end) or not (text.startswith(start) and text.endswith(end)):
        return None
    inner = text[len(start) : len(text) - len(end)].strip()
    # The wrapping must be one: "$1$ and $2$" is not.
    return inner if inner and start not in inner and _balanced(inner) else None


def plain(text: str) -> str:
    r"""Drop from an answer what changes its looks only: wrapping, spacing, sizes of brackets, fonts of words.

    Args:
        text: An answer in LaTeX.

    Returns:
        The answer; two that are equal now mean the same, also where they are no mathematics (``\text{Evelyn}``).
    """
    text = bare(text).replace("{,}", ",")
    for pattern, replacement in _LOOKS:
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
def _parsed(latex: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    return tuple(parse(rf"\boxed{{{latex}}}", [config], parsing_timeout=None))


def same(boxed: str, answer: str) -> bool:
    """Compare what a response put in its box with the reference answer.

    Args:
        boxed: What is in the box.
        answer: The reference answer.

    Returns:
        True if they are mathematically the same.
    """
    from math_verify import verify

    return bool(verify(list(_parsed(bare(answer))), list(_parsed(bare(boxed))), timeout_seconds=None))


def main() -> None:
    """Answer until the input ends."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    # What a library prints must not get between the answers.
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    # The interrupt of a terminal is for the parent, which closes the input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        import math_verify  # noqa: F401

        import_error = None
    except Exception as error:
        import_error = f"{type(error).__name__}: {error}".splitlines()[0]
    if import_error:
        replies.write(f"error {import_error}\n")
        return
    import logging

    logging.disable(logging.CRITICAL)
    seal(memory)
    # The first comparison loads parts of SymPy; it is none of the answers' time.
    same(r"\frac{1}{2}", "0.5")
    same("(1,2)", "x=1")
    replies.write("ready\n")
    for line in sys.stdin:
        # The parent kills a worker that is late; this one is for a worker that has no parent any more.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            answer = same(*json.loads(line))
        except (Exception, RecursionError):
            answer = False
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write("1\n" if answer else "0\n")


if __name__ == "__main__":
    main()
