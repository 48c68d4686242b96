"""The answer under the other lens: found beside an analysis on disk, where the same responses were analysed under it.

Analyses are of the same thing where the digests of their weights and of their responses are the same, whatever file or
sampling the responses came from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

_UNDER = {"policy": "without the final norm (lens policy)", "logit-lens": "under the logit lens"}


@dataclass(frozen=True)
class LensAnswer:
    """What the same responses of the same weights give under another lens."""

    lens: str
    """``policy`` or ``logit-lens``."""
    boundary_layer: int | None
    """The boundary layer under it, from 1; None where there is none."""
    path: Path | None
    """Where that analysis is."""


def other_lens(analysis: Analysis, among: Sequence[Analysis] = ()) -> LensAnswer | None:
    """Find what the same responses of the same weights give under another lens.

    Args:
        analysis: the analysis.
        among: analyses in memory, which are looked at first.

    Returns:
        The answer of the first such analysis, else of the first beside this one on disk; None where there is none.
    """
    for other in among:
        if other.lens != analysis.lens and _same(analysis, other.config.get("weights"), other.responses_digest):
            return LensAnswer(other.lens, other.boundary_layer, other.path)
    if analysis.path is None:
        return None
    for path in sorted(analysis.path.resolve().parent.glob("*/analysis.json")):
        # One that is broken is told of by whoever reads it for its own sake.
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            lens, weights = manifest["config"]["lens"], manifest["config"]["weights"]
            if lens != analysis.lens and _same(analysis, weights, manifest["responses_digest"]):
                return LensAnswer(lens, manifest["boundary_layer"], analysis.path.parent / path.parent.name)
    return None


def one_lens(analyses: Sequence[Analysis]) -> tuple[list[Analysis], list[Analysis]]:
    """Set aside what only repeats another analysis under another lens, as ``compare DIR/*`` may name both.

    Args:
        analyses: the analyses.

    Returns:
        Those of the first one's lens, with those that have no counterpart of that lens; and those that have one.
    """
    first = [a for a in analyses if a.lens == analyses[0].lens]
    aside = [
        a
        for a in analyses
        if a.lens != analyses[0].lens and any(_same(b, a.config.get("weights"), a.responses_digest) for b in first)
    ]
    return [a for a in analyses if all(a is not other for other in aside)], aside


def sentence(analysis: Analysis) -> str | None:
    """Say what the same responses give under the other lens.

    Args:
        analysis: the analysis.

    Returns:
        Such as "under the logit lens the same responses give layer 1"; None where that was not measured.
    """
    other = other_lens(analysis)
    if other is None:
        return None
    answer = "no boundary layer" if other.boundary_layer is None else f"layer {other.boundary_layer}"
    agrees = " too" if other.boundary_layer == analysis.boundary_layer else ", so the answer depends on the lens"
    return f"{_UNDER[other.lens]} the same responses give {answer}{agrees}"


def _same(analysis: Analysis, weights: str | None, responses_digest: str) -> bool:
    return analysis.config.get("weights") == weights and analysis.responses_digest == responses_digest
