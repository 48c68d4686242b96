"""The real command line in a process of its own, and what it is given that cannot be loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import torch
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer

COMMAND = [sys.executable, "-m", "internal_policy.cli"]


def run(*arguments, cwd, code=2, **environment):
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


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
        "other shapes": {"intermediate_size": 40},
        "impossible config": {"hidden_size": "wide"},
        "unheard": {"model_type": "unheard-of", "architectures": ["UnheardForCausalLM"]},
    }.get(kind, {})
    (directory / "config.json").write_text(json.dumps(config) if kind != "broken config" else "{")
    if kind in {"a layer too many", "other shapes", "no tokenizer"}:
        shutil.copy(model_dir / "model.safetensors", directory)
    if kind != "no tokenizer":
        tiny_tokenizer().save_pretrained(directory)
