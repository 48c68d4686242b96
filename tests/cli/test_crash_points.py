"""A run that is killed before or after any rename or removal of a file and restarted ends with the same results."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
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

REMOVALS = ("unlink", "remove", "rmdir")
CHANGES = ("replace", "rename", *REMOVALS)


def die_at(inside, number, when):
    """Kill this process at the n-th file operation below a directory, from 1; returns the names of the operations."""
    seen = []

    def killing(name, change):
        def changed(path, *arguments, **options):
            # shutil.rmtree names files relative to an open directory.
            concerned = "dir_fd" in options or (str(path).startswith(str(inside)) and os.path.lexists(path))
            seen.extend([name] * concerned)
            now = concerned and len(seen) == number
            if now and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return change(path, *arguments, **options)
            finally:
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)

        return changed

    for name in CHANGES:
        setattr(os, name, killing(name, getattr(os, name)))
    return seen


def child(run, place, output, number, when):
    seen = die_at(place / output, number, when)
    run(place, output)
    (place / f"{output}.changes").write_text(json.dumps(seen))


def moments(changes):
    """Before and after each operation, but one moment between two removals in a row, which write nothing."""
    for number, (name, following) in enumerate(zip(changes, [*changes[1:], ""], strict=True), start=1):
        yield number, "before"
        if name not in REMOVALS or following not in REMOVALS:
            yield number, "after"


def moments_of_overwriting(changes):
    """Before each operation that removes what was there, and before every third of the others.

    A run without --overwrite is killed at each of the others.
    """
    cleared = next(n for n, name in enumerate(changes) if name not in REMOVALS)
    return [(n, "before") for n in (*range(1, cleared + 2), *range(cleared + 2, len(changes) + 1, 3))]


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
    return run_analyze(place, output, overwrite=True)


def run_evaluate(place, output):
    problems = [{"prompt": prompt, "answer": "w4"} for prompt in OPTIONS["prompts"]]
    return evaluate(str(place / "model"), problems, samples=2, batch_size=4, max_new_tokens=5, output=place / output)


def run_train(place, output, **options):
    return train(place, output, **{**SHORT, **options})


def run_train_again(place, output):
    return run_train(place, output, overwrite=True)


def assert_evaluations_same(one, other):
    for name in ("samples", "problems", "pass_at_k"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("crashes")
    for part in (tiny_model("qwen3", layers=4), tiny_tokenizer()):
        part.save_pretrained(place / "model")
    return place


def check(place, run, load, same, moments, earlier=None):
    """Kill a run at each moment and repeat it, in the place of an earlier result if one is given."""

    def start(output, number, when):
        if earlier is not None:
            shutil.copytree(earlier, place / output)
        return killed(run, place, output, number, when)

    name = run.__name__
    assert start(f"{name}-uninterrupted", 0, "") == 0
    uninterrupted = load(place / f"{name}-uninterrupted")
    changes = json.loads((place / f"{name}-uninterrupted.changes").read_text())
    for number, when in moments(changes):
        output = f"{name}-{number}-{when}"
        assert start(output, number, when) == -signal.SIGKILL, output
        run(place, output)
        same(uninterrupted, load(place / output))
        left = [p for p in Path(place / output).rglob("*") if p.name.endswith(".tmp") or p.name == LOCK]
        assert left == [], output
    return len(changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "load", "same", "least"),
    [
        (run_analyze, Analysis.load, assert_analyses_same, 20),
        (run_evaluate, Evaluation.load, assert_evaluations_same, 10),
        (run_train, Run.load, assert_same, 30),
    ],
    ids=["analyze", "evaluate", "train"],
)
def test_killed_at_each_file_operation(place, run, load, same, least):
    assert check(place, run, load, same, moments) >= least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "run", "load", "same", "least"),
    [
        (run_analyze, run_analyze_again, Analysis.load, assert_analyses_same, 20),
        (run_train, run_train_again, Run.load, assert_same, 60),
    ],
    ids=["analyze", "train"],
)
def test_killed_while_overwriting_a_result_of_another_seed(place, first, run, load, same, least):
    first(place, f"{run.__name__}-earlier", seed=1)
    earlier = place / f"{run.__name__}-earlier"
    assert check(place, run, load, same, moments_of_overwriting, earlier) >= least
