r"""Log-probabilities and entropies that training can differentiate, without [tokens, V] in either direction.

The forward pass is the online log-sum-exp of `streaming`, and keeps the states and two numbers per token. The backward
pass computes each block of logits again, turns it into its gradient and accumulates the two products with it. With
``p`` the policy, ``H`` its entropy, ``y`` the token, ``a = dL / d log p_y`` and ``b = dL / dH``::

    dL / dz_j = a (1[j = y] - p_j) - b p_j (log p_j + H)

The chain rule goes on through temperature, soft cap and scale. That makes four products where a head that keeps its
logits has three. A token whose ``a`` and ``b`` are 0 (no advantage, a clipped ratio, padding) has only the first.

Shape legend: N states, n of them in a block, V vocabulary, v of it in a block, d residual width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from internal_policy.entropy.streaming import DEFAULT_MEMORY_BUDGET, block_sizes, check_shapes, check_targets


@dataclass(frozen=True)
class _LogitTransform:
    """From the product of a state with E_u to the logits of the policy, and from their gradients back."""

    scale: float
    softcap: float | None
    temperature: float

    def to_logits(self, z_nv: Tensor, bias: Tensor | None) -> Tensor:
        """Turn products into the logits of the policy, in place."""
        if bias is not None:
            z_nv += bias
        if self.softcap is None:
            factor = self.scale / self.temperature
            return z_nv if factor == 1.0 else z_nv.mul_(factor)
        return z_nv.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def to_product_gradients(self, grad_nv: Tensor, z_nv: Tensor) -> Tensor:
        """Turn gradients of the policy's logits into those of the products, in place; the logits are lost."""
        factor = self.scale / self.temperature
        if self.softcap is not None:
            # tanh is there already: z is softcap * tanh / temperature.
            slope = z_nv.mul_(self.temperature / self.softcap).square_().neg_().add_(1.0)
            grad_nv *= slope
        return grad_nv if factor == 1.0 else grad_nv.mul_(factor)


def differentiable_log_probs(
    states: Tensor,
    targets: Tensor,
    unembedding: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> tuple[Tensor, Tensor | None]:
    r"""Compute the log-probability that each state's policy gives to one token, and its entropy, differentiably.

    Products and sums run in float32 (float64 if an operand is float64); under autocast the operands are rounded to
    its dtype first, as the model's own head rounds them.

    Args:
        states: [N, d] states.
        targets: [N] token ids, on the same device.
        unembedding: [V, d] unembedding matrix E_u, on the same device.
        bias: [V] bias of the unembedding, if the model has one.
        temperature: divides the logits.
        scale: factor on the logits, if the model has one.
        softcap: c in ``c * tanh(logits / c)``, if the model caps its logits.
        entropy: compute entropies too.
        memory_budget: bytes of working memory of a block, independent of N and V.

    Returns:
        [N] log-probabilities and [N] entropies (None without ``entropy``) in nats, float32 (float64 if an operand is
        float64). Both are differentiable by states, unembedding and bias.

    Raises:
        ValueError: the shapes do not fit, an id is beyond the vocabulary, or the budget is too small for a single row.

    Source: the factors of arXiv 2512.19673v3, eq. 9, and eq. 7.
    """
    check_shapes(states, unembedding, bias)
    check_targets(states, targets, len(unembedding))
    transform = _LogitTransform(scale, softcap, temperature)
    found: tuple[Tensor, Tensor | None] = _LogProbs.apply(  # type: ignore[no-untyped-call]
        states, unembedding, bias, targets, transform, entropy, memory_budget
    )
    return found


@dataclass(frozen=True)
class _Blocks:
    """The policy's logits, block by block."""

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: _LogitTransform
    dtype: torch.dtype
    rounding: torch.dtype | None
    memory_budget: int

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor, Tensor]]:
        """Yield rows (states) and columns (vocabulary), their operands [n, d] and [v, d], logits and a buffer [n, v].

        The vocabulary is the outer loop: a block of E_u, and of its gradient, is touched once.
        """
        vocab, d = self.weight.shape
        n, v = block_sizes(d, vocab, self.memory_budget, self.states.device, self.dtype.itemsize)
        n = max(1, min(n, len(self.states)))
        z_buffer, spare = (torch.empty(n * v, dtype=self.dtype, device=self.states.device) for _ in range(2))
        x_all = self.operand(self.states)
        for first in range(0, vocab, v):
            columns = slice(first, min(first + v, vocab))
            e_vd = self.operand(self.weight[columns])
            bias = None if self.bias is None else self.bias[columns].to(self.dtype)
            for start in range(0, len(x_all), n):
                rows = slice(start, min(start + n, len(x_all)))
                x_nd = x_all[rows]
                shape = (len(x_nd), len(e_vd))
                z_nv, spare_nv = (b[: shape[0] * shape[1]].view(shape) for b in (z_buffer, spare))
                torch.mm(x_nd, e_vd.T, out=z_nv)
                yield rows, columns, x_nd, e_vd, self.transform.to_logits(z_nv, bias), spare_nv

    def operand(self, x: Tensor) -> Tensor:
        """Convert a factor of the products to their dtype, after the rounding of autocast."""
        return (x if self.rounding is None else x.to(self.rounding)).to(self.dtype)


def _local(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is in a block of the vocabulary, and at which column of it; both [n, 1]."""
    index = targets.unsqueeze(1) - columns.start
    width = columns.stop - columns.start
    return (index >= 0) & (index < width), index.clamp(0, width - 1)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: _LogitTransform,
        with_entropy: bool,
        memory_budget: int,
    ) -> tuple[Tensor, Tensor | None]:
        # An entropy that is only logged costs the backward pass nothing.
        ctx.set_materialize_grads(False)
        kind = states.device.type
        dtype = torch.float64 if torch.float64 in (states.dtype, weight.dtype) else torch.float32
        rounding = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.options = {"transform": transform, "dtype": dtype, "rounding": rounding, "memory_budget": memory_budget}
        m = torch.full((len(states), 1), -torch.inf, dtype=dtype, device=states.device)
        s, t, chosen = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
        for rows, columns, _, _, z_nv, spare_nv in _Blocks(states, weight, bias, **ctx.options):
            inside, index = _local(targets[rows], columns)
            # Taken from the same product as the sum, so that rounding never makes a token more than certain.
            chosen[rows] = torch.where(inside, z_nv.gather(1, index), chosen[rows])
            old, new = m[rows], torch.maximum(m[rows], z_nv.amax(dim=1, keepdim=True))
            if columns.start > 0:
                delta = old - new
                shrink = delta.exp()
                t[rows] = (t[rows] + delta * s[rows]) * shrink
                s[rows] *= shrink
            m[rows] = new
            exp_nv = torch.exp(z_nv.sub_(new), out=spare_nv)
            s[rows] += exp_nv.sum(dim=1, keepdim=True)
            if with_entropy:
                t[rows] += z_nv.mul_(exp_nv).sum(dim=1, keepdim=True)
        log_s = s.log()
        entropy = log_s - t / s
        ctx.save_for_backward(states, weight, bias, targets, m + log_s, entropy)
        return (chosen - m - log_s).squeeze(1), entropy.squeeze(1) if with_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, targets, lse, entropy = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dtype = ctx.options["dtype"]

        def zeros(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=dtype, device=like.device)

        moved = [g for g in (grad_log_probs, grad_entropies) if g is not None]
        # NaN is not 0, so that a loss that has diverged is not hidden.
        live = torch.stack([g != 0 for g in moved]).any(dim=0).nonzero().squeeze(1) if moved else targets[:0]
        a, b = (None if g is None else g[live].to(dtype).unsqueeze(1) for g in (grad_log_probs, grad_entropies))
        lse, entropy, targets, moving = lse[live], entropy[live], targets[live], states[live]
        grad_moving = zeros(moving) if wants_states else None
        grad_weight = None
        if wants_weight:
            # Every block of it is written, unless no token has a gradient.
            new = torch.empty if len(live) else torch.zeros
            grad_weight = new(weight.shape, dtype=dtype, device=weight.device)
        grad_bias = zeros(bias) if wants_bias else None
        for rows, columns, x_nd, e_vd, z_nv, spare_nv in _Blocks(moving, weight, bias, **ctx.options):
            log_p = torch.sub(z_nv, lse[rows], out=spare_nv)
            if b is None:
                grad_nv = log_p.exp_()
                if a is not None:
                    grad_nv *= -a[rows]
            else:
                # b (log p + H) + a, times -p.
                slope = (log_p + entropy[rows]).mul_(b[rows])
                if a is not None:
                    slope += a[rows]
                grad_nv = log_p.exp_().mul_(slope).neg_()
            if a is not None:
                inside, index = _local(targets[rows], columns)
                grad_nv.scatter_add_(1, index, torch.where(inside, a[rows], 0.0))
            ctx.options["transform"].to_product_gradients(grad_nv, z_nv)
            if grad_moving is not None:
                grad_moving[rows].addmm_(grad_nv, e_vd)
            if grad_weight is not None:
                # Nothing has been written into the block before its first states.
                grad_weight[columns].addmm_(grad_nv.T, x_nd, beta=float(rows.start > 0))
            if grad_bias is not None:
                grad_bias[columns] += grad_nv.sum(dim=0)
        grad_states = None
        if grad_moving is not None:
            grad_states = zeros(states).index_copy_(0, live, grad_moving).to(states.dtype)
        return (
            grad_states,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )
