"""What interventions do to the final policy on given responses, reduced to means over the tokens of each response.

A batch runs once without changes; every intervention then restarts at its lowest layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from internal_policy.data.responses import Response, pad
from internal_policy.extractors.hooks import pick
from internal_policy.interventions.changes import Given, Intervention, Point, changed_writes, read_writes
from internal_policy.interventions.replay import CleanRun
from internal_policy.interventions.tables import CLEAN_QUANTITIES, QUANTITIES
from internal_policy.models import LanguageModel, context, without_autocast
from internal_policy.utils.errors import UserError

_AT_ONCE = 8
"""Interventions whose final policies are compared in one pass over the vocabulary."""


@dataclass(frozen=True)
class Effects:
    """The numbers of a batch of responses; means over the tokens of each."""

    changed: NDArray[np.float64]
    """[B, interventions, len(QUANTITIES)]."""
    clean: NDArray[np.float64]
    """[B, len(CLEAN_QUANTITIES)]."""


@without_autocast()
@torch.no_grad()
def measure_effects(
    model: LanguageModel,
    interventions: Sequence[Intervention],
    responses: Sequence[Response],
    means: Given,
    donors: Sequence[Response],
) -> Effects:
    """Measure what interventions do to the final policy at the positions that predict response tokens.

    Args:
        model: the model.
        interventions: each is made alone, at every position of a sequence.
        responses: the batch.
        means: the mean of each write that is replaced by one, [width].
        donors: for each response the one whose writes replace its own; not used if no write is resampled.

    Returns:
        The numbers, in order.

    Raises:
        UserError: NaN or inf in the changed policies.
    """
    changed = np.empty((len(responses), len(interventions), len(QUANTITIES)))
    clean = np.empty((len(responses), len(CLEAN_QUANTITIES)))
    for group in context.group_by_length([len(r.input_ids) for r in responses], model.length_switch):
        own = [responses[i] for i in group]
        found = _measure_together(model, interventions, own, means, [donors[i] for i in group] if donors else [])
        changed[group], clean[group] = found.changed, found.clean
    return Effects(changed, clean)


def _measure_together(
    model: LanguageModel,
    interventions: Sequence[Intervention],
    responses: Sequence[Response],
    means: Given,
    donors: Sequence[Response],
) -> Effects:
    ids, mask = pad([r.input_ids for r in responses], "right")
    given = dict(means)
    if points := set().union(*(each.points("resample") for each in interventions)):
        found_there = _writes_of_donors(model, points, responses, donors, ids.shape[1])
        given |= {("resample", *point): write for point, write in found_there.items()}
    positions, targets, counts = _response_tokens(responses, ids)
    run = CleanRun(model, ids, mask, {each.first for each in interventions})

    def policy_states(final: Tensor) -> Tensor:
        return model.projection.apply_final_norm(pick(final, positions))

    first = policy_states(run.final)
    numbers: list[NDArray[np.float64]] = []
    clean: NDArray[np.float64] | None = None
    for start in range(0, len(interventions), _AT_ONCE):
        states = [first]
        for intervention in interventions[start : start + _AT_ONCE]:
            with changed_writes(model, intervention.changes, given):
                states.append(policy_states(run.restart(intervention.first)))
        found = model.projection.changes(states, targets)
        entropy, log_prob = found.entropy.double(), found.log_prob.double()
        clean = torch.stack([entropy[0], log_prob[0]], dim=-1).cpu().numpy() if clean is None else clean
        quantities = (
            found.divergence[1:].double(),
            entropy[1:] - entropy[:1],
            log_prob[1:] - log_prob[:1],
            (found.top[1:] != found.top[:1]).double(),
        )
        numbers.append(rearrange(torch.stack(quantities), "q i n -> n i q").cpu().numpy())
    assert clean is not None
    changed = np.concatenate(numbers, axis=1)
    _refuse_non_finite(model, interventions, changed)
    return Effects(_means(changed, counts), _means(clean, counts))


def _response_tokens(responses: Sequence[Response], ids: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Flat positions [n] that predict response tokens, these tokens [n], and how many each response has."""
    width = ids.shape[1]
    positions = torch.cat(
        [torch.arange(r.prompt_length - 1, len(r.input_ids) - 1) + row * width for row, r in enumerate(responses)]
    )
    return positions, ids.reshape(-1)[positions + 1], [r.n_tokens for r in responses]


def _means(values: NDArray[np.float64], counts: Sequence[int]) -> NDArray[np.float64]:
    ends = np.cumsum(counts)[:-1]
    return np.stack([part.mean(axis=0) for part in np.split(values, ends)])


def _refuse_non_finite(
    model: LanguageModel, interventions: Sequence[Intervention], changed: NDArray[np.float64]
) -> None:
    finite = np.isfinite(changed).all(axis=(0, 2))
    if not finite.all():
        bad = interventions[int(np.argmin(finite))].changes[0]
        raise UserError(
            f"{model.name}: NaN or inf in the policy after --how {bad.how} at layer {bad.layer} ({bad.site}); the "
            "states overflow in this dtype: try --dtype float32 or bfloat16"
        )


@without_autocast()
@torch.no_grad()
def sum_writes(
    model: LanguageModel, points: set[tuple[int, Point]], responses: Sequence[Response]
) -> dict[tuple[int, Point], Tensor]:
    """Sum the writes of a batch over the positions that predict response tokens.

    Args:
        model: the model.
        points: which writes.
        responses: the batch.

    Returns:
        A sum for each point, [width] float64.
    """
    sums: dict[tuple[int, Point], Tensor] = {}
    for group in context.group_by_length([len(r.input_ids) for r in responses], model.length_switch):
        own = [responses[i] for i in group]
        ids, mask = pad([r.input_ids for r in own], "right")
        positions, _, _ = _response_tokens(own, ids)

        def add(layer: int, point: Point, write: Tensor, positions: Tensor = positions) -> None:
            total = pick(write, positions).double().sum(dim=0).cpu()
            sums[layer, point] = sums.get((layer, point), 0.0) + total

        with read_writes(model, points, add):
            model.backbone(**model.forward_arguments(ids, mask))
    return sums


def _writes_of_donors(
    model: LanguageModel,
    points: set[tuple[int, Point]],
    responses: Sequence[Response],
    donors: Sequence[Response],
    width: int,
) -> dict[tuple[int, Point], Tensor]:
    """What other responses write, [B, T, width] in the places of these responses."""
    found: dict[tuple[int, Point], Tensor] = {}
    for group in context.group_by_length([len(r.input_ids) for r in donors], model.length_switch):
        own = [donors[i] for i in group]
        ids, mask = pad([r.input_ids for r in own], "right")
        places = torch.stack([aligned(responses[i], donors[i], width) for i in group])
        flat = (places + ids.shape[1] * torch.arange(len(group))[:, None]).reshape(-1)

        def keep(layer: int, point: Point, write: Tensor, group: list[int] = group, flat: Tensor = flat) -> None:
            rows = rearrange(pick(write, flat), "(b t) w -> b t w", b=len(group))
            if (layer, point) not in found:
                found[layer, point] = rows.new_empty(len(responses), width, rows.shape[-1])
            found[layer, point][group] = rows

        with read_writes(model, points, keep):
            model.backbone(**model.forward_arguments(ids, mask))
    return found


def aligned(response: Response, donor: Response, width: int) -> Tensor:
    """The position of a donor whose write comes to each position of a response.

    Positions are counted from the first position that predicts a response token, forwards for the response and
    backwards for the prompt; a part of the donor that is shorter is repeated.

    Args:
        response: the response that is changed.
        donor: the one whose writes it receives.
        width: T of the batch; positions beyond the response are padding.

    Returns:
        [T] positions, from 0.
    """
    offset = torch.arange(width) - (response.prompt_length - 1)
    forwards = donor.prompt_length - 1 + offset.clamp(min=0) % donor.n_tokens
    # The last token of a response predicts nothing, and is not among the positions that are repeated.
    before = donor.prompt_length - 1
    backwards = before - 1 - (-offset - 1).clamp(min=0) % max(before, 1)
    return torch.where(offset >= 0, forwards, backwards.clamp(min=0))


def choose_donors(responses: Sequence[Response], prompts: Sequence[int], seed: int) -> list[int]:
    """Choose another response for each, of another prompt, uniformly.

    Args:
        responses: all responses.
        prompts: the number of the prompt of each.
        seed: of the choice; that of a response does not depend on the others' choices.

    Returns:
        For each response the index of its donor.

    Raises:
        UserError: all responses have the same prompt.
    """
    numbers = np.asarray(prompts)
    chosen = []
    for i in range(len(responses)):
        others = np.flatnonzero(numbers != numbers[i])
        if len(others) == 0:
            raise UserError(
                "--how resample needs responses to at least two prompts, and there is 1; give more, or --how zero"
            )
        chosen.append(int(np.random.default_rng((seed, i)).choice(others)))
    return chosen
