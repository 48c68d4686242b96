"""Quantised weights, as transformers loads them: what was asked for, and what a checkpoint brings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from internal_policy.errors import UserError


def refuse_twice(quantization: str | None, config: Any, name: str) -> None:
    """Refuse to quantise a checkpoint that is quantised already.

    Args:
        quantization: ``8bit``, ``4bit`` or None.
        config: the checkpoint's configuration.
        name: the model's name.

    Raises:
        UserError: both.
    """
    if quantization is not None and (own := describe(config)) is not None:
        raise UserError(
            f"{name}: --quantization {quantization} was given with a checkpoint that is quantised already ({own}); "
            "leave it out, and it is loaded as it is"
        )


def refuse_unknown(config: Any, name: str) -> None:
    """Refuse a quantisation that transformers does not know: it would read the packed weights as plain ones.

    Args:
        config: the checkpoint's configuration.
        name: the model's name.

    Raises:
        UserError: it is unknown.
    """
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
    """The transformers configuration of a quantisation.

    Args:
        quantization: ``8bit`` (LLM.int8) or ``4bit`` (nf4).
        dtype: what the model computes in.

    Returns:
        A ``BitsAndBytesConfig``; the unembedding and the norms are left as they are.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quiet_casts() -> None:
    """Keep bitsandbytes from telling once a process that its 8-bit products round their input to float16.

    That is LLM.int8 itself, and nothing to be done about; other warnings of it are left alone.
    """
    # A filter that is there already is not added again.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_tells_no_cast)


def _tells_no_cast(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("MatMul8bitLt: inputs will be cast")


def rounds_by_batch(config: Any) -> bool:
    """Whether what a model computes of a sequence depends on the sequences beside it, as LLM.int8 does.

    Args:
        config: of a checkpoint, or of a model in memory.

    Returns:
        True where it does, by more than rounding in the last bits.
    """
    return describe(config) == "bitsandbytes 8-bit"


def describe(config: Any) -> str | None:
    """Name the quantisation that a configuration speaks of.

    Args:
        config: of a checkpoint, or of a model in memory.

    Returns:
        The method with its bits, such as ``bitsandbytes 8-bit`` or ``gptq 4-bit``; None where the weights are not
        quantised.
    """
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
