"""What the libraries say of themselves, kept away while a call of ours runs and nowhere else.

Who wants to hear them, and what this package does step by step, asks by ``logging``::

    logging.basicConfig(level=logging.INFO)
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType

# The client of the hub sets the level of its own logger when it is imported, and warns of each retry.
_LOGGERS = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "huggingface_hub.utils._http", "trl")
_TRANSFORMERS = "transformers.utils.logging"
_MODULES = r"(accelerate|bitsandbytes|datasets|huggingface_hub|peft|torch|tqdm|transformers|trl)(\.|$)"


@contextmanager
def quiet_libraries(*, bars: bool = True) -> Iterator[None]:
    """Keep progress bars, warnings and notices of the libraries away; as a decorator, while a function runs.

    Afterwards everything is as it was. Errors are told all the same, and so is what this package and the caller's own
    code say. Nothing is kept away where the logger ``internal_policy`` is enabled for INFO.

    Args:
        bars: keep progress bars away as well, for which the hub's client is imported.
    """
    if logging.getLogger("internal_policy").isEnabledFor(logging.INFO):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=_MODULES)
        # Of what they have deprecated the libraries accuse their caller, which is this package.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"internal_policy(\.|$)")
        # Else they warn of each process that is started.
        stack.enter_context(_environment("TOKENIZERS_PARALLELISM", "false"))
        for name in _LOGGERS:
            stack.enter_context(_errors_only(logging.getLogger(name)))
        stack.enter_context(_transformers())
        if bars:
            stack.enter_context(_without_bars())
        yield


def import_quietly(name: str) -> ModuleType:
    """Import a module without what the libraries that come with it say of themselves.

    Args:
        name: its full name.

    Returns:
        The module.
    """
    with quiet_libraries(bars=False):
        return import_module(name)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
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
        # A library that was imported meanwhile has chosen its own level.
        if logger.level == logging.ERROR:
            logger.setLevel(before)


@contextmanager
def _transformers() -> Iterator[None]:
    """Take it that transformers may be imported meanwhile, which sets its level."""
    logger = logging.getLogger("transformers")
    if _TRANSFORMERS in sys.modules:
        with _errors_only(logger):
            yield
        return
    with _environment("TRANSFORMERS_VERBOSITY", "error"):
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
        # That of transformers switches the hub's as well.
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
        # Imported meanwhile it has copied the hub's state.
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
