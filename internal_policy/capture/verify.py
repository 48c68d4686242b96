"""Proof, on every load, that what is captured is what the definitions speak of.

Eq. 4 must hold for every layer (H^l = H^{l-1} + A^l + F^l), layers must follow on one another, and the projection must
give the model's own logits. A model that fails is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from internal_policy.capture.states import Batch, Extractor, LayerStates
from internal_policy.errors import UserError
from internal_policy.models import LanguageModel

_SEQUENCES, _LENGTH = 2, 12


def tolerance(dtype: torch.dtype) -> float:
    """Relative error that rounding explains: a few roundings of the model's dtype, summed over two additions.

    Args:
        dtype: the model's dtype.

    Returns:
        Bound on ||error|| / ||state||.
    """
    return 16 * torch.finfo(dtype).eps


def verify(extractor: Extractor, seed: int = 0) -> None:
    """Check eq. 4 and the unembedding numerically on random tokens.

    Args:
        extractor: the backend with its model.
        seed: seed of the random tokens.

    Raises:
        UserError: what does not hold, and at which layer.

    Source: arXiv 2512.19673v3, eqs. 1 and 4.
    """
    model = extractor.model
    ids = torch.randint(0, model.vocab_size, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(seed))
    batch = Batch(ids, torch.ones_like(ids), torch.arange(ids.numel()))
    bound = tolerance(model.dtype)
    outputs: list[Tensor] = []

    def check(states: LayerStates) -> None:
        _check_layer(model, states, outputs[-1] if outputs else None, bound)
        outputs.append(states.residual_out)

    extractor.run(batch, check)
    if len(outputs) != model.n_layers:
        raise UserError(
            f"{model.name}: {len(outputs)} of {model.n_layers} layers ran; the family's row does not fit it"
        )
    _check_unembedding(model, batch, outputs[-1], bound)


def _check_layer(model: LanguageModel, states: LayerStates, previous: Tensor | None, bound: float) -> None:
    for name in ("residual_in", "attention_write", "ffn_write", "residual_out"):
        if not bool(torch.isfinite(getattr(states, name)).all()):
            raise UserError(
                f"{model.name}: NaN or inf in layer {states.layer} ({name}); "
                "the weights are broken or overflow in this dtype: try --dtype float32"
            )
    middle = states.residual_in.double() + states.attention_write.double()
    written, out = middle + states.ffn_write.double(), states.residual_out.double()
    # Rounding is as large as the largest term: layers that cancel a massive activation leave it behind.
    scale = torch.stack([x.norm(dim=-1) for x in (states.residual_in.double(), middle, out)]).amax(dim=0)
    error = float(((written - out).norm(dim=-1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)).max())
    if error > bound:
        raise UserError(
            f"{model.name}: eq. 4 fails in layer {states.layer}: H^l differs from H^(l-1) + A^l + F^l by {error:.1e} "
            f"(at most {bound:.1e}); the row {model.family.name!r} in models/families.py does not fit this model"
        )
    if previous is not None and not torch.equal(previous, states.residual_in):
        raise UserError(
            f"{model.name}: layer {states.layer} does not start from the output of layer {states.layer - 1}; "
            "the model changes the residual stream between layers, which no family here does"
        )


@torch.no_grad()
def _check_unembedding(model: LanguageModel, batch: Batch, final_states: Tensor, bound: float) -> None:
    projection = model.projection
    own = model.model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits.flatten(0, 1)
    ours = projection.logits(projection.final_norm(final_states))
    if not bool(torch.isfinite(own).all()):
        raise UserError(
            f"{model.name}: NaN or inf in the logits; the unembedding is broken or overflows: try --dtype float32"
        )
    error = _relative(ours.double().to(own.device), own.double())
    if error > bound:
        raise UserError(
            f"{model.name}: the unembedding does not give the model's own logits (relative difference {error:.1e}, "
            f"at most {bound:.1e}); the row {model.family.name!r} in models/families.py does not fit this model"
        )


def _relative(ours: Tensor, own: Tensor) -> float:
    norm = own.norm(dim=-1).clamp(min=torch.finfo(own.dtype).tiny)
    return float(((ours - own).norm(dim=-1) / norm).max())
