"""An analysis killed at any time leaves no partial files, and the same command finishes with the same results."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from tiny import tiny_model, tiny_tokenizer

from internal_policy import Analysis

KILLS = 7


def command(output):
    return [
        *(
            sys.executable,
            "-m",
            "internal_policy.cli",
            "analyze",
            "--model",
            "model",
            "--prompts",
            "prompts.jsonl",
        ),
        *("--max-responses", "48", "--batch-size", "3", "--max-new-tokens", "24", "--output", str(output)),
    ]


@pytest.fixture
def place(tmp_path):
    tiny_model("qwen3", layers=4).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    prompts = [{"prompt": " ".join(f"w{2 + (i * j) % 50}" for j in range(1, 3 + i % 9))} for i in range(48)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return tmp_path


def whole_files_only(directory):
    """Assert that every file that looks like a result can be read completely."""
    for path in directory.rglob("*"):
        if path.name.endswith(".tmp") or path.is_dir():
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            assert path.read_text().endswith("}\n")
        elif path.suffix == ".parquet":
            pd.read_parquet(path)
        elif path.suffix == ".csv":
            pd.read_csv(path)
    if list(directory.glob("*/analysis.json")):
        Analysis.load(directory)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(place):
    def analyze(output):
        return subprocess.Popen(
            command(output), cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    started = time.perf_counter()
    uninterrupted = analyze("uninterrupted")
    assert uninterrupted.wait() == 0, uninterrupted.stderr.read()
    duration = time.perf_counter() - started

    rng = random.Random(0)
    kills = 0
    shards = []
    while kills < KILLS:
        process = analyze("killed")
        # The first kills happen at any time, imports and loading included; later ones only during work, so that most of
        # them interrupt sampling, capture or writing.
        before = sorted(place.glob("killed/*/work/*.npz"))
        # A third of the time is imports and loading; if the machine has become faster since, a new shard shows it.
        mark = time.perf_counter()
        patience = 120 if kills >= 3 else rng.uniform(0, duration / 3)
        while process.poll() is None and sorted(place.glob("killed/*/work/*.npz")) == before:
            if time.perf_counter() - mark >= patience:
                break
            time.sleep(0.005)
        if kills >= 3:
            assert time.perf_counter() - mark < 120
            time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills += 1
        if (place / "killed").exists():
            whole_files_only(place / "killed")
            shards.append(len(list(place.glob("killed/*/work/*.npz"))))
    assert len(set(shards)) >= KILLS - 3, "too few kills interrupted the work itself"
    last = analyze("killed")
    assert last.wait() == 0, last.stderr.read()

    one, other = Analysis.load(place / "uninterrupted"), Analysis.load(place / "killed")
    pd.testing.assert_frame_equal(one.sequences, other.sequences, check_exact=True)
    pd.testing.assert_frame_equal(one.responses, other.responses, check_exact=True)
    pd.testing.assert_frame_equal(one.tokens, other.tokens, check_exact=True)
    pd.testing.assert_frame_equal(one.layers, other.layers, check_exact=True)
    assert one.selection == other.selection
    assert one.policy_entropy == other.policy_entropy
    assert not list((place / "killed").rglob("work"))
    assert not [p for p in (place / "killed").rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.slow
def test_keyboard_interrupt_is_reported_in_one_line(place):
    process = subprocess.Popen(
        command("out"),
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell without job control starts its background jobs, and so a CI its tests, with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(place.glob("out/*/work/generate-*.npz")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; the same command resumes where it stopped"
