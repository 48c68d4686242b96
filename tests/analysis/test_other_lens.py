"""The boundary layer under the other lens: measured on the same responses, matched, and shown with the first."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
from synthetic_analyses import make, progressive

from internal_policy import Analysis, UserError, compare
from internal_policy.analysis.results import LensResult, find_other_lens, other_lens_sentence
from internal_policy.cli import display
from internal_policy.cli.main import run as run_command
from internal_policy.report import analysis_report, comparison_report


def under(lens, root, name="m", answer=None, **options):
    """An analysis under a lens, on disk."""
    analysis = make(progressive(6), name, lens=lens, prompts=4, **options)
    entropy = {"mean": 0.3, "stderr": 0.02, "final_state_mean": 0.4, "final_state_stderr": 0.02}
    analysis = replace(analysis, selection=replace(analysis.selection, boundary_layer=answer), policy_entropy=entropy)
    return Analysis.load(analysis.save(root / (name if lens == "policy" else f"{name}--{lens}")))


@pytest.fixture
def pair(tmp_path):
    return [under(lens, tmp_path, answer=answer) for lens, answer in (("policy", 4), ("logit-lens", 1))]


def test_each_lens_finds_the_other_and_reports_agreement(pair, capsys):
    policy, lens = pair
    assert find_other_lens(policy) == LensResult("logit-lens", 1, lens.path)
    assert find_other_lens(lens) == LensResult("policy", 4, policy.path)
    sentence = "under the logit lens the same responses give layer 1, so the answer depends on the lens"
    assert other_lens_sentence(policy) == sentence
    assert f"{sentence}. Its entropy" in analysis_report(policy)
    assert sentence in policy._repr_html_()
    display.show_analysis(policy)
    assert sentence in " ".join(capsys.readouterr().out.split())
    alike = replace(policy, selection=replace(policy.selection, boundary_layer=1))
    assert other_lens_sentence(alike) == "under the logit lens the same responses give layer 1 too"


@pytest.mark.parametrize("other", [{"seed": 1}, {"data_seed": 1}, {"samples": 2}])
def test_other_weights_or_responses_are_ignored(tmp_path, other):
    policy = under("policy", tmp_path)
    under("logit-lens", tmp_path, **other)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "analysis.json").write_text("{")
    assert find_other_lens(policy) is None
    assert other_lens_sentence(policy) is None


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
    rows = comparison.boundaries[["other_lens", "other_lens_boundary_layer"]].to_dict("records")
    assert rows[0] == {"other_lens": "logit-lens", "other_lens_boundary_layer": 1}
    assert rows[1]["other_lens"] is None or pd.isna(rows[1]["other_lens"])
    display.show_comparison(comparison)
    out = capsys.readouterr().out
    assert "4 (1)" in out
    assert "none (-)" in out
    assert "Boundary, lens logit-lens" in comparison_report(comparison)
    # In memory there is no directory to look into.
    found = compare([replace(a, path=None) for a in (*pair, Analysis.load(tmp_path / "n"))])
    assert found.boundaries["other_lens_boundary_layer"].tolist()[0] == 1
    with pytest.raises(UserError, match=r"got m under two lenses, with the boundary layers 4 \(policy\) and 1"):
        compare(pair)


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
    answers = {"lens": "logit-lens", "boundary_layer": lens["boundary_layer"], "path": lens["path"]}
    assert policy["other_lens"] == answers
    # A separate sampling gives the same responses; the page of the first is written again to mention it.
    page = tmp_path / "testbed--qwen3" / "report.html"
    page.write_text("of before")
    (tmp_path / "testbed--qwen3--logit-lens" / "analysis.json").unlink()
    (lens,) = run("logit-lens")
    assert lens["config"]["responses"] is None
    assert lens["other_lens"]["path"] == policy["path"]
    assert "nder the logit lens the same responses give" in page.read_text()


@pytest.mark.parametrize("of_several", [["--preset", "testbed"], ["--checkpoints", "runs/x"]])
def test_several_lenses_of_a_sweep_are_refused(of_several):
    command = ["analyze", *of_several, "--lens", "policy", "--lens", "logit-lens"]
    with pytest.raises(UserError, match=r"got 2 lenses for a .*; run it once for each"):
        run_command(command)
