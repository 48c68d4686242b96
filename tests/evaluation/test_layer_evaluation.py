"""Evaluations of internal policies: numbers, their table over depth, resuming, what is stored, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from training_calls import command

from internal_policy import UserError, models, statistics
from internal_policy.evaluation import Evaluation, compare, depth_table, evaluate, evaluate_layers, pipeline
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.depth import choose_layers, require_layer

FEW = {"samples": 2, "max_problems": 6, "max_new_tokens": 32}
LENS = {"lens": "logit-lens"}
STORED = Path(__file__).resolve().parents[2] / "data" / "experiments" / "evaluations"


@pytest.fixture(scope="module")
def model():
    return models.load("testbed/qwen3")


@pytest.fixture(scope="module")
def final(model):
    return evaluate(model, "testbed", reward="exact", **FEW)


@pytest.fixture(scope="module")
def layers(model):
    return evaluate_layers(model, "testbed", layers=[8, 1, 5], reward="exact", **LENS, **FEW)


def test_layer_1_solves_nothing_and_the_last_layer_gives_the_final_policys_responses(layers, final):
    first, middle, last = layers
    assert [e.layer for e in layers] == [1, 5, 8]
    assert first.avg["mean"] == 0.0
    assert middle.avg["mean"] < last.avg["mean"]
    pd.testing.assert_frame_equal(last.samples[list(final.samples)], final.samples, check_exact=True)
    assert last.avg == final.avg
    assert (last.samples["agreement"] == 1.0).all()
    # The two numbers come from the same product of the same states.
    assert (last.samples["log_prob"] == last.samples["policy_log_prob"]).all()
    assert first.samples["agreement"].mean() < 0.3
    assert (first.samples["kl"] > 1).all()


def test_names_and_settings_say_whose_policy_it_is(layers, final):
    first = layers[0]
    assert first.name == "testbed/qwen3, layer 1 (logit-lens)"
    assert (first.model_name, first.policy_label) == ("testbed/qwen3", "layer 1 (logit-lens)")
    assert (first.layer, first.site, first.lens) == (1, "layer", "logit-lens")
    assert (final.layer, final.site, final.lens) == (None, None, None)
    assert final.model_name == final.name == "testbed/qwen3"
    assert compare(layers[-1], final).difference == 0.0


def test_an_evaluation_of_the_model_itself_is_stored_as_before(final):
    assert not {"layer", "site", "lens"} & set(final.config)
    assert not {"layer", "site", "lens"} & set(EvaluateConfig(model="m").cache_key())
    assert list(final.samples) == ["problem", "sample", "response", "score", "n_tokens", "truncated"]
    assert set(final.timings) == {"load", "sample", "score"}


@pytest.mark.skipif(not STORED.is_dir(), reason="needs the stored evaluations of the repository")
def test_stored_evaluations_are_read_as_those_of_the_models_themselves():
    found = [Evaluation.load(path.parent) for path in sorted(STORED.glob("*/*/evaluation.json"))[:3]]
    assert found
    assert {e.layer for e in found} == {None}


def test_the_table_over_depth_has_every_quantity_with_its_interval(layers, final):
    table = depth_table([*layers, final])
    quantities = ["avg", "pass@1", "pass@2", "truncated", "length"]
    compared = ["agreement", "kl", "log_prob", "policy_log_prob"]
    own = table[table["site"] == "layer"]
    assert list(own["quantity"]) == (quantities + compared) * 3
    assert list(own["layer"].unique()) == [1, 5, 8]
    assert list(table.loc[table["site"] == "policy", "quantity"]) == quantities
    assert table.loc[table["site"] == "policy", "layer"].isna().all()
    middle = layers[1]
    rows = own[own["layer"] == 5].set_index("quantity")
    assert rows.loc["avg", ["value", "stderr", "low", "high"]].tolist() == pytest.approx(list(middle.avg.values()))
    assert rows.loc["pass@2", ["value", "low", "high"]].tolist() == pytest.approx(
        middle.pass_at_k.set_index("k").loc[2].tolist()
    )
    # The errors are clustered by problem, and a mean over tokens weighs a response by its tokens.
    samples = middle.samples
    mean, stderr = statistics.clustered_mean(samples[["agreement"]], samples["n_tokens"], samples["problem"])
    assert rows.loc["agreement", ["value", "stderr"]].tolist() == pytest.approx([mean[0], stderr[0]])
    assert rows.loc["agreement", "value"] == pytest.approx(
        np.average(samples["agreement"], weights=samples["n_tokens"])
    )
    assert rows.loc["length", "value"] == pytest.approx(samples["n_tokens"].mean())
    shares = samples.groupby("problem")["truncated"].mean().to_numpy()[:, None]
    ends = [float(end[0]) for end in statistics.rate_interval(shares)]
    assert rows.loc["truncated", ["value", "low", "high"]].tolist() == pytest.approx([shares.mean(), *ends])
    assert (own["low"] <= own["value"] + 1e-12).all()
    assert (own["value"] <= own["high"] + 1e-12).all()


@pytest.mark.slow
def test_sites_and_lenses_are_different_policies(model, layers):
    others = [
        evaluate(model, "testbed", reward="exact", layer=5, **options, **FEW)
        for options in ({"site": "ffn", **LENS}, {"lens": "policy"}, {"lens": "unit-norm"})
    ]
    responses = {tuple(e.samples["response"]) for e in (*others, layers[1])}
    assert len(responses) == 4


@pytest.mark.slow
def test_an_interrupted_curve_is_resumed_with_the_layer_that_was_not_finished(tmp_path, monkeypatch, model):
    calls = []

    def interrupted(model, part, policy, **options):
        calls.append(policy.layer)
        if calls == [2, 2, 3, 3]:
            raise KeyboardInterrupt
        return real(model, part, policy, **options)

    real = pipeline.sample_internal
    options = {"layers": "2-4", "reward": "exact", **LENS, **FEW}
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "sample_internal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_layers(model, "testbed", output=tmp_path, batch_size=6, **options)
        place = tmp_path / "testbed--qwen3"
        assert Evaluation.load(place / "testbed--layer-2--logit-lens").layer == 2
        assert len(list((place / "testbed--layer-3--logit-lens").glob("work/*.npz"))) == 1
        calls.clear()
        resumed = evaluate_layers(model, "testbed", output=tmp_path, batch_size=6, **options)
    assert calls == [3, 4, 4]
    straight = evaluate_layers(model, "testbed", **options)
    for one, other in zip(resumed, straight, strict=True):
        pd.testing.assert_frame_equal(one.problems, other.problems, check_exact=True)
        # Another batch pads more or less, which rounds sums of float32 differently: some 1e-6 nats.
        pd.testing.assert_frame_equal(one.samples, other.samples, rtol=0, atol=1e-5)
        assert list(one.samples["response"]) == list(other.samples["response"])
        again = Evaluation.load(one.path)
        pd.testing.assert_frame_equal(again.samples, one.samples, check_exact=True)
        assert (again.layer, again.lens, again.name) == (one.layer, "logit-lens", one.name)


@pytest.mark.slow
def test_a_lens_that_is_a_function_is_named_and_never_taken_for_another(tmp_path, model):
    def halved(layer, states):
        return states / 2

    options = {"layer": 5, "lens": halved, "reward": "exact", "output": tmp_path, **FEW}
    found = evaluate(model, "testbed", **options)
    assert (found.lens, found.policy_label) == ("halved", "layer 5 (halved)")
    assert Evaluation.load(found.path).lens == "halved"
    with pytest.raises(UserError, match="halved"):
        evaluate(model, "testbed", **options)
    again = evaluate(model, "testbed", overwrite=True, **options)
    pd.testing.assert_frame_equal(again.samples, found.samples)


def test_the_model_is_restored_after_an_evaluation_of_a_layer(model):
    own = list(model.layers)
    evaluate(model, "testbed", reward="exact", layer=1, **FEW)
    assert list(model.layers) == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 9}, "--layer is 9; testbed/qwen3 has 8 layers"),
        ({"layer": 0}, "--layer is 0; needed is a number of at least 1"),
        ({"layer": 2.5}, "--layer is 2.5; needed is a whole number"),
        ({"layer": 2, "site": "mlp"}, "--site is 'mlp'; needed is one of layer, attn, ffn"),
        ({"site": "ffn"}, "--site ffn was given without a layer; add --layer or --layers"),
        ({"lens": "logit-lens"}, "--lens logit-lens was given without a layer"),
        (
            {"layer": 2, "generator": "vllm"},
            "--generator vllm runs all layers of a model, and the policy of a layer",
        ),
    ],
)
def test_policies_that_do_not_exist_are_refused_before_the_model_is_loaded(monkeypatch, options, message):
    monkeypatch.setattr(pipeline, "load", None)
    with pytest.raises(UserError, match=message) as info:
        evaluate("testbed/qwen3", **options)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("layers", "chosen"), [("all", range(1, 9)), ("2,4-6", [2, 4, 5, 6]), (3, [3]), ((7, 2, 2), [2, 7]), (" 8 ", [8])]
)
def test_layers_are_chosen_by_numbers_and_ranges(layers, chosen):
    assert choose_layers(layers, EvaluateConfig(model="testbed/qwen3")) == list(chosen)


@pytest.mark.parametrize("layers", ["", "0", "2-", "5-3", "2;3", "every", [], [0], [True], ["2"], 2.5, None])
def test_bad_layers_are_refused(layers):
    with pytest.raises(UserError, match=r"--layers is .*; needed is all, or numbers from 1 and ranges such as 1,4-6"):
        choose_layers(layers, EvaluateConfig(model="testbed/qwen3"))
    with pytest.raises(UserError, match="--layers asks for layer 9; testbed/qwen3 has 8 layers"):
        choose_layers("2,9", EvaluateConfig(model="testbed/qwen3"))


def test_the_number_of_layers_is_that_of_a_loaded_model(model):
    require_layer(8, model)
    with pytest.raises(UserError, match="--layer is 9; testbed/qwen3 has 8 layers"):
        require_layer(9, replace(model))


@pytest.mark.slow
def test_the_command_prints_one_table_and_draws_one_figure(tmp_path, monkeypatch, capsys):
    arguments = ["--model", "testbed/qwen3", "--samples", "1", "--max-problems", "3", "--max-new-tokens", "16"]
    arguments += ["--output", tmp_path]
    code, out, err = command(monkeypatch, capsys, "evaluate", "--layers", "7,8", "--json", *arguments)
    assert code == 0, err
    document = json.loads(out)
    assert [e["config"]["layer"] for e in document["evaluations"]] == [7, 8]
    assert {row["quantity"] for row in document["depth"]} >= {"avg", "agreement", "length"}
    (picture,) = tmp_path.rglob("accuracy_over_depth.png")
    assert picture.parent.name == "testbed--qwen3--testbed--layers"
    code, out, _ = command(monkeypatch, capsys, "evaluate", "--layer", "7", *arguments)
    assert code == 0
    assert "testbed/qwen3, layer 7 on testbed" in out
    assert "the most probable token is that of π_θ at" in out
    for wrong, message in (
        (["--layer", "9"], "--layer is 9; testbed/qwen3 has 8 layers"),
        (["--layer", "2", "--layers", "all"], "both --layer 2 and --layers all were given"),
        (["--layers", "all", "--generator", "vllm"], "--generator vllm runs all layers of a model"),
        (["--site", "ffn"], "--site ffn was given without a layer"),
    ):
        code, out, err = command(monkeypatch, capsys, "evaluate", *wrong, *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.strip().splitlines()) == 1
