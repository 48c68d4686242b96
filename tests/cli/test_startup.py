"""Start-up of commands: the loading message, or an error for missing inputs, before libraries are loaded."""

from __future__ import annotations

import torch  # noqa: F401  (there already)
from base_installation import EACH, run_base
from documents import ROOT

from internal_policy.utils.logging import importing

LINE = "loading the libraries (torch, transformers)"
MISSING = {
    "analyze --model ./nowhere": "./nowhere: no such directory",
    "analyze --model testbed/qwen4": "no testbed model is called 'testbed/qwen4'",
    "analyze --prompts none.jsonl": "none.jsonl: no such file",
    "analyze --responses none.json": "none.json: no such file",
    "analyze --preset testbed --prompts none.jsonl": "none.jsonl: no such file",
    "analyze --model ./nowhere --checkpoints .": "./nowhere: no such directory",
    "train --model ./nowhere": "./nowhere: no such directory",
    "train --prompts none.parquet": "none.parquet: no such file",
    "train --benchmark none.json": "none.json: no such file",
    "train --layer ./nowhere": "layer is './nowhere'; needed is a number from 1, auto",
    "evaluate --model ./nowhere --benchmark testbed": "./nowhere: no such directory",
    "evaluate --model testbed/qwen3 --benchmark none.jsonl": "none.jsonl: no such file",
    "inspect --model ./nowhere --prompt 1": "./nowhere: no such directory",
    "transfer --model ./nowhere": "./nowhere: no such directory",
    "transfer --prompts none.jsonl": "none.jsonl: no such file",
    "transfer --layers 0": "--layers is '0'; needed is all, or numbers from 1",
    "transfer --temperature 0": "--temperature is 0.0; needed is a number above 0",
}


def first_lines(commands, cwd, absent):
    """Standard error of each command, all in one fresh process."""
    return [part.splitlines()[1:] for part in run_base(EACH, *commands, cwd=cwd, absent=absent).stderr.split("# ")[1:]]


def test_missing_inputs_are_reported_before_libraries_are_loaded(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "config.json").write_text("{}")
    outputs = first_lines(MISSING, tmp_path, absent="")
    assert [end for _, end in outputs] == ["2"] * len(MISSING)
    for (line, _), wanted in zip(outputs, MISSING.values(), strict=True):
        assert line.startswith("error: ")
        assert wanted in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_the_loading_message_is_printed_before_libraries_are_loaded(tmp_path):
    commands = [
        "analyze",
        "analyze --preset testbed",
        f"analyze --checkpoints {ROOT / 'data/testbed/qwen3'}",
        "evaluate --model testbed/qwen3",
        "inspect --model testbed/qwen3 --prompt 1",
        "train",
        "transfer",
    ]
    outputs = first_lines(commands, tmp_path, absent="torch,transformers")
    assert [line for line, _ in outputs] == [LINE] * len(commands)
    for quiet in ("--quiet", "--json"):
        outputs += first_lines([f"analyze {quiet}"], tmp_path, absent="torch,transformers")
    # The order of the imports determines which of the two is reported.
    assert all(lines[-1].startswith("No module named ") for lines in outputs)
    assert len(outputs[-1]) == 1


def test_no_loading_message_if_libraries_are_loaded(capsys):
    with importing():
        pass
    assert capsys.readouterr() == ("", "")
