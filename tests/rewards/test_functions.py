"""Custom reward functions: accepted forms, and the guard around them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import pickle
import sys

import numpy as np
import pytest
import torch

from internal_policy.rewards.functions import ExactReward, GuardedReward, as_rewards, count_failures, score
from internal_policy.utils.errors import UserError


def half(prompts, completions, **kwargs):
    return [0.5] * len(completions)


async def later(prompts, completions, bias=0.0, **kwargs):
    return [bias + len(c) for c in completions]


class Lengths:
    def __call__(self, prompts, completions, **kwargs):
        return [len(c) for c in completions]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (0.5, "returned a float; needed is a list of 2 numbers"),
        ([1.0], "returned 1 numbers; needed is a list of 2 numbers"),
        (np.zeros((2, 1)), r"returned shape \(2, 1\)"),
        ([1.0, math.nan], "sample 2: returned nan"),
        (torch.tensor([math.inf, 0.0]), "sample 1: returned inf"),
        ([1.0, "1"], "sample 2: returned a str"),
        ([1.0, 10**400], "sample 2: returned inf"),
        ([1.0, 1j], "sample 2: returned a complex"),
    ],
)
def test_a_wrong_result_is_reported_in_one_line(result, message):
    def wrong(**kwargs):
        return result

    with pytest.raises(UserError, match=message) as caught:
        GuardedReward(wrong)(prompts=["a", "b"], completions=["x", "y"])
    assert "'wrong'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "result",
    [[True, None], (np.True_, None), [torch.tensor(1.0), None], [np.float32(1), None]],
)
def test_all_numeric_types_are_accepted(result):
    assert GuardedReward(lambda **kwargs: result)(prompts=["a", "b"], completions=["x", "y"]) == [1.0, None]
    assert GuardedReward(lambda **kwargs: torch.tensor([1, 0]))(prompts="ab", completions="ab") == [1.0, 0.0]


def fragile(prompts, completions, answer, scale, **kwargs):
    """Raises for the whole batch because of one sample."""
    return [scale / (int(a) - len(c)) for c, a in zip(completions, answer, strict=True)]


async def fragile_later(**kwargs):
    return fragile(**kwargs)


@pytest.mark.parametrize("function", [fragile, fragile_later])
def test_an_exception_affects_one_sample(function):
    reward = GuardedReward(function)
    batch = {"prompts": ["p"] * 3, "completions": ["a", "bb", "c"], "answer": ["2", "2", "3"], "scale": 1}
    values = asyncio.run(reward(**batch)) if function is fragile_later else reward(**batch)
    assert values == [1.0, 0.0, 0.5]
    assert count_failures([reward, half]) == {"crashes": 1, "timeouts": 0}
    # After it has worked, a batch on which all fail costs that batch only.
    batch["answer"] = ["1", "2", "1"]
    values = asyncio.run(reward(**batch)) if function is fragile_later else reward(**batch)
    assert values == [0.0] * 3
    assert count_failures([reward])["crashes"] == 4


def test_a_function_that_always_fails_raises():
    batch = {"prompts": ["p"] * 2, "completions": ["a", "b"], "answer": ["1", "1"], "scale": 1}
    for function in (fragile, fragile_later):
        message = f"'{function.__name__}' fails on every sample: ZeroDivisionError: "
        with pytest.raises(UserError, match=message):
            score_batch(function, batch)


def score_batch(function, batch):
    result = GuardedReward(function)(**batch)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def test_trl_sees_the_wrapped_function_through_the_guard():
    from trl.trainer.utils import get_callable_name, is_async_callable

    names = {half: "half", functools.partial(half, k=1): "half", Lengths(): "Lengths", later: "later"}
    for function, name in names.items():
        assert get_callable_name(GuardedReward(function)) == name
        assert is_async_callable(GuardedReward(function)) == (function is later)
    assert is_async_callable(GuardedReward(functools.partial(later, bias=1.0)))
    model = torch.nn.Linear(2, 1)
    assert as_rewards(model, exact=True) == [model]
    assert pickle.loads(pickle.dumps(GuardedReward(half))).__name__ == "half"


def test_as_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_rewards_x.py").write_text("def f(completions, **kw):\n    return [2.0] * len(completions)\nN = 1\n")
    (tmp_path / "my_broken_x.py").write_text("import no_such_thing_x\n")
    name = lambda reward, exact=True: [r.__name__ for r in as_rewards(reward, exact=exact)]  # noqa: E731
    assert name(None) == name("exact") == ["exact_reward"]
    assert name(None, exact=False) == name("math") == ["math_reward"]
    assert name([half, "exact", Lengths()]) == ["half", "exact_reward", "Lengths"]
    assert score(as_rewards("my_rewards_x:f", exact=True)[0], ["a"], ["1"]) == [2.0]
    for wrong, message in [
        ("nothing", "reward 'nothing' is unknown; use math, exact, module:function"),
        (7, "reward is of type int; use math, exact"),
        ([], "reward is an empty list; use math, exact"),
        ("no_module_x:f", "no module 'no_module_x'"),
        ("my_rewards_x:g", "has no 'g'"),
        ("my_rewards_x:N", "cannot be called as 'N'"),
        ("my_broken_x:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_thing_x'"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            as_rewards(wrong, exact=True)
        assert "\n" not in str(caught.value)


def test_score():
    assert score(ExactReward(), [r"\boxed{1}", "1"], ["1", "1"]) == [1.0, 0.0]
    chat = [{"role": "user", "content": "?"}]
    seen = []

    def look(prompts, completions, **kwargs):
        seen.extend(completions)
        return [None, 1]

    scores = score(look, ["x", "y"], ["1", "2"], prompts=[chat, "?"])
    assert math.isnan(scores[0])
    assert scores[1] == 1.0
    assert seen == [[{"role": "assistant", "content": "x"}], "y"]

    async def in_a_running_loop():
        return score(later, ["x", "yy"], ["1", "2"])

    assert asyncio.run(in_a_running_loop()) == [1.0, 2.0]
    with pytest.raises(UserError, match="a reward model cannot score"):
        score(torch.nn.Linear(1, 1), ["x"], ["1"])
