"""Where the parts of a decoder live: one table, a row a family, keyed by ``config.model_type``.

To support another family, add a row: the paths of its parts and, where they differ from the raw module outputs, of the
modules whose outputs are what the attention and the FFN WRITE to the residual stream. ``capture.verify`` proves the row
on every load, by eq. 4 and against the model's own logits.
"""

from __future__ import annotations

from dataclasses import dataclass

from internal_policy.errors import UserError


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
    """The linear module that holds E_u (and a bias, where there is one)."""
    attention: str = "self_attn"
    """The attention module: its input is LN_in(H(2l-2)), normed, as it receives it."""
    ffn: str = "mlp"
    """The feed-forward module: its input is LN_mid(H(2l-1)), normed, as it receives it."""
    attention_write: str | None = None
    """The module whose output is A^l, where a post-norm follows the attention; the attention itself otherwise."""
    ffn_write: str | None = None
    """The module whose output is F^l, where a post-norm follows the FFN; the FFN itself otherwise."""
    logit_softcap: str | None = None
    """The config field with c of the final ``c * tanh(logits / c)``."""


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
}


def family_of(model_type: str, name: str) -> Family:
    """Look a family up.

    Args:
        model_type: ``config.model_type``.
        name: the model's name, for the message.

    Returns:
        The family's row.

    Raises:
        UserError: no row for this model type.
    """
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(
            f"{name}: unsupported family {model_type!r}; supported: {known}. "
            "To add it, write one row in internal_policy/models/families.py"
        )
    return FAMILIES[model_type]
