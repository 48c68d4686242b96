"""The cross-model study: the table of presets, handling of failures, reuse of finished models, and figures."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from synthetic_analyses import make, progressive
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from internal_policy import Analysis, UserError, analyze, convergence_table, study
from internal_policy.cli import main as cli
from internal_policy.comparison import study as studies
from internal_policy.comparison.study_presets import STUDIES, StudyModel
from internal_policy.comparison.study_results import Study
from internal_policy.data.prompts import TEMPLATES
from internal_policy.models import context
from internal_policy.models.fingerprint import commit_now
from internal_policy.plotting.study import save_study

QUICK = {"max_responses": 3, "max_new_tokens": 6}
TABLE_4 = {
    *("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B", "Qwen/Qwen3-4B-Base", "Qwen/Qwen3-4B-Instruct-2507"),
    *("Qwen/Qwen2.5-Math-7B", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    *("OctoThinker/OctoThinker-3B-Long-Base", "OctoThinker/OctoThinker-8B-Long-Base"),
    *("deepseek-ai/deepseek-math-7b-base", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
}


DEEPSEEK_MATH = SimpleNamespace(num_hidden_layers=30, num_attention_heads=32, hidden_size=4096)

# As the captions of arXiv 2512.19673v3 have them, from left to right.
PANELS = {
    2: (*("Llama-3.2-3B-Instruct", "Llama-3.1-8B-Instruct", "Qwen2.5-Math-7B"), *("Qwen3-4B", "Qwen3-8B", "Qwen3-14B")),
    3: ("Qwen2.5-Math-7B", "Qwen3-4B", "Qwen3-8B", "Llama-3.2-3B-Instruct"),
    12: ("Qwen2.5-Math-7B", "Qwen3-4B", "Qwen3-4B-Base", "Qwen3-8B"),
    13: (
        *("Qwen3-4B-Base", "Qwen3-4B-Instruct-2507", "DeepSeek-R1-Distill-Qwen-7B", "OctoThinker-3B-Long-Base"),
        *("OctoThinker-8B-Long-Base", "deepseek-math-7b-base"),
    ),
}
PANELS[14] = (*PANELS[13], "Qwen3-14B", "Llama-3.1-8B-Instruct")


@pytest.fixture(scope="module")
def paper_study():
    """A synthetic study of the paper's models."""
    rows = STUDIES["paper"]
    analyses = [make(progressive(3), row.model, prompts=2, seed=seed) for seed, row in enumerate(rows)]
    return Study(rows, tuple(replace(a, config={**a.config, "template": "chat"}) for a in analyses))


def test_the_papers_preset_is_table_4():
    assert {row.model for row in STUDIES["paper"]} == TABLE_4
    assert len(STUDIES["paper"]) == 12


def test_study_figures_list_models_in_the_order_of_the_paper(paper_study):
    panels = {number: tuple(a.name.rpartition("/")[2] for a in paper_study.of_figure(number)) for number in PANELS}
    assert panels == PANELS


@pytest.mark.parametrize("preset", STUDIES)
def test_every_preset_has_the_main_figures_and_the_papers_templates(preset):
    rows = STUDIES[preset]
    assert len({row.model for row in rows}) == len(rows)
    numbers = {number for row in rows for number in row.figures}
    assert {2, 3, 12} <= numbers <= set(PANELS)
    for row in rows:
        assert row.template in TEMPLATES
        assert row.figures
        # Appendix A.2: the non-thinking template for every Qwen3.
        assert (row.template == "qwen3") == row.model.startswith("Qwen/Qwen3-")
        assert (row.template == "qwen-math") == row.model.startswith("Qwen/Qwen2.5-Math")
        assert (row.template == "octothinker") == row.model.startswith("OctoThinker/")


def test_paper_study_allows_7168_response_tokens(paper_study, monkeypatch, caplog):
    max_new_tokens, looked_up = {}, SimpleNamespace(get_text_config=lambda: DEEPSEEK_MATH)

    def analyze(model, **options):
        max_new_tokens[model] = options["max_new_tokens"]
        return paper_study.analyses[0]

    monkeypatch.setattr(studies, "analyze", analyze)
    monkeypatch.setattr(studies, "release_memory", lambda: None)
    monkeypatch.setattr(studies.models, "check", lambda name, **more: (name, looked_up))
    study("paper")
    # Those with a context of 4096 leave 1024 of it for the prompt.
    short = {"Qwen/Qwen2.5-Math-7B", "deepseek-ai/deepseek-math-7b-base"}
    assert max_new_tokens == {model: 3072 if model in short else 7168 for model in TABLE_4}
    # Had all of them the shape of deepseek-math: keys and values, 2 bytes, 30 layers, 32 heads, 128 wide.
    assert "16 responses of up to 7168 tokens hold up to 56 GB of keys and values" in caplog.text
    caplog.clear()
    study("paper", max_new_tokens=100, generator="transformers")
    assert set(max_new_tokens.values()) == {100}
    assert not caplog.text
    study("testbed")
    assert max_new_tokens["testbed/qwen3"] is None


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gpt_neox"])
def test_memory_per_token_is_the_size_of_its_keys_and_values(model_type):
    model = tiny_model(model_type)
    cache = model(torch.ones(1, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(2 * getattr(layer, kept).numel() for layer in cache.layers for kept in ("keys", "values"))
    assert context.cache_bytes(model.config) * 7 == held


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def done(root):
    return study("testbed", output=root, **QUICK)


def test_study_analyses_match_single_analyses(done, root):
    assert [a.name for a in done.analyses] == ["testbed/qwen3", "testbed/llama"]
    assert done.failures == {}
    alone = analyze("testbed/llama", **QUICK)
    pd.testing.assert_frame_equal(done.analyses[1].layers, alone.layers, check_exact=True)
    assert Analysis.load(root / "testbed--llama").n_responses == 3
    assert Study.load(root).models == done.models == STUDIES["testbed"]
    assert [a.name for a in done.of_figure(3)] == ["testbed/qwen3", "testbed/llama"]
    assert done.of_figure(13) == []


def test_study_tables_match_the_analyses(done):
    table = done.table.set_index("label")
    for label, analysis in zip(("qwen3", "llama"), done.analyses, strict=True):
        row = table.loc[label]
        assert row["policy_entropy"] == analysis.policy_entropy["mean"]
        assert row["reward"] == pytest.approx(analysis.sequences["reward"].astype(float).mean())
        assert row["exploration"] + row["integration"] + row["convergence"] == row["n_layers"] == analysis.n_layers
        assert (row["boundary_layer"] is pd.NA) == (analysis.boundary_layer is None)
    pd.testing.assert_frame_equal(done.convergence, convergence_table(done.analyses, labels=["qwen3", "llama"]))


def refused(*arguments, **options):
    raise AssertionError("a model was looked up or loaded")


@pytest.fixture(scope="module")
def hub_analysis(done, tmp_path_factory):
    """A finished analysis of a model that only the hub has."""
    directory = tmp_path_factory.mktemp("hub")
    analysis = done.analyses[1]
    model = {**analysis.model, "id": "org/name", "revision": "0" * 40}
    config = {**analysis.config, "model": "org/name", "template": "chat"}
    replace(analysis, name="org/name", model=model, config=config).save(directory / "org--name")
    return directory, (StudyModel("org/name", "chat"),)


def test_finished_hub_models_are_not_loaded_again(done, root, hub_analysis, tmp_path, monkeypatch):
    directory, rows = hub_analysis
    monkeypatch.setattr(studies, "analyze", refused)
    monkeypatch.setattr(studies.models, "check", refused)
    for commit in ("0" * 40, None):
        monkeypatch.setattr(studies, "commit_now", lambda name, commit=commit: commit)
        again = study(rows, output=directory, **QUICK)
        pd.testing.assert_frame_equal(again.analyses[0].layers, done.analyses[1].layers, check_exact=True)
    # The same prompts from a file may be others by now.
    with pytest.raises(UserError, match="AssertionError: a model was looked up"):
        study(rows, output=directory, prompts=__file__, **QUICK)
    # So may local models: embedded ones and local directories.
    monkeypatch.setattr(studies, "is_up_to_date", lambda config, analysis: True)
    assert len(study("testbed", output=root, **QUICK).analyses) == 2
    monkeypatch.setattr(studies, "is_up_to_date", lambda config, analysis: False)
    with pytest.raises(UserError, match="AssertionError: a model was looked up"):
        study("testbed", output=root, **QUICK)
    with monkeypatch.context() as here:
        (tmp_path / "org" / "name").mkdir(parents=True)
        here.chdir(tmp_path)
        with pytest.raises(UserError, match="AssertionError: a model was looked up"):
            study(rows, output=directory, **QUICK)
    # The same name may also be another model.
    monkeypatch.setattr(studies, "commit_now", lambda name: "1" * 40)
    with pytest.raises(UserError, match="AssertionError: a model was looked up"):
        study(rows, output=directory, **QUICK)


def test_the_current_commit_is_from_the_hub_or_the_cache(tmp_path, monkeypatch):
    (tmp_path / "models--org--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs" / "main").write_text("2" * 40)
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("2" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    seen = SimpleNamespace(sha="3" * 40)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, **options: seen)
    assert commit_now("org/name") == "3" * 40

    def offline(self, name, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    assert commit_now("org/name") == "2" * 40
    assert commit_now("org/other") is None
    assert commit_now("no such name") is None


def test_finished_local_models_are_compared_by_their_weights(tmp_path):
    model = tiny_model("llama")
    place = tmp_path / "model"

    def save():
        model.save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)

    save()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "w2 w3 w4"}\n')
    options = {"prompts": prompts, "output": tmp_path / "out", "max_new_tokens": 3}
    rows = (StudyModel(str(place), "plain"),)
    first = study(rows, **options).analyses[0]
    files = sorted((p.name, p.stat().st_mtime_ns) for p in first.path.iterdir())
    again = study(rows, **options).analyses[0]
    assert sorted((p.name, p.stat().st_mtime_ns) for p in again.path.iterdir()) == files
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 1e-3
    save()
    with pytest.raises(UserError, match=r"already holds an analysis with other settings \(weights \w+ -> \w+\)"):
        study(rows, **options)


def test_conflicting_directories_are_refused_before_the_analysis(tmp_path, monkeypatch):
    monkeypatch.setattr(studies.models, "check", refused)
    monkeypatch.setattr(studies, "commit_now", refused)
    rows = tuple(StudyModel("testbed/qwen3", template) for template in ("chat", "plain"))
    with pytest.raises(UserError, match=r"testbed/qwen3 is in two rows \(templates chat and plain\)"):
        study(rows, output=tmp_path)
    rows = tuple(StudyModel(f"org/a{sign}b", "chat") for sign in ":+")
    with pytest.raises(UserError, match=r"org/a:b and org/a\+b would both be written to org--a-b"):
        study(rows, output=tmp_path)
    taken = tmp_path / "testbed--llama"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match=r"testbed--llama: is in use for something else \(it holds thesis.tex\)"):
        study("testbed", output=tmp_path, **QUICK)
    assert [p.name for p in tmp_path.rglob("*")] == ["testbed--llama", "thesis.tex"]
    with pytest.raises(UserError, match="cannot be written"):
        study("testbed", output=taken / "thesis.tex", **QUICK)


def test_other_settings_are_not_reused(done, root):
    with pytest.raises(UserError, match=r"none of the 2 .*already holds an analysis with other settings \(seed 0 -> 1"):
        study("testbed", output=root, **{**QUICK, "seed": 1})
    assert Analysis.load(root / "testbed--qwen3").lens == "policy"


ROWS = (
    StudyModel("testbed/qwen3", "chat"),
    StudyModel("./nowhere", "chat"),
    StudyModel("testbed/llama", "plain"),
)


@pytest.mark.slow
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
    # Neither a finished nor a failed model is in memory when the next begins.
    assert held == [0, 0]
    assert found.comparison is None
    assert found.convergence["label"].tolist() == ["llama"]
    monkeypatch.setattr(studies, "analyze", analyze)
    assert list(study(ROWS, output=tmp_path, **QUICK).failures) == ["./nowhere"]


def test_overwrite_repeats_the_whole_study(tmp_path):
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
def test_invalid_studies(tmp_path, preset, options, message):
    with pytest.raises(UserError, match=message):
        study(preset, output=tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_reports_failures_and_draws_the_rest(done, root, monkeypatch, capsys):
    monkeypatch.setattr(studies, "STUDIES", {"testbed": (*STUDIES["testbed"], ROWS[1])})
    drawn = []

    def save(study, directory):
        drawn.append((directory, [a.name for a in study.analyses]))
        return [directory / "fig2_entropy_flow.png"]

    monkeypatch.setattr("internal_policy.plotting.study.save_study", save)
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
    paths = save_study(done, tmp_path)
    stems = {"fig2_entropy_flow", "fig3_entropy_change", "fig12_residual_cosine"}
    stems |= {"depth_overlay", "convergence"}
    figures = {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    assert {p.name for p in paths} == figures | {"models.csv", "convergence.csv", "layers.csv"}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in paths}
    assert pd.read_csv(tmp_path / "convergence.csv")["label"].tolist() == ["qwen3", "llama"]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    # A figure that no row names any more is removed.
    save_study(Study((replace(done.models[0], figures={2: 1}),), done.analyses[:1]), tmp_path)
    assert not (tmp_path / "fig3_entropy_change.png").exists()
    save_study(done, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
