"""Entropies, divergences and log-probabilities of policies, in nats.

The functions here that are not of ``reference`` are exact and stream over the vocabulary; they are tested against its
formulas.
"""

from __future__ import annotations

from internal_policy.entropy.changes import PolicyChanges, policy_changes
from internal_policy.entropy.divergence import policy_divergence, policy_divergences, token_log_probs
from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, policy_entropies, policy_entropy

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "PolicyChanges",
    "policy_changes",
    "policy_divergence",
    "policy_divergences",
    "policy_entropies",
    "policy_entropy",
    "token_log_probs",
]
