"""``BuPOTrainer``: a ``trl.GRPOTrainer`` whose ratio is that of an internal policy in the first phase.

TRL computes every log-probability in one method, from the state that the backbone passes to the head. For a batch of
the first phase, that method runs with a decoder that ends at layer l and a head that scores the response in blocks;
everything else (sampling, rewards, clipping, schedules, logging, checkpoints) is TRL's.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOTrainer

from internal_policy.bupo.checks import (
    check_critic,
    check_experts,
    check_head,
    depends_on_absolute_positions,
    prove_family,
    warn_of_dropout,
)
from internal_policy.bupo.config import AUTO
from internal_policy.bupo.critic import Critic, CriticTraining
from internal_policy.bupo.forward import needs_streamed_head, positions_from_mask, streamed_head
from internal_policy.bupo.trainer_config import BuPOConfig
from internal_policy.extractors.truncated import check_layer, internal_forward
from internal_policy.models import Family, eval_mode
from internal_policy.utils.citation import PAPER
from internal_policy.utils.errors import UserError

_NO_VARIANCE = 1e-8
_PHASE = "aligns"
"""Key of a batch of rollouts: whether its log-probabilities are those of the internal policy."""


class BuPOTrainer(GRPOTrainer):  # type: ignore[misc]  # trl has no types
    """GRPO, RLOO, REINFORCE++, PPO, or BuPO: internal policy alignment first, then GRPO.

    The phase of a batch of rollouts is determined when it is sampled, from ``state.global_step``, and stays the same
    for all its updates, so that old and new log-probabilities are always of the same policy.

    Source: arXiv 2512.19673v3, eqs. 3, 9 and 10.
    """

    args: BuPOConfig

    # TRL writes these into the model card of a checkpoint.
    _name = "BuPO"
    _tag_names = ("trl", "bupo")
    _paper: ClassVar[dict[str, str]] = {
        "title": "Bottom-up Policy Optimization: Your Language Model Policy Secretly Contains Internal Policies",
        "id": "2512.19673",
        "citation": PAPER,
    }

    def __init__(self, *args: Any, family: Family | None = None, **kwargs: Any) -> None:
        """Make the trainer with the arguments of ``trl.GRPOTrainer`` and a ``BuPOConfig``.

        Args:
            *args: those of ``trl.GRPOTrainer``.
            family: where the model's parts are, already verified; by default it is determined and verified here.
            **kwargs: those of ``trl.GRPOTrainer``.

        Raises:
            UserError: a model whose parts cannot be found or verified, a layer that it does not have, or logits that
                TRL computes differently from the model.
        """
        super().__init__(*args, **kwargs)
        self._aligning = self._measuring = False
        self._rewards: Tensor | None = None
        # Entropies of pi_theta from the passes over fresh rollouts, while these are being made.
        self._rollout_entropies: list[Tensor] | None = None
        self.last_aligned = False
        """Whether the newest batch of rollouts belongs to the first phase."""
        self.alignment_ended = False
        """With ``ipa_steps="auto"``: whether the dynamics have ended the first phase."""
        check_experts(self.args, self.policy_module.config)
        given = {name: getattr(self.args, name) for name in ("layer", "freeze_layers", "only_layer")}
        # No layer is frozen with freeze_layers=0.
        named = {name: n for name, n in given.items() if n is not None and (n or name != "freeze_layers")}
        self._family = family
        if named:
            self._family = family or prove_family(self.policy_module, self.processing_class)
        for name, layer in named.items():
            check_layer(layer, len(self._layers), name)
        check_head(self.policy_module, self.temperature)
        self._positions_from_mask = depends_on_absolute_positions(self.policy_module)
        self._has_dropout = warn_of_dropout(self.policy_module)
        self.critic_training: CriticTraining | None = self._make_critic() if self.args.method == "ppo" else None
        """With ``method="ppo"``: the critic and its optimiser."""
        self._freeze()
        if self.args.alignment_rate != 1.0:
            self.add_callback(_AlignmentRate(self))
        if self.critic_training is not None:
            self.add_callback(_CriticUpdate(self, self.critic_training))

    @property
    def policy_module(self) -> nn.Module:
        """The causal LM, without wrappers and adapters around it."""
        return self._unwrap(self.model)

    def _unwrap(self, model: Any) -> nn.Module:
        model = self.accelerator.unwrap_model(model)
        base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base

    @property
    def in_alignment(self) -> bool:
        """Whether rollouts that are sampled now belong to the first phase (s_cur of eq. 10)."""
        if not self.args.aligns:
            return False
        step = self.state.global_step // self.args.updates_per_step
        if self.args.ipa_steps == AUTO:
            return not self.alignment_ended and step < self.state.max_steps // self.args.updates_per_step // 2
        return bool(step < int(self.args.ipa_steps))

    @property
    def _layers(self) -> nn.ModuleList:
        assert self._family is not None
        layers: nn.ModuleList = operator.attrgetter(self._family.layers)(self.policy_module)
        return layers

    def _freeze(self) -> None:
        module: Any = self.policy_module
        if self.args.only_layer is not None:
            trained = {id(p) for p in self._layers[self.args.only_layer - 1].parameters()}
            for parameter in module.parameters():
                if id(parameter) not in trained:
                    parameter.requires_grad_(False)
        if not self.args.freeze_layers:
            return
        tied = module.get_output_embeddings().weight
        # This includes learned positions.
        embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding) and m.weight is not tied]
        for part in [*list(self._layers)[: self.args.freeze_layers], *embeddings]:
            part.requires_grad_(False)

    def _make_critic(self) -> CriticTraining:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        adapters = hasattr(self.accelerator.unwrap_model(self.model), "get_base_model")
        check_critic(self.accelerator.num_processes, sharded=sharded, adapters=adapters)
        critic = Critic(self.policy_module, positions_from_mask=self._positions_from_mask).to(self.accelerator.device)
        if self.args.gradient_checkpointing:
            critic.enable_gradient_checkpointing()
        decayed = set(self.get_decay_parameter_names(critic))
        return CriticTraining(critic, self.args, decayed, self.accelerator.autocast)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.critic_training is not None and not self.args.save_only_model:
            checkpoint = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            self.critic_training.save(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.critic_training is not None and checkpoint is not None:
            self.critic_training.load(Path(checkpoint))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make TRL's optimiser, with ``upper_lr_scale`` times its learning rate for the layers above ``layer``."""
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self.args.upper_lr_scale != 1.0:
            above = self._layers[self.args.layer :]
            upper = {id(p) for layer in above for p in layer.parameters()}
            for group in list(optimizer.param_groups):
                chosen = [p for p in group["params"] if id(p) in upper]
                group["params"] = [p for p in group["params"] if id(p) not in upper]
                scaled = {**group, "params": chosen, "lr": group["lr"] * self.args.upper_lr_scale}
                if chosen:
                    optimizer.add_param_group(scaled)
        return optimizer

    def log_metric(self, name: str, value: float) -> None:
        """Add a number to the log of the current step, and thus to the integrations of ``report_to``."""
        self._metrics["train"][name].append(value)

    @contextmanager
    def _policy(self, aligning: bool, measuring: bool = False) -> Iterator[None]:
        before = self._aligning, self._measuring
        self._aligning, self._measuring = aligning, measuring
        try:
            yield
        finally:
            self._aligning, self._measuring = before

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            bare = self._unwrap(model)
            if self._positions_from_mask:
                # For the reference model too, whose log-probabilities this method computes as well.
                stack.enter_context(positions_from_mask(bare))
            if self._aligning:
                if self.args.layer is None:
                    raise UserError("an internal policy without layer; give the layer, from 1")
                options: dict[str, Any] = {"site": self.args.site, "lens": self.args.lens, "family": self._family}
                stack.enter_context(internal_forward(self.policy_module, self.args.layer, **options))
            # An update of the second phase is exactly TRL's.
            if (self._aligning or self._measuring) and self._family is not None and needs_streamed_head(bare):
                stack.enter_context(
                    streamed_head(
                        bare,
                        self._family,
                        self.temperature,
                        entropy=bool(kwargs.get("compute_entropy")),
                        in_float32=self.args.cast_lm_head_to_fp32,
                    )
                )
            # The head of a reference model gives no entropies.
            entropies = None if self._aligning or bare is not self.policy_module else self._rollout_entropies
            if entropies is not None:
                # TRL's head computes them in any case.
                kwargs["compute_entropy"] = True
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            if entropies is not None:
                entropies.append(found[1])
            return found

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        per_function: Tensor = super()._calculate_rewards(*args, **kwargs)
        unscored = per_function.isnan().all(dim=1)
        total = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        self._rewards = total.masked_fill(unscored, torch.nan)
        return per_function

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        training = self.model.training
        aligning = training and self.in_alignment
        self._rollout_entropies = [] if training else None
        try:
            with self._policy(aligning):
                batch = super()._generate_and_score_completions(inputs)
            entropies = self._rollout_entropies or []
        finally:
            self._rollout_entropies = None
        batch[_PHASE] = torch.tensor(aligning)
        if training:
            self.last_aligned = aligning
            self.log_metric(_PHASE, float(aligning))
            self._set_advantages(batch)
            # The first pass computes the old log-probabilities, before those of a reference.
            known = entropies[0] if entropies and "old_per_token_logps" in batch and not self._has_dropout else None
            self._measure_policy_entropy(batch, known)
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        # TRL computes importance ratio, clipping and mean (eq. 9), here of the policy that the rollouts belong to.
        if self.critic_training is not None and self.model.training:
            # Before the policy's forward pass, so that only one of the two graphs is held at a time.
            self.critic_training.accumulate_gradients(inputs, self.current_gradient_accumulation_steps)
        with self._policy(bool(inputs[_PHASE])):
            loss: Tensor = super()._compute_loss(model, inputs)
        return loss

    def _set_advantages(self, batch: dict[str, Any]) -> None:
        if self.args.method in ("bupo", "grpo"):
            return
        assert self._rewards is not None
        if self.critic_training is not None:
            self.log_metric("explained_variance", self.critic_training.add_advantages(batch, self._rewards))
            # A response's mean over its tokens, for the table of completions.
            self._log_advantages(batch["advantages"].sum(dim=1) / batch["value_mask"].sum(dim=1).clamp(min=1))
            return
        if self.args.method == "rloo":
            advantages = leave_one_out_advantages(self._rewards, self.num_generations)
        else:
            mask = batch["completion_mask"] * batch.get("tool_mask", 1)
            advantages = whitened_advantages(self._rewards, self.accelerator.gather(mask.sum(dim=1)))
        local = len(batch["prompt_ids"])
        start = self.accelerator.process_index * local
        batch["advantages"] = advantages[start : start + local].to(batch["advantages"])
        self._log_advantages(advantages)

    def _log_advantages(self, advantages: Tensor) -> None:
        """Replace GRPO's advantages, which TRL has logged for its table of completions."""
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())

    @torch.no_grad()
    def _measure_policy_entropy(self, batch: dict[str, Any], known: Tensor | None) -> None:
        """Log the entropy of pi_theta, which the passes of the first phase do not compute."""
        if not self.args.entropy_sequences:
            return
        n = len(batch["prompt_ids"])
        wanted = min(n, -(-self.args.entropy_sequences // self.accelerator.num_processes))
        # Evenly spaced over the batch, because responses to one prompt are adjacent.
        rows = torch.linspace(0, n - 1, wanted, device=batch["prompt_ids"].device).round().long()
        prompt_mask, mask = batch["prompt_mask"][rows], batch["completion_mask"][rows]
        if known is not None:
            entropies = known[rows]
        else:
            # Without dropout, so that a measurement draws no random numbers of the training.
            with self._policy(False, measuring=True), eval_mode(self.model):
                _, entropies, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([batch["prompt_ids"][rows], batch["completion_ids"][rows]], dim=1),
                    torch.cat([prompt_mask, mask], dim=1),
                    mask.size(1),
                    batch_size=self.args.per_device_train_batch_size,
                    compute_entropy=True,
                )
        mask = mask * batch["tool_mask"][rows] if "tool_mask" in batch else mask
        sums = torch.stack([(entropies * mask).sum(), mask.sum().to(entropies.dtype)])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self.log_metric("policy_entropy", total / max(count, 1.0))


class _AlignmentRate(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Gives the updates of the first phase their own learning rate, without changing the schedule."""

    def __init__(self, trainer: BuPOTrainer) -> None:
        self._trainer = trainer
        self._rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the rates for one update."""
        groups = kwargs["optimizer"].param_groups
        self._rates = [group["lr"] for group in groups] if self._trainer.last_aligned else []
        for group, rate in zip(groups, self._rates, strict=False):
            group["lr"] = rate * self._trainer.args.alignment_rate

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the rates."""
        for group, rate in zip(kwargs["optimizer"].param_groups, self._rates, strict=False):
            group["lr"] = rate


class _CriticUpdate(TrainerCallback):  # type: ignore[misc]  # transformers is not typed here
    """Updates the critic whenever the policy is updated, with the same schedule of the learning rate."""

    def __init__(self, trainer: BuPOTrainer, critic_training: CriticTraining) -> None:
        self._trainer = trainer
        self._critic_training = critic_training

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the critic's step."""
        group = kwargs["optimizer"].param_groups[0]
        loss, norm = self._critic_training.update(group["lr"] / group["initial_lr"])
        self._trainer.log_metric("value_loss", loss)
        self._trainer.log_metric("critic_grad_norm", norm)


def leave_one_out_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Advantages [N] of RLOO: a response's reward less the mean reward of the other responses to its prompt.

    The rewards, [N], of the G = ``group_size`` responses to a prompt are adjacent, and NaN without a score. An
    advantage is 0 if the response has no score or no other response has one.

    Source: Ahmadian et al., arXiv 2402.14740, section 2.3.
    """
    groups = rewards.view(-1, group_size)
    others = groups.isfinite().sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others
    return torch.where(others > 0, groups - baseline, torch.zeros_like(groups)).nan_to_num(nan=0.0).view(-1)


def whitened_advantages(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Advantages [N] of REINFORCE++: the reward of each token, normalised over all response tokens of the batch.

    The rewards, [N], are NaN without a score; lengths, [N], are in tokens. All tokens of a response have the same
    advantage; it is 0 without a score.

    Source: Hu et al., arXiv 2501.03262, eq. 6 (its group-free form, without the penalty of beta).
    """
    weights = lengths.to(rewards.dtype) * rewards.isfinite()
    scores = rewards.nan_to_num(nan=0.0)
    total = weights.sum().clamp(min=1.0)
    mean = (weights * scores).sum() / total
    variance = (weights * (scores - mean) ** 2).sum() / total
    return torch.where(rewards.isfinite(), (scores - mean) / (variance + _NO_VARIANCE).sqrt(), torch.zeros_like(scores))
