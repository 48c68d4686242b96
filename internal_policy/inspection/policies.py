"""Reduce a layer's internal policies at each token to entropy, most probable tokens, and the true next token's rank.

One pass over blocks of the vocabulary: a running maximum and two sums give the entropy (see ``entropy.streaming``), and
the best tokens of each block are merged with the best so far. No array of shape [tokens, V] exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from internal_policy.entropy.streaming import block_sizes
from internal_policy.extractors import LayerStates
from internal_policy.inspection.config import SITES
from internal_policy.models import Projection
from internal_policy.models.options import Lens

FIRST_SITES = (*SITES, "embedding")
"""Layer 1 adds the policy of H^0."""
LAST_SITES = ("policy",)
"""Layer L adds the final policy."""
N_SCALARS = 3
"""Columns before the ids: entropy, rank and probability of the next token."""


def look_at_layer(
    group: Sequence[LayerStates], projection: Projection, *, next_ids: Tensor, lens: Lens, n_layers: int, top_k: int
) -> Tensor:
    """Reduce one layer; a function of its arguments alone, so that it can run in another process.

    Args:
        group: the states of one layer at n positions.
        projection: E_u and LN_final.
        next_ids: [n] the token that came next at each position; any id at the last one.
        lens: a name, or a lens from ``open_lens``.
        n_layers: L.
        top_k: number of tokens to keep.

    Returns:
        [S, n, 3 + 2 top_k] float32, with S = 3 policies (layer, attn, ffn); layer 1 adds that of H^0, layer L that of
        pi_theta. Columns as ``look`` has them.

    Source: arXiv 2512.19673v3, eqs. 5-7.
    """
    (states,) = group
    device = projection.weight.device
    wanted = [states.residual_out, states.attention_write, states.ffn_write]
    if states.layer == 1:
        wanted.append(states.residual_in)
    layers = [states.layer] * len(SITES) + [0]
    seen = [projection.apply_lens(lens, s, layer).to(device) for s, layer in zip(wanted, layers, strict=False)]
    if states.layer == n_layers:
        seen.append(projection.final_norm(states.residual_out).to(device))
    flat = look(torch.cat(seen), projection, next_ids.to(device).repeat(len(seen)), top_k)
    return flat.view(len(seen), -1, flat.shape[1]).float()


@torch.no_grad()
def look(states: Tensor, projection: Projection, next_ids: Tensor, top_k: int) -> Tensor:
    """Compute entropy, top tokens and the next token's rank for the policies of some states.

    Products and sums run in float32 (float64 where an operand is float64), whatever the operands' dtype.

    Args:
        states: [N, d], ready to be projected by E_u, on its device.
        projection: E_u with bias, scale and soft cap.
        next_ids: [N] the tokens to rank.
        top_k: number of tokens to keep; at most V.

    Returns:
        [N, 3 + 2 top_k]: entropy (nats), rank (from 1) and probability of the next token, the ids of the most probable
        tokens, their probabilities. Ids are exact, because float32 represents integers up to 2^24.
    """
    weight = projection.weight
    dtype = torch.float64 if torch.float64 in (states.dtype, weight.dtype) else torch.float32
    size, _ = block_sizes(weight.shape[1], weight.shape[0], projection.memory_budget, weight.device, dtype.itemsize)
    portions = zip(torch.split(states, size), torch.split(next_ids, size), strict=True)
    return torch.cat([_look(x.to(dtype), projection, ids[:, None], top_k) for x, ids in portions])


def _look(x: Tensor, projection: Projection, next_ids: Tensor, top_k: int) -> Tensor:
    weight, dtype = projection.weight, x.dtype
    vocab, d = weight.shape
    _, width = block_sizes(d, vocab, projection.memory_budget, weight.device, dtype.itemsize)
    of_next = _transform((x * weight[next_ids[:, 0]].to(dtype)).sum(1, keepdim=True), projection, next_ids)
    above = torch.zeros_like(next_ids)
    best, best_ids = x.new_empty(len(x), 0), next_ids.new_empty(len(x), 0)
    m = x.new_full((len(x), 1), -torch.inf)
    s, t = torch.zeros_like(m), torch.zeros_like(m)
    for first in range(0, vocab, width):
        last = min(first + width, vocab)
        z = _transform(x @ weight[first:last].to(dtype).T, projection, slice(first, last))
        own = z.gather(1, (next_ids - first).clamp(0, last - first - 1))
        # The next token's own logit may be rounded differently here, and must not count as above itself.
        counted = (next_ids >= first) & (next_ids < last) & (own > of_next)
        above += (z > of_next).sum(1, keepdim=True) - counted.long()
        here, here_ids = z.topk(min(top_k, last - first), dim=1)
        merged, merged_ids = torch.cat([best, here], 1), torch.cat([best_ids, here_ids + first], 1)
        best, places = merged.topk(min(top_k, merged.shape[1]), dim=1)
        best_ids = merged_ids.gather(1, places)
        m_new = best[:, :1]
        if first > 0:
            delta = m - m_new
            t, s = (t + delta * s) * delta.exp(), s * delta.exp()
        m = m_new
        p = z.sub_(m).exp()
        s, t = s + p.sum(1, keepdim=True), t + z.mul_(p).sum(1, keepdim=True)
    probabilities = (best - m).exp() / s
    entropy, probability, rank = s.log() - t / s, (of_next - m).exp() / s, 1 + above
    # With near ties, too, a token among the best must have one rank and one probability.
    found, place = (best_ids == next_ids).max(1, keepdim=True)
    rank = torch.where(found, place + 1, rank)
    probability = torch.where(found, probabilities.gather(1, place), probability)
    return torch.cat([entropy, rank.to(dtype), probability, best_ids.to(dtype), probabilities], 1)


def _transform(z: Tensor, projection: Projection, ids: slice | Tensor) -> Tensor:
    """Apply the model's bias, scale and soft cap to logits of the given columns, or [n, 1] of each row."""
    if projection.bias is not None:
        z = z + projection.bias[ids].to(z.dtype)
    if projection.scale != 1.0:
        z = z * projection.scale
    return z if projection.softcap is None else projection.softcap * torch.tanh(z / projection.softcap)
