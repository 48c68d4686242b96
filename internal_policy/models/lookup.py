"""What a name stands for, before any weights are read; one clear line for what cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from internal_policy.models.paths import locate
from internal_policy.utils.errors import UserError, as_user_error, first_line
from internal_policy.utils.logging import quiet_libraries

_MOST_LAYERS = 10_000
"""No decoder has more; a slip in a config.json would have modules made until the memory is full."""


def choose_device(device: str) -> torch.device:
    """Resolve ``auto`` to cuda, mps or cpu, and check that a named device is there.

    Args:
        device: ``auto`` or a torch device.

    Returns:
        The device.

    Raises:
        UserError: not a device, or not on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here ({first_line(error)}); use auto or cpu") from error
    return chosen


@quiet_libraries()
def check(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, Any]:
    """Check that a name stands for a causal LM, without loading its weights.

    Args:
        name: hub id, local directory, or an embedded model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        What transformers loads it from, and its configuration.

    Raises:
        UserError: what cannot be loaded, and why.
    """
    from transformers import AutoConfig

    where = locate(name, revision)
    if Path(where).is_dir():
        # Before transformers reads it, which makes lists with an entry a layer.
        _refuse_too_deep(Path(where), name)
    with as_user_error(name, "its config.json"):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        _refuse_other_architectures(config, name)
    return where, config


def _refuse_too_deep(directory: Path, name: str) -> None:
    try:
        settings = json.loads((directory / "config.json").read_bytes())
        layers = settings.get("text_config", settings).get("num_hidden_layers", 0)
    # What is wrong with it is told where it is read for good.
    except (OSError, ValueError, RecursionError, AttributeError):
        return
    if isinstance(layers, (int, float)) and layers > _MOST_LAYERS:
        shown = f"{layers:.6g}" if layers < 1e300 else "more than 1e300"
        raise UserError(f"{name}: config.json has {shown} layers; needed are at most {_MOST_LAYERS}")


def _refuse_other_architectures(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {config.model_type} is an encoder-decoder model; needed is a decoder-only causal LM")
    named = getattr(config, "architectures", None) or []
    architectures = [str(a) for a in (named if isinstance(named, (list, tuple)) else [named])]
    causal = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (architectures and not causal):
        what = architectures[0] if architectures else config.model_type
        raise UserError(
            f"{name}: {what} is not a causal LM (encoder-only or another task); needed is a decoder-only causal LM"
        )
