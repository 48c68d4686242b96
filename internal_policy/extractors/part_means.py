"""Means over the tokens of a response of what heads and experts write, reduced layer by layer in the forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internal_policy.data.responses import Response
from internal_policy.extractors.base import Batch, LayerStates
from internal_policy.extractors.experts import Experts, Routing, expert_hooks
from internal_policy.extractors.heads import Heads, head_hooks
from internal_policy.extractors.hooks import residual_hooks
from internal_policy.extractors.parts import PART_QUANTITIES, Attribution, final_norm_of, precise, reduce_parts
from internal_policy.extractors.reduce import make_batch
from internal_policy.models import LanguageModel, context, without_autocast
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError

EXPERT_QUANTITIES = ("load", "weight", *PART_QUANTITIES)
"""The numbers of an expert: the share of the tokens that are routed to it, and over these the router's mean weight and
the means of ``PART_QUANTITIES``."""
Values: TypeAlias = NDArray[np.float64]
_ATTRIBUTION = PART_QUANTITIES.index("attribution")


@dataclass(frozen=True)
class PartMeans:
    """The numbers of one response; means over its tokens."""

    heads: NDArray[np.float64]
    """[L, len(Heads.numbers), len(PART_QUANTITIES)]."""
    experts: NDArray[np.float64] | None
    """[len(Experts.layers), len(Experts.numbers), len(EXPERT_QUANTITIES)]; None without routed experts. NaN where no
    token is routed to an expert, and for the weight of the shared experts, which have none."""


class PartReducer:
    """Runs a model on responses and reduces the writes of its heads and experts while it runs.

    What exists at a time are the states of one layer, the parts of a portion of its positions, and one number for each
    position, layer and part: its attribution, which is divided at the end by the final norm's scale.
    """

    def __init__(self, heads: Heads, experts: Experts | None, lens: Lens) -> None:
        self._heads, self._experts, self._lens = heads, experts, lens
        self._final_norm = final_norm_of(heads.model)

    @property
    def model(self) -> LanguageModel:
        """The model that runs."""
        return self._heads.model

    def __call__(self, responses: Sequence[Response]) -> list[PartMeans]:
        """Run a batch of responses.

        Args:
            responses: the batch.

        Returns:
            The means of each response, in order.

        Raises:
            UserError: NaN or inf in a write.
        """
        found: dict[int, PartMeans] = {}
        lengths = [len(r.input_ids) for r in responses]
        for group in context.group_by_length(lengths, self.model.length_switch):
            tokens = [np.arange(responses[i].n_tokens) for i in group]
            batch = make_batch([responses[i] for i in group], "right", tokens)
            ends = np.cumsum([len(own) for own in tokens])[:-1]
            found |= zip(group, self._run(batch, ends), strict=True)
        return [found[i] for i in range(len(responses))]

    @without_autocast()
    @torch.no_grad()
    def _run(self, batch: Batch, ends: NDArray[np.int64]) -> list[PartMeans]:
        model = self.model
        # Every analysed position predicts a token of its own row.
        followers = batch.input_ids.flatten()[batch.positions + 1]
        attribution = Attribution.of(model, self._final_norm, followers)
        pass_ = _Pass(self._heads, self._experts, self._lens, attribution, ends)
        with ExitStack() as stack:
            stack.enter_context(head_hooks(model, batch.positions, pass_.results))
            if self._experts is not None:
                stack.enter_context(expert_hooks(model, batch.positions, pass_.routings))
            stack.enter_context(residual_hooks(model, batch.positions, pass_.add))
            model.backbone(**model.forward_arguments(batch.input_ids, batch.attention_mask))
        return pass_.means()


class _Pass:
    """The numbers of one forward pass, as its layers run."""

    def __init__(
        self,
        heads: Heads,
        experts: Experts | None,
        lens: Lens,
        attribution: Attribution,
        ends: NDArray[np.int64],
    ) -> None:
        self.results: dict[int, Tensor] = {}
        """What the output projection received, by layer."""
        self.routings: dict[int, Routing] = {}
        """What the experts received, by layer."""
        self._model, self._heads, self._experts, self._lens = heads.model, heads, experts, lens
        self._attribution, self._ends = attribution, ends
        self._head_means: list[list[Values]] = []
        self._head_attributions: list[Values] = []
        self._routed: list[_Routed] = []
        self._scales: Values | None = None

    def add(self, states: LayerStates) -> None:
        """Reduce the parts of a layer whose states are complete."""
        layer, before = states.layer, states.residual_in
        values = self._reduce(self._heads.writes(states, self.results.pop(layer)), before, states, "a head")
        self._head_means.append([part[..., :_ATTRIBUTION].mean(axis=0) for part in np.split(values, self._ends)])
        self._head_attributions.append(values[..., _ATTRIBUTION].astype(np.float32))
        if self._experts is not None and layer in self._experts.layers:
            routing = self.routings.pop(layer)
            if not self._model.parallel:
                dtype = precise(before.dtype)
                before = before.to(dtype) + states.attention_write.to(dtype)
            values = self._reduce(self._experts.writes(states, routing), before, states, "an expert")
            self._routed.append(_Routed(self._experts, routing, values, self._ends))
        if layer == self._model.n_layers:
            self._scales = self._attribution.scales(self._model, states.residual_out).double().numpy()

    def _reduce(self, writes: Iterable[Tensor], base: Tensor, states: LayerStates, what: str) -> Values:
        """[n, k, len(PART_QUANTITIES)] float64 of the parts of a layer, portion by portion."""
        found: list[Values] = []
        first, dtype = 0, states.residual_out.dtype
        for parts in writes:
            here = slice(first, first + len(parts))
            first += len(parts)
            directions = self._attribution.directions[here]
            reduced = reduce_parts(parts, base[here], directions, self._model, self._lens, states.layer, dtype)
            found.append(reduced.cpu().double().numpy())
        values = np.concatenate(found)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._model.name}: NaN or inf in the write of {what} in layer {states.layer}, which overflows in "
                "this dtype: try --dtype float32 or bfloat16"
            )
        return values

    def means(self) -> list[PartMeans]:
        """The means of each response, when all layers have run."""
        scales = self._scales
        assert scales is not None
        by_layer = []
        for means, attributions in zip(self._head_means, self._head_attributions, strict=True):
            shares = np.split(attributions / scales[:, None], self._ends)
            by_layer.append([np.c_[mean, share.mean(axis=0)] for mean, share in zip(means, shares, strict=True)])
        heads = np.stack(by_layer, axis=1)
        if self._experts is None:
            return [PartMeans(own, None) for own in heads]
        experts = np.stack([routed.means(scales) for routed in self._routed], axis=1)
        return [PartMeans(own, routed) for own, routed in zip(heads, experts, strict=True)]


class _Routed:
    """Sums over the tokens of each response that one layer routes to each expert."""

    def __init__(self, experts: Experts, routing: Routing, values: Values, ends: NDArray[np.int64]) -> None:
        chosen, n = routing.chosen.cpu().numpy(), len(routing.chosen)
        weights = routing.weights.cpu().double().numpy()
        if experts.has_shared:
            # Every token goes to the shared experts, which are the last part.
            chosen = np.c_[chosen, np.full(n, experts.n_experts)]
            weights = np.c_[weights, np.full(n, np.nan)]
        tokens = np.diff([0, *ends, n])
        self._shape = (len(tokens), len(experts.numbers))
        self._cells = (np.repeat(np.arange(len(tokens)), tokens)[:, None] * self._shape[1] + chosen).astype(np.int32)
        self._tokens, self._count = tokens, self._sum(np.ones_like(weights))
        quantities = (weights, *(values[..., i] for i in range(_ATTRIBUTION)))
        self._sums = [self._sum(quantity) for quantity in quantities]
        self._attributions = values[..., _ATTRIBUTION].astype(np.float32)

    def means(self, scales: Values) -> Values:
        """[R, experts, len(EXPERT_QUANTITIES)]."""
        sums = [*self._sums, self._sum(self._attributions / scales[:, None])]
        with np.errstate(invalid="ignore"):
            means = [each / self._count for each in sums]
        return np.stack([self._count / self._tokens[:, None], *means], axis=-1)

    def _sum(self, values: Values) -> Values:
        sums = np.bincount(self._cells.ravel(), values.ravel(), minlength=int(np.prod(self._shape)))
        return sums.reshape(self._shape).astype(np.float64)
