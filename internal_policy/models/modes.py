"""How a model runs for a while: alone, in evaluation mode, as its dtype says, on threads that suit its size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from internal_policy.models.language_model import LanguageModel

_NARROW = 256
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_making = threading.Lock()


@contextmanager
def exclusive_use(model: Any) -> Iterator[None]:
    """Keep other threads from the model: hooks of two would see the states of both, and modes be set back too early.

    Args:
        model: the model, whose other users wait; anything but a module is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _making:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Have a model alone and in evaluation mode, and put each of its modules back into its own mode on any exit.

    Args:
        model: the model; anything but a module is left alone.
    """
    with exclusive_use(model):
        modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
        try:
            if modes:
                model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute outside the caller's autocast, which rounds to 16 bits what is called float32, and its default device."""
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def limit_threads(model: LanguageModel) -> Iterator[None]:
    """Use one thread where the products are so small that handing them over costs more than it saves.

    Args:
        model: the model that will run.
    """
    threads = torch.get_num_threads()
    if model.device.type == "cpu" and model.projection.weight.shape[1] <= _NARROW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
