"""By which code a reward is recognised: what changes the digest, and what does not."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys

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
        self.scale, self._calls = scale, 0

    def __call__(self, completions, **columns):
        self._calls += 1
        return [self.scale * helper(text) for text in completions]
"""


def digest(reward):
    return digest_code(as_rewards(reward, exact=True))


def scaled(factor):
    return lambda completions, **columns: [factor * len(text) for text in completions]


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
    first, second, third = (digest(written(bonus).lengths) for bonus in (1, 2, 1))
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


def test_code_without_a_source_is_digested_as_bytecode():
    def defined(text):
        names = {"__name__": "__main__"}
        exec(text, names)
        return names["reward"]

    one = "def reward(completions, **columns):\n    return [1.0 for _ in completions]"
    assert digest(defined(one)) == digest(defined(f"\n{one}"))
    assert digest(defined(one)) != digest(defined(one.replace("1.0", "2.0")))


def test_a_function_is_named_with_its_module():
    assert reward_name(scaled, exact=True) == f"{__name__}.scaled"
    assert reward_name(["math"], exact=True) == "math"
    assert reward_name(None, exact=True) == "exact"
