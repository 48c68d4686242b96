"""A directory has one writer at a time: the second is refused or waits, and no lock outlives its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pandas as pd
import pytest
from saved_results import save_one_of_each
from synthetic_analyses import make, progressive
from synthetic_run import make as make_run
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from training_calls import MODEL, SMALL, command, read_files

from internal_policy import Analysis, UserError, analyze, bupo, models
from internal_policy.analysis.sweep import sweep
from internal_policy.bupo.resume import RunDirectory
from internal_policy.comparison.study import study
from internal_policy.evaluation import evaluate
from internal_policy.utils import locks
from internal_policy.utils.locks import LOCK, keep_locks, locked, writing

HELD = {"pid": 4321, "host": "node7", "since": "2026-01-02 03:04:05"}
TOLD = r"another process is writing there \(process 4321 on node7 since 2026-01-02 03:04:05\); add --wait"
PROBLEMS = [{"prompt": "w2 w3", "answer": "w4"}]


@contextmanager
def another_writer(directory):
    """What another process does: locks of two open files exclude each other within one process too."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(HELD))
        file.flush()
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3"), tiny_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint") / "checkpoint-1"
    for part in model:
        part.save_pretrained(place)
    return place


@pytest.mark.parametrize("options", [{}, {"overwrite": True}], ids=["as it is", "overwrite"])
@pytest.mark.parametrize("kind", ["analyze", "evaluate", "train", "sweep", "study", "save"])
def test_the_second_writer_is_refused_and_changes_nothing(kind, options, model, checkpoint, tmp_path):
    wrapped = models.wrap(*model, "tiny")
    writers = {
        "analyze": lambda: analyze(*model, responses=ragged_responses(2), output=tmp_path, **options),
        "evaluate": lambda: evaluate(wrapped, PROBLEMS, samples=1, output=tmp_path, **options),
        "train": lambda: bupo.train(MODEL, output=tmp_path / "run", **{**SMALL, **options}),
        "sweep": lambda: sweep(checkpoints=checkpoint, output=tmp_path, **options),
        "study": lambda: study("testbed", output=tmp_path, **options),
        "save": lambda: make(progressive(4)).save(tmp_path / "saved"),
    }
    places = {
        "analyze": "Qwen3ForCausalLM",
        "evaluate": "tiny/given",
        "train": "run",
        "sweep": "--".join(checkpoint.parts[-2:]),
        "study": "testbed--llama",
        "save": "saved",
    }
    with another_writer(tmp_path / places[kind]):
        before = read_files(tmp_path)
        with pytest.raises(UserError, match=TOLD):
            writers[kind]()
        assert read_files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["compare", "analyses"], "data/comparisons/compare--007--NA"),
        (["report", "analyses"], "analyses/NA"),
        (["analyze", "-m", "testbed/qwen3", "-m", "testbed/llama"], "data/analyses/testbed--llama"),
        (["evaluate", "-m", "testbed/qwen3", "-m", "testbed/llama"], "data/evaluations/testbed--llama/testbed"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_the_second_command_is_refused_in_one_line(words, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(save_one_of_each(tmp_path))
    with another_writer(tmp_path / place):
        before = read_files(tmp_path)
        code, out, message = command(monkeypatch, capsys, *words)
        assert read_files(tmp_path) == before
    assert (code, out) == (2, "")
    assert message.startswith(f"error: {place}: another process is writing there (process 4321 on node7")
    assert message.count("\n") == 1


def test_a_waiting_process_continues_as_if_started_then(model, tmp_path, caplog):
    given = {"responses": ragged_responses(2), "output": tmp_path}
    (tmp_path / "elsewhere").mkdir()
    first = analyze(*model, **given | {"output": tmp_path / "elsewhere"})
    directory = tmp_path / first.path.name
    with another_writer(directory):
        waiting = threading.Thread(target=analyze, args=model, kwargs={**given, "wait": True})
        waiting.start()
        waiting.join(timeout=0.3)
        assert waiting.is_alive()
        first_files = {p.name: p.read_bytes() for p in first.path.iterdir()}
        for name, content in first_files.items():
            (directory / name).write_bytes(content)
        # As when the other process exits.
        (directory / LOCK).unlink()
    waiting.join()
    assert "waiting until it has ended" in caplog.text
    assert "already complete" in caplog.text
    assert read_files(directory) == {directory / name: content for name, content in first_files.items()}


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / LOCK).symlink_to("mine")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "years of work"


def test_threads_exclude_each_other_too(tmp_path):
    message = []

    def second():
        with pytest.raises(UserError, match=f"process {os.getpid()} on") as info, locked(tmp_path):
            pass
        message.append(info)

    with locked(tmp_path), locked(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert message
    with locked(tmp_path):
        pass


def test_nothing_is_left_behind(tmp_path):
    with locked(tmp_path / "a" / "b", tmp_path / "c"):
        assert (tmp_path / "a" / "b" / LOCK).is_file()
        (tmp_path / "c" / "result").touch()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "result"]


def test_a_command_holds_its_lock_to_the_end(tmp_path):
    with keep_locks():
        with writing(tmp_path):
            pass
        assert (tmp_path / LOCK).is_file()
    assert not (tmp_path / LOCK).exists()


def test_no_lock_outlives_its_process(tmp_path):
    """Neither that of a killed process, nor through a child that it had forked, nor through one that it had started."""
    code = """
import os, subprocess, sys, time
from internal_policy.utils.locks import locked
from pathlib import Path
with locked(Path(sys.argv[1])):
    subprocess.Popen(["sleep", "60"])
    if not os.fork():
        # Only now has the child let go of the lock: the parent may be killed before the child has run at all.
        print("forked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout.readline()
        with pytest.raises(UserError, match=f"process {process.pid} on"), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_reported_once(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path):
        pass
    assert "its file system has no locks (No locks available)" in caplog.text


def test_a_read_only_directory_is_read(model, tmp_path, monkeypatch):
    done = analyze(*model, responses=ragged_responses(2), output=tmp_path)

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(locks, "_open_lock_file", refuse)
    again = analyze(*model, responses=ragged_responses(2), output=tmp_path)
    pd.testing.assert_frame_equal(again.layers, done.layers)


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    with subprocess.Popen(["true"]) as gone:
        pass
    stale = tmp_path / f".layers.csv.{gone.pid}.internal-policy.tmp"
    others = [tmp_path / f".layers.csv.{os.getpid()}.internal-policy.tmp", tmp_path / f".mine.{gone.pid}.tmp"]
    for path in (stale, *others):
        path.touch()
    with locked(tmp_path):
        assert not stale.exists()
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_a_leftover_lock_is_not_a_result(tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / LOCK).write_text(json.dumps(HELD))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / LOCK).write_text(json.dumps(HELD))
    RunDirectory(run.path).check(overwrite=False)
    RunDirectory(tmp_path / "new").check(overwrite=False)


TWO = """
import os, sys, time
from internal_policy import UserError, analyze
seed, go = int(sys.argv[1]), sys.argv[2]
from internal_policy.models import load
load("testbed/qwen3")
for _ in range(int(sys.argv[3])):
    number = sys.stdin.readline().strip()
    while time.time() < float(number.split()[1]):
        pass
    try:
        done = analyze("testbed/qwen3", seed=seed, max_responses=4, max_new_tokens=6, batch_size=2,
                       output=f"{go}/{number.split()[0]}", overwrite=number.split()[2] == "1")
        print("done", flush=True)
    except UserError as error:
        print("refused", error, flush=True)
"""


@pytest.mark.slow
def test_of_two_simultaneous_processes_one_succeeds_and_one_is_refused(tmp_path):
    times = 8
    expected = [analyze("testbed/qwen3", seed=s, max_responses=4, max_new_tokens=6, batch_size=2) for s in (0, 1)]
    start = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    pair = [subprocess.Popen([sys.executable, "-c", TWO, str(s), tmp_path, str(times)], **start) for s in (0, 1)]
    met = 0
    for number in range(times):
        # At a time when both are there; every other time over what was finished before.
        overwrite = number % 2
        line = f"{number // 2} {time.time() + (30 if number == 0 else 0.2)} {overwrite}\n"
        for process in pair:
            process.stdin.write(line)
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in pair]
        found = Analysis.load(tmp_path / str(number // 2))
        winner = expected[found.config["seed"]]
        refused = [answer for answer in answers if answer.startswith("refused")]
        met += sum("another process is writing there" in answer for answer in refused)
        # On a busy machine the one may have ended before the other begins, which then overwrites it or finds it there.
        assert len(refused) == 1 or (overwrite and not refused), answers
        assert all("another process is writing" in message or "other settings" in message for message in refused)
        if refused:
            assert answers[found.config["seed"]] == "done"
        pd.testing.assert_frame_equal(found.sequences, winner.sequences, check_exact=True)
        pd.testing.assert_frame_equal(found.responses, winner.responses, check_exact=True)
        assert not list(tmp_path.rglob(LOCK))
    assert met >= times // 2
    for process in pair:
        process.stdin.close()
        process.stdout.close()
        assert process.wait() == 0
