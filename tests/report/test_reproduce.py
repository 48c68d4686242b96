"""The summary of a training in a report, and the commands that reproduce a result."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_analyses import make, progressive

from internal_policy import Analysis, UserError, compare
from internal_policy.analysis.sources import collect_analyses
from internal_policy.bupo.run import Run
from internal_policy.cli.report import ReportCommand, write_reports
from internal_policy.report import training_report
from internal_policy.report.reproduce import analysis_commands, comparison_commands, comparison_words, training_commands
from internal_policy.report.training import summary

STORED = Path(__file__).resolve().parents[2] / "data" / "experiments"


@pytest.fixture(scope="module")
def run():
    return Run.load(STORED / "runs" / "qwen3-bupo-l7-s12-lr0.0001-t120-seed0")


def phased(run, *phases, **changed):
    """The run as if its steps had been of these phases."""
    config = {**run.config, **changed}
    n = len(run.history)
    names = [name for name, steps in phases for _ in range(steps)]
    assert len(names) == n
    return replace(run, config=config, history=run.history.assign(phase=names), ipa_steps=names.count("ipa"))


@pytest.mark.parametrize(
    ("phases", "trainer", "expected"),
    [
        ((("ipa", 12), ("grpo", 108)), {}, "alignment of layer 7 for 12 steps, then GRPO for 108 steps"),
        ((("ipa", 1), ("grpo", 119)), {}, "alignment of layer 7 for 1 step, then GRPO for 119 steps"),
        ((("ipa", 12), ("rloo", 108)), {}, "alignment of layer 7 for 12 steps, then RLOO for 108 steps"),
        (
            (("ipa", 120),),
            {},
            "BuPO, layer 7, 120 steps, first at 0.0001: internal policy alignment of layer 7 for 120 steps",
        ),
        ((("grpo", 120),), {}, "no internal policy alignment of layer 7, GRPO for 120 steps"),
        ((("ipa", 120),), {"site": "attn"}, ": internal policy alignment of the attention in layer 7 for 120 steps"),
        ((("ipa", 120),), {"site": "ffn"}, ": internal policy alignment of the FFN in layer 7 for 120 steps"),
    ],
)
def test_training_summary_describes_its_phases(run, phases, trainer, expected):
    assert f"{expected}. The mean reward" in summary(phased(run, *phases, **trainer), None)


def test_training_without_a_layer_has_no_phase_description():
    plain = Run.load(STORED / "runs" / "qwen3-grpo-t120-seed0")
    assert "was trained for 120 steps with GRPO. The mean reward" in summary(plain, None)


def test_a_page_shades_no_alignment_where_there_was_none(run):
    html = training_report(phased(run, ("grpo", 120)))
    assert "Internal policy alignment is shaded" not in html
    assert "Layer chosen" in html
    html = training_report(phased(run, ("ipa", 12), ("grpo", 108), site="ffn"))
    assert "Internal policy alignment is shaded" in html
    assert "Layer optimised first" in html
    assert "<dt>Site</dt><dd>FFN</dd>" in html


def test_summary_reward_averages_the_first_and_last_tenth_of_the_steps(run):
    rewards = run.history["reward"]
    start, end = rewards.iloc[:12].mean(), rewards.iloc[-12:].mean()
    assert f"from {start:.3f} over the first 12 steps to {end:.3f} over the last 12." in summary(run, None)
    few = replace(run, history=run.history.iloc[:9])
    expected = f"from {rewards.iloc[0]:.3f} in the first step to {rewards.iloc[8]:.3f} in the last."
    assert expected in summary(few, None)
    assert "reward" not in summary(replace(run, history=run.history.iloc[:1]), None)


@pytest.fixture
def manifest():
    return json.loads((STORED / "sweep" / "comparison.json").read_text())


def test_user_labels_are_reproduced(manifest):
    assert "--label" not in comparison_words(manifest, "here")
    assert "labels" not in comparison_commands(manifest).python
    rows = manifest["analyses"]
    for row in rows[1:]:
        row["label"] = row["label"].removeprefix("checkpoint-")
    rows[0]["label"] = "-start"
    manifest |= {"baseline": "6", "labels_given": True}
    words = comparison_words(manifest, "here")
    assert words[2 + len(rows) :][:3] == ["--label=-start", "--label", "6"]
    assert words[-2:] == ["--baseline", "6"]
    assert "labels=['-start', '6', '12'," in comparison_commands(manifest).python


def test_a_comparison_is_reproduced_in_its_directory(manifest, tmp_path):
    default = comparison_commands(manifest, Path("data/comparisons/compare--a--b"))
    assert "--output" not in default.shell
    other = comparison_commands(manifest, Path("my place/compare--a--b"))
    assert shlex.split(other.shell) == [*shlex.split(default.shell), "--output", "my place"]
    assert other.python.endswith(".save('my place/compare--a--b')")
    # Results of another command are not below an --output of this one.
    assert "--output" not in comparison_commands(manifest, Path("figures/sweep-a-b")).shell
    assert ".save(" not in comparison_commands(manifest).python
    # The command's own comparison has no path yet when its page is written.
    stored = [STORED / "analyses" / name for name in ("qwen3-start", "qwen3-bupo")]
    comparison = compare(*stored)
    place = comparison.save(tmp_path / "compare--x")
    write_reports([comparison], place, announce=False)
    assert f"--output {tmp_path}\n" in (place / "report.html").read_text().replace("</pre>", "\n")


def test_every_command_explains_existing_output(run, manifest):
    analysis = analysis_commands(Analysis.load(STORED / "analyses" / "qwen3-start")).notes[0]
    assert "is read and nothing is computed" in analysis
    training = training_commands(run).notes[0]
    assert "is read and nothing is trained; otherwise it is resumed" in training
    for page in (analysis, training):
        assert "another output, or add --overwrite (overwrite=True in Python)" in page
    (compared,) = comparison_commands(manifest).notes
    assert "computed from the analyses as they are in their directories now" in compared
    assert "--overwrite" not in compared


def test_a_figures_folder_among_analyses_is_skipped(tmp_path):
    for name in ("a", "b"):
        make(progressive(2), name, prompts=2).save(tmp_path / name)
    (tmp_path / "figures" / "a").mkdir(parents=True)
    (tmp_path / "figures" / "a" / "flow.png").write_bytes(b"")
    assert [found.name for found in collect_analyses(sorted(tmp_path.iterdir()))] == ["a", "b"]
    # Given explicitly or under another name, it does not come from a wildcard.
    with pytest.raises(UserError, match="figures: no finished analysis here"):
        collect_analyses([tmp_path / "figures"])
    with pytest.raises(UserError, match="nowhere/figures: no finished analysis here"):
        collect_analyses([tmp_path / "a", tmp_path / "nowhere" / "figures"])
    (tmp_path / "figures").rename(tmp_path / "drawn")
    with pytest.raises(UserError, match="drawn: no finished analysis here"):
        collect_analyses([tmp_path / "a", tmp_path / "drawn"])
    make(progressive(2), "c", prompts=2).save(tmp_path / "figures" / "c")
    assert [found.name for found in collect_analyses([tmp_path / "a", tmp_path / "figures"])] == ["a", "c"]


def test_shell_wildcards_over_a_directory_are_accepted(tmp_path):
    for name, stored in (("one", "qwen3-start"), ("two", "llama-start")):
        shutil.copytree(STORED / "analyses" / stored, tmp_path / name)
    (tmp_path / "figures" / "one").mkdir(parents=True)
    ReportCommand(directories=tuple(sorted(tmp_path.iterdir()))).run()
    assert {path.parent.name for path in tmp_path.rglob("report.html")} == {"one", "two"}
    with pytest.raises(UserError, match="no finished analysis here"):
        ReportCommand(directories=(tmp_path / "figures",)).run()
