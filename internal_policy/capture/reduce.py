"""Reduce states to one number per token, layer and site, where they are captured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from internal_policy.capture.states import Batch, Extractor, LayerStates
from internal_policy.config import Lens
from internal_policy.errors import UserError
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
    """Projects and reduces the states of each layer; holds [n, L] numbers and no states."""

    def __init__(self, extractor: Extractor, lens: Lens) -> None:
        self._model = extractor.model
        self._extractor = extractor
        self._lens = lens

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
        rows: list[NDArray[np.float32]] = []
        policy: list[NDArray[np.float32]] = []
        # One number is carried from layer to layer: H(H^{l-1}) is the previous layer's H(H^l).
        previous: list[Tensor] = []

        def consume(states: LayerStates) -> None:
            if not previous:
                first = [self._entropies([part])[0] for part in torch.split(states.residual_in, _POSITIONS)]
                previous.append(torch.cat(first))
            values = torch.cat([self._layer(part) for part in states.split(_POSITIONS)])
            layer_out = values[:, 0]
            row = torch.cat([previous[0].to(values.device)[:, None], values], dim=1).cpu().numpy()
            self._refuse_non_finite(row, states.layer)
            rows.append(row)
            previous[0] = layer_out
            if states.layer == self._model.n_layers:
                parts = zip(
                    torch.split(states.residual_out, _POSITIONS), torch.split(layer_out, _POSITIONS), strict=True
                )
                policy.append(np.concatenate([self._policy(final, lens) for final, lens in parts]))

        self._extractor.run(batch, consume)
        return TokenValues(np.stack(rows, axis=1), policy[0])

    def _layer(self, states: LayerStates) -> Tensor:
        """All numbers of one layer but the first, which the layer below has computed: [n, len(QUANTITIES) - 1]."""
        layer_out, attn_in, attn_out, ffn_in, ffn_out = self._entropies(
            [states.residual_out, states.attention_in, states.attention_write, states.ffn_in, states.ffn_write]
        )
        before = states.residual_in.float()
        attn_write, ffn_write = states.attention_write.float(), states.ffn_write.float()
        attn_cosine = cosine_similarity(attn_write, before, dim=-1)
        ffn_cosine = cosine_similarity(ffn_write, before + attn_write, dim=-1)
        columns = [layer_out, attn_in, attn_out, attn_cosine, ffn_in, ffn_out, ffn_cosine]
        return torch.stack([c.to(layer_out.device) for c in columns], dim=-1)

    def _entropies(self, states: list[Tensor]) -> list[Tensor]:
        """Entropies of several [n, d] states in one pass over E_u."""
        projection = self._model.projection
        device = projection.weight.device
        stacked = torch.cat([projection.through(self._lens, s).to(device) for s in states])
        return list(projection.entropy(stacked).chunk(len(states)))

    def _policy(self, final_states: Tensor, under_lens: Tensor) -> NDArray[np.float32]:
        projection = self._model.projection
        if self._lens == "policy":
            raw, normed = under_lens, projection.entropy(projection.final_norm(final_states))
        else:
            raw, normed = projection.entropy(final_states), under_lens
        values: NDArray[np.float32] = torch.stack([raw, normed], dim=-1).cpu().numpy()
        return values

    def _refuse_non_finite(self, row: NDArray[np.float32], layer: int) -> None:
        finite = np.isfinite(row).all(axis=0)
        if not finite.all():
            quantity = QUANTITIES[int(np.argmin(finite))]
            raise UserError(
                f"{self._model.name}: NaN or inf in the states of layer {layer} ({quantity}); "
                "they overflow in this dtype or the weights are broken: try --dtype float32 or bfloat16"
            )


def reduce_responses(
    reducer: Reducer, responses: Sequence[Response], side: Literal["left", "right"] = "right"
) -> list[TokenValues]:
    """Analyse some responses in one forward pass.

    Args:
        reducer: capture and reduction.
        responses: the batch.
        side: where the padding goes; it changes nothing.

    Returns:
        The numbers of each response's tokens, [n_i, ...], in order.
    """
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
