"""Where the parts of a decoder are: a table with one row per family, keyed by ``config.model_type``, and a guess.

To support another family, add a row: the paths of its parts and, if they differ from the raw module outputs, of the
modules whose outputs are what the attention and the FFN WRITE to the residual stream. ``extractors.verify`` proves the
row on every load, by eq. 4 and against the model's own logits. For a model type without a row, ``guess_families`` finds
the parts by the names of the modules, and ``extractors.prove`` takes the first guess that passes the same proof.

Importing this module does not load torch, so that ``internal-policy models`` prints the table at once.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn


class CapturePaths(NamedTuple):
    """Paths, from a decoder layer, of the modules between which its attention and FFN writes are made."""

    attention: str
    """Its input is what the attention reads."""
    attention_write: str
    """Its output is A^l, but for the multiplier."""
    ffn: str
    """Its input is what the FFN reads."""
    ffn_write: str
    """Its output is F^l, but for the multiplier."""


@dataclass(frozen=True)
class Family:
    """One family of decoders: paths from the causal LM, and inside a layer from the layer."""

    name: str
    """The family's name, as its authors write it."""
    backbone: str = "model"
    """The decoder without the unembedding."""
    layers: str = "model.layers"
    """The list of layers."""
    final_norm: str = "model.norm"
    """LN_final, between H^L and the unembedding."""
    unembedding: str = "lm_head"
    """The linear module that holds E_u (and a bias, if there is one)."""
    attention: str = "self_attn"
    """The attention module, whose input is the normed state LN_in(H(2l-2))."""
    ffn: str = "mlp"
    """The feed-forward module or mixture of experts, whose input is the normed state LN_mid(H(2l-1))."""
    attention_write: str | None = None
    """The module whose output is A^l: the post-norm if one follows the attention, else (None) the attention."""
    output_projection: str = "o_proj"
    """In the attention, the linear module that receives the heads' results side by side and adds up their writes."""
    ffn_write: str | None = None
    """The module whose output is F^l: the post-norm if one follows the FFN, else (None) the FFN."""
    write_multiplier: str | None = None
    """The config field with the factor on both writes."""
    parallel: bool | str = False
    """Whether attention and FFN both start from H^{l-1} and there is no H_mid; or the config field that says so."""
    pre_norm: bool = True
    """Whether the modules receive a normed state; without, they receive the residual stream itself."""
    logit_softcap: str | None = None
    """The config field with c of the final ``c * tanh(logits / c)``."""
    logit_scale: str | None = None
    """The config field with a factor on the logits."""
    logit_divisor: str | None = None
    """The config field with a divisor of the logits."""
    guessed: bool = False
    """Whether the row was guessed from the structure and is not in the table."""

    def capture_paths(self) -> CapturePaths:
        """The modules of a layer whose inputs and outputs are captured."""
        return CapturePaths(
            self.attention, self.attention_write or self.attention, self.ffn, self.ffn_write or self.ffn
        )

    def is_parallel(self, config: Any) -> bool:
        """Whether blocks are parallel: the FFN does not see what the attention of its layer wrote."""
        return bool(getattr(config, self.parallel)) if isinstance(self.parallel, str) else self.parallel

    def multiplier(self, config: Any) -> float:
        """Read the factor by which a model multiplies both writes before it adds them; 1 for most."""
        return float(getattr(config, self.write_multiplier)) if self.write_multiplier else 1.0


_POST_NORMS: dict[str, Any] = {"attention_write": "post_attention_layernorm", "ffn_write": "post_feedforward_layernorm"}
_GEMMA: dict[str, Any] = {**_POST_NORMS, "logit_softcap": "final_logit_softcapping"}
_GRANITE: dict[str, Any] = {"write_multiplier": "residual_multiplier", "logit_divisor": "logits_scaling"}
_GPT: dict[str, Any] = {
    "backbone": "transformer",
    "layers": "transformer.h",
    "final_norm": "transformer.ln_f",
    "attention": "attn",
}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "mixtral": Family("Mixtral"),
    "qwen2": Family("Qwen2"),
    "qwen2_moe": Family("Qwen2-MoE"),
    "qwen3": Family("Qwen3"),
    "qwen3_moe": Family("Qwen3-MoE"),
    "phi": Family("Phi", final_norm="model.final_layernorm", output_projection="dense", parallel=True),
    "phi3": Family("Phi-3"),
    "gemma": Family("Gemma"),
    "gemma2": Family("Gemma 2", **_GEMMA),
    "gemma3_text": Family("Gemma 3", **_GEMMA),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2", **_POST_NORMS, pre_norm=False),
    "olmo3": Family("OLMo 3", **_POST_NORMS, pre_norm=False),
    "glm": Family("GLM"),
    "glm4": Family("GLM4", attention_write="post_self_attn_layernorm", ffn_write="post_mlp_layernorm"),
    "granite": Family("Granite", **_GRANITE),
    "cohere": Family("Cohere", parallel=True, logit_scale="logit_scale"),
    "cohere2": Family("Cohere 2", parallel=True, logit_scale="logit_scale"),
    "smollm3": Family("SmolLM3"),
    "deepseek_v3": Family("DeepSeek-V3"),
    "gpt_oss": Family("GPT-OSS"),
    "gpt2": Family("GPT-2", **_GPT, output_projection="c_proj"),
    "gpt_neox": Family(
        "GPT-NeoX",
        backbone="gpt_neox",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        attention="attention",
        output_projection="dense",
        parallel="use_parallel_residual",
    ),
    "gptj": Family("GPT-J", **_GPT, output_projection="out_proj", parallel=True),
}

_ATTENTION = ("self_attn", "attention", "attn", "self_attention", "mixer", "temporal_block")
_OUTPUT_PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "proj")
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


def guess_families(model: nn.Module) -> Iterator[Family]:
    """Guess where the parts of a decoder are from the names of its modules, the likeliest guess first.

    Args:
        model: a transformers causal LM.

    Yields:
        Rows whose paths all exist in this model; none if it has no layers, norm or head under a known name.
    """
    from torch import nn

    config: Any = model.config
    backbone = str(getattr(model, "base_model_prefix", ""))
    decoder = _resolve(model, backbone)
    find_head = getattr(model, "get_output_embeddings", None)
    head_module = find_head() if callable(find_head) else None
    head = next((path for path, module in model.named_modules() if module is head_module), None)
    if not isinstance(decoder, nn.Module) or head is None:
        return
    for holder_name, list_name, first in _layer_lists(decoder):
        holder = f"{backbone}.{holder_name}".rstrip(".")
        norms = [n for n in _FINAL_NORM if isinstance(_resolve(model, f"{holder}.{n}"), nn.Module)]
        attentions, ffns = ([n for n in names if hasattr(first, n)] for names in (_ATTENTION, _FFN))
        writes = [pair for pair in _WRITE_NORMS if all(norm is None or hasattr(first, norm) for norm in pair)]
        multipliers = (None, *_present(config, _MULTIPLIERS))
        for attention, ffn, norm, (attention_write, ffn_write), multiplier in product(
            attentions, ffns, norms, writes, multipliers
        ):
            yield Family(
                str(config.model_type),
                backbone=backbone,
                layers=f"{holder}.{list_name}",
                final_norm=f"{holder}.{norm}",
                unembedding=head,
                attention=attention,
                ffn=ffn,
                attention_write=attention_write,
                output_projection=next(
                    (n for n in _OUTPUT_PROJECTION if hasattr(getattr(first, attention), n)), _OUTPUT_PROJECTION[0]
                ),
                ffn_write=ffn_write,
                write_multiplier=multiplier,
                logit_softcap=next(iter(_present(config, _SOFTCAPS)), None),
                logit_scale=next(iter(_present(config, _SCALES)), None),
                logit_divisor=next(iter(_present(config, _DIVISORS)), None),
                guessed=True,
            )


def _layer_lists(decoder: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """The module lists of a decoder, those nearest the top first: what holds each, its name there, its first layer."""
    from torch import nn

    found = [(path, m) for path, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    for path, module in sorted(found, key=lambda item: item[0].count(".")):
        holder, _, name = path.rpartition(".")
        if not any(part.isdigit() for part in path.split(".")):
            yield holder, name, module[0]


def _resolve(model: nn.Module, path: str) -> Any:
    try:
        return operator.attrgetter(path)(model) if path else model
    except AttributeError:
        return None


def _present(config: Any, fields: tuple[str, ...]) -> list[str]:
    return [f for f in fields if getattr(config, f, None) is not None]
