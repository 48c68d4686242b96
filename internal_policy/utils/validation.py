"""Checks that the settings of every command share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from internal_policy.utils.errors import UserError

LARGEST: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("max_responses", "max_problems", "eval_problems", "max_steps"), 1_000_000),
        **dict.fromkeys(("samples_per_prompt", "samples", "eval_samples", "num_generations", "num_iterations"), 10_000),
        **dict.fromkeys(("prompts_per_step", "mini_batches", "dynamics_responses"), 100_000),
        **dict.fromkeys(("max_new_tokens", "max_completion_length", "max_prompt_length", "top_k"), 10_000_000),
        **dict.fromkeys(("batch_size", "keep_tokens", "entropy_sequences"), 1_000_000),
        "lora_rank": 4096,
        # What numpy's and transformers' generators take.
        "seed": 2**32 - 1,
    }
)
"""The largest value of each count. No run gets through more; a slip of the keyboard is refused before memory fills."""
MOST_PROMPTS = 10_000_000
"""So many prompts or samples in all are the most that one run or evaluation lists."""


def refuse_too_large(name: str, value: Any, told: str | None = None) -> None:
    """Refuse a count that no run gets through.

    Args:
        name: of the setting; one that is not in ``LARGEST`` has no limit.
        value: a number, or None.
        told: what the message calls the setting, where not by its name.

    Raises:
        UserError: it is larger than ``LARGEST`` allows.
    """
    if value is not None and value > LARGEST.get(name, value):
        shown = f"{value:.6g}" if value < 1e300 else "beyond all measure"
        raise UserError(f"{told or name} is {shown}; needed is a number of at most {LARGEST[name]}")


def require_one_of(flag: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the known ones.

    Args:
        flag: what the message calls the setting.
        value: what was given.
        choices: the known ones.

    Raises:
        UserError: it is none of them.
    """
    if value not in choices:
        raise UserError(f"{flag} is {value!r}; needed is one of {', '.join(choices)}")
