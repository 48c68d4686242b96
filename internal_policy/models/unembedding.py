"""E_u as a matrix, whatever the unembedding keeps: plain weights, weights set aside, or quantised ones."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.models import devices
from internal_policy.models.families import Family
from internal_policy.models.projection import Projection
from internal_policy.utils.errors import UserError

_ROWS = 1024
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Some libraries pack weights into a subclass of tensors.
_DENSE: tuple[type, ...] = (Tensor, nn.Parameter)
# Rounding of a product in the head's dtype is some eps; a head that quantises what it receives is off by half a step
# of 8 bits, 1/254 of the largest number, in each of its inputs.
_ROUNDINGS = 16


def projection_of(model: Any, family: Family) -> Projection:
    """Read E_u, the model's own transform of its logits and LN_final from a model as it is now.

    Args:
        model: a transformers causal LM.
        family: where its parts are.

    Returns:
        The projection. E_u of an unembedding that accelerate sets aside, or that is quantised, is made once and stays
        on the device where the unembedding runs.

    Raises:
        UserError: an unembedding that no matrix stands for.
    """
    weight, bias = _matrix(model, family.unembedding)
    scale = 1.0
    if family.logit_scale:
        scale *= float(getattr(model.config, family.logit_scale))
    if family.logit_divisor:
        scale /= float(getattr(model.config, family.logit_divisor))
    return Projection(
        weight=weight,
        bias=bias,
        scale=scale,
        softcap=getattr(model.config, family.logit_softcap) if family.logit_softcap else None,
        final_norm=operator.attrgetter(family.final_norm)(model),
    )


def _matrix(model: Any, path: str) -> tuple[Tensor, Tensor | None]:
    """E_u [V, d] and its bias [V]."""
    head = operator.attrgetter(path)(model)
    weight: Tensor | None = getattr(head, "weight", None)
    bias: Tensor | None = getattr(head, "bias", None)
    if weight is None or type(weight) not in _DENSE or weight.dtype not in _PLAIN or weight.ndim != 2:
        return _by_calls(model, head, path)
    device = devices.execution_device(head)
    if device is None:
        return weight.detach(), None if bias is None else bias.detach()
    weight = devices.resident(model, f"{path}.weight", weight.detach()).to(device)
    return weight, None if bias is None else devices.resident(model, f"{path}.bias", bias.detach()).to(device)


@torch.no_grad()
def _by_calls(model: Any, head: Any, path: str) -> tuple[Tensor, Tensor | None]:
    """E_u of a quantised unembedding: what it makes of the identity matrix is its transpose, to the last bit.

    It is the same for every way to pack weights, and the dequantised weights as the model itself multiplies by them.
    """
    embedding = model.get_input_embeddings().weight
    width = int(getattr(head, "in_features", embedding.shape[1]))
    dtype = embedding.dtype if embedding.dtype in _PLAIN else torch.float32
    device = devices.execution_device(head) or _device_of(head)

    def call(states: Tensor) -> Tensor:
        out: Tensor = head(states)
        return out

    zero = call(torch.zeros(1, width, dtype=dtype, device=device))[0]
    bias = zero if bool(zero.any()) else None
    weight = torch.empty(zero.numel(), width, dtype=zero.dtype, device=zero.device)
    for first in range(0, width, _ROWS):
        unit = torch.zeros(min(_ROWS, width - first), width, dtype=dtype, device=device)
        unit[:, first : first + len(unit)].fill_diagonal_(1)
        columns = call(unit) if bias is None else call(unit) - bias
        weight[:, first : first + len(unit)] = columns.T
    _refuse_inexact(call, weight, bias, dtype, device, f"{getattr(model, 'name_or_path', '') or 'model'}: {path}")
    return weight, bias


def _refuse_inexact(
    call: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device, what: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, weight.shape[1], generator=generator).to(device, dtype)
    theirs = call(states).double()
    ours = states.to(weight.device).double() @ weight.double().T + (0 if bias is None else bias.double())
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(torch.float64).tiny))
    if not error <= _ROUNDINGS * max(torch.finfo(dtype).eps, torch.finfo(weight.dtype).eps):
        raise UserError(
            f"{what} also quantises the states that it receives (relative difference {error:.1e}), so that no matrix "
            "E_u gives the model's logits; leave the unembedding out of the quantisation (llm_int8_skip_modules)"
        )


def _device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
