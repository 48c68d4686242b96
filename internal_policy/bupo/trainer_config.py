"""The settings of a training run: TRL's, and ours on top."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from trl import GRPOConfig

from internal_policy.bupo.config import AGGREGATIONS, AUTO, METHODS, SITES, Site
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError

_LOSS_TYPES = {"sequence-mean": "grpo", "token-mean": "dapo"}
# TRL refuses another one only in the first update.
_TRLS_LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")

_WRONG_IN_PHASE_ONE = {
    "beta": (0.0, "the KL penalty would compare log-probabilities of pi^l with those of the reference's final policy"),
    "off_policy_mask_threshold": (
        None,
        "the mask would compare log-probabilities of pi^l with those of the policy that sampled",
    ),
    "top_entropy_quantile": (1.0, "the tokens would be chosen by the entropy of pi^l, not of the policy"),
    "entropy_coef": (0.0, "the bonus would raise the entropy of pi^l, not of the policy"),
    "use_adaptive_entropy": (False, "the controller would follow the entropy of pi^l, not of the policy"),
}


@dataclass
class BuPOConfig(GRPOConfig):  # type: ignore[misc]  # trl has no types
    """Settings of ``BuPOTrainer``: every option of ``trl.GRPOConfig``, and those of internal policies.

    A *step* is one batch of rollouts with all updates on it, as in the paper; TRL's ``max_steps``, ``save_steps`` and
    the like count updates, of which a step has ``updates_per_step``.
    """

    method: str = field(default="bupo", metadata={"help": "bupo, grpo, rloo or reinforce++."})
    """Which advantages, and whether an internal policy comes first: bupo, grpo, rloo, reinforce++."""
    layer: int | None = field(default=None, metadata={"help": "Layer whose policy is optimised first, from 1."})
    """l, from 1: the layer whose policy is optimised in the first phase; also the mark for ``upper_lr_scale``."""
    ipa_steps: int | str = field(default=0, metadata={"help": "Steps of the first phase, or auto."})
    """Steps of internal policy alignment; ``auto`` ends it by its own dynamics, at half of the run at the latest."""
    ipa_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the first phase."})
    """Learning rate in the first phase, with the same schedule; ``learning_rate`` where not given."""
    site: Site = field(default="layer", metadata={"help": "layer, attn or ffn."})
    """What is projected: the layer's output, or what its attention or its FFN writes."""
    lens: Lens = field(default="policy", metadata={"help": "policy (no final norm) or logit-lens."})
    """``policy`` as the paper; ``logit-lens`` applies the final norm (the paper's ablation)."""
    aggregation: str | None = field(default=None, metadata={"help": "sequence-mean (eq. 3) or token-mean."})
    """Mean of the loss: over sequences of their token means (arXiv 2512.19673v3, eq. 3), or over all tokens."""
    loss_type: str | None = field(default=None, metadata={"help": "TRL's loss_type, in place of aggregation."})
    """TRL's own name of a loss, in place of ``aggregation``."""
    freeze_layers: int = field(default=0, metadata={"help": "Freeze the embedding and layers 1..n."})
    """Layers 1..n and an untied embedding get no update (the baseline of appendix B.2)."""
    upper_lr_scale: float = field(default=1.0, metadata={"help": "Factor on the learning rate above the layer."})
    """Factor on the learning rate of layers above ``layer`` (the baseline of appendix B.2: 0.1)."""
    entropy_sequences: int = field(default=64, metadata={"help": "Rollouts of a step that policy_entropy is from."})
    """Entropy of pi_theta is measured on so many rollouts of each step, over all processes; 0 leaves it out."""
    ddp_find_unused_parameters: bool | None = field(default=None, metadata={"help": "On where there is a first phase."})
    """DDP's search for parameters without gradient: on where there is a first phase, unless it is set."""
    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 mixed precision; on cuda by default."})
    """bfloat16 mixed precision; by default where cuda has it."""

    def __post_init__(self) -> None:
        """Complete the settings and refuse those that would train something else than they say.

        Raises:
            UserError: a value out of range, or an option that has no meaning for an internal policy.
        """
        one_of("method", self.method, METHODS)
        one_of("site", self.site, SITES)
        one_of("lens", self.lens, get_args(Lens))
        if self.loss_type is None:
            self.aggregation = self.aggregation or "sequence-mean"
            one_of("aggregation", self.aggregation, AGGREGATIONS)
            self.loss_type = _LOSS_TYPES[self.aggregation]
        elif self.aggregation is not None and self.loss_type != _LOSS_TYPES.get(self.aggregation):
            raise UserError(
                f"both aggregation={self.aggregation!r} and loss_type={self.loss_type!r} were given; give one of them"
            )
        one_of("loss_type", self.loss_type, _TRLS_LOSS_TYPES)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.aligns:
            if self.ddp_find_unused_parameters is None:
                # In the first phase no gradient reaches the layers above l.
                self.ddp_find_unused_parameters = True
            self._refuse_what_alignment_would_make_wrong()
        super().__post_init__()
        self._check_steps()

    @property
    def aligns(self) -> bool:
        """Whether there is a first phase."""
        return self.method == "bupo" and self.ipa_steps != 0

    @property
    def alignment_rate(self) -> float:
        """Learning rate of the first phase, as a multiple of the second's."""
        if not self.aligns or self.ipa_learning_rate is None:
            return 1.0
        return float(self.ipa_learning_rate / self.learning_rate)

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates on one batch of rollouts."""
        per_rollout = self.steps_per_generation * self.num_iterations
        return max(1, int(per_rollout // self.gradient_accumulation_steps))

    def _refuse_what_alignment_would_make_wrong(self) -> None:
        for name, (neutral, why) in _WRONG_IN_PHASE_ONE.items():
            if getattr(self, name) != neutral:
                raise UserError(
                    f"{name}={getattr(self, name)!r} with an internal policy: in the first phase {why}; "
                    f"leave it out, or set ipa_steps=0"
                )
        if self.use_vllm and self.vllm_importance_sampling_correction:
            raise UserError(
                "vllm_importance_sampling_correction=True with an internal policy: in the first phase the correction "
                "would compare log-probabilities of pi^l with those of the sampler's final policy; "
                "pass vllm_importance_sampling_correction=False, or set ipa_steps=0"
            )
        if self.loss_type == "vespo":
            raise UserError(
                "loss_type='vespo' with an internal policy: its weights correct for the policy that sampled, which is "
                "not pi^l; use sequence-mean or token-mean, or set ipa_steps=0"
            )
        if self.router_aux_loss_coef:
            raise UserError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} with an internal policy: in the first phase the "
                "loss would balance the experts of layers 1..l only; set it to 0, or set ipa_steps=0"
            )
        reentrant = (self.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.gradient_checkpointing and reentrant and self.site != "layer":
            raise UserError(
                f"use_reentrant=True with site={self.site!r}: no gradient would reach the module inside a layer; "
                "use non-reentrant gradient checkpointing"
            )

    def _check_steps(self) -> None:
        if self.method == "bupo" and self.layer is None and self.ipa_steps != 0:
            raise UserError("method='bupo' without layer; give the layer whose policy comes first, from 1")
        if isinstance(self.ipa_steps, str):
            one_of("ipa_steps", self.ipa_steps, (AUTO,), "a number of steps or auto")
        elif isinstance(self.ipa_steps, bool) or self.ipa_steps < 0:
            raise UserError(f"ipa_steps is {self.ipa_steps!r}; needed is a number of steps of at least 0, or auto")
        if self.ipa_learning_rate is not None and (self.ipa_learning_rate < 0 or not self.learning_rate > 0):
            raise UserError(
                f"ipa_learning_rate is {self.ipa_learning_rate} and learning_rate {self.learning_rate}; needed are a "
                "rate of at least 0 and, as it follows the same schedule, a learning_rate above 0"
            )
        if self.ipa_learning_rate is not None and self.deepspeed_plugin is not None:
            raise UserError(
                "ipa_learning_rate under DeepSpeed: its engine steps before the rate of the first phase can be set; "
                "leave it out, or use DDP or FSDP"
            )
        if self.aligns and self.layer is not None and self.freeze_layers and self.freeze_layers >= self.layer:
            raise UserError(
                f"freeze_layers is {self.freeze_layers} and layer {self.layer}: the first phase would have nothing to "
                "train below the head; freeze fewer layers, or use method='grpo' (the baseline of appendix B.2)"
            )
        if self.method in ("rloo", "reinforce++"):
            for name, usual in (("scale_rewards", "group"), ("multi_objective_aggregation", "sum_then_normalize")):
                if getattr(self, name) != usual:
                    raise UserError(
                        f"{name}={getattr(self, name)!r} with method={self.method!r}, whose advantages have a scale of "
                        "their own; leave it out"
                    )
        if self.method != "bupo" and self.ipa_steps != 0:
            raise UserError(f"ipa_steps={self.ipa_steps} with method={self.method!r}; only bupo has a first phase")
        per_rollout = self.steps_per_generation * self.num_iterations
        longer, shorter = (
            max(per_rollout, self.gradient_accumulation_steps),
            min(per_rollout, self.gradient_accumulation_steps),
        )
        if longer % shorter:
            raise UserError(
                f"steps_per_generation * num_iterations is {per_rollout} and gradient_accumulation_steps is "
                f"{self.gradient_accumulation_steps}; one must be a multiple of the other, so that no update mixes "
                "rollouts of two steps"
            )
        if self.max_steps > 0 and isinstance(self.ipa_steps, int):
            total = self.max_steps / self.updates_per_step
            if self.ipa_steps > total:
                raise UserError(
                    f"ipa_steps is {self.ipa_steps} and the run has {total:g} steps; needed is at most that many"
                )
        for name in ("freeze_layers", "entropy_sequences"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; needed is at least 0")
        if self.upper_lr_scale < 0 or (self.upper_lr_scale != 1.0 and self.layer is None):
            raise UserError(
                f"upper_lr_scale is {self.upper_lr_scale} and layer {self.layer}; "
                "needed is a factor of at least 0 and the layer above which it holds"
            )


def one_of(name: str, value: Any, choices: tuple[str, ...], needed: str | None = None) -> None:
    """Check a choice.

    Args:
        name: the option.
        value: what was given.
        choices: what there is.
        needed: how to say it, where the choices are not all.

    Raises:
        UserError: another value.
    """
    if value not in choices:
        raise UserError(f"{name} is {value!r}; needed is {needed or 'one of ' + ', '.join(choices)}")
