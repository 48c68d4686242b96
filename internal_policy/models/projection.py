"""The projection of a state by the unembedding, with the model's own transform of its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internal_policy.entropy import DEFAULT_MEMORY_BUDGET, policy_entropies
from internal_policy.models.options import Lens


@dataclass(frozen=True)
class Projection:
    """E_u and what the model does to the logits: soft cap, scale and bias belong to the projection."""

    weight: Tensor
    """[V, d] unembedding matrix E_u."""
    bias: Tensor | None = None
    """[V] bias of the unembedding."""
    scale: float = 1.0
    """Factor on the logits."""
    softcap: float | None = None
    """c in ``c * tanh(logits / c)``."""
    final_norm: Callable[[Tensor], Tensor] = lambda states: states
    """LN_final."""
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    """Bytes of working memory of an entropy."""

    def entropy(self, states: Tensor) -> Tensor:
        """Entropy of the policy of each state.

        Args:
            states: [N, d].

        Returns:
            [N] nats, float32. Source: arXiv 2512.19673v3, eq. 7.
        """
        return self.entropies([states])[0]

    def entropies(self, states: Sequence[Tensor], sums: Sequence[Sequence[int]] = ()) -> Tensor:
        """Entropies of the policies of several states at each position, and of running sums of them.

        Args:
            states: S states of the same N positions, [N, d] each.
            sums: R lists of places in ``states``; see ``policy_entropies``.

        Returns:
            [S + R, N] nats, float32. Source: arXiv 2512.19673v3, eqs. 4 and 7.
        """
        return policy_entropies(
            [s.to(self.weight.device) for s in states],
            self.weight,
            self.bias,
            sums=sums,
            scale=self.scale,
            softcap=self.softcap,
            memory_budget=self.memory_budget,
        )

    def through(self, lens: Lens, states: Tensor) -> Tensor:
        """Apply a lens: nothing for ``policy``, LN_final for ``logit-lens``.

        Args:
            lens: ``policy`` (arXiv 2512.19673v3, eqs. 5-6) or ``logit-lens``.
            states: [N, d].

        Returns:
            [N, d] what E_u projects, in the states' dtype: the norm is the model's own module.
        """
        return states if lens == "policy" else self.normed(states)

    def normed(self, states: Tensor) -> Tensor:
        """Apply LN_final, where its weights are.

        Args:
            states: [N, d].

        Returns:
            [N, d] on the device of E_u, which tied weights keep beside the input embedding.
        """
        return self.final_norm(states).to(self.weight.device)

    def logits(self, states: Tensor) -> Tensor:
        """Logits in the states' dtype, as the model computes them; for a few states only.

        Args:
            states: [N, d].

        Returns:
            [N, V].
        """
        logits = torch.nn.functional.linear(states.to(self.weight.device), self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
