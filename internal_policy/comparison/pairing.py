"""One analysis of a comparison: the values of its responses in an order that paired analyses share, and their sums.

Two analyses are paired if they are of the same sequences: the same ids with the same prompt length. What makes a
response uncertain is then common to both, so the mean is over each response's own difference, clustered by prompt like
any other mean here. Everything compared is linear in the values of a response (a difference, a slope over steps, an
entropy interpolated between layers), so that is exact. Analyses of different sequences are independent: variances add,
and each end of the interval lies as far from the difference as the root of the sum of squares of the two intervals'
distances (Zou and Donner 2008), which like Welch's interval does not need equal variances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from internal_policy.analysis.results import Analysis
from internal_policy.comparison.convergence import entropy_curves
from internal_policy.statistics import SITES, Floats, Ints, clustered_mean, confidence_interval

QUANTITIES = ("entropy_out", "entropy_share", "change", "cosine")
"""What is compared per layer; entropy_share is the entropy of the output over ln V."""
DEPTHS = np.linspace(0.0, 1.0, 21)
"""Relative depths at which models of different numbers of layers are compared."""


@dataclass(frozen=True, eq=False)
class Item:
    """One analysis in a comparison."""

    label: str
    """Its name in tables and figures."""
    step: float
    """Its step of a training."""
    analysis: Analysis
    """The analysis."""

    @property
    def log_vocabulary(self) -> float:
        """Ln V, the highest entropy there is, nats."""
        return float(np.log(self.analysis.vocab_size))

    @cached_property
    def order(self) -> Ints:
        """Order of the responses by their sequences, in which paired analyses agree, [G]."""
        keys = self.sequences
        return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)

    @cached_property
    def sequences(self) -> list[tuple[int, tuple[int, ...]]]:
        """Prompt length and ids of each response."""
        rows = self.analysis.sequences
        ids = (tuple(map(int, row)) for row in rows["input_ids"])
        return [(int(length), row) for length, row in zip(rows["prompt_length"], ids, strict=True)]

    @cached_property
    def tokens_and_prompts(self) -> tuple[Floats, Floats]:
        """Response tokens and prompt of each response, [G] each, in `order`."""
        return self._stream[1][self.order], self._stream[2][self.order]

    @cached_property
    def _stream(self) -> tuple[Floats, Floats, Floats]:
        return entropy_curves(self.analysis.responses)

    def values(self, site: str, quantity: str) -> Floats | None:
        """Return the means of each response.

        Args:
            site: layer, attn or ffn.
            quantity: one of `QUANTITIES`.

        Returns:
            [G, L] in `order`; None if the quantity was not measured.
        """
        column = "entropy_out" if quantity == "entropy_share" else quantity
        values = self._tables.get(site, {}).get(column)
        if values is None or np.isnan(values).all():
            return None
        return values / self.log_vocabulary if quantity == "entropy_share" else values

    @cached_property
    def _tables(self) -> dict[str, dict[str, Floats]]:
        """Site and column: [G, L]."""
        rows = self.analysis.responses.sort_values(["response", "layer"], kind="stable")
        shape = (len(self.sequences), self.analysis.n_layers)
        columns = [q for q in QUANTITIES if q in rows.columns]
        return {
            site: {c: part[c].to_numpy(dtype=np.float64).reshape(shape)[self.order] for c in columns}
            for site in SITES
            if not (part := rows[rows["site"] == site]).empty
        }

    def at_depths(self) -> Floats:
        """H^0..H^L of each response at `DEPTHS`, linear between layers, nats, [G, D] in `order`."""
        curves = self._stream[0]
        layers = np.arange(curves.shape[1]) / (curves.shape[1] - 1)
        return np.array([np.interp(DEPTHS, layers, curve) for curve in curves])[self.order]


def is_paired(first: Item, second: Item) -> bool:
    """Return whether two analyses are of the same sequences, in whatever order."""
    a, b = first.sequences, second.sequences
    return len(a) == len(b) and all(a[i] == b[j] for i, j in zip(first.order, second.order, strict=True))


def group_paired(items: Sequence[Item]) -> list[list[int]]:
    """Group analyses of the same sequences: their indices, a list for each group."""
    groups: list[list[int]] = []
    for i, item in enumerate(items):
        group = next((g for g in groups if is_paired(items[g[0]], item)), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def combine(
    items: Sequence[Item], values: Sequence[Floats], weights: Sequence[float], groups: Sequence[Sequence[int]]
) -> dict[str, Floats]:
    """Compute mean, standard error and 95% interval of a weighted sum over analyses.

    Args:
        items: the analyses.
        values: the means of the responses of each, [G, K].
        weights: one for each; +1 and -1 for a difference.
        groups: indices of analyses of the same sequences, from `group_paired`: exact within a group, independent
            between groups.

    Returns:
        value, stderr, low, high, [K] each.
    """
    total = np.zeros((4, values[0].shape[1]))
    for group in groups:
        # An analysis without weight must not contribute its errors.
        sums = [weights[i] * values[i] for i in group if weights[i] != 0.0]
        if not sums:
            continue
        tokens, prompts = items[group[0]].tokens_and_prompts
        mean, stderr = clustered_mean(np.sum(sums, axis=0), tokens, prompts)
        low, high = confidence_interval(np.sum(sums, axis=0), tokens, prompts)
        total += np.stack([mean, stderr**2, (mean - low) ** 2, (high - mean) ** 2])
    mean, (stderr, below, above) = total[0], np.sqrt(total[1:])
    return {"value": mean, "stderr": stderr, "low": mean - below, "high": mean + above}
