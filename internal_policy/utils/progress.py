"""Progress bars with rate and remaining time; quiet where nobody looks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from internal_policy.utils.console import console as open_console
from internal_policy.utils.output import is_json, is_quiet
from internal_policy.utils.quiet import quiet_libraries
from internal_policy.utils.shell import is_main_process

logger = logging.getLogger(__name__)


def _is_shown(console: Console) -> bool:
    """Whether somebody looks: FORCE_COLOR colours a log, and what moves on a terminal would only spoil it."""
    return console.is_interactive and sys.stderr.isatty() and is_main_process() and not is_quiet()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "-", style="cyan")


@contextmanager
def status(description: str) -> Iterator[None]:
    """Show on standard error that something runs whose length is not known.

    Args:
        description: what runs.
    """
    logger.info("%s", description)
    console = open_console(stderr=True)
    if not _is_shown(console):
        yield
        return
    with console.status(description):
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Say that the libraries are being imported, which takes seconds, and keep away what they say of themselves.

    Where standard error is no terminal it is one line, and none under --json and --quiet, or where they are there.
    """
    if "torch" in sys.modules:
        with quiet_libraries(bars=False):
            yield
        return
    what = "loading the libraries (torch, transformers)"
    if not sys.stderr.isatty() and is_main_process() and not (is_quiet() or is_json()):
        print(what, file=sys.stderr, flush=True)  # noqa: T201
    with status(what), quiet_libraries(bars=False):
        yield


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error while something long runs.

    Args:
        description: what runs.
        total: how many units in all.
        done: how many were done before.

    Yields:
        A function to call with the number of units just done.
    """
    logger.info("%s: %d of %d done", description, done, total)
    console = open_console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not _is_shown(console), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda units: bar.update(task, advance=units)
