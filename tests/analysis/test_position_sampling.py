"""Positions are sampled until every change meets the tolerance: unbiased, with valid intervals, and far fewer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Analysis, UserError, analyze, compare
from internal_policy.analysis import pipeline, position_sampling
from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.position_sampling import capture_in_rounds
from internal_policy.analysis.position_subset import (
    Design,
    design_positions,
    estimate,
    positions_needed,
    response_means,
)
from internal_policy.analysis.results import ANALYSIS
from internal_policy.cli import display
from internal_policy.data.responses import Response
from internal_policy.extractors import QUANTITIES, TokenValues, reduce_responses
from internal_policy.statistics import clustered_mean
from internal_policy.utils.distributed import Processes
from internal_policy.utils.workspace import Workspace

TOLERANCE = 0.05


class Recorded:
    """The exact per-token values of an embedded model, from which any sample of positions can be evaluated."""

    def __init__(self, model):
        self.analysis = analyze(model, keep_tokens=10**6, batch_size=128)
        rows = self.analysis.sequences[["prompt", "response", "input_ids", "prompt_length"]].to_dict("records")
        self.responses = [Response(**row) for row in rows]
        n_layers, tokens = self.analysis.n_layers, self.analysis.tokens.sort_values(["response", "token", "layer"])
        columns = {}
        for site in ("layer", "attn", "ffn"):
            part = tokens[tokens["site"] == site]
            values = {name: part[name] for name in ("cosine", "rms_in", "rms_out")}
            values |= {"in": part["entropy_in"], "out": part["entropy_out"]}
            values["rescaled"] = part["entropy_in"] + part["change_direction"]
            for name, value in values.items():
                columns[f"{site}_{name}"] = value.to_numpy().reshape(-1, n_layers)
        self.layers = np.stack([columns[q] for q in QUANTITIES], axis=-1)
        self.policy = tokens.loc[tokens["site"] == "policy", ["entropy_in", "entropy_out"]].to_numpy()
        sites = [columns[f"{s}_out"].astype(float) - columns[f"{s}_in"] for s in ("layer", "attn", "ffn")]
        self.changes = np.stack(sites, axis=-1).reshape(len(self.policy), -1)
        self.exact = self.changes.mean(axis=0)
        self.starts = dict(zip(map(id, self.responses), self.first_positions(), strict=True))

    def first_positions(self):
        lengths = [r.n_tokens for r in self.responses]
        return np.cumsum(lengths) - lengths

    def run(self, batch):
        at = [self.starts[id(response)] + tokens for response, tokens in batch]
        return [TokenValues(self.layers[i], self.policy[i]) for i in at]

    def repeat(self, seed, directory, tolerance=TOLERANCE):
        """The sampling of positions and rounds as in the analysis, with stored values instead of computed ones."""
        config = AnalyzeConfig(tolerance=tolerance, seed=seed, batch_size=10**6)
        workspace = Workspace(directory / f"{tolerance}-{seed}", ANALYSIS)
        workspace.open({}, overwrite=True)
        captured = capture_in_rounds(config, self.responses, self.run, workspace, Processes())
        (portion,) = captured.portions
        lengths = np.array([r.n_tokens for r in self.responses])
        means = np.average(portion["layers"], axis=0, weights=lengths)
        into, out = ([QUANTITIES.index(f"{s}_{end}") for s in ("layer", "attn", "ffn")] for end in ("in", "out"))
        workspace.close()
        return (means[:, out] - means[:, into]).ravel(), captured.sample.half_widths.ravel(), captured.sample.summary()


@pytest.fixture(scope="module")
def recorded():
    return Recorded("testbed/qwen3")


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def check_coverage(recorded, directory, repeats):
    found = [recorded.repeat(seed, directory) for seed in range(repeats)]
    means, half_widths = (np.array([f[i] for f in found]) for i in (0, 1))
    n = np.array([f[2]["analysed"] for f in found])
    assert (half_widths <= TOLERANCE).all()
    assert (n * 8 <= len(recorded.changes)).all(), n.max()
    covered = np.abs(means - recorded.exact) <= half_widths
    # An interval with correct coverage covers 0.95 +- 0.015 of 200 repeats, +- 0.034 of 40; the mean of all intervals
    # varies less, since they depend on one another only in part.
    stderr = np.sqrt(0.95 * 0.05 / repeats)
    assert abs(covered.mean() - 0.95) <= 1.3 * stderr
    assert covered.mean(axis=0).min() > 0.95 - 4 * stderr
    # Unbiased: the mean of the estimates differs from the exact value by no more than their standard error explains.
    z = (means.mean(axis=0) - recorded.exact) / (means.std(axis=0, ddof=1) / np.sqrt(repeats))
    assert np.sqrt((z**2).mean()) < 1.6
    assert np.abs(z).max() < 4.5
    return n


@pytest.mark.parametrize("repeats", [40, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_interval_covers_the_exact_value_with_far_fewer_positions(recorded, tmp_path, repeats):
    n = check_coverage(recorded, tmp_path, repeats)
    assert n.mean() * 10 <= len(recorded.changes)


@pytest.mark.slow
def test_the_interval_covers_the_exact_value_on_the_other_embedded_model(tmp_path):
    check_coverage(Recorded("testbed/llama"), tmp_path, 200)


def test_the_order_is_a_seeded_permutation_of_all_positions(recorded):
    design = design_positions(recorded.responses, 3)
    total = recorded.analysis.n_tokens
    assert sorted(design.order) == list(range(total))
    starts = recorded.first_positions()
    np.testing.assert_array_equal(starts[design.response] + design.token, np.arange(total))
    again, other = design_positions(recorded.responses, 3), design_positions(recorded.responses, 4)
    np.testing.assert_array_equal(design.order, again.order)
    np.testing.assert_array_equal(design.block, other.block)
    assert not np.array_equal(design.order, other.order)


def test_every_prefix_samples_each_block_proportionally(recorded):
    design = design_positions(recorded.responses, 0)
    assert (design.taken(design.pilot) == 2).all()
    for n in (design.pilot + 1, 600, 1000, 5000, len(design.order)):
        # At least two, otherwise the share rounded down or up; a share below two slightly lowers those of the others.
        off = design.taken(n) - np.maximum(design.sizes * n / len(design.order), 2)
        assert np.abs(off).max() < 1.5
    assert (design.taken(len(design.order)) == design.sizes).all()


def test_positions_within_a_block_are_equally_likely(recorded):
    counts = np.zeros(recorded.analysis.n_tokens)
    for seed in range(40):
        design = design_positions(recorded.responses, seed)
        counts[design.order[: design.pilot]] += 1
    expected = 40 * 2 / design.sizes[design.block]
    # Pearson's statistic of independent binomials has as many degrees of freedom as there are positions, less blocks.
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - len(design.sizes)
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_means_and_variances_match_the_textbook(recorded):
    design = design_positions(recorded.responses, 1)
    n, column = 700, 5
    values = recorded.changes[design.order[:n]]
    found = estimate(design, values)
    mean, variance = 0.0, 0.0
    for block, size in enumerate(design.sizes):
        mine = values[design.block[design.order[:n]] == block, column]
        mean += size / len(design.order) * mine.mean()
        variance += (size / len(design.order)) ** 2 * (1 - len(mine) / size) * mine.var(ddof=1) / len(mine)
    assert found.mean[column] == pytest.approx(mean, rel=1e-12)
    # Some 300 degrees of freedom and little skewness: Student's quantile is within 2 % of the normal one.
    assert found.half_width[column] == pytest.approx(1.96 * np.sqrt(variance), rel=0.03)


def in_blocks(n_blocks, per_block, pilot):
    """Equal blocks of positions; the first `pilot` positions alternate between the blocks."""
    block = np.tile(np.arange(n_blocks), per_block)
    total = np.arange(len(block))
    return Design(total, total, block, total, pilot)


@pytest.mark.parametrize(("n_blocks", "each"), [(1, 2), (1, 3), (1, 4), (2, 2), (5, 2)])
def test_interval_coverage_with_few_normal_values(n_blocks, each):
    """Two degrees of freedom too many would give coverage 0.81, 0.90 and 0.92 in one block of two, three and four."""
    n = n_blocks * each
    # 20000 samples of so many positions that their mean is that of the distribution, 0.
    samples = np.random.default_rng(0).normal(size=(n, 20000))
    found = estimate(in_blocks(n_blocks, 20000, n), samples)
    covered = (np.abs(found.mean) <= found.half_width).mean()
    # Four standard errors of 20000 below; above, samples of three or more look skewed by chance and are given more.
    assert 0.95 - 4 * 0.0016 <= covered <= 0.97


class Simulated(Recorded):
    """Changes that are 0 except at a rare position, where they are exponential with a mean of 3 nats."""

    def __init__(self, rarity, seed, n_responses=40, n_tokens=32):
        draw = np.random.default_rng(seed)
        ids = draw.integers(0, 50, (n_responses, n_tokens + 1)).tolist()
        self.responses = [Response("", "", row, 1) for row in ids]
        rare = draw.random(n_responses * n_tokens) < rarity
        changes = np.where(rare, draw.exponential(3, len(rare)), 0.0)
        self.layers = np.zeros((len(rare), 1, len(QUANTITIES)))
        for site in ("layer", "attn", "ffn"):
            self.layers[:, 0, QUANTITIES.index(f"{site}_out")] = changes
        self.policy = np.zeros((len(rare), 2))
        self.exact = changes.mean()
        self.starts = dict(zip(map(id, self.responses), self.first_positions(), strict=True))


@pytest.mark.parametrize("repeats", [30, pytest.param(100, marks=pytest.mark.slow)])
def test_rare_large_changes_are_not_missed(tmp_path, repeats):
    """A fiftieth of the positions change: without a least number of them a fifth of all runs stop at 0 +- 0."""
    off, covered, analysed, reported_few = [], [], [], []
    wider = np.sqrt(100 / repeats)
    for seed in range(repeats):
        population = Simulated(0.02, seed)
        mean, half_width, summary = population.repeat(seed, tmp_path)
        assert half_width[0] > 0 or summary["analysed"] == summary["total"]
        off.append(mean[0] - population.exact)
        covered.append(abs(off[-1]) <= half_width[0] + 1e-9)
        analysed.append(summary["analysed"] / summary["total"])
        reported_few.append(summary["few"] > 0)
    # The summary warns that the half-width covers less often than its nominal level.
    assert np.mean(reported_few) > 0.7
    # Coverage is 0.92 in 600 such runs, known to 0.027 from 100. Two per block with symmetric intervals give 0.63.
    assert np.mean(covered) >= 0.92 - 4 * 0.027 * wider
    # The bias of those 600 is -0.005 of 0.06, known to 0.002 from 100; otherwise it is -0.019.
    assert abs(np.mean(off)) < 0.005 + 4 * 0.002 * wider
    assert np.mean(analysed) < 0.6


def test_constant_values_are_accepted_after_a_thousand_positions(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "layers", np.full_like(recorded.layers, 0.1))
    _, half_width, summary = recorded.repeat(0, tmp_path)
    assert 1024 <= summary["analysed"] < 2048 < summary["total"]
    assert (half_width == 0).all()


def test_only_the_main_process_decides_when_to_stop(recorded, tmp_path):
    class Follower(Processes):
        def on_main(self, do):
            return ends.pop(0)

    config = AnalyzeConfig(tolerance=1e-6, batch_size=10**6)
    workspace = Workspace(tmp_path, ANALYSIS)
    workspace.open({}, overwrite=True)
    # Its own values would neither stop at 700 positions nor continue with exactly 700.
    ends = [428, 700, 700]
    sample = capture_in_rounds(config, recorded.responses, recorded.run, workspace, Follower()).sample
    assert (sum(map(len, sample.tokens)), sample.rounds) == (700, 2)


def test_response_estimates_add_up_and_have_the_clustered_variance(recorded):
    """The response-clustered error of sampled estimates contains both the variance of responses and of the sampling."""
    lengths = [r.n_tokens for r in recorded.responses]
    starts = recorded.first_positions()
    means = np.add.reduceat(recorded.changes, starts) / np.array(lengths)[:, None]
    of_responses = clustered_mean(means, lengths)[1]
    squares, estimates = [], []
    for seed in range(60):
        design = design_positions(recorded.responses, seed)
        values = recorded.changes[design.order[:600]]
        found = response_means(design, values)
        mean, stderr = clustered_mean(found, lengths)
        np.testing.assert_allclose(mean, estimate(design, values).mean, rtol=0, atol=1e-12)
        squares.append(stderr**2)
        estimates.append(mean)
    wanted = of_responses**2 + np.var(estimates, axis=0, ddof=1)
    # The variance of 60 estimates is known to 18 %; of 24 columns' mean ratio, which are correlated, to some 6 %.
    assert np.mean(np.mean(squares, axis=0) / wanted) == pytest.approx(1, abs=0.15)
    whole = response_means(design, recorded.changes[design.order])
    np.testing.assert_allclose(whole, means, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_embedded_model_needs_eight_times_fewer_positions(recorded, monkeypatch):
    projected = []

    def counted(*arguments):
        values = reduce_responses(*arguments)
        projected.extend(len(v.layers) for v in values)
        return values

    monkeypatch.setattr(pipeline, "reduce_responses", counted)
    sequences = recorded.analysis.sequences.to_dict("records")
    found = analyze("testbed/qwen3", responses=sequences, tolerance=TOLERANCE)
    positions = found.positions
    assert sum(projected) == positions["analysed"] == len(np.unique(np.concatenate(_chosen(found))))
    assert 8 * sum(projected) <= recorded.analysis.n_tokens == positions["total"]
    assert positions["half_width"] == found.layers["change_half_width"].max() <= TOLERANCE
    row = found.layers.loc[found.layers["change_half_width"].idxmax()]
    assert (row["layer"], row["site"]) == (positions["layer"], positions["site"])
    off = (found.layers["change"] - recorded.analysis.layers["change"]).abs()
    # 24 intervals at level 0.95; a miss is rarely far off.
    assert (off <= found.layers["change_half_width"]).sum() >= 20
    assert (off <= 2 * found.layers["change_half_width"]).all()
    assert found.boundary_layer == recorded.analysis.boundary_layer
    both = compare(recorded.analysis, found, labels=["exact", "sampled"])
    assert both.paired["sampled"]
    assert "sampled was analysed at" in " ".join(both.notes)
    rows = both.differences.query("quantity == 'change'")
    # The difference of an estimate from the exact value is the sample's error, whose interval is about the half-width.
    half_widths = rows.merge(found.layers, on=["layer", "site"], validate="1:1")["change_half_width"]
    ratio = (rows["high"] - rows["low"]).to_numpy() / 2 / half_widths.to_numpy()
    assert 0.7 < np.median(ratio) < 1.3
    assert ((rows["low"] <= 0) & (rows["high"] >= 0)).sum() >= 20


def _chosen(analysis):
    """Positions per response, from the counts in the table of responses."""
    counts = analysis.responses.drop_duplicates("response")["n_analysed"]
    return [np.arange(n) + 10**6 * i for i, n in enumerate(counts)]


def test_sampled_tokens_have_their_exact_values(model, tokenizer):
    options = {"tokenizer": tokenizer, "responses": ragged_responses(30), "keep_tokens": 12}
    whole, some = analyze(model, **options), analyze(model, tolerance=0.1, **options)
    keys = ["response", "token", "token_id", "layer", "site"]
    values = ["entropy_in", "entropy_out", "change", "cosine"]
    found = some.tokens.set_index(keys)[values]
    assert 0 < len(found) < len(whole.tokens)
    counts = some.responses.drop_duplicates("response").set_index("response")["n_analysed"]
    assert some.tokens.drop_duplicates(["response", "token"])["response"].nunique() == (counts[:12] > 0).sum()
    assert len(found) == counts[:12].sum() * (3 * 3 + 1)
    wanted = whole.tokens.set_index(keys)[values].loc[found.index]
    # Float32 rounding of differently shaped products.
    pd.testing.assert_frame_equal(found, wanted, check_exact=False, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_batch_size_and_rewards_do_not_change_the_sampled_positions(model, tokenizer):
    options = {"tokenizer": tokenizer, "responses": ragged_responses(40), "tolerance": 0.01, "keep_tokens": 40}
    one, again, other = (analyze(model, batch_size=b, **options) for b in (16, 16, 3))
    pd.testing.assert_frame_equal(one.layers, again.layers, check_exact=True)
    keys = ["response", "token", "layer", "site"]
    pd.testing.assert_frame_equal(one.tokens[keys], other.tokens[keys])
    pd.testing.assert_frame_equal(one.layers, other.layers, check_exact=False, rtol=0, atol=1e-4)
    seeded = analyze(model, seed=1, **options)
    assert not one.tokens[keys].equals(seeded.tokens[keys])


def test_unreachable_tolerances_end_with_the_exact_analysis(model, tokenizer, capsys):
    options = {"tokenizer": tokenizer, "responses": ragged_responses(12)}
    whole, found = analyze(model, **options), analyze(model, tolerance=1e-6, **options)
    assert found.positions["analysed"] == found.positions["total"] == whole.n_tokens
    assert found.positions["half_width"] == 0
    assert (found.layers["change_half_width"] == 0).all()
    same = found.layers.drop(columns="change_half_width")
    pd.testing.assert_frame_equal(same, whole.layers, check_exact=False, rtol=0, atol=1e-5)
    pd.testing.assert_frame_equal(
        found.responses.drop(columns="n_analysed"), whole.responses, check_exact=False, rtol=0, atol=1e-5
    )
    assert found.selection.boundary_layer == whole.selection.boundary_layer
    display.show_analysis(found)
    assert f"analysed all {whole.n_tokens} positions" in capsys.readouterr().out


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 9])
def test_a_single_short_response_is_analysed_completely(model, tokenizer, n_tokens):
    rows = [{"input_ids": list(range(2, 6 + n_tokens)), "prompt_length": 4}]
    found = analyze(model, tokenizer, responses=rows, tolerance=1e-9)
    whole = analyze(model, tokenizer, responses=rows)
    assert found.positions["analysed"] == n_tokens
    np.testing.assert_allclose(found.curve("ffn"), whole.curve("ffn"), rtol=0, atol=1e-6)


def test_an_interrupted_run_resumes_with_the_same_positions(model, tokenizer, tmp_path, monkeypatch):
    options = {"tokenizer": tokenizer, "responses": ragged_responses(40), "tolerance": 0.01, "batch_size": 8}
    whole = analyze(model, output=tmp_path / "whole", **options)
    assert whole.positions["rounds"] >= 2
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return reduce_responses(*arguments)

    monkeypatch.setattr(pipeline, "reduce_responses", interrupted)
    stop = 0
    analyze(model, **options)
    n_calls = len(calls)
    # In the middle of the first round, and in the middle of the second.
    for stop in (3, n_calls - 1):
        calls.clear()
        out = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            analyze(model, output=out, **options)
        assert not list(out.rglob("analysis.json"))
        resumed = analyze(model, output=out, **options)
        assert len(calls) == n_calls + 1
        assert not list(out.rglob("work"))
        for name in ("layers", "responses", "tokens"):
            pd.testing.assert_frame_equal(getattr(resumed, name), getattr(whole, name), check_exact=True)
        assert resumed.positions == whole.positions
        stop = 0


@pytest.fixture(scope="module")
def stopped_in_round_two(model, tokenizer, tmp_path_factory):
    """An analysis in two rounds, and a copy that was interrupted when it had some batches of the second."""
    place = tmp_path_factory.mktemp("stopped")
    options = {"tokenizer": tokenizer, "responses": ragged_responses(40), "tolerance": 0.01, "batch_size": 4}
    whole = analyze(model, output=place / "whole", **options)
    assert whole.positions["rounds"] == 2
    ends = []

    def interrupted(*arguments):
        if len(list(place.glob("killed/*/work/capture-2-*.npz"))) == 3:
            raise KeyboardInterrupt
        return reduce_responses(*arguments)

    def sampled_positions(*arguments):
        ends.append(positions_needed(*arguments))
        return ends[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "reduce_responses", interrupted)
        patch.setattr(position_sampling, "positions_needed", sampled_positions)
        with pytest.raises(KeyboardInterrupt):
            analyze(model, output=place / "killed", **options)
    assert ends == [whole.positions["analysed"]]
    return place / "killed", options, whole


@pytest.mark.parametrize("off", [-1, -40, 40])
def test_another_machine_resumes_with_the_stored_positions(model, stopped_in_round_two, tmp_path, monkeypatch, off):
    killed, options, whole = stopped_in_round_two
    shutil.copytree(killed, tmp_path / "copy")
    monkeypatch.setattr(position_sampling, "positions_needed", lambda *arguments: positions_needed(*arguments) + off)
    resumed = analyze(model, output=tmp_path / "copy", **options)
    assert resumed.positions == whole.positions
    for name in ("layers", "responses", "tokens"):
        pd.testing.assert_frame_equal(getattr(resumed, name), getattr(whole, name), check_exact=True)


@pytest.mark.parametrize("off", [-1, -40, 40])
def test_values_of_other_positions_are_refused(model, stopped_in_round_two, tmp_path, monkeypatch, off):
    killed, options, _ = stopped_in_round_two
    shutil.copytree(killed, tmp_path / "copy")
    (end,) = (tmp_path / "copy").glob("*/work/end-2-*.npz")
    end.unlink()
    monkeypatch.setattr(position_sampling, "positions_needed", lambda *arguments: positions_needed(*arguments) + off)
    with pytest.raises(UserError, match=r"other positions than round 2 .*--overwrite") as reported_few:
        analyze(model, output=tmp_path / "copy", **options)
    assert "\n" not in str(reported_few.value)


def test_sampled_positions_survive_saving_and_loading(model, tokenizer, tmp_path):
    found = analyze(model, tokenizer, responses=ragged_responses(30), tolerance=0.1, output=tmp_path)
    loaded = Analysis.load(tmp_path)
    assert loaded.positions == found.positions
    assert loaded.config["tolerance"] == 0.1
    pd.testing.assert_frame_equal(loaded.layers, found.layers, check_exact=True)
    with pytest.raises(UserError, match=r"tolerance 0\.1 -> 0\.2"):
        analyze(model, tokenizer, responses=ragged_responses(30), tolerance=0.2, output=tmp_path)


def test_terminal_line_of_sampled_positions():
    found = {"tolerance": 0.05, "analysed": 412, "total": 5320, "rounds": 2, "half_width": 0.0471, "layer": 8}
    found |= {"few": 0, "changes": 24}
    assert display.positions_line({**found, "site": "ffn"}) == (
        "analysed 412 of 5320 positions (7.7%) in 2 rounds; largest half-width of a 95% interval from that choice "
        "0.047 nats (layer 8, FFN); tolerance 0.05; ± is the standard error over prompts"
    )
    assert "(layer 8); tolerance" in display.positions_line({**found, "site": "layer"})
    assert display.positions_line({**found, "site": "ffn", "few": 3}).endswith(
        "; 3 of the 24 half-widths rest on a few positions with large values and may miss more often "
        "than one time in 20"
    )


@pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), "0.05", True])
def test_an_invalid_tolerance_is_refused(value):
    with pytest.raises(UserError, match=r"--tolerance is .*; needed is a number") as reported_few:
        AnalyzeConfig(tolerance=value)
    assert "\n" not in str(reported_few.value)


@pytest.mark.slow
def test_two_processes_sample_and_measure_the_same_as_one(tmp_path):
    options = {"max_responses": 40, "batch_size": 4, "keep_tokens": 6, "tolerance": 0.08}
    alone = analyze("testbed/llama", output=tmp_path / "alone", **options)
    assert alone.positions["rounds"] >= 2
    assert alone.positions["analysed"] < alone.positions["total"]
    # As tests/analysis/test_analysis_processes.py starts them.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--num_processes=2", "--main_process_port=0"]
    command += [
        "-m",
        "internal_policy.cli",
        "analyze",
        "--model",
        "testbed/llama",
        "--output",
        str(tmp_path / "two"),
    ]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest half-width") == 1
    two = Analysis.load(tmp_path / "two")
    assert two.positions == alone.positions
    for name in ("layers", "responses", "tokens"):
        pd.testing.assert_frame_equal(getattr(two, name), getattr(alone, name), check_exact=True)
    assert not list((tmp_path / "two").rglob("work"))
