"""Runs of the command line in this process or a subprocess, and models that cannot be loaded."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys

import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer

from internal_policy.cli.main import main

COMMAND = [sys.executable, "-m", "internal_policy.cli"]


def run(*arguments, cwd, code=2):
    """Run a command in this process; returns its exit code and output."""
    out, err = io.StringIO(), io.StringIO()
    words = ["internal-policy", *map(str, arguments)]
    before, sys.argv = sys.argv, words
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        ended = end.code or 0
    finally:
        sys.argv = before
    done = subprocess.CompletedProcess(words, ended, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    return done


def run_subprocess(*arguments, cwd, code=2, **environment):
    """Run a command in a subprocess with these environment variables."""
    words = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def refused(*arguments, cwd, began=False):
    """Run a command that must fail; returns its one-line error. No files may remain unless the work had begun."""
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
        # Its modules add the residual stream themselves, so their writes cannot be observed.
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
