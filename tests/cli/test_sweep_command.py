"""Sweeps and studies on the command line: shell globs, refusals, and resuming after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from tiny import ragged_responses
from tiny_checkpoints import PROMPTS, STEPS, save_run, steps_of

from internal_policy import Analysis, models
from internal_policy.analysis import sweep as sweeps
from internal_policy.analysis.sweep_targets import list_targets
from internal_policy.cli import analyze as cli_analyze
from internal_policy.cli import main as cli


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "x")


def run_command(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of the command line, in this process."""
    monkeypatch.setattr(sys, "argv", ["internal-policy", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_code:
        cli.main()
    captured = capsys.readouterr()
    return exit_code.value.code or 0, captured.out, captured.err


def test_the_command_accepts_a_glob_expanded_by_the_shell(run, tmp_path, monkeypatch, capsys):
    swept = []
    monkeypatch.setattr(sweeps, "sweep", lambda start, **options: swept.append((start, options)) or [])
    monkeypatch.setattr(cli_analyze, "draw", lambda *arguments: None)
    monkeypatch.chdir(tmp_path)
    expanded = sorted(map(str, run.iterdir()))
    assert steps_of(expanded) == [10, 100, 5]
    command = ("analyze", "--checkpoints", *expanded, "--own-responses", "-m", "testbed/qwen3")
    assert run_command(monkeypatch, capsys, *command) == (0, "", "")
    ((start, options),) = swept
    assert (start, options["own_responses"]) == ("testbed/qwen3", True)
    assert steps_of(str(t) for t in list_targets(None, checkpoints=options["checkpoints"])) == list(STEPS)


@pytest.mark.slow
def test_a_sweep_ends_with_figures_and_tables(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ragged_responses(4)))
    command = ("analyze", "--responses", "r.jsonl", "--checkpoints", run, "-o", "out")
    code, out, err = run_command(monkeypatch, capsys, *command)
    assert code == 0, err
    assert [out.index(f"checkpoint-{step}:") for step in STEPS] == sorted(
        out.index(f"checkpoint-{step}:") for step in STEPS
    )
    figures = tmp_path / "out" / "figures" / "sweep-x--checkpoint-5--x--checkpoint-100"
    for name in ("fig2_entropy_flow.pdf", "compare_heat_maps.png", "compare_layer_lines.png", "trends.csv"):
        assert (figures / name).is_file()
    assert pd.read_csv(figures / "boundaries.csv")["step"].tolist() == [update / 5 for update in STEPS]
    # The directory of an analysis is accepted as its responses.
    given = ("--responses", "out/x--checkpoint-10", "-o", "again")
    code, _, err = run_command(monkeypatch, capsys, "analyze", "--checkpoints", run / "checkpoint-5", *given)
    assert code == 0, err
    assert Analysis.load("again").n_responses == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--revision", "r"], "--revision r was given without --model"),
        (["--revision", "r", "--revision", "s"], "--revision r was given without --model"),
        (["stray"], "unexpected extra argument (stray)"),
        (["--model", "m", "stray"], "unexpected extra argument (stray)"),
        (["--model", "testbed/qwen3", "--own-responses"], "--own-responses was given without a sweep"),
        (["--model", "a", "--model", "b", "--revision", "r", "--revision", "s"], "got 2 models in a sweep"),
        (["--checkpoints", "nowhere/checkpoint-*"], "nowhere/checkpoint-*: matches nothing"),
        (["--preset", "testbed", "--checkpoints", "x"], "both --preset and --checkpoints"),
        (["--preset", "testbed", "--template", "plain"], "both --preset and --template"),
        (["--preset", "testbed", "--own-responses"], "both --preset and --own-responses"),
        (["--checkpoints", ""], "--checkpoints is empty; name a training run's directory"),
        (["--model", "nobody/no-such-model", "--revision", ""], "--revision is empty; needed is a branch"),
        (["--model", "nobody/no-such-model", "--revision", "", "--revision", "r"], "--revision is empty"),
        (["--preset", "huge"], "--preset is 'huge'; needed is one of paper, small, testbed"),
        (["--preset", "testbed", "--seed", "-1"], "--seed is -1"),
    ],
)
def test_invalid_commands_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_command(monkeypatch, capsys, "analyze", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "nobody/no-such-model"],
        ["--model", "nobody/no-such-model", "--revision", "r", "--revision", "s"],
        ["--preset", "paper"],
    ],
)
def test_a_missing_ndif_key_is_reported_before_contacting_the_hub(tmp_path, monkeypatch, capsys, arguments):
    nnsight = pytest.importorskip("nnsight")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(nnsight.schema.config.CONFIG.API, "APIKEY", None)
    monkeypatch.setattr(models, "check", lambda *_, **__: pytest.fail("the hub was asked"))
    code, out, err = run_command(monkeypatch, capsys, "analyze", *arguments, "--backend", "nnsight", "--remote")
    assert (code, out) == (2, "")
    assert err.startswith("error: no key for NDIF")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_killed_in_the_second_checkpoint_and_resumed(run, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 10))

    def command(output):
        return [
            *(sys.executable, "-m", "internal_policy.cli", "analyze", "--checkpoints", f"{run}/checkpoint-*"),
            *("--prompts", "prompts.jsonl", "--batch-size", "2", "--max-new-tokens", "8", "-o", output),
        ]

    def start(output):
        return subprocess.Popen(command(output), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("uninterrupted").wait() == 0
    for step in STEPS[1:]:
        process = start("killed")
        mark = time.perf_counter()
        while process.poll() is None and not list(tmp_path.glob(f"killed/x--checkpoint-{step}/work/*.npz")):
            assert time.perf_counter() - mark < 120
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
        assert (tmp_path / "killed" / "x--checkpoint-5" / "analysis.json").is_file()
        assert not (tmp_path / "killed" / f"x--checkpoint-{step}" / "analysis.json").exists()
    assert start("killed").wait() == 0
    for step in STEPS:
        one, other = (Analysis.load(tmp_path / name / f"x--checkpoint-{step}") for name in ("uninterrupted", "killed"))
        pd.testing.assert_frame_equal(one.sequences, other.sequences, check_exact=True)
        pd.testing.assert_frame_equal(one.responses, other.responses, check_exact=True)
        assert one.selection == other.selection
