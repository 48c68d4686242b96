"""Damaged or foreign files in unfinished work: named, set aside and recomputed; foreign files are never deleted."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from bupo.test_training_resume import assert_same, train
from tiny import tiny_model, tiny_tokenizer
from training_calls import command
from transformers import TrainerCallback

from internal_policy import UserError, analyze, models
from internal_policy.analysis import pipeline
from internal_policy.analysis.results import ANALYSIS
from internal_policy.bupo.callbacks import CheckpointDigestCallback
from internal_policy.bupo.resume import FILES, drop_optimizer_states, last_checkpoint, write_digests
from internal_policy.evaluation import evaluate
from internal_policy.evaluation import pipeline as evaluating
from internal_policy.extractors import reduce_responses
from internal_policy.utils.io import read_lines_sealed, write_lines_sealed
from internal_policy.utils.workspace import Workspace

PROMPTS = ["w2 w3 w4", "w5 w6", "w7 w8 w9 w10", "w11"]
OPTIONS = {"prompts": PROMPTS, "max_new_tokens": 6, "batch_size": 2, "samples_per_prompt": 2}


def empty(path):
    path.write_bytes(b"")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def remove(path):
    path.unlink()


DAMAGES = [empty, truncate, flip, remove]
FEW = [flip, *(pytest.param(damage, marks=pytest.mark.slow) for damage in (empty, truncate, remove))]
"""A subset for shared mechanisms: ``test_workspace.py`` covers all kinds of damage."""


def named(function):
    return function.__name__


def stop_after(calls, function):
    """A function that interrupts the run at the next call."""
    left = [calls]

    def stopping(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return stopping


def assert_analyses_same(one, other):
    for name in ("sequences", "responses", "layers", "tokens"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)
    assert one.selection == other.selection


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3"), tiny_tokenizer()


def begin(model, output, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "reduce_responses", stop_after(2, reduce_responses))
        with pytest.raises(KeyboardInterrupt):
            analyze(*model, output=output, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    """An analysis that was interrupted among its captures, the same whole, and one of another seed."""
    place = tmp_path_factory.mktemp("begun")
    begin(model, place / "seed 0")
    begin(model, place / "seed 1", seed=1)
    return place, analyze(*model, **OPTIONS), analyze(*model, seed=1, **OPTIONS)


def copied(begun, tmp_path):
    shutil.copytree(begun[0] / "seed 0", tmp_path / "out")
    (work,) = tmp_path.glob("out/*/work")
    return work


@pytest.mark.parametrize("kind", ["generate", "capture"])
@pytest.mark.parametrize("damage", FEW, ids=named)
def test_a_damaged_shard_of_an_analysis_is_set_aside_and_recomputed(model, begun, tmp_path, caplog, damage, kind):
    work = copied(begun, tmp_path)
    shard = sorted(work.glob(f"{kind}-*.npz"))[0]
    damage(shard)
    left = shard.read_bytes() if shard.exists() else None
    assert_analyses_same(analyze(*model, output=tmp_path / "out", **OPTIONS), begun[1])
    messages = [r.getMessage() for r in caplog.records if "made again" in r.getMessage()]
    if left is None:
        assert messages == []
        assert not work.exists()
    else:
        assert messages == [f"{shard}: damaged, or of another run; kept as damaged-1-{shard.name}, and made again"]
        assert [p.name for p in work.iterdir()] == [f"damaged-1-{shard.name}"]
        assert (work / f"damaged-1-{shard.name}").read_bytes() == left
        # The file that was set aside does not interfere.
        analyze(*model, output=tmp_path / "out", overwrite=True, **OPTIONS)


@pytest.mark.parametrize("damage", [empty, truncate, remove], ids=named)
def test_work_without_its_settings_is_resumed_if_it_belongs_to_this_run(model, begun, tmp_path, damage):
    work = copied(begun, tmp_path)
    damage(work / "run.json")
    with pytest.MonkeyPatch.context() as patch:
        # Two of the four portions were there already.
        patch.setattr(pipeline, "reduce_responses", stop_after(2, reduce_responses))
        assert_analyses_same(analyze(*model, output=tmp_path / "out", **OPTIONS), begun[1])


@pytest.mark.parametrize("damage", [empty, remove], ids=named)
def test_work_of_another_run_is_set_aside(model, begun, tmp_path, caplog, damage):
    work = copied(begun, tmp_path)
    damage(work / "run.json")
    held = {p.read_bytes() for p in work.glob("*.npz")}
    found = analyze(*model, output=tmp_path / "out", seed=1, **OPTIONS)
    assert_analyses_same(found, begun[2])
    assert held == {p.read_bytes() for p in work.glob("damaged-*.npz")}
    assert caplog.text.count("damaged, or of another run") == len(held)


def test_a_shard_of_another_run_is_not_used(model, begun, tmp_path):
    work = copied(begun, tmp_path)
    for shard in begun[0].glob("seed 1/*/work/generate-*.npz"):
        shutil.copy(shard, work)
    assert_analyses_same(analyze(*model, output=tmp_path / "out", **OPTIONS), begun[1])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["mine.npz", "generate-0000000.npz", "notes.txt"])
def test_foreign_files_are_never_deleted(model, begun, tmp_path, name, overwrite):
    work = copied(begun, tmp_path)
    (work / name).write_text("years of work")
    before = {p: p.read_bytes() for p in work.iterdir()}
    with pytest.raises(UserError, match=f"in use for something else .it holds work/{name}"):
        analyze(*model, output=tmp_path / "out", overwrite=overwrite, **OPTIONS)
    assert {p: p.read_bytes() for p in work.iterdir()} == before


def test_files_next_to_a_finished_result_are_kept(model, tmp_path):
    done = analyze(*model, output=tmp_path, **OPTIONS)
    work = done.path / "work"
    work.mkdir()
    (work / "mine.npz").write_text("years of work")
    analyze(*model, output=tmp_path, **OPTIONS)
    assert (work / "mine.npz").read_text() == "years of work"


@pytest.mark.parametrize("damage", FEW, ids=named)
def test_damaged_rounds_of_position_sampling_are_recomputed(model, tmp_path, damage):
    options = {**OPTIONS, "tolerance": 0.5}
    whole = analyze(*model, **options)
    begin(model, tmp_path, tolerance=0.5)
    for kind in ("end-1", "capture-1"):
        damage(next(tmp_path.glob(f"*/work/{kind}-*.npz")))
    assert_analyses_same(analyze(*model, output=tmp_path, **options), whole)


@pytest.mark.parametrize("damage", FEW[:2], ids=named)
def test_a_damaged_evaluation_shard_is_recomputed(model, tmp_path, monkeypatch, caplog, damage):
    wrapped = models.wrap(*model, "tiny")
    problems = [{"prompt": p, "answer": "w4"} for p in PROMPTS]
    options = {"samples": 2, "batch_size": 2, "max_new_tokens": 5}
    whole = evaluate(wrapped, problems, **options)
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "run_with_oom_retry", stop_after(2, evaluating.run_with_oom_retry))
        with pytest.raises(KeyboardInterrupt):
            evaluate(wrapped, problems, output=tmp_path, **options)
    damage(next(tmp_path.rglob("sample-*.npz")))
    resumed = evaluate(wrapped, problems, output=tmp_path, **options)
    assert caplog.text.count("damaged, or of another run") == 1
    pd.testing.assert_frame_equal(resumed.samples, whole.samples, check_exact=True)


def test_a_truncated_file_is_not_an_interrupt(tmp_path, monkeypatch, capsys):
    def ends(*arguments, **options):
        raise EOFError("Ran out of input")

    monkeypatch.setattr(pipeline, "analyze_lenses", ends)
    messages = command(monkeypatch, capsys, "analyze", "--output", tmp_path)
    assert messages == (2, "", "error: a file ends too early (Ran out of input); --debug shows which\n")


def make_checkpoint(directory, step, settings=None, processes=1):
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (checkpoint / name).write_text(f"the {name} of {step}, which is long enough to be cut")
    write_digests(checkpoint, settings or {"seed": 0}, processes)
    return checkpoint


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", FILES])
@pytest.mark.parametrize("damage", DAMAGES, ids=named)
def test_no_run_resumes_from_an_incomplete_checkpoint(tmp_path, caplog, damage, file):
    whole, newest = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 4)
    assert last_checkpoint(tmp_path, {"seed": 0}) == newest
    damage(newest / file)
    assert last_checkpoint(tmp_path, {"seed": 0}) == whole
    if (damage, file) == (remove, FILES):
        assert caplog.messages == [f"{newest}: was not written to its end; passed over"]
        assert newest.exists()
    else:
        what = "missing" if damage is remove else "damaged"
        assert caplog.messages == [f"{newest}: {file} is {what}; kept as damaged-1-checkpoint-4"]
        assert (tmp_path / "damaged-1-checkpoint-4" / "trainer_state.json").exists()


def test_older_checkpoints_keep_only_their_weights_and_are_not_resumed(tmp_path, caplog):
    old, *newer = (make_checkpoint(tmp_path, step) for step in (2, 4, 6))
    drop_optimizer_states(tmp_path)
    assert sorted(p.name for p in old.iterdir()) == [FILES, "model.safetensors", "trainer_state.json"]
    assert all(len(list(checkpoint.iterdir())) == 6 for checkpoint in newer)
    for checkpoint in newer:
        flip(checkpoint / "optimizer.pt")
    assert last_checkpoint(tmp_path, {"seed": 0}) is None
    assert caplog.messages[-1] == f"{old}: holds its weights only; passed over"
    # What it kept is still known to be whole.
    flip(old / "model.safetensors")
    assert last_checkpoint(tmp_path, {"seed": 0}) is None
    assert "model.safetensors is damaged; kept as damaged-1-checkpoint-2" in caplog.messages[-1]


def test_a_checkpoint_of_other_settings_or_of_another_number_of_processes(tmp_path, caplog):
    make_checkpoint(tmp_path, 4, {"seed": 1})
    assert last_checkpoint(tmp_path, {"seed": 0}) is None
    assert "is of other settings; kept as damaged-1-checkpoint-4" in caplog.text
    make_checkpoint(tmp_path, 6, processes=2)
    with pytest.raises(UserError, match=r"was written by 2 processes, .* and the number now is 1; start as many"):
        last_checkpoint(tmp_path, {"seed": 0})


@pytest.mark.parametrize("damage", [empty, truncate, flip], ids=named)
def test_lines_that_were_damaged_are_not_read(tmp_path, damage):
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("one", "two\u2028three", "")]
    write_lines_sealed(path, lines)
    assert read_lines_sealed(path) == lines
    damage(path)
    assert read_lines_sealed(path) is None
    write_lines_sealed(path, [])
    assert read_lines_sealed(path) == []


class Interrupt(TrainerCallback):
    def __init__(self, update):
        self._update = update

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self._update:
            raise KeyboardInterrupt


SHORT = {"max_steps": 2, "ipa_steps": 1, "mini_batches": 1, "prompts_per_step": 2, "save_total_limit": 1}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A training that was interrupted after its first step of two, and the same whole."""
    place = tmp_path_factory.mktemp("stopped")
    for part in (tiny_model("qwen3", layers=4), tiny_tokenizer()):
        part.save_pretrained(place / "model")
    with pytest.raises(KeyboardInterrupt):
        train(place, "begun", [Interrupt(1)], **SHORT)
    return place, train(place, "uninterrupted", **SHORT)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("checkpoints/checkpoint-1/optimizer.pt", empty),
        pytest.param("checkpoints/checkpoint-1/scheduler.pt", remove, marks=pytest.mark.slow),
        pytest.param("checkpoints/checkpoint-1/rng_state.pth", remove, marks=pytest.mark.slow),
        pytest.param("checkpoints/checkpoint-1/model.safetensors", flip, marks=pytest.mark.slow),
        pytest.param("checkpoints/checkpoint-1/dynamics.csv", truncate, marks=pytest.mark.slow),
        pytest.param("dynamics_responses.jsonl", flip, marks=pytest.mark.slow),
        pytest.param("dynamics.csv", empty, marks=pytest.mark.slow),
        pytest.param("history.csv", remove, marks=pytest.mark.slow),
        pytest.param("run_settings.json", empty, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_training_ends_with_the_same_results(stopped, caplog, file, damage):
    place, uninterrupted = stopped
    name = f"copy {len(list(place.iterdir()))}"
    shutil.copytree(place / "begun", place / name)
    damage(place / name / file)
    run = train(place, name, **SHORT)
    assert_same(uninterrupted, run)
    in_checkpoint = file.startswith("checkpoints/")
    assert ("training from the first step" in caplog.text) is in_checkpoint
    assert ("resuming after step 1" in caplog.text) is not in_checkpoint
    # Files that are rewritten at every step are not read.
    assert (file.split("/")[-1] in caplog.text) is (file not in ("dynamics.csv", "history.csv"))


def test_unreadable_settings_are_not_treated_as_another_run(stopped):
    place, _ = stopped
    shutil.copytree(place / "begun", place / "illegible")
    empty(place / "illegible" / "run_settings.json")
    before = {p: p.read_bytes() for p in (place / "illegible").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"run_settings\.json: damaged, and the checkpoints have other settings"):
        train(place, "illegible", **{**SHORT, "seed": 5})
    assert {p: p.read_bytes() for p in (place / "illegible").rglob("*") if p.is_file()} == before


def test_a_full_disk_during_training_is_reported_in_one_line(stopped):
    place, uninterrupted = stopped
    checkpoint = place / "full" / "checkpoints" / "checkpoint-2"
    shutil.copytree(place / "begun", place / "full")
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full: a file could not be written to its end .*make room, then repeat"):
        train(place, "full", **SHORT)
    (checkpoint / "optimizer.pt").unlink()
    assert_same(uninterrupted, train(place, "full", **SHORT))


def test_the_newest_checkpoints_are_kept_regardless_of_file_times(tmp_path):
    """Older lists are written again where optimiser states are dropped, so that times say nothing about the order."""
    args = SimpleNamespace(save_total_limit=3, output_dir=tmp_path)
    accelerator = SimpleNamespace(wait_for_everyone=lambda: None, num_processes=1)
    callback = CheckpointDigestCallback(SimpleNamespace(args=args, accelerator=accelerator), {"seed": 0})
    for step in range(1, 8):
        checkpoint = make_checkpoint(tmp_path, step)
        os.utime(checkpoint, (1e9 - step, 1e9 - step))
        callback.on_save(args, SimpleNamespace(is_world_process_zero=True, global_step=step), None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-6", "checkpoint-7"]
    assert (tmp_path / "checkpoint-6" / "optimizer.pt").exists()


def test_set_aside_files_are_not_reported_again(tmp_path, caplog):
    workspace = Workspace(tmp_path / "a", ANALYSIS)
    workspace.open({"seed": 0}, overwrite=False)
    workspace.write("capture", 0, {"index": np.arange(3)})
    (shard,) = workspace.work.glob("capture-*.npz")
    flip(shard)
    for _ in range(3):
        Workspace(tmp_path / "a", ANALYSIS).open({"seed": 0}, overwrite=False)
    assert len(caplog.messages) == 1
    assert [p.name for p in workspace.work.glob("*damaged*")] == [f"damaged-1-{shard.name}"]
