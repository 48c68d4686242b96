"""Comparison of two evaluations of the same problems, paired by problem."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from internal_policy import statistics
from internal_policy.evaluation import metrics
from internal_policy.evaluation.results import Evaluation
from internal_policy.statistics import Floats
from internal_policy.utils.errors import UserError

_FLIPS = 10_000
_FLIPS_PER_CHUNK = 500
_EXACT = 13
_SETTINGS = ("template", "temperature", "token_limit", "reward", "samples")
_ON = ("dtype", "device")


@dataclass(frozen=True)
class Comparison:
    """How much better the first evaluation is than the second, on the problems that both have."""

    first: str
    """Name of the first model."""
    second: str
    """Name of the second model."""
    benchmark: str
    """The benchmark's name."""
    n_problems: int
    """Number of problems."""
    difference: float
    """Avg@K of the first less that of the second, -1 to 1."""
    stderr: float
    """Its standard error, clustered by problem."""
    low: float
    """Lower end of its 95% interval."""
    high: float
    """Upper end of its 95% interval."""
    p_value: float
    """Of the paired t test over problems, two-sided; NaN if all problems differ by the same amount, which leaves t
    undefined, and 1 if none differs."""
    p_permutation: float
    """Of the sign-flip permutation test over problems, two-sided: valid for any distribution of the differences."""
    n_better: int
    """Problems that the first solves more often."""
    n_worse: int
    """Problems that the second solves more often."""
    n_equal: int
    """Problems that both solve equally often."""
    pass_at_k: pd.DataFrame
    """A row per K that both have: k, first, second, difference, low, high (95% interval over problems)."""
    differing: dict[str, tuple[Any, Any]]
    """Settings other than the model that differ between the two; the difference is then due to both."""

    def __repr__(self) -> str:
        return (
            f"Comparison({self.first!r} - {self.second!r} on {self.benchmark!r}: {self.difference:+.4f} "
            f"[{self.low:+.4f}, {self.high:+.4f}], p {self.p_value:.2g})"
        )


def compare(a: Evaluation, b: Evaluation, *, seed: int = 0) -> Comparison:
    """Compare two evaluations of the same problems, paired by problem.

    What makes a problem hard is common to both models, so that the differences between the rates of each problem vary
    much less than the rates: the interval and the tests are over those differences.

    Args:
        a: the first evaluation.
        b: the second; differences are first less second.
        seed: of the permutation test, if there are too many problems to enumerate all flips.

    Returns:
        The comparison.

    Raises:
        UserError: the evaluations are not of the same problems.
    """
    _require_same_problems(a, b)
    d = _rates(a) - _rates(b)
    mean, stderr = statistics.clustered_mean(d[:, None], np.ones(len(d)))
    low, high = statistics.rate_difference_interval(d[:, None])
    differing = {
        **{n: (a.config.get(n), b.config.get(n)) for n in _SETTINGS if a.config.get(n) != b.config.get(n)},
        # The dtype and device that were used, not those asked for: "auto" depends on the machine.
        **{n: (a.model.get(n), b.model.get(n)) for n in _ON if a.model.get(n) != b.model.get(n)},
    }
    return Comparison(
        first=a.name,
        second=b.name,
        benchmark=a.benchmark,
        n_problems=len(d),
        difference=float(mean[0]),
        stderr=float(stderr[0]),
        low=float(low[0]),
        high=float(high[0]),
        p_value=_paired_t(d, float(mean[0]), float(stderr[0])),
        p_permutation=sign_flip_test(d, seed=seed),
        n_better=int((d > 0).sum()),
        n_worse=int((d < 0).sum()),
        n_equal=int((d == 0).sum()),
        pass_at_k=_pass_differences(a, b),
        differing=differing,
    )


def sign_flip_test(differences: Floats, *, seed: int = 0) -> float:
    """Two-sided permutation test of paired differences, whose signs are random under the null hypothesis.

    With up to 13 differences other than zero all flips are enumerated; otherwise 10 000 are drawn, and the observed one
    is counted among them (Phipson and Smyth 2010), so that the p-value is never 0. For enumerated flips the result is
    that of `scipy.stats.permutation_test`; where it draws, it doubles a one-sided p-value, which is noisier.

    Args:
        differences: one per problem, [P].
        seed: of the random generator.

    Returns:
        The p-value; 1 if nothing differs.
    """
    d = differences[differences != 0]
    if d.size == 0:
        return 1.0
    # Sums of the same numbers in a different order differ by rounding, which grows with the numbers: their sum may
    # itself be nothing else.
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if d.size <= _EXACT:
        flips = (np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1
        return float(np.mean(np.abs((1 - 2 * flips) @ d) >= observed))
    generator = np.random.default_rng(seed)
    as_far = 0
    for _ in range(_FLIPS // _FLIPS_PER_CHUNK):
        flips = generator.integers(0, 2, size=(_FLIPS_PER_CHUNK, d.size))
        as_far += int(np.count_nonzero(np.abs((1 - 2 * flips) @ d) >= observed))
    return (as_far + 1) / (_FLIPS + 1)


def _rates(evaluation: Evaluation) -> Floats:
    problems = evaluation.problems
    return (problems["correct"] / problems["n"]).to_numpy(dtype=np.float64)


def _paired_t(d: Floats, mean: float, stderr: float) -> float:
    from scipy.stats import t as scipy_t

    if not d.any():
        return math.nan if math.isnan(stderr) else 1.0
    if math.isnan(stderr) or statistics.without_spread(d[:, None])[0]:
        return math.nan
    return float(2 * scipy_t.sf(abs(mean) / stderr, len(d) - 1))


def _pass_differences(a: Evaluation, b: Evaluation) -> pd.DataFrame:
    ks = sorted(set(map(int, a.pass_at_k["k"])) & set(map(int, b.pass_at_k["k"])))
    columns = ["k", "first", "second", "difference", "low", "high"]
    if not ks:
        return pd.DataFrame(columns=columns)
    first, second = metrics.pass_values(a.problems, ks), metrics.pass_values(b.problems, ks)
    low, high = statistics.rate_difference_interval(first - second)
    means = (first.mean(axis=0), second.mean(axis=0), (first - second).mean(axis=0))
    return pd.DataFrame(dict(zip(columns, (ks, *means, low, high), strict=True)))


def _require_same_problems(a: Evaluation, b: Evaluation) -> None:
    if a.n_problems != b.n_problems:
        raise UserError(
            f"{a.name} was evaluated on {a.n_problems} problems ({a.benchmark}) and {b.name} on {b.n_problems} "
            f"({b.benchmark}); needed are the same problems: evaluate both with the same --benchmark and --max-problems"
        )
    one, other = (e.problems[["prompt", "answer"]].to_numpy(dtype=object) for e in (a, b))
    if unlike := [i for i, (x, y) in enumerate(zip(one, other, strict=True), start=1) if list(x) != list(y)]:
        raise UserError(
            f"{a.name} on {a.benchmark} and {b.name} on {b.benchmark} differ in problem {unlike[0]}; needed are the "
            "same problems in the same order: evaluate both with the same --benchmark"
        )
