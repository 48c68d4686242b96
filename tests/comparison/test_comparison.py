"""Comparisons of analyses: paired differences and slopes against formulas of numpy and scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from synthetic_analyses import abrupt, make, progressive, training
from test_convergence import by_hand
from transformers import AutoModelForCausalLM, AutoTokenizer

from internal_policy import analyze, compare, measure_convergence, statistics
from internal_policy.comparison.pairing import Item, combine, group_paired
from internal_policy.models import testbed


@pytest.fixture(scope="module")
def real():
    """The embedded model, two checkpoints of it on the same responses, and another model on its own responses."""
    base = analyze("testbed/qwen3", max_responses=6, samples_per_prompt=2, keep_tokens=0)
    tokenizer = AutoTokenizer.from_pretrained(testbed.path("testbed/qwen3"))
    checkpoints = []
    for step in (10, 40):
        model = AutoModelForCausalLM.from_pretrained(testbed.path("testbed/qwen3"))
        with torch.no_grad():
            model.model.layers[3].mlp.down_proj.weight.mul_(1 + 0.01 * step)
        found = analyze(model, tokenizer, responses=base.sequences, keep_tokens=0)
        checkpoints.append(replace(found, name=f"run/checkpoint-{step}"))
    other = analyze("testbed/llama", max_responses=5, keep_tokens=0)
    return base, checkpoints, other


@pytest.fixture(scope="module")
def trained(real):
    """The embedded model compared with its two checkpoints."""
    return compare(real[0], real[1])


def rows_of(frame, **fixed):
    for column, value in fixed.items():
        frame = frame[frame[column] == value]
    return frame


def cluster_mean(values, tokens, prompts):
    """The ratio estimator and its linearised standard error, cluster by cluster."""
    totals = [(np.sum((values * tokens)[prompts == p]), np.sum(tokens[prompts == p])) for p in np.unique(prompts)]
    n = sum(t for _, t in totals)
    mean = sum(s for s, _ in totals) / n
    c = len(totals)
    return mean, np.sqrt(c / (c - 1) * sum((s - mean * t) ** 2 for s, t in totals)) / n


def wide(analysis, site, column):
    rows = rows_of(analysis.responses, site=site)
    return rows.pivot_table(index="response", columns="layer", values=column).to_numpy()


def weights_of(analysis):
    first = rows_of(analysis.responses, site="layer", layer=1).sort_values("response")
    return first["n_tokens"].to_numpy(float), first["prompt"].to_numpy()


@pytest.mark.parametrize(("site", "column"), [("layer", "entropy_out"), ("attn", "change"), ("ffn", "cosine")])
def test_paired_differences_are_those_of_each_response(real, trained, site, column):
    base, checkpoints, _ = real
    comparison = trained
    assert comparison.paired == dict.fromkeys(comparison.labels, True)
    tokens, prompts = weights_of(base)
    for label, analysis in zip(comparison.labels[1:], checkpoints, strict=True):
        rows = rows_of(comparison.differences, label=label, site=site, quantity=column)
        assert list(rows["layer"]) == list(range(1, 9))
        d = wide(analysis, site, column) - wide(base, site, column)
        expected = np.array([cluster_mean(d[:, k], tokens, prompts) for k in range(8)])
        # The same sums in another order.
        np.testing.assert_allclose(rows[["difference", "stderr"]], expected, rtol=1e-9, atol=1e-14)
        own = analysis.curve(site, column) - base.curve(site, column)
        np.testing.assert_allclose(rows["difference"], own, rtol=1e-9, atol=1e-14)
        assert rows["paired"].all()
    # Only layers from the changed one on differ.
    changed = rows_of(comparison.differences, label="checkpoint-40", site="layer", quantity="entropy_out")
    assert (changed["difference"].iloc[:3].abs() < 1e-6).all()
    assert (changed["difference"].iloc[3:].abs() > 1e-4).any()


def test_slopes_are_least_squares_and_per_response(real, trained):
    base, checkpoints, _ = real
    comparison = trained
    assert (comparison.steps, comparison.steps_from) == ((0.0, 10.0, 40.0), "name")
    tokens, prompts = weights_of(base)
    for site, column in (("layer", "entropy_out"), ("ffn", "change")):
        rows = rows_of(comparison.trends, site=site, quantity=column)
        means = np.array([a.curve(site, column) for a in (base, *checkpoints)])
        np.testing.assert_allclose(rows["slope"], np.polyfit(comparison.steps, means, 1)[0], rtol=1e-6, atol=1e-12)
        values = np.stack([wide(a, site, column) for a in (base, *checkpoints)])
        slopes = np.polyfit(comparison.steps, values.reshape(3, -1), 1)[0].reshape(values.shape[1:])
        errors = [cluster_mean(slopes[:, k], tokens, prompts)[1] for k in range(8)]
        np.testing.assert_allclose(rows["stderr"], errors, rtol=1e-6, atol=1e-12)
        moves = np.diff(means, axis=0)
        where = np.abs(moves).argmax(axis=0)
        np.testing.assert_allclose(rows["largest_move"], moves[where, range(8)], rtol=1e-6, atol=1e-12)
        assert list(rows["from_step"]) == [comparison.steps[k] for k in where]
        assert list(rows["to_step"]) == [comparison.steps[k + 1] for k in where]
        np.testing.assert_allclose(rows["total_move"], means[-1] - means[0], rtol=1e-6, atol=1e-12)
        assert (rows["low"] <= rows["slope"]).all()
        assert (rows["paired"] & (rows["n_checkpoints"] == 3)).all()


def test_other_responses_are_marked_and_compared_as_independent(real):
    base, _, other = real
    comparison = compare(base, other)
    assert comparison.paired == {"qwen3": True, "llama": False}
    assert not comparison.differences["paired"].any()
    assert "llama is of other responses than qwen3: unpaired" in comparison.notes
    rows = rows_of(comparison.differences, site="layer", quantity="entropy_out")
    a, b = (rows_of(x.layers, site="layer") for x in (other, base))
    np.testing.assert_allclose(rows["difference"], a["entropy_out"].to_numpy() - b["entropy_out"].to_numpy())
    errors = np.hypot(a["entropy_out_stderr"], b["entropy_out_stderr"].to_numpy())
    np.testing.assert_allclose(rows["stderr"], errors)
    reach = np.hypot(a["entropy_out"] - a["entropy_out_low"], (b["entropy_out_high"] - b["entropy_out"]).to_numpy())
    np.testing.assert_allclose(rows["difference"] - rows["low"], reach)


@pytest.mark.parametrize(("which", "reading"), [(0, "abrupt"), (1, "progressive")])
def test_embedded_model_convergence_matches_its_curve(real, which, reading):
    analysis = (real[0], real[2])[which]
    found = measure_convergence(analysis, resamples=100)
    drop, depth, share = by_hand(list(analysis.curve("layer", "entropy_out")))
    assert found.total_drop == pytest.approx(drop)
    # The step of the grid in `by_hand`.
    assert found.half_drop_depth == pytest.approx(depth, abs=2e-5)
    assert found.last_three_share == pytest.approx(share)
    # Of the small models, the Qwen's last layer accounts for more than half of the drop.
    assert found.reading == reading, found.reason
    assert found.reading_share == 1.0


def test_synthetic_analyses_have_the_tables_of_real_ones():
    analysis = make(progressive(5), noise=0.3, samples=2)
    expected = statistics.layer_table(analysis.responses)
    pd.testing.assert_frame_equal(analysis.layers[expected.columns], expected, check_exact=False, rtol=1e-9)


def equal_lengths(analysis):
    """The same analysis with responses of ten tokens each, so that means are plain means."""
    return replace(analysis, responses=analysis.responses.assign(n_tokens=10))


def test_equal_clusters_give_the_paired_and_the_welch_t_test():
    one, two = (equal_lengths(make(progressive(6), noise=0.4, shared=1.0, seed=s)) for s in (1, 2))
    x, y = wide(one, "layer", "entropy_out"), wide(two, "layer", "entropy_out")
    rows = rows_of(compare(one, two, labels="ab").differences, site="layer", quantity="entropy_out")
    t = stats.ttest_rel(y, x, axis=0)
    np.testing.assert_allclose(rows["difference"] / rows["stderr"], t.statistic, rtol=1e-9)
    apart = equal_lengths(make(progressive(6), noise=0.4, shared=1.0, seed=2, data_seed=7, prompts=20))
    z = wide(apart, "layer", "entropy_out")
    rows = rows_of(compare(one, apart, labels="ab").differences, site="layer", quantity="entropy_out")
    t = stats.ttest_ind(z, x, axis=0, equal_var=False)
    np.testing.assert_allclose(rows["difference"] / rows["stderr"], t.statistic, rtol=1e-9)
    # Zou and Donner's interval differs from Welch's but has a similar length.
    ends = t.confidence_interval(0.95)
    np.testing.assert_allclose(rows["high"] - rows["low"], ends.high - ends.low, rtol=0.12)


def test_shared_responses_narrow_the_interval():
    base, near = make(progressive(8), noise=0.1, shared=2.0), make(progressive(8), noise=0.1, shared=2.0, seed=5)
    moved = make(progressive(8), noise=0.1, shared=2.0, seed=5, data_seed=9)
    widths = []
    for other in (near, moved):
        rows = rows_of(compare(base, other, labels="ab").differences, site="layer", quantity="entropy_out", layer=4)
        widths.append(float((rows["high"] - rows["low"]).iloc[0]))
    assert widths[1] > 5 * widths[0]


def test_an_analysis_compared_with_itself_has_zero_differences():
    analysis = make(progressive(10), noise=0.1)
    assert analysis.boundary_layer is not None
    comparison = compare(analysis, analysis)
    assert comparison.labels == ("model (1)", "model (2)")
    assert (comparison.differences[["difference", "stderr", "low", "high"]] == 0.0).all(axis=None)
    assert (comparison.depths["difference"] == 0.0).all()
    assert list(comparison.boundaries["move"]) == [0, 0]
    assert not comparison.stages["changed"].any()


def test_the_order_of_the_responses_does_not_matter():
    base, other = make(progressive(6), noise=0.3, shared=1.0), make(progressive(6), noise=0.3, shared=1.0, seed=2)
    order = np.random.default_rng(0).permutation(12)
    place = {int(old): new for new, old in enumerate(order)}
    shuffled = replace(
        other,
        responses=other.responses.assign(response=other.responses["response"].map(place)).sample(
            frac=1, random_state=1
        ),
        sequences=other.sequences.iloc[order].reset_index(drop=True),
    )
    one, two = (compare(base, x, labels="ab").differences for x in (other, shuffled))
    assert two["paired"].all()
    numbers = ["difference", "stderr", "low", "high"]
    np.testing.assert_allclose(two[numbers], one[numbers], rtol=1e-9, atol=1e-13)


def test_a_different_prompt_length_is_another_sequence():
    base, other = make(progressive(4), noise=0.1), make(progressive(4), noise=0.1, seed=1)
    other.sequences["prompt_length"] = 2
    assert compare(base, other, labels="ab").paired == {"a": True, "b": False}


def test_models_of_other_depth_and_vocabulary_are_compared_by_relative_depth():
    qwen = make(progressive(12), "Qwen/Qwen3-4B", noise=0.1)
    llama = make(abrupt(8), "meta-llama/Llama-3.2-3B", vocab=128_256, noise=0.1, data_seed=1)
    comparison = compare(qwen, llama)
    assert comparison.differences.empty
    assert comparison.trends.empty
    assert list(comparison.convergence["reading"]) == ["progressive", "abrupt"]
    few = "all analyses have 12 prompts only: intervals"
    for expected in ("8 layers and Qwen3-4B 12", "128256 tokens and Qwen3-4B 151936", "other responses", few):
        assert any(expected in note for note in comparison.notes), comparison.notes
    assert pd.isna(comparison.boundaries["move"].iloc[1])
    depths = rows_of(comparison.depths, quantity="entropy")
    assert not comparison.depths["same_vocabulary"].any()
    curves = [[a.curve("layer", "entropy_in")[1], *a.curve("layer", "entropy_out")] for a in (llama, qwen)]
    grid = np.linspace(0, 1, 21)
    at = [np.interp(grid, np.linspace(0, 1, len(c)), c) for c in curves]
    np.testing.assert_allclose(depths["difference"], at[0] - at[1], rtol=1e-9, atol=1e-12)
    share = rows_of(comparison.depths, quantity="entropy_share")
    scaled = at[0] / np.log(128_256) - at[1] / np.log(151_936)
    np.testing.assert_allclose(share["difference"], scaled, rtol=1e-9, atol=1e-12)
    own = rows_of(comparison.layers, label="Llama-3.2-3B", site="layer")
    np.testing.assert_allclose(own["entropy_share"] * np.log(128_256), own["entropy_out"])
    assert list(own["relative_depth"]) == [k / 8 for k in range(1, 9)]


def test_two_depths_on_the_same_responses_are_paired():
    deep, flat = make(progressive(12) + 9, "deep", shared=2.0), make(progressive(6) + 9, "flat", shared=2.0)
    depths = rows_of(compare(deep, flat).depths, quantity="entropy")
    assert depths["paired"].all()
    # The shared part cancels; only the interpolation between layers differs.
    assert (depths["stderr"] < 1e-9).all()


def test_changes_of_boundary_layer_and_stages():
    base, other = make(progressive(6), noise=0.1), make(progressive(6), noise=0.1, seed=1)
    moved = replace(
        other,
        selection=replace(
            other.selection, boundary_layer=4, stages=("exploration",) * 4 + ("integration", "convergence")
        ),
    )
    before = replace(
        base,
        selection=replace(
            base.selection, boundary_layer=2, stages=("exploration",) * 2 + ("integration",) * 3 + ("convergence",)
        ),
    )
    comparison = compare(before, moved, labels=["before", "after"])
    row = comparison.boundaries.set_index("label").loc["after"]
    assert (row["move"], row["depth_move"], row["last_exploration"]) == (2, pytest.approx(2 / 6), 4)
    assert (row["first_integration"], row["first_convergence"], row["n_exploration"]) == (5, 6, 4)
    changed = rows_of(comparison.stages, label="after")
    assert list(changed.loc[changed["changed"], "layer"]) == [3, 4]
    never = replace(moved, selection=replace(moved.selection, boundary_layer=None))
    row = compare(before, never, labels=["before", "never"]).boundaries.iloc[1]
    assert pd.isna(row["boundary_layer"])
    assert pd.isna(row["move"])


def test_a_known_trend_is_recovered():
    comparison = compare(training(5, 10, moves=-0.02, noise=0.01, shared=0.02, prompts=30))
    rows = rows_of(comparison.trends, site="layer", quantity="entropy_out")
    # A checkpoint, of ten steps, moves layer l by -0.02 l / L; the slope's standard error is below 1e-4.
    np.testing.assert_allclose(rows["slope"], -0.002 * np.arange(1, 11) / 10, atol=4e-4)
    assert ((rows["low"] < -0.002 * rows["layer"] / 10) & (rows["high"] > -0.002 * rows["layer"] / 10)).sum() >= 8
    assert (comparison.trends["steps_from"] == "name").all()


def test_trends_over_different_responses_add_the_errors():
    series = [make(progressive(5), f"step_{k}", noise=0.3, seed=k, data_seed=k) for k in (0, 10, 30)]
    rows = rows_of(compare(series).trends, site="layer", quantity="entropy_out")
    assert not rows["paired"].any()
    w = (np.array([0, 10, 30]) - 40 / 3) / np.sum((np.array([0, 10, 30]) - 40 / 3) ** 2)
    tables = [rows_of(a.layers, site="layer") for a in series]
    errors = np.sqrt(sum((wk * t["entropy_out_stderr"].to_numpy()) ** 2 for wk, t in zip(w, tables, strict=True)))
    np.testing.assert_allclose(rows["stderr"], errors)


def test_checkpoints_given_in_another_order_have_the_same_trend():
    series = training(4, 5)
    one, two = compare(series), compare(series[::-1], baseline="checkpoint-0")
    numbers = ["slope", "stderr", "largest_move", "from_step", "to_step"]
    np.testing.assert_allclose(one.trends[numbers].astype(float), two.trends[numbers].astype(float), atol=1e-12)
    assert two.baseline == one.baseline == "checkpoint-0"


def test_a_single_prompt_has_no_interval():
    comparison = compare(make(progressive(4), prompts=1), make(progressive(4), prompts=1, seed=1), labels="ab")
    assert comparison.differences[["stderr", "low", "high"]].isna().all(axis=None)
    assert comparison.differences["difference"].notna().all()


@pytest.mark.parametrize("data_seed", [None, 1000])
def test_coverage_of_difference_intervals(data_seed):
    """Paired (None) and unpaired; layers are independent draws, so one comparison gives many intervals."""
    n_layers, held = 120, []
    for seed in range(4):
        one = make(np.full(n_layers + 1, 6.0), prompts=60, noise=0.5, shared=0.0, seed=seed, data_seed=seed)
        two = make(
            np.full(n_layers + 1, 6.3),
            prompts=60,
            noise=0.5,
            shared=0.0,
            seed=seed + 500,
            data_seed=seed if data_seed is None else seed + data_seed,
        )
        items = Item("a", 0, two), Item("b", 0, one)
        values = [item.values("layer", "entropy_out") for item in items]
        found = combine(items, values, (1.0, -1.0), group_paired(items))
        held += list((found["low"] <= 0.3) & (found["high"] >= 0.3))
    # 480 draws at 0.95 have a standard deviation of 0.01.
    assert 0.92 <= np.mean(held) <= 0.98


def test_coverage_of_slope_intervals_with_partially_shared_responses():
    """Two sweeps in one: errors of shared responses are correlated, so weights are added before squaring."""
    n_layers, held = 60, []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        # What a response adds to every checkpoint that it is run through, layer by layer: the true slope is 0.
        own = {half: draw.normal(size=(40, n_layers)) for half in (0, 1)}
        values = [own[place // 5] + 0.01 * draw.normal(size=(40, n_layers)) for place in range(10)]
        halves = [make(np.full(4, 6.0), prompts=40, noise=0.0, shared=0.0, seed=0, data_seed=half) for half in (0, 1)]
        items = [Item(str(place), place, halves[place // 5]) for place in range(10)]
        groups = group_paired(items)
        assert groups == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
        centred = np.arange(10) - 4.5
        found = combine(items, values, (centred / (centred**2).sum()).tolist(), groups)
        held += list((found["low"] <= 0) & (found["high"] >= 0))
    # 240 draws at 0.95 have a standard deviation of 0.014.
    assert 0.9 <= np.mean(held) <= 0.99
