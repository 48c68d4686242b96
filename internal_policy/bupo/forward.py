"""The forward pass of an internal policy: the decoder ends at layer l, and its state goes to the unembedding.

Usage::

    with internal_forward(model, layer=6):
        model(input_ids=..., labels=..., fused_lm_head=True)  # log-probabilities of pi^6, layers 7..L never run

``streamed_head`` computes these log-probabilities in an update. TRL's own head streams on an accelerator with Triton.
Without one it scores every position, including the prompt, and holds several tiles of 4096 x 32768 logits; there it is
replaced by this head, which scores only the labelled positions, block by block.
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

from internal_policy.bupo.config import POLICY_LENSES, PolicyLens, Site
from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.extractors.hooks import first_tensor
from internal_policy.models import Family, family_of, projection_of
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import require_one_of

_IGNORED = -100


class _FinalNormReplacement(nn.Module):
    """Replaces the final norm: returns H^l, or the module's write instead of it."""

    def __init__(self, norm: nn.Module | None, held: list[Tensor] | None, multiplier: float) -> None:
        super().__init__()
        # In a list the norm is not registered as a submodule, so that it does not appear under a second name.
        self._norm = [norm]
        self._held = held
        self._multiplier = multiplier

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._held is not None:
            # Some mixtures of experts return [B * T, d].
            write = self._held.pop().reshape(states.shape)
            states = write if self._multiplier == 1.0 else write * self._multiplier
        norm = self._norm[0]
        normed: Tensor = states if norm is None else norm(states, *args, **kwargs)
        return normed


@contextmanager
def internal_forward(
    model: nn.Module, layer: int, *, site: Site = "layer", lens: PolicyLens = "policy", family: Family | None = None
) -> Iterator[None]:
    """Make a causal LM compute an internal policy: its head receives the state of one layer.

    The layers above it are removed inside the context; weights, wrappers (DDP, FSDP) and PEFT adapters are not changed.
    The model is restored on any exit.

    Args:
        model: a causal LM of a supported family, without wrappers around it.
        layer: l, from 1.
        site: ``layer`` for pi^l_Layer, ``attn`` or ``ffn`` for the modular policy of that layer.
        lens: ``policy`` without the final norm, ``logit-lens`` with it.
        family: where the model's parts are; by default its row of the table, or a guess from its structure.

    Raises:
        UserError: the model has no such layer, or another lens.

    Source: arXiv 2512.19673v3, eqs. 5, 6 and 9.
    """
    require_one_of("lens", lens, POLICY_LENSES)
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
            model, family.final_norm, _FinalNormReplacement(norm if lens == "logit-lens" else None, held, multiplier)
        )
        yield
    finally:
        _set_submodule(model, family.layers, layers)
        _set_submodule(model, family.final_norm, norm)
        if hook is not None:
            hook.remove()


@contextmanager
def positions_from_mask(model: nn.Module) -> Iterator[None]:
    """Make a decoder count positions over real tokens, as in sampling, if the caller gives none."""

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
    """Return whether ``streamed_head`` should replace TRL's head for a model on its current device.

    False if TRL's Triton kernel can run, or if E_u is sharded.
    """
    weight: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    if type(weight) not in (Tensor, nn.Parameter) or hasattr(weight, "ds_id"):
        return False
    return not (weight.device.type in ("cuda", "xpu") and is_triton_available())


@contextmanager
def streamed_head(
    model: nn.Module, family: Family, temperature: float, *, entropy: bool = True, in_float32: bool = False
) -> Iterator[None]:
    """Make ``model(..., labels=..., fused_lm_head=True)`` score only the labelled positions, in blocks.

    Other calls are not affected, and the model is restored on any exit. The model has no wrappers around it; logits are
    divided by ``temperature``; with ``in_float32`` the head is excluded from autocast.
    """
    before = model.__dict__.get("forward")
    usual = model.forward
    described = projection_of(model, family)

    def forward(*args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or kwargs.get("shift_labels") is not None:
            return usual(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
        labels: Tensor = kwargs.pop("labels")[:, 1:]
        decoder: Any = model.base_model
        # Looked up at each call, because PEFT may have wrapped it.
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
        # The result stays connected to the graph even if no position is labelled.
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
