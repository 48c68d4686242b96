"""Finished sweeps, lenses, evaluations and runs are recognised by their files, like a single analysis."""

from __future__ import annotations

import dataclasses
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from base_installation import EACH, run_base
from synthetic_run import make
from test_finished import change_a_byte

from internal_policy import Analysis, AnalyzeConfig, UserError, sweep
from internal_policy.analysis.finished import find_finished
from internal_policy.analysis.pipeline import analyze_lenses
from internal_policy.bupo.config import TrainConfig
from internal_policy.bupo.run import call_digest
from internal_policy.bupo.run import find_finished as find_finished_run
from internal_policy.cli.report import write_reports
from internal_policy.evaluation import evaluate
from internal_policy.evaluation import results as evaluations
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.models import testbed
from internal_policy.utils import result_format

OPTIONS = {"max_responses": 2, "max_new_tokens": 4, "device": "cpu"}
RATED = {"samples": 1, "max_new_tokens": 4, "device": "cpu", "max_problems": 2}
ASKED = {"model": "model", "prompts": "prompts.jsonl", "method": "grpo", "max_steps": 30}
PREPARED = """
from pathlib import Path
from matplotlib.figure import Figure
from internal_policy.utils import result_format
result_format._ACCELERATORS = ()
Figure.savefig = lambda figure, file, **options: isinstance(file, Path) and file.touch()
"""
"""Neither a GPU that this machine may have, nor the seconds that drawing takes."""
LENSES = ("policy", "logit-lens")
FINISHED = {"lenses": 2, "sweep": 2, "evaluation": 1, "run": 1}
"""How many results each command finds."""
COMMANDS = {
    "lenses": "analyze --model model --prompts prompts.jsonl --lens policy --lens logit-lens --output out",
    "sweep": "analyze --checkpoints 'run/checkpoint-*' --prompts prompts.jsonl --output swept",
    "evaluation": "evaluate --model model --benchmark prompts.jsonl --samples 1 --max-problems 2 --output rated",
    "run": "train --model model --prompts prompts.jsonl --method grpo --max-steps 30 --output trained",
}


def keep(path, options):
    """A finished run that records its call."""
    run = make(path)
    asked = TrainConfig.from_keywords(**options)
    call = {"options": {"output": str(path)}, "objects": [], "from_hub": [], "digest": call_digest(asked)}
    versions = {"torch": metadata.version("torch")}
    run = dataclasses.replace(run, call=call, versions=versions, config={**run.config, "hooked": None})
    run.save()


@pytest.fixture(scope="module")
def finished_results(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    for name in ("model", "run/checkpoint-1", "run/checkpoint-2"):
        shutil.copytree(testbed.path("testbed/qwen3"), place / name)
    lines = ('{"prompt": "a=2,b=a+1;b?", "answer": "3"}', '{"prompt": "a=5;a?", "answer": "5"}')
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(result_format, "_ACCELERATORS", ())
        analyze_lenses("model", LENSES, prompts="prompts.jsonl", output="out", **OPTIONS)
        sweep(checkpoints="run/checkpoint-*", prompts="prompts.jsonl", output="swept", **OPTIONS)
        evaluate("model", "prompts.jsonl", output="rated", **RATED)
        keep(place / "trained", {**ASKED, "output": "trained"})
    for manifest in (*place.glob("*/*/analysis.json"), place / "trained" / "run.json"):
        (manifest.parent / "report.html").write_text("a page")
    return place


@pytest.fixture
def place(finished_results, tmp_path, monkeypatch):
    """A copy in which the results keep their names."""
    copy = shutil.copytree(finished_results, tmp_path / finished_results.name)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(result_format, "_ACCELERATORS", ())
    return copy


def find(kind, place, **other):
    if kind == "run":
        return find_finished_run(TrainConfig.from_keywords(**{**ASKED, "output": "trained", **other}))
    if kind == "evaluation":
        config = EvaluateConfig(model="model", benchmark="prompts", **{**RATED, **other})
        return evaluations.find_finished(config, "prompts.jsonl", place / "rated")
    options = {"prompts": "prompts.jsonl", **OPTIONS, **other}
    if kind == "lenses":
        configs = [AnalyzeConfig(model="model", lens=lens, **options) for lens in LENSES]
        return find_finished(configs, place / "out", follow=True)
    configs = [AnalyzeConfig(model=f"run/checkpoint-{i}", **options) for i in (1, 2)]
    return find_finished(configs, place / "swept", follow=True)


CHANGED = {
    "lenses": ("model/model.safetensors", "prompts.jsonl"),
    "sweep": ("run/checkpoint-2/model.safetensors", "prompts.jsonl"),
    "evaluation": ("model/tokenizer.json", "prompts.jsonl"),
    "run": ("model/model.safetensors", "prompts.jsonl"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_changed_byte_is_detected(kind, place):
    assert find(kind, place) is not None
    for pattern in CHANGED[kind]:
        (path,) = place.glob(pattern)
        # In a text file one digit is changed, so that it can still be read.
        at = path.read_bytes().index(b"a=2") + 2 if path.suffix == ".jsonl" else -1
        change_a_byte(path, at)
        assert find(kind, place) is None
        change_a_byte(path, at)
    assert find(kind, place) is not None


@pytest.mark.parametrize("kind", ["lenses", "sweep", "evaluation"])
def test_other_settings_are_refused(kind, place):
    with pytest.raises(UserError, match="with other settings"):
        find(kind, place, seed=3)


def test_an_evaluation_that_depends_on_more_than_files_is_not_reused(place):
    for other in ({"max_problems": 1}, {"max_problems": None}, {"device": "cuda"}):
        assert find("evaluation", place, **other) is None
    asked = EvaluateConfig(model="model", benchmark="prompts", **{**RATED, "reward": "exact"})
    assert evaluations.config_digest(asked, "prompts.jsonl") is not None
    Path("math500").write_text("of the hub all the same")
    for source in ("math500", "owner/name"):
        assert evaluations.config_digest(asked, source) is None
    for other in ({"reward": "module:function"}, {"trust_remote_code": True}, {"revision": "main"}):
        assert evaluations.config_digest(dataclasses.replace(asked, **other), "prompts.jsonl") is None
    # Other K are computed from what is there.
    assert list(find("evaluation", place, k=[1]).pass_at_k["k"]) == [1]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"eval_samples": 0},
        {"max_steps": 31},
        {"method": "bupo"},
        {"output": "elsewhere"},
        {"output": None},
        {"prompts": None},
        {"prompts": "owner/name"},
        {"model": "owner/name"},
        {"reward": "module:function"},
        {"revision": "main"},
        {"trust_remote_code": True},
        {"attn_implementation": "eager"},
        {"layer": 2},
        {"layer": "nowhere"},
        {"benchmark": "math500"},
        {"callbacks": [len]},
    ],
    ids=str,
)
def test_a_run_of_another_call_is_not_reused(other, place):
    assert find("run", place, **other) is None


def test_a_run_with_other_libraries_or_a_gpu_is_not_reused(place, monkeypatch):
    monkeypatch.setattr(result_format, "library_version", lambda name: "1.0")
    assert find("run", place) is None
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(result_format, "_ACCELERATORS", ("null",))
    assert find("run", place) is None


def test_a_run_in_the_default_output_is_found(place):
    directory = TrainConfig.from_keywords(**ASKED).directory
    keep(directory, ASKED)
    assert find("run", place, output=None).path == directory
    directory.rename(directory.with_name("another"))
    assert find("run", place, output=None) is None


def test_the_layer_of_an_analysis_counts_by_its_file(place):
    (analysis,) = place.glob("out/*--model")
    before = call_digest(TrainConfig.from_keywords(**ASKED, layer=str(analysis)))
    change_a_byte(analysis / "analysis.json")
    assert before not in (None, call_digest(TrainConfig.from_keywords(**ASKED, layer=str(analysis))))
    # The command line has text where Python has a number.
    as_text, as_number = (TrainConfig.from_keywords(**ASKED, layer=layer) for layer in ("2", 2))
    assert call_digest(as_text) == call_digest(as_number)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("lenses", "run"), tuple(COMMANDS)])
def test_complete_results_load_no_libraries(place, kinds):
    short = "--max-new-tokens 4 --device cpu"
    asked = [COMMANDS[kind] + ("" if kind == "run" else f" {short}") for kind in kinds]
    asked = [words + (" --max-responses 2" if words.startswith("analyze") else "") for words in asked]
    done = run_base(PREPARED + EACH, *asked, f"{asked[0]} --seed 3", cwd=place, absent="")
    *same, other = done.stderr.split("# ")[1:]
    # Other settings are refused immediately as well.
    assert "with other settings (seed 0 -> 3)" in other
    assert other.splitlines()[-1] == "2"
    for call in same:
        *lines, end = call.splitlines()[1:]
        assert lines
        assert all("complete; nothing to " in line for line in lines), call
        # The exit code, and none of the libraries behind it.
        assert end == "0"
    assert "".join(same).count("complete; nothing to ") == sum(FINISHED[kind] for kind in kinds)
    assert {page.read_text() for page in (*place.glob("out/*/*.html"), place / "trained/report.html")} == {"a page"}


def test_a_page_newer_than_its_result_is_kept(place, monkeypatch, capsys):
    (analysis,) = place.glob("out/*--model")
    page = analysis / "report.html"
    found = Analysis.load(analysis)
    write_reports([found], keep=True)
    assert page.read_text() == "a page"
    assert "report.html" in capsys.readouterr().out
    os.utime(page, ns=(0, 0))
    write_reports([found], keep=True)
    assert page.read_text() != "a page"
