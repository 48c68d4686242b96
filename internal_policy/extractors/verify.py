"""Proof, on every load, that the captured states are those of the definitions.

Eq. 4 must hold for every layer (H^l = H^{l-1} + A^l + F^l), each layer must start from the output of the layer below,
and the projection must give the model's own logits. A model that fails is refused.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.extractors.base import Batch, Extractor, LayerStates
from internal_policy.extractors.hooks import HookExtractor, first_tensor, residual_hooks
from internal_policy.models import LanguageModel, Projection, unknown_family, wrap
from internal_policy.models.devices import in_float64
from internal_policy.models.families import guess_families
from internal_policy.utils.errors import UserError, as_user_error, first_line, is_out_of_memory

logger = logging.getLogger(__name__)

_SEQUENCES, _LENGTH = 2, 12
_CHECKED = ("residual_in", "attention_write", "ffn_write", "residual_out")
_SKETCHES = 2
_MISFIT = "the values in its config.json do not fit together, or it needs other versions of torch or transformers"
_EQ_4 = 2.0
"""Bound on the error of eq. 4, in units of its rounding. The check itself rounds as often, which matters in float64."""


class NotProved(UserError):
    """A row of the table of families does not fit the model."""

    def __init__(self, model: LanguageModel, why: str) -> None:
        row = f"the row {model.family.name!r} in models/families.py does not fit this model"
        super().__init__(f"{model.name}: {why}; {row}")
        self.why = why


def tolerance(dtype: torch.dtype) -> float:
    """Bound ||error|| / ||logits|| by rounding: of the final norm, of a product and of a transform."""
    return 16 * torch.finfo(dtype).eps


def prove(
    model: LanguageModel, extractor_of: Callable[[LanguageModel], Extractor] = HookExtractor, seed: int = 0
) -> Extractor:
    """Prove that a model's parts are known, and find the parts of one that is not in the table of families.

    Args:
        model: the model; for a family without a row, with the likeliest guess of its parts.
        extractor_of: creates the backend through which the proof runs.
        seed: seed of the random tokens.

    Returns:
        The backend, with the model whose row was proved.

    Raises:
        UserError: what does not hold, and at which layer.
    """
    if not model.family.guessed:
        with as_user_error(model.name, "it on random tokens", doing="run", advice=_MISFIT):
            extractor = extractor_of(model)
            verify(extractor, seed)
        return extractor
    why = "has no parts of a decoder under names that are known"
    found: list[tuple[float, LanguageModel]] = []
    for family in guess_families(model.model):
        tried = wrap(model.model, model.tokenizer, model.name, model.revision, family)
        try:
            found.append((verify(HookExtractor(tried), seed), tried))
        except NotProved as error:
            why = f"no structure that was tried fits ({error.why})"
        except UserError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            why = f"no structure that was tried fits ({type(error).__name__}: {first_line(error)})"
    if found:
        # A wrong write within the rounding of the stream passes too; the right one has the smallest error.
        tried = min(found, key=lambda pair: pair[0])[1]
        family = tried.family
        tried = replace(tried, family=replace(family, parallel=not _ffn_sees_attention(tried)))
        logger.warning(
            "%s: family %r is not in the table; its parts were found by structure (%s; %s, %s) and eq. 4 holds for "
            "them. What its modules receive was not proved: compare with its modelling code before publishing dH",
            *(model.name, family.name, family.layers, family.capture_paths().attention_write),
            family.capture_paths().ffn_write,
        )
        extractor = extractor_of(tried)
        if not isinstance(extractor, HookExtractor):
            verify(extractor, seed)
        return extractor
    raise unknown_family(model.name, model.family.name, why)


def verify(extractor: Extractor, seed: int = 0) -> float:
    """Check eq. 4 and the unembedding numerically on random tokens.

    Args:
        extractor: the backend with its model.
        seed: seed of the random tokens.

    Returns:
        The error of eq. 4 in units of its rounding: root mean square over the elements of a state, mean over layers
        and tokens.

    Raises:
        UserError: what does not hold, and at which layer.

    Source: arXiv 2512.19673v3, eqs. 1 and 4.
    """
    model = extractor.model
    ids = torch.randint(0, model.vocab_size, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(seed))
    batch = Batch(ids, torch.ones_like(ids), torch.arange(ids.numel()))
    layers = [values.cpu() for values in extractor.run(batch, partial(_layer_errors, seed=seed))]
    if len(layers) != model.n_layers:
        raise NotProved(model, f"{len(layers)} of {model.n_layers} layers ran")
    below: Tensor | None = None
    errors: list[float] = []
    for layer, values in enumerate(layers, start=1):
        finite, left, sketch_in, sketch_out = torch.split(values, [len(_CHECKED), 2, _SKETCHES, _SKETCHES], dim=1)
        if not bool(finite.all()):
            raise UserError(
                f"{model.name}: NaN or inf in layer {layer} ({_CHECKED[int(finite.amin(dim=0).argmin())]}); "
                "the weights are broken or overflow in this dtype: try --dtype float32"
            )
        largest, mean_square = left.unbind(dim=1)
        if float(largest.max()) > _EQ_4:
            raise NotProved(
                model,
                f"eq. 4 fails in layer {layer}: H^l differs from H^(l-1) + A^l + F^l by {float(largest.max()):.3g} "
                f"times what rounding explains (at most {_EQ_4:g})",
            )
        # The same states, perhaps on another device, where a float64 product may round differently.
        if below is not None and not torch.allclose(below, sketch_in, rtol=1e-9, atol=0.0):
            raise NotProved(
                model,
                f"layer {layer} does not start from the output of layer {layer - 1}: the model changes the residual "
                "stream between layers, which no family here does",
            )
        below = sketch_out
        errors.append(float(mean_square.sqrt().mean()))
    error, finite = extractor.logits(batch, _logit_errors).cpu().unbind(dim=1)
    if not bool(finite.all()):
        raise UserError(
            f"{model.name}: NaN or inf in the logits; the unembedding is broken or overflows: try --dtype float32"
        )
    bound = tolerance(model.dtype)
    if float(error.max()) > bound:
        raise NotProved(
            model,
            f"the unembedding does not give the model's own logits (relative difference {float(error.max()):.1e}, at "
            f"most {bound:.1e})",
        )
    return sum(errors) / len(errors)


@torch.no_grad()
def _ffn_sees_attention(model: LanguageModel) -> bool:
    """Whether the input of the FFN of layer 1 changes when its attention writes nothing."""
    ids = torch.arange(min(_LENGTH, model.vocab_size))[None]
    arguments = model.forward_arguments(ids, torch.ones_like(ids))
    seen: list[Tensor] = []

    def write_nothing(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nothing = torch.zeros_like(first_tensor(output))
        return nothing if isinstance(output, Tensor) else (nothing, *output[1:])

    def see(states: LayerStates) -> None:
        if states.layer == 1:
            seen.append(states.ffn_in)

    path = model.family.capture_paths().attention_write
    module: nn.Module = operator.attrgetter(path)(model.layers[0])
    for silent in (False, True):
        with residual_hooks(model, torch.arange(ids.numel()), see), ExitStack() as stack:
            if silent:
                stack.callback(module.register_forward_hook(write_nothing).remove)
            model.backbone(**arguments)
    return not torch.equal(*seen)


def _layer_errors(group: Sequence[LayerStates], projection: Projection, *, seed: int) -> Tensor:
    """Reduce a layer for the proof to [n, 4 + 2 + 2 + 2] float64: finite states, eq. 4, sketches of input and output.

    For eq. 4: the largest error of an element in units of its rounding, and the mean square of these errors. A write is
    proved element by element, since a norm would hide one that is small compared with the stream: where the stream is
    near zero, its rounding is too, and a wrong write shows.

    A sketch is the product with a random matrix: states with equal sketches are equal, and no state has to leave the
    place where it was computed.
    """
    (states,) = group
    checked = [getattr(states, name) for name in _CHECKED]
    finite = [in_float64(torch.isfinite(state).all(dim=-1)) for state in checked]
    before, attention, ffn, out = (in_float64(state) for state in checked)
    # Two additions in any order round to half a unit each. So do the writes, which a fused kernel may add unrounded.
    coarsest = max((torch.finfo(state.dtype) for state in checked), key=lambda info: info.eps)
    first = torch.stack([before + attention, attention + ffn, before + ffn]).abs().amax(dim=0)
    rounding = (first + out.abs() + attention.abs() + ffn.abs()) * coarsest.eps / 2
    left = (before + attention + ffn - out).abs() / rounding.clamp(min=coarsest.tiny * coarsest.eps)
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(before.shape[-1], _SKETCHES, generator=generator, dtype=torch.float64).to(before.device)
    eq_4 = [left.amax(dim=-1), left.square().mean(dim=-1)]
    return torch.cat([torch.stack([*finite, *eq_4], dim=-1), before @ matrix, out @ matrix], dim=-1)


def _logit_errors(own: Tensor, final_states: Tensor, projection: Projection) -> Tensor:
    """Relative error of the projection of H^L against the model's own logits, and whether these are finite."""
    theirs = in_float64(own)
    ours = in_float64(projection.logits(projection.final_norm(final_states))).to(theirs.device)
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.stack([error, torch.isfinite(theirs).all(dim=-1).to(error.dtype)], dim=-1)
