"""The benchmark of the analysis: contenders agree, measurements are right, and the page shows them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis.test_operation_counts import Operations
from tiny import VOCAB, ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import models
from internal_policy.data.responses import read_responses

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import analysis_contenders as contenders
import analysis_report as report
import analysis_worker as worker
import benchmark_analysis as benchmark

LAYERS = 3
# Sums of float32 products in another order: logits of size ~10 are off by ~1e-6.
FLOAT32_NATS = 1e-5


@pytest.fixture(scope="module")
def model():
    return models.wrap(tiny_model("qwen3", layers=LAYERS, tied=True), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def responses(model):
    # More than a batch, so that the order in which batches are made must be undone.
    return read_responses(ragged_responses(n=20), model.tokenizer, "plain")


@pytest.fixture(scope="module")
def exact(model, responses):
    found = contenders.ours(model)(responses).entropies
    assert found.shape == (sum(r.n_tokens for r in responses), LAYERS, len(contenders.STATES))
    return found


@pytest.mark.parametrize("name", ["paper", "transformer-lens", "float64", "without-parts"])
def test_contenders_agree_at_every_token(name, model, responses, exact):
    found = contenders.CONTENDERS[name](model)(responses)
    np.testing.assert_allclose(found.entropies, exact, rtol=0, atol=FLOAT32_NATS)
    assert found.entropies.std() > 0.01


def test_a_tolerance_that_needs_all_positions_is_exact(model, responses, exact, monkeypatch):
    monkeypatch.setattr(contenders, "TOLERANCE", 1e-9)
    found = contenders.CONTENDERS["tolerance"](model)(responses)
    assert found.facts["analysed"] == found.facts["total"] == len(exact)
    means = exact.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(found.changes, means[:, 1::2] - means[:, 0::2], rtol=0, atol=FLOAT32_NATS)
    assert not found.half_widths.any()


def test_the_floor_has_four_products_per_layer_plus_two(model, responses):
    run = contenders.CONTENDERS["floor"](model)
    with Operations() as counted:
        run(responses)
    assert counted.logits == sum(r.n_tokens for r in responses) * VOCAB * (4 * LAYERS + 2)


@pytest.mark.slow
def test_processes_side_by_side():
    shape = {**benchmark.SMALL, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 500}
    job = benchmark.Job(shape, [benchmark.random_response(9, 500)])
    part = benchmark.side_by_side(job, ("ours", "paper", "tolerance", "floor"), 1)
    assert part["tokens"] == 9
    assert part["agreement"]["paper"]["token"] < FLOAT32_NATS
    assert part["tolerance"]["within"] > 0
    assert list(report.summary(part).index) == ["ours", "tolerance", "paper", "floor"]


def test_a_contender_that_disagrees_stops_the_benchmark():
    ours = np.ones((50, 4, 6))
    assert benchmark.agreement(ours, ours + 0.9 * benchmark.AGREEMENT)["mean"] < benchmark.AGREEMENT
    theirs = ours.copy()
    theirs[:, 2, 3] += 2 * benchmark.AGREEMENT
    with pytest.raises(SystemExit, match="differ by"):
        benchmark.agreement(ours, theirs)
    theirs[:] = np.nan
    with pytest.raises(SystemExit, match="differ by"):
        benchmark.agreement(ours, theirs)


def test_intervals_are_checked_against_the_exact_changes():
    ours = np.zeros((10, 2, 6))
    ours[:, :, 1] = 0.5
    changes = np.array([[0.5, 0.0, 0.0], [0.52, 0.0, 0.2]])
    found = {"changes": changes, "half_widths": np.full((2, 3), 0.03)}
    assert benchmark.within(ours, found) == {"changes": 6, "within": 5}


def test_peak_memory_is_what_the_call_adds(model, responses, monkeypatch):
    size = 96

    def hungry(_):
        def run(responses):
            if len(responses) > 2:
                torch.ones(size * 2**18)
            return contenders.Found()

        return run

    monkeypatch.setitem(contenders.CONTENDERS, "hungry", hungry)
    measured, _ = worker.measure("hungry", model, responses)
    if measured["peak_bytes"] is None:
        pytest.skip("this system does not tell a process its peak memory")
    # The kernel counts pages in per-processor batches; nothing else allocates meanwhile.
    assert measured["peak_bytes"] / 2**20 == pytest.approx(size, abs=8)
    assert measured["tokens"] == sum(r.n_tokens for r in responses)


def part(**seconds):
    """Results as the benchmark stores them, with 7 MiB for each contender."""
    runs = [
        {"contender": name, "repeat": i, "seconds": s, "peak_bytes": 7 * 2**20}
        for name, values in seconds.items()
        for i, s in enumerate(values)
    ]
    return {"runs": runs, "repeats": 3}


def test_ratios_are_computed_per_repeat():
    # The second repeat was slow for all contenders.
    table = report.summary(part(paper=[4.0, 40.0, 4.4], ours=[2.0, 20.0, 2.0], floor=[1.0, 10.0, 1.25]))
    assert table.loc["ours", "faster"] == 2.0
    assert table.loc["ours", "over_floor"] == 2.0
    assert table.loc["paper", "seconds"] == 4.4
    assert (table["peak_mib"] == 7).all()


def test_an_option_is_compared_with_what_it_adds_to():
    calls = {"--heads": [4.0, 40.0, 6.0], "analyze": [2.0, 20.0, 2.0]}
    table = report.option_costs(part(**calls, ours=[1.2, 12.0, 1.3], **{"without-parts": [1.0, 10.0, 1.0]}))
    assert table.index.tolist() == ["without-parts", "ours", "analyze", "--heads"]
    assert table["ratio"].tolist() == pytest.approx([1.0, 1.2, 1.0, 2.0])


def test_the_page_shows_the_measurements():
    written = report.PAGE.read_text("utf-8").split(report.BEGIN)[1].split(report.END)[0]
    assert written.strip() == report.tables(report.read_results()).strip()


def test_the_figure_shows_every_contender_and_size():
    runs = [
        {"contender": name, "repeat": r, "axis": axis, "value": v, "seconds": v / 100 + r, "peak_bytes": v * 2**20}
        for name in ("ours", "paper", "floor")
        for r in range(3)
        for axis, values in benchmark.SCALES.items()
        for v in values
    ]
    figure = report.scaling_figure({"runs": runs})
    assert len(figure.axes) == 2 * len(benchmark.SCALES)
    for ax, quantity in zip(figure.axes[:2], ("seconds", "memory"), strict=True):
        assert len(ax.lines) == 3
        values = benchmark.SCALES["tokens"]
        expected = values if quantity == "memory" else [v / 100 + 1 for v in values]
        np.testing.assert_allclose(ax.lines[0].get_ydata(), expected)
