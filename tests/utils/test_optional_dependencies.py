"""With a base installation every command runs, or names the missing extra in one line before anything is loaded."""

from __future__ import annotations

import pytest
from base_installation import EACH, run_base
from documents import ROOT

NEEDS = {
    "train --model testbed/qwen3": ("training", "trl", "train"),
    "evaluate --model testbed/qwen3 --reward math": ("the reward math", "math-verify", "train"),
    "analyze --backend nnsight": ("--backend nnsight", "nnsight", "backends"),
    "analyze --preset testbed --quantization 8bit": ("--quantization 8bit", "bitsandbytes", "quantized"),
    "inspect --model testbed/qwen3 --prompt 1 --backend transformer-lens": ("", "transformer-lens", "backends"),
}


def test_a_command_names_the_extra_that_it_needs(tmp_path):
    done = run_base(EACH, *NEEDS, cwd=tmp_path)
    for part, (what, package, extra) in zip(done.stderr.split("# ")[1:], NEEDS.values(), strict=True):
        _, line, end = part.splitlines()
        assert line.startswith(f"error: {what}")
        needed = f"needs the package {package}, which is not installed; in a clone: pip install -e '.[{extra}]'"
        assert line.endswith(needed)
        # The exit code, and no library that was loaded.
        assert end == "2"
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_python_names_the_extra_that_it_needs(tmp_path):
    code = """
from internal_policy import UserError, bupo
from internal_policy.rewards.functions import as_rewards
train = lambda: bupo.train("testbed/qwen3", max_steps=1)
for do in (train, lambda: bupo.BuPOTrainer, lambda: as_rewards("math", exact=True)):
    try:
        do()
    except UserError as error:
        print(error)
print(bupo.Run.__name__, len(as_rewards("exact", exact=True)))
"""
    done = run_base(code, cwd=tmp_path)
    *errors, last = done.stdout.splitlines()
    assert (len(errors), last) == (3, "Run 1"), done.stderr
    assert all(error.endswith("which is not installed; in a clone: pip install -e '.[train]'") for error in errors)
    assert not list(tmp_path.iterdir())


EACH_LINE = """
import shlex, sys
from internal_policy.cli.main import main
for line in sys.argv[1:]:
    sys.argv[1:] = shlex.split(line)
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
"""


@pytest.mark.slow
def test_commands_without_extras_run(tmp_path):
    run = ROOT / "data" / "experiments" / "runs" / "qwen3-bupo-l7-s12-lr0.0001-t120-seed0"
    lines = (
        "analyze --model testbed/qwen3 --model testbed/llama --max-responses 3 --output out",
        "inspect --model testbed/qwen3 --prompt a=22,b=a-3;b? --max-new-tokens 2 --output looks",
        "evaluate --model testbed/qwen3 --max-problems 3 --samples 1 --output evaluations",
        "compare out/testbed--qwen3 out/testbed--llama --output out",
        f"figures out/testbed--qwen3 evaluations looks {run} --output figures",
        "report out/testbed--qwen3",
        "models",
    )
    done = run_base(EACH_LINE, *lines, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
