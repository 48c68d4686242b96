"""The Muon optimiser in float32, matrices of one shape together.

`torch.optim.Muon` works in bfloat16, one matrix at a time, which on a CPU costs more than the model's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Keller Jordan's quintic: five iterations bring every singular value into about [0.7, 1.2].
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(update_nab: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Replace each matrix by the nearest semi-orthogonal one, approximately.

    Args:
        update_nab: Matrices, shape [n, a, b].
        iterations: The number of Newton-Schulz iterations.

    Returns:
        Matrices of the same shape whose singular values are all near 1.
    """
    first, third, fifth = NEWTON_SCHULZ
    tall = update_nab.shape[1] > update_nab.shape[2]
    x = update_nab.mT if tall else update_nab
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (Jordan et al. 2024), with decoupled weight decay.

    Args:
        params: Weight matrices.
        lr: The learning rate, times sqrt(rows / columns) for a tall matrix.
        momentum: The decay of the running mean of the gradients, used with Nesterov's correction.
        weight_decay: The decoupled weight decay, times lr.
    """

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one update.

        Args:
            closure: Ignored: the gradients must be there already.

        Returns:
            None.
        """
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state: dict[str, Any] = self.state[param]
                mean = state.setdefault("mean", torch.zeros_like(param))
                mean.lerp_(param.grad, 1 - group["momentum"])
                by_shape.setdefault(param.shape, []).append((param, param.grad.lerp(mean, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
        return None
