"""The random baseline: values against an independent computation, storage and figures."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from plotting_fixtures import assert_legible, make_analyses
from tiny import ragged_responses, reference, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from internal_policy import Analysis, AnalyzeConfig, UserError, analyze
from internal_policy.analysis import pipeline, random_baseline
from internal_policy.cli import display
from internal_policy.extractors import reduce_responses
from internal_policy.plotting import analysis as figures
from internal_policy.report import analysis_report

NATS = 1e-5
"""What float32 states may differ by from the definition in float64."""


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture
def interrupt_second(monkeypatch):
    """From its call on, the second batch that is reduced is interrupted; the list has the arguments of each."""

    def begin():
        calls = []

        def interrupted(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return reduce_responses(*arguments)

        monkeypatch.setattr(pipeline, "reduce_responses", interrupted)
        return calls

    return begin


def interrupt(*arguments):
    raise KeyboardInterrupt


def measured(model, **options):
    return analyze(model, tiny_tokenizer(), responses=ragged_responses(6), **options)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("baseline")


@pytest.fixture(scope="module")
def analysis(model, root):
    return measured(model, seed=3, random_baseline=True, output=root)


def test_baseline_matches_a_model_initialised_by_transformers_with_the_seed(analysis, model):
    torch.manual_seed(3)
    random = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    found = [reference(random, record) for record in ragged_responses(6)]
    assert list(analysis.baseline.columns) == list(analysis.layers.columns)
    for row in analysis.baseline.to_dict("records"):
        values = {k: np.concatenate([rows[row["layer"] - 1][k] for rows, _ in found]) for k in found[0][0][0]}
        into, out = (values[f"{row['site']}_{end}"].mean() for end in ("in", "out"))
        wanted = {"entropy_in": into, "entropy_out": out, "change": out - into}
        assert {k: row[k] for k in wanted} == pytest.approx(wanted, abs=NATS)
    policy = np.concatenate([p for _, p in found])[:, 1].mean()
    assert analysis.baseline_model["policy_entropy"]["mean"] == pytest.approx(policy, abs=NATS)
    # Different from the model's own values, which are the same as without a baseline.
    assert np.abs(analysis.baseline["entropy_out"] - analysis.layers["entropy_out"]).max() > 1000 * NATS


def test_the_seed_changes_only_the_baseline(analysis, model):
    before = torch.get_rng_state()
    again, other = (measured(model, seed=seed, random_baseline=True) for seed in (3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    pd.testing.assert_frame_equal(again.baseline, analysis.baseline)
    assert again.baseline_model == analysis.baseline_model
    assert not np.allclose(other.baseline["entropy_out"], again.baseline["entropy_out"], atol=NATS)
    pd.testing.assert_frame_equal(measured(model, seed=3).layers, again.layers)


def test_baseline_is_added_to_a_finished_analysis_and_resumed(analysis, model, tmp_path, interrupt_second):
    options = {"seed": 3, "output": tmp_path, "batch_size": 2}
    place = measured(model, **options).path
    before = {p.name: p.read_bytes() for p in place.iterdir() if p.name != "analysis.json"}
    calls = interrupt_second()
    with pytest.raises(KeyboardInterrupt):
        measured(model, random_baseline=True, **options)
    # The finished analysis is unchanged.
    assert Analysis.load(place).baseline is None
    resumed = measured(model, random_baseline=True, **options)
    assert sum(len(responses) for _, responses in calls[2:]) == 4
    np.testing.assert_allclose(resumed.baseline["change"], analysis.baseline["change"], atol=NATS)
    assert {p.name for p in place.iterdir()} == {*before, "analysis.json", "baseline.csv"}
    assert {name: (place / name).read_bytes() for name in before} == before
    # It is stored now, so nothing is computed whether it is requested or not.
    for wanted in (True, False):
        assert measured(model, random_baseline=wanted, **options).baseline is not None
    assert len(calls) == 4


def test_additions_are_made_together_with_the_baseline_and_resumed(model, tmp_path, monkeypatch):
    options = {"output": tmp_path, "batch_size": 2}
    measured(model, **options)
    wanted = {"random_baseline": True, "divergences": True, **options}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "add_baseline", interrupt)
        with pytest.raises(KeyboardInterrupt):
            measured(model, **wanted)
    calls = []

    def broken_off(addition):
        calls.append(addition)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.ADDITION_MEASURES, "by", broken_off)
        with pytest.raises(KeyboardInterrupt):
            measured(model, by=("position",), **wanted)
    assert len(calls) == 1
    both = measured(model, by=("position",), **wanted)
    assert both.baseline is not None
    assert set(both.additions) == {"divergences", "divergence_matrix", "groups"}


def test_an_interrupted_baseline_is_completed_before_an_addition(model, tmp_path, interrupt_second):
    options = {"output": tmp_path, "batch_size": 2}
    plain = measured(model, **options)
    calls = interrupt_second()
    with pytest.raises(KeyboardInterrupt):
        measured(model, random_baseline=True, **options)
    assert list((plain.path / "work").glob("baseline-*.npz"))
    both = measured(model, random_baseline=True, divergences=True, **options)
    # Of three portions of the baseline, two were left.
    assert len(calls) == 4
    assert both.baseline is not None
    assert set(both.additions) == {"divergences", "divergence_matrix"}
    assert not (plain.path / "work").exists()


def test_baseline_survives_saving_and_loading_and_is_removed_with_its_analysis(analysis, tmp_path):
    manifest = json.loads((analysis.path / "analysis.json").read_text())
    assert manifest["config"]["random_baseline"] is True
    assert manifest["baseline"]["seed"] == 3
    assert manifest["timings"]["baseline"] > 0
    loaded = Analysis.load(analysis.path)
    pd.testing.assert_frame_equal(loaded.baseline, analysis.baseline)
    assert loaded.baseline_model == analysis.baseline_model
    place = analysis.save(tmp_path)
    assert (place / "baseline.csv").is_file()
    without = pd.read_csv(place / "layers.csv")
    assert len(without) == len(loaded.layers)


def test_overwriting_an_analysis_removes_its_baseline(model, analysis, tmp_path):
    shutil.copytree(analysis.path, tmp_path / analysis.path.name)
    over = measured(model, seed=5, output=tmp_path, overwrite=True)
    assert over.path == tmp_path / analysis.path.name
    assert not (over.path / "baseline.csv").exists()
    assert over.baseline is None


def test_eq_4_is_verified_and_a_failure_keeps_the_analysis(model, tmp_path, monkeypatch):
    def refuse(described):
        raise UserError(f"{described.name}: eq. 4 does not hold")

    monkeypatch.setattr(random_baseline, "prove", refuse)
    with pytest.raises(UserError, match=r"with random weights: eq\. 4 does not hold"):
        measured(model, random_baseline=True, output=tmp_path)
    assert Analysis.load(tmp_path).baseline is None


def test_one_model_is_in_memory_at_a_time(monkeypatch):
    kept = {id(o) for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)}
    alive = []

    def watched(*arguments):
        alive.append(sum(issubclass(type(o), PreTrainedModel) and id(o) not in kept for o in gc.get_objects()))
        return build_random_model(*arguments)

    build_random_model = random_baseline._random_model
    monkeypatch.setattr(random_baseline, "_random_model", watched)
    found = analyze("testbed/qwen3", max_responses=2, max_new_tokens=3, random_baseline=True)
    assert alive == [0]
    assert found.baseline["entropy_out"].max() <= np.log(found.vocab_size) + NATS


@pytest.mark.parametrize(
    "option",
    [{"tolerance": 0.1}, {"quantization": "4bit"}, {"device_map": "auto"}, {"remote": True, "backend": "nnsight"}],
)
def test_incompatible_options_are_refused_in_one_line(option):
    with pytest.raises(UserError, match=f"--{next(iter(option)).replace('_', '-')} was given with --random-baseline"):
        AnalyzeConfig(random_baseline=True, **option)


def test_a_quantised_model_is_refused_before_any_work(model, tmp_path):
    packed = copy.deepcopy(model)
    packed.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(UserError, match=r"quantised weights \(bitsandbytes 4-bit"):
        measured(packed, random_baseline=True, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_figures_report_and_terminal_show_the_baseline(analysis):
    table = figures.baseline_data([analysis])
    rows = table[(table["site"] == "ffn") & (table["quantity"] == "change")]
    np.testing.assert_array_equal(rows["value"], analysis.baseline.query("site == 'ffn'")["change"])
    for plot, n_panels in ((figures.entropy_flow, 1), (figures.entropy_change, 2)):
        lines = [line for ax in plot([analysis]).axes for line in ax.lines if line.get_label() == "random weights"]
        assert len(lines) == n_panels
    np.testing.assert_array_equal(lines[-1].get_ydata(), rows["value"])
    page = analysis_report(analysis)
    assert "random weights, FFN" in page
    assert "random weights, layer output" in page
    expected = f"random weights of the same architecture (seed 3): policy entropy {policy_of(analysis):.4f} nats"
    assert any(remark.startswith(expected) for remark in display.remarks(analysis))
    plain = replace(analysis, baseline=None, baseline_model=None)
    assert figures.baseline_data([plain]).empty
    assert "random weights" not in analysis_report(plain)


@pytest.mark.parametrize(("draw", "n_models"), [(figures.entropy_flow, 2), (figures.entropy_change, 1)])
def test_the_legend_fits_the_baseline(draw, n_models):
    assert_legible(draw([replace(analysis, baseline=analysis.layers) for analysis in make_analyses(n_models)]))


def policy_of(analysis):
    return analysis.baseline_model["policy_entropy"]["mean"]
