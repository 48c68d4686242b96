"""What the trainer would refuse only in its first update, tried before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, Trainer, get_scheduler
from transformers.utils import is_liger_kernel_available

from internal_policy.bupo.trainer_config import BuPOConfig, one_of
from internal_policy.utils.errors import UserError

_CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
}
_RANGES: dict[str, tuple[float, float, str]] = {
    "repetition_penalty": (1e-6, float("inf"), "a number above 0"),
    "top_k": (0, float("inf"), "a number of at least 0"),
    "min_p": (0.0, 1.0, "a share from 0 to 1"),
    "seed": (0, 2**32 - 1, "a number from 0 to 2^32 - 1"),
    "dataloader_num_workers": (0, float("inf"), "a number of at least 0"),
    "ref_model_sync_steps": (1, float("inf"), "a number of at least 1"),
}


def rehearse(config: BuPOConfig, rewards: Sequence[Any]) -> None:
    """Make of the options what TRL and transformers make of them once the training has begun.

    Args:
        config: the trainer's configuration.
        rewards: the reward functions.

    Raises:
        UserError: an option that has no such value, or needs a package that is missing.
    """
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            one_of(name, getattr(config, name), tuple(str(choice) for choice in choices if isinstance(choice, str)))
    for name, (low, high, needed) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value!r}; needed is {needed}")
    weights = config.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise UserError(f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards; give one for each")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel=True needs the package liger-kernel; install it, or leave it out")
    try:
        torch.tensor(weights or [], dtype=torch.float32)
        GenerationConfig(cache_implementation=config.cache_implementation, **(config.generation_kwargs or {}))
        make, options = Trainer.get_optimizer_cls_and_kwargs(config)
        # Of the optimisers that only some layers get, the others' is like any.
        options = {key: value for key, value in options.items() if key not in ("optim_target_modules", "model")}
        optimizer = make([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.get_warmup_steps(config.max_steps),
            num_training_steps=config.max_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
        raise refused(error) from error


def refused(error: Exception) -> UserError:
    """Say what the trainer refuses.

    Args:
        error: what it raised.

    Returns:
        The error in one line.
    """
    return UserError(f"the trainer refuses its options: {' '.join(str(error).split())[:300] or type(error).__name__}")
