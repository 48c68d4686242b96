"""Options as fields of dataclasses: as keywords of functions, with their checks, and as words of a command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from inspect import Parameter, getdoc, signature
from pathlib import Path

import numpy as np
import pytest

from internal_policy import AnalyzeConfig, UserError, analyze, bupo, evaluate, inspect, study, sweep
from internal_policy.bupo.config import TrainConfig
from internal_policy.cli.compare import CompareCommand
from internal_policy.cli.parser import parse
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.inspection.config import InspectConfig
from internal_policy.utils.options import check_options, command_line_of, option, options_of, words_of

OF_ONE_MODEL = {"revision", "template"}


def entries(function):
    """The entries of the docstring's Args section by name."""
    arguments = getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    found = {}
    for line in arguments.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, found_text = line.strip().partition(": ")
            found[name] = found_text
        else:
            found[name] += " " + line.strip()
    return found


@pytest.mark.parametrize(
    ("function", "config", "lacks"),
    [
        (analyze, AnalyzeConfig, set()),
        (sweep, AnalyzeConfig, {"revision"}),
        (study, AnalyzeConfig, {"model", "responses", *OF_ONE_MODEL}),
        (evaluate, EvaluateConfig, set()),
        (inspect, InspectConfig, set()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_function_shows_its_options_with_their_defaults(function, config, lacks):
    parameters, documented = signature(function).parameters, entries(function)
    assert list(documented) == list(parameters)
    assert "options" not in parameters
    own = {"model", "tokenizer", "prompts", "responses", "benchmark", "prompt", "reward"}
    for field in fields(config):
        if field.name not in {*own, *lacks}:
            assert parameters[field.name].default == field.default
            assert parameters[field.name].kind is Parameter.KEYWORD_ONLY
    assert not lacks & parameters.keys()
    assert documented["seed"] == "Seed of all random numbers."
    # An evaluation has no entropies.
    assert documented["temperature"].endswith("always those of temperature 1.") == (function is not evaluate)


def test_training_signature_shows_its_options_and_accepts_those_of_trl():
    parameters, documented = signature(bupo.train).parameters, entries(bupo.train)
    assert [name.strip("*") for name in documented] == list(parameters)
    assert {f.name for f in fields(TrainConfig)} - {"trl_options"} <= parameters.keys()
    assert parameters["num_generations"].default == TrainConfig.num_generations
    assert documented["freeze_layers"].startswith("Layers 1..n")
    assert parameters["options"].kind is Parameter.VAR_KEYWORD
    assert "trl.GRPOConfig" in documented["**options"]


def test_a_sweep_refuses_revision_and_names_the_right_option():
    with pytest.raises(UserError, match="needed is revisions="):
        sweep("org/model", revisions=["a", "b"], revision="c")


@dataclass(frozen=True)
class Settings:
    """Some settings."""

    size: int = option(3, least=1)
    """How large."""
    rate: float | None = None
    """How fast,
    in all."""
    kind: str = option("a", choices=("a", "b"))
    names: tuple[str, ...] = ()
    """What it is called."""


def test_an_option_is_read_from_its_field():
    found = options_of(Settings)
    assert list(found) == ["size", "rate", "kind", "names"]
    assert (found["size"].kind, found["size"].default, found["size"].least) == (int, 3, 1)
    assert (found["rate"].kind, found["rate"].nullable, found["rate"].help) == (float, True, "How fast, in all.")
    assert (found["kind"].choices, found["kind"].help) == (("a", "b"), "")
    assert (found["names"].many, found["names"].kind) == (True, str)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 0}, "--size is 0; needed is a number of at least 1"),
        ({"size": 2.5}, "--size is 2.5; needed is a whole number"),
        ({"size": True}, "--size is True; needed is a whole number"),
        ({"size": None}, "--size is None; needed is a whole number"),
        ({"rate": "fast"}, "--rate is 'fast'; needed is a number"),
        ({"kind": "c"}, "--kind is 'c'; needed is one of a, b"),
    ],
)
def test_invalid_option_values_are_refused(given, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        check_options(Settings(**given))


def test_numpy_and_torch_numbers_become_python_numbers():
    settings = Settings(size=np.int64(4), rate=np.float32(0.5))
    check_options(settings)
    assert (type(settings.size), type(settings.rate)) == (int, float)


def test_settings_round_trip_through_a_command_line():
    assert command_line_of(AnalyzeConfig, vars(AnalyzeConfig())) == []
    config = AnalyzeConfig("a b", temperature=0.5, max_new_tokens=7, random_baseline=True, lens="logit-lens")
    words = command_line_of(AnalyzeConfig, vars(config))
    assert words[:2] == ["--model", "a b"]
    command = parse("analyze", words)
    assert AnalyzeConfig(command.model[0], lens=command.lens[0], **command.settings()) == config
    compared = vars(CompareCommand(directories=(Path("x"), Path("-y")), label=("-1", "b"), step=(0.0, 2.5)))
    words = command_line_of(CompareCommand, compared)
    assert words == ["x", "-y", "--label=-1", "--label", "b", "--step", "0.0", "--step", "2.5"]
    assert words_of("beta", False) == words_of("beta", None) == []
