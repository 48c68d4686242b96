"""The forward pass of an internal policy: the decoder ends at layer l, and its state goes to the unembedding.

Usage::

    with internal_forward(model, layer=6):
        model(input_ids=..., labels=..., fused_lm_head=True)  # log-probabilities of pi^6, layers 7..L never run

``streamed_head`` computes these log-probabilities in an update. TRL's own head streams on an accelerator with Triton.
Elsewhere it scores every position, that of the prompt too, and holds several whole tiles of 4096 x 32768 logits; there
this one takes its place, which scores the labelled positions only, block by block.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_triton_available
from trl.trainer.utils import FusedCausalLMOutput

from internal_policy.bupo.config import Site
from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.extractors.hooks import first_tensor
from internal_policy.models import Family, family_of, projection_of
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError

_IGNORED = -100


class _FinalNormStandIn(nn.Module):
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
        _set_submodule(model, family.layers, nn.ModuleList(list(layers)[:layer]))
        _set_submodule(
            model, family.final_norm, _FinalNormStandIn(norm if lens == "logit-lens" else None, held, multiplier)
        )
        yield
    finally:
        _set_submodule(model, family.layers, layers)
        _set_submodule(model, family.final_norm, norm)
        if hook is not None:
            hook.remove()


@contextmanager
def counted_positions(model: nn.Module) -> Iterator[None]:
    """Let a decoder count positions over real tokens, as sampling does, where the caller gives none."""

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


def needs_streamed_head(model: nn.Module) -> bool:
    """Whether ``streamed_head`` replaces TRL's own head for a model where it is now.

    False where TRL's own kernel runs, and where no process holds E_u as a matrix.
    """
    weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    if type(weight) not in (Tensor, nn.Parameter) or hasattr(weight, "ds_id"):
        return False
    return not (weight.device.type in ("cuda", "xpu") and is_triton_available())


@contextmanager
def streamed_head(
    model: nn.Module, family: Family, temperature: float, *, entropy: bool = True, in_float32: bool = False
) -> Iterator[None]:
    """Let ``model(..., labels=..., fused_lm_head=True)`` score the labelled positions only, in blocks.

    On any exit the model is as it was. Every other call is the model's own.

    Args:
        model: a causal LM, without wrappers around it.
        family: where its parts are, and how it makes its logits.
        temperature: divides the logits.
        entropy: compute entropies too.
        in_float32: whether the head stays out of autocast.
    """
    before = model.__dict__.get("forward")
    usual = model.forward
    described = projection_of(model, family)

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or kwargs.get("shift_labels") is not None:
            return usual(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        labels: Tensor = kwargs.pop("labels")[:, 1:]
        decoder: Any = model.base_model
        # Looked up at each call: PEFT may have wrapped it.
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        states = decoder(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1].to(head.weight.device)
        labels = labels.to(head.weight.device)
        mask = labels != _IGNORED
        with torch.autocast(states.device.type, enabled=False) if in_float32 else nullcontext():
            found = differentiable_log_probs(
                states[mask],
                labels[mask],
                head.weight,
                head.bias,
                temperature=temperature,
                scale=described.scale,
                softcap=described.softcap,
                entropy=entropy,
                memory_budget=described.memory_budget,
            )
        # It stays connected to the model where no label counts.
        log_probs, entropies = (None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropies, label_mask=mask)

    try:
        model.forward = forward
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def check_layer(layer: int, n_layers: int) -> None:
    """Refuse a layer that a model does not have."""
    if not 1 <= layer <= n_layers:
        raise UserError(f"layer is {layer}; needed is a layer of this model, 1 to {n_layers} (counted from 1)")


def _set_submodule(model: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(operator.attrgetter(parent)(model) if parent else model, name, value)
