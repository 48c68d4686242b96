"""Analyses under lenses of the user's own: names, digests, resuming, and errors of one line on the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import refused
from command_line import run as run_command
from own_lenses import random_maps, save_as_tuned_lens, save_lens
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Analysis, AnalyzeConfig, UserError, analyze, compare, inspect, models
from internal_policy.analysis import pipeline
from internal_policy.analysis.finished import config_digest, find_finished
from internal_policy.analysis.sweep_targets import require_distinct_outputs
from internal_policy.comparison.study import study
from internal_policy.comparison.tables import differing_settings
from internal_policy.plotting.marks import lens_title
from internal_policy.report.reproduce import analysis_commands

# float32 logits of size 10, and means of them.
FLOAT32_NATS = 1e-5
OPTIONS = {"max_responses": 2, "max_new_tokens": 4, "device": "cpu"}
FEW = ("--max-responses", "2", "--max-new-tokens", "4")


def small(directory, lens, **options):
    return analyze(
        tiny_model("llama"), tiny_tokenizer(), responses=ragged_responses(4), output=directory, lens=lens, **options
    )


def halved(layer, states):
    return states / 2


@pytest.fixture
def tuned(tmp_path):
    return save_lens(tmp_path / "tuned", random_maps(3, 32))


def layers_and_width():
    model = models.load("testbed/qwen3")
    return model.n_layers, int(model.projection.weight.shape[1])


@pytest.fixture(scope="module")
def of_qwen3(tmp_path_factory):
    return save_as_tuned_lens(tmp_path_factory.mktemp("lenses") / "tuned", random_maps(*layers_and_width()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, of_qwen3):
    """A finished analysis under a trained lens; its directory holds the lens too."""
    place = tmp_path_factory.mktemp("finished")
    analyze(output=place / "out", lens=shutil.copytree(of_qwen3, place / "tuned"), **OPTIONS)
    return place


def test_an_analysis_is_named_by_its_lens_and_holds_its_digest(tmp_path, tuned):
    analysis = small(tmp_path, tuned)
    assert analysis.path.name.endswith("--tuned")
    assert analysis.lens == "tuned"
    assert analysis.config["lens_path"] == str(tuned)
    assert len(analysis.config["lens_digest"]) == 16
    assert lens_title(analysis.lens) == "lens tuned"
    again = small(tmp_path, str(tuned))
    pd.testing.assert_frame_equal(again.layers, analysis.layers, check_exact=True)
    parts = analysis.layers
    np.testing.assert_allclose(parts["change_direction"] + parts["change_scale"], parts["change"], atol=FLOAT32_NATS)
    # The last H^L has no map, so that its policy is the model's.
    last = analysis.curve("layer", "entropy_out").iloc[-1]
    np.testing.assert_allclose(last, analysis.policy_entropy["mean"], atol=FLOAT32_NATS)
    assert "lens tuned" in analysis._repr_html_()


def test_another_training_of_a_lens_is_another_analysis(tmp_path, tuned):
    small(tmp_path, tuned)
    save_lens(tuned, random_maps(3, 32, seed=1))
    with pytest.raises(UserError, match=r"already holds an analysis with other settings \(lens_digest \w+ -> \w+\)"):
        small(tmp_path, tuned)
    moved = save_lens(tmp_path / "elsewhere" / "tuned", random_maps(3, 32))
    assert small(tmp_path, moved).config["lens_path"] == str(tuned)


def test_an_interrupted_analysis_under_a_trained_lens_is_resumed(tmp_path, tuned, monkeypatch):
    whole = small(tmp_path / "whole", tuned, batch_size=1)
    reduce, calls = pipeline.reduce_responses, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reduce(*arguments)

    monkeypatch.setattr(pipeline, "reduce_responses", stopped)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "cut", tuned, batch_size=1)
    save_lens(tuned, random_maps(3, 32, seed=1))
    with pytest.raises(UserError, match="holds an unfinished analysis with other settings"):
        small(tmp_path / "cut", tuned, batch_size=1)
    save_lens(tuned, random_maps(3, 32))
    resumed = small(tmp_path / "cut", tuned, batch_size=1)
    assert len(calls) == 3 + 2
    pd.testing.assert_frame_equal(resumed.layers, whole.layers, check_exact=True)


def test_an_analysis_under_a_function_is_never_resumed_nor_recognised(tmp_path, monkeypatch):
    message = r"holds an analysis, and the lens halved is a function, which no digest covers.*overwrite=True"
    capture = pipeline._capture
    monkeypatch.setattr(pipeline, "_capture", lambda *a: (_ for _ in ()).throw(RuntimeError))
    with pytest.raises(RuntimeError):
        small(tmp_path, halved)
    monkeypatch.setattr(pipeline, "_capture", capture)
    with pytest.raises(UserError, match=message):
        small(tmp_path, halved)
    done = small(tmp_path, halved, overwrite=True)
    assert done.path.name.endswith("--halved")
    assert done.config["hooked"] == ["lens halved: a function"]
    assert done.config["files"] is None
    with pytest.raises(UserError, match=message):
        small(tmp_path, halved)
    plain = small(tmp_path, "policy")
    # H is scale-free under no lens but unit-norm: half the length is a higher temperature.
    assert (done.layers["entropy_out"] > plain.layers["entropy_out"]).all()


@pytest.mark.slow
def test_a_baseline_and_a_tolerance_take_every_lens(tmp_path, tuned):
    for lens in (tuned, halved):
        with_baseline = small(tmp_path / "baseline", lens, random_baseline=True)
        assert with_baseline.baseline["change"].notna().all()
        assert small(None, lens, tolerance=0.5).positions["tolerance"] == 0.5


def test_finished_analyses_are_found_by_the_files_of_their_lens(tmp_path, finished):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    place = tmp_path / "tuned"
    config = AnalyzeConfig(lens=place, **OPTIONS)
    (found,) = find_finished([config], tmp_path / "out")
    assert found.lens == "tuned"
    assert config_digest(config) not in (None, config_digest(replace(config, lens="policy")))
    assert config_digest(replace(config, lens=halved)) is None
    save_as_tuned_lens(place, random_maps(*layers_and_width(), seed=1))
    with pytest.raises(UserError, match="other settings"):
        find_finished([config], tmp_path / "out")


def test_two_lenses_of_one_name_are_refused(tmp_path, tuned):
    other = save_lens(tmp_path / "other" / "tuned", random_maps(3, 32))
    configs = [AnalyzeConfig(lens=lens) for lens in (tuned, tuned, other)]
    require_distinct_outputs(configs[:2])
    with pytest.raises(UserError, match=f"the lens {tuned} and the lens {other} would both be written to testbed--q"):
        require_distinct_outputs(configs)


def test_additions_take_a_trained_lens(tmp_path, tuned):
    additions = small(tmp_path, tuned, divergences=True, heads=True).additions
    assert additions["heads"]["entropy"].notna().all()
    table = additions["divergences"]
    assert table["kl_policy"].iloc[-1] == pytest.approx(0, abs=FLOAT32_NATS)
    assert (table["kl_policy"].iloc[:-1] > 0.1).all()
    order = ["group", "response", "layer", "site"]
    kept, captured = (
        small(None, tuned, by="position", keep_tokens=n).additions["groups"].sort_values(order, ignore_index=True)
        for n in (4, 0)
    )
    pd.testing.assert_frame_equal(captured, kept, check_exact=False, rtol=0, atol=FLOAT32_NATS)


def test_a_comparison_says_that_trained_lenses_differ(tmp_path, tuned):
    one = small(tmp_path / "one", tuned)
    other = small(tmp_path / "other", save_lens(tmp_path / "again" / "tuned", random_maps(3, 32, seed=1)))
    digests = other.config["lens_digest"], one.config["lens_digest"]
    assert differing_settings(other, one) == {"lens_digest": digests}
    assert compare([one, other], labels=["one", "other"]).differing == {"other": {"lens_digest": digests}}


def test_a_study_of_several_models_refuses_a_trained_lens(tuned):
    with pytest.raises(UserError, match="a trained lens is of one model"):
        study("testbed", lens=tuned)


def test_the_commands_that_reproduce_an_analysis_name_the_directory(finished):
    analysis = Analysis.load(finished / "out")
    commands = analysis_commands(analysis)
    assert f"--lens {finished / 'tuned'}" in commands.shell
    assert f"lens={str(finished / 'tuned')!r}" in commands.python
    own = AnalyzeConfig(lens=halved, **OPTIONS).settings()
    commands = analysis_commands(replace(analysis, config={**own, "hooked": ["lens halved: a function"]}))
    assert commands.shell is None
    assert "# lens as the function halved was in memory then" in commands.python
    assert "lens=lens" in commands.python
    assert any("a lens of the user's own" in note for note in commands.notes)


@pytest.mark.slow
def test_one_command_analyses_the_same_responses_under_a_trained_lens_too(tmp_path, of_qwen3, monkeypatch):
    drawn = []
    monkeypatch.setattr("internal_policy.cli.analyze.draw", lambda analyses, root: drawn.append(len(analyses)))
    words = ("analyze", *FEW, "--lens", "policy", "--lens", of_qwen3, "--json", "-o", "out")
    policy, lens = json.loads(run_command(*words, cwd=tmp_path, code=0).stdout)["analyses"]
    assert lens["path"] == "out/testbed--qwen3--tuned"
    assert policy["responses_digest"] == lens["responses_digest"]
    assert Analysis.load(tmp_path / lens["path"]).lens == "tuned"
    page = (tmp_path / policy["path"] / "report.html").read_text()
    assert "under the lens tuned" in page
    # It is recognised without a model.
    done = run_command(*words, cwd=tmp_path, code=0)
    assert done.stderr.count("already complete") == 2
    assert drawn == [2, 2]


def damaged(place, what):
    maps = random_maps(3, 32)
    if what == "pickle":
        save_as_tuned_lens(place, maps)
        torch.save({"0.weight": print}, place / "params.pt")
    elif what == "empty":
        place.mkdir()
    else:
        save_lens(place, maps)
    return place


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pickle", "torch.load(weights_only=True) refuses it (UnpicklingError)"),
        ("empty", "needed are config.json and one file of weights"),
        ("width", "and testbed/qwen3 has 8 layers of width"),
    ],
)
def test_broken_lenses_are_refused_in_one_line_on_the_command_line(tmp_path, what, message):
    damaged(tmp_path / "lens", what)
    assert message in refused("analyze", *FEW, "--lens", "lens", cwd=tmp_path)
    assert message in refused("inspect", "--prompt", "a=1;a?", "--lens", "lens", cwd=tmp_path)


def test_a_lens_on_a_server_is_refused_in_one_line_before_anything_is_loaded(tmp_path, tuned):
    words = ("--model", "no/such", "--lens", tuned, "--remote", "--backend", "nnsight")
    assert "--remote was given with the lens tuned, which is on" in refused("analyze", *words, cwd=tmp_path)


@pytest.mark.parametrize("lens", ["unit-norm", "lenses/tuned"])
def test_training_takes_two_lenses_only(tmp_path, lens):
    message = f"--lens is '{lens}'; needed is one of policy, logit-lens"
    error = refused("train", "--lens", lens, cwd=tmp_path)
    assert message in error
    assert "unit-norm" not in error.replace(lens, "")
    assert "{policy,logit-lens}" in run_command("train", "--help", cwd=tmp_path, code=0).stdout


def test_an_inspection_under_every_lens(tmp_path, of_qwen3):
    prompt = {"prompt": "a=22,b=a-3;b?", "max_new_tokens": 0}
    plain = inspect(**prompt, lens="logit-lens")
    columns = ["entropy", "next_rank", "top1_id"]

    def layer(look, number, site="layer"):
        rows = look.values  # noqa: PD011
        return rows[(rows["layer"] == number) & (rows["site"] == site)][columns]

    last = int(plain.n_layers)
    tuned_look = inspect(**prompt, lens=of_qwen3)
    assert (tuned_look.lens, tuned_look.config["lens_path"]) == ("tuned", str(of_qwen3))
    pd.testing.assert_frame_equal(layer(tuned_look, last), layer(plain, last))
    for number in (0, 3):
        assert not np.allclose(layer(tuned_look, number)["entropy"], layer(plain, number)["entropy"], atol=0.01)
    seen = []

    def same(number, states):
        seen.append(number)
        return states

    pd.testing.assert_frame_equal(inspect(**prompt, lens=same).values, inspect(**prompt).values)
    # The output, two writes, and H^0 beside the first.
    assert seen == [1, 1, 1, 0, *(number for number in range(2, last + 1) for _ in range(3))]
