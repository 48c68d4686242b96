"""Excessive counts are refused before anything of that size is allocated."""

from __future__ import annotations

import pytest

from internal_policy import AnalyzeConfig, UserError
from internal_policy.bupo.config import TrainConfig
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.inspection.config import InspectConfig
from internal_policy.utils.options import LARGEST
from internal_policy.utils.shell import is_number

HUGE = (10**11, 10**30, 10**4500)


@pytest.mark.parametrize("value", HUGE, ids=["1e11", "1e30", "1e4500"])
@pytest.mark.parametrize(
    "name", ["max_responses", "samples_per_prompt", "max_new_tokens", "batch_size", "seed", "keep_tokens"]
)
def test_an_analysis_refuses_a_count_beyond_its_limit(name, value):
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{flag} is [0-9a-z+. ]+; needed is a number of at most {LARGEST[name]}$"):
        AnalyzeConfig(**{name: value})
    assert getattr(AnalyzeConfig(**{name: LARGEST[name]}), name) == LARGEST[name]


@pytest.mark.parametrize("value", HUGE, ids=["1e11", "1e30", "1e4500"])
def test_evaluation_inspection_and_training_refuse_counts_beyond_their_limits(value):
    for name in ("samples", "max_problems", "max_new_tokens"):
        with pytest.raises(UserError, match="needed is a number of at most"):
            EvaluateConfig(model="testbed/qwen3", benchmark="testbed", **{name: value})
    for name in ("max_new_tokens", "top_k"):
        with pytest.raises(UserError, match="needed is a number of at most"):
            InspectConfig(prompt="a?", **{name: value})
    for name in ("max_steps", "prompts_per_step", "lora_rank", "num_generations", "max_completion_length", "seed"):
        with pytest.raises(UserError, match=f"{name} is .* at most {LARGEST[name]}"):
            TrainConfig(**{name: value})


def test_products_of_counts_are_limited():
    with pytest.raises(UserError, match="steps of 100000 prompts are more than the 10000000 prompts of one run"):
        TrainConfig(max_steps=10**6, prompts_per_step=10**5).with_preset()


@pytest.mark.parametrize(
    ("text", "number"),
    [("7", True), (" -7 ", True), ("+12", True), ("٣", True), ("²", False), ("9" * 5000, False), ("", False)],
)
def test_numbers_are_parsed_as_in_python(text, number):
    assert is_number(text) == number
    assert not number or isinstance(int(text), int)
