"""Quantised weights: those requested with ``--quantization``, and those of a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch

from internal_policy.utils.errors import UserError

_REPACKS = "support_avx512bf16_for_cpu"
"""The attribute of bitsandbytes' 4-bit layers that lets them repack their weights."""


def refuse_twice(quantization: str | None, config: Any, name: str) -> None:
    """Refuse to quantise a checkpoint that is already quantised."""
    if quantization is not None and (own := describe(config)) is not None:
        raise UserError(
            f"{name}: --quantization {quantization} was given with a checkpoint that is quantised already ({own}); "
            "leave it out, and it is loaded as it is"
        )


def refuse_unknown(config: Any, name: str) -> None:
    """Refuse a quantisation that transformers does not know, and whose packed weights it would read as plain ones."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = _method(found if isinstance(found, Mapping) else found.to_dict())
    if method not in {known.removesuffix("_4bit").removesuffix("_8bit") for known in AUTO_QUANTIZATION_CONFIG_MAPPING}:
        raise UserError(
            f"{name}: the checkpoint is quantised by {method!r}, which this version of transformers does not know; "
            "give one that is not quantised, or a newer transformers"
        )


def bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    """Create the ``BitsAndBytesConfig`` of ``8bit`` (LLM.int8) or ``4bit`` (nf4), which computes in ``dtype``."""
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_exact(model: Any, name: str) -> None:
    """Make 4-bit layers on a CPU compute with their codes and scales, in the dtype of the model.

    On a CPU with AVX512-BF16 bitsandbytes repacks the weights at their first product, which it then computes in
    bfloat16. This works for certain shapes only, and reading a state dict afterwards scrambles the weights. On any CPU
    with AVX512 it uses wrong scales if the blocks of weights that share a scale cross the ends of rows.

    Raises:
        UserError: a layer is dequantised wrongly on this CPU, or its weights were already repacked.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)
            _refuse_wrong(module.weight, name)


def _refuse_wrong(weight: Any, name: str) -> None:
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state is None or weight.device.type != "cpu":
        return
    if getattr(state, "packing_format_for_cpu", False):
        raise UserError(
            f"{name}: bitsandbytes repacked these 4-bit weights for bfloat16 when the model first ran on this CPU; "
            "load it again, and hand it over before it runs"
        )
    columns = state.shape[-1]
    if columns % state.blocksize:
        # In a single row the blocks follow one another as they do in memory.
        one_row = copy(state)
        one_row.shape = torch.Size((1, state.shape.numel()))
        if not torch.equal(dequantize_4bit(weight.data, state).reshape(1, -1), dequantize_4bit(weight.data, one_row)):
            raise UserError(
                f"{name}: bitsandbytes dequantises 4-bit weights with {columns} columns wrongly on this CPU (no "
                f"multiple of the {state.blocksize} that share a scale); use 8bit or a GPU, or do not quantise"
            )


def quiet_casts() -> None:
    """Suppress the warning of bitsandbytes that 8-bit products round their input to float16, as LLM.int8 defines."""
    # A filter that is already there is not added again.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_not_about_casts)


def _is_not_about_casts(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def rounds_by_batch(config: Any) -> bool:
    """Whether the results for a sequence depend on the rest of its batch, as with LLM.int8."""
    return describe(config) == "bitsandbytes 8-bit"


def describe(config: Any) -> str | None:
    """Name the quantisation of a configuration, such as ``gptq 4-bit``; None if its weights are not quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, Mapping) else found.to_dict()
    method = _method(settings)
    if settings.get("load_in_4bit"):
        return f"{method} 4-bit ({settings.get('bnb_4bit_quant_type', 'fp4')})"
    bits = 8 if settings.get("load_in_8bit") else settings.get("bits") or settings.get("w_bit")
    return f"{method} {bits}-bit" if isinstance(bits, int) else method


def _method(settings: Mapping[str, Any]) -> str:
    named = settings.get("quant_method") or "bitsandbytes"
    return str(getattr(named, "value", named))
