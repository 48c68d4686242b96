"""`internal-policy train` end to end: the files of a run, its figures, resuming, and custom rewards."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pandas as pd
import pytest
from command_line import run, run_subprocess
from training_calls import command
from transformers import AutoModelForCausalLM

from internal_policy import analyze
from internal_policy.bupo import Run
from internal_policy.report.reproduce import training_commands
from internal_policy.utils import result_format

WORDS = [
    *("train", "--model", "testbed/qwen3", "--ipa-steps", "1", "--max-steps", "2", "--prompts-per-step", "2"),
    *("--num-generations", "4", "--mini-batches", "1", "--eval-problems", "4", "--dynamics-responses", "4"),
]
SHORT = [*WORDS, "--eval-samples", "0", "--dynamics-every", "0", "--max-completion-length", "8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command in a subprocess, and its output."""
    place = tmp_path_factory.mktemp("place")
    return place, run(*WORDS, "--layer", "2", "--output", "out", cwd=place, code=0)


def test_a_run_from_end_to_end(finished):
    place, done = finished
    out = place / "out"
    # No output of the libraries reaches the terminal.
    # The line is printed only if the forked process had not loaded them.
    assert done.stderr in ("", "loading the libraries (torch, transformers)\n")
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    named = {"run.json", "run_settings.json", "history.csv", "dynamics.csv", "dynamics_layers.csv", "report.html"}
    drawn = {"fig4_training", "fig5_alignment_qwen3-bupo-layer-2-1-step", "fig7_policy_entropy"}
    assert named | {f"figures/{stem}.{kind}" for stem in drawn for kind in ("pdf", "png")} <= files
    found = Run.load(out)
    assert list(found.history["phase"]) == ["ipa", "grpo"]
    assert (found.method, found.layer, found.ipa_steps) == ("bupo", 2, 1)
    assert found.config["num_generations"] == 4
    assert found.evaluation.n_problems == found.evaluation_start.n_problems == 4
    assert AutoModelForCausalLM.from_pretrained(found.model_dir).config.num_hidden_layers == 8


def test_the_report_gives_the_command_again(finished):
    place, _ = finished
    words = shlex.split(training_commands(Run.load(place / "out")).shell)
    assert words[:2] == ["internal-policy", "train"]
    expected_options = {**dict(zip(WORDS[1::2], WORDS[2::2], strict=True)), "--layer": "2", "--output": "out"}
    assert dict(zip(words[2::2], words[3::2], strict=True)) == expected_options


def test_the_summary_has_the_numbers_of_the_run(finished):
    place, done = finished
    found = Run.load(place / "out")
    text = " ".join(done.stdout.split())
    rewards = found.history["reward"]
    assert f"ipa 1-1 {rewards[0]:.3f} → {rewards[0]:.3f}" in text
    assert f"grpo 2-2 {rewards[1]:.3f} → {rewards[1]:.3f}" in text
    assert "layer 2: as it was asked for" in text
    avg = found.evaluation.avg
    assert f"trained {100 * avg['mean']:.2f} {100 * avg['low']:.2f} to {100 * avg['high']:.2f}" in text
    assert f"difference {100 * (avg['mean'] - found.evaluation_start.avg['mean']):+.2f}" in text
    assert "model: out/model/" in text
    assert "figures: out/figures/ (fig4_training.png" in text
    assert "failed" not in text


@pytest.mark.slow
def test_the_same_command_again_says_complete(finished, monkeypatch, capsys):
    place, done = finished
    monkeypatch.chdir(place)
    before = (place / "out" / "run.json").read_bytes()
    if result_format._is_cpu("auto"):
        # Known from the call and its files, without a trainer.
        monkeypatch.setattr("internal_policy.bupo.training.train", None)
    code, out, err = command(monkeypatch, capsys, *WORDS, "--layer", "2", "--output", "out")
    assert (code, err) == (0, "out: already complete; nothing to train (--overwrite starts over)\n")
    assert out.splitlines()[0].strip() == done.stdout.splitlines()[0].strip()
    assert (place / "out" / "run.json").read_bytes() == before


@pytest.mark.slow
def test_figures_are_redrawn_from_disk_without_torch(finished, tmp_path):
    place, _ = finished
    evaluation = next((place / "out" / "evaluations").glob("*/*"))
    code = (
        "import sys; from internal_policy.cli.main import main\n"
        "try:\n    main()\nfinally:\n    print('loaded', *({'torch', 'transformers', 'trl'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "figures", str(place / "out"), str(evaluation), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.stdout.splitlines()[-1] == "loaded"
    runs, evaluations = tmp_path / "out", tmp_path / "--".join(p.name for p in (evaluation.parent, evaluation))
    assert {p.stem[:4] for p in runs.iterdir()} == {"fig4", "fig5", "fig7"}
    assert {p.stem.split("_")[0] for p in evaluations.iterdir()} == {"fig6", "fig15"}
    for path in runs.glob("*.png"):
        assert path.read_bytes() == (place / "out" / "figures" / path.name).read_bytes()


@pytest.mark.slow
def test_analyses_and_runs_are_drawn_together(finished, tmp_path, monkeypatch, capsys):
    place, _ = finished
    analyze("testbed/qwen3", max_responses=4, output=tmp_path / "analyses")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, "figures", "analyses", place / "out")
    assert (code, err) == (0, "")
    assert out.count("figures: ") == 2
    assert (tmp_path / "figures" / "testbed--qwen3" / "fig3_entropy_change.png").is_file()
    assert (tmp_path / "figures" / "out" / "fig4_training.png").is_file()

    code, out, err = command(
        monkeypatch, capsys, *SHORT, "--layer", "analyses/testbed--qwen3", "--set", "epsilon_high=0.28"
    )
    assert (code, err) == (0, "")
    (path,) = (tmp_path / "data" / "runs").iterdir()
    manifest = json.loads((tmp_path / "analyses" / "testbed--qwen3" / "analysis.json").read_text())
    found = Run.load(path)
    assert found.layer == manifest["boundary_layer"]
    assert found.layer_reason.startswith(manifest["selection"]["reason"])
    assert "; 4 prompts only: " in found.layer_reason
    assert found.config["epsilon_high"] == 0.28
    assert (tmp_path / "figures" / path.name / "fig4_training.png").is_file()


@pytest.mark.slow
def test_a_custom_reward_and_a_trl_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shortness.py").write_text(
        "calls = []\n"
        "def shorter(prompts, completions, answer, **_):\n"
        "    calls.append(len(completions))\n"
        "    # The second step as a whole, and then one of its samples.\n"
        "    if len(calls) in (2, 4): raise ValueError(calls)\n"
        "    return [1.0 / (1 + len(c)) for c in completions]\n"
    )
    arguments = [*SHORT, "--reward", "shortness:shorter", "--method", "grpo", "--output", "out"]
    arguments[arguments.index("--ipa-steps") + 1] = "0"
    code, out, err = command(monkeypatch, capsys, *arguments, "--set", "mask-truncated-completions=true")
    assert code == 0
    assert err.startswith("reward function 'shorter' fails on some samples, which count as 0; the first: ValueError: ")
    assert err.count("\n") == 1
    found = Run.load(tmp_path / "out")
    assert (found.method, found.layer, found.label) == ("grpo", None, "GRPO")
    assert found.config["rewards"] == ["shorter"]
    assert found.config["mask_truncated_completions"] is True
    assert pd.Series(found.history["reward"]).between(0, 1).all()
    assert found.failures == {"crashes": 1, "timeouts": 0}
    assert "the reward failed on some responses, which count as 0: 1 crashes" in out


BAD_ARGUMENTS = [
    (["--method", "dpo"], "--method is 'dpo'; needed is one of bupo, grpo, rloo, reinforce++, ppo"),
    (["--gamma", "0.9"], "gamma=0.9 with method='bupo'; only ppo has a critic"),
    (["--method", "ppo", "--gae-lambda", "2"], "gae_lambda is 2.0; needed is a number from 0 to 1"),
    (["--preset", "qwen9"], "--preset is 'qwen9'"),
    (["--aggregation", "sum"], "--aggregation is 'sum'"),
    (["--template", "qwen9"], "--template is 'qwen9'"),
    (["--dtype", "int8"], "--dtype is 'int8'"),
    (["--site", "mlp"], "--site is 'mlp'; needed is one of layer, attn, ffn"),
    (["--lens", "wide"], "--lens is 'wide'; needed is one of policy, logit-lens"),
    (["--ipa-steps", "5", "--max-steps", "4"], "ipa_steps is 5 and the run has 4 steps; needed is 0 to 4, or auto"),
    (["--ipa-steps", "-1"], "ipa_steps is -1 and the run has 60 steps; needed is 0 to 60, or auto"),
    (["--max-steps", "0"], "max_steps is 0; needed is at least 1"),
    (["--set", "beta"], "--set is 'beta'; needed is name=value"),
    (["--set", "=1"], "--set is '=1'; needed is name=value"),
    (["--set", "callbacks=[]"], "--set callbacks takes an object"),
    (["--max-steps", "4", "--set", "max_steps=5"], "max_steps was given twice"),
    (["--set", "epsilon=0.1", "--set", "epsilon=0.2"], "epsilon was given twice"),
    (["--set", "epsilonn=0.1"], "unknown option 'epsilonn'; did you mean epsilon?"),
    (["--set", "epsilon=low"], "epsilon is 'low'; needed is a number"),
    (["--layer", "9"], "layer is 9; needed is a layer of this model, 1 to 8"),
    (["--reward", "maths"], "reward 'maths' is unknown"),
    (["--prompts", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--no-such-option"], "no such option: --no-such-option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, "train", *arguments, "--output", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_command_in_a_subprocess(tmp_path):
    done = run_subprocess("train", "--ipa-steps", "9", "--max-steps", "4", "--output", "out", cwd=tmp_path)
    assert done.stdout == ""
    assert done.stderr == "error: ipa_steps is 9 and the run has 4 steps; needed is 0 to 4, or auto\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_breaks_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaking.py").write_text("def reward(prompts, completions, **_):\n    return [1.0]\n")
    arguments = ["--layer", "2", "--max-steps", "2", "--prompts-per-step", "2", "--eval-samples", "0"]
    code, out, err = command(monkeypatch, capsys, "train", *arguments, "--reward", "breaking:reward", "--output", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: reward function 'reward' returned 1 numbers; needed is a list of 16")
    assert not (tmp_path / "out" / "run.json").exists()


def test_results_without_figures(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text(json.dumps({"name": "x"}))
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("empty", "no finished analysis here, nor another result"),
        ("nowhere", "no finished analysis here, nor another result"),
        ("broken", "broken training run (KeyError: 'schema_version')"),
        ("unfinished", "holds a run that has not ended"),
    ):
        code, out, err = command(monkeypatch, capsys, "figures", name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not (tmp_path / "figures").exists()


def test_the_command_names_the_directory_by_the_layer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named = tmp_path / "data" / "runs" / "testbed--qwen3--bupo-l2-s1-seed0"
    named.mkdir(parents=True)
    (named / "thesis.tex").write_text("years of work")
    code, _, err = command(monkeypatch, capsys, "train", "--layer", "2", "--ipa-steps", "1", "--max-steps", "2")
    assert code == 2
    assert f"{named.relative_to(tmp_path)}: is in use for something else (it holds thesis.tex)" in err
