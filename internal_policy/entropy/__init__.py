"""Entropies of internal policies, in nats.

``policy_entropy`` is the exact streaming engine; ``definition.policy_entropy`` is the formula it is tested against.
"""

from __future__ import annotations

from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, policy_entropy

__all__ = ["DEFAULT_MEMORY_BUDGET", "policy_entropy"]
