"""By which code a reward is recognised: what changes the digest, and what does not."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys

import numpy as np
import pytest

from internal_policy.rewards.functions import as_rewards
from internal_policy.rewards.identity import digest_code, reward_name

MODULE = """
BONUS = {bonus}

def helper(text):
    return len(text) + BONUS

def lengths(completions, scale=1.0, **columns):
    return [scale * helper(text) for text in completions]

class Lengths:
    def __init__(self, scale):
        self.scale, self.calls = scale, 0

    def __call__(self, completions, **columns):
        self.calls += 1
        return [self.scale * helper(text) for text in completions]
"""


def digest(reward):
    return digest_code(as_rewards(reward, exact=True))


def scaled(factor):
    return lambda completions, **columns: [factor * len(text) for text in completions]


def with_default(factor):
    def reward(completions, factor=factor, *, power=1, **columns):
        return [factor * len(text) ** power for text in completions]

    return reward


def guarded(function):
    def inner(**columns):
        return function(**columns)

    return inner


def defined(text):
    """What a script without a source file defines."""
    names = {"__name__": "__main__"}
    exec(text, names)
    return names["reward"]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A function that writes a module of rewards and imports it anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(bonus):
        (tmp_path / "own_rewards.py").write_text(MODULE.format(bonus=bonus))
        monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
        importlib.invalidate_caches()
        return importlib.import_module("own_rewards")

    return write


def test_built_in_rewards_need_no_digest():
    assert digest(None) is None
    assert digest(["math", "exact"]) is None
    assert digest(["exact", scaled(1)]) == digest(scaled(1)) is not None


def test_values_and_names_tell_rewards_of_one_module_apart(written):
    own = written(bonus=1)
    rewards = [
        *(own.lengths, "own_rewards:Lengths", own.Lengths(1), own.Lengths(2), scaled(1), scaled(2), len, sum),
        *(functools.partial(own.lengths, scale=2), functools.partial(own.lengths, scale=3), own.Lengths(1).__call__),
        *(functools.partial(own.lengths, scale=np.float32(2)), functools.partial(own.lengths, scale={"a": 2})),
        *(scaled({"a": 1.0}), scaled({"a": 0.0}), scaled([1]), scaled(np.float64(3)), scaled(len)),
        *(with_default(1), with_default(2), guarded(scaled(1)), guarded(scaled(2)), guarded(own.lengths)),
    ]
    digests = [digest(reward) for reward in rewards]
    assert len(set(digests)) == len(rewards)
    assert digest("own_rewards:lengths") == digest(own.lengths)
    assert [digest(scaled(factor)) for factor in (1, 2)] == digests[4:6]


def test_calls_leave_the_digest_as_it_is(written):
    reward = written(bonus=1).Lengths(1)
    before = digest(reward)
    reward(completions=["a"])
    assert digest(reward) == before


def test_a_change_of_a_helper_changes_the_digest(written):
    first, second, third = (digest(guarded(written(bonus).lengths)) for bonus in (1, 2, 1))
    assert first == third != second


def test_another_process_gives_the_same_digest(written, tmp_path):
    own = written(bonus=1)
    code = (
        "from internal_policy.rewards.functions import as_rewards\n"
        "from internal_policy.rewards.identity import digest_code\n"
        "import own_rewards\n"
        "print(digest_code(as_rewards([own_rewards.Lengths(2), own_rewards.lengths], exact=True)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == digest([own.Lengths(2), own.lengths])


FUNCTION = """
def reward(completions, **columns):
    return [1.0 if text in {"a", "b", "c"} else 0.0 for text in completions]
"""
CLASS = """
class Base:
    def score(self, text):
        return 1.0

class Own(Base):
    @property
    def factor(self):
        return 2.0

    def __call__(self, completions, **columns):
        return [self.factor * self.score(text) for text in completions]

reward = Own()
"""


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        (FUNCTION, {', "c"': "", "1.0": "3.0"}),
        (CLASS, {"1.0": "3.0", "2.0": "3.0", "self.factor * ": ""}),
    ],
    ids=["function", "class"],
)
def test_code_without_a_source_is_digested_as_bytecode(text, changes):
    assert digest(defined(text)) == digest(defined(f"\n{text}"))
    versions = [text, *(text.replace(old, new) for old, new in changes.items())]
    assert len({digest(defined(each)) for each in versions}) == len(versions)


def test_bytecode_has_the_same_digest_whatever_the_order_of_sets():
    code = f"""
from internal_policy.rewards.functions import as_rewards
from internal_policy.rewards.identity import digest_code
{FUNCTION}
print(digest_code(as_rewards(reward, exact=True)))
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]
    assert len(set(found)) == 1


def test_a_function_that_refers_to_itself_has_a_digest():
    def countdown(completions, n=3, **columns):
        return [0.0 for _ in completions] if n == 0 else countdown(completions, n - 1)

    assert digest(countdown) == digest(countdown)


def test_a_function_is_named_with_its_module():
    assert reward_name(scaled, exact=True) == f"{__name__}.scaled"
    assert reward_name(["math"], exact=True) == "math"
    assert reward_name(None, exact=True) == "exact"
