"""Several launched processes split the responses and give bitwise the same results as one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

# With --cpu accelerate starts one process, whatever the number, unless MPI is there; without a GPU --multi_gpu starts
# processes that compute on the CPU.
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"]
LAUNCH += ["--dynamo_backend=no"]
ANALYSE = ["analyze", "--model", "testbed/llama", "--max-responses", "18", "--batch-size", "4", "--keep-tokens", "6"]


def launched(processes, out, *options):
    """The command as `accelerate launch` starts it; several launches at a time must not meet at one port."""
    command = [sys.executable, "-m", *LAUNCH, f"--num_processes={processes}", "--main_process_port=0"]
    command += ["-m", "internal_policy.cli", *ANALYSE, *options, "--output", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, cwd=out.parent, timeout=240
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    from internal_policy import analyze

    out = tmp_path_factory.mktemp("alone")
    return analyze("testbed/llama", max_responses=18, batch_size=4, keep_tokens=6, output=out).path


def assert_same(one: Path, other: Path):
    for name in ("layers.csv", "responses.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("responses", "tokens"):
        pd.testing.assert_frame_equal(
            pd.read_parquet(one / f"{name}.parquet"), pd.read_parquet(other / f"{name}.parquet"), check_exact=True
        )
    kept = ("config", "selection", "policy_entropy", "n_tokens", "n_truncated", "stages")
    first, second = (json.loads((d / "analysis.json").read_text()) for d in (one, other))
    assert {k: first[k] for k in kept} == {k: second[k] for k in kept}


@pytest.mark.slow
def test_two_processes_give_the_same_results_as_one(alone, tmp_path):
    done = launched(2, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = tmp_path / "out" / "testbed--llama"
    assert_same(alone, found)
    assert not (found / "work").exists()
    # Only the main process prints.
    assert done.stdout.count("boundary layer:") == 1
    assert done.stdout.count("figures:") == 1


@pytest.mark.slow
def test_two_processes_resume_the_run_of_one(alone, tmp_path):
    """A run with another number of processes is resumed: results do not depend on the split."""
    from internal_policy import analyze
    from internal_policy.analysis import pipeline

    real, calls = pipeline.reduce_responses, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    out = tmp_path / "out"
    pipeline.reduce_responses = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            analyze("testbed/llama", max_responses=18, batch_size=4, keep_tokens=6, output=out)
    finally:
        pipeline.reduce_responses = real
    assert len(list((out / "testbed--llama" / "work").glob("capture-*.npz"))) == 2
    done = launched(2, out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resuming an unfinished analysis") == 1
    assert_same(alone, out / "testbed--llama")
    again = launched(2, out)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("already complete") == 1
    assert_same(alone, out / "testbed--llama")


@pytest.mark.slow
def test_a_bad_directory_is_reported_in_every_process_without_hanging(alone, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(alone, out / "testbed--llama")
    done = launched(2, out, "--seed", "1")
    assert done.returncode != 0
    for line in ("error: ", "error (process 1): "):
        assert any(found.startswith(line) and "other settings" in found for found in done.stderr.splitlines()), line


@pytest.mark.slow
def test_more_processes_than_batches(alone, tmp_path):
    done = launched(2, tmp_path / "out", "--batch-size", "64")
    assert done.returncode == 0, done.stderr
    found = tmp_path / "out" / "testbed--llama"
    # Another batch size has other rounding, but the same responses.
    assert (alone / "responses.jsonl").read_bytes() == (found / "responses.jsonl").read_bytes()
