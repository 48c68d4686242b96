"""Clustered means, intervals and bootstraps against formulas written out by hand and against simulated truth."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from internal_policy.statistics import (
    QUANTITIES,
    bootstrap_means,
    change_curves,
    clustered_difference,
    clustered_mean,
    confidence_interval,
    difference_table,
    layer_table,
    policy_entropy,
)
from internal_policy.utils.errors import UserError

ROUNDING = 1e-12  # sums of a few hundred float64 numbers of order 1


def ragged(n_responses: int = 60, n_columns: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 400, n_responses)
    return generator.gamma(2.0, 0.5, (n_responses, n_columns)), lengths


def sandwich_by_loops(values: np.ndarray, lengths: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """CR1 sandwich of OLS on a constant, token by token as a regression package would see it (one column)."""
    tokens = np.repeat(values, lengths)
    groups = np.repeat(clusters, lengths)
    mean = tokens.mean()
    meat = sum((tokens[groups == c] - mean).sum() ** 2 for c in set(clusters.tolist()))
    n_clusters = len(set(clusters.tolist()))
    return mean, np.sqrt(n_clusters / (n_clusters - 1) * meat) / tokens.size


def responses_frame(
    changes: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, sites: tuple[str, ...] = ("layer", "attn", "ffn")
) -> pd.DataFrame:
    """One row per response, layer and site; `changes` is [G, L], each site adding its own offset."""
    rows = []
    for g, n in enumerate(lengths):
        for layer in range(1, changes.shape[1] + 1):
            for offset, site in enumerate(sites):
                change = changes[g, layer - 1] + 10 * offset
                cosine = np.nan if site == "layer" else 0.1
                parts = (change - 0.5, 0.5, cosine, 1.0, 2.0)
                rows.append((g, prompts[g], layer, site, n, 1.0, 1.0 + change, change, *parts))
        rows.append((g, prompts[g], changes.shape[1], "policy", n, 5.0 + g, 2.0 + g, *[np.nan] * 6))
    return pd.DataFrame(rows, columns=["response", "prompt", "layer", "site", "n_tokens", *QUANTITIES])


def test_mean_and_error_of_two_responses_by_hand():
    # m = (1*1 + 3*5)/4 = 4; residual sums 1*(1-4) = -3 and 3*(5-4) = 3; sqrt(2/1 * (9+9)) / 4 = 1.5
    mean, stderr = clustered_mean([[1.0], [5.0]], [1, 3])
    assert mean == pytest.approx([4.0], abs=ROUNDING)
    assert stderr == pytest.approx([1.5], abs=ROUNDING)


@pytest.mark.parametrize("per_prompt", [1, 4])
def test_agrees_with_the_token_level_sandwich(per_prompt: int):
    values, lengths = ragged()
    clusters = np.arange(60) // per_prompt
    mean, stderr = clustered_mean(values, lengths, clusters)
    for column in range(values.shape[1]):
        expected = sandwich_by_loops(values[:, column], lengths, clusters)
        assert (mean[column], stderr[column]) == pytest.approx(expected, rel=1e-10)  # 10^4 float64 additions


def test_equal_lengths_give_the_textbook_error():
    values, _ = ragged()
    _, stderr = clustered_mean(values, np.full(60, 7))
    assert stderr == pytest.approx(values.std(axis=0, ddof=1) / np.sqrt(60), rel=ROUNDING * 100)


def test_agrees_with_the_bootstrap():
    values, lengths = ragged(n_responses=200)
    mean, stderr = clustered_mean(values, lengths)
    draws = bootstrap_means(values, lengths, resamples=4000)
    # Monte Carlo error of a standard deviation from 4000 draws is 1.1%, the linearisation's own is O(1/200)
    assert draws.std(axis=0) == pytest.approx(stderr, rel=0.06)
    assert np.abs(draws.mean(axis=0) - mean) == pytest.approx(np.zeros(4), abs=0.15 * stderr.max())


def test_correlated_samples_of_a_prompt_widen_the_standard_error():
    generator = np.random.default_rng(1)
    prompts = np.repeat(np.arange(15), 8)
    values = (generator.gamma(2.0, 0.5, 15)[prompts] + 0.01 * generator.standard_normal(120))[:, None]
    lengths = np.full(120, 50)
    by_prompt = clustered_mean(values, lengths, prompts)[1][0]
    by_response = clustered_mean(values, lengths)[1][0]
    # eight copies carry the information of one, so the error grows by sqrt(8), but for the factor G/(G-1)
    assert by_prompt / by_response == pytest.approx(np.sqrt(8), rel=0.05)


def test_labels_need_not_be_consecutive_nor_sorted():
    values, lengths = ragged(6)
    _, expected = clustered_mean(values, lengths, [0, 1, 2, 0, 1, 2])
    _, stderr = clustered_mean(values, lengths, [70, -3, 9, 70, -3, 9])
    assert stderr == pytest.approx(expected, rel=ROUNDING * 100)


def test_one_response_has_a_mean_and_no_error():
    mean, stderr = clustered_mean([[2.0, np.nan]], [10])
    low, high = confidence_interval([[2.0, np.nan]], [10])
    assert mean[0] == 2.0
    assert np.isnan(mean[1])
    assert np.isnan([*stderr, *low, *high]).all()
    assert bootstrap_means([[2.0]], [10], resamples=3).ravel().tolist() == [2.0, 2.0, 2.0]


def test_nan_is_excluded_from_its_column_only():
    values, lengths = ragged(12, 2)
    values[::3, 1] = np.nan
    kept = ~np.isnan(values[:, 1])
    mean, stderr = clustered_mean(values, lengths)
    alone = clustered_mean(values[kept, 1:], lengths[kept])
    assert (mean[1], stderr[1]) == pytest.approx((alone[0][0], alone[1][0]), rel=ROUNDING * 100)
    whole = clustered_mean(values[:, :1], lengths)
    assert (mean[0], stderr[0]) == (whole[0][0], whole[1][0])


def test_a_response_without_tokens_changes_nothing():
    values, lengths = ragged(10, 1)
    more = clustered_mean(np.vstack([values, [[99.0]]]), np.append(lengths, 0))
    assert more == clustered_mean(values, lengths)


def test_constant_values_give_an_interval_of_zero_width():
    low, high = confidence_interval(np.full((5, 1), 3.0), [1, 2, 3, 4, 5])
    assert (low[0], high[0]) == pytest.approx((3.0, 3.0), abs=ROUNDING)


def test_columns_may_have_their_own_counts():
    values, _ = ragged()
    counts = np.random.default_rng(1).poisson(3.0, values.shape)
    values = np.where(counts > 0, values, np.nan)
    prompts = np.repeat(np.arange(20), 3)
    together = (*clustered_mean(values, counts, prompts), *confidence_interval(values, counts, prompts))
    for column in range(values.shape[1]):
        own = values[:, column : column + 1], counts[:, column], prompts
        alone = (*clustered_mean(*own), *confidence_interval(*own))
        np.testing.assert_allclose([each[column] for each in together], [each[0] for each in alone], rtol=1e-12)


@pytest.mark.parametrize(("n_clusters", "share"), [(60, 0.25), (200, 0.03)])
def test_95_percent_intervals_of_routed_tokens_cover(n_clusters: int, share: float):
    """Tokens that a router sends to an expert: its share differs between responses, and goes with the value."""

    def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        level = generator.standard_normal(count)
        tokens = generator.integers(100, 512, count)
        rate = 1 / (1 + (1 / share - 1) * np.exp(-0.5 * level))
        return generator.binomial(tokens, rate), tokens, 1.0 + 0.3 * level + 0.2 * generator.standard_normal(count)

    routed, tokens, value = draw(2_000_000, seed=1)
    mean, load = (routed * value).sum() / routed.sum(), routed.sum() / tokens.sum()
    n_data_sets = 1500
    routed, tokens, value = (a.reshape(n_clusters, n_data_sets) for a in draw(n_clusters * n_data_sets, seed=2))
    low, high = confidence_interval(np.where(routed > 0, value, np.nan), routed)
    # the Monte Carlo error of a share of 1500 is 0.006
    assert 0.93 <= np.mean((low <= mean) & (mean <= high)) <= 0.97
    low, high = confidence_interval(routed / tokens, tokens)
    assert 0.93 <= np.mean((low <= load) & (load <= high)) <= 0.97


@pytest.mark.parametrize("n_clusters", [40, 100])
@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.5])
def test_95_percent_intervals_cover(n_clusters: int, correlation: float):
    """Response entropies are lognormal, lengths lognormal and cut at 512 tokens, the two correlated.

    A response's tokens share its level outright, the strongest correlation there can be.
    """
    n_data_sets = 1500

    def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(seed)
        length, other = generator.standard_normal((2, count))
        level = correlation * length + np.sqrt(1 - correlation**2) * other
        return np.clip(np.round(200 * np.exp(0.6 * length)), 1, 512), np.exp(0.4 * level)

    lengths, values = draw(2_000_000, seed=1)
    truth = (lengths * values).sum() / lengths.sum()
    hits = 0
    lengths, values = (a.reshape(n_data_sets, n_clusters) for a in draw(n_data_sets * n_clusters, seed=2))
    for n, v in zip(lengths, values, strict=True):
        low, high = confidence_interval(v[:, None], n)
        hits += low[0] <= truth <= high[0]
    # the Monte Carlo error of a share of 1500 is 0.006
    assert 0.93 <= hits / n_data_sets <= 0.97


def test_bootstrap_is_reproducible_and_resamples_columns_jointly():
    values, lengths = ragged()
    values[:, 1] = -values[:, 0]
    first = bootstrap_means(values, lengths, resamples=600, seed=3)
    assert np.array_equal(first, bootstrap_means(values, lengths, resamples=600, seed=3))
    assert not np.array_equal(first, bootstrap_means(values, lengths, resamples=600, seed=4))
    assert first[:, 1] == pytest.approx(-first[:, 0], abs=ROUNDING)
    assert first.shape == (600, 4)


@pytest.mark.parametrize(
    ("values", "n_tokens", "clusters", "named"),
    [
        ([1.0, 2.0], [1, 1], None, "values"),
        ([[1.0], [2.0]], [1], None, "n_tokens"),
        ([[1.0], [2.0]], [1, -1], None, "negative"),
        ([[1.0], [np.inf]], [1, 1], None, "infinite"),
        ([[1.0], [2.0]], [1, 1], [0], "clusters"),
    ],
)
def test_wrong_input_is_refused_in_one_line(values, n_tokens, clusters, named):
    with pytest.raises(UserError, match=named) as caught:
        clustered_mean(values, n_tokens, clusters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_confidence_level_must_be_between_zero_and_one(level: float):
    with pytest.raises(UserError, match="level"):
        confidence_interval([[1.0], [2.0]], [1, 1], level=level)


def test_layer_table_columns_order_and_values():
    changes, lengths = ragged(12, 3)
    prompts = np.arange(12) // 2
    frame = responses_frame(changes, lengths, prompts)
    table = layer_table(frame.sample(frac=1.0, random_state=0))
    assert list(table.columns) == [
        "layer",
        "site",
        *(q + end for q in QUANTITIES for end in ("", "_stderr", "_low", "_high")),
        "n_tokens",
    ]  # fmt: skip
    assert table["layer"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert table["site"].tolist() == ["layer", "attn", "ffn"] * 3
    mean, stderr = clustered_mean(changes, lengths, prompts)
    ffn = table[table["site"] == "ffn"]
    assert ffn["change"].to_numpy() == pytest.approx(mean + 20, rel=ROUNDING * 100)
    assert ffn["change_stderr"].to_numpy() == pytest.approx(stderr, rel=1e-9)  # cancellation against the offset of 20
    assert (table["n_tokens"] == lengths.sum()).all()
    assert table.loc[table["site"] == "layer", "cosine"].isna().all()
    assert table.loc[table["site"] == "attn", "cosine"].to_numpy() == pytest.approx([0.1] * 3, abs=ROUNDING)


def test_layer_table_of_an_unmeasured_site_has_no_rows():
    changes, lengths = ragged(4, 2)
    frame = responses_frame(changes, lengths, np.arange(4), sites=("ffn",))
    assert layer_table(frame)["site"].tolist() == ["ffn", "ffn"]
    assert layer_table(frame[frame["site"] == "policy"]).empty


def test_policy_entropy_reads_both_ends():
    frame = responses_frame(np.zeros((2, 1)), np.array([1, 3]), np.arange(2))
    # entropies 2, 3 weighed 1:3 -> 2.75; residual sums -0.75, 0.75 -> sqrt(2 * 2 * 0.5625) / 4
    expected = {"mean": 2.75, "stderr": 0.375, "final_state_mean": 5.75, "final_state_stderr": 0.375}
    found = policy_entropy(frame)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=ROUNDING)
    low, high = confidence_interval(np.array([[2.0], [3.0]]), [1, 3])
    assert (found["low"], found["high"]) == (low[0], high[0])
    with pytest.raises(UserError, match="policy"):
        policy_entropy(frame[frame["site"] != "policy"])


def test_change_curves_resample_prompts_jointly_over_layers():
    changes, lengths = ragged(40, 3)
    changes[:, 2] = changes[:, 0]
    prompts = np.arange(40) // 4
    curves = change_curves(responses_frame(changes, lengths, prompts), resamples=4000, seed=1)
    assert curves.shape == (4000, 3)
    assert curves[:, 2] == pytest.approx(curves[:, 0], abs=1e-9)
    _, stderr = clustered_mean(changes, lengths, prompts)
    # ten clusters: the bootstrap leaves out the factor sqrt(10/9) = 1.05, and 4000 draws add 1%
    assert curves.std(axis=0) == pytest.approx(stderr / np.sqrt(10 / 9), rel=0.06)


def test_missing_columns_sites_and_duplicates_are_named():
    frame = responses_frame(*ragged(3, 2), np.arange(3))
    with pytest.raises(UserError, match="prompt"):
        layer_table(frame.drop(columns="prompt"))
    with pytest.raises(UserError, match="mlp"):
        change_curves(frame, site="mlp")
    with pytest.raises(UserError, match="twice"):
        layer_table(pd.concat([frame, frame]))


def difference_by_loops(sides):
    """Difference of two token means and its error, from single tokens and their clusters, one cluster after another."""
    means, parts = [values.mean() for values, _ in sides], {}
    for sign, (values, clusters), mean in zip((1, -1), sides, means, strict=True):
        n = len(set(clusters.tolist()))
        for c in set(clusters.tolist()):
            own = (values[clusters == c] - mean).sum() / values.size * np.sqrt(n / (n - 1))
            parts[c] = parts.get(c, 0.0) + sign * own
    return means[0] - means[1], np.sqrt(sum(part**2 for part in parts.values()))


@pytest.mark.parametrize("common", ["all", "some", "none"])
def test_a_difference_agrees_with_loops_over_tokens(common: str):
    values, lengths = ragged(n_responses=40, n_columns=2)
    clusters = {"all": np.tile(np.arange(20), 2), "some": np.arange(40) % 30, "none": np.arange(40)}[common]
    given = [(values[part], lengths[part], clusters[part]) for part in (slice(20), slice(20, 40))]
    difference, stderr, low, high = clustered_difference(*given[0], *given[1])
    for column in range(2):
        tokens = [(np.repeat(v[:, column], n), np.repeat(c, n)) for v, n, c in given]
        found = difference[column], stderr[column]
        assert found == pytest.approx(difference_by_loops(tokens), rel=1e-10)  # 10^4 float64 additions
    assert ((low < difference) & (difference < high)).all()
    one, other = (clustered_mean(*side) for side in given)
    if common == "none":
        # Independent means: the variances add.
        assert stderr**2 == pytest.approx(one[1] ** 2 + other[1] ** 2, rel=1e-10)


def test_what_a_prompt_has_in_common_cancels_in_a_difference():
    values, lengths = ragged(n_responses=30, n_columns=1)
    clusters = np.arange(30)
    same = clustered_difference(values + 2.0, lengths, clusters, values, lengths, clusters)
    assert np.concatenate(same) == pytest.approx([2.0, 0.0, 2.0, 2.0], abs=ROUNDING)
    # As independent responses the same values give the root of twice the variance.
    apart = clustered_difference(values + 2.0, lengths, clusters, values, lengths, clusters + 30)
    assert apart[1] == pytest.approx(np.sqrt(2) * clustered_mean(values, lengths)[1], rel=1e-10)


def test_a_difference_without_two_clusters_on_a_side_has_no_error():
    values, lengths = ragged(n_responses=6, n_columns=2)
    values[:, 1] = np.nan
    one = clustered_difference(values[:5], lengths[:5], np.arange(5), values[5:], lengths[5:], np.array([0]))
    assert np.isfinite(one[0][0])
    assert np.isnan([end[0] for end in one[1:]]).all()
    # A value that was not measured has no difference.
    assert np.isnan([end[1] for end in one]).all()
    with pytest.raises(UserError, match=r"level is 1\.5"):
        clustered_difference(values, lengths, np.arange(6), values, lengths, np.arange(6), level=1.5)


def test_the_table_of_differences_has_those_of_every_layer_and_site():
    changes, lengths = ragged(n_responses=8, n_columns=3)
    frame = responses_frame(changes, lengths, np.arange(8) // 2)
    first, second = frame[frame["response"] < 5], frame[frame["response"] >= 3]
    table = difference_table(first, second)
    assert len(table) == 9
    assert (table["n_pairs"] == 2).all()
    one, other = (layer_table(each) for each in (first, second))
    for name in QUANTITIES:
        np.testing.assert_allclose(table[name], one[name] - other[name], rtol=0, atol=ROUNDING)
    row = table[(table["layer"] == 2) & (table["site"] == "ffn")].iloc[0]
    sides = [(changes[part, 1:2], lengths[part], np.arange(8)[part] // 2) for part in (slice(5), slice(3, 8))]
    wanted = np.concatenate(clustered_difference(*sides[0], *sides[1]))
    found = row[["change", "change_stderr", "change_low", "change_high"]].to_numpy(dtype=float)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)
    with pytest.raises(UserError, match="lack the column"):
        difference_table(first.drop(columns="change"), second)


# The error of a coverage from 3000 simulations is 0.004, so the bounds are at least three of them
# away from 0.95; with sixteen prompts a side may have only a few.
@pytest.mark.slow
@pytest.mark.parametrize(("n_prompts", "least"), [(16, 0.92), (40, 0.935), (100, 0.935)])
@pytest.mark.parametrize("overlap", ["all", "some", "none"])
def test_intervals_of_differences_cover_the_truth(n_prompts: int, least: float, overlap: str):
    generator = np.random.default_rng(n_prompts)
    hits, total = 0, 3000
    for _ in range(total):
        prompts = np.arange(n_prompts)
        chosen = generator.random(n_prompts)
        sides = {
            "all": (prompts, prompts),
            "some": (prompts[chosen < 0.7], prompts[chosen > 0.2]),
            "none": (prompts[chosen < 0.6], prompts[chosen >= 0.6]),
        }[overlap]
        hard = generator.normal(size=n_prompts)
        given = []
        for shift, own in zip((0.5, 0.0), sides, strict=True):
            lengths = generator.integers(5, 120, own.size)
            given += [(hard[own] + shift + 0.4 * generator.normal(size=own.size))[:, None], lengths, own]
        _, _, low, high = clustered_difference(*given)
        hits += low[0] <= 0.5 <= high[0]
    assert least <= hits / total <= 0.975
