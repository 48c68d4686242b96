"""Sweeps over checkpoints: which checkpoints, on which responses, one at a time, and resumed after interruptions."""

from __future__ import annotations

import gc
import json
import re

import pandas as pd
import pytest
from tiny import ragged_responses
from tiny_checkpoints import PROMPTS, STEPS, bupo_layout, save, save_run, steps_of
from transformers import PreTrainedModel

from internal_policy import Analysis, AnalyzeConfig, UserError, analyze, compare, sweep
from internal_policy.analysis import pipeline
from internal_policy.analysis import sweep as sweeps
from internal_policy.analysis.sweep_targets import find_checkpoints, list_targets
from internal_policy.extractors import reduce_responses


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "x")


@pytest.fixture(autouse=True)
def keep_garbage(request, monkeypatch):
    """Garbage collection takes longer than a checkpoint here and is not needed."""
    if "memory" not in request.node.name:
        monkeypatch.setattr(sweeps, "release_memory", lambda: None)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The uninterrupted sweep."""
    return sweep(checkpoints=run, prompts=PROMPTS, max_new_tokens=6, output=tmp_path_factory.mktemp("uninterrupted"))


def test_checkpoints_are_found_in_natural_order(run, tmp_path, monkeypatch):
    for form in ([run / "checkpoint-*"], [str(run)], [f"{run}/"], sorted(run.iterdir()), [run, f"{run}/*-10*"]):
        assert steps_of(find_checkpoints(form)) == list(STEPS)
    monkeypatch.chdir(run.parent)
    assert [str(p) for p in find_checkpoints(["x/checkpoint-?"])] == ["x/checkpoint-5"]
    bupo = bupo_layout(run, tmp_path / "bupo")
    for form in (bupo, bupo / "checkpoints", f"{bupo}/checkpoints/checkpoint-*"):
        assert steps_of(find_checkpoints([form])) == list(STEPS)
    # A trainer that also saved its last model in the run's own directory.
    (bupo / "config.json").write_text("{}")
    assert steps_of(find_checkpoints([bupo])) == list(STEPS)


def test_the_start_model_comes_first(run):
    found = list_targets("base/model", checkpoints=str(run))
    assert [str(t) for t in found] == ["base/model", *(str(run / f"checkpoint-{s}") for s in STEPS)]
    assert [str(t) for t in list_targets("m", ["b", "a", "b"])] == ["m@b", "m@a"]
    assert [str(t) for t in list_targets("m", "main")] == ["m@main"]


def make_unfit(kind, root):
    root.mkdir()
    if kind == "adapter":
        (root / "checkpoint-1").mkdir()
        (root / "checkpoint-1" / "adapter_config.json").write_text("{}")
    elif kind == "result only":
        (root / "model").mkdir()
        (root / "model" / "config.json").write_text("{}")
    elif kind == "stray file":
        (root / "checkpoint-1").mkdir()
        (root / "checkpoint-1" / "config.json").write_text("{}")
        (root / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    ("kind", "pattern", "message"),
    [
        ("empty", "r/checkpoint-*", "r/checkpoint-*: matches nothing"),
        (
            "empty",
            "r/checkpoint-1",
            "r/checkpoint-1: no such directory; a hub model's checkpoints are given by --model",
        ),
        ("empty", "r", "r: is not a checkpoint (no config.json)"),
        ("stray file", "r/*", "r/notes.txt: is not a checkpoint (no config.json)"),
        ("adapter", "r", "r/checkpoint-1: holds LoRA adapters without their base model; merge them first"),
        ("result only", "r", "r: a run without checkpoints; its result is a model: give --model r/model"),
    ],
)
def test_invalid_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, kind, pattern, message):
    make_unfit(kind, tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        find_checkpoints([pattern])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to sweep over"),
        ({"revisions": ["a", "b"]}, "--revision a was given without --model"),
        ({"model": "m", "revisions": ["a"], "checkpoints": "c"}, "both --revision and --checkpoints"),
        ({"model": "testbed/qwen3", "revisions": ["a", "b"]}, "revisions exist on the hub only"),
        ({"checkpoints": "RUN", "own_responses": True, "responses": []}, "both --own-responses and --responses"),
        ({"checkpoints": "RUN", "max_tokens": 3}, "unknown option 'max_tokens'"),
        ({"checkpoints": "RUN", "batch_size": 0}, "--batch-size is 0"),
    ],
)
def test_invalid_sweeps(run, tmp_path, arguments, message):
    arguments = {k: run if v == "RUN" else v for k, v in arguments.items()}
    with pytest.raises(UserError, match=message):
        sweep(**arguments, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_checkpoints_of_two_runs_have_separate_directories(tmp_path, monkeypatch):
    slugs = []
    for name in ("runs/a/checkpoints/checkpoint-60", "runs/b/checkpoints/checkpoint-60", "runs/a/checkpoint-60"):
        (tmp_path / name).mkdir(parents=True)
        slugs.append(AnalyzeConfig(model=str(tmp_path / name)).slug)
    assert slugs == ["a--checkpoints--checkpoint-60", "b--checkpoints--checkpoint-60", "a--checkpoint-60"]
    monkeypatch.chdir(tmp_path / "runs/a/checkpoints/checkpoint-60")
    assert AnalyzeConfig(model=".").slug == slugs[0]
    assert AnalyzeConfig(model="Qwen/Qwen3-4B", revision="r").slug == "Qwen--Qwen3-4B@r"


def test_runs_of_the_same_name_are_refused(tmp_path):
    for parent in "ab":
        (tmp_path / parent / "run" / "checkpoint-1").mkdir(parents=True)
        (tmp_path / parent / "run" / "checkpoint-1" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="would both be written to run--checkpoint-1"):
        sweep(checkpoints=[tmp_path / "a" / "run", tmp_path / "b" / "run"])


def test_all_checkpoints_read_the_responses_of_the_first(run, uninterrupted):
    first, *others = uninterrupted
    assert steps_of(a.name for a in uninterrupted) == list(STEPS)
    assert (compare(uninterrupted).steps, compare(uninterrupted).unit) == ((1.0, 2.0, 20.0), "step"), "named by updates"
    assert all(a.path is not None and Analysis.load(a.path).n_responses == 4 for a in uninterrupted)
    alone = analyze(str(run / "checkpoint-5"), prompts=PROMPTS, max_new_tokens=6)
    pd.testing.assert_frame_equal(first.layers, alone.layers, check_exact=True)
    for other in others:
        pd.testing.assert_frame_equal(other.sequences, first.sequences, check_exact=True)
        assert not other.layers["entropy_out"].equals(first.layers["entropy_out"])
    given = analyze(str(run / "checkpoint-100"), responses=first.sequences)
    pd.testing.assert_frame_equal(others[-1].responses, given.responses, check_exact=True)


def test_each_checkpoint_may_sample_its_own_responses(run):
    own = sweep(checkpoints=run / "checkpoint-1*", own_responses=True, prompts=PROMPTS, max_new_tokens=6)
    alone = analyze(str(run / "checkpoint-100"), prompts=PROMPTS, max_new_tokens=6)
    pd.testing.assert_frame_equal(own[1].sequences, alone.sequences, check_exact=True)
    pd.testing.assert_frame_equal(own[1].layers, alone.layers, check_exact=True)
    assert own[0].sequences["response"].tolist() != own[1].sequences["response"].tolist()


def test_responses_of_an_earlier_analysis(run, uninterrupted):
    (again,) = sweep(checkpoints=run / "checkpoint-10", responses=uninterrupted[0], max_responses=3)
    assert again.sequences["input_ids"].tolist() == uninterrupted[0].sequences["input_ids"].tolist()[:3]
    # The same responses in other batches: float32 rounding of differently shaped products.
    part = uninterrupted[1].responses[uninterrupted[1].responses["response"] < 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(again.responses, part, check_exact=False, rtol=0, atol=1e-5)


def test_other_tokenizers_are_refused_before_the_first_is_analysed(run, tmp_path):
    other = save(tmp_path / "other" / "checkpoint-7", seed=3, vocab=70)
    options = {"checkpoints": [run / "checkpoint-5", other], "prompts": PROMPTS, "max_new_tokens": 3}
    with pytest.raises(UserError, match=r"another tokenizer than .*checkpoint-5 \(they differ in 'w61'"):
        sweep(**options, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [a.vocab_size for a in sweep(**options, own_responses=True)] in ([61, 70], [70, 61])


def test_all_checkpoints_are_looked_up_before_the_first_is_analysed(run, tmp_path):
    broken = tmp_path / "z" / "checkpoint-9"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text((run / "checkpoint-5" / "config.json").read_text())
    with pytest.raises(UserError, match="no tokenizer in this directory"):
        sweep(checkpoints=[run, broken], prompts=PROMPTS, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def models_in_memory():
    return {id(o) for o in gc.get_objects() if issubclass(type(o), PreTrainedModel)}


def test_one_checkpoint_is_in_memory_at_a_time_and_rewards_are_kept(run, monkeypatch):
    before, seen = models_in_memory(), []

    def watched(*arguments, **options):
        seen.append(len(models_in_memory() - before))
        analysis = analyze(*arguments, **options)
        return analysis

    monkeypatch.setattr(sweeps, "analyze", watched)
    rows = [{**row, "reward": float(i % 2)} for i, row in enumerate(ragged_responses(3))]
    done = sweep(checkpoints=run, responses=rows)
    assert seen == [0, 0, 0]
    assert all(analysis.sequences["reward"].tolist() == [0.0, 1.0, 0.0] for analysis in done)


def interrupt(monkeypatch, at):
    """Interrupt the capture as its `at`-th batch, counted over all checkpoints, is about to begin."""
    calls = []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return reduce_responses(*arguments)

    monkeypatch.setattr(pipeline, "reduce_responses", stopping)
    return calls


def test_an_interrupted_sweep_resumes_with_the_same_results(run, uninterrupted, tmp_path, monkeypatch):
    options = {"checkpoints": run, "prompts": PROMPTS, "max_new_tokens": 6, "output": tmp_path, "batch_size": 2}
    calls = interrupt(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        sweep(**options)
    (finished,) = tmp_path.glob("*/analysis.json")
    assert finished.parent.name == "x--checkpoint-5"
    stamp = finished.stat().st_mtime_ns
    done = sweep(**options)
    assert finished.stat().st_mtime_ns == stamp
    # Two batches per checkpoint: those of the first and one of the second were done; the interrupted one is repeated.
    assert len(calls) == 4 + 3
    for analysis, whole in zip(done, uninterrupted, strict=True):
        pd.testing.assert_frame_equal(analysis.sequences, whole.sequences, check_exact=True)
        # Batches of two and of four: float32 rounding of differently shaped products.
        pd.testing.assert_frame_equal(analysis.responses, whole.responses, check_exact=False, rtol=0, atol=1e-5)
    n_calls, stamps = len(calls), [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("*/analysis.json"))]
    sweep(**options)
    assert len(calls) == n_calls
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("*/analysis.json"))] == stamps


@pytest.mark.slow
def test_an_interrupted_overwrite_resumes_without_overwrite(run, tmp_path, monkeypatch):
    options = {"checkpoints": run / "checkpoint-1*", "prompts": PROMPTS, "output": tmp_path}
    sweep(**options, max_new_tokens=3)
    with pytest.raises(UserError, match="max_new_tokens 3 -> 4"):
        sweep(**options, max_new_tokens=4)
    interrupt(monkeypatch, at=2)
    with pytest.raises(KeyboardInterrupt):
        sweep(**options, max_new_tokens=4, overwrite=True)
    done = sweep(**options, max_new_tokens=4)
    assert len({json.dumps(a.sequences["input_ids"].tolist()) for a in done}) == 1
    assert done[0].config["max_new_tokens"] == 4


def test_overwrite_keeps_foreign_directories(run, tmp_path):
    sweep(checkpoints=run / "checkpoint-5", prompts=PROMPTS, max_new_tokens=3, output=tmp_path)
    (tmp_path / "x--checkpoint-10").mkdir()
    (tmp_path / "x--checkpoint-10" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is in use for something else"):
        sweep(checkpoints=run, prompts=PROMPTS, max_new_tokens=3, output=tmp_path, overwrite=True)
    assert (tmp_path / "x--checkpoint-5" / "analysis.json").is_file()
    assert (tmp_path / "x--checkpoint-10" / "thesis.tex").read_text() == "years of work"
