"""What the documents show of code: their blocks, which of them run, and the commands in them."""

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
# What may stand before a command without being a part of it: settings, and what starts several processes of it.
_STARTED = re.compile(r"(?:^|\s)internal-policy(?=\s|$)|-m internal_policy\.cli\b")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    language: str
    """What stands behind the fence."""
    code: str
    """Its lines, without those of the fence."""
    line: int
    """The line of the document that its first line is."""
    not_run: str | None
    """Why it cannot be run, where a comment before it says so: ``<!-- not run: needs a GPU -->``."""


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
    """Run blocks of a document one after another in one namespace and an empty directory, without a network."""
    lines = []
    for block in shown:
        # A line of the program is the same line of the document, so that a traceback names the place.
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    program = directory / f"{path.stem.replace('-', '_')}_blocks.py"
    program.write_text("\n".join(lines) + "\n", encoding="utf-8")
    work = directory / "work"
    work.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=work,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{path.relative_to(ROOT)}: {done.stderr[-3000:]}"


def command_lines(path):
    """The lines of the bash blocks of a document, with their numbers; a line that goes on is one line."""
    for block in blocks(path):
        if block.language != "bash":
            continue
        start, held = block.line, ""
        for number, line in enumerate(block.code.splitlines(), start=block.line):
            start = start if held else number
            held += line.removesuffix("\\")
            if not line.endswith("\\"):
                yield start, held
                held = ""


def own_arguments(line):
    """What a line gives to internal-policy, as a shell splits it; None where it starts something else."""
    if (found := _STARTED.search(line.partition(" #")[0])) is None or line.lstrip().startswith("#"):
        return None
    return shlex.split(line[found.end() :], comments=True)
