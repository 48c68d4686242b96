"""What is proved of a model before its first update: where its parts are, and that TRL computes its logits."""

from __future__ import annotations

import inspect
import logging
import math
from typing import Any

import torch
from torch import nn

from internal_policy.bupo.config import BuPOConfig
from internal_policy.extractors import prove
from internal_policy.models import Family, LanguageModel, eval_mode, wrap
from internal_policy.utils.errors import UserError

logger = logging.getLogger(__name__)

_SEQUENCES, _LENGTH, _SHIFT = 2, 12, 256


def proved(model: LanguageModel) -> LanguageModel:
    """Prove where a model's parts are, once for a run.

    Args:
        model: the model; for a family without a row, with the likeliest guess at its parts.

    Returns:
        The model with the row that holds. The modes of its modules are as they were.

    Raises:
        UserError: what does not hold, a guess that cannot be proved because no process has the whole model, or
            quantised weights, which no gradient reaches.
    """
    if model.quantization is not None:
        raise UserError(
            f"{model.name}: its weights are quantised ({model.quantization}), and training updates them; give the "
            "checkpoint that it was made from"
        )
    if not _whole(model.model):
        if model.family.guessed:
            raise UserError(
                f"{model.name}: family {model.family.name!r} is not in the table, and what its structure says cannot "
                "be proved where DeepSpeed spreads the weights; use DDP or FSDP, or write its row in models/families.py"
            )
        return model
    with eval_mode(model.model):
        return prove(model).model


def prove_family(model: nn.Module, tokenizer: Any) -> Family:
    """Prove where the parts of a bare model are.

    Args:
        model: a causal LM, without wrappers around it.
        tokenizer: its tokenizer.

    Returns:
        The row that holds.

    Raises:
        UserError: as `proved`.
    """
    config: Any = model.config
    with eval_mode(model):
        return proved(wrap(model, tokenizer, getattr(config, "_name_or_path", "") or config.model_type)).family


def check_experts(args: BuPOConfig, config: Any) -> None:
    """Refuse what a mixture of experts cannot do in training.

    Args:
        args: the trainer's configuration.
        config: the model's.

    Raises:
        UserError: TRL would add the load-balancing loss where there is a first phase, or the model returns what its
            routers chose while it samples, over which transformers falls.
    """
    text = config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    if args.aligns and coefficient:
        raise UserError(
            "a mixture of experts with an internal policy: in the first phase the load-balancing loss would see "
            "layers 1..l only; pass router_aux_loss_coef=0"
        )
    if text.output_router_logits and not args.use_vllm:
        raise UserError(
            "output_router_logits is true in the model's configuration, and transformers cannot sample with it; set "
            "it to false in config.json"
        )


def check_head(model: nn.Module, temperature: float) -> None:
    """Check that TRL's own computation of log-probabilities is that of the model's own logits.

    TRL multiplies the decoder's last state by E_u itself, and takes the model's transform of logits from fields of the
    configuration that it knows.

    Args:
        model: a causal LM, without wrappers around it, with TRL's head.
        temperature: what TRL divides logits by.

    Raises:
        UserError: they differ by more than rounding.
    """
    if not _whole(model):
        return
    arguments = _arguments(model)
    ids = arguments["input_ids"]
    with eval_mode(model), torch.no_grad():
        logits = model(**arguments).logits[:, :-1].float() / temperature
        theirs = model(**arguments, labels=ids, fused_lm_head=True).log_probs.float()
    own = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None].to(logits.device)).squeeze(-1)
    error = float((own - theirs.to(own.device)).abs().mean())
    # The model rounds each logit in its own dtype; a mean over tokens is some roundings of the largest.
    bound = 4 * _eps(model) * max(1.0, float(logits.abs().max()))
    if not error <= bound:
        raise UserError(
            f"TRL's log-probabilities are not those of this model's logits (mean difference {error:.1e} nats, at most "
            f"{bound:.1e}): it does not know how {type(model).__name__} makes them, so no method can train it here"
        )


def shift_matters(model: nn.Module) -> bool:
    """Tell whether a decoder depends on where its first token stands, as one with learned positions does.

    TRL pads prompts on the left and gives no positions, so that such a model would see other positions than those it
    sampled with.

    Args:
        model: a causal LM, without wrappers around it.

    Returns:
        True where positions have to be counted over real tokens; False where they are relative, or where the decoder
        counts them itself.
    """
    config: Any = model.config
    decoder: Any = getattr(model, "base_model", None)
    if config.get_text_config() is not config or not isinstance(decoder, nn.Module):
        return False
    if "position_ids" not in inspect.signature(decoder.forward).parameters or not _whole(model):
        return False
    arguments = _arguments(model)
    length = arguments["input_ids"].shape[1]
    room = int(getattr(config, "max_position_embeddings", None) or _SHIFT) - length
    positions = torch.arange(length, device=arguments["input_ids"].device).expand_as(arguments["input_ids"])
    with eval_mode(model), torch.no_grad():
        here, there = (
            decoder(**arguments, position_ids=positions + shift).last_hidden_state.double()
            for shift in (0, max(0, min(_SHIFT, room)))
        )
    # Rotations differ by rounding only. To count positions where it is not needed changes nothing but roundings.
    return bool((here - there).norm() > math.sqrt(_eps(model)) * here.norm())


def warn_of_dropout(model: nn.Module) -> bool:
    """Say that old and new log-probabilities are of different dropouts.

    Args:
        model: a causal LM, without wrappers around it.

    Returns:
        Whether anything drops out in training, adapters and attention weights too.
    """
    everywhere = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    found = [n for n in everywhere if "lora_" not in n]
    if found:
        logger.warning(
            "%s drops out in training (%s and %d more): the ratio compares policies under different dropouts; pass "
            "disable_dropout=True",
            *(type(model).__name__, found[0], len(found) - 1),
        )
    # Attention takes its own as a number.
    rates = (getattr(m, "attention_dropout", None) for m in model.modules())
    return bool(everywhere) or any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _whole(model: nn.Module) -> bool:
    """Whether this process has the model's weights."""
    return not any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters())


def _arguments(model: nn.Module) -> dict[str, Any]:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, device = int(embedding.weight.shape[0]), embedding.weight.device
    ids = torch.randint(0, rows, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _eps(model: nn.Module) -> float:
    """Rounding of the coarsest dtype that the model's weights are in."""
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
