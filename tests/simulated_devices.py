"""Simulated devices: tensors on ``privateuseone:N`` that raise when combined with those of another device.

Their numbers are on the CPU. Every operation is checked as a real device would: operands on different devices are an
error, unless the operation copies from one to the other. What is not simulated: the kernels of a real device.
"""

from __future__ import annotations

import types as modules

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyDeviceGuard

DEVICE = "privateuseone"
FLOAT64 = True
"""Whether the devices have float64; mps does not."""
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OnDevice(torch.Tensor):
    @staticmethod
    def __new__(cls, inner, device=None, requires_grad=False):
        if device is None:  # what accelerate does to make a parameter of a parameter's own class
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=device
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Devices(TorchDispatchMode):
    """While it is open, ``privateuseone:0`` and further are devices."""

    def __init__(self):
        super().__init__()
        self.operations = {}
        # Torch queries these before it first moves a tensor to a device.
        if not hasattr(torch, DEVICE):
            module = modules.ModuleType(f"torch.{DEVICE}")
            module.is_available, module.is_initialized = (lambda: True), (lambda: True)
            module.device_count, module.current_device = (lambda: 2), (lambda: 0)
            module._is_in_bad_fork, module.manual_seed_all = (lambda: False), (lambda seed: None)
            torch._register_device_module(DEVICE, module)
            torch._C._acc.register_python_privateuseone_device_guard(_DummyDeviceGuard())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = _run(func, args, kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.operations[str(tensor.device)] = self.operations.get(str(tensor.device), 0) + 1
        return out


def _run(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    # A number may come from the CPU anywhere, as on real devices.
    places = {t.device for t in tensors if isinstance(t, OnDevice) or t.ndim > 0}
    if len(places) > 1 and func not in _COPIES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, got {sorted(map(str, places))}")
    wanted = kwargs.get("device")
    place = torch.device(wanted) if wanted is not None else next((t.device for t in tensors if func in _COPIES), None)
    if place is None:
        place = next(iter(places), torch.device("cpu"))
    if "device" in kwargs and place.type == DEVICE:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(t.inner): t for t in tensors if isinstance(t, OnDevice)}
    known |= {id(t): t for t in tensors if not isinstance(t, OnDevice)}
    args, kwargs = tree_map(lambda t: t.inner if isinstance(t, OnDevice) else t, (args, kwargs))
    out = func(*args, **kwargs)

    def placed(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in known and known[id(value)].device == place:
            return known[id(value)]
        if place.type == DEVICE and value.dtype == torch.float64 and not FLOAT64:
            raise TypeError("Cannot convert a tensor to float64, which this device does not have; use float32 instead")
        return OnDevice(value, place) if place.type == DEVICE else value

    return tree_map(placed, out)
