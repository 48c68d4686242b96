"""Reduce states to one number per token, layer and site, where they are captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from internal_policy.capture.states import Batch, Extractor, LayerStates
from internal_policy.config import Lens
from internal_policy.errors import UserError
from internal_policy.models import LanguageModel, Projection, context
from internal_policy.responses import Response, pad

QUANTITIES = (
    "layer_in",
    "layer_out",
    "attn_in",
    "attn_out",
    "attn_cosine",
    "ffn_in",
    "ffn_out",
    "ffn_cosine",
)
"""What is kept of a layer: entropies in nats under the lens, and the cosines of each write with what it is added to."""


_POSITIONS = 2048
"""States are stacked and converted so many positions at a time, however many tokens a batch has."""


@dataclass(frozen=True)
class TokenValues:
    """The numbers of n analysed tokens."""

    layers: NDArray[np.float32]
    """[n, L, len(QUANTITIES)]."""
    policy: NDArray[np.float32]
    """[n, 2]: entropy of H^L without the final norm, and of pi_theta = softmax(LN_final(H^L) E_u^T)."""


class Reducer:
    """Runs a backend and arranges what it reduced; holds [n, L] numbers and no states."""

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
        reduce = partial(reduce_layer, lens=self._lens, n_layers=model.n_layers, parallel=model.parallel)
        reduced = [values.cpu().numpy() for values in self._extractor.run(batch, reduce)]
        n_columns = len(QUANTITIES) - 1
        # H(H^{l-1}) is the previous layer's H(H^l): each distinct state is projected once.
        before = reduced[0][:, n_columns]
        rows: list[NDArray[np.float32]] = []
        for layer, values in enumerate(reduced, start=1):
            rows.append(np.concatenate([before[:, None], values[:, :n_columns]], axis=1))
            self._refuse_non_finite(rows[-1], layer)
            before = values[:, 0]
        return TokenValues(np.stack(rows, axis=1), reduced[-1][:, -2:])

    def _refuse_non_finite(self, row: NDArray[np.float32], layer: int) -> None:
        finite = np.isfinite(row).all(axis=0)
        if not finite.all():
            quantity = QUANTITIES[int(np.argmin(finite))]
            raise UserError(
                f"{self.model.name}: NaN or inf in the states of layer {layer} ({quantity}); "
                "they overflow in this dtype or the weights are broken: try --dtype float32 or bfloat16"
            )


def reduce_layer(states: LayerStates, projection: Projection, *, lens: Lens, n_layers: int, parallel: bool) -> Tensor:
    """Reduce one layer; it needs nothing but its arguments, so that it can run on another machine.

    Args:
        states: the layer's states at n positions.
        projection: E_u and LN_final.
        lens: ``policy`` or ``logit-lens``.
        n_layers: L.
        parallel: whether the FFN's write is added to H^{l-1}, beside the attention's.

    Returns:
        [n, 7] QUANTITIES but the first, float32; layer 1 adds a column with the first, H(H^0); layer L adds the
        entropies of H^L without the final norm and of pi_theta.
    """
    return torch.cat([_reduce(part, projection, lens, n_layers, parallel) for part in states.split(_POSITIONS)])


def _reduce(states: LayerStates, projection: Projection, lens: Lens, n_layers: int, parallel: bool) -> Tensor:
    wanted = [
        states.residual_out,
        states.attention_in,
        states.attention_write,
        states.ffn_in,
        states.ffn_write,
        *([states.residual_in] if states.layer == 1 else []),
    ]
    layer_out, attn_in, attn_out, ffn_in, ffn_out, *layer_in = _entropies(projection, lens, wanted)
    before = states.residual_in.float()
    attn_write, ffn_write = states.attention_write.float(), states.ffn_write.float()
    attn_cosine = cosine_similarity(attn_write, before, dim=-1)
    ffn_cosine = cosine_similarity(ffn_write, before if parallel else before + attn_write, dim=-1)
    columns = [layer_out, attn_in, attn_out, attn_cosine, ffn_in, ffn_out, ffn_cosine, *layer_in]
    if states.layer == n_layers:
        final = states.residual_out
        if lens == "policy":
            columns += [layer_out, projection.entropy(projection.normed(final))]
        else:
            columns += [projection.entropy(final), layer_out]
    return torch.stack([c.to(layer_out.device) for c in columns], dim=-1)


def _entropies(projection: Projection, lens: Lens, states: list[Tensor]) -> list[Tensor]:
    """Entropies of several [n, d] states in one pass over E_u."""
    device = projection.weight.device
    stacked = torch.cat([projection.through(lens, s).to(device) for s in states])
    return list(projection.entropy(stacked).chunk(len(states)))


def reduce_responses(
    reducer: Reducer, responses: Sequence[Response], side: Literal["left", "right"] = "right"
) -> list[TokenValues]:
    """Analyse some responses in one forward pass, or in two where a long one would change what a short one gives.

    Args:
        reducer: capture and reduction.
        responses: the batch.
        side: where the padding goes; it changes nothing.

    Returns:
        The numbers of each response's tokens, [n_i, ...], in order.
    """
    values: dict[int, TokenValues] = {}
    for group in context.groups([len(r.input_ids) for r in responses], reducer.model.length_switch):
        values |= zip(group, _reduce_together(reducer, [responses[i] for i in group], side), strict=True)
    return [values[i] for i in range(len(responses))]


def _reduce_together(
    reducer: Reducer, responses: Sequence[Response], side: Literal["left", "right"]
) -> list[TokenValues]:
    ids, mask = pad([r.input_ids for r in responses], side)
    width = ids.shape[1]
    positions = []
    for row, response in enumerate(responses):
        start = row * width + (width - len(response.input_ids) if side == "left" else 0)
        positions.append(np.arange(start + response.prompt_length - 1, start + len(response.input_ids) - 1))
    values = reducer(Batch(ids, mask, torch.from_numpy(np.concatenate(positions))))
    ends = np.cumsum([len(p) for p in positions])[:-1]
    parts = zip(np.split(values.layers, ends), np.split(values.policy, ends), strict=True)
    return [TokenValues(layers, policy) for layers, policy in parts]
