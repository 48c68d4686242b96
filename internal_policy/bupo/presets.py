"""The words of the trainer, and the paper's settings; importing them costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.shell import is_number

DATA = "data/runs"
"""Where runs go when no output is given."""
Site = Literal["layer", "attn", "ffn"]
"""What is projected: H^l (arXiv 2512.19673v3, eq. 5), or what the attention or the FFN of layer l writes (eq. 6)."""
SITES = get_args(Site)
METHODS = ("bupo", "grpo", "rloo", "reinforce++")
AGGREGATIONS = ("sequence-mean", "token-mean")
AUTO = "auto"
VERIFIERS = ("math", "exact")
"""Rewards by name; both compare with a reference answer."""
ALIGNMENT = "ipa"
"""The name of the first phase; the second is called by its method."""


def after_alignment(method: str) -> str:
    """Name the second phase.

    Args:
        method: the run's method.

    Returns:
        ``grpo`` for bupo, else the method.
    """
    return "grpo" if method == "bupo" else method


def require_layer(layer: str | Path) -> None:
    """Refuse a layer that is no number, no word and no directory.

    Args:
        layer: what stands for the layer.

    Raises:
        UserError: it is none.
    """
    text = str(layer).strip()
    if text != AUTO and not is_number(text) and not expanded(layer).exists():
        raise UserError(f"layer is {str(layer)!r}; needed is a number from 1, auto, or the directory of an analysis")


PAPER: dict[str, Any] = {
    "max_steps": 300,
    "prompts_per_step": 128,
    "num_generations": 8,
    "mini_batches": 4,
    "learning_rate": 1e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.01,
    "epsilon": 0.2,
    "beta": 0.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_prompt_length": 1024,
}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen": {**PAPER, "ipa_steps": 30, "max_completion_length": 7168, "template": "qwen3"},
    "qwen3-8b": {**PAPER, "ipa_steps": 20, "max_completion_length": 7168, "template": "qwen3"},
    "llama": {**PAPER, "ipa_steps": 20, "max_completion_length": 3072, "template": "octothinker"},
    "testbed": {
        "max_steps": 60,
        "ipa_steps": 10,
        "prompts_per_step": 16,
        "num_generations": 8,
        "mini_batches": 2,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "epsilon": 0.2,
        "max_completion_length": 44,
    },
}
"""Settings by name: of arXiv 2512.19673v3 (table 8; made on 8 A100), and of the embedded models (CPU)."""

# Counted in steps by `train`, in updates by TRL.
STEP_OPTIONS = ("max_steps", "save_steps", "warmup_steps")


def preset(name: str) -> dict[str, Any]:
    """Look a preset up.

    Args:
        name: one of ``PRESETS``.

    Returns:
        Its options of ``train``.

    Raises:
        UserError: no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}; needed is one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
