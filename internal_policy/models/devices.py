"""Which device to use, and where the weights of a model are: on one, on several, or offloaded by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.utils.errors import UserError, first_line


def choose_device(device: str) -> torch.device:
    """Resolve ``auto`` to cuda, mps or cpu, and refuse a device that this machine does not have."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()
    # A name that torch knows and has no module for, such as hpu, raises an ImportError.
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device {device!r} cannot be used here ({first_line(error)}); use auto or cpu") from error
    return chosen


_WITHOUT_FLOAT64 = ("mps",)


def in_float64(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its own device or, if that has no float64, on the CPU."""
    return (tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor).double()


def input_device(model: Any) -> torch.device:
    """Find the device of the token ids, on which the input embedding runs even if its weights are offloaded."""
    try:
        module: nn.Module = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        module = model
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def describe(model: Any) -> str:
    """Name the devices of the weights in the order of the device map, such as ``cuda:0, cuda:1, cpu, disk``."""
    placed = getattr(model, "hf_device_map", None)
    if not placed:
        return str(input_device(model))
    names = (d if d == "disk" else str(torch.device(d)) for d in placed.values())
    return ", ".join(dict.fromkeys(names))


def materialize(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Fetch a weight that accelerate offloads until its module runs.

    ``name`` and ``tensor`` are an entry of the state dict. An offloaded weight is returned as a copy on the CPU, in the
    dtype of ``tensor``; any other is ``tensor`` itself.
    """
    if not tensor.is_meta:
        return tensor
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for hook in _hooks(model.get_submodule(".".join(parts[:depth]))):
            kept = getattr(hook, "weights_map", None)
            try:
                found: Tensor | None = None if kept is None else kept[".".join(parts[depth:])]
            except KeyError:
                continue
            if found is not None:
                return found.to(tensor.dtype)
    raise UserError(f"{name} has no values (it is on the meta device and was not offloaded); load the model again")


def execution_device(module: nn.Module) -> torch.device | None:
    """Find where a module runs whose weights accelerate offloads; None if they are not offloaded."""
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return None


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
