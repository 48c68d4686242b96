"""The head and the positions of a forward pass in an update, for an internal policy as for pi_theta.

Usage::

    with internal_forward(model, layer=6), streamed_head(model, family, temperature=1.0):
        model(input_ids=..., labels=..., fused_lm_head=True)  # log-probabilities of pi^6, layers 7..L never run

``internal_forward`` is that of ``extractors.truncated``; ``streamed_head`` computes the log-probabilities. TRL's own
head streams on an accelerator with Triton. Without one it scores every position, including the prompt, and holds
several tiles of 4096 x 32768 logits; there it is replaced by this head, which scores only the labelled positions, block
by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_triton_available
from trl.trainer.utils import FusedCausalLMOutput

from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.extractors.truncated import internal_forward
from internal_policy.models import Family, projection_of

__all__ = ["internal_forward", "needs_streamed_head", "positions_from_mask", "streamed_head"]

_IGNORED = -100


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
