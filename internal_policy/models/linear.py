"""What acts linearly on a state, as tensors: the weights of linear modules, and norms at the scale of a given state.

A norm is not linear, but g (x - mean x) / s(x) + b is linear in x once the scale s is known. A sum of parts that passes
through it is therefore the sum of what becomes of each part at the scale of the whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.models import devices
from internal_policy.models.projection import FLOAT_DTYPES, weight_by_calls
from internal_policy.utils.errors import UserError

_DENSE: tuple[type, ...] = (Tensor, nn.Parameter)
_ROUNDINGS = 16
"""Bound on the relative error of a product or a norm, in units of its dtype's rounding."""
_LARGE = 2.0**12
"""Entries beside whose square, a power of 2, the epsilon in a norm's root is below float32's rounding."""


@torch.no_grad()
def read_linear(model: nn.Module, path: str, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Read the matrix and the bias by which a linear module multiplies, also if they are offloaded or packed.

    Args:
        model: the transformers model.
        path: of the module.
        width: the number of its inputs.
        dtype: in which the model computes states.

    Returns:
        The weight [outputs, width], and the bias [outputs] or None, on the device where the module runs.

    Raises:
        UserError: no matrix represents the module.
    """
    module: Any = operator.attrgetter(path)(model)
    weight: Any = getattr(module, "weight", None)
    bias: Tensor | None = getattr(module, "bias", None)
    plain = type(weight) in _DENSE and weight.dtype in FLOAT_DTYPES and weight.ndim == 2
    transposed = type(module).__name__ == "Conv1D"
    if not plain or not (type(module) is nn.Linear or transposed):
        return _read_by_calls(module, path, width, dtype)
    device = devices.execution_device(module)
    if device is not None:
        weight = devices.materialize(model, f"{path}.weight", weight).to(device)
        bias = bias if bias is None else devices.materialize(model, f"{path}.bias", bias).to(device)
    return weight.T if transposed else weight, bias


def _read_by_calls(module: Any, path: str, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    tensors = [*module.parameters(), *module.buffers()]
    device = devices.execution_device(module) or (tensors[0].device if tensors else torch.device("cpu"))
    # Hooks stay out of it; those that fetch offloaded weights are part of `forward`.
    weight, bias = weight_by_calls(module.forward, width, dtype, device)
    states = torch.randn(8, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    theirs = devices.in_float64(module.forward(states))
    added = None if bias is None else devices.in_float64(bias)
    ours = nn.functional.linear(devices.in_float64(states), devices.in_float64(weight), added)
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if not error <= _ROUNDINGS * torch.finfo(dtype).eps:
        raise UserError(
            f"{path} also quantises what it receives (relative difference {error:.1e}), so that no matrix stands for "
            "it; use --quantization 4bit, or weights that are not quantised"
        )
    return weight, bias


@dataclass(frozen=True)
class LinearNorm:
    """A norm g (x - mean x) / s + b, whose scale s is that of a given state; some norms do not subtract the mean."""

    gain: Tensor
    """[d] g."""
    bias: Tensor | None
    """[d] b; None if it is 0."""
    centred: bool
    """Whether the mean is subtracted."""

    def numerator(self, states: Tensor) -> Tensor:
        """Compute g (x - mean x) of states or of parts of them, [..., d], in float32 or more."""
        states = states.to(self.gain.device, torch.promote_types(states.dtype, self.gain.dtype))
        if self.centred:
            states = states - states.mean(dim=-1, keepdim=True)
        return self.gain * states

    def transpose(self, directions: Tensor) -> Tensor:
        """Compute the directions u' with u . g (x - mean x) = u' . x for every x.

        Args:
            directions: [..., d] u.

        Returns:
            [..., d] u', in float32 or more.
        """
        found = self.gain * directions.to(self.gain.device)
        return found - found.mean(dim=-1, keepdim=True) if self.centred else found

    def scale(self, states: Tensor, normed: Tensor) -> Tensor:
        """Compute s, the scale by which the norm divided each state.

        Args:
            states: [N, d] what the norm received.
            normed: [N, d] what it returned.

        Returns:
            [N] the scale that fits the output best, in which the roundings of its d numbers cancel.
        """
        numerator = self.numerator(states)
        output = normed.to(numerator.device, numerator.dtype)
        if self.bias is not None:
            output = output - self.bias
        # The largest element is taken out, since the squares of long states overflow.
        largest = numerator.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(numerator.dtype).tiny)
        unit = numerator / largest
        tiny = torch.finfo(numerator.dtype).tiny
        return largest[..., 0] * unit.square().sum(dim=-1) / (unit * output).sum(dim=-1).clamp(min=tiny)


@torch.no_grad()
def linearise(norm: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype, device: Any, what: str) -> LinearNorm:
    """Find g, b and whether the mean is subtracted from a norm's outputs, and prove on random states that this fits.

    Signs are exact: the norm of states whose entries are +c and -c in equal numbers is +g and -g, plus b.

    Args:
        norm: the module, called on [N, d].
        width: d.
        dtype: of the states that it receives.
        device: where it runs.
        what: its name in messages.

    Raises:
        UserError: it is another function.
    """
    precise = torch.promote_types(dtype, torch.float32)
    signs = torch.ones(width, dtype=dtype, device=device)
    signs[1::2] = -1
    zero, plus, minus, even = norm(torch.stack([0 * signs, _LARGE * signs, -_LARGE * signs, _LARGE * (signs + 1)]))
    gain = (plus.to(precise) - minus.to(precise)) / 2 * signs.to(precise)
    bias = zero.to(precise)
    # Entries 2c and 0 are the same as +c and -c for a norm that subtracts the mean, and are not for one that does not.
    shifted = (even.to(precise) - plus.to(precise)).norm() / plus.to(precise).norm()
    found = LinearNorm(gain, bias if bool(bias.any()) else None, bool(shifted < 0.05))
    states = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) + 0.5
    states = states.to(device, dtype)
    output = norm(states).to(precise)
    ours = found.numerator(states) / found.scale(states, output)[:, None] + bias
    error = float(((ours - output).norm(dim=-1) / output.norm(dim=-1)).max())
    # Norms compute in float32 also for states of float64.
    if not error <= _ROUNDINGS * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps):
        raise UserError(
            f"{what} is a {type(norm).__name__}, which does not divide a state by one number (relative difference "
            f"{error:.1e}), so that what becomes of a part of the state is not defined; leave out --heads"
        )
    return found
