"""Load a causal LM and know its parts: the family table, the unembedding's projection."""

from __future__ import annotations

from internal_policy.models.families import FAMILIES, Family
from internal_policy.models.loading import (
    LanguageModel,
    check,
    choose_device,
    family_of,
    load,
    projection_of,
    unknown_family,
    wrap,
)
from internal_policy.models.modes import evaluating, fitting_threads
from internal_policy.models.projection import Projection

__all__ = [
    "FAMILIES",
    "Family",
    "LanguageModel",
    "Projection",
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
