"""Capture residual states as the forward pass makes them, and reduce them to numbers."""

from __future__ import annotations

from internal_policy.extractors.base import Batch, Extractor, LayerReduction, LayerStates, LogitReduction
from internal_policy.extractors.hooks import HookExtractor, residual_hooks
from internal_policy.extractors.reduce import QUANTITIES, PolicyReducer, Reducer, TokenValues, reduce_responses
from internal_policy.extractors.verify import prove, verify

__all__ = [
    "QUANTITIES",
    "Batch",
    "Extractor",
    "HookExtractor",
    "LayerReduction",
    "LayerStates",
    "LogitReduction",
    "PolicyReducer",
    "Reducer",
    "TokenValues",
    "prove",
    "reduce_responses",
    "residual_hooks",
    "verify",
]
