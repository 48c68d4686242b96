"""Libraries are silent during a call of the package and restored afterwards; messages of the package are kept."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings

import datasets
import pytest
from documents import ROOT
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from internal_policy import UserError, analyze
from internal_policy.utils.logging import quiet_libraries

LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "transformers", "trl")


def state():
    """The affected state: log levels, progress bars, warning filters and environment."""
    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    bars = (
        transformers_logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
        not datasets.are_progress_bars_disabled(),
    )
    # Libraries set environment variables when they are first used.
    ours = {name: os.environ.get(name) for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY")}
    return levels, bars, list(warnings.filters), ours


def test_an_analysis_is_silent_and_restores_logging_state(capfd, recwarn):
    before = state()
    analyze("testbed/llama", max_responses=1, max_new_tokens=4)
    output = capfd.readouterr()
    assert (output.out, output.err) == ("", "")
    assert not list(recwarn)
    assert state() == before


@pytest.mark.parametrize("shown", [True, False])
def test_logging_settings_of_the_caller_are_restored_after_an_error(shown, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", shown)
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.INFO)
    hub_state = hub.are_progress_bars_disabled()
    before = state()
    inside = []

    @quiet_libraries()
    def fails():
        inside.append(state())
        raise UserError("stop")

    with pytest.raises(UserError):
        fails()
    ((levels, bars, _, environment),) = inside
    assert {*levels.values()} == {logging.ERROR}
    assert bars == (False, False, False)
    assert environment["TOKENIZERS_PARALLELISM"] == "false"
    assert state() == before
    assert hub.are_progress_bars_disabled() == hub_state


def test_a_library_imported_during_a_call_is_silenced_and_restored(monkeypatch):
    name, logger = "transformers.utils.logging", logging.getLogger("transformers")
    # A command that ran in this process before may have switched them off.
    hub.enable_progress_bars()
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    monkeypatch.delitem(sys.modules, name)
    with quiet_libraries():
        # As its import does.
        logger.setLevel(transformers_logging._get_default_logging_level())
        transformers_logging._tqdm_active = not hub.are_progress_bars_disabled()
        sys.modules[name] = transformers_logging
        assert logger.level == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
    assert logger.level == logging.WARNING
    assert transformers_logging.is_progress_bar_enabled()


def test_messages_of_the_package_and_the_caller_are_kept(caplog):
    def warn(module):
        return warnings.warn_explicit("gone in the next version", FutureWarning, "file.py", 1, module=module)

    with quiet_libraries():
        with pytest.warns(FutureWarning, match="next version"):
            warn("my_rewards")
        with pytest.warns(RuntimeWarning, match="overflow"):
            warnings.warn_explicit("overflow", RuntimeWarning, "file.py", 1, module="internal_policy.statistics")
        logging.getLogger("internal_policy.analysis.pipeline").warning("already complete")
        with warnings.catch_warnings(record=True) as caught:
            warn("transformers.training_args")
            warn("internal_policy.generation.sampling")
    assert caplog.messages == ["already complete"]
    assert not caught


def test_debug_logging_shows_the_libraries_and_each_stage(caplog):
    before = state()
    with caplog.at_level(logging.INFO, "internal_policy"), quiet_libraries():
        assert state() == before
    with caplog.at_level(logging.INFO, "internal_policy"):
        analyze("testbed/llama", max_responses=1, max_new_tokens=4)
    told = [message.partition(" testbed")[0] for message in caplog.messages]
    bars = [f"{name} responses: 0 of 1 done" for name in ("sampling", "analysing")]
    assert told == ["loading", "reading all weights of", *bars]


@pytest.mark.slow
def test_imports_and_training_are_silent_in_a_new_process(tmp_path):
    code = (
        "import internal_policy as ip\n"
        "run = ip.bupo.train(layer=7, ipa_steps=1, max_steps=2, prompts_per_step=2, num_generations=2, mini_batches=1, "
        "eval_samples=0, output='run')\n"
        "ip.evaluate(run.model_dir, 'testbed', samples=1, max_problems=1)\n"
        "from transformers.utils import logging\n"
        "assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.WARNING\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
