"""The head of an internal policy in an update: the states that are scored, block by block, without their logits.

TRL's head streams on an accelerator with Triton. Elsewhere it scores every position, that of the prompt too, and holds
several whole tiles of 4096 x 32768 logits; there this one takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_triton_available
from trl.trainer.utils import FusedCausalLMOutput

from internal_policy.entropy.log_probs import trained_log_probs
from internal_policy.models import Family, projection_of

_IGNORED = -100


def streams(model: nn.Module) -> bool:
    """Tell whether this head is for a model where it is now.

    Args:
        model: a causal LM, without wrappers around it.

    Returns:
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
        # Found anew each time: PEFT may have wrapped it.
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        states = decoder(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1].to(head.weight.device)
        labels = labels.to(head.weight.device)
        mask = labels != _IGNORED
        with torch.autocast(states.device.type, enabled=False) if in_float32 else nullcontext():
            found = trained_log_probs(
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
