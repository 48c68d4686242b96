"""Synthetic evaluations from counts of correct samples, and the exact Pass@K."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pandas as pd

from internal_policy.evaluation import Evaluation, metrics

SHOWN = ["problem", "prompt", "answer", "n", "correct", "mean_score", "mean_length", "truncated"]


def exact(n, c, k):
    return float(1 - Fraction(comb(n - c, k), comb(n, k)))


def evaluation_of_counts(correct, n=16, name="m", benchmark="b", ks=None):
    """An evaluation with the given number of correct samples per problem."""
    table = pd.DataFrame({"problem": range(1, len(correct) + 1), "n": n, "correct": correct})
    table["prompt"] = [f"question {i}" for i in table["problem"]]
    table["answer"] = "1"
    table[["mean_score", "mean_length", "truncated"]] = 0.5, 3.0, 0
    samples = pd.DataFrame(
        [{"problem": 1, "sample": 1, "response": "é\r\n\u2028", "score": 0.5, "n_tokens": 3, "truncated": False}]
    )
    ks = ks or sorted({1, min(4, n), n})
    avg, passes = metrics.average(table), metrics.pass_table(table, ks)
    return Evaluation(name, {}, benchmark, {"samples": n}, table[SHOWN], passes, avg, samples)
