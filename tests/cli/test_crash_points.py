"""A run that is killed before or after any rename or removal of a file and restarted ends with the same results."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
from test_damaged_workspace import OPTIONS, SHORT, assert_analyses_same
from test_training_resume import assert_same, train
from tiny import tiny_model, tiny_tokenizer

from internal_policy import Analysis, analyze
from internal_policy.bupo import Run
from internal_policy.evaluation import Evaluation, evaluate
from internal_policy.utils.locks import LOCK

CHANGES = ("replace", "rename", "unlink", "remove", "rmdir")


def die_at(inside, number, when):
    """Kill this process at the n-th file operation below a directory, from 1; returns the counter of operations."""
    seen = [0]

    def killing(change):
        def changed(path, *arguments, **options):
            # shutil.rmtree names files relative to an open directory.
            concerned = "dir_fd" in options or (str(path).startswith(str(inside)) and os.path.lexists(path))
            seen[0] += concerned
            now = concerned and seen[0] == number
            if now and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return change(path, *arguments, **options)
            finally:
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)

        return changed

    for name in CHANGES:
        setattr(os, name, killing(getattr(os, name)))
    return seen


def child(run, place, output, number, when):
    seen = die_at(place / output, number, when)
    run(place, output)
    (place / f"{output}.changes").write_text(str(seen[0]))


def killed(run, place, output, number, when):
    # A server that has imported everything forks the processes that will be killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["internal_policy.bupo.training", "internal_policy.analysis.pipeline", "peft"])
    process = context.Process(target=child, args=(run, place, output, number, when))
    process.start()
    process.join(timeout=300)
    return process.exitcode


def run_analyze(place, output, **options):
    return analyze(str(place / "model"), output=place / output, **{**OPTIONS, **options})


def run_analyze_again(place, output):
    """Overwrite the results of another seed; the child copies the directory so that each attempt starts equal."""
    if not (place / output).exists():
        run_analyze(place, output, seed=1)
    return run_analyze(place, output, overwrite=True)


def run_evaluate(place, output):
    problems = [{"prompt": prompt, "answer": "w4"} for prompt in OPTIONS["prompts"]]
    return evaluate(str(place / "model"), problems, samples=2, batch_size=4, max_new_tokens=5, output=place / output)


def run_train(place, output):
    return train(place, output, **SHORT)


def run_train_again(place, output):
    if not (place / output).exists():
        train(place, output, **{**SHORT, "seed": 1})
    return train(place, output, overwrite=True, **SHORT)


def assert_evaluations_same(one, other):
    for name in ("samples", "problems", "pass_at_k"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("crashes")
    for part in (tiny_model("qwen3", layers=4), tiny_tokenizer()):
        part.save_pretrained(place / "model")
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "load", "same", "least"),
    [
        (run_analyze, Analysis.load, assert_analyses_same, 20),
        (run_analyze_again, Analysis.load, assert_analyses_same, 20),
        (run_evaluate, Evaluation.load, assert_evaluations_same, 10),
        (run_train, Run.load, assert_same, 30),
        (run_train_again, Run.load, assert_same, 40),
    ],
    ids=["analyze", "analyze --overwrite", "evaluate", "train", "train --overwrite"],
)
def test_killed_at_each_file_operation(place, run, load, same, least):
    name = run.__name__
    assert killed(run, place, f"{name}-uninterrupted", 0, "") == 0
    uninterrupted = load(place / f"{name}-uninterrupted")
    changes = int((place / f"{name}-uninterrupted.changes").read_text())
    assert changes >= least
    for number in range(1, changes + 1):
        for when in ("before", "after"):
            output = f"{name}-{number}-{when}"
            assert killed(run, place, output, number, when) == -signal.SIGKILL, output
            run(place, output)
            same(uninterrupted, load(place / output))
            left = [p for p in Path(place / output).rglob("*") if p.name.endswith(".tmp") or p.name == LOCK]
            assert left == [], output
