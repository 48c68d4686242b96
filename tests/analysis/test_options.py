"""Options that a function takes as ``**options`` are shown: by help, by the signature, and to type checkers."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import pytest

from internal_policy import AnalyzeConfig, UserError, analyze, bupo, study, sweep
from internal_policy.analysis.options import AnalyzeOptions
from internal_policy.bupo.config import TrainConfig

OF_ONE_MODEL = {"revision", "template"}


def entries(function):
    """What the docstring's Args say, by name."""
    said = inspect.getdoc(function).partition("Args:\n")[2].partition("\n\n")[0]
    found = {}
    for line in said.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, _, found_text = line.strip().partition(": ")
            found[name] = found_text
        else:
            found[name] += " " + line.strip()
    return found


@pytest.mark.parametrize(("function", "lacks"), [(analyze, set()), (sweep, {"revision"}), (study, OF_ONE_MODEL)])
def test_an_analysis_shows_its_options_with_their_defaults(function, lacks):
    parameters, said = inspect.signature(function).parameters, entries(function)
    assert list(said) == list(parameters)
    assert "options" not in parameters
    for field in fields(AnalyzeConfig):
        if field.name in {*AnalyzeOptions.__optional_keys__} - lacks:
            assert parameters[field.name].default == field.default
            assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert not lacks & parameters.keys()
    assert said["seed"] == "Seed of the sampling, of the bootstrap and of the chosen positions."
    assert said["temperature"].endswith("always those of temperature 1.")


def test_a_training_shows_its_options_and_takes_those_of_trl():
    parameters, said = inspect.signature(bupo.train).parameters, entries(bupo.train)
    assert [name.strip("*") for name in said] == list(parameters)
    assert {f.name for f in fields(TrainConfig)} - {"trl_options"} <= parameters.keys()
    assert parameters["num_generations"].default == TrainConfig.num_generations
    assert said["freeze_layers"].startswith("Layers 1..n")
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert "trl.GRPOConfig" in said["**options"]


def test_type_checkers_are_told_the_fields_of_the_dataclass():
    told, known = get_type_hints(AnalyzeOptions), get_type_hints(AnalyzeConfig)
    assert told == {name: kind for name, kind in known.items() if name not in ("model", "prompts", "responses")}


def test_a_sweep_refuses_one_revision_by_the_word_that_it_takes():
    with pytest.raises(UserError, match="needed is revisions="):
        sweep("org/model", revisions=["a", "b"], revision="c")
