"""Divergences between the policies of all layers, reduced to sums over each response's tokens where they are captured.

The policies of all layers at a position are compared with one another, so the outputs H^l of all layers are kept until
layer L is reached, and nothing else of their states. That takes L n d numbers for n positions; a forward pass with more
than fit in ``_STATES_BUDGET`` is divided into several.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internal_policy.data.responses import Response
from internal_policy.extractors.base import Extractor, LayerStates
from internal_policy.extractors.reduce import make_batch
from internal_policy.models import LanguageModel, Projection, context
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError

_STATES_BUDGET = 512 * 2**20
"""Bytes of the outputs of all layers that are kept at a time."""
_POSITIONS = 256
"""Positions whose policies are compared at a time: a lens with a norm copies the states of all layers."""


@dataclass(frozen=True)
class PolicyDivergences:
    """How far the internal policies of a response are from one another: means over its tokens, in nats."""

    kl_policy: NDArray[np.float64]
    """[L] KL(pi_theta || pi^l)."""
    kl_next: NDArray[np.float64]
    """[L] KL(pi^l || pi^(l+1)); for the last layer KL(pi^L || pi_theta)."""
    top1: NDArray[np.float64]
    """[L] share of the tokens for which pi^l and pi_theta have the same most probable token."""
    matrix: NDArray[np.float64]
    """[L, L] KL(pi^l || pi^m), l in rows."""


def reduce_divergences(
    group: Sequence[LayerStates],
    projection: Projection,
    *,
    held: list[Tensor],
    counts: Sequence[int],
    lens: Lens,
    n_layers: int,
) -> Tensor:
    """Keep H^l, and compare the policies of all layers at the last one; it can run on another machine.

    Args:
        group: consecutive layers at n positions.
        projection: E_u, of which every policy is made.
        held: empty before layer 1; the outputs of the layers so far.
        counts: how many of the n positions belong to each of R responses, in order.
        lens: what is applied to H^l. pi_theta is always softmax(LN_final(H^L) E_u^T).
        n_layers: L.

    Returns:
        [R, 3 L + L^2] float64 on the CPU: sums over the positions of a response of KL(pi_theta || pi^l), of
        KL(pi^l || next), of the agreements, and of KL(pi^l || pi^m). Nothing before layer L.
    """
    held += [states.residual_out for states in group]
    if group[-1].layer < n_layers:
        return torch.empty(0)
    owners = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts)))
    sums = torch.zeros(len(counts), n_layers * (3 + n_layers), dtype=torch.float64)
    for start in range(0, len(owners), _POSITIONS):
        part = [state[start : start + _POSITIONS] for state in held]
        states = [projection.apply_lens(lens, state, layer) for layer, state in enumerate(part, start=1)]
        # Under the logit lens the last internal policy is pi_theta, and is not projected again.
        if lens != "logit-lens":
            states.append(projection.apply_final_norm(part[-1]))
        divergences, top = projection.divergences(states)
        own, policy = divergences[:, :n_layers, :n_layers], divergences[:, -1, :n_layers]
        # Behind pi^L comes pi_theta.
        following = torch.cat([own.diagonal(1, 1, 2), divergences[:, n_layers - 1, -1:]], dim=1)
        agree = (top[:, :n_layers] == top[:, -1:]).to(divergences.dtype)
        columns = torch.cat([policy, following, agree, own.flatten(1)], dim=1)
        sums.index_add_(0, owners[start : start + _POSITIONS], columns.cpu().double())
    return sums


def measure_divergences(extractor: Extractor, responses: Sequence[Response], lens: Lens) -> list[PolicyDivergences]:
    """Measure the divergences of the policies of a batch of responses.

    Args:
        extractor: any backend.
        responses: the batch, each with at least one response token.
        lens: what is applied to H^l before it is projected; pi_theta always has the final norm.

    Returns:
        The means of each response, in order.

    Raises:
        UserError: NaN or inf in a state.

    Source: arXiv 2512.19673v3, eqs. 1 and 5 for the policies, fig. 5d for the divergence.
    """
    model = extractor.model
    n_layers, counts = model.n_layers, [r.n_tokens for r in responses]
    sums = np.zeros((len(responses), n_layers * (3 + n_layers)))
    for group in context.group_by_length([len(r.input_ids) for r in responses], model.length_switch):
        for pieces in _passes([(i, counts[i]) for i in group], _capacity(model)):
            batch = make_batch([responses[i] for i, _ in pieces], "right", [tokens for _, tokens in pieces])
            reduce = partial(
                reduce_divergences,
                held=[],
                counts=[len(tokens) for _, tokens in pieces],
                lens=lens,
                n_layers=n_layers,
            )
            sums[[i for i, _ in pieces]] += extractor.run(batch, reduce)[-1].numpy()
    means = sums / np.array(counts)[:, None]
    found = [_unpack(row, n_layers) for row in means]
    _refuse_non_finite(found, model)
    return found


def _capacity(model: LanguageModel) -> int:
    """Positions of which the outputs of all layers fit in the budget."""
    width = int(model.projection.weight.shape[1])
    return max(1, _STATES_BUDGET // (model.n_layers * width * model.dtype.itemsize))


def _passes(counts: Sequence[tuple[int, int]], capacity: int) -> Iterator[list[tuple[int, NDArray[np.int64]]]]:
    """Divide responses, given as (index, tokens), into forward passes of at most ``capacity`` analysed tokens.

    Only a response that exceeds the capacity by itself is run more than once.
    """
    pieces: list[tuple[int, NDArray[np.int64]]] = []
    room = capacity
    for index, count in counts:
        if count > room and pieces:
            yield pieces
            pieces, room = [], capacity
        for start in range(0, count, capacity):
            tokens = np.arange(start, min(start + capacity, count))
            if start:
                yield pieces
                pieces, room = [], capacity
            pieces.append((index, tokens))
            room -= len(tokens)
    if pieces:
        yield pieces


def _unpack(row: NDArray[np.float64], n_layers: int) -> PolicyDivergences:
    policy, following, top1, matrix = np.split(row, [n_layers, 2 * n_layers, 3 * n_layers])
    return PolicyDivergences(policy, following, top1, matrix.reshape(n_layers, n_layers))


def _refuse_non_finite(found: Sequence[PolicyDivergences], model: LanguageModel) -> None:
    # A policy's divergence from itself is 0 unless its own state is not finite.
    own = np.array([np.diag(each.matrix) for each in found])
    if not np.isfinite(own).all():
        where = f"the states of layer {int(np.argmin(np.isfinite(own).all(axis=0))) + 1}"
    elif not all(np.isfinite(each.kl_policy).all() for each in found):
        where = "the final policy's logits"
    else:
        return
    raise UserError(
        f"{model.name}: NaN or inf in {where}; they overflow in this dtype or the weights are broken: "
        "try --dtype float32 or bfloat16"
    )
