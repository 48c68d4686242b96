"""A training that is killed at any time and restarted ends with the weights and tables of an uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from transformers import TrainerCallback, TrainerState

from internal_policy import bupo
from internal_policy.analysis.sweep_targets import training_record
from internal_policy.bupo.resume import last_checkpoint, write_digests
from internal_policy.models.checkpoint_files import refuse_pickles
from internal_policy.utils.errors import UserError

STEPS, SWITCH, UPDATES = 4, 2, 2
LAST = STEPS * UPDATES
WRITING = {"missing": 0, "half": 0.5}

# Fewer prompts than the 16 that a run needs: they are repeated four times, each time in another order.
PROMPTS = [{"prompt": f"w{i} w{i + 7}", "answer": ""} for i in range(2, 7)]


def high_words(completions, **_):
    """Share of words from the upper half of the vocabulary: differs from sample to sample, so there is a gradient."""
    return [sum(int(w[1:]) > 30 for w in c.split() if w[1:].isdigit()) / 8 for c in completions]


def train(place, output, callbacks=(), **options):
    return bupo.train(
        str(place / "model"),
        PROMPTS,
        output=place / output,
        callbacks=list(callbacks),
        **{
            **{"layer": 2, "ipa_steps": SWITCH, "max_steps": STEPS, "prompts_per_step": 4, "num_generations": 4},
            **{"mini_batches": UPDATES, "max_completion_length": 8, "save_steps": 1, "dynamics_every": 1},
            **{"dynamics_responses": 4, "learning_rate": 2e-3, "template": "plain", "reward": high_words},
            **{"lr_scheduler_type": "linear", **options},
        },
    )


class KillAt(TrainerCallback):
    def __init__(self, event, update):
        setattr(self, event, lambda args, state, control, **_: self.kill(state.global_step == update))

    def kill(self, now):
        if now:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(update, share):
    """Exit when a checkpoint lacks its last file or contains only a part of it."""

    def cut(state, path):
        write(state, path)
        if state.global_step == update:
            if share:
                os.truncate(path, int(share * Path(path).stat().st_size))
            else:
                Path(path).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    write, TrainerState.save_to_json = TrainerState.save_to_json, cut


def to_be_killed(place, output, event, update, options):
    callbacks = []
    if event in WRITING:
        kill_while_writing(update, WRITING[event])
    else:
        callbacks = [KillAt(event, update)]
    train(place, output, callbacks, **options)


def killed(place, output, event, update, **options):
    # A server that has imported everything forks the processes that will be killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["internal_policy.bupo.training", "peft"])
    process = context.Process(target=to_be_killed, args=(place, output, event, update, options))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("resume")
    tiny_model("qwen3", layers=4).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    return place


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The uninterrupted run, trained once for all tests with the same settings."""
    runs = {}

    def get(**options):
        key = repr(options)
        if key not in runs:
            runs[key] = train(place, f"uninterrupted-{len(runs)}", **options)
        return runs[key]

    return get


def assert_same(one, other):
    a, b = load_file(one.model_dir / "model.safetensors"), load_file(other.model_dir / "model.safetensors")
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    pd.testing.assert_frame_equal(
        one.history.drop(columns="seconds"), other.history.drop(columns="seconds"), check_exact=True
    )
    pd.testing.assert_frame_equal(one.dynamics, other.dynamics, check_exact=True)
    pd.testing.assert_frame_equal(one.dynamics_layers, other.dynamics_layers, check_exact=True)
    assert (one.ipa_steps, one.ipa_reason, one.label) == (other.ipa_steps, other.ipa_reason, other.label)


@pytest.mark.parametrize(
    ("event", "update"),
    [
        pytest.param("on_step_end", 3, id="between two updates of the first phase"),
        pytest.param("half", 6, id="while writing a checkpoint of the second phase"),
    ],
)
@pytest.mark.slow
def test_killed_and_resumed(place, uninterrupted, event, update):
    output = f"{event}-{update}"
    killed(place, output, event, update)
    assert_same(uninterrupted(), train(place, output))


@pytest.mark.slow
def test_an_alignment_stopped_by_its_dynamics_stays_stopped_after_resuming(place, uninterrupted):
    """At this learning rate the perplexity stops alignment after the first step instead of two."""
    auto = {"ipa_steps": "auto", "learning_rate": 3e-2}
    killed(place, "auto", "on_step_end", 3, **auto)
    run = uninterrupted(**auto)
    assert run.ipa_steps == 1
    assert "perplexity" in run.ipa_reason
    assert_same(run, train(place, "auto", **auto))


@pytest.mark.slow
def test_fractional_save_steps_save_after_whole_steps(place):
    """Checkpoints contain no rollouts, so a run cannot resume between two updates of a step."""
    # An eighth of the run is half of a step.
    killed(place, "share", "on_step_end", 7, save_steps=0.125)
    saved = {int(p.name.split("-")[1]): p for p in (place / "share" / "checkpoints").glob("checkpoint-*")}
    assert saved.keys() == {2, 4, 6}
    for update, checkpoint in saved.items():
        assert training_record(checkpoint) == {"updates": update, "updates_per_step": UPDATES}
        assert (checkpoint / "model.safetensors").is_file()
        # Two thirds of a checkpoint, needed only for resuming.
        assert (checkpoint / "optimizer.pt").is_file() == (update > 2)


def test_training_resumes_from_the_newest_complete_checkpoint(tmp_path):
    for update in (4, 10, 11, 12, 14):
        (tmp_path / f"checkpoint-{update}").mkdir()
        (tmp_path / f"checkpoint-{update}" / "trainer_state.json").write_text(f'{{"global_step": {update}}}')
        (tmp_path / f"checkpoint-{update}" / "rng_state.pth").touch()
        if update < 12:
            write_digests(tmp_path / f"checkpoint-{update}", {}, 1)
    assert last_checkpoint(tmp_path, {}, updates_per_step=2).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "none", {}, updates_per_step=2) is None


@pytest.mark.slow
def test_killed_at_each_update(place, uninterrupted):
    moments = [("on_step_end", update) for update in range(1, LAST + 1)]
    moments += [(e, update) for e in ("on_save", *WRITING) for update in range(UPDATES, LAST + 1, UPDATES)]
    for event, update in [*moments, ("on_train_end", LAST)]:
        output = f"each-{event}-{update}"
        killed(place, output, event, update)
        assert_same(uninterrupted(), train(place, output))


@pytest.mark.slow
def test_grpo_killed_around_a_step_in_the_middle(place, uninterrupted):
    """Its steps are those of the second phase above, of which each is killed."""
    options = {"method": "grpo", "ipa_steps": 0}
    for event, update in [("on_step_end", 3), *((e, 4) for e in ("on_step_end", "on_save", *WRITING))]:
        output = f"grpo-{event}-{update}"
        killed(place, output, event, update, **options)
        assert_same(uninterrupted(**options), train(place, output, **options))


@pytest.mark.slow
@pytest.mark.parametrize("update", [3, 5])
def test_separate_learning_rates_are_resumed(place, uninterrupted, update):
    """In both phases: the optimiser has more groups than TRL's, and checkpoints lack the alignment learning rate."""
    rates = {"ipa_learning_rate": 5e-3, "upper_lr_scale": 0.25}
    killed(place, f"rates-{update}", "on_step_end", update, **rates)
    run = uninterrupted(**rates)
    assert_same(run, train(place, f"rates-{update}", **rates))
    # The schedule falls to 0 in a line, and a step is logged at its last update.
    assert run.history["learning_rate"].tolist() == pytest.approx(
        [7 / 8 * 5e-3, 5 / 8 * 5e-3, 3 / 8 * 2e-3, 1 / 8 * 2e-3]
    )


@pytest.mark.slow
def test_the_critic_of_ppo_is_resumed(place, uninterrupted):
    """Its rate is large enough for its values to matter, and its schedule and optimiser go on where they were."""
    ppo = {"method": "ppo", "ipa_steps": 0, "critic_learning_rate": 1e-2, "gae_lambda": 0.9, "weight_decay": 0.1}
    killed(place, "ppo", "on_step_end", 5, **ppo)
    run, resumed = uninterrupted(**ppo), train(place, "ppo", **ppo)
    assert_same(run, resumed)
    assert (run.history["explained_variance"][1:] != 0).all()
    states = [each.path / "checkpoints" / f"checkpoint-{LAST}" / "critic" for each in (run, resumed)]
    weights = [load_file(state / "critic.safetensors") for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    optimizers = [torch.load(state / "optimizer.pt", weights_only=True)["state"] for state in states]
    assert optimizers[0].keys() == optimizers[1].keys() != set()
    for one, other in zip(*(each.values() for each in optimizers), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_adapters_are_resumed(place, uninterrupted):
    killed(place, "lora", "on_step_end", 5, lora_rank=2)
    assert_same(uninterrupted(lora_rank=2), train(place, "lora", lora_rank=2))


def test_stopping_alignment_by_dynamics_requires_measurements(place):
    with pytest.raises(UserError, match="dynamics_every is 0"):
        train(place, "unmeasured", ipa_steps="auto", dynamics_every=0)


@pytest.mark.slow
def test_killed_again_and_again(place, uninterrupted):
    """One run that is killed at every update and resumed each time."""
    for update in range(1, LAST + 1):
        for event in ("on_step_end", "half") if update % UPDATES == 0 else ("on_step_end",):
            killed(place, "chain", event, update)
        if update % UPDATES == 0:
            killed(place, "chain", "on_save", update)
    assert_same(uninterrupted(), train(place, "chain"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin", "model.safetensors.index.json"])
def test_checkpoints_with_pickled_weights_are_not_resumed(tmp_path, file):
    (tmp_path / file).write_text('{"metadata": {}, "weight_map": {"a": "pytorch_model-1.bin"}}')
    with pytest.raises(UserError, match="pickle"):
        refuse_pickles(tmp_path)
