"""The summaries of the experiments: every number against one computed here from the made-up tables."""

from __future__ import annotations

import dose
import layers
import made_up_experiments as made_up
import mechanism
import numpy as np
import pandas as pd
import predictions
import pytest
import tables
from jobs import BOUNDARY, jobs
from scipy import stats

# Summaries of made-up runs, again and again.
pytestmark = pytest.mark.slow

QWEN = "testbed/qwen3"
# Sums of a few float64 values near 1.
EXACT = {"rtol": 0, "atol": 1e-12}
# Of P1 to P12, with P4c, P5c and P9e: models x layers x rates; models x rates; models x rates x doses; models.
SETTINGS = [24] * 7 + [6, 16, 12, 16, 16, 2, 2, 2]


def interval(values):
    """The t-interval by its textbook formula, from scipy's own quantile and standard error."""
    return stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))


@pytest.fixture(scope="module")
def e1():
    return tables.with_settings(made_up.tables("e1", range(3)))


@pytest.fixture(scope="module")
def e2():
    return tables.with_settings(made_up.tables("e2", range(5)))


@pytest.fixture(scope="module")
def every_layer(e2):
    return tables.joined(tables.with_settings(made_up.tables("e4", range(5))), e2)


def only(table, **wanted):
    found = table
    for name, value in wanted.items():
        found = found[found[name] == value]
    assert len(found) == 1, f"{wanted}: {len(found)} rows"
    return found.iloc[0]


def test_the_interval_is_students_and_needs_two_seeds():
    values = [0.3, 0.5, 0.1]
    found = tables.t_interval([*values, np.nan])
    assert found["seeds"] == 3
    np.testing.assert_allclose([found["low"], found["high"]], interval(values), **EXACT)
    alone = tables.t_interval([0.3])
    assert alone["value"] == 0.3
    assert np.isnan(alone["low"])
    assert tables.t_interval([])["seeds"] == 0


def test_quantities_average_over_later_layers_and_seeds(e1):
    found = tables.over_seeds(mechanism.quantities(e1), [*mechanism.BY, "quantity", "step"])
    row = only(found, model=QWEN, layer=4, rate=1e-4, quantity="cosine", step=30)
    # The made-up cosine is 0.3 + 0.05 m at later layer m, and its slope differs between the seeds.
    slopes = [0.002 + 0.01 * 1.5 * made_up.NOISE[seed] for seed in range(3)]
    values = [0.3 + 0.05 * np.mean([5, 6, 7, 8]) + slope * 30 for slope in slopes]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    assert set(found["quantity"]) >= {"reward", "policy_entropy", "length", "kl", "log_perplexity_start"}
    assert set(found["quantity"]) >= {"log_perplexity_solutions", "log_perplexity_own"}
    assert (found["seeds"] == 3).all()


def test_gains_are_over_the_start_of_the_model(e1):
    row = only(mechanism.outcomes(e1), model=QWEN, layer=7, rate=3e-4, measure="avg")
    gains = [0.2 + 1.5 * made_up.NOISE[seed] for seed in range(3)]
    expected = [0.46, 0.46 + np.mean(gains), np.mean(gains), *interval(gains)]
    np.testing.assert_allclose(row[["start", "value", "gain", "low", "high"]].astype(float), expected, **EXACT)


def test_the_mean_over_layers_takes_seeds_that_aligned_all_of_them(e1):
    row = only(mechanism.means_of_layers(e1), model=QWEN, rate=3e-4)
    values = [1.5 * made_up.NOISE[seed] for seed in range(3)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    fewer = e1["runs"][~((e1["runs"]["layer"] == 2) & (e1["runs"]["seed"] == 1))]
    assert only(mechanism.means_of_layers({**e1, "runs": fewer}), model=QWEN, rate=3e-4)["seeds"] == 2


def test_the_rule_is_compared_with_the_peak_and_the_fall_of_the_reward(e1):
    row = only(mechanism.rule(e1), run="qwen3-bupo-l2-s60-lr0.0001-t60-seed0")
    # The log-perplexity of seed 0 rises by 0.002 a step from 0.15, and by more than 0.05 first at step 27.
    assert (row["stop"], row["sign"]) == (27, "perplexity")
    rewards = [0.01 * min(s, 30) - 0.015 * max(s - 30, 0) - 0.002 * s for s in range(1, 61)]
    means = {s + 4.5: np.mean(rewards[s - 1 : s + 9]) for s in range(1, 52)}
    peak = max(means, key=means.get)
    fall = min(s for s in means if s > peak and means[s] <= means[peak] - 0.1)
    assert (row["peak"], row["fall"], row["late"]) == (peak, fall, 27 - peak)
    # Without the control, it is the reward itself, whose prompts become easier.
    alone = {**e1, "histories": e1["histories"][e1["histories"]["rate"] != 0]}
    later = only(mechanism.rule(alone), run=row["run"])
    rewards = [0.45 + 0.01 * min(s, 30) - 0.015 * max(s - 30, 0) for s in range(1, 61)]
    means = {s + 4.5: np.mean(rewards[s - 1 : s + 9]) for s in range(1, 52)}
    assert later["peak"] == max(means, key=means.get)
    assert later["fall"] == min(s for s in means if s > later["peak"] and means[s] <= means[later["peak"]] - 0.1)


def test_rewards_and_lengths_are_compared_with_the_control_of_the_same_prompts(e1):
    found = mechanism.changes(e1)
    assert set(found["rate"]) == {1e-4, 3e-4, 5e-4}
    assert set(found["layer"]) == {2, 4, 6, 7}
    row = only(found, model=QWEN, layer=4, rate=3e-4, seed=1)
    gained = [0.01 * min(s, 30) - 0.015 * max(s - 30, 0) - 0.002 * s + 1.5 * made_up.NOISE[1] for s in range(1, 61)]
    means = [np.mean(gained[s : s + 10]) for s in range(51)]
    np.testing.assert_allclose(row["rise_over_control"], max(means), **EXACT)
    np.testing.assert_allclose(row["fall_over_control"], max(means) - means[-1], **EXACT)
    np.testing.assert_allclose(row["length_over_control"], np.mean([0.04 * s for s in range(51, 61)]), **EXACT)
    without = {**e1, "histories": e1["histories"][e1["histories"]["rate"] != 0]}
    assert mechanism.changes(without)[["length_over_control", "rise_over_control"]].isna().all(axis=None)


def test_alignment_is_compared_with_as_many_steps_of_grpo(e1):
    found = mechanism.outcomes(e1)
    row = only(found, model=QWEN, method="bupo", layer=7, rate=3e-4, measure="avg")
    values = [0.2 - 0.3 + 0.5 * made_up.NOISE[seed] for seed in range(3)]
    names = ["over_grpo", "over_grpo_low", "over_grpo_high"]
    np.testing.assert_allclose(row[names].astype(float), [np.mean(values), *interval(values)], **EXACT)
    assert row["over_grpo_seeds"] == 3
    row = only(found, model=QWEN, method="grpo", measure="avg")
    np.testing.assert_allclose(row["gain"], 0.3 + np.mean(made_up.NOISE[:3]), **EXACT)
    assert np.isnan(row["layer"])


def test_a_rule_that_never_stops_counts_as_the_last_step(e1):
    calm = {**e1, "dynamics": e1["dynamics"].assign(kl_mean=1.0, log_perplexity=0.2)}
    found = mechanism.rule(calm)
    assert found["stop"].isna().all()
    np.testing.assert_allclose(found["late"], 60 - found["peak"], **EXACT)


def test_the_rule_is_counted_against_what_the_runs_lost_and_gained(e1):
    found = mechanism.rule_counts(e1).set_index(["rate", "layers"])
    assert (found["runs"] == 12).all()
    stops = mechanism.rule(e1).set_index("run")
    gains = {run: avg - start for run, avg, start in e1["runs"][["run", "avg", "avg_start"]].itertuples(index=False)}
    wanted = stops[(stops["rate"] == 5e-4) & (stops["layer"] < 6)]
    lost = [run for run in wanted.index if gains[run] < -0.02]
    # At 5e-4 layer 2 loses a third and layer 4 a twelfth, whatever the seed's noise.
    assert len(lost) == 12
    in_time = sum(1 for run in lost if stops.loc[run, "stop"] <= stops.loc[run, "fall"])
    row = found.loc[(5e-4, "lower")]
    assert row[["stopped", "lost", "in_time", "gained", "early"]].to_list() == [12, 12, in_time, 0, 0]
    late = {**e1, "dynamics": e1["dynamics"].assign(kl_mean=1.0, log_perplexity=0.2)}
    assert (mechanism.rule_counts(late)[["stopped", "in_time", "early"]] == 0).all(axis=None)


def test_doses_are_compared_with_grpo_after_as_many_steps_in_all_and_of_grpo(e2):
    found = dose.differences(e2)
    plain = {seed: made_up.STARTS[QWEN] + 0.5 + made_up.NOISE[seed] for seed in range(5)}
    bupo = {seed: made_up.STARTS[QWEN] + (120 - 12) * 0.5 / 120 + 1.5 * made_up.NOISE[seed] for seed in range(5)}
    row = only(found, model=QWEN, rate=1e-4, dose="24", measure="avg", comparison=dose.TOTAL)
    values = [bupo[seed] - plain[seed] for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    row = only(found, model=QWEN, rate=1e-4, dose="24", measure="avg", comparison=dose.OPTIMISED)
    after_96 = {seed: made_up.STARTS[QWEN] + (plain[seed] - made_up.STARTS[QWEN]) * 96 / 120 for seed in range(5)}
    values = [bupo[seed] - after_96[seed] for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    assert row["seeds"] == 5


def test_only_seeds_that_both_have_are_paired(e2):
    fewer = {name: t[~((t["method"] == "grpo") & (t["seed"] > 2))] for name, t in e2.items()}
    found = dose.differences(fewer)
    assert (found.loc[found["dose"] != "auto", "seeds"] == 3).all()


def test_ends_of_doses_have_the_mean_of_each_measure(e2):
    found = dose.doses(e2)
    row = only(found, model=QWEN, dose="0", measure="entropy_end")
    np.testing.assert_allclose(row["value"], np.mean([0.08 + 0.01 * seed for seed in range(5)]), **EXACT)
    assert set(found["dose"]) == {"0", "4", "12", "24", "48", "auto"}


def test_curves_average_the_seeds_at_each_step(e2):
    row = only(dose.curves(e2), model=QWEN, rate=1e-4, dose="48", step=96)
    gains = [(120 - 24) * 0.5 / 120 + 1.5 * made_up.NOISE[seed] for seed in range(5)]
    np.testing.assert_allclose(row["value"], made_up.STARTS[QWEN] + np.mean(gains) * 96 / 120, **EXACT)


def test_curves_are_compared_step_by_step_at_equal_total_and_equal_grpo_steps(e2):
    found = dose.along(e2)
    start = made_up.STARTS[QWEN]
    plain = {seed: 0.5 + made_up.NOISE[seed] for seed in range(5)}
    bupo = {seed: (120 - 24) * 0.5 / 120 + 1.5 * made_up.NOISE[seed] for seed in range(5)}
    setting = {"model": QWEN, "rate": 1e-4, "dose": "48"}
    row = only(found, **setting, comparison=dose.TOTAL, step="96")
    values = [(bupo[seed] - plain[seed]) * 96 / 120 for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    # 24 steps of GRPO after 48 of alignment, against 24 of GRPO from the start.
    row = only(found, **setting, comparison=dose.OPTIMISED, step="24")
    values = [start + bupo[seed] * 72 / 120 - (start + plain[seed] * 24 / 120) for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    # The area is between points that every run has.
    steps = [24, 48, 72]
    row = only(found, **setting, comparison=dose.OPTIMISED, step="mean")
    values = [np.mean([bupo[seed] * (s + 48) - plain[seed] * s for s in steps]) / 120 for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    # After a dose of 4, one step only is one at which GRPO was measured too.
    assert set(found.loc[found["dose"] == "4", "comparison"]) == {dose.TOTAL}


def test_auto_is_compared_with_grpo_and_with_the_best_dose_of_the_same_seeds(e2):
    row = only(dose.auto(e2), model=QWEN, rate=1e-4)
    assert (row["stops"], row["best"], row["seeds"]) == ("14 15 16", "4", 3)
    # 14 steps of alignment against 4, at half the worth of a step of GRPO.
    np.testing.assert_allclose(row["over_best"], -(14 - 4) / 2 * 0.5 / 120, **EXACT)
    noise = np.mean([0.5 * made_up.NOISE[seed] for seed in range(3)])
    np.testing.assert_allclose(row["over_grpo"], -7 * 0.5 / 120 + noise, **EXACT)


def test_detectable_difference_has_the_power_it_claims():
    # Independently: how often scipy's own t-test rejects in simulated experiments.
    n = 6
    effect = dose.detectable(n)
    drawn = np.random.default_rng(0).normal(effect, 1.0, (20_000, n))
    rejected = np.mean(stats.ttest_1samp(drawn, 0.0, axis=1).pvalue < 0.05)
    # The standard error of a share of 0.8 over 20 000 is 0.003.
    assert abs(rejected - 0.8) < 0.012


def test_power_takes_the_spread_of_paired_differences(e2):
    row = only(dose.power(e2), model=QWEN, rate=1e-4, measure="avg")
    spread = np.std([0.5 * made_up.NOISE[seed] for seed in range(5)], ddof=1)
    np.testing.assert_allclose(row["spread"], spread, **EXACT)
    np.testing.assert_allclose(row["detectable"], spread * dose.detectable(6), **EXACT)
    # (n - 1) s^2 / sigma^2 has a chi-square distribution.
    np.testing.assert_allclose(stats.chi2.cdf(4 * (spread / row["spread_low"]) ** 2, 4), 0.975, rtol=1e-9)
    np.testing.assert_allclose(stats.chi2.cdf(4 * (spread / row["spread_high"]) ** 2, 4), 0.025, rtol=1e-9)
    early = only(dose.power(e2), model=QWEN, rate=1e-4, measure="avg, step 24")
    np.testing.assert_allclose(early["spread"], spread * 24 / 120, **EXACT)
    assert dose.power({name: table[table["seed"] == 0] for name, table in e2.items()}).empty


def test_methods_are_compared_with_grpo_seed_by_seed(e2):
    both = tables.joined(tables.with_settings(made_up.tables("methods", range(3))), e2)
    found = dose.methods(both)
    plain = [0.96 + made_up.NOISE[seed] for seed in range(3)]
    row = only(found, model=QWEN, method="grpo", measure="avg")
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(plain), *interval(plain)], **EXACT)
    own = [0.96 + 2.5 * made_up.NOISE[seed] for seed in range(3)]
    row = only(found, model=QWEN, method="ppo", measure="avg")
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(own), *interval(own)], **EXACT)
    over = ["over_grpo", "over_grpo_low", "over_grpo_high"]
    differences = [one - other for one, other in zip(own, plain, strict=True)]
    np.testing.assert_allclose(row[over].astype(float), [np.mean(differences), *interval(differences)], **EXACT)
    # GRPO has five seeds in E2; the two that PPO lacks would change the mean, and another order the interval.
    assert abs(np.mean(differences) - (np.mean(own) - 0.96 - np.mean(made_up.NOISE))) > 1e-3
    assert row["seeds"] == 3
    # The noise of RLOO is that of GRPO.
    row = only(found, model=QWEN, method="rloo", measure="avg")
    np.testing.assert_allclose(row[over].astype(float), [0.0, 0.0, 0.0], **EXACT)
    assert set(found["method"]) == {"grpo", "ppo", "rloo", "reinforce++"}
    # Both curves are lines from the start, measured at 24, 48, 72, 96 and 120 of 120 steps.
    row = only(found, model=QWEN, method="ppo", measure="along")
    areas = np.array(differences) * np.mean([24, 48, 72, 96, 120]) / 120
    np.testing.assert_allclose(row[over].astype(float), [np.mean(areas), *interval(areas)], **EXACT)


def test_the_critics_explained_variance_is_that_of_the_second_half(e2):
    both = tables.joined(tables.with_settings(made_up.tables("methods", range(3))), e2)
    histories = both["histories"]
    explained = (0.1 * (histories["step"] > 60) + 0.3 * (histories["seed"] == 2)).where(histories["method"] == "ppo")
    found = dose.methods({**both, "histories": histories.assign(explained_variance=explained)})
    row = only(found, model=QWEN, method="ppo", measure="explained")
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [0.2, *interval([0.1, 0.1, 0.4])], **EXACT)
    assert found.loc[(found["method"] != "ppo") & (found["measure"] == "explained"), "value"].isna().all()
    assert dose.methods(both).query("measure == 'explained'")["value"].isna().all()


def test_outcomes_of_layers_include_the_boundary_layer_of_e2(every_layer):
    found = layers.outcomes(every_layer)
    assert found.groupby("model")["layer"].apply(set).to_dict() == {m: set(range(1, 9)) for m in BOUNDARY}
    row = only(found, model=QWEN, layer=2, measure="avg")
    values = [-12 * 0.5 / 120 - 0.05 + 0.5 * made_up.NOISE[seed] for seed in range(5)]
    np.testing.assert_allclose(row["over_grpo"], np.mean(values), **EXACT)
    np.testing.assert_allclose([row["over_grpo_low"], row["over_grpo_high"]], interval(values), **EXACT)


def test_curves_of_layers_are_compared_with_grpo_at_equal_total_and_equal_grpo_steps(every_layer):
    found = layers.along(every_layer)
    assert found.groupby("model")["layer"].apply(set).to_dict() == {m: set(range(1, 9)) for m in BOUNDARY}
    plain = {seed: 0.5 + made_up.NOISE[seed] for seed in range(5)}
    bupo = {seed: (120 - 12) * 0.5 / 120 - 0.05 + 1.5 * made_up.NOISE[seed] for seed in range(5)}
    setting = {"model": QWEN, "layer": 2}
    row = only(found, **setting, comparison=dose.TOTAL, step="48")
    values = [(bupo[seed] - plain[seed]) * 48 / 120 for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    steps = [24, 48, 72, 96]
    row = only(found, **setting, comparison=dose.OPTIMISED, step="mean")
    values = [np.mean([bupo[seed] * (s + 24) - plain[seed] * s for s in steps]) / 120 for seed in range(5)]
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [np.mean(values), *interval(values)], **EXACT)
    nothing = tables.with_settings({})
    assert layers.along(nothing).empty


def test_correlations_are_spearmans_of_each_seed_and_of_the_means(every_layer):
    found = layers.correlations(every_layer, made_up.evidence())
    own = every_layer["curves"].query("model == @QWEN and ipa_steps == '24' and rate == 1e-4")
    steps = {"end": [120], "along": [24, 48, 72, 96, 120], "afterwards": [48, 72, 96, 120]}
    known = made_up.evidence().query("model == @QWEN").sort_values("layer")
    for outcome, counted in steps.items():
        values = own[own["step"].isin(counted)].groupby(["seed", "layer"])["avg"].mean()
        for name in ("layer", "change", "change_direction", "accuracy"):
            row = only(found, model=QWEN, outcome=outcome, predictor=name)
            each = [stats.spearmanr(known[name], values[seed].sort_index()).statistic for seed in range(5)]
            np.testing.assert_allclose(row["value"], np.mean(each), **EXACT)
            by_layer = values.groupby("layer").mean().sort_index()
            np.testing.assert_allclose(row["of_means"], stats.spearmanr(known[name], by_layer).statistic, **EXACT)
            assert (row["layers"], row["seeds"]) == (8, 5)


def test_the_means_along_the_run_can_rank_layers_otherwise_than_the_end(every_layer):
    early = dict(every_layer)
    curves = early["curves"]
    # At step 24 a low layer has brought more the lower it is.
    lower = curves["avg"] + 0.5 * (8 - curves["layer"]).fillna(0) * (curves["step"] == 24)
    early["curves"] = curves.assign(avg=lower)
    found = layers.correlations(early, made_up.evidence())
    assert only(found, model=QWEN, outcome="end", predictor="layer")["value"] > 0
    assert only(found, model=QWEN, outcome="along", predictor="layer")["value"] < 0
    assert only(found, model=QWEN, outcome="afterwards", predictor="layer")["value"] > 0
    # The prediction is about the end.
    nothing = tables.with_settings({})
    row = only(predictions.predictions(nothing, nothing, early, made_up.evidence()), prediction="P11", model=QWEN)
    assert row["value"] > 0


def test_runs_of_two_versions_are_compared_over_the_steps_that_they_share(e2):
    runs, histories = e2["runs"], e2["histories"].assign(grad_norm=1.0)
    newer = (runs["seed"] == 1) & (runs["ipa_steps"].isin(["0", "12"]))
    runs = runs.assign(torch=runs["torch"].where(~newer, "3"))
    own = (histories["model"] == QWEN) & (histories["seed"] == 1) & (histories["ipa_steps"] == "48")
    later = histories["length"] + 5.0 * (own & (histories["step"] == 13)) + 0.5 * (own & (histories["step"] == 12))
    found = tables.shared_steps({**e2, "runs": runs, "histories": histories.assign(length=later)})
    # Doses 4, 24, 48 and, at seed 1, the one that the rule chose, with dose 12; GRPO has no second run.
    assert len(found) == 2 * 2 * 4
    assert set(found.loc[found["other"].str.contains("-s4-") | found["run"].str.contains("-s4-"), "steps"]) == {4}
    pair = found[(found["run"].str.contains("qwen3.*-s12-") & found["other"].str.contains("qwen3.*-s48-"))]
    np.testing.assert_allclose(pair["length"], [0.5, 0.5], **EXACT)
    assert (pair["steps"] == 12).all()
    assert tables.shared_steps(tables.with_settings({})).empty


def test_layers_are_compared_with_the_boundary_layer_seed_by_seed(every_layer):
    found = layers.over_boundary(every_layer)
    assert found.groupby("model")["layer"].apply(set).to_dict() == {
        m: set(range(1, 9)) - {b} for m, b in BOUNDARY.items()
    }
    # The seeds' noise is that of the boundary layer too, whose lift has no part of a layer's.
    for outcome, share in (("end", 1.0), ("along", 72 / 120), ("afterwards", 84 / 120)):
        row = only(found, model=QWEN, layer=3, outcome=outcome)
        np.testing.assert_allclose([row["value"], row["low"], row["high"]], [-0.04 * share] * 3, **EXACT)
        assert row["seeds"] == 5


def test_a_mean_along_the_run_is_over_the_same_steps_in_every_seed(every_layer):
    curves = every_layer["curves"]
    lost = (curves["seed"] == 1) & (curves["layer"] == 3) & (curves["step"] == 48)
    found = layers.over_boundary({**every_layer, "curves": curves[~lost]})
    assert only(found, model=QWEN, layer=3, outcome="along")["seeds"] == 4
    assert only(found, model=QWEN, layer=3, outcome="end")["seeds"] == 5


def test_correlations_need_every_layer(every_layer):
    fewer = {name: t[t["layer"] != 3] for name, t in every_layer.items()}
    assert layers.correlations(fewer, made_up.evidence()).empty


def test_correlations_of_two_seeds_have_no_ends(every_layer):
    two = {name: table[table["seed"] < 2] for name, table in every_layer.items()}
    found = layers.correlations(two, made_up.evidence())
    assert found["value"].notna().all()
    assert found[["low", "high", "less_layer_low", "less_layer_high"]].isna().all(axis=None)
    nothing = tables.with_settings({})
    verdicts = predictions.predictions(nothing, nothing, two, made_up.evidence()).set_index("prediction")["holds"]
    assert set(verdicts[["P11", "P12"]]) == {"undecided"}


def test_the_interval_of_a_correlation_widens_with_the_disagreement_of_seeds(every_layer):
    noisy = dict(every_layer)
    shifts = np.random.default_rng(1).normal(0, 0.05, len(noisy["runs"]))
    noisy["runs"] = noisy["runs"].assign(avg=noisy["runs"]["avg"] + shifts)
    row = only(layers.correlations(noisy, made_up.evidence()), model=QWEN, outcome="end", predictor="layer")
    assert row["high"] - row["low"] > 0.1


@pytest.mark.parametrize(
    ("ends", "side", "bound", "verdict"),
    [
        ((0.1, 0.3), "above", 0.0, "yes"),
        ((-0.1, 0.3), "above", 0.0, "undecided"),
        ((-0.3, -0.1), "above", 0.0, "no"),
        ((0.1, 0.3), "above", 0.2, "undecided"),
        ((-0.3, -0.1), "below", 0.0, "yes"),
        ((-0.3, 0.005), "below", 0.01, "yes"),
        ((-0.3, 0.02), "below", 0.01, "undecided"),
        ((0.02, 0.03), "below", 0.01, "no"),
        ((-0.1, 0.1), "around", 0.0, "yes"),
        ((0.1, 0.2), "around", 0.0, "no"),
        ((-0.003907, -0.003906), "around", 0.0, "undecided"),
        ((np.nan, np.nan), "around", 0.0, "undecided"),
        ((-0.009, 0.008), "within", 0.01, "yes"),
        ((-0.009, 0.02), "within", 0.01, "undecided"),
        ((-0.3, -0.02), "within", 0.01, "no"),
        ((0.02, 0.3), "within", 0.01, "no"),
        ((0.0, 0.0), "above", 0.0, "no"),
    ],
)
def test_a_prediction_is_judged_by_the_interval(ends, side, bound, verdict):
    low, high = ends
    assert predictions.judged({"value": 0.0, "low": low, "high": high, "seeds": 3}, side, bound) == verdict
    assert predictions.judged({"value": np.nan, "low": np.nan, "high": np.nan, "seeds": 0}, side, bound) == "not run"


@pytest.fixture(scope="module")
def judged(e1, e2, every_layer):
    return predictions.predictions(e1, e2, every_layer, made_up.evidence())


def test_every_prediction_is_judged_in_every_setting(judged):
    counts = predictions.counted(judged).set_index("prediction")
    assert list(counts.index) == list(predictions.NAMES)
    assert counts["settings"].to_list() == SETTINGS
    assert (counts[["yes", "no", "undecided", "not run"]].sum(axis=1) == counts["settings"]).all()
    assert (counts["not run"] == 0).all()
    assert counts.loc["P1", "seeds"] == "3"


def test_verdicts_on_the_mechanism_follow_from_the_made_up_runs(judged, e1):
    kl_at_60 = [10 - 3 + (0.05 + 1.5 * made_up.NOISE[seed]) * 30 for seed in range(3)]
    row = only(judged.query("prediction == 'P2'"), model=QWEN, layer=2, rate=1e-4, quantity="kl_rise")
    np.testing.assert_allclose(row["value"], np.mean([kl / min(kl, 7.0) - 1 for kl in kl_at_60]), **EXACT)
    row = only(judged.query("prediction == 'P4'"), model=QWEN, layer=2, rate=1e-4)
    # The mean of steps 51 to 60 less that of 1 to 10, at a tenth of a token a step.
    np.testing.assert_allclose([row["value"], row["low"]], [5.0, 5.0], rtol=0, atol=1e-9)
    assert row["holds"] == "yes"
    changed = mechanism.changes(e1).iloc[0]
    np.testing.assert_allclose(changed[["own_length", "solutions_60", "own_60"]].astype(float), [2, 0, 0], **EXACT)
    rewards = np.array([0.45 + 0.01 * min(s, 30) - 0.015 * max(s - 30, 0) for s in range(1, 61)])
    best = max(rewards[s : s + 10].mean() for s in range(51))
    row = only(judged.query("prediction == 'P5'"), model=QWEN, layer=2, rate=1e-4, quantity="reward_fall")
    np.testing.assert_allclose(row["value"], best - rewards[-10:].mean(), **EXACT)
    row = only(judged.query("prediction == 'P6'"), model=QWEN, rate=3e-4)
    np.testing.assert_allclose(row["value"], 0.4, **EXACT)
    assert row["holds"] == "yes"


def test_verdicts_on_dose_and_layers_follow_from_the_made_up_runs(judged):
    assert (judged.loc[judged["prediction"] == "P7", "holds"] == "yes").all()
    assert (judged.loc[judged["prediction"] == "P8", "holds"] == "yes").all()
    row = only(judged, prediction="P10", model=QWEN)
    # Each step of alignment costs half a step without any noise, so that no other dose is as good as 4.
    assert (row["value"], row["low"], row["high"], row["holds"]) == (4, 4, 4, "yes")
    row = only(judged, prediction="P11", model=QWEN)
    assert (row["holds"], row["bound"]) == ("yes", 0.5)
    # The made-up entropy change falls with the layer exactly, so it predicts as well as the number.
    row = only(judged, prediction="P12", model=QWEN)
    np.testing.assert_allclose(row["value"], 0.0, **EXACT)
    assert row["holds"] == "yes"


def test_a_dose_that_costs_least_is_decided_only_if_no_larger_one_may_be_as_good(e2):
    nothing = tables.with_settings({})
    one = {name: table[table["seed"] == 0] for name, table in e2.items()}
    row = only(predictions.predictions(nothing, one, nothing, pd.DataFrame()), prediction="P10", model=QWEN)
    assert (row["value"], row["low"], row["high"], row["holds"], row["agrees"]) == (4, 4, 48, "undecided", True)


def test_a_setting_fails_if_one_of_its_parts_does():
    rows = [
        {"prediction": "P2", "model": QWEN, "layer": layer, "rate": 1e-4, "dose": np.nan, "seeds": 3, "holds": holds}
        | {"agrees": holds != "no"}
        for layer, parts in {2: ("yes", "no"), 4: ("yes", "undecided"), 6: ("yes", "yes"), 7: ("no", "not run")}.items()
        for holds in parts
    ]
    counts = predictions.counted(pd.DataFrame(rows)).iloc[0]
    assert counts[["yes", "no", "undecided", "not run"]].to_list() == [1, 1, 1, 1]
    assert counts["agrees"] == 2


def test_without_runs_every_prediction_is_not_run():
    nothing = tables.with_settings({})
    counts = predictions.counted(predictions.predictions(nothing, nothing, nothing, pd.DataFrame()))
    assert (counts["not run"] == counts["settings"]).all()
    assert counts["settings"].to_list() == SETTINGS


def test_completeness_counts_runs_and_whole_seeds(tmp_path):
    made_up.write(tmp_path, "methods", range(2))
    row = only(tables.completeness(["methods"], tmp_path), part="methods")
    assert (row["planned"], row["done"], row["whole"]) == (18, 12, 2)
    np.testing.assert_allclose(row["hours"], 6 * 180 / 3600, **EXACT)
    made_up.write(tmp_path, "e2", range(5))
    # Without a run of its own, a part is taken to be as slow as E2: 180 s for 120 steps.
    row = only(tables.completeness(["e1"], tmp_path), part="e1")
    np.testing.assert_allclose(row["hours"], 84 * 60 * 1.5 / 3600, **EXACT)
    assert {job.seed for job in tables.missing_jobs("methods", tmp_path)} == {2}
    assert len(tables.missing_jobs("e1", tmp_path)) == len(jobs("e1"))
