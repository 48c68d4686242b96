"""PPO's critic: a value model with its own optimiser, and the advantages of tokens that follow from it.

The value V(s_t) is that of the prompt and the response before token t, so it is read from the state from which the
policy predicts token t. Responses end at their last token, also where ``max_completion_length`` cut them off: no value
follows it, and the reward of the whole response is given there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from internal_policy.utils.io import write_atomically

CRITIC = "critic"
"""Directory of the critic in a checkpoint."""
_WEIGHTS = "critic.safetensors"
_OPTIMIZER = "optimizer.pt"
_NO_VARIANCE = 1e-8


class Critic(nn.Module):
    """A value model: a copy of a policy's decoder, with a linear head of one output for every token.

    The head starts at zero, so that the first values are zero and the first advantages are the returns. Random weights
    would add noise that has nothing to do with the reward, of the size of the decoder's states. The decoder learns from
    the second update, when the head is no longer zero.
    """

    def __init__(self, policy: nn.Module, *, positions_from_mask: bool = False) -> None:
        """Copy the decoder of a policy.

        Args:
            policy: a causal LM of transformers, without wrappers and adapters; it is not changed.
            positions_from_mask: whether the decoder has to be given the positions of the tokens, since its states
                depend on the number of padding tokens before the prompt.
        """
        super().__init__()
        module: Any = policy
        weight = module.get_output_embeddings().weight
        self.decoder: Any = copy.deepcopy(module.base_model)
        self.value_head = nn.Linear(weight.shape[1], 1, device=weight.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self._positions_from_mask = positions_from_mask
        # Layers that are frozen in the policy are trained here.
        self.requires_grad_(True)
        # Without dropout, so that old and new values differ only by the updates.
        self.eval()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the layers' activations in the backward pass instead of storing them."""
        usual = self.decoder.gradient_checkpointing_enable
        getattr(self.decoder, "activation_checkpointing_enable", usual)()
        for module in self.decoder.modules():
            if getattr(module, "gradient_checkpointing", False):
                # transformers checkpoints only layers in training mode. Modules inside them remain without dropout.
                module.training = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor, n_response: int) -> Tensor:
        """Compute the values of the states before each response token.

        Args:
            input_ids: [N, P + T], prompts padded on the left and responses padded on the right.
            attention_mask: [N, P + T].
            n_response: T, the number of response positions.

        Returns:
            [N, T] float32.
        """
        more = {}
        if self._positions_from_mask:
            more["position_ids"] = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        found = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **more)
        states = found.last_hidden_state[:, -n_response - 1 : -1]
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = self.value_head(states.float()).squeeze(-1)
        return values


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> Tensor:
    r"""Compute the advantage of every response token: A_t = sum_k (gamma lambda)^k delta_(t+k).

    Here delta_t = r_t + gamma V(s_(t+1)) - V(s_t), and the value after the last token is 0. With gamma = lambda = 1,
    A_t is the sum of the rewards from t on, less V(s_t).

    Args:
        rewards: [N, T], the reward of each token.
        values: [N, T], V(s_t) of the state before each token.
        mask: [N, T], 1 at response tokens. Others are no actions: neither their reward nor their value counts, and the
            token after them follows the one before them.
        gamma: discount.
        lam: lambda, the share of the later differences.

    Returns:
        [N, T]; 0 where the mask is 0.

    Source: Schulman et al., arXiv 1506.02438, eqs. 16 to 18.
    """
    advantages = torch.zeros_like(values)
    later_value, later = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        acts = mask[:, t].bool()
        current = rewards[:, t] + gamma * later_value - values[:, t] + gamma * lam * later
        advantages[:, t] = current.where(acts, advantages[:, t])
        later, later_value = current.where(acts, later), values[:, t].where(acts, later_value)
    return advantages


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Compute half the squared error of each value, the larger one of the value and of the clipped value.

    The clipped value is at most ``clip`` away from the value at the time of sampling, so that a value which has moved
    that far towards its return is not moved further by this batch. A ``clip`` of 0 stands for no clipping.

    Args:
        values: [...], the present values.
        old_values: [...], the values at the time of sampling.
        returns: [...], their targets.
        clip: largest change of a value on one batch of rollouts, in units of the reward.

    Returns:
        [...].

    Source: the value loss of arXiv 1707.06347, eq. 9, with the clipping of its authors' code (arXiv 2005.12729, section
    3).
    """
    error = (values - returns) ** 2
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * error


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale advantages [N, T] to mean 0 and variance 1 over the tokens of the mask; 0 elsewhere."""
    mean, variance = _moments(advantages, mask)
    return (advantages - mean) / (variance + _NO_VARIANCE).sqrt() * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return the share of the returns' variance that the values explain, 1 - Var(R - V) / Var(R), over the mask.

    1 for exact values, 0 for a constant, below 0 if the values are worse than a constant; NaN if all returns are equal.
    """
    _, total = _moments(returns, mask)
    _, rest = _moments(returns - values, mask)
    return float(1 - rest / total) if float(total) > 0 else float("nan")


def rewards_at_the_end(rewards: Tensor, mask: Tensor) -> Tensor:
    """Put the reward [N] of each response at its last token: [N, T], zero elsewhere and for a response without tokens.

    A response without a score (NaN) has zeros only.
    """
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask.bool()
    is_last = (places == places.amax(dim=1, keepdim=True)) & mask.bool()
    return rewards.nan_to_num(nan=0.0)[:, None] * is_last


def _moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    total = mask.sum().clamp(min=1)
    mean = (x * mask).sum() / total
    return mean, ((x - mean) ** 2 * mask).sum() / total


class CriticTraining:
    """The critic with its AdamW: values and advantages of a batch of rollouts, and updates on its mini-batches."""

    def __init__(self, critic: Critic, args: Any, decayed: set[str], autocast: Callable[[], Any]) -> None:
        """Make the optimiser.

        Args:
            critic: on the device of the training.
            args: the ``BuPOConfig``, whose settings of AdamW and of gradient clipping apply here too.
            decayed: names of the parameters that weight decay applies to.
            autocast: makes the context of the forward passes.
        """
        self.critic = critic
        self._args = args
        self._autocast: Callable[[], AbstractContextManager[Any]] = autocast
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in critic.named_parameters():
            groups[name in decayed].append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": args.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=args.critic_learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        self._loss = 0.0

    @torch.no_grad()
    def add_advantages(self, batch: dict[str, Any], rewards: Tensor) -> float:
        """Replace the advantages of a batch of rollouts by those of its tokens, and add what the updates need.

        Args:
            batch: TRL's batch of rollouts; changed in place.
            rewards: [N], NaN without a score: such a response has no advantage, and the critic does not learn from it.

        Returns:
            The explained variance of the values.
        """
        size = self._args.per_device_train_batch_size
        keys = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        parts = zip(*(batch[key].split(size) for key in keys), strict=True)
        values = torch.cat([self._values(dict(zip(keys, part, strict=True))) for part in parts])
        mask = (batch["completion_mask"] * batch.get("tool_mask", 1) * rewards.isfinite()[:, None]).to(values)
        gamma, lam = self._args.gamma, self._args.gae_lambda
        advantages = generalized_advantages(rewards_at_the_end(rewards.to(values), mask), values, mask, gamma, lam)
        returns = advantages + values
        batch["advantages"] = whitened(advantages, mask)
        batch |= {"values": values, "returns": returns, "value_mask": mask, "n_values": mask.sum()}
        return explained_variance(values, returns, mask)

    def accumulate_gradients(self, inputs: dict[str, Any], accumulation_steps: int) -> None:
        """Add the gradient of the value loss on a part of a mini-batch: a mean over all tokens of an update."""
        loss = clipped_value_loss(self._values(inputs), inputs["values"], inputs["returns"], self._args.value_clip)
        # The tokens of an update, as TRL counts them: those of the rollouts, shared out evenly.
        tokens = inputs["n_values"].clamp(min=1.0) * accumulation_steps / self._args.steps_per_generation
        loss = (loss * inputs["value_mask"]).sum() / tokens
        loss.backward()
        self._loss += float(loss.detach())

    def update(self, schedule: float) -> tuple[float, float]:
        """Take one step, with ``schedule`` times the learning rate; return the value loss and the gradient's norm."""
        longest = self._args.max_grad_norm or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.critic.parameters(), longest))
        for group in self.optimizer.param_groups:
            group["lr"] = self._args.critic_learning_rate * schedule
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss, self._loss = self._loss, 0.0
        return loss, norm

    def save(self, checkpoint: Path) -> None:
        """Write the critic and the state of its optimiser into a checkpoint."""
        directory = checkpoint / CRITIC
        directory.mkdir(exist_ok=True)
        write_atomically(directory / _WEIGHTS, lambda path: save_model(self.critic, str(path)))
        write_atomically(directory / _OPTIMIZER, lambda path: torch.save(self.optimizer.state_dict(), path))

    def load(self, checkpoint: Path) -> None:
        """Read what ``save`` wrote."""
        directory = checkpoint / CRITIC
        load_model(self.critic, directory / _WEIGHTS, device=str(self.critic.value_head.weight.device))
        state = torch.load(directory / _OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)

    def _values(self, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with self._autocast():
            values: Tensor = self.critic(ids, mask, inputs["completion_ids"].size(1))
        return values
