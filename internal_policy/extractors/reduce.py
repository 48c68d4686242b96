"""Reduce states to one number per token, layer and site, where they are captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from internal_policy.data.responses import Response, pad
from internal_policy.entropy.streaming import rounds_to_tf32
from internal_policy.extractors.base import Batch, Extractor, LayerStates
from internal_policy.models import LanguageModel, Projection, context
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError

QUANTITIES = (
    *("layer_in", "layer_out", "layer_rescaled", "layer_rms_in", "layer_rms_out"),
    *("attn_in", "attn_out", "attn_rescaled", "attn_rms_in", "attn_rms_out", "attn_cosine"),
    *("ffn_in", "ffn_out", "ffn_rescaled", "ffn_rms_in", "ffn_rms_out", "ffn_cosine"),
)
"""The numbers of a layer. For each site: the entropies in nats under the lens of its input, its output, and its output
at the length of its input; the root mean squares of input and output; and the cosine of a write with its residual
state. The input of the site `layer` is H^{l-1}, its output H^l."""

_MODULES = ("attention_in", "attention_write", "ffn_in", "ffn_write")
_SOURCES = {"residual_out": "residual_in", "attention_write": "attention_in", "ffn_write": "ffn_in"}
"""The output of each site, in the order of ``QUANTITIES``, and its input."""
_POSITIONS = 2048
"""Positions that are reduced at a time, however many tokens a batch has."""
_STATES_BUDGET = 128 * 2**20
"""Bytes of states that a group of layers may hold."""
_LEAST_LAYERS = 4
"""Layers that are reduced together even beyond the budget, if that saves products."""


@dataclass(frozen=True)
class TokenValues:
    """The numbers of n analysed tokens."""

    layers: NDArray[np.float32]
    """[n, L, len(QUANTITIES)]."""
    policy: NDArray[np.float32]
    """[n, 2]: entropy of H^L without the final norm, and of pi_theta = softmax(LN_final(H^L) E_u^T)."""


class Reducer:
    """Runs a backend and arranges the reduced numbers."""

    def __init__(self, extractor: Extractor, lens: Lens) -> None:
        self._extractor = extractor
        self._lens = lens

    @property
    def model(self) -> LanguageModel:
        """The model that runs."""
        return self._extractor.model

    def __call__(self, batch: Batch) -> TokenValues:
        """Run one batch.

        Args:
            batch: the sequences and the n positions to analyse.

        Returns:
            The numbers of the n tokens, in the order of ``batch.positions``.

        Raises:
            UserError: NaN or inf in a state.

        Source: arXiv 2512.19673v3, eqs. 5-7 and 11-13; appendix B.5 for the cosines.
        """
        model = self.model
        summed = logits_are_additive(model, self._lens)
        reduce = partial(
            reduce_layers,
            lens=self._lens,
            summed=summed,
            rescaling=rescaling_of(model, self._lens),
            n_layers=model.n_layers,
            parallel=model.parallel,
        )
        at_once = layers_at_once(model, len(batch.positions), summed)
        columns = np.concatenate([part.cpu().numpy() for part in self._extractor.run(batch, reduce, at_once)], axis=1)
        layers = rearrange(columns[:, 1:-2], "n (layer quantity) -> n layer quantity", layer=model.n_layers)
        # H(H^{l-1}) is H(H^l) of the layer below: each distinct state is projected once.
        before = np.concatenate([columns[:, None, :1], layers[:, :-1, :1]], axis=1)
        values = TokenValues(np.concatenate([before, layers], axis=2), columns[:, -2:])
        self._refuse_non_finite(values)
        return values

    def _refuse_non_finite(self, values: TokenValues) -> None:
        finite = np.isfinite(values.layers).all(axis=0)
        if not finite.all():
            layer, quantity = np.unravel_index(int(np.argmin(finite)), finite.shape)
            where = f"in the states of layer {layer + 1} ({QUANTITIES[quantity]})"
        elif not np.isfinite(values.policy).all():
            where = "in the final policy's logits"
        else:
            return
        raise UserError(
            f"{self.model.name}: NaN or inf {where}; they overflow in this dtype or the weights are broken: "
            "try --dtype float32 or bfloat16"
        )


class PolicyReducer(Reducer):
    """Reduces each token to the entropy of the final policy: one projection, where a `Reducer` has several a layer."""

    def __init__(self, extractor: Extractor) -> None:
        super().__init__(extractor, "policy")

    def __call__(self, batch: Batch) -> TokenValues:
        """Run one batch.

        Args:
            batch: the sequences and the n positions to analyse.

        Returns:
            ``policy`` [n, 1], the entropy of pi_theta in nats, and ``layers`` without a layer, [n, 0, Q].

        Raises:
            UserError: NaN or inf in the logits.

        Source: arXiv 2512.19673v3, eq. 1.
        """
        reduce = partial(reduce_policy, n_layers=self.model.n_layers)
        *_, found = self._extractor.run(batch, reduce)
        values = TokenValues(np.zeros((len(found), 0, len(QUANTITIES)), np.float32), found.cpu().numpy())
        self._refuse_non_finite(values)
        return values


def logits_are_additive(model: LanguageModel, lens: Lens) -> bool:
    """Whether the logits of H^l are the sum of those of its terms (eq. 4), up to float32 rounding.

    They are not for a stream of 16 bits, which is rounded after each addition, for products in TF32, which are rounded
    before it, and for a lens with a norm, which is not linear, or of the user's own, which need not be.
    """
    rounded = model.projection.weight.is_cuda and rounds_to_tf32()
    return lens == "policy" and model.dtype.itemsize >= torch.float32.itemsize and not rounded


Rescaling = Literal["factor", "fitted", "none", "projected"]
"""How the entropy of a rescaled state is found, see ``rescaling_of``."""


def rescaling_of(model: LanguageModel, lens: Lens) -> Rescaling:
    """Choose how a lens carries a factor on a state to the state that E_u projects.

    Returns:
        ``factor``: unchanged, since the lens is linear; ``none``: the lens undoes it; ``fitted``: as another factor, as
        does a norm without a bias, whose epsilon is all that it does not undo; ``projected``: not as a factor, so that
        the state is rescaled before the lens and projected too. That holds for every lens of the user's own.
    """
    if lens == "policy":
        return "factor"
    if lens == "unit-norm":
        return "none"
    return "fitted" if lens == "logit-lens" and model.projection.norm_is_unbiased else "projected"


def layers_at_once(model: LanguageModel, n_positions: int, summed: bool) -> int:
    """Choose how many layers to reduce together: more layers mean fewer and larger products.

    As many as fit their states in a fixed budget, and more where additive logits save a fifth product per layer.
    """
    bytes_per_layer = 5 * n_positions * int(model.projection.weight.shape[1]) * model.dtype.itemsize
    least = _LEAST_LAYERS if summed else 1
    return min(model.n_layers, max(least, _STATES_BUDGET // max(1, bytes_per_layer)))


def reduce_layers(
    group: Sequence[LayerStates],
    projection: Projection,
    *,
    lens: Lens,
    summed: bool,
    rescaling: Rescaling,
    n_layers: int,
    parallel: bool,
) -> Tensor:
    """Reduce consecutive layers; a function of its arguments only, so that it can run on another machine.

    ``group`` holds the states of k layers at n positions. With ``summed``, the logits of H^l are computed as a sum and
    not by a projection; ``parallel`` says whether both writes are added to H^{l-1}.

    Returns:
        [n, 16 k] float32: ``QUANTITIES`` without the first, layer by layer. A column with the first, H(H^0), precedes
        layer 1; two columns with the entropies of H^L without the final norm and of pi_theta follow layer L.
    """
    portions = zip(*(states.split(_POSITIONS) for states in group), strict=True)
    return torch.cat([_reduce(part, projection, lens, summed, rescaling, n_layers, parallel) for part in portions])


def _reduce(
    group: Sequence[LayerStates],
    projection: Projection,
    lens: Lens,
    summed: bool,
    rescaling: Rescaling,
    n_layers: int,
    parallel: bool,
) -> Tensor:
    first, last = group[0], group[-1]
    device = projection.weight.device
    states: dict[tuple[int, str], Tensor] = {}
    sums: dict[tuple[int, str], list[int]] = {}
    if summed or first.layer == 1:
        states[first.layer, "residual_in"] = first.residual_in
    for s in group:
        states |= {(s.layer, name): getattr(s, name) for name in _MODULES}
        if summed:
            start = [] if sums else [0]
            sums[s.layer, "residual_out"] = [*start, len(states) - 3, len(states) - 1]
        else:
            states[s.layer, "residual_out"] = s.residual_out
    projected = {
        # H^{l-1} is a state of the layer below.
        (layer, name): projection.apply_lens(lens, state, layer - (name == "residual_in"))
        for (layer, name), state in states.items()
    }
    if last.layer == n_layers:
        # What the lens does not give of these two: H^L without the final norm and with it.
        if lens != "policy":
            projected[n_layers, "final_state"] = last.residual_out
        if lens != "logit-lens":
            projected[n_layers, "policy"] = projection.apply_final_norm(last.residual_out)
    factors: dict[tuple[int, str], Tensor] = {}
    lengths: dict[tuple[int, str], dict[str, Tensor]] = {}
    for s in group:
        for name, source in _SOURCES.items():
            state = getattr(s, name)
            length_in, length_out = (x.float().norm(dim=-1) for x in (getattr(s, source), state))
            lengths[s.layer, name] = {"in": length_in, "out": length_out}
            # A write of nothing has logits of 0 at every length.
            factor = torch.where(length_out > 0, length_in.to(length_out.device) / length_out, 1.0)
            if rescaling == "factor":
                factors[s.layer, name] = factor.to(device)
            elif rescaling != "none":
                rescaled = projection.apply_lens(lens, (state * factor[:, None]).to(state.dtype), s.layer)
                if rescaling == "projected":
                    projected[s.layer, name + "_rescaled"] = rescaled
                else:
                    own = projected[s.layer, name].float()
                    square = (own * own).sum(dim=-1)
                    factors[s.layer, name] = torch.where(square > 0, (own * rescaled).sum(dim=-1) / square, 1.0)
    rows = [*projected, *sums]
    further = sorted((rows.index(key), key) for key in factors)
    found = dict(
        zip(
            [*rows, *((layer, name + "_rescaled") for _, (layer, name) in further)],
            projection.entropies(
                list(projected.values()), list(sums.values()), [(row, factors[key]) for row, key in further]
            ),
            strict=True,
        )
    )
    columns = [found[1, "residual_in"]] if first.layer == 1 else []
    root = last.residual_out.shape[-1] ** 0.5
    for s in group:
        before = s.residual_in.float()
        attn_write, ffn_write = s.attention_write.float(), s.ffn_write.float()
        cosines = {
            "attention_write": cosine_similarity(attn_write, before, dim=-1),
            "ffn_write": cosine_similarity(ffn_write, before if parallel else before + attn_write, dim=-1),
        }
        for name, source in _SOURCES.items():
            out = found[s.layer, name]
            if source != "residual_in":
                columns.append(found[s.layer, source])
            columns += [out, found.get((s.layer, name + "_rescaled"), out)]
            columns += [length / root for length in lengths[s.layer, name].values()]
            if name in cosines:
                columns.append(cosines[name])
    if last.layer == n_layers:
        own = found[n_layers, "residual_out"]
        columns += [found.get((n_layers, "final_state"), own), found.get((n_layers, "policy"), own)]
    return torch.stack([c.to(columns[0].device) for c in columns], dim=-1)


def reduce_policy(group: Sequence[LayerStates], projection: Projection, *, n_layers: int) -> Tensor:
    """Reduce consecutive layers to the entropy of pi_theta, [n, 1] float32; [n, 0] without layer L among them."""
    last = group[-1]
    if last.layer < n_layers:
        return last.residual_out.new_empty((len(last.residual_out), 0), dtype=torch.float32)
    parts = torch.split(last.residual_out, _POSITIONS)
    return torch.cat([projection.entropy(projection.apply_final_norm(part))[:, None] for part in parts])


def reduce_responses(
    reducer: Reducer,
    responses: Sequence[Response],
    side: Literal["left", "right"] = "right",
    tokens: Sequence[NDArray[np.int64]] | None = None,
) -> list[TokenValues]:
    """Analyse a batch of responses in one forward pass, or in two if a long response would affect a short one.

    Args:
        reducer: capture and reduction.
        responses: the batch.
        side: the side of the padding, which does not affect the numbers.
        tokens: indices of the tokens of each response, from 0; all of them by default.

    Returns:
        The numbers of each response's tokens, [n_i, ...], in order.
    """
    chosen = [np.arange(r.n_tokens) for r in responses] if tokens is None else tokens
    values: dict[int, TokenValues] = {}
    for group in context.group_by_length([len(r.input_ids) for r in responses], reducer.model.length_switch):
        found = _reduce_together(reducer, [responses[i] for i in group], side, [chosen[i] for i in group])
        values |= zip(group, found, strict=True)
    return [values[i] for i in range(len(responses))]


def _reduce_together(
    reducer: Reducer,
    responses: Sequence[Response],
    side: Literal["left", "right"],
    tokens: Sequence[NDArray[np.int64]],
) -> list[TokenValues]:
    values = reducer(make_batch(responses, side, tokens))
    ends = np.cumsum([len(chosen) for chosen in tokens])[:-1]
    parts = zip(np.split(values.layers, ends), np.split(values.policy, ends), strict=True)
    return [TokenValues(layers, policy) for layers, policy in parts]


def make_batch(
    responses: Sequence[Response], side: Literal["left", "right"], tokens: Sequence[NDArray[np.int64]]
) -> Batch:
    """Pad responses to one length, and find the positions of their chosen tokens.

    Args:
        responses: the sequences.
        side: the side of the padding.
        tokens: indices of the chosen tokens of each response, from 0.

    Returns:
        The batch, whose positions follow the responses in order: those of the states that predict the tokens.
    """
    ids, mask = pad([r.input_ids for r in responses], side)
    width = ids.shape[1]
    positions = []
    for row, (response, chosen) in enumerate(zip(responses, tokens, strict=True)):
        start = row * width + (width - len(response.input_ids) if side == "left" else 0)
        positions.append(start + response.prompt_length - 1 + chosen)
    return Batch(ids, mask, torch.from_numpy(np.concatenate(positions)))
