"""The output of commands: tables, one JSON document or nothing; colours and shell completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from command_line import run_subprocess
from documents import ROOT
from saved_results import save_one_of_each
from training_calls import command

import internal_policy
from internal_policy import Analysis, AnalysisComparison, AnalyzeConfig, UserError, compare
from internal_policy.bupo import Run
from internal_policy.cli import completion, display, main
from internal_policy.comparison.results import TABLES
from internal_policy.plotting import analysis as figures
from internal_policy.plotting import comparison as comparison_figures
from internal_policy.utils import output as output
from internal_policy.utils.logging import progress, status


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_one_of_each(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def comparison(place):
    return compare(place / "analyses")


def run_json(monkeypatch, capsys, *arguments):
    """The one JSON document on standard output."""
    code, out, err = command(monkeypatch, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def skip_drawing(monkeypatch):
    """Drawing takes most of the time, and is tested elsewhere."""
    for module, name in ((comparison_figures, "save_comparison_figures"), (figures, "save_analysis_figures")):
        monkeypatch.setattr(module, name, lambda results, directory: [directory / "figure.png"])
    monkeypatch.setattr("internal_policy.report.write_report", lambda thing, place=None: place / "report.html")


def test_json_output_is_one_document_listing_the_written_files(place, tmp_path, monkeypatch, capsys, skip_drawing):
    found = run_json(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path)
    assert found["command"] == "compare"
    assert set(found["tables"]) == set(TABLES)
    assert found["tables"]["trends"] == []
    written = [Path(path) for path in found["files"]["comparison"]]
    assert {p.name for p in written} == {p.name for p in Path(found["path"]).iterdir()}
    assert all(p.is_file() for p in written)
    (Path(found["path"]) / "report.html").touch()
    assert run_json(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path)["files"] == found["files"]
    found = run_json(monkeypatch, capsys, "figures", place / "analyses" / "NA", "-o", tmp_path)
    assert found == {"command": "figures", "files": {"figures": [str(tmp_path / "NA" / "figure.png")]}}


def test_json_of_an_analysis_has_the_target_layer_and_its_confidence(tmp_path, monkeypatch, capsys, skip_drawing):
    words = ("--max-responses", "2", "--max-new-tokens", "4", "-o", tmp_path)
    found = run_json(monkeypatch, capsys, "analyze", *words)
    (analysis,) = found["analyses"]
    # The default model is that of AnalyzeConfig and of train.
    assert analysis["name"] == AnalyzeConfig().model == "testbed/qwen3"
    loaded = Analysis.load(analysis["path"])
    assert analysis["boundary_layer"] == loaded.boundary_layer
    assert analysis["selection"]["confidence"] == loaded.selection.confidence
    assert analysis["stages"] == list(loaded.stages)
    assert analysis["length_share"] == pytest.approx(loaded.length_share)
    assert analysis["boundary_layer_by_direction"] == loaded.selection.sensitivity["direction"]
    assert set(found["files"]) == {"analysis", "figures", "report"}
    # The page of the first run already exists now and is still listed.
    (tmp_path / "testbed--qwen3" / "report.html").touch()
    assert run_json(monkeypatch, capsys, "analyze", *words, "--quiet")["files"] == found["files"]
    found = run_json(monkeypatch, capsys, "models")
    assert set(found) == {"command", "families", "files"}
    assert found["families"]["llama"]["layers"] == "model.layers"


@pytest.mark.slow
def test_progress_messages_go_to_standard_error(tmp_path, monkeypatch, capsys, skip_drawing):
    words = ("--model", "testbed/llama", "--max-responses", "2", "--max-new-tokens", "4", "-o", tmp_path)
    (analysis,) = run_json(monkeypatch, capsys, "analyze", *words)["analyses"]
    code, out, err = command(monkeypatch, capsys, "analyze", *words, "--json")
    assert (code, json.loads(out)["analyses"][0]["path"]) == (0, analysis["path"])
    assert err.endswith("already complete; nothing to do (--overwrite starts over)\n")
    assert command(monkeypatch, capsys, "analyze", *words, "--quiet") == (0, "", "")


@pytest.mark.slow
def test_json_of_the_commands_that_need_a_model(tmp_path, monkeypatch, capsys):
    words = ("--prompt", "a=3;a?", "--max-new-tokens", "2", "-o", tmp_path / "i")
    found = run_json(monkeypatch, capsys, "inspect", "-m", "testbed/llama", *words)
    assert found["inspection"]["n_tokens"] == len({row["position"] for row in found["values"]})
    words = ("--max-problems", "2", "--samples", "2", "-o", tmp_path / "e")
    found = run_json(monkeypatch, capsys, "evaluate", "-m", "testbed/llama", "-m", "testbed/qwen3", *words)
    assert [e["name"] for e in found["evaluations"]] == ["testbed/llama", "testbed/qwen3"]
    assert found["comparisons"][0]["n_problems"] == 2
    words = ("--layer", "2", "--ipa-steps", "1", "--max-steps", "2", "--prompts-per-step", "2", "--mini-batches", "1")
    more = ("--num-generations", "4", "--eval-problems", "2", "--max-completion-length", "8", "-o", tmp_path / "r")
    found = run_json(monkeypatch, capsys, "train", *words, *more)
    assert found["run"]["layer"] == 2
    assert found["run"]["evaluations"]["trained"]["avg"]["mean"] == Run.load(tmp_path / "r").evaluation.avg["mean"]


def test_quiet_still_writes_files(place, tmp_path, monkeypatch, capsys, skip_drawing):
    before = sys.stdout
    assert command(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path, "-q") == (0, "", "")
    assert AnalysisComparison.load(tmp_path).labels == ("007", "NA")
    assert sys.stdout is before
    assert not output.is_quiet()
    _, out, _ = command(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path)
    assert "2 analyses, lens policy" in " ".join(out.split())


@pytest.mark.parametrize("word", ["figures", "report", "compare"])
def test_a_pattern_without_matches_is_reported_before_drawing(word, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    line = "error: data/runs/*: nothing matches this pattern; leave it out, or name what is there\n"
    assert command(monkeypatch, capsys, word, "analyses", "data/runs/*") == (2, "", line)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_an_error_is_one_line_in_every_output_mode(tmp_path, monkeypatch, capsys, option):
    code, out, err = command(monkeypatch, capsys, "compare", tmp_path / "nowhere", option)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    code, out, err = command(monkeypatch, capsys, "compare", tmp_path / "nowhere", option, "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ["analyze", "--json", "--max-responses", "x"],
        ["compare", "-q"],
        ["models", "--json", "extra"],
        ["analyze", "--json", "stray"],
        ["compare", "nowhere", "--json", "-q"],
    ],
    ids=" ".join,
)
def test_after_an_error_a_session_prints_again(words, capsys):
    before = sys.stdout
    with pytest.raises(UserError):
        main.run(words)
    assert sys.stdout is before
    assert not output.is_quiet()


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_help_is_printed_in_every_output_mode(monkeypatch, capsys, option):
    code, out, _ = command(monkeypatch, capsys, "compare", option, "--help")
    assert code == 0
    assert "Compare two or more analyses" in out


NOISE = """
import ctypes, os, subprocess, sys
from internal_policy.utils import output

def noise(by):
    print(f"print {by}")
    print(f"sys {by}", file=sys.__stdout__)
    os.write(1, f"descriptor {by}\\n".encode())
    subprocess.run(["echo", f"child {by}"], check=True)
    # Into C's buffer, which is written when it is full or the process ends.
    ctypes.CDLL(None).puts(f"compiled {by}".encode())

print("before")
with output.output_mode(json="json" in sys.argv, quiet="quiet" in sys.argv):
    noise("meanwhile")
    output.print_json({"a": 1})
    noise("later")
print("after")
"""


@pytest.mark.skipif(os.name == "nt", reason="takes C's puts from the process itself; run it on Linux or macOS")
def test_only_the_document_is_on_standard_output():
    # The buffers must be flushed in time.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    def run_with(*words):
        command = [sys.executable, "-c", NOISE, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, set(done.stderr.split("\n")) - {""}

    document = json.dumps({"a": 1, "files": {}}, indent=2)
    beside = {f"{who} {by}" for who in ("sys", "descriptor", "child", "compiled") for by in ("meanwhile", "later")}
    assert run_with("json") == (f"before\n{document}\nafter\n", beside)
    assert run_with("json", "quiet") == (f"before\n{document}\nafter\n", set())
    assert run_with("quiet") == ("before\nafter\n", set())


@pytest.mark.slow
def test_a_reward_that_prints_does_not_spoil_the_document(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import os, subprocess\n\n\ndef reward(prompts, completions, **columns):\n"
        "    subprocess.run(['echo', 'from a child'], check=True)\n    os.write(1, b'from here')\n"
        "    return [float(i % 2) for i, _ in enumerate(completions)]\n"
    )
    small = ("--layer", "2", "--ipa-steps", "1", "--max-steps", "1", "--prompts-per-step", "2", "--mini-batches", "1")
    more = ("--num-generations", "2", "--eval-samples", "0", "--max-completion-length", "4", "--dynamics-every", "0")
    words = ("train", "--reward", "loud:reward", *small, *more, "-o", "run", "--json")
    done = run_subprocess(*words, cwd=tmp_path, code=0, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert json.loads(done.stdout)["run"]["layer"] == 2
    assert "from a child" in done.stderr


def test_non_finite_values_become_null():
    odd = {"a": float("nan"), "b": [float("inf"), pd.NA], "c": Path("x"), "t": pd.DataFrame({"n": [1.5, None]})}
    assert output.to_plain(odd) == {"a": None, "b": [None, None], "c": "x", "t": [{"n": 1.5}, {"n": None}]}


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_no_control_characters_without_a_terminal(comparison, monkeypatch, capsys, environment, coloured):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    display.show_comparison(comparison)
    with progress("x", 2) as advance, status("y"):
        advance(1)
    run_json = capsys.readouterr()
    assert ("\x1b[33m" in run_json.out) == coloured
    assert ("\x1b" in run_json.out) == ("FORCE_COLOR" in environment)
    # An animated progress bar would clutter a log, with or without colours.
    assert run_json.err == ""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("an", ["analyze"]),
        ("analyze --max-r", ["--max-responses"]),
        ("analyze --model te", ["testbed/qwen3", "testbed/llama"]),
        ("evaluate -m testbed/qwen3 --benchmark aime", ["aime24", "aime25"]),
        ("inspect --site ", ["layer", "attn", "ffn"]),
        ("train --preset q", ["qwen", "qwen3-8b"]),
        ("train --device-m", []),
        ("figures data/", []),
        ("nothing --mo", []),
    ],
)
def test_commands_options_and_values_are_completed(words, found):
    *before, word = words.split(" ")
    assert completion.candidates(before, word) == found


BASH = """
internal-policy() { "$PYTHON" -m internal_policy.cli "$@"; }
eval "$(internal-policy --show-completion bash)"
COMP_WORDS=(internal-policy analyze --lens "") COMP_CWORD=3
_internal_policy
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="asks bash for a completion; run it where there is a bash")
def test_bash_completes_an_empty_word():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", BASH], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "policy logit-lens unit-norm\n"


def test_completion_is_for_the_named_shell(tmp_path, monkeypatch, capsys):
    main.run(["--show-completion", "zsh"])
    assert "#compdef internal-policy" in capsys.readouterr().out
    monkeypatch.setenv("SHELL", "/bin/fish")
    main.run(["--show-completion"])
    assert "complete -c internal-policy" in capsys.readouterr().out
    with pytest.raises(UserError, match="the shell is 'csh'; needed is one of bash, zsh, fish, powershell, pwsh"):
        main.run(["--show-completion", "csh"])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".bashrc").write_text("alias ll='ls -l'\n")
    for _ in range(2):
        main.run(["--install-completion", "bash"])
    script = tmp_path / ".bash_completions" / "internal-policy.sh"
    assert (tmp_path / ".bashrc").read_text() == f"alias ll='ls -l'\nsource '{script}'\n"
    assert "complete -o default" in script.read_text()


def test_the_shells_own_files_are_appended_to_and_never_rewritten(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    # A file in another encoding, behind a link, that only its owner may read, and whose last line has no end.
    real = tmp_path / "dotfiles" / "bashrc"
    real.parent.mkdir()
    real.write_bytes(b"alias caf\xe9=ls  \n\n# last")
    real.chmod(0o600)
    (tmp_path / ".bashrc").symlink_to(real)
    for _ in range(2):
        main.run(["--install-completion", "bash"])
    script = tmp_path / ".bash_completions" / "internal-policy.sh"
    assert real.read_bytes() == b"alias caf\xe9=ls  \n\n# last\n" + f"source '{script}'\n".encode()
    assert (tmp_path / ".bashrc").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("shell", "message"),
    [(None, "No such file"), ("exit 3", "exit status 3"), ("true", "it printed nothing"), (r"printf '\377'", "decode")],
)
def test_a_shell_that_does_not_name_its_profile_is_reported_in_one_line(tmp_path, monkeypatch, shell, message):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if shell is not None:
        (tmp_path / "pwsh").write_text(f"#!/bin/sh\n{shell}\n")
        (tmp_path / "pwsh").chmod(0o755)
    with pytest.raises(UserError, match="pwsh did not say where its profile is") as caught:
        main.run(["--install-completion", "pwsh"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_in_utf_16_is_refused(tmp_path, monkeypatch):
    profile = tmp_path / "profile.ps1"
    profile.write_text("one", encoding="utf-16")
    before = profile.read_bytes()
    monkeypatch.setattr(completion, "_find_profile", lambda shell: profile)
    with pytest.raises(UserError, match="is in UTF-16; needed is UTF-8"):
        main.run(["--install-completion", "pwsh"])
    assert profile.read_bytes() == before


def test_hub_settings_of_the_user_are_kept():
    sources = "\n".join(p.read_text() for p in Path(internal_policy.__file__).parent.rglob("*.py"))
    assert not any(f"{word}=" in sources for word in ("cache_dir", "local_files_only", "HF_HOME", "HF_HUB_CACHE"))
