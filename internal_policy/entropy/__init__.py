"""Entropies, divergences and log-probabilities of policies, in nats.

``policy_entropy``, ``policy_entropies``, ``policy_divergence``, ``policy_changes`` and ``token_log_probs`` are exact
and stream over the vocabulary; they are tested against the formulas of ``reference``.
"""

from __future__ import annotations

from internal_policy.entropy.changes import PolicyChanges, policy_changes
from internal_policy.entropy.divergence import policy_divergence, token_log_probs
from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, policy_entropies, policy_entropy

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "PolicyChanges",
    "policy_changes",
    "policy_divergence",
    "policy_entropies",
    "policy_entropy",
    "token_log_probs",
]
