"""Sentences about an analysis for terminal and report, and the result of the same responses under the other lens.

Two analyses are of the same responses where the digests of weights and of responses agree, whatever file or sampling
the responses came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internal_policy.analysis.results import Analysis
from internal_policy.utils.errors import counted

_UNDER = {"policy": "without the final norm (lens policy)", "logit-lens": "under the logit lens"}


def remarks(analysis: Analysis) -> list[str]:
    """Say what is to be said beside the layers and the boundary layer.

    Args:
        analysis: the analysis.

    Returns:
        The policy's entropy, then responses that were cut, the mean reward, and the baseline, each where there is one.
    """
    entropy = analysis.policy_entropy
    found = [
        f"policy entropy H(π_θ) {entropy['mean']:.4f}{plus_stderr(entropy['stderr'], 4)} nats; "
        f"H(H^L) without the final norm {entropy['final_state_mean']:.4f}"
    ]
    if analysis.n_truncated:
        found.append(
            f"{analysis.n_truncated} of {counted(analysis.n_responses, 'response')} reached the limit of tokens "
            "before they ended (--max-new-tokens)"
        )
    rewards = analysis.sequences["reward"].dropna()
    if len(rewards):
        found.append(f"mean reward {float(rewards.mean()):.3f} over {counted(len(rewards), 'response')}")
    if analysis.baseline is not None and analysis.baseline_model is not None:
        random, boundary = analysis.baseline_model, analysis.baseline_model["boundary_layer"]
        changes = analysis.baseline.loc[analysis.baseline["site"] == "ffn", "change"]
        found.append(
            f"random weights of the same architecture (seed {random['seed']}): policy entropy "
            f"{random['policy_entropy']['mean']:.4f} nats, ΔH FFN from {changes.min():+.3f} to {changes.max():+.3f}, "
            f"{'no boundary layer' if boundary is None else f'boundary layer {boundary}'}"
        )
    return found


def positions_line(positions: Mapping[str, Any]) -> str:
    """Say how many positions were analysed and what that costs in certainty.

    Args:
        positions: of an Analysis with a tolerance.

    Returns:
        One line.
    """
    analysed, total, rounds = positions["analysed"], positions["total"], positions["rounds"]
    in_rounds = f"in {counted(rounds, 'round')}"
    if analysed == total:
        return f"analysed all {total} positions {in_rounds}; tolerance {positions['tolerance']:g} nats needs them all"
    site = {"attn": ", ATTN", "ffn": ", FFN"}.get(positions["site"], "")
    few = ""
    if positions["few"]:
        few = (
            f"; {positions['few']} of the {positions['changes']} half-widths rest on a few positions with large values "
            "and may miss more often than one time in 20"
        )
    return (
        f"analysed {analysed} of {total} positions ({analysed / total:.1%}) {in_rounds}; largest half-width of a 95% "
        f"interval from that choice {positions['half_width']:.3f} nats (layer {positions['layer']}{site}); tolerance "
        f"{positions['tolerance']:g}; ± is the standard error over prompts{few}"
    )


def plus_stderr(stderr: Any, digits: int = 3) -> str:
    """Write a standard error behind its mean.

    Args:
        stderr: nats; NaN of a single prompt, which has none.
        digits: behind the point.

    Returns:
        ``±0.012``; an empty text where there is none.
    """
    return "" if math.isnan(stderr) else f"±{stderr:.{digits}f}"


@dataclass(frozen=True)
class LensResult:
    """What the same responses of the same weights give under another lens."""

    lens: str
    """``policy`` or ``logit-lens``."""
    boundary_layer: int | None
    """The boundary layer under it, from 1; None where there is none."""
    path: Path | None
    """Where that analysis is."""


def find_other_lens(analysis: Analysis, among: Sequence[Analysis] = ()) -> LensResult | None:
    """Find what the same responses of the same weights give under another lens.

    Args:
        analysis: the analysis.
        among: analyses in memory, which are looked at first.

    Returns:
        The answer of the first such analysis, else of the first beside this one on disk; None where there is none.
    """
    for other in among:
        if other.lens != analysis.lens and _same(analysis, other.config.get("weights"), other.responses_digest):
            return LensResult(other.lens, other.boundary_layer, other.path)
    if analysis.path is None:
        return None
    for path in sorted(analysis.path.resolve().parent.glob("*/analysis.json")):
        # One that is broken is told of by whoever reads it for its own sake.
        with suppress(OSError, ValueError, KeyError, TypeError):
            manifest = json.loads(path.read_text(encoding="utf-8"))
            lens, weights = manifest["config"]["lens"], manifest["config"]["weights"]
            if lens != analysis.lens and _same(analysis, weights, manifest["responses_digest"]):
                return LensResult(lens, manifest["boundary_layer"], analysis.path.parent / path.parent.name)
    return None


def keep_one_lens(analyses: Sequence[Analysis]) -> tuple[list[Analysis], list[Analysis]]:
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


def other_lens_sentence(analysis: Analysis) -> str | None:
    """Say what the same responses give under the other lens.

    Args:
        analysis: the analysis.

    Returns:
        Such as "under the logit lens the same responses give layer 1"; None where that was not measured.
    """
    other = find_other_lens(analysis)
    if other is None:
        return None
    answer = "no boundary layer" if other.boundary_layer is None else f"layer {other.boundary_layer}"
    agrees = " too" if other.boundary_layer == analysis.boundary_layer else ", so the answer depends on the lens"
    return f"{_UNDER[other.lens]} the same responses give {answer}{agrees}"


def _same(analysis: Analysis, weights: str | None, responses_digest: str) -> bool:
    return analysis.config.get("weights") == weights and analysis.responses_digest == responses_digest
