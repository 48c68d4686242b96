"""Contexts in which a model runs: exclusively, in evaluation mode, without autocast, on suitable threads."""

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
_locks_guard = threading.Lock()


@contextmanager
def exclusive_use(model: Any) -> Iterator[None]:
    """Make other threads wait for a model: their hooks would see each other's states and reset modes too early.

    Anything but a module is ignored, here and by ``eval_mode``.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _locks_guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Use a model exclusively and in evaluation mode, and restore the mode of each of its modules on any exit."""
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
    """Disable the caller's autocast, which would round float32 products to 16 bits, and its default device."""
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def limit_threads(model: LanguageModel) -> Iterator[None]:
    """Use one thread if the products are so small that distributing them costs more than it saves."""
    threads = torch.get_num_threads()
    if model.device.type == "cpu" and model.projection.weight.shape[1] <= _NARROW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
