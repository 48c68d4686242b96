"""The tables of an ablation: means per response, and from them a row per intervention with clustered errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from internal_policy import statistics
from internal_policy.statistics import Floats
from internal_policy.utils.options import spans

if TYPE_CHECKING:
    from internal_policy.interventions.changes import Intervention

QUANTITIES = ("kl", "entropy_change", "log_prob_change", "flips")
"""KL(pi_theta || pi_theta'), H(pi_theta') - H(pi_theta), the change of the log-probability of the token that was
sampled, all in nats, and the share of tokens at which the most probable token is another one."""
CLEAN_QUANTITIES = ("entropy", "log_prob")
"""H(pi_theta) and the log-probability of the token that was sampled, without a change; nats."""
KEYS = ("layer", "last_layer", "site", "head", "expert", "how")
"""The columns that say what was changed, of which a table has those that it needs."""
_ENDS = ("", "_stderr", "_low", "_high")


def key_table(interventions: Sequence[Intervention]) -> pd.DataFrame:
    """Describe interventions, one row each.

    Args:
        interventions: what was changed, each time.

    Returns:
        Columns layer (the lowest, from 1), last_layer if several are changed together, site (``attn+ffn`` if several
        are), head or expert if parts are changed: a number one by one, a text such as ``1,4-6`` together; and how.
    """
    rows = []
    for each in interventions:
        changes, first = each.changes, each.changes[0]
        row: dict[str, object] = {"layer": each.first, "last_layer": max(change.layer for change in changes)}
        row["site"] = "+".join(dict.fromkeys(change.site for change in changes))
        for part in ("head", "expert"):
            numbers = {getattr(change, part) for change in changes} - {None}
            row[part] = None if not numbers else spans(numbers) if len(changes) > 1 else numbers.pop()
        rows.append({**row, "how": first.how})
    table = pd.DataFrame(rows)
    if (table["layer"] == table["last_layer"]).all():
        table = table.drop(columns="last_layer")
    for part in ("head", "expert"):
        if part in table and table[part].isna().all():
            table = table.drop(columns=part)
    return table


def response_effects(
    keys: pd.DataFrame, changed: Floats, clean: Floats, prompts: Sequence[int], n_tokens: Sequence[int]
) -> pd.DataFrame:
    """Arrange the effects on each response.

    Args:
        keys: a row per intervention.
        changed: [R, interventions, 4] means over tokens of the ``QUANTITIES``.
        clean: [R, 2] means over tokens of the ``CLEAN_QUANTITIES``.
        prompts: the number of each response's prompt, from 0.
        n_tokens: response tokens of each.

    Returns:
        A row per response (from 0) and intervention: response, prompt, n_tokens, the keys, the quantities, and entropy
        and log_prob without the change.
    """
    n_responses, n_interventions, _ = changed.shape
    table = pd.DataFrame(
        {
            name: np.repeat(values, n_interventions)
            for name, values in (("response", range(n_responses)), ("prompt", prompts), ("n_tokens", n_tokens))
        }
    )
    table = pd.concat([table, pd.concat([keys] * n_responses, ignore_index=True)], axis=1)
    for place, name in enumerate(QUANTITIES):
        table[name] = changed[:, :, place].ravel()
    for place, name in enumerate(CLEAN_QUANTITIES):
        table[name] = np.repeat(clean[:, place], n_interventions)
    return table


def effect_table(responses: pd.DataFrame) -> pd.DataFrame:
    """Tabulate token means of the effects with errors clustered by prompt, one row per intervention.

    Args:
        responses: as ``response_effects`` returns them.

    Returns:
        The keys, each quantity with its ``_stderr``, ``_low`` and ``_high`` (ends of the 95% interval), and n_tokens.
    """
    names = keys_of(responses)
    first = responses[responses["response"] == responses["response"].iloc[0]]
    n_interventions = len(first)
    values = responses[list(QUANTITIES)].to_numpy(dtype=np.float64).reshape(-1, n_interventions * len(QUANTITIES))
    tokens, prompts = (responses[name].to_numpy()[::n_interventions] for name in ("n_tokens", "prompt"))
    mean, stderr = statistics.clustered_mean(values, tokens, prompts)
    low, high = statistics.confidence_interval(values, tokens, prompts)
    table: pd.DataFrame = first[names].reset_index(drop=True)
    for place, name in enumerate(QUANTITIES):
        for end, column in zip(_ENDS, (mean, stderr, low, high), strict=True):
            table[name + end] = column[place :: len(QUANTITIES)]
    table["n_tokens"] = int(tokens.sum())
    return table


def clean_means(responses: pd.DataFrame) -> dict[str, float]:
    """Compute the token means of the final policy without a change.

    Args:
        responses: as ``response_effects`` returns them.

    Returns:
        entropy and log_prob, each with ``_stderr``; nats.
    """
    rows = responses.drop_duplicates("response")
    mean, stderr = statistics.clustered_mean(rows[list(CLEAN_QUANTITIES)], rows["n_tokens"], rows["prompt"])
    return {
        name + end: float(values[place])
        for place, name in enumerate(CLEAN_QUANTITIES)
        for end, values in (("", mean), ("_stderr", stderr))
    }


def accuracy_table(samples: pd.DataFrame) -> pd.DataFrame:
    """Compute how often responses that were sampled under each intervention are correct.

    Args:
        samples: a row per response: intervention (from 1; 0 is the model without a change), prompt, score.

    Returns:
        A row per intervention, from 0: accuracy and accuracy_change, the latter paired by prompt, each with its
        ``_stderr``, ``_low`` and ``_high`` (95% interval over prompts).
    """
    correct = samples.assign(correct=samples["score"] >= 1.0)
    shares = correct.pivot_table(index="prompt", columns="intervention", values="correct", aggfunc="mean").to_numpy(
        dtype=np.float64
    )
    weights = np.ones(len(shares))
    changes = shares - shares[:, :1]
    table: dict[str, Floats] = {}
    for name, values, interval in (
        ("accuracy", shares, statistics.rate_interval),
        ("accuracy_change", changes, statistics.rate_difference_interval),
    ):
        columns = (*statistics.clustered_mean(values, weights), *interval(values))
        table |= {name + end: column for end, column in zip(_ENDS, columns, strict=True)}
    return pd.DataFrame(table)


def keys_of(table: pd.DataFrame) -> list[str]:
    """The columns of a table that say what was changed."""
    return [name for name in KEYS if name in table.columns]
