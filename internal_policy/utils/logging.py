"""Output while a call runs: this package's progress, without the libraries' bars, warnings and notices.

To see those as well, and what this package does step by step, use ``logging``::

    logging.basicConfig(level=logging.INFO)
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from internal_policy.utils.output import is_json, is_quiet
from internal_policy.utils.shell import is_main_process

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Task

logger = logging.getLogger(__name__)

# The client of the hub sets the level of its own logger when it is imported, and warns of each retry.
_LOGGERS = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "huggingface_hub.utils._http", "trl")
_TRANSFORMERS = "transformers.utils.logging"
_MODULES = r"(accelerate|bitsandbytes|datasets|huggingface_hub|peft|torch|tqdm|transformers|trl)(\.|$)"


@contextmanager
def quiet_libraries(*, bars: bool = True) -> Iterator[None]:
    """Suppress progress bars, warnings and notices of the libraries; as a decorator, while a function runs.

    Afterwards all settings are restored. Errors are shown, and so are messages of this package and of the caller's own
    code. Nothing is suppressed if the logger ``internal_policy`` is enabled for INFO.

    Args:
        bars: suppress progress bars as well, for which the hub's client is imported.
    """
    if logging.getLogger("internal_policy").isEnabledFor(logging.INFO):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=_MODULES)
        # Deprecation warnings of the libraries name their caller, which is this package.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"internal_policy(\.|$)")
        # Otherwise tokenizers warns of each process that is started.
        stack.enter_context(_environment_default("TOKENIZERS_PARALLELISM", "false"))
        for name in _LOGGERS:
            stack.enter_context(_errors_only(logging.getLogger(name)))
        stack.enter_context(_quiet_transformers())
        if bars:
            stack.enter_context(_without_bars())
        yield


@contextmanager
def _environment_default(name: str, value: str) -> Iterator[None]:
    """Set a variable, unless the caller has."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


@contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        # A library that was imported inside has set its own level.
        if logger.level == logging.ERROR:
            logger.setLevel(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Raise the level of transformers, also if it is imported inside the block, which sets its level."""
    logger = logging.getLogger("transformers")
    if _TRANSFORMERS in sys.modules:
        with _errors_only(logger):
            yield
        return
    with _environment_default("TRANSFORMERS_VERBOSITY", "error"):
        yield
    if _TRANSFORMERS in sys.modules and "TRANSFORMERS_VERBOSITY" not in os.environ:
        logger.setLevel(logging.WARNING)


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with _transformers_bars(shown), _datasets_bars():
            yield
    finally:
        # The switch of transformers affects the hub's as well.
        if shown:
            enable_progress_bars()
        else:
            disable_progress_bars()


@contextmanager
def _transformers_bars(shown: bool) -> Iterator[None]:
    if (library := sys.modules.get(_TRANSFORMERS)) is not None:
        shown = library.is_progress_bar_enabled()
        library.disable_progress_bar()
    try:
        yield
    finally:
        # If it was imported inside, it has copied the hub's state.
        library = sys.modules.get(_TRANSFORMERS)
        if shown and library is not None:
            library.enable_progress_bar()


@contextmanager
def _datasets_bars() -> Iterator[None]:
    library = sys.modules.get("datasets")
    if library is None or library.are_progress_bars_disabled():
        yield
        return
    library.disable_progress_bars()
    try:
        yield
    finally:
        library.enable_progress_bars()


def _is_shown(console: Console) -> bool:
    """Whether output is on a terminal: FORCE_COLOR colours a log as well, in which moving output is unreadable."""
    return console.is_interactive and sys.stderr.isatty() and is_main_process() and not is_quiet()


@contextmanager
def status(description: str) -> Iterator[None]:
    """Show on standard error that something is running whose length is not known."""
    from internal_policy.utils.console import console as open_console

    logger.info("%s", description)
    console = open_console(stderr=True)
    if not _is_shown(console):
        yield
        return
    with console.status(description):
        yield


@contextmanager
def importing() -> Iterator[None]:
    """Show that the libraries are being imported, which takes seconds, and suppress their notices.

    Without a terminal it is one line on standard error; nothing under --json and --quiet, or if torch is imported.
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
    """Show a bar on standard error while something long runs, of which `done` of `total` units were done before.

    Yields:
        A function to call with the number of units just done.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    from internal_policy.utils.console import console as open_console

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "-", style="cyan")

    logger.info("%s: %d of %d done", description, done, total)
    console = open_console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not _is_shown(console), transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda units: bar.update(task, advance=units)
