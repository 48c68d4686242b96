"""What every measurement says about each layer: the table, the sentence, the figure and the page."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from synthetic_analyses import make
from training_calls import command

from internal_policy import UserError
from internal_policy.bupo import Transfer, evidence_sentence, layer_evidence, training_outcomes
from internal_policy.bupo.transfer_results import COLUMNS
from internal_policy.evaluation.results import Evaluation
from internal_policy.interventions.results import Ablation
from internal_policy.plotting.evidence import layer_evidence_figure, save_layer_evidence
from internal_policy.report import layer_report, write_layer_report

LAYERS = 8


@pytest.fixture(scope="module")
def analysis():
    return make(np.linspace(3.0, 0.5, LAYERS + 1), name="model", noise=0.1)


def evaluation(layer, value, site="layer", weights="w0", prompt="p", samples=2, **settings):
    numbers = {"n": samples, "correct": 1, "truncated": 0}
    problems = pd.DataFrame({"problem": [1], "prompt": prompt, "answer": "a", **numbers})
    avg = {"mean": value, "stderr": 0.01, "low": value - 0.02, "high": value + 0.02}
    return Evaluation(
        name=f"model, layer {layer}",
        model={},
        benchmark="testbed",
        config={"layer": layer, "site": site, "lens": "policy", "weights": weights, **settings},
        problems=problems,
        pass_at_k=pd.DataFrame({"k": [1], "value": [value]}),
        avg=avg,
        samples=pd.DataFrame({"score": [0.0], "n_tokens": [3]}),
    )


@pytest.fixture(scope="module")
def evidence():
    layers = np.arange(1, LAYERS + 1)
    rows = []
    for site in ("attn", "ffn"):
        for layer in layers:
            kl = 3.0 / layer if site == "attn" else 1.0 if layer == 4 else 0.1
            rows.append(
                {"layer": layer, "site": site, "how": "zero", "kl": kl, "kl_low": kl - 0.05, "kl_high": kl + 0.05}
            )
    ablation = Ablation(
        name="model",
        model={"layers": LAYERS},
        config={"weights": "w0"},
        table=pd.DataFrame(rows).assign(n_tokens=10),
        responses=pd.DataFrame(),
        sequences=pd.DataFrame(),
        clean={},
    )
    numbers = dict.fromkeys(COLUMNS, layers / 10) | {"layer": layers, "across": np.where(layers == 7, 0.3, 0.1)}
    transfer = Transfer(
        name="model",
        model={"layers": LAYERS},
        config={"weights": "w0"},
        table=pd.DataFrame(numbers),
        n_prompts=8,
        n_informative=6,
        mean_reward=0.5,
    )
    evaluations = [evaluation(layer, layer / 10) for layer in layers] + [evaluation(3, 0.99, site="ffn")]
    outcomes = pd.DataFrame({"layer": [2, 6], "value": [0.01, -0.02], "low": [0.0, -0.03], "high": [0.02, -0.01]})
    return {"evaluations": evaluations, "ablation": ablation, "transfer": transfer, "outcomes": outcomes}


def test_the_table_has_each_measurement_at_its_layer(analysis, evidence):
    table = layer_evidence(analysis, **evidence)
    assert table.index.tolist() == list(range(1, LAYERS + 1))
    np.testing.assert_array_equal(table["change"], analysis.curve("ffn"))
    np.testing.assert_array_equal(table["change_direction_low"], analysis.curve("ffn", "change_direction_low"))
    # The evaluation of a module is not that of the layer.
    assert table.loc[3, ["accuracy", "accuracy_low", "accuracy_high"]].tolist() == pytest.approx([0.3, 0.28, 0.32])
    assert table.loc[4, "ablation_ffn"] == 1.0
    assert table.loc[2, "ablation_attn_high"] == pytest.approx(1.55)
    assert table.loc[7, "across"] == 0.3
    assert table["training"].dropna().to_dict() == {2: 0.01, 6: -0.02}
    assert table.index[table["boundary"]].tolist() == [analysis.boundary_layer]


def test_the_sentence_names_the_layer_of_each_measurement(analysis, evidence):
    sentence = evidence_sentence(layer_evidence(analysis, **evidence))
    assert sentence.startswith(f"the entropy curve points to layer {analysis.boundary_layer}")
    assert "without its attention the policy changes most at layer 1; without its FFN at layer 4" in sentence
    assert "alignment moves the parameters most as GRPO does at layer 7 (cosine across halves 0.30" in sentence
    assert "from layer 4 on the layer's policy has at least half of the best accuracy" in sentence
    assert ";" not in evidence_sentence(layer_evidence(analysis)) or "direction" in evidence_sentence(
        layer_evidence(analysis)
    )


def test_the_sentence_has_a_verb_without_an_ablation_of_the_attention(analysis, evidence):
    table = evidence["ablation"].table
    ablation = replace(evidence["ablation"], table=table[table["site"] == "ffn"])
    sentence = evidence_sentence(layer_evidence(analysis, ablation=ablation))
    assert sentence.endswith("; without its FFN the policy changes most at layer 4")


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        ({"prompt": "q"}, "problems "),
        ({"samples": 4}, "samples 2 -> 4"),
        ({"token_limit": 99}, "token_limit None -> 99"),
        ({"temperature": 0.5}, "temperature None -> 0.5"),
        ({"reward": "math"}, "reward None -> math"),
    ],
)
def test_evaluations_of_different_benchmarks_and_settings_make_no_curve(analysis, other, differing):
    with pytest.raises(UserError, match=rf"not evaluated in the same way \({differing}") as caught:
        layer_evidence(analysis, evaluations=[evaluation(1, 0.5), evaluation(2, 0.5, **other)])
    assert "\n" not in str(caught.value)
    # Those of modules are left out, and may differ.
    layer_evidence(analysis, evaluations=[evaluation(1, 0.5), evaluation(2, 0.5, site="ffn", **other)])


def test_two_evaluations_of_one_layer_are_refused(analysis):
    with pytest.raises(UserError, match="layer 2 has two evaluations; needed is one of each layer"):
        layer_evidence(analysis, evaluations=[evaluation(1, 0.5), evaluation(2, 0.5), evaluation(2, 0.7)])


def test_results_of_other_weights_are_refused(analysis, evidence):
    other = copy.deepcopy(evidence["transfer"])
    other = replace(other, config={"weights": "w9"})
    with pytest.raises(UserError, match=r"has other weights \(w9\) than the analysis of model \(w0\)"):
        layer_evidence(analysis, transfer=other)
    with pytest.raises(UserError, match="other weights"):
        layer_evidence(analysis, evaluations=[evaluation(1, 0.5, weights="w9")])


def test_results_that_do_not_fit_are_refused_and_not_left_out(analysis, evidence):
    together = replace(evidence["ablation"], table=evidence["ablation"].table.assign(last_layer=8))
    kinds = evidence["ablation"].table.copy()
    kinds.loc[0, "how"] = "mean"
    layers = evidence["ablation"].table.assign(site="layer")
    heads = evidence["ablation"].table.assign(head="1-2")
    for table in (together.table, kinds, layers, heads):
        with pytest.raises(UserError, match="needed is one kind"):
            layer_evidence(analysis, ablation=replace(evidence["ablation"], table=table))
    lens = make(np.linspace(3.0, 0.5, LAYERS + 1), name="model", noise=0.1, lens="unit-norm")
    with pytest.raises(UserError, match="under the lens policy, and the analysis is under unit-norm"):
        layer_evidence(lens, evaluations=[evaluation(1, 0.5)])


def run(layer, start, end, evaluated=None, **settings):
    """A run of BuPO at a layer, with its evaluations before and after."""
    ends = {"evaluation_start": evaluation(None, start), "evaluation": evaluation(None, end, **(evaluated or {}))}
    setting = {"model": "m", "layer": layer, "site": "layer", "ipa_steps": 3, **settings}
    return SimpleNamespace(layer=layer, setting=setting, path="runs/a", **ends)


def test_runs_that_differ_in_more_than_the_layer_are_not_averaged():
    with pytest.raises(UserError, match=r"runs with other settings \(ipa_steps 3 -> 6\); needed are runs that differ"):
        training_outcomes([run(3, 0.4, 0.5), run(3, 0.4, 0.7, ipa_steps=6)])
    with pytest.raises(UserError, match=r"other settings \(site layer -> ffn\)"):
        training_outcomes([run(3, 0.4, 0.5), run(4, 0.4, 0.7, site="ffn")])
    with pytest.raises(UserError, match=r"not evaluated in the same way \(samples 2 -> 8\)"):
        training_outcomes([run(3, 0.4, 0.5), run(4, 0.4, 0.7, evaluated={"samples": 8})])
    # Runs without a layer are left out, whatever their settings.
    assert (
        len(training_outcomes([run(3, 0.4, 0.5), run(None, 0.4, 0.7, method="grpo"), run(4, 0.4, 0.5, model="n")])) == 2
    )


def test_the_outcome_of_runs_is_their_mean_gain():
    found = training_outcomes([run(3, 0.4, 0.5), run(3, 0.4, 0.7), run(6, 0.4, 0.3), run(None, 0.4, 0.9)])
    assert found["layer"].tolist() == [3, 6]
    assert found["value"].tolist() == pytest.approx([0.2, -0.1])
    assert found["runs"].tolist() == [2, 1]
    with pytest.raises(UserError, match="none of the runs has a layer"):
        training_outcomes([run(None, 0.4, 0.9)])


@pytest.mark.slow
def test_the_figure_has_a_panel_for_each_kind_of_measurement(analysis, evidence, tmp_path):
    full = layer_evidence_figure(layer_evidence(analysis, **evidence), title="model")
    assert len(full.axes) == 5
    alone = layer_evidence_figure(layer_evidence(analysis))
    assert len(alone.axes) == 1
    table = layer_evidence(analysis, **evidence)
    np.testing.assert_array_equal(full.axes[1].lines[0].get_ydata(), table["accuracy"])
    paths = save_layer_evidence(table, tmp_path, title="model")
    assert [path.name for path in paths] == ["layer_evidence.png", "layer_evidence.pdf"]
    again = save_layer_evidence(table, tmp_path / "again", title="model")
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]


def test_the_page_shows_the_numbers_and_leaves_out_what_was_not_measured(analysis, evidence, tmp_path):
    html = layer_report(layer_evidence(analysis, **evidence), "model <b>")
    assert "<b>" not in html
    assert "alignment moves the parameters most as GRPO does at layer 7" in html
    for heading in ("accuracy of the layer", "KL without its FFN", "what training at the layer did"):
        assert heading in html
    alone = write_layer_report(layer_evidence(analysis), tmp_path, "model")
    assert alone.name == "layers.html"
    assert "KL without its FFN" not in alone.read_text(encoding="utf-8")


def test_the_command_writes_page_and_figure_next_to_the_analysis(analysis, evidence, tmp_path, monkeypatch, capsys):
    stored = analysis.save(tmp_path / "analysis")
    evidence["transfer"].save(tmp_path / "transfer")
    code, shown, _ = command(monkeypatch, capsys, "report", stored, "--evidence", tmp_path / "transfer")
    assert code == 0
    assert "alignment moves the parameters most" in " ".join(shown.split())
    assert {"layers.html", "layer_evidence.png"} <= {p.name for p in stored.iterdir()}
    code, _, error = command(monkeypatch, capsys, "report", stored, "--evidence", stored)
    assert code == 2
    assert "holds a result of another kind (analysis)" in error
    code, _, error = command(monkeypatch, capsys, "report", stored, stored, "--evidence", tmp_path / "transfer")
    assert "--evidence was given with 2 directories" in error
