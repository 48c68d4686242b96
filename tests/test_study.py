"""The cross-model study: the presets' table, what a failure costs, what is not done twice, and its figures."""

from __future__ import annotations

import gc
import sys

import pandas as pd
import pytest
from transformers import PreTrainedModel

from internal_policy import UserError, analyze, cli, convergence_table, load_analysis, studies, study
from internal_policy.prompts import TEMPLATES
from internal_policy.studies import Study
from internal_policy.study_models import STUDIES, StudyModel

QUICK = {"max_responses": 3, "max_new_tokens": 6}
TABLE_4 = {
    *("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Instruct-2507"),
    *("Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    *("OctoThinker/OctoThinker-3B-Long-Base", "OctoThinker/OctoThinker-8B-Long-Base"),
    *("deepseek-ai/deepseek-math-7b-base", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
}


def test_the_papers_preset_is_table_4():
    assert {row.model for row in STUDIES["paper"]} == TABLE_4
    assert len(STUDIES["paper"]) == 12


@pytest.mark.parametrize("preset", STUDIES)
def test_every_preset_has_each_figure_and_known_templates(preset):
    rows = STUDIES[preset]
    assert len({row.model for row in rows}) == len(rows)
    assert {row.group for row in rows} == {"main", "more"}
    for row in rows:
        assert row.template in TEMPLATES
        # Only the hybrid models of Qwen3 have a thinking mode that is to be turned off.
        hybrid = "Qwen3-" in row.model and not row.model.endswith(("-Base", "-Instruct-2507"))
        assert (row.template == "qwen3") == hybrid
        assert (row.template == "octothinker") == row.model.startswith("OctoThinker/")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def done(root):
    return study("testbed", output=root, **QUICK)


def test_the_models_are_analysed_as_alone(done, root):
    assert [a.name for a in done.analyses] == ["testbed/qwen3", "testbed/llama"]
    assert done.failures == {}
    alone = analyze("testbed/llama", **QUICK)
    pd.testing.assert_frame_equal(done.analyses[1].layers, alone.layers, check_exact=True)
    assert load_analysis(root / "testbed--llama").n_responses == 3
    assert [a.name for a in done.group("more")] == ["testbed/llama"]


def test_the_tables_say_what_the_analyses_say(done):
    table = done.table.set_index("label")
    for label, analysis in zip(("qwen3", "llama"), done.analyses, strict=True):
        row = table.loc[label]
        assert row["policy_entropy"] == analysis.policy_entropy["mean"]
        assert row["reward"] == pytest.approx(analysis.sequences["reward"].astype(float).mean())
        assert row["exploration"] + row["integration"] + row["convergence"] == row["n_layers"] == analysis.n_layers
        assert (row["boundary_layer"] is pd.NA) == (analysis.boundary_layer is None)
    pd.testing.assert_frame_equal(done.convergence, convergence_table(done.analyses, labels=["qwen3", "llama"]))


def test_what_is_finished_is_read_without_its_model(done, root, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("a model was looked up or loaded")

    monkeypatch.setattr(studies, "analyze", refused)
    monkeypatch.setattr(studies.models, "check", refused)
    again = study("testbed", output=root, **QUICK)
    pd.testing.assert_frame_equal(again.analyses[0].layers, done.analyses[0].layers, check_exact=True)
    # The same prompts from a file may be others by now.
    with pytest.raises(UserError, match="AssertionError: a model was looked up"):
        study("testbed", output=root, prompts=__file__, **QUICK)


def test_other_settings_are_not_taken_for_finished(done, root):
    with pytest.raises(UserError, match=r"none of the 2 .*already holds an analysis with other settings \(lens policy"):
        study("testbed", output=root, lens="logit-lens", **QUICK)
    assert load_analysis(root / "testbed--qwen3").lens == "policy"


ROWS = (
    StudyModel("testbed/qwen3", "chat", "main"),
    StudyModel("./nowhere", "chat", "main"),
    StudyModel("testbed/llama", "plain", "more"),
)


def test_a_model_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)}
    held = []

    def watched(model, **options):
        alive = [o for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)]
        held.append(len({id(o) for o in alive} - before))
        del alive
        analysis = analyze(model, **options)
        if model == "testbed/qwen3":
            loaded = studies.models.load(model)
            raise RuntimeError(f"CUDA error in {type(loaded).__name__}\nwhile running")
        return analysis

    monkeypatch.setattr(studies, "analyze", watched)
    seen = []
    found = study(ROWS, output=tmp_path, each=seen.append, **QUICK)
    assert found.failures == {
        "./nowhere": "no such directory; give a directory with config.json and *.safetensors, or a hub id",
        "testbed/qwen3": "RuntimeError: CUDA error in LanguageModel while running",
    }
    assert [a.name for a in found.analyses] == [a.name for a in seen] == ["testbed/llama"]
    # Neither a model that is done nor one that failed is in memory when the next begins.
    assert held == [0, 0]
    assert found.comparison is None
    assert found.convergence["label"].tolist() == ["llama"]
    monkeypatch.setattr(studies, "analyze", analyze)
    assert list(study(ROWS, output=tmp_path, **QUICK).failures) == ["./nowhere"]


def test_started_over_all_is_made_anew(tmp_path):
    for new in (3, 4):
        options = {"max_responses": 2, "max_new_tokens": new, "output": tmp_path, "overwrite": new == 4}
        found = study(ROWS[2:], **options)
    assert found.analyses[0].config["max_new_tokens"] == 4


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("huge", {}, "--preset is 'huge'; needed is one of paper, small, testbed"),
        ("testbed", {"template": "plain"}, "template was given with a preset"),
        ("testbed", {"max_tokens": 3}, "unknown option 'max_tokens'"),
        ("testbed", {"batch_size": 0}, "--batch-size is 0"),
        (ROWS[1:2], {}, "none of the 1 models could be analysed; ./nowhere: no such directory"),
    ],
)
def test_bad_studies(tmp_path, preset, options, message):
    with pytest.raises(UserError, match=message):
        study(preset, output=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_tells_what_failed_and_draws_the_rest(done, root, monkeypatch, capsys):
    monkeypatch.setattr(studies, "STUDIES", {"testbed": (*STUDIES["testbed"], ROWS[1])})
    drawn = []

    def save(self, directory):
        drawn.append((directory, [a.name for a in self.analyses]))
        return [directory / "fig2_entropy_flow.png"]

    monkeypatch.setattr(Study, "save", save)
    quick = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    monkeypatch.setattr(sys, "argv", ["internal-policy", "analyze", "--preset", "testbed", "-o", str(root), *quick])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    assert exit_code.value.code == 2
    out, err = capsys.readouterr()
    assert drawn == [(root / "figures" / "study-testbed", ["testbed/qwen3", "testbed/llama"])]
    assert "study testbed: 2 models" in out
    (last,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert last.startswith("error: 1 of 3 models failed, and the figures show the others (./nowhere: no such directory")
    assert last.endswith("tries these again and keeps what is finished")


@pytest.mark.slow
def test_the_figures_and_tables_of_a_study(done, tmp_path):
    paths = done.save(tmp_path)
    stems = {"fig2_entropy_flow", "fig3_entropy_change", "fig12_residual_cosine", "fig13_entropy_flow"}
    stems |= {"fig14_entropy_change", "depth_overlay", "convergence"}
    figures = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    assert {p.name for p in paths} == figures | {"models.csv", "convergence.csv", "layers.csv"}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths}
    assert pd.read_csv(tmp_path / "convergence.csv")["label"].tolist() == ["qwen3", "llama"]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    # A model less: its pair of figures would be of another study, and goes.
    Study(done.models[:1], done.analyses[:1]).save(tmp_path)
    assert not (tmp_path / "fig13_entropy_flow.png").exists()
    done.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
