"""The real command line in a process of its own, and what it is given that cannot be loaded."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer

COMMAND = [sys.executable, "-m", "internal_policy.cli"]
SECONDS = 240


def run(*arguments, cwd, code=2, **environment):
    arguments = [str(argument) for argument in arguments]
    # A setting of the environment may count while libraries are imported, and so does --debug.
    alone = bool(environment) or "--debug" in arguments
    done = (_alone if alone else _Prepared.run)(arguments, cwd, {**os.environ, **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return done


def _alone(arguments, cwd, environment):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


class _Prepared:
    """Forks of one process that has imported what a command imports: as real as a new one, seconds earlier."""

    _process = None
    _environment: ClassVar[dict] = {}

    @classmethod
    def run(cls, arguments, cwd, environment):
        # pytest writes the test's name there, which no command reads.
        environment = {name: value for name, value in environment.items() if name != "PYTEST_CURRENT_TEST"}
        if cls._process is None:
            cls._environment = environment
            command = [sys.executable, Path(__file__).with_name("prepared_process.py")]
            cls._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            atexit.register(cls._process.stdin.close)
        if environment != cls._environment:
            return _alone(arguments, cwd, environment)
        with tempfile.TemporaryDirectory() as scratch:
            outputs = {name: str(Path(scratch) / name) for name in ("stdout", "stderr")}
            job = {"arguments": arguments, "cwd": str(cwd), **outputs}
            print(json.dumps(job), file=cls._process.stdin, flush=True)
            child = int(cls._answer())
            watch = threading.Timer(SECONDS, os.killpg, (child, signal.SIGKILL))
            watch.start()
            code = int(cls._answer())
            watch.cancel()
            written = {name: Path(path).read_text() for name, path in outputs.items()}
        return subprocess.CompletedProcess([*COMMAND, *arguments], code, **written)

    @classmethod
    def _answer(cls):
        line = cls._process.stdout.readline()
        assert line, f"the prepared process has ended with {cls._process.wait()}"
        return line


def refused(*arguments, cwd, began=False):
    """The one line that a refused command prints; nothing is left behind, unless the work had begun."""
    done = run(*arguments, cwd=cwd)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not list(cwd.rglob("analysis.json"))
    assert not list(cwd.rglob("*.tmp"))
    assert began or not list(cwd.rglob("work"))
    return lines[0]


def save(model, directory, tokenizer=None):
    model.save_pretrained(directory)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory


def make_unloadable(kind, directory, model_dir):
    directory.mkdir()
    if kind == "family":
        # Its modules add the residual stream themselves, so that no write can be seen.
        save(tiny_model("bloom"), directory)
        return
    config = json.loads((model_dir / "config.json").read_text())
    weights = {"w": torch.zeros(1)}
    if kind == "no weights":
        pass
    elif kind == "no config":
        save_file(weights, directory / "model.safetensors")
        return
    elif kind == "pickle":
        torch.save(weights, directory / "pytorch_model.bin")
    else:
        save_file(weights, directory / "model.safetensors")
    if kind == "broken weights":
        (directory / "model.safetensors").write_bytes(b"not safetensors")
    config |= {
        "encoder": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "encoder-decoder": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        "a layer too many": {"num_hidden_layers": 2},
        "a million layers": {"num_hidden_layers": 10**11},
        "other shapes": {"intermediate_size": 40},
        "impossible config": {"hidden_size": "wide"},
        "unheard": {"model_type": "unheard-of", "architectures": ["UnheardForCausalLM"]},
    }.get(kind, {})
    (directory / "config.json").write_text(json.dumps(config) if kind != "broken config" else "{")
    if kind in {"a layer too many", "other shapes", "no tokenizer"}:
        shutil.copy(model_dir / "model.safetensors", directory)
    if kind != "no tokenizer":
        tiny_tokenizer().save_pretrained(directory)
