"""`internal-policy train` end to end: the files of a run, its figures, taking it up again, and rewards of one's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from test_cli_errors import run
from test_train_errors import command
from transformers import AutoModelForCausalLM

from internal_policy import analyze
from internal_policy.bupo import load_run

WORDS = [
    *("train", "--model", "testbed/qwen3", "--ipa-steps", "1", "--max-steps", "2", "--prompts-per-step", "2"),
    *("--num-generations", "4", "--mini-batches", "1", "--eval-problems", "4", "--dynamics-responses", "4"),
]
SHORT = [*WORDS, "--eval-samples", "0", "--dynamics-every", "0", "--max-completion-length", "8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command in a process of its own, and what it said."""
    place = tmp_path_factory.mktemp("place")
    return place, run(*WORDS, "--layer", "2", "--output", "out", cwd=place, code=0)


def test_a_run_from_end_to_end(finished):
    place, done = finished
    out = place / "out"
    # Nothing of the libraries' own reaches the terminal.
    assert done.stderr == ""
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    named = {"run.json", "run_settings.json", "history.csv", "dynamics.csv", "dynamics_layers.csv"}
    drawn = {"fig4_training", "fig5_alignment_qwen3-bupo-layer-2-1-step", "fig7_policy_entropy"}
    assert named | {f"figures/{stem}.{kind}" for stem in drawn for kind in ("pdf", "png")} <= files
    found = load_run(out)
    assert list(found.history["phase"]) == ["ipa", "grpo"]
    assert (found.method, found.layer, found.ipa_steps) == ("bupo", 2, 1)
    assert found.config["trainer"]["num_generations"] == 4
    assert found.evaluation.n_problems == found.evaluation_start.n_problems == 4
    assert AutoModelForCausalLM.from_pretrained(found.model_dir).config.num_hidden_layers == 8


def test_the_summary_has_the_numbers_of_the_run(finished):
    place, done = finished
    found = load_run(place / "out")
    said = " ".join(done.stdout.split())
    rewards = found.history["reward"]
    assert f"ipa 1-1 {rewards[0]:.3f} → {rewards[0]:.3f}" in said
    assert f"grpo 2-2 {rewards[1]:.3f} → {rewards[1]:.3f}" in said
    assert "layer 2: as it was asked for" in said
    avg = found.evaluation.avg
    assert f"trained {100 * avg['mean']:.2f} {100 * avg['low']:.2f} to {100 * avg['high']:.2f}" in said
    assert f"difference {100 * (avg['mean'] - found.evaluation_start.avg['mean']):+.2f}" in said
    assert "model: out/model/" in said
    assert "figures: out/figures/ (fig4_training.png" in said
    assert "failed" not in said


def test_the_same_command_again_says_complete(finished, monkeypatch, capsys):
    place, done = finished
    monkeypatch.chdir(place)
    before = (place / "out" / "run.json").read_bytes()
    code, out, err = command(monkeypatch, capsys, *WORDS, "--layer", "2", "--output", "out")
    assert (code, err) == (0, "out: already complete; nothing to train (--overwrite starts over)\n")
    assert out.splitlines()[0].strip() == done.stdout.splitlines()[0].strip()
    assert (place / "out" / "run.json").read_bytes() == before


def test_figures_are_redrawn_from_disk_without_torch(finished, tmp_path):
    place, _ = finished
    evaluation = next((place / "out" / "evaluations").glob("*/*"))
    code = (
        "import sys; from internal_policy import cli\n"
        "try:\n    cli.main()\nfinally:\n    print('loaded', *({'torch', 'transformers', 'trl'} & {*sys.modules}))"
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
    found = load_run(path)
    assert found.layer == manifest["boundary_layer"]
    assert found.layer_reason == manifest["selection"]["reason"]
    assert found.config["trainer"]["epsilon_high"] == 0.28
    assert (tmp_path / "figures" / path.name / "fig4_training.png").is_file()


def test_a_reward_of_the_users_own_and_a_switch_of_trls(tmp_path, monkeypatch, capsys):
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
    found = load_run(tmp_path / "out")
    assert (found.method, found.layer, found.label) == ("grpo", None, "GRPO")
    assert found.config["rewards"] == ["shorter"]
    assert found.config["trainer"]["mask_truncated_completions"] is True
    assert pd.Series(found.history["reward"]).between(0, 1).all()
    assert found.failures == {"crashes": 1, "timeouts": 0}
    assert "the reward failed on some responses, which count as 0: 1 crashes" in out
