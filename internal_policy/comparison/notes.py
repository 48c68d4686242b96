"""What a comparison says beside its numbers: what could not be compared, why there are no trends, what is double."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internal_policy.analysis.results import Analysis
from internal_policy.analysis.sources import StepsFrom, architecture_differences, without_step
from internal_policy.comparison.pairing import Item
from internal_policy.utils import console

_SETTINGS = ("template", "temperature", "samples_per_prompt", "max_new_tokens", "generator")
_MODEL = ("dtype", "quantization", "device")
_MIN_TREND = 3
_MOST_NAMES = 4


def differing_settings(analysis: Analysis, baseline: Analysis) -> dict[str, tuple[Any, Any]]:
    """Find settings that differ; what was asked for of the sampling matters only where both sampled.

    Args:
        analysis: one.
        baseline: the other.

    Returns:
        By name: of the analysis, of the baseline.
    """
    a, b = analysis.config, baseline.config
    sampled = a.get("responses") is None and b.get("responses") is None
    found = {n: (a.get(n), b.get(n)) for n in _SETTINGS if sampled and a.get(n) != b.get(n)}
    return found | {
        n: (analysis.model.get(n), baseline.model.get(n))
        for n in _MODEL
        if analysis.model.get(n) != baseline.model.get(n)
    }


UPDATES = (
    "the numbers of the checkpoints count the trainer's updates: how many of them make a step, a batch of rollouts, is "
    "not recorded with them"
)


def no_trends(items: Sequence[Item], steps_from: StepsFrom) -> str | None:
    """Say why there are no trends, if there are none.

    Args:
        items: the analyses.
        steps_from: where their steps come from.

    Returns:
        The reason; None where there are trends.
    """
    if len(items) < _MIN_TREND:
        return f"no trends: a trend needs at least {_MIN_TREND} checkpoints, and these are {len(items)} analyses"
    if differences := architecture_differences([item.analysis for item in items]):
        return f"no trends: not of one architecture ({'; '.join(differences)})"
    if steps_from == "order":
        lacking = [items[i].label for i in without_step([item.analysis for item in items])]
        names = ", ".join(lacking[:_MOST_NAMES])
        if len(lacking) > _MOST_NAMES:
            names += f" and {len(lacking) - _MOST_NAMES} more"
        return f"no steps, so no trends: {names} {'has' if len(lacking) == 1 else 'have'} none in the name; give steps"
    if len({item.step for item in items}) < len(items):
        return "no trends: two analyses are of the same step"
    return None


def doubles(items: Sequence[Item]) -> list[str]:
    """Say which analyses are in the comparison twice.

    Args:
        items: the analyses.

    Returns:
        A sentence for each that is there already.
    """
    found = []
    for i, item in enumerate(items):
        if first := next((other for other in items[:i] if _same(other.analysis, item.analysis)), None):
            found.append(f"{first.label} and {item.label} are the same analysis")
    return found


def incomparable(items: Sequence[Item], baseline: Item, pairs: dict[str, bool]) -> list[str]:
    """Say what could not be compared with the baseline, and why.

    Args:
        items: the analyses.
        baseline: one of them.
        pairs: whether each is of the same sequences as the baseline.

    Returns:
        Sentences.
    """
    notes = [_sampled_positions(item) for item in items if item.analysis.positions is not None]
    origin = baseline.analysis
    for item in items:
        a = item.analysis
        if not pairs[item.label]:
            notes.append(f"{item.label} is of other responses than {baseline.label}: unpaired")
        if a.n_layers != origin.n_layers:
            notes.append(
                f"{item.label} has {a.n_layers} layers and {baseline.label} {origin.n_layers}: no differences per "
                "layer, only by relative depth"
            )
        if a.vocab_size != origin.vocab_size:
            notes.append(
                f"{item.label} has {a.vocab_size} tokens and {baseline.label} {origin.vocab_size}: in nats a larger "
                "vocabulary has more entropy; entropy_share is in units of ln V"
            )
    return notes


def few_prompts(items: Sequence[Item]) -> list[str]:
    """Say which analyses have too few prompts for their intervals.

    Args:
        items: the analyses.

    Returns:
        A sentence for each number of prompts that is too small.
    """
    labels: dict[int, list[str]] = {}
    for item in items:
        labels.setdefault(item.analysis.n_prompts, []).append(item.label)
    found = ((who, console.few_prompts(n)) for n, who in sorted(labels.items()))
    return [
        f"{'all analyses' if len(who) == len(items) else ', '.join(who)} {'has' if len(who) == 1 else 'have'} {few}"
        for who, few in found
        if few
    ]


def _sampled_positions(item: Item) -> str:
    found = item.analysis.positions or {}
    return (
        f"{item.label} was analysed at {found['analysed']} of {found['total']} positions (tolerance "
        f"{found['tolerance']:g}): its intervals hold that too, and single responses are estimates"
    )


def _same(one: Analysis, other: Analysis) -> bool:
    """One object, one directory, or a copy: a checkpoint that training left as it was has another name."""
    if one is other:
        return True
    if one.path is not None and other.path is not None and one.path.resolve() == other.path.resolve():
        return True
    return (one.name, one.model, one.config) == (other.name, other.model, other.config) and one.layers.equals(
        other.layers
    )
