"""PPO's policy gradient against an independent one: a clipped surrogate in float64, of each sequence on its own."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from trainers import make_trainer, weights
from transformers import TrainerCallback

GAMMA, LAMBDA, CLIP, TEMPERATURE = 0.9, 0.8, 0.2, 0.8

FLOAT32 = 2e-5
"""Relative; the gradients differ by about 1e-6 from float64, some ten float32 roundings (6e-8) of activations and sums.
A wrong sign, mask, denominator or clip changes them by more than 1e-2."""


def scores(completions, **_):
    """Rewards of the text alone, some without a score (None is NaN in TRL)."""
    totals = [sum(map(len, text.split())) for text in completions]
    return [None if total % 7 == 3 else float(total % 5) for total in totals]


class Observed(TrainerCallback):
    """Keeps the policy that samples, every update's mini-batch and policy before it, and its gradient."""

    def __init__(self, trainer):
        self.batches, self.updates = [], []
        generate, loss = trainer._generate_and_score_completions, trainer._compute_loss

        def generated(inputs):
            sampling, batch = weights(trainer.model), generate(inputs)
            # Before TRL shuffles it.
            self.batches.append({**batch, "rewards": trainer._rewards, "policy": sampling})
            return batch

        def computed(model, inputs):
            self.updates.append({"part": inputs, "rollouts": self.batches[-1], "policy": weights(trainer.model)})
            return loss(model, inputs)

        trainer._generate_and_score_completions, trainer._compute_loss = generated, computed

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.updates[-1]["gradient"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def rows(batch):
    """The ids of each sequence without padding: prompt and response."""
    for row in range(len(batch["prompt_ids"])):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        yield prompt.tolist(), batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()


def advantages(batch):
    """Of every sequence of a batch of rollouts, by its ids; whitened over the tokens of those with a score."""
    raw, tokens = {}, []
    for row, (prompt, response) in enumerate(rows(batch)):
        key, reward = (*prompt, -1, *response), float(batch["rewards"][row])
        if reward != reward:
            raw[key] = None
            continue
        v = [*batch["values"][row, : len(response)].double().tolist(), 0.0]
        deltas = [(reward if t == len(response) - 1 else 0.0) + GAMMA * v[t + 1] - v[t] for t in range(len(response))]
        raw[key] = [
            sum((GAMMA * LAMBDA) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))
        ]
        tokens += raw[key]
    chosen = torch.tensor(tokens, dtype=torch.float64)
    mean, spread = chosen.mean(), chosen.std(correction=0)
    return {
        key: torch.zeros(len(key) - key.index(-1) - 1, dtype=torch.float64)
        if found is None
        else (torch.tensor(found, dtype=torch.float64) - mean) / spread
        for key, found in raw.items()
    }


def log_probs(model, prompt, response):
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def expected_gradient(now, sampling, batch, of_sequence, tokens):
    """Of the mean clipped surrogate (arXiv 1707.06347, eq. 7); and how many tokens are flat and how many are not."""
    losses, flat, steep = [], 0, 0
    for prompt, response in rows(batch):
        advantage = of_sequence[(*prompt, -1, *response)]
        with torch.no_grad():
            old = log_probs(sampling, prompt, response)
        ratio = (log_probs(now, prompt, response) - old).exp()
        # Case by case: a token's objective is flat once its ratio has gone further than the clip in its direction.
        gone = ((advantage > 0) & (ratio > 1 + CLIP)) | ((advantage < 0) & (ratio < 1 - CLIP))
        limit = torch.where(advantage > 0, 1 + CLIP, 1 - CLIP)
        terms = torch.where(gone, limit, ratio) * advantage
        losses.append(-terms.sum() / (tokens or len(response) * len(batch["prompt_ids"])))
        flat += int(gone.sum())
        steep += int((~gone & (advantage != 0) & ((ratio - 1).abs() > 0.02)).sum())
    now.zero_grad()
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in now.named_parameters() if p.grad is not None}, flat, steep


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean"])
@pytest.mark.slow
def test_every_update_has_the_gradient_of_the_clipped_surrogate(tmp_path, aggregation):
    """Two steps of two mini-batches, each used twice: ratios of 1 first, then some beyond the clip."""
    trainer = make_trainer(
        tmp_path,
        tiny_model("qwen3", layers=2),
        method="ppo",
        aggregation=aggregation,
        temperature=TEMPERATURE,
        **{"gamma": GAMMA, "gae_lambda": LAMBDA, "critic_learning_rate": 1e-2, "max_grad_norm": 0.0},
        **{"max_steps": 8, "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 12},
        **{"learning_rate": 3e-3, "epsilon": CLIP},
    )
    trainer.reward_funcs = [scores]
    observed = Observed(trainer)
    trainer.add_callback(observed)
    trainer.train()
    # TRL wraps the forward of its own model.
    now, sampling = (tiny_model("qwen3", layers=2).double().eval() for _ in range(2))
    flat, steep = [], []
    for update in observed.updates:
        rollouts = update["rollouts"]
        assert update["part"]["advantages"].shape == update["part"]["completion_ids"].shape
        now.load_state_dict(update["policy"])
        sampling.load_state_dict(rollouts["policy"])
        # TRL divides by the tokens of all rollouts, shared out evenly among the mini-batches.
        tokens = int(rollouts["completion_mask"].sum()) / 2 if aggregation == "token-mean" else None
        expected, *counts = expected_gradient(now, sampling, update["part"], advantages(rollouts), tokens)
        assert update["gradient"].keys() == expected.keys()
        ours, exact = (torch.cat([of[n].double().flatten() for n in expected]) for of in (update["gradient"], expected))
        assert float((ours - exact).norm() / exact.norm()) < FLOAT32
        flat.append(counts[0])
        steep.append(counts[1])
    # The first update of each step has ratios of 1; later ones have some on either side of the clip.
    assert (flat[::4], steep[::4]) == ([0, 0], [0, 0])
    assert min(flat[1:4] + flat[5:]) > 0
    assert min(steep[1:4] + steep[5:]) > 0
    for rollouts in observed.batches:
        assert all(len(rollouts[f"{kind}_mask"].sum(dim=1).unique()) > 1 for kind in ("prompt", "completion"))
    assert any(rollouts["rewards"].isnan().any() for rollouts in observed.batches)
    assert observed.batches[1]["values"].abs().max() > 0.1
