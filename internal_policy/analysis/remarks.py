"""Sentences about an analysis for the terminal and the report, in addition to its layers and boundary layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from internal_policy.analysis.results import Analysis
from internal_policy.utils.console import plus_minus
from internal_policy.utils.errors import counted


def remarks(analysis: Analysis) -> list[str]:
    """Sentences about the policy's entropy, and about cut responses, rewards, baseline and heads if there are any."""
    entropy = analysis.policy_entropy
    found = [
        f"policy entropy H(π_θ) {entropy['mean']:.4f}{plus_minus(entropy['stderr'], '.4f')} nats; "
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
    if (heads := analysis.additions.get("heads")) is not None:
        found.append(_heads_line(heads))
    if (experts := analysis.additions.get("experts")) is not None:
        found.append(_experts_line(experts))
    if (table := analysis.additions.get("divergences")) is not None:
        found.append(divergence_remark(table))
    return found


def _heads_line(table: pd.DataFrame) -> str:
    """The heads whose writes change the logit of the sampled token most."""
    heads = table[table["head"] > 0]
    top = heads.loc[heads["attribution"].abs().nlargest(3).index].to_dict("records")
    named = [f"layer {row['layer']} head {row['head']} ({row['attribution']:+.3f})" for row in top]
    which = "the head that changes" if len(top) == 1 else f"the {len(top)} heads that change"
    return f"{which} the logit of the sampled token most: {', '.join(named)}"


def _experts_line(table: pd.DataFrame) -> str:
    """The routed expert with the largest share of the tokens, and the even share."""
    routed = table[table["expert"] > 0]
    (top,) = routed.nlargest(1, "load").to_dict("records")
    even = routed.loc[routed["layer"] == top["layer"], "load"].mean()
    return (
        f"the busiest of the routed experts, {top['expert']} in layer {top['layer']}, takes {top['load']:.1%} of the "
        f"tokens; an even share is {even:.1%}"
    )


def divergence_remark(table: pd.DataFrame) -> str:
    """Say from which layer on the most probable token is mostly that of pi_theta.

    Args:
        table: ``divergences`` of an analysis.

    Returns:
        A sentence with the first layer from which on they agree on at least half of the tokens.
    """
    rows = table.sort_values("layer").set_index("layer")
    below = rows.index[rows["top1"] < 0.5]
    first = int(below.max()) + 1 if len(below) else 1
    if first > len(rows):
        last = rows.loc[len(rows)]
        return (
            f"not even the last layer shares the top token with π_θ in half of the tokens ({last['top1']:.0%}); "
            f"KL(π_θ‖π^L) {last['kl_policy']:.3f} nats"
        )
    row, own = rows.loc[first], "from the first layer on" if first == 1 else f"from layer {first} on"
    return (
        f"{own} the top token is that of π_θ in at least half of the tokens ({row['top1']:.0%} there, with "
        f"KL(π_θ‖π^l) {row['kl_policy']:.3f} nats)"
    )


def positions_line(positions: Mapping[str, Any]) -> str:
    """One line about how many positions were analysed, and the uncertainty that comes from it."""
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
