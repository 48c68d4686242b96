"""Load a causal language model with its tokenizer, in the requested precision and on the requested devices."""

from __future__ import annotations

import json
import logging
import re
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch

from internal_policy.models.checkpoint_files import refuse_read_as_plain, refuse_unscaled, weight_files
from internal_policy.models.devices import choose_device
from internal_policy.models.families import Family
from internal_policy.models.language_model import LanguageModel, family_of, wrap
from internal_policy.models.options import DTYPES, check_device_map, check_quantization
from internal_policy.models.paths import locate
from internal_policy.models.quantization import bitsandbytes, describe, quiet_casts, refuse_twice, refuse_unknown
from internal_policy.utils.errors import WEIGHTS, UserError, as_user_error
from internal_policy.utils.logging import quiet_libraries

logger = logging.getLogger(__name__)

_NOT_READ = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$|(^|\.)position_ids$|\.[qkv]+_(scale|zero_point)$")
"""Tensors of a checkpoint that no forward pass reads: buffers that are recomputed, and the scales with which servers
quantise their caches of keys and values."""
_MOST_LAYERS = 10_000
"""No decoder has more; an error in config.json would otherwise create modules until the memory is full."""


@quiet_libraries()
def load(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
) -> LanguageModel:
    """Load a causal LM and its tokenizer from safetensors.

    Args:
        name: hub id, local directory, or an embedded model (``testbed/qwen3``, ``testbed/llama``).
        revision: branch, tag or commit on the hub.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the checkpoint's own on cuda or if it is quantised,
            else float32.
        device: ``auto`` (cuda, mps, cpu) or a torch device.
        trust_remote_code: run code that comes with the checkpoint.
        attn_implementation: transformers' attention; its own choice by default.
        device_map: distribute the layers over devices, instead of one ``device``: ``auto`` and accelerate's other
            names, or a dict from module paths to devices, including ``cpu`` and ``disk``.
        quantization: ``8bit`` or ``4bit``: quantise the weights of the layers while loading, with bitsandbytes. A
            checkpoint that is already quantised does not need it.

    Returns:
        The model on its devices, in evaluation mode.

    Raises:
        UserError: what cannot be loaded, and why.
    """
    from transformers import AutoModelForCausalLM

    check_device_map(device_map, device)
    check_quantization(quantization)
    target = choose_device(device)
    where, config = check(name, revision=revision, trust_remote_code=trust_remote_code)
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    refuse_unknown(config, name)
    refuse_twice(quantization, config, name)
    own = describe(config) is not None
    # Load the commit that was checked, even if the branch moves in the meantime.
    revision = getattr(config, "_commit_hash", None) or revision
    if own or quantization is not None:
        quiet_casts()
    if dtype == "auto" and not own and not _accelerated(target, device_map):
        dtype = "float32"
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, where, **options)
    with as_user_error(name, WEIGHTS):
        files = weight_files(where, config, revision, name)
        if not own:
            refuse_unscaled(files, name)
    if quantization is not None:
        options["quantization_config"] = bitsandbytes(quantization, _torch_dtype(dtype, config, name))
    scratch = None
    if device_map is not None:
        # Weights that are offloaded to disk in another format than the checkpoint's are written here.
        scratch = tempfile.TemporaryDirectory(prefix="internal-policy-offload-")
        options |= {"device_map": device_map, "offload_folder": scratch.name}
    elif own or quantization is not None:
        # Quantised weights are packed for their device and do not move.
        options["device_map"] = {"": target}
    with as_user_error(name, WEIGHTS):
        model, report = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            # Different shapes are then in the report, which is checked below, and not on the terminal.
            ignore_mismatched_sizes=True,
            attn_implementation=attn_implementation,
            **options,
        )
        _refuse_other_weights(report, model, family_of(model, name), name)
        if own:
            refuse_read_as_plain(files, model, name)
        if "device_map" not in options:
            model = model.to(target)
    if scratch is not None:
        weakref.finalize(model, scratch.cleanup)
    loaded = wrap(model, tokenizer, name, revision)
    if own and dtype != "auto" and loaded.dtype != getattr(torch, dtype):
        raise UserError(
            f"{name}: --dtype {dtype} was given with a checkpoint that is quantised ({describe(config)}) and computes "
            f"in {str(loaded.dtype).removeprefix('torch.')}; leave --dtype out"
        )
    return loaded


def load_tokenizer(name: str, where: str, **options: Any) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: the model, for messages.
        where: from which transformers loads it, as ``check`` returns it.
        **options: those of ``from_pretrained``.

    Returns:
        The tokenizer.

    Raises:
        UserError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with as_user_error(name, "its tokenizer"):
        return AutoTokenizer.from_pretrained(where, **options)


def _accelerated(target: torch.device, device_map: str | dict[str, Any] | None) -> bool:
    """Whether some layers run on cuda, where the checkpoint's own dtype is the default."""
    if isinstance(device_map, dict):
        return any(d != "disk" and torch.device(d).type == "cuda" for d in device_map.values())
    return target.type == "cuda"


def _torch_dtype(dtype: str, config: Any, name: str) -> torch.dtype:
    found = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else dtype
    found = found if isinstance(found, torch.dtype) else getattr(torch, str(found), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"{name}: config.json says dtype {config.dtype!r}; give --dtype float32 or bfloat16")
    return found


def _refuse_other_weights(report: Any, model: Any, family: Family, name: str) -> None:
    """Refuse a checkpoint that does not fill the model, whose missing weights would be random.

    Also refuse one with unused weights of a part that the model has, such as a bias that config.json leaves out.
    """
    unexpected = sorted(report["unexpected_keys"])
    parts = {family.layers, family.final_norm, family.unembedding}
    parts |= {path for path, module in model.named_modules() if module is model.get_input_embeddings()}
    # A checkpoint of the decoder alone names its parts without the path to the decoder.
    parts |= {part.removeprefix(f"{family.backbone}.") for part in parts}
    left_over = [
        key
        for key in unexpected
        if key.startswith(tuple(f"{part}." for part in parts))
        and not _NOT_READ.search(key)
        and not _predicts_further(key, model.config)
    ]
    for what, keys in (
        ("lacks", sorted(report["missing_keys"])),
        ("has another shape for", sorted(str(key[0]) for key in report["mismatched_keys"])),
        ("has weights that config.json leaves no room for:", left_over),
    ):
        if keys:
            raise UserError(
                f"{name}: the checkpoint {what} {keys[0]}{_more(keys)}; "
                "give a checkpoint whose config.json and weights belong together"
            )
    if unused := [key for key in unexpected if not _NOT_READ.search(key)]:
        logger.warning(
            "%s: the checkpoint also holds %s%s, which the model does not use", name, unused[0], _more(unused)
        )


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _predicts_further(key: str, config: Any) -> bool:
    """Whether a tensor belongs to an extra layer after the last one, with which some models predict further tokens."""
    layer = re.search(r"\.(\d+)\.", key)
    further = getattr(config, "num_nextn_predict_layers", None) or 0
    return layer is not None and 0 <= int(layer[1]) - int(config.num_hidden_layers) < further


@quiet_libraries()
def check(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[str, Any]:
    """Check that a name refers to a causal LM, without loading its weights.

    Args:
        name: hub id, local directory, or an embedded model.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the checkpoint.

    Returns:
        The directory or hub id from which transformers loads it, and its configuration.

    Raises:
        UserError: what cannot be loaded, and why.
    """
    from transformers import AutoConfig

    where = locate(name, revision)
    if Path(where).is_dir():
        # Before transformers reads it, which creates lists with one entry per layer.
        _refuse_too_deep(Path(where), name)
    with as_user_error(name, "its config.json"):
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        _refuse_other_architectures(config, name)
    return where, config


def _refuse_too_deep(directory: Path, name: str) -> None:
    try:
        settings = json.loads((directory / "config.json").read_bytes())
        layers = settings.get("text_config", settings).get("num_hidden_layers", 0)
    # Loading the configuration reports what is wrong with it.
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
