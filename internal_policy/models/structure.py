"""Find the parts of a decoder that the table of families does not know, by what its modules are called.

What is found is a guess. ``capture.prove`` takes the first one for which eq. 4 holds in every layer and whose
projection gives the model's own logits, and refuses the model where there is none.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import product
from typing import Any

from torch import nn

from internal_policy.models.families import Family

_ATTENTION = ("self_attn", "attention", "attn", "self_attention", "mixer", "temporal_block")
_FFN = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "feedforward")
_FINAL_NORM = ("norm", "final_layernorm", "ln_f", "final_layer_norm", "norm_f", "final_norm", "layer_norm")
_WRITE_NORMS = (
    (None, None),
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_attention_norm", "post_ffn_norm"),
)
_MULTIPLIERS = ("residual_multiplier",)
_SOFTCAPS = ("final_logit_softcapping",)
_SCALES, _DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)


def candidates(model: nn.Module) -> Iterator[Family]:
    """Guess where the parts of a decoder are, the likeliest first.

    Args:
        model: a transformers causal LM.

    Yields:
        Rows whose paths all exist in this model; none where it has no list of layers, norm or head that is known.
    """
    config: Any = model.config
    backbone = str(getattr(model, "base_model_prefix", ""))
    decoder = _resolve(model, backbone)
    head = _path_of(model, _output_embeddings(model))
    if not isinstance(decoder, nn.Module) or head is None:
        return
    name = str(config.model_type)
    for inner, layers in _layer_lists(decoder):
        holder = f"{backbone}.{inner}".rstrip(".")
        norms = [n for n in _FINAL_NORM if isinstance(_resolve(model, f"{holder}.{n}"), nn.Module)]
        first = layers[1][0]
        sites = product((n for n in _ATTENTION if hasattr(first, n)), [n for n in _FFN if hasattr(first, n)])
        for (attention, ffn), norm in product(list(sites), norms):
            for (a_write, f_write), multiplier in product(_WRITE_NORMS, (None, *_present(config, _MULTIPLIERS))):
                if any(w is not None and not hasattr(first, w) for w in (a_write, f_write)):
                    continue
                yield Family(
                    name,
                    backbone=backbone,
                    layers=f"{holder}.{layers[0]}",
                    final_norm=f"{holder}.{norm}",
                    unembedding=head,
                    attention=attention,
                    ffn=ffn,
                    attention_write=a_write,
                    ffn_write=f_write,
                    write_multiplier=multiplier,
                    logit_softcap=_first(_present(config, _SOFTCAPS)),
                    logit_scale=_first(_present(config, _SCALES)),
                    logit_divisor=_first(_present(config, _DIVISORS)),
                    guessed=True,
                )


def _layer_lists(decoder: nn.Module) -> Iterator[tuple[str, tuple[str, nn.ModuleList]]]:
    """The lists of modules in a decoder, with where they are; those nearest the top first."""
    found = [
        (path, module)
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0
    ]
    for path, module in sorted(found, key=lambda item: item[0].count(".")):
        holder, _, name = path.rpartition(".")
        if not any(part.isdigit() for part in path.split(".")):
            yield holder, (name, module)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _resolve(model: nn.Module, path: str) -> Any:
    try:
        return operator.attrgetter(path)(model) if path else model
    except AttributeError:
        return None


def _present(config: Any, fields: tuple[str, ...]) -> list[str]:
    return [f for f in fields if getattr(config, f, None) is not None]


def _first(fields: list[str]) -> str | None:
    return fields[0] if fields else None
