"""The forward pass of an internal policy: the decoder ends at layer l, and its state goes to the unembedding.

Usage::

    with internal_forward(model, layer=6):
        model(input_ids=...).logits    # those of pi^6, layers 7..L never run
        model.generate(input_ids=...)  # tokens of pi^6, with a cache of keys and values of layers 1..6

The trainer optimises an internal policy through this context, and ``generation.internal`` samples from it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from internal_policy.extractors.hooks import first_tensor
from internal_policy.models import Family, Projection, family_of, projection_of
from internal_policy.models.options import Lens, Site
from internal_policy.utils.errors import UserError


class _FinalNormReplacement(nn.Module):
    """Replaces the final norm: passes H^l, or the module's write instead of it, through the lens."""

    def __init__(self, lens: Callable[..., Tensor] | None, held: list[Tensor] | None, multiplier: float) -> None:
        super().__init__()
        # In a list a norm is not registered as a submodule, so that it does not appear under a second name.
        self._lens = [lens]
        self._held = held
        self._multiplier = multiplier

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._held is not None:
            # Some mixtures of experts return [B * T, d].
            write = self._held.pop().reshape(states.shape)
            states = write if self._multiplier == 1.0 else write * self._multiplier
        lens = self._lens[0]
        return states if lens is None else lens(states, *args, **kwargs)


@contextmanager
def internal_forward(
    model: nn.Module,
    layer: int,
    *,
    site: Site = "layer",
    lens: Lens = "policy",
    family: Family | None = None,
    projection: Projection | None = None,
) -> Iterator[None]:
    """Make a causal LM compute an internal policy: its head receives the state of one layer.

    The layers above it are removed inside the context; weights, wrappers (DDP, FSDP) and PEFT adapters are not changed.
    The model is restored on any exit.

    Args:
        model: a causal LM of a supported family, without wrappers around it.
        layer: l, from 1.
        site: ``layer`` for pi^l_Layer, ``attn`` or ``ffn`` for the modular policy of that layer.
        lens: ``policy`` without the final norm, ``logit-lens`` with it, or any other lens of ``Projection.apply_lens``.
        family: where the model's parts are; by default its row of the table, or a guess from its structure.
        projection: the model's projection, which lenses other than these two need; by default it is read here.

    Raises:
        UserError: the model has no such layer.

    Source: arXiv 2512.19673v3, eqs. 5, 6 and 9.
    """
    family = family or family_of(model, type(model).__name__)
    layers = operator.attrgetter(family.layers)(model)
    check_layer(layer, len(layers))
    norm = operator.attrgetter(family.final_norm)(model)
    applied: Callable[..., Tensor] | None = None if lens == "policy" else norm
    if lens not in ("policy", "logit-lens"):
        applied = _on_batches(projection or projection_of(model, family), lens, layer)
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
        _set_submodule(model, family.layers, nn.ModuleList(list(layers)[:layer]))
        _set_submodule(model, family.final_norm, _FinalNormReplacement(applied, held, family.multiplier(model.config)))
        yield
    finally:
        _set_submodule(model, family.layers, layers)
        _set_submodule(model, family.final_norm, norm)
        if hook is not None:
            hook.remove()


def check_layer(layer: int, n_layers: int, name: str = "layer") -> None:
    """Refuse a layer that a model does not have; ``name`` is that of the option that gave it."""
    if not 1 <= layer <= n_layers:
        raise UserError(f"{name} is {layer}; needed is a layer of this model, 1 to {n_layers} (counted from 1)")


def _on_batches(projection: Projection, lens: Lens, layer: int) -> Callable[..., Tensor]:
    """The lens on [B, T, d]."""

    def apply(states: Tensor, *_: Any, **__: Any) -> Tensor:
        return projection.apply_lens(lens, states.reshape(-1, states.shape[-1]), layer).reshape(states.shape)

    return apply


def _set_submodule(model: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(operator.attrgetter(parent)(model) if parent else model, name, value)
