"""``layer="auto"``: the boundary layer, and what direction and gradients say next to it, which changes nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from training_calls import MODEL, SMALL

from internal_policy import bupo
from internal_policy.bupo.layer_choice import copied_rewards
from internal_policy.bupo.transfer_results import Transfer


class Never:
    """A reward with a state, which is 0."""

    def __init__(self):
        self.calls = 0

    def __call__(self, completions, **_):
        self.calls += 1
        return [0.0] * len(completions)


def train(output, **options):
    return bupo.train(MODEL, output=output, **{**SMALL, "max_steps": 1, **options})


def the_note(caplog):
    (line,) = [r.getMessage() for r in caplog.records if "(boundary layer)" in r.getMessage()]
    return line


def assert_same_numbers(one, other):
    """Every weight bit for bit, and every number of the history that is not a time."""
    first, second = (load_file(run.model_dir / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for column in set(one.history) - {"seconds"}:
        if not any(word in column for word in ("time", "per_second", "runtime")):
            assert one.history[column].tolist() == pytest.approx(other.history[column].tolist(), abs=0, nan_ok=True)


@pytest.mark.slow
def test_without_informative_prompts_the_run_goes_on_and_says_so(tmp_path, caplog):
    reward = Never()
    run = train(tmp_path / "auto", layer="auto", reward=reward)
    why = "alignment was not compared with GRPO (testbed/qwen3: the responses differ in reward for 0 of the 2 prompts "
    assert f"{why}(mean reward 0.00))" in the_note(caplog)
    assert why in run.layer_reason
    assert not (run.path / "transfer").exists()
    # The reward of the run was called by the run only.
    assert reward.calls == 1
    assert_same_numbers(run, train(tmp_path / "given", layer=run.layer, reward=Never()))


@pytest.mark.slow
def test_the_note_changes_no_number_of_the_run(tmp_path, caplog):
    options = {"prompts_per_step": 16, "max_completion_length": 44, "dynamics_every": 1, "ipa_steps": 1, "max_steps": 2}
    run = train(tmp_path / "auto", layer="auto", **options)
    table = Transfer.load(run.path / "transfer").table.set_index("layer")
    assert list(table.index) == list(range(1, 9))
    agreement = (
        f"alignment at layer {run.layer} agrees with GRPO to {table['cosine'][run.layer]:.2f}, most at layer "
        f"{table['cosine'].idxmax()} ({table['cosine'].max():.2f})"
    )
    line = the_note(caplog)
    assert line.startswith(f"layer {run.layer} (boundary layer); by direction alone ")
    assert line.endswith(agreement)
    assert run.layer_reason.endswith(agreement)
    assert run.failures == {"crashes": 0, "timeouts": 0}
    assert_same_numbers(run, train(tmp_path / "given", layer=run.layer, **options))


def test_rewards_are_copied_if_they_can_be():
    reward = Never()
    (copied,) = copied_rewards(reward, exact=True)
    assert copied.reward is not reward
    assert copied_rewards(None, exact=True)[0].__name__ == "exact_reward"
    assert copied_rewards([torch.nn.Linear(2, 1)], exact=True) is None
    # A generator cannot be copied.
    reward.rows = (row for row in ())
    assert copied_rewards(reward, exact=True) is None
