"""Parts of a write: what one head or one expert adds to the residual stream, reduced to numbers where it is computed.

The parts of a write add up to it. A norm after the module divides all of them by the scale of the whole
(``models.linear``), so that they still do.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from internal_policy.entropy.streaming import rounds_to_tf32
from internal_policy.models import LanguageModel
from internal_policy.models.linear import LinearNorm, linearise
from internal_policy.models.options import Lens

PART_QUANTITIES = ("entropy", "rms", "cosine", "attribution")
"""The numbers of a part: entropy of its policy under the lens (nats), root mean square of its elements, cosine with the
stream that it is added to, and direct attribution to the logit of the token that follows."""

_SUM_BOUND, _SUM_BOUND_16 = 16.0, 2.0
"""Bounds on the error of a sum of parts, in units of rounding; observed are at most 3.7, and 0.9 in 16 bits, where only
the write is rounded and sums in float32 are exact beside it. Otherwise the model's own sums over hundreds of channels
are rounded as ours are."""
_BUDGET = 64 * 2**20
"""Bytes of parts that exist at a time."""


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over states of a dtype: float32, or float64 for states of float64."""
    return torch.promote_types(dtype, torch.float32)


def portion(n_parts: int, d: int) -> int:
    """How many positions have their parts [n_parts, d] computed at a time."""
    return max(1, _BUDGET // (4 * n_parts * d))


def sum_bound(dtype: torch.dtype) -> float:
    """Bound on ``rounding_error`` for writes of a dtype."""
    return _SUM_BOUND if dtype.itemsize >= torch.float32.itemsize else _SUM_BOUND_16


def norms_after(model: LanguageModel, path: str | None) -> tuple[LinearNorm | None, ...]:
    """For each layer the norm at a path from it, as it acts on parts; None if the family has none (path None)."""
    if path is None:
        return (None,) * model.n_layers
    d, found = int(model.projection.weight.shape[1]), []
    for layer, module in enumerate(model.layers, start=1):
        norm: nn.Module = operator.attrgetter(path)(module)
        device = next((p.device for p in norm.parameters() if not p.is_meta), model.device)
        found.append(linearise(norm, d, model.dtype, device, f"{model.name}: {path} of layer {layer}"))
    return tuple(found)


def shared_by_norm(parts: Tensor, write: Tensor, norm: LinearNorm | None, multiplier: float) -> Tensor:
    """What the parts of a module's output add to the stream.

    Args:
        parts: [n, k, d] parts of the module's output.
        write: [n, d] what the model itself adds to the stream, which gives the scale of the norm.
        norm: the norm after the module, if there is one.
        multiplier: the family's factor on the write.

    Returns:
        [n, k, d], which add up to ``write``.
    """
    if norm is not None:
        scale = norm.scale(parts.sum(dim=1), write.to(parts.dtype) / multiplier)
        parts = norm.numerator(parts) / scale[:, None, None]
    return parts if multiplier == 1.0 else parts * multiplier


def rounding_error(parts: Tensor, write: Tensor, normed: bool = False) -> Tensor:
    """How far parts are from adding up to a write, in units of rounding.

    Args:
        parts: [n, k, d].
        write: [n, d], in the model's dtype.
        normed: whether the write is the output of a norm, which computes in float32 also for states of float64.

    Returns:
        [n] the largest error of an element, over the rounding of the sum of the parts' absolute values there and of
        their root mean square over the elements, since the terms of a part may be larger than the part.
    """
    terms = parts.abs().sum(dim=1)
    size = terms + terms.square().mean(dim=-1, keepdim=True).sqrt()
    dtypes = [write.dtype, *([torch.float32] if normed else [])]
    if write.is_cuda and rounds_to_tf32():
        # TF32 rounds the factors of products to as many bits as float16 has.
        dtypes.append(torch.float16)
    unit = max(torch.finfo(dtype).eps for dtype in dtypes) * size.clamp(min=torch.finfo(parts.dtype).tiny)
    return ((parts.sum(dim=1) - write.to(parts.dtype)).abs() / unit).amax(dim=-1)


@dataclass(frozen=True)
class Attribution:
    """Direct logit attribution: what a part of the stream adds to the logit of the token that follows.

    The final norm is taken at the scale s of the actual H^L of the position, as TransformerLens does
    (``ActivationCache.apply_ln_to_stack``)::

        attribution = logit_scale * E_u[token] . g (w - mean w) / s

    where norms without a mean subtract none. The attributions of H^0 and of all writes, that of the norm's bias and
    that of the unembedding add up to the token's logit before a soft cap.
    """

    norm: LinearNorm
    """LN_final."""
    directions: Tensor
    """[n, d]: what a write at each position is multiplied by, but for the scale."""

    @classmethod
    def of(cls, model: LanguageModel, norm: LinearNorm, tokens: Tensor) -> Attribution:
        """Prepare the attribution to tokens [n], ids of what follows each position."""
        weight = model.projection.weight
        rows = weight[tokens.to(weight.device)].to(norm.gain.dtype)
        return cls(norm, norm.transpose(rows * model.projection.scale))

    def scales(self, model: LanguageModel, final_states: Tensor) -> Tensor:
        """The scale s of LN_final at H^L [n, d]; [n]."""
        parts = torch.split(final_states, portion(3, final_states.shape[-1]))
        return torch.cat([self.norm.scale(part, model.projection.final_norm(part)).cpu() for part in parts])


def final_norm_of(model: LanguageModel) -> LinearNorm:
    """LN_final as it acts on a part of H^L.

    Raises:
        UserError: it is not a norm that divides a state by one number.
    """
    d, norm = int(model.projection.weight.shape[1]), model.projection.final_norm
    return linearise(norm, d, model.dtype, _device_of(model), f"{model.name}: the final norm")


def _device_of(model: LanguageModel) -> torch.device:
    found = [p.device for p in model.layers[-1].parameters() if not p.is_meta]
    return found[0] if found else model.device


def reduce_parts(
    parts: Tensor, base: Tensor, directions: Tensor, model: LanguageModel, lens: Lens, layer: int, dtype: torch.dtype
) -> Tensor:
    """Reduce parts of a write to numbers.

    Args:
        parts: [n, k, d] writes of k parts at n positions, in float32 or more.
        base: [n, d] the stream that they are added to.
        directions: [n, d] of ``Attribution``.
        model: whose projection is used.
        lens: how the parts are projected.
        layer: l, whose writes they are parts of.
        dtype: of the model's states; a part is rounded to it once before it is projected, as a write is.

    Returns:
        [n, k, len(PART_QUANTITIES)]; the attribution is not yet divided by the final norm's scale.
    """
    k = parts.shape[1]
    rows = rearrange(parts, "n k d -> (n k) d").to(dtype)
    projection = model.projection
    entropy = projection.entropies([projection.apply_lens(lens, rows, layer)])[0]
    cosine = cosine_similarity(parts, base.to(parts.dtype)[:, None], dim=-1)
    attribution = einsum(parts, directions.to(parts.device, parts.dtype), "n k d, n d -> n k")
    values = (
        rearrange(entropy, "(n k) -> n k", k=k).to(parts.device),
        parts.square().mean(dim=-1).sqrt(),
        cosine,
        attribution,
    )
    return torch.stack([value.to(parts.dtype) for value in values], dim=-1)
