"""Avg@K and Pass@K of problems that were each sampled n times, with intervals over problems.

The problems are the random sample: responses to one problem share its difficulty. Each problem is therefore one
observation, whatever its number of responses, and the intervals are those of a mean over problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy import statistics
from internal_policy.statistics import Floats, rate_interval
from internal_policy.utils.errors import UserError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate without bias the probability that at least one of k samples is correct, from n of which c are.

    1 - C(n-c, k) / C(n, k) (arXiv 2512.19673v3, appendix A.5; Chen et al. 2021, arXiv 2107.03374, eq. 1).

    Args:
        n: samples of the problem.
        c: how many of them are correct, 0 to n.
        k: samples drawn, 1 to n.

    Returns:
        The estimate, 0 to 1, exact to rounding for any n.

    Raises:
        UserError: k is above n, or a number is out of range.
    """
    return float(pass_at_k_each([n], [c], k)[0])


def pass_at_k_each(n: npt.ArrayLike, c: npt.ArrayLike, k: int) -> Floats:
    """Compute Pass@K of many problems at once; see `pass_at_k`.

    Args:
        n: samples of each problem, [P].
        c: correct samples of each problem, [P].
        k: samples drawn, at most the smallest n.

    Returns:
        [P] estimates, 0 to 1.

    Raises:
        UserError: k is above some n, or a number is out of range.
    """
    counts, correct = np.asarray(n, dtype=np.int64), np.asarray(c, dtype=np.int64)
    if counts.ndim != 1 or counts.shape != correct.shape:
        raise UserError(f"n {counts.shape} and c {correct.shape} must both be [P]")
    if np.any(correct < 0) or np.any(correct > counts):
        raise UserError("a number of correct samples lies outside 0 to n; each c must be from 0 to its n")
    if k < 1 or np.any(counts < k):
        least = int(counts.min(initial=k))
        raise UserError(f"Pass@{k} of {least} samples is not defined; needed is K from 1 to the number of samples")
    values = np.ones(counts.shape)
    for size in np.unique(counts):
        # C(n-c, k) / C(n, k) is the product of (1 - k/i) over i = n-c+1 .. n. A sum of logarithms of one sign neither
        # overflows nor cancels, and expm1 keeps a small probability exact.
        i = np.arange(size, k, -1, dtype=np.float64)
        none_correct = np.concatenate([[0.0], np.cumsum(np.log1p(-k / i))])
        rows = (counts == size) & (correct <= size - k)
        values[rows] = -np.expm1(none_correct[correct[rows]])
    return values


def average(problems: pd.DataFrame) -> dict[str, float]:
    """Compute Avg@K, the mean over problems of the share of their K samples that are correct (the paper's pass@1).

    Args:
        problems: a row per problem, with n and correct.

    Returns:
        mean, stderr (clustered by problem), low and high (95% interval); 0 to 1.
    """
    shares = (problems["correct"] / problems["n"]).to_numpy(dtype=np.float64)[:, None]
    mean, stderr = statistics.clustered_mean(shares, np.ones(len(shares)))
    low, high = rate_interval(shares)
    return {"mean": float(mean[0]), "stderr": float(stderr[0]), "low": float(low[0]), "high": float(high[0])}


def pass_values(problems: pd.DataFrame, ks: Sequence[int]) -> Floats:
    """Compute Pass@K of each problem for each K, [P, number of K]."""
    return np.stack([pass_at_k_each(problems["n"], problems["correct"], k) for k in ks], axis=1)


def pass_table(problems: pd.DataFrame, ks: Sequence[int]) -> pd.DataFrame:
    """Compute Pass@K, the mean over problems, for each K.

    Args:
        problems: a row per problem, with n and correct.
        ks: the K, each at most the smallest n.

    Returns:
        A row per K: k, value, low and high (95% interval over problems); 0 to 1.
    """
    values = pass_values(problems, ks)
    low, high = rate_interval(values)
    return pd.DataFrame({"k": list(ks), "value": values.mean(axis=0), "low": low, "high": high})
