"""The boundary layer under other lenses: measured on the same responses, matched, and shown with the first."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import numpy as np
import pytest
from synthetic_analyses import make, progressive

from internal_policy import Analysis, UserError, compare
from internal_policy.analysis.results import LensResult, find_other_lenses, with_other_lenses
from internal_policy.cli import display
from internal_policy.cli.main import run as run_command
from internal_policy.report import analysis_report, comparison_report


def under(lens, root, name="m", answer=None, **options):
    """An analysis under a lens, on disk."""
    analysis = make(progressive(6), name, lens=lens, prompts=4, **options)
    entropy = {"mean": 0.3, "stderr": 0.02, "final_state_mean": 0.4, "final_state_stderr": 0.02}
    # All resamples give the answer, and so do the other readings.
    found = {"boundary_layer": answer, "runner_up": None, "runner_up_share": None, "sensitivity": {"literal": answer}}
    selection = replace(analysis.selection, **found, shares={"measured": 1.0, "literal": 1.0})
    analysis = replace(analysis, selection=selection, policy_entropy=entropy)
    return Analysis.load(analysis.save(root / (name if lens == "policy" else f"{name}--{lens}")))


@pytest.fixture
def pair(tmp_path):
    return [under(lens, tmp_path, answer=answer) for lens, answer in (("policy", 4), ("logit-lens", 1))]


def test_each_lens_finds_the_other_and_reports_agreement(pair, tmp_path, capsys):
    policy, lens = pair
    assert find_other_lenses(policy) == [LensResult("logit-lens", 1, lens.path, 0.0)]
    assert find_other_lenses(lens) == [LensResult("policy", 4, policy.path, 0.0)]
    # The first was loaded before the other was there.
    assert policy.selection.sensitivity == {"literal": 4}
    assert lens.selection.sensitivity == {"literal": 1, "policy": 4}
    policy = Analysis.load(policy.path)
    assert policy.selection.sensitivity == {"literal": 4, "logit-lens": 1}
    assert policy.selection.confidence == pytest.approx(2 / 3)
    sentence = "by the paper's literal words it is layer 4 too; under the logit lens it is layer 1"
    assert policy.selection.agreement == f"all 50 resamples give layer 4; {sentence}"
    page = " ".join(analysis_report(policy).replace("&#39;", "'").split())
    assert f"{sentence}). " in page
    assert '<th scope="row">Under the logit lens</th><td>1 ≠</td><td>none</td>' in page
    assert "Confidence, the mean of the last column: 66.7%" in page
    assert sentence in html.unescape(policy._repr_html_())
    display.show_analysis(policy)
    assert sentence in " ".join(capsys.readouterr().out.split())
    alike = replace(policy, selection=replace(policy.selection, boundary_layer=1))
    assert find_other_lenses(alike) == [LensResult("logit-lens", 1, lens.path, 1.0)]
    # What the other lens gives is looked up, and not stored.
    again = policy.save(tmp_path / "elsewhere" / "m")
    assert json.loads((again / "analysis.json").read_text())["selection"]["confidence"] == 1.0
    assert Analysis.load(again).selection.sensitivity == {"literal": 4}


def test_every_other_lens_is_found(pair, tmp_path, capsys):
    policy, lens = pair
    named = under("mine", tmp_path, answer=None)
    found = [LensResult("logit-lens", 1, lens.path, 0.0), LensResult("mine", None, named.path, 0.0)]
    assert find_other_lenses(policy) == found
    assert policy.other_lenses == found
    assert with_other_lenses(policy).selection.sensitivity == {"literal": 4, "logit-lens": 1, "mine": None}
    assert with_other_lenses(policy).selection.confidence == 0.5
    under("policy", tmp_path, "n", answer=3, seed=2)
    comparison = compare(tmp_path)
    assert comparison.boundaries["other_lenses"].tolist()[0] == "logit-lens: 1, mine: none"
    display.show_comparison(comparison)
    out = capsys.readouterr().out
    assert "4 (1, none)" in out
    assert "3 (-, -)" in out
    assert "of the same responses under the lens logit-lens, mine" in " ".join(out.split())


@pytest.mark.parametrize("other", [{"seed": 1}, {"data_seed": 1}, {"samples": 2}])
def test_other_weights_or_responses_are_ignored(tmp_path, other):
    policy = under("policy", tmp_path)
    under("logit-lens", tmp_path, **other)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "analysis.json").write_text("{")
    assert find_other_lenses(policy) == []
    assert with_other_lenses(policy) is policy


def test_responses_are_matched_by_token_ids_in_any_order():
    one = make(progressive(6), prompts=4)
    turned = replace(one, sequences=one.sequences.iloc[::-1].assign(response="else", reward=1.0))
    assert turned.responses_digest == one.responses_digest
    longer = replace(one, sequences=one.sequences.assign(prompt_length=2))
    assert longer.responses_digest != one.responses_digest


def test_compare_shows_the_other_lens_instead_of_refusing_it(pair, tmp_path, capsys):
    under("policy", tmp_path, "n", answer=None, seed=2)
    comparison = compare(tmp_path)
    assert comparison.labels == ("m", "n")
    assert comparison.boundaries["other_lenses"].tolist() == ["logit-lens: 1", pytest.approx(np.nan, nan_ok=True)]
    assert comparison.boundaries["confidence"].tolist() == [pytest.approx(2 / 3), 1.0]
    display.show_comparison(comparison)
    out = capsys.readouterr().out
    assert "4 (1)" in out
    assert "none (-)" in out
    assert "Boundary, lens logit-lens" in comparison_report(comparison)
    # In memory there is no directory to look into.
    found = compare([replace(a, path=None) for a in (*pair, Analysis.load(tmp_path / "n"))])
    assert found.boundaries["other_lenses"].tolist()[0] == "logit-lens: 1"
    with pytest.raises(UserError, match=r"got m under 2 lenses, with the boundary layers 4 \(policy\) and 1"):
        compare(pair)


@pytest.mark.slow
def test_one_command_analyses_the_same_responses_under_both_lenses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("internal_policy.cli.analyze.draw", lambda analyses, root: None)

    def run(*lens):
        few = ["--max-responses", "3", "--max-new-tokens", "6", "--json"]
        command = ["analyze", *few, "-o", str(tmp_path), *(word for name in lens for word in ("--lens", name))]
        run_command(command)
        return json.loads(capsys.readouterr().out)["analyses"]

    policy, lens = run("policy", "logit-lens")
    assert lens["path"] == str(tmp_path / "testbed--qwen3--logit-lens")
    assert lens["config"]["responses"] == str(tmp_path / "testbed--qwen3" / "responses.jsonl")
    assert policy["responses_digest"] == lens["responses_digest"]
    assert policy["n_truncated"] == lens["n_truncated"] == 3
    (answers,) = policy["other_lenses"]
    assert (answers["lens"], answers["path"]) == ("logit-lens", lens["path"])
    assert answers["boundary_layer"] == lens["boundary_layer"]
    # A separate sampling gives the same responses; the page of the first is written again to mention it.
    page = tmp_path / "testbed--qwen3" / "report.html"
    page.write_text("of before")
    (tmp_path / "testbed--qwen3--logit-lens" / "analysis.json").unlink()
    (lens,) = run("logit-lens")
    assert lens["config"]["responses"] is None
    assert lens["other_lenses"][0]["path"] == policy["path"]
    assert "nder the logit lens" in page.read_text()


@pytest.mark.parametrize("of_several", [["--preset", "testbed"], ["--checkpoints", "runs/x"]])
def test_several_lenses_of_a_sweep_are_refused(of_several):
    command = ["analyze", *of_several, "--lens", "policy", "--lens", "logit-lens"]
    with pytest.raises(UserError, match=r"got 2 lenses for a .*; run it once for each"):
        run_command(command)
