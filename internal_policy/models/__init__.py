"""Load a causal LM and know its parts: the table of families, the projection by the unembedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy.models.devices import choose_device
    from internal_policy.models.families import FAMILIES, Family
    from internal_policy.models.language_model import LanguageModel, family_of, unknown_family, wrap
    from internal_policy.models.loading import check, load
    from internal_policy.models.modes import eval_mode, exclusive_use, limit_threads, without_autocast
    from internal_policy.models.projection import Projection, projection_of

__all__ = [
    "FAMILIES",
    "Family",
    "LanguageModel",
    "Projection",
    "check",
    "choose_device",
    "eval_mode",
    "exclusive_use",
    "family_of",
    "limit_threads",
    "load",
    "projection_of",
    "unknown_family",
    "without_autocast",
    "wrap",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "choose_device": "devices",
        **dict.fromkeys(("FAMILIES", "Family"), "families"),
        **dict.fromkeys(("LanguageModel", "family_of", "unknown_family", "wrap"), "language_model"),
        **dict.fromkeys(("check", "load"), "loading"),
        **dict.fromkeys(("eval_mode", "exclusive_use", "limit_threads", "without_autocast"), "modes"),
        **dict.fromkeys(("Projection", "projection_of"), "projection"),
    },
)
