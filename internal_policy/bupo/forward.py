"""The forward pass of an internal policy: the decoder ends at layer l, and its state goes to the unembedding.

Usage::

    with internal_forward(model, layer=6):
        model(input_ids=..., labels=..., fused_lm_head=True)  # log-probabilities of pi^6, layers 7..L never run
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from internal_policy.bupo.config import Site
from internal_policy.extractors.hooks import first_tensor
from internal_policy.models import Family, family_of
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError


class _Last(nn.Module):
    """Stands where the final norm was: passes H^l on, or the module's write in its place."""

    def __init__(self, norm: nn.Module | None, held: list[Tensor] | None, multiplier: float) -> None:
        super().__init__()
        # In a list the norm is no submodule, so nothing that walks the tree meets it under a second name.
        self._norm = [norm]
        self._held = held
        self._multiplier = multiplier

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._held is not None:
            # Some mixtures of experts write [B * T, d].
            write = self._held.pop().reshape(states.shape)
            states = write if self._multiplier == 1.0 else write * self._multiplier
        norm = self._norm[0]
        normed: Tensor = states if norm is None else norm(states, *args, **kwargs)
        return normed


@contextmanager
def internal_forward(
    model: nn.Module, layer: int, *, site: Site = "layer", lens: Lens = "policy", family: Family | None = None
) -> Iterator[None]:
    """Let a causal LM compute an internal policy: what its head receives is the state of one layer.

    Layers above it are not part of the model while the context lasts; weights, wrappers (DDP, FSDP) and PEFT adapters
    stay where they are. On any exit the model is as it was.

    Args:
        model: a causal LM of a supported family, without wrappers around it.
        layer: l, from 1.
        site: ``layer`` for pi^l_Layer, ``attn`` or ``ffn`` for the modular policy of that layer.
        lens: ``policy`` without the final norm, ``logit-lens`` with it.
        family: where the model's parts are; its row of the table, or what its structure says, where not given.

    Raises:
        UserError: the model has no such layer.

    Source: arXiv 2512.19673v3, eqs. 5, 6 and 9.
    """
    family = family or family_of(model, type(model).__name__)
    layers = operator.attrgetter(family.layers)(model)
    check_layer(layer, len(layers))
    norm = operator.attrgetter(family.final_norm)(model)
    multiplier = family.multiplier(model.config)
    held: list[Tensor] | None = None
    hook = None
    if site != "layer":
        held = []
        module = layers[layer - 1]
        path = {"attn": family.attention_write or family.attention, "ffn": family.ffn_write or family.ffn}[site]

        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            held.append(first_tensor(output))

        hook = operator.attrgetter(path)(module).register_forward_hook(keep)
    try:
        _put(model, family.layers, nn.ModuleList(list(layers)[:layer]))
        _put(model, family.final_norm, _Last(norm if lens == "logit-lens" else None, held, multiplier))
        yield
    finally:
        _put(model, family.layers, layers)
        _put(model, family.final_norm, norm)
        if hook is not None:
            hook.remove()


@contextmanager
def counted_positions(model: nn.Module) -> Iterator[None]:
    """Let a decoder count positions over real tokens, as sampling does, where the caller gives none.

    Args:
        model: a causal LM, without wrappers around it, whose decoder takes positions.
    """

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_ids") is None and mask is not None:
            kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return args, kwargs

    decoder: Any = model.base_model
    hook = decoder.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def check_layer(layer: int, n_layers: int) -> None:
    """Check that a model has a layer.

    Args:
        layer: l, from 1.
        n_layers: L.

    Raises:
        UserError: out of range.
    """
    if not 1 <= layer <= n_layers:
        raise UserError(f"layer is {layer}; needed is a layer of this model, 1 to {n_layers} (counted from 1)")


def _put(model: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(operator.attrgetter(parent)(model) if parent else model, name, value)
