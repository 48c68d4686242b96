"""Code blocks and commands in the documents, and which of them the tests run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$", flags=re.S | re.M)
_MARKER = re.compile(r"<!-- not run: (.*?) -->\s*\Z")
# Allowed before a command: environment variables and launchers.
_STARTED = re.compile(r"(?:^|\s)internal-policy(?=\s|$)|-m internal_policy\.cli\b")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    """The language after the opening fence."""
    code: str
    """Its lines, without those of the fence."""
    line: int
    """The line number of its first line in the document."""
    not_run: str | None
    """Why it cannot be run, if a comment before it says so: ``<!-- not run: needs a GPU -->``."""


def blocks(path):
    """The fenced blocks of a document, in order."""
    text = path.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        before = text[: fence.start()]
        marker = _MARKER.search(before)
        code = re.sub(f"^{fence['indent']}", "", fence["code"], flags=re.M)
        line = before.count("\n") + 2
        found.append(Block(fence["language"].strip(), code, line, marker[1].strip() if marker else None))
    return found


def python_blocks(path):
    """The Python blocks of a document that can run."""
    return [block for block in blocks(path) if block.language == "python" and block.not_run is None]


def run_python(path, shown, directory, timeout):
    """Run Python blocks of a document one after another in one namespace and an empty directory, without a network."""
    work = directory / "work"
    work.mkdir()
    run_blocks(path, shown, directory, work, timeout)


def run_blocks(path, shown, scratch, work, timeout):
    """Run blocks of a document in their order, as a reader does: Python in one namespace, commands by bash."""
    # Line numbers of the program equal those of the document, so that tracebacks point to the document.
    lines = ["from documents import run_in_bash as bash"]
    for block in shown:
        if block.language == "python":
            lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
        for number, line in bash_lines(block) if block.language == "bash" else ():
            if reason_not_run(line) is None:
                lines += [""] * (number - 1 - len(lines)) + [f"bash({line!r})"]
    program = scratch / f"{path.stem.replace('-', '_')}_blocks.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = scratch / "internal-policy"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m internal_policy.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "Agg"}
    places = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PATH": f"{scratch}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=work,
        env={**environment, **places},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{path.relative_to(ROOT)}: {done.stderr[-3000:]}"


def run_in_bash(line):
    """Run one command of a document; one that takes minutes with fewer steps, problems, samples or responses."""
    subprocess.run(["bash", "-c", shortened(line)], check=True, stdout=subprocess.DEVNULL)


def shortened(line):
    """A command of a document with the numbers of ``_FEW`` in place of its own and of the defaults."""
    for option, number in _FEW.get((command_arguments(line) or [""])[0], {}).items():
        line = re.sub(rf" {option} \d+", "", line.partition(" #")[0]) + f" {option} {number}"
    return line


_FEW = {
    "train": {"--max-steps": 6},
    "evaluate": {"--samples": 2, "--max-problems": 8},
    "ablate": {"--max-responses": 16},
    "transfer": {"--max-prompts": 16},
}
_WHY_NOT = {
    r"^(?:make|pip|source|export|python3? -m venv|\S+/bin/pip) ": "makes the reader's environment",
    r"^\.venv-harness/": "needs an environment of its own; tests/project/test_harness.py runs the local task",
    r"^python ": "takes minutes; tests/benchmarks/test_benchmarks.py and the demo run it",
    r"^(?:accelerate|torchrun) ": "needs several GPUs or processes",
    r"--remote|--generator vllm| push ": "needs the network or a GPU",
    r"--preset (?:paper|small|qwen)|--benchmark math500": "needs the hub",
    r"(?:--model|--prompts) (?!testbed/)[A-Za-z][\w.-]*/[\w.-]+": "needs the hub",
    r"\./(?:my|other)-|--(?:checkpoints|model) '?runs/|data/analyses/(?:NAME|Qwen--)": "reads what is the reader's own",
    r"data/runs/my-": "reads what is the reader's own",
}


def reason_not_run(line):
    """Why the tests do not run a command of a document; None if they do."""
    if command_arguments(line) is None and not line.partition("#")[0].strip():
        return "a comment"
    return next((why for pattern, why in _WHY_NOT.items() if re.search(pattern, line.partition(" #")[0])), None)


def command_lines(path):
    """The lines of the bash blocks of a document, with their numbers; continued lines are joined."""
    for block in blocks(path):
        if block.language == "bash":
            yield from bash_lines(block)


def bash_lines(block):
    """The lines of a bash block with their numbers; continued lines are joined."""
    start, held = block.line, ""
    for number, line in enumerate(block.code.splitlines(), start=block.line):
        start = start if held else number
        held += line.removesuffix("\\")
        if not line.endswith("\\"):
            yield start, held
            held = ""


def command_arguments(line):
    """The arguments of an internal-policy command, split as by a shell; None for other commands."""
    if (found := _STARTED.search(line.partition(" #")[0])) is None or line.lstrip().startswith("#"):
        return None
    return shlex.split(line[found.end() :], comments=True)
