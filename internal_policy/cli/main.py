"""The command line: find the command, parse its options, run it, and report errors in one line."""

from __future__ import annotations

import inspect
import io
import logging
import os
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from internal_policy.cli.parser import COMMANDS, PROGRAM, command_class, parse
from internal_policy.utils.citation import __version__
from internal_policy.utils.errors import UserError
from internal_policy.utils.locks import keep_locks
from internal_policy.utils.output import is_quiet, output_mode
from internal_policy.utils.shell import is_main_process, rank, visible

INTERRUPTED = 130
_MAX_MESSAGE = 2000
"""Largest number of characters of a message, which quotes user input of any length."""
_HELP = """\
usage: internal-policy COMMAND [OPTIONS]

Internal policies of language models: entropies, boundary layer, training, figures (arXiv 2512.19673v3).

commands:
{commands}

options:
  -h, --help              Show this help; COMMAND --help shows the options of a command.
  --version               Show the version.
  --install-completion    Install completion for the shell; name the shell if it is not detected.
  --show-completion       Print what would be installed.
"""


def run(words: Sequence[str]) -> None:
    """Run the command line, given as words without the name of the program."""
    name, *rest = words
    if name in ("-h", "--help"):
        print(_help(), end="")  # noqa: T201
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")  # noqa: T201
    elif name in ("--complete", "--show-completion", "--install-completion"):
        from internal_policy.cli import completion

        completion.run(name, rest)
    else:
        command = parse(name, rest)
        with output_mode(json=command.json, quiet=command.quiet), keep_locks():
            command.run()


def main() -> None:
    """Run the command line: exit code 2 and one line for an error that the user can correct, 130 for an interrupt."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a replacement, instead of a crash after the work is done.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    words = sys.argv[1:]
    if not words:
        print(_help(), end="", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    # TRL reports each training to the hub; who wants that sets the variable to 0.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    debug = "--debug" in words
    try:
        _refuse_non_utf8(words)
        with _log_to_stderr(debug):
            run(words)
    except UserError as error:
        _fail(str(error), with_traceback=debug)
    except EOFError as error:
        _fail(f"a file ends too early ({error or 'EOFError'}); --debug shows which", with_traceback=debug)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(
            f"{where}{error.strerror or error}; fix this and repeat the command, which resumes where it stopped",
            with_traceback=debug,
        )
    except KeyboardInterrupt:
        without = " without --overwrite" if "--overwrite" in words else ""
        print(f"interrupted; the same command{without} resumes where it stopped", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _help() -> str:
    width = max(shutil.get_terminal_size().columns, 40)
    lines = []
    for name in COMMANDS:
        text = (inspect.getdoc(command_class(name)) or "").partition("\n\n")[0]
        lines += textwrap.wrap(f"  {name:10}{' '.join(text.split())}", width, subsequent_indent=" " * 12)
    return _HELP.format(commands="\n".join(lines))


def _refuse_non_utf8(words: Sequence[str]) -> None:
    """Refuse paths with bytes that are not text before the work, because a manifest cannot contain them."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{word}: holds bytes that are not UTF-8; rename it, or give another name") from error


class _OneLineFormatter(logging.Formatter):
    """Puts every message on one line, whatever its names and templates contain."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), one_line=True)


@contextmanager
def _log_to_stderr(debug: bool) -> Iterator[None]:
    """Show the messages of the package on standard error, in the main process only; --debug shows all levels."""
    handler = logging.StreamHandler() if is_main_process() else logging.NullHandler()
    handler.setFormatter(_OneLineFormatter("%(message)s"))
    handler.addFilter(lambda record: record.levelno >= logging.ERROR or not is_quiet())
    logger = logging.getLogger("internal_policy")
    before = logger.level
    logger.addHandler(handler)
    if debug:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _fail(message: str, *, with_traceback: bool = False) -> NoReturn:
    if with_traceback:
        print(visible(traceback.format_exc()), file=sys.stderr, end="")  # noqa: T201
    # Each of several processes names its own error, because they may differ.
    which = "" if is_main_process() else f" (process {rank()})"
    if len(message) > _MAX_MESSAGE:
        # The end says what to do next.
        message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
    print(f"error{which}: {visible(message, one_line=True)}", file=sys.stderr)  # noqa: T201
    sys.exit(2)
