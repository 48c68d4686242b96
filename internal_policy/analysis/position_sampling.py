"""Capture at a random subset of positions, in rounds, until every entropy change is known well enough (--tolerance).

The first round takes some positions of every block of similar ones, the second as many as the variances of the first
say are needed; a third is rare. Each round is one pass over the responses in which it has positions. The values of a
round are on disk before the size of the next is chosen, and so is that size, so an interrupted run is resumed with the
same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.position_subset import (
    Design,
    Estimate,
    design_positions,
    estimate,
    is_precise_enough,
    positions_needed,
    response_means,
)
from internal_policy.data.responses import Response
from internal_policy.extractors import QUANTITIES, TokenValues
from internal_policy.statistics import SITES, Floats, Ints
from internal_policy.utils.distributed import Processes, run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.workspace import Arrays, Workspace

MEMORY_ADVICE = "lower --max-new-tokens or leave out the longest response, use --dtype bfloat16 or another --device"

PositionSubset: TypeAlias = tuple[Response, Ints]
"""A response, and which of its tokens to analyse, from 0."""


@dataclass(frozen=True, eq=False)
class PositionSample:
    """Which positions were analysed, and the uncertainty of the changes that comes from it."""

    tolerance: float
    """The largest half-width that was allowed, nats."""
    tokens: list[Ints]
    """Analysed tokens of each response, from 0, ascending."""
    total: int
    """All positions."""
    rounds: int
    """Number of rounds."""
    half_widths: Floats
    """Half of the 95% interval of each change for what all positions would give, nats, [L, 3] in order of SITES."""
    few: int = 0
    """Number of half-widths that rest on a few positions, so that they may miss more often than one time in 20."""

    def summary(self) -> dict[str, float | int | str]:
        """The entry of the manifest, with the layer (from 1) and site of the largest half-width."""
        layer, site = np.unravel_index(int(self.half_widths.argmax()), self.half_widths.shape)
        return {
            "tolerance": self.tolerance,
            "analysed": sum(map(len, self.tokens)),
            "total": self.total,
            "rounds": self.rounds,
            "half_width": float(self.half_widths.max()),
            "layer": int(layer) + 1,
            "site": SITES[int(site)],
            "few": self.few,
            "changes": int(self.half_widths.size),
        }


@dataclass(frozen=True, eq=False)
class CaptureResult:
    """The numbers of all responses."""

    portions: list[Arrays]
    """``index`` [R], ``layers`` [R, L, Q] and ``policy`` [R, 2] of some responses; ``token_layers`` [n, L, Q] and
    ``token_policy`` [n, 2] of those that are kept token by token."""
    sample: PositionSample | None = None
    """The analysed positions; None if all were analysed."""


def capture_in_rounds(
    config: AnalyzeConfig,
    responses: Sequence[Response],
    run: Callable[[Sequence[PositionSubset]], list[TokenValues]],
    workspace: Workspace,
    state: Processes,
) -> CaptureResult:
    """Analyse positions until every half-width is under the tolerance, or there are no more.

    `run` analyses a batch. All processes take the same decisions.

    Raises:
        UserError: out of memory, or the processes share no directory.
    """
    tolerance = float(config.tolerance or 0)
    design = design_positions(responses, config.seed)
    ends = [0, _agree_on_end(1, lambda: design.pilot, workspace, state)]
    values = np.zeros((0, 0))
    while True:
        chosen = design.order[ends[-2] : ends[-1]]
        found = _capture_round(len(ends) - 1, chosen, design, config, responses, run, workspace, state)
        values = np.concatenate([values, found]) if len(values) else found
        estimated = estimate(design, _changes(values))

        def next_end(last: int = ends[-1], known: Estimate = estimated) -> int:
            enough = is_precise_enough(design, known, tolerance)
            return last if enough else positions_needed(design, known, tolerance)

        end = _agree_on_end(len(ends), next_end, workspace, state)
        if end == ends[-1]:
            break
        ends.append(end)
    half_widths = estimated.half_width.reshape(-1, len(SITES))
    few = int(estimated.rests_on_few(len(design.order)).sum())
    ordered = np.argsort(design.order[: len(values)])
    positions = design.order[: len(values)][ordered]
    tokens = np.split(
        design.token[positions], np.searchsorted(design.response[positions], np.arange(1, len(responses)))
    )
    means = response_means(design, values)
    shape = (len(half_widths), len(QUANTITIES))
    kept = values[ordered][: sum(len(t) for t in tokens[: config.keep_tokens])].astype(np.float32)
    portion: Arrays = {
        "index": np.arange(len(responses)),
        "layers": means[:, :-2].reshape(-1, *shape),
        "policy": means[:, -2:],
        "token_layers": kept[:, :-2].reshape(-1, *shape),
        "token_policy": kept[:, -2:],
    }
    return CaptureResult(
        [portion], PositionSample(tolerance, tokens, len(design.order), len(ends) - 1, half_widths, few)
    )


def _agree_on_end(number: int, choose: Callable[[], int], workspace: Workspace, state: Processes) -> int:
    """The number of positions up to the end of a round; that of the previous round if there is no further one.

    One process decides for all, and only once: the rounding of another machine or library could lead to another number,
    and an interrupted round contains the positions that were chosen at its start.
    """

    def settle() -> int:
        for settled in workspace.shards(f"end-{number}"):
            return int(settled["end"])
        end = choose()
        workspace.write(f"end-{number}", 0, {"end": np.array(end)})
        return end

    return state.on_main(settle)


def _capture_round(
    number: int,
    chosen: Ints,
    design: Design,
    config: AnalyzeConfig,
    responses: Sequence[Response],
    run: Callable[[Sequence[PositionSubset]], list[TokenValues]],
    workspace: Workspace,
    state: Processes,
) -> Floats:
    """One round's numbers in the order of the chosen positions, [n, L * Q + 2]."""
    ordered = np.sort(chosen)
    sampled, first = np.unique(design.response[ordered], return_index=True)
    positions = dict(zip(sampled.tolist(), np.split(ordered, first[1:]), strict=True))

    def capture(batch: list[int]) -> Arrays:
        reduced = run_with_oom_retry([(responses[i], design.token[positions[i]]) for i in batch], run, MEMORY_ADVICE)
        rows = [np.hstack([v.layers.reshape(len(v.layers), -1), v.policy]) for v in reduced]
        return {"positions": np.concatenate([positions[i] for i in batch]), "values": np.concatenate(rows)}

    shards = workspace.run_stage(
        f"capture-{number}",
        {i: len(responses[i].input_ids) for i in positions},
        config.batch_size,
        capture,
        description=f"analysing responses, round {number}",
        processes=state,
    )
    captured = np.concatenate([shard["positions"] for shard in shards])
    if not np.array_equal(np.sort(captured), ordered):
        raise UserError(
            f"{workspace.directory}: the unfinished analysis holds other positions than round {number} has now, as "
            "another version of internal_policy or numpy may choose; add --overwrite to start over, or choose another "
            "--output directory"
        )
    values = np.concatenate([shard["values"] for shard in shards])[np.argsort(captured)]
    return values[np.searchsorted(ordered, chosen)].astype(np.float64)


def _changes(values: Floats) -> Floats:
    """Entropy changes of eqs. 11-13, [n, 3 L]: the sites of layer 1, then those of layer 2."""
    layers = values[:, :-2].reshape(len(values), -1, len(QUANTITIES))
    into, out = ([QUANTITIES.index(f"{site}_{end}") for site in SITES] for end in ("in", "out"))
    return (layers[:, :, out] - layers[:, :, into]).reshape(len(values), -1)
