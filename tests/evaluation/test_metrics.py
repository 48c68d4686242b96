"""Pass@K, intervals and paired tests, each against an independent formula or by simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from synthetic_evaluations import evaluation_of_counts, exact

from internal_policy import UserError, statistics
from internal_policy.evaluation import compare, metrics
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.paired_tests import sign_flip_test


@pytest.mark.parametrize("n", [1, 2, 7, 16, 32, 300, 347])
def test_pass_at_k_is_the_exact_fraction(n):
    ks = sorted({1, 2, 4, 16, 64, 256, n - 1, n} & set(range(1, n + 1)))
    for k in ks:
        got = metrics.pass_at_k_each([n] * (n + 1), range(n + 1), k)
        want = [exact(n, c, k) for c in range(n + 1)]
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=0)
        assert [metrics.pass_at_k(n, c, k) for c in (0, n // 2, n)] == [got[0], got[n // 2], got[n]]


def test_pass_at_k_of_ten_thousand_samples_is_numerically_stable():
    for c, k in [(0, 256), (1, 1), (1, 10_000), (3, 2), (17, 256), (5000, 4), (9999, 1), (9999, 2), (9745, 256)]:
        assert metrics.pass_at_k(10_000, c, k) == pytest.approx(exact(10_000, c, k), rel=1e-11, abs=0)


def test_pass_at_k_supports_different_numbers_of_samples():
    n, c = [4, 300, 4, 16, 300], [1, 20, 0, 16, 300]
    want = [exact(*pair, 4) for pair in zip(n, c, strict=True)]
    np.testing.assert_allclose(metrics.pass_at_k_each(n, c, 4), want, rtol=1e-13)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(4, 1, 5, "Pass@5 of 4"), (4, 5, 2, "correct"), (4, -1, 2, "correct"), (4, 1, 0, "Pass@0")],
)
def test_pass_at_k_refuses_undefined_inputs(n, c, k, expected):
    with pytest.raises(UserError, match=expected):
        metrics.pass_at_k(n, c, k)


def test_default_k_are_those_of_the_paper():
    assert EvaluateConfig("testbed/qwen3", "math500", samples=300).ks == (1, 4, 16, 64, 256, 300)
    assert EvaluateConfig("testbed/qwen3", "math500").ks == (1, 4, 16)
    assert [EvaluateConfig("m", b).n for b in ("amc23", "math500", "aime24", "aime25", "x.jsonl")] == [
        16,
        16,
        32,
        32,
        16,
    ]
    assert EvaluateConfig("m", "math500", temperature=0).n == 1


@pytest.mark.parametrize(
    ("shape", "n", "k"), [((0.3, 0.5), 16, 1), ((0.1, 8.0), 32, 4), ((1.0, 1.0), 300, 256), ((3.0, 0.3), 16, 16)]
)
def test_interval_coverage_with_nearly_constant_outcomes(shape, n, k):
    """Without the widening the last two have coverage 0.25 and 0.01, because nearly all outcomes are 1."""
    rng = np.random.default_rng(0)
    truth = np.mean(1 - (1 - rng.beta(*shape, size=400_000)) ** k)
    values = [metrics.pass_at_k_each(np.full(40, n), rng.binomial(n, rng.beta(*shape, size=40)), k) for _ in range(600)]
    low, high = statistics.rate_interval(np.transpose(values))
    assert np.mean((low <= truth) & (truth <= high)) >= 0.93
    assert np.all((low >= 0) & (high <= 1))


def test_paired_differences_are_covered_and_have_shorter_intervals():
    rng = np.random.default_rng(1)

    def draw(size):
        logit = rng.normal(-1, 2, size)
        return 1 / (1 + np.exp(-logit)), 1 / (1 + np.exp(-(logit + 0.4 + rng.normal(0, 0.5, size))))

    one, other = draw(400_000)
    truth = np.mean(other - one)
    before, after = np.transpose([[rng.binomial(16, p) / 16 for p in draw(40)] for _ in range(1000)], (1, 2, 0))
    low, high = statistics.rate_difference_interval(after - before)
    assert np.mean((low <= truth) & (truth <= high)) >= 0.93
    alone = [np.subtract(*statistics.rate_interval(v)) for v in (before, after)]
    assert np.mean(high - low) < 0.6 * np.mean(np.hypot(*alone))


def test_a_comparison_agrees_with_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.binomial(16, 0.6, 50), rng.binomial(16, 0.5, 50)
    c = compare(evaluation_of_counts(a), evaluation_of_counts(b))
    d = (a - b) / 16
    assert c.difference == pytest.approx(d.mean())
    assert c.p_value == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue)
    assert c.stderr == pytest.approx(scipy.stats.sem(d))
    assert (c.n_better, c.n_worse, c.n_equal) == ((a > b).sum(), (a < b).sum(), (a == b).sum())
    for row in c.pass_at_k.to_dict("records"):
        means = [np.mean([exact(16, x, int(row["k"])) for x in side]) for side in (a, b)]
        assert row["difference"] == pytest.approx(means[0] - means[1])
        assert [row["first"], row["second"]] == pytest.approx(means)
        assert row["low"] <= row["difference"] <= row["high"]

    def mean(x, axis):
        return np.mean(x, axis=axis)

    for n in (9, 50):
        part = d[:n] if n == 50 else np.array([0.3, 0.1, -0.2, 0.25, 0.0, 0.4, 0.1, -0.05, 0.3])
        # All flips are both samples' exchanges within a pair.
        options = {"permutation_type": "samples", "alternative": "two-sided", "vectorized": True}
        want = scipy.stats.permutation_test((part,), mean, n_resamples=20_000 if n > 13 else np.inf, **options).pvalue
        assert sign_flip_test(part, seed=3) == pytest.approx(want, abs=1e-12 if n == 9 else 0.012)


@pytest.mark.parametrize("difference", [1, -3, 16])
def test_equal_differences_of_all_problems_are_not_taken_for_certainty(difference):
    n = 10
    base = np.arange(n) % 3 if difference < 16 else np.zeros(n, dtype=int)
    # 30 samples, so that the differences of the rates are equal but for rounding.
    a, b = base + max(difference, 0), base + max(-difference, 0)
    c = compare(evaluation_of_counts(a, n=30), evaluation_of_counts(b, n=30))
    mean, unseen = difference / 30, 1 - 0.05 ** (1 / n)
    assert c.low == pytest.approx(mean - unseen * (1 + mean))
    assert c.high == pytest.approx(mean + unseen * (1 - mean))
    assert np.isnan(c.p_value)
    assert c.p_permutation == 2 / 2**n
    assert (c.pass_at_k["low"] < c.pass_at_k["high"]).all()


def test_of_differences_that_cancel_every_flip_is_as_far():
    # The sum is 5.6e-17 in float64.
    assert sign_flip_test(np.array([0.1, 0.1, 0.1, -0.3])) == 1.0
    assert sign_flip_test(np.array([0.1] * 15 + [-1.5])) == 1.0
