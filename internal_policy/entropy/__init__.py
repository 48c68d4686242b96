"""Entropies, divergences and log-probabilities of policies, in nats.

Those of ``policy_entropy``, ``policy_entropies``, ``policy_divergence``, ``policy_divergences`` and ``token_log_probs``
are exact and stream over the vocabulary; they are tested against the formulas of ``reference``.
"""

from __future__ import annotations

from internal_policy.entropy.divergence import policy_divergence, policy_divergences, token_log_probs
from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, policy_entropies, policy_entropy

__all__ = [
    "DEFAULT_MEMORY_BUDGET",
    "policy_divergence",
    "policy_divergences",
    "policy_entropies",
    "policy_entropy",
    "token_log_probs",
]
