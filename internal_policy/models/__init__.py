"""Load a causal LM and know its parts: the family table, the unembedding's projection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from internal_policy.utils.imports import lazy_names

if TYPE_CHECKING:
    from internal_policy.models.families import FAMILIES, Family
    from internal_policy.models.language_model import LanguageModel, family_of, unknown_family, wrap
    from internal_policy.models.loading import load
    from internal_policy.models.lookup import check, choose_device
    from internal_policy.models.modes import alone, as_its_dtype_says, evaluating, fitting_threads
    from internal_policy.models.projection import Projection
    from internal_policy.models.unembedding import projection_of

__all__ = [
    "FAMILIES",
    "Family",
    "LanguageModel",
    "Projection",
    "alone",
    "as_its_dtype_says",
    "check",
    "choose_device",
    "evaluating",
    "family_of",
    "fitting_threads",
    "load",
    "projection_of",
    "unknown_family",
    "wrap",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("FAMILIES", "Family"), "families"),
        **dict.fromkeys(("LanguageModel", "family_of", "unknown_family", "wrap"), "language_model"),
        "load": "loading",
        **dict.fromkeys(("check", "choose_device"), "lookup"),
        **dict.fromkeys(("alone", "as_its_dtype_says", "evaluating", "fitting_threads"), "modes"),
        "Projection": "projection",
        "projection_of": "unembedding",
    },
)
