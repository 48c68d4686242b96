"""How a model runs for a while: in evaluation mode, on threads that suit its size; and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from internal_policy.models.language_model import LanguageModel

_NARROW = 256


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its modules back into its own on any exit.

    Args:
        model: the model; anything but a module is left alone.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def fitting_threads(model: LanguageModel) -> Iterator[None]:
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
