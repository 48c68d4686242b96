"""What a name stands for, before any weights are read; one clear line for what cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import errors as hub

from internal_policy.errors import UserError
from internal_policy.memory import is_out_of_memory
from internal_policy.model_paths import locate
from internal_policy.quiet import quiet_libraries

WEIGHTS = "its weights"
"""What is loaded when everything else about the checkpoint is known."""


class NoNetwork(UserError):
    """The hub cannot be reached, and its cache on this disk does not have what was asked for."""


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
    with told_in_one_line(name, "its config.json"):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    _refuse_other_architectures(config, name)
    return where, config


def _refuse_other_architectures(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name}: {config.model_type} is an encoder-decoder model; needed is a decoder-only causal LM")
    architectures = getattr(config, "architectures", None) or []
    causal = [a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))]
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (architectures and not causal):
        what = architectures[0] if architectures else config.model_type
        raise UserError(
            f"{name}: {what} is not a causal LM (encoder-only or another task); needed is a decoder-only causal LM"
        )


@contextmanager
def told_in_one_line(name: str, what: str) -> Iterator[None]:
    """Turn what transformers and the hub raise on a bad name, file or network into one line.

    Args:
        name: the model's name.
        what: what is being loaded.

    Raises:
        UserError: in place of what was raised.
    """
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{name}: broken safetensors file ({first_line(error)}); download or save it again") from error
    except (
        *(OSError, ValueError, KeyError, ImportError, TypeError, RuntimeError, MemoryError),
        *(hub.HfHubHTTPError, hub.StrictDataclassError),
    ) as error:
        if is_out_of_memory(error):
            raise UserError(f"{name}: out of memory on {what}; use --dtype bfloat16 or a smaller model") from error
        kind = NoNetwork if "couldn't connect to" in str(error).lower() else UserError
        raise kind(f"{name}: cannot load {what}: {_explain(name, what, error)}") from error


def _explain(name: str, what: str, error: BaseException) -> str:
    text = shorten(" ".join(str(error).split())) or type(error).__name__
    if isinstance(error, ImportError):
        return f"{text}; install what is missing, then repeat this"
    if Path(name).exists():
        return f"{text}; mend this directory, or give another"
    lowered = str(error).lower()
    if "safetensors" in lowered and ("does not appear to have" in lowered or "no file named" in lowered):
        return "the repository has no safetensors weights (pickle only?); only safetensors is read"
    if any(sign in lowered for sign in ("gated repo", "401 client error", "403 client error")):
        return "access is restricted; log in with `hf auth login` and accept the model's terms on the hub"
    if "trust_remote_code" in lowered:
        return "it needs code from its repository; read that code, then pass --trust-remote-code"
    if what == WEIGHTS and not isinstance(error, (OSError, hub.HfHubHTTPError)):
        # Its configuration has been read: the model exists, and what fails is how it was to be loaded.
        return f"{text}; change how it is loaded, or give another checkpoint"
    return f"no such model on the hub, or no network ({text}); check the name, or give a local directory"


def first_line(error: BaseException) -> str:
    """The first line of what an exception says.

    Args:
        error: the exception.

    Returns:
        Some 200 characters at most; its type where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return shorten(lines[0]) if lines else type(error).__name__


def shorten(text: str, length: int = 200) -> str:
    """Cut a text for a message where it can be cut: an address or a path stays whole, or is left out.

    Args:
        text: one line.
        length: so many characters at most, unless the first word is longer.

    Returns:
        The text without the stop at its end; with three dots where it was cut.
    """
    text = text.strip().rstrip(".:")
    if len(text) <= length:
        return text
    space = max(text.rfind(" ", 0, length + 1), text.find(" "))
    return text if space < 0 else f"{text[:space].rstrip('.,:;(')} ..."
