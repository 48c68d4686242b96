"""Calls of `bupo.train` and of the command line in this process, and checks of refused calls."""

from __future__ import annotations

import logging
import sys

import pytest

from internal_policy import UserError, bupo
from internal_policy.cli import main as cli

MODEL = "testbed/qwen3"
LAYERS = 8
SMALL = {
    "layer": 2,
    "ipa_steps": 1,
    "max_steps": 2,
    "prompts_per_step": 2,
    "num_generations": 4,
    "mini_batches": 1,
    "eval_samples": 0,
    "dynamics_every": 0,
    "max_completion_length": 8,
}


def read_files(directory):
    if not directory.is_dir():
        return directory.read_bytes() if directory.exists() else None
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def refused(output, model=MODEL, began=False, **options):
    """The message of a refused call; its output directory must be unchanged."""
    before = read_files(output)
    with pytest.raises(UserError) as info:
        bupo.train(model, output=output, **{**SMALL, **options})
    message = str(info.value)
    assert "\n" not in message
    assert began or read_files(output) == before
    return message


def command(monkeypatch, capsys, *arguments):
    """The command line in this process: exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["internal-policy", *map(str, arguments)])
    logger = logging.getLogger("internal_policy")
    handlers = list(logger.handlers)
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        logger.handlers = handlers
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err
