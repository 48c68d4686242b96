"""PPO: advantages and value loss against independent formulas, the critic, its options and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from tiny_training import refused_here, train
from trainers import left_padded, make_trainer, weights
from training_calls import command

from internal_policy import UserError
from internal_policy.bupo import Run, TrainConfig
from internal_policy.bupo.checks import check_critic
from internal_policy.bupo.config import PPO_OPTIONS
from internal_policy.bupo.critic import (
    Critic,
    clipped_value_loss,
    explained_variance,
    generalized_advantages,
    rewards_at_the_end,
    whitened,
)
from internal_policy.bupo.resume import drop_optimizer_states, write_digests
from internal_policy.bupo.trainer import whitened_advantages

NAN = math.nan
FLOAT32 = 1e-5
"""Sums of some ten float32 numbers of size 1 are off by some 1e-6."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("ppo")
    tiny_model("qwen3", layers=2).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    return place


def by_definition(rewards, values, mask, gamma, lam):
    """A_t = sum_k (gamma lambda)^k (r_(t+k) + gamma V_(t+k+1) - V_(t+k)), each sum on its own, in Python's float64."""
    found = [[0.0] * len(row) for row in values]
    for n, row in enumerate(mask):
        at = [t for t, acts in enumerate(row) if acts]
        v = [values[n][t] for t in at] + [0.0]
        deltas = [rewards[n][t] + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            found[n][t] = math.fsum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return torch.tensor(found)


def random_rollouts(rows=6, length=9, seed=0):
    """Rewards of tokens, values, and masks of different lengths: also without tokens, and with gaps of tool outputs."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, rows, length, generator=generator)
    mask = (torch.arange(length) < torch.tensor([9, 5, 1, 0, 7, 9])[:, None]).long()
    mask[4, 2:4] = 0
    mask[5, 0] = 0
    return rewards, values, mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 1.0), (1.0, 0.95), (0.97, 0.5), (0.9, 0.0), (0.0, 1.0)])
def test_advantages_are_the_sum_of_the_definition(gamma, lam):
    rewards, values, mask = random_rollouts()
    found = generalized_advantages(rewards, values, mask, gamma, lam)
    expected = by_definition(rewards.tolist(), values.tolist(), mask.tolist(), gamma, lam)
    assert found.tolist() == pytest.approx(expected.numpy(), abs=FLOAT32)


def test_without_discount_an_advantage_is_the_reward_to_go_less_the_value():
    rewards, values, mask = random_rollouts()
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    assert generalized_advantages(rewards, values, mask).tolist() == pytest.approx(
        ((to_go - values) * mask).numpy(), abs=FLOAT32
    )


def test_the_reward_is_given_at_the_last_token():
    _, _, mask = random_rollouts()
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, NAN, 6.0])
    found = rewards_at_the_end(rewards, mask)
    # The fourth has no tokens, the fifth no score.
    assert [(int(n), int(t), float(found[n, t])) for n, t in found.nonzero()] == [
        *((0, 8, 1.0), (1, 4, 2.0), (2, 0, 3.0), (5, 8, 6.0))
    ]


def test_whitened_advantages_have_mean_0_and_variance_1_over_the_tokens():
    advantages, _, mask = random_rollouts()
    found = whitened(3 * advantages + 5, mask)
    assert (found[mask == 0] == 0).all()
    chosen = found[mask == 1].double()
    assert (float(chosen.mean()), float(chosen.var(correction=0))) == pytest.approx((0.0, 1.0), abs=FLOAT32)
    assert whitened(torch.full((2, 3), 0.5), torch.ones(2, 3)).tolist() == [[0.0] * 3] * 2
    assert whitened(torch.ones(2, 3), torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


def test_without_values_the_advantages_are_those_of_reinforce():
    """The critic starts with values of 0; one response has no score."""
    _, _, mask = random_rollouts()
    mask[:, 0] = 1
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, NAN, -1.0])
    scored = mask * rewards.isfinite()[:, None]
    found = whitened(
        generalized_advantages(rewards_at_the_end(rewards, scored), torch.zeros(mask.shape), scored), scored
    )
    expected = whitened_advantages(rewards, mask.sum(1))[:, None] * scored
    assert found.tolist() == pytest.approx(expected.numpy(), abs=FLOAT32)


def test_explained_variance():
    returns, noise, mask = random_rollouts()
    assert explained_variance(returns + 7, returns, mask) == pytest.approx(1.0, abs=FLOAT32)
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask) == pytest.approx(0.0, abs=FLOAT32)
    chosen, error = returns[mask == 1].double(), noise[mask == 1].double()
    expected = 1 - float(error.var(correction=0) / chosen.var(correction=0))
    assert explained_variance(returns + noise, returns, mask) == pytest.approx(expected, abs=FLOAT32)
    assert math.isnan(explained_variance(noise, torch.ones_like(returns), mask))


def test_a_value_that_moved_far_enough_is_not_moved_further():
    """From 0 towards 1 with a clip of 0.2: the table of losses and gradients, by hand."""
    values = torch.tensor([0.1, 0.2, 0.5, -0.5, 1.5], requires_grad=True)
    old, returns = torch.zeros(5), torch.ones(5)
    loss = clipped_value_loss(values, old, returns, 0.2)
    # 0.5 (0.9)^2; 0.5 (0.8)^2; clipped to 0.2: 0.5 (0.8)^2; the wrong way is not clipped: 0.5 (1.5)^2; past the return.
    assert loss.tolist() == pytest.approx([0.405, 0.32, 0.32, 1.125, 0.32], abs=FLOAT32)
    loss.sum().backward()
    assert values.grad[[0, 2, 3, 4]].tolist() == pytest.approx([-0.9, 0.0, -1.5, 0.0], abs=FLOAT32)
    plain = clipped_value_loss(values, old, returns, 0.0)
    assert plain.tolist() == pytest.approx([0.405, 0.32, 0.125, 1.125, 0.125], abs=FLOAT32)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_the_critic_starts_from_the_policys_weights_with_values_of_zero(model_type):
    policy = tiny_model(model_type)
    critic = Critic(policy, positions_from_mask=model_type == "gpt2")
    own, theirs = critic.decoder.state_dict(), policy.base_model.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert not {t.data_ptr() for t in own.values()} & {t.data_ptr() for t in theirs.values()}
    ids, mask, keep = left_padded()
    assert critic(ids, mask, keep).tolist() == [[0.0] * keep] * len(ids)
    # With another head, a value is read from the state before its token, wherever the prompt begins.
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    values = critic(ids, mask, keep)
    for row in range(len(ids)):
        alone = ids[row, mask[row].bool()][None]
        states = policy.base_model(input_ids=alone, use_cache=False).last_hidden_state[0]
        expected = (states.double() @ critic.value_head.weight.double().squeeze())[-keep - 1 : -1]
        # Values of size 30 in float32, after sums in another order.
        assert values[row].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def ppo_trainer(tmp_path, **changed):
    trainer = make_trainer(
        tmp_path, tiny_model("qwen3", layers=2), method="ppo", **{"critic_learning_rate": 1e-2, **changed}
    )
    batches = []
    generate = trainer._generate_and_score_completions

    def keep(inputs):
        # Before TRL shuffles it.
        batches.append(generate(inputs))
        return batches[-1]

    trainer._generate_and_score_completions = keep
    return trainer, batches


def scores(completions, **_):
    """Also no score: None is NaN in TRL."""
    return [None if i % 4 == 1 else float(len(c) % 3) for i, c in enumerate(completions)]


def test_a_training_uses_the_advantages_of_tokens(tmp_path):
    """Three steps, the second of which has values that are not zero; one response in four has no score."""
    trainer, batches = ppo_trainer(
        tmp_path, max_steps=3, gamma=0.9, gae_lambda=0.8, log_completions=True, num_completions_to_print=0
    )
    trainer.reward_funcs = [scores]
    before = weights(trainer.model)
    trainer.train()
    assert [name for name in before if not torch.equal(before[name], trainer.model.state_dict()[name])]
    for step, batch in enumerate(batches):
        mask = batch["completion_mask"]
        if step:
            assert batch["values"].abs().max() > 0
        found = batch["advantages"]
        assert found.shape == mask.shape
        # TRL keeps the rewards of the last batch only.
        if step < len(batches) - 1:
            continue
        scored = trainer._rewards.isfinite()
        assert not scored.all()
        mask = mask * scored[:, None]
        rewards = torch.zeros(mask.shape)
        for n, row in enumerate(mask.tolist()):
            if any(row):
                rewards[n, max(t for t, acts in enumerate(row) if acts)] = trainer._rewards[n]
        raw = by_definition(rewards.tolist(), batch["values"].tolist(), mask.tolist(), 0.9, 0.8)
        chosen = raw[mask == 1].double()
        expected = (raw - chosen.mean()) / chosen.std(correction=0) * mask
        assert found.tolist() == pytest.approx(expected.numpy(), abs=1e-4)
        means = (expected.sum(1) / mask.sum(1).clamp(min=1)).tolist()
        assert list(trainer._logs["advantages"]) == pytest.approx(means, abs=1e-4)
    log = trainer.state.log_history[1]
    assert all(math.isfinite(log[name]) for name in ("value_loss", "explained_variance", "critic_grad_norm"))


def test_an_update_of_the_critic_leaves_the_policy_as_it_is(tmp_path):
    trainer, batches = ppo_trainer(tmp_path, max_steps=1)
    trainer.train()
    before, critic = weights(trainer.model), weights(trainer.critic_training.critic)
    trainer.critic_training.accumulate_gradients(batches[0], 1)
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())
    trainer.critic_training.update(1.0)
    assert all(torch.equal(before[name], now) for name, now in trainer.model.state_dict().items())
    changed = {
        name for name, now in trainer.critic_training.critic.state_dict().items() if not (now == critic[name]).all()
    }
    assert {"value_head.weight", "value_head.bias", "decoder.layers.0.mlp.up_proj.weight"} <= changed


def test_a_split_mini_batch_has_the_gradient_of_the_whole(tmp_path):
    """The mean over all tokens of the update, not the mean of the parts' means; and clipped as the policy's."""
    found = {}
    for size in (8, 2):
        trainer, batches = ppo_trainer(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            steps_per_generation=8 // size,
            max_grad_norm=0.5,
        )
        trainer.train()
        critic = trainer.critic_training
        assert critic.optimizer.param_groups[0]["lr"] == 1e-2
        critic.optimizer.zero_grad()
        batch = batches[0]
        for start in range(0, 8, size):
            part = {k: v[start : start + size] if v.ndim else v for k, v in batch.items()}
            critic.accumulate_gradients(part, 8 // size)
        gradients = torch.cat([p.grad.flatten() for p in critic.critic.parameters() if p.grad is not None])
        now = critic._values(batch).detach()
        errors = clipped_value_loss(now, batch["values"], batch["returns"], 0.2)[batch["completion_mask"] == 1]
        loss, norm = critic.update(0.5)
        assert loss == pytest.approx(float(errors.double().mean()), rel=1e-5)
        assert norm == pytest.approx(float(gradients.norm()), rel=1e-5)
        assert critic.optimizer.param_groups[1]["lr"] == 5e-3
        found[size] = gradients
    # Equal but for the order of float32 sums, which the padding of the parts changes too.
    torch.testing.assert_close(found[8], found[2], rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_changes_neither_values_nor_gradients():
    ids, mask, keep = left_padded()
    found = []
    for checkpointed in (False, True):
        critic = Critic(tiny_model("qwen3", attention_dropout=0.5))
        torch.nn.init.ones_(critic.value_head.weight)
        if checkpointed:
            critic.enable_gradient_checkpointing()
            assert critic.decoder.layers[0].training
        values = critic(ids, mask, keep)
        values.square().mean().backward()
        found.append([values.detach(), *(p.grad for p in critic.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.slow
def test_the_command_line_trains_with_ppo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--prompts-per-step", 2, "--num-generations", 4, "--mini-batches", 1, "--max-completion-length", 8]
    short = ["--max-steps", 1, "--eval-samples", 0, "--output", "out"]
    own = ["--gae-lambda", 0.95, "--value-clip", 0, "--critic-learning-rate", 1e-4]
    code, out, err = command(monkeypatch, capsys, "train", "--method", "ppo", *small, *short, *own)
    assert (code, err) == (0, "")
    assert "PPO, lambda 0.95, value clip 0" in " ".join(out.split())
    run = Run.load(tmp_path / "out")
    assert [run.config[name] for name in PPO_OPTIONS] == [1e-4, 1.0, 0.95, 0.0]
    assert "with PPO, lambda 0.95, value clip 0." in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


FIRST = {"method": "ppo", "ipa_steps": 0, "layer": None}


def test_a_run_has_its_settings_columns_and_label(place):
    run = train(place, "run", max_steps=2, **FIRST, gae_lambda=0.9)
    assert (run.method, run.label) == ("ppo", "PPO, lambda 0.9")
    assert run.history["phase"].tolist() == ["ppo"] * 2
    assert [run.config[name] for name in PPO_OPTIONS] == [1e-5, 1.0, 0.9, 0.2]
    assert run.history[["value_loss", "explained_variance", "critic_grad_norm"]].notna().all(axis=None)
    assert "Proximal Policy Optimization (PPO)" in (run.model_dir / "README.md").read_text()
    plain = train(place, "plain", max_steps=1, **{**FIRST, "method": "grpo"})
    assert "value_loss" not in plain.history
    # A finished run of an earlier version remains the run that this call would make.
    assert not {*PPO_OPTIONS} & plain.config.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "grpo", "gamma": 0.9}, "gamma=0.9 with method='grpo'; only ppo has a critic"),
        ({"method": "bupo", "critic_learning_rate": 1e-5}, "critic_learning_rate=1e-05 with method='bupo'; only ppo"),
        ({"method": "ppo", "ipa_steps": 1}, "ipa_steps=1 with method='ppo'; only bupo has a first phase"),
        ({"method": "ppo", "gamma": 1.5}, "gamma is 1.5; needed is a number from 0 to 1"),
        ({"method": "ppo", "gae_lambda": -0.5}, "gae_lambda is -0.5; needed is at least 0"),
        ({"method": "ppo", "value_clip": -1.0}, "value_clip is -1.0; needed is at least 0"),
        ({"method": "ppo", "critic_learning_rate": "fast"}, "critic_learning_rate is 'fast'; needed is a number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_that_are_refused_at_once(changed, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**changed)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_rank": 2}, "method='ppo' with adapters: the critic is a copy of all weights"),
        ({"loss_type": "vespo"}, "loss_type='vespo' with method='ppo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' with method='ppo'"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' with method='ppo', whose advantages have a scale of their"),
        ({"learning_rate": 0.0}, "the critic follows the policy's schedule; needed is a learning_rate above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_settings_that_are_refused_before_anything_is_written(place, changed, message):
    assert message in refused_here(place, "refused", **{**FIRST, **changed})
    assert not (place / "refused").exists()


@pytest.mark.parametrize(
    ("processes", "sharded", "message"),
    [(2, False, "method='ppo' under 2 processes"), (1, True, "method='ppo' under FSDP or DeepSpeed")],
)
def test_the_critic_is_trained_in_one_process(processes, sharded, message):
    with pytest.raises(UserError, match=f"^{message}: the critic is trained in one process"):
        check_critic(processes, sharded=sharded, adapters=False)


def test_older_checkpoints_keep_no_critic(tmp_path):
    for update in (1, 2, 3):
        (tmp_path / f"checkpoint-{update}" / "critic").mkdir(parents=True)
        for name in ("model.safetensors", "critic/critic.safetensors", "critic/optimizer.pt"):
            (tmp_path / f"checkpoint-{update}" / name).touch()
        write_digests(tmp_path / f"checkpoint-{update}", {}, 1)
    drop_optimizer_states(tmp_path)
    assert [(tmp_path / f"checkpoint-{update}" / "critic").exists() for update in (1, 2, 3)] == [False, True, True]
    assert "critic" not in (tmp_path / "checkpoint-1" / "checkpoint_files.json").read_text()
