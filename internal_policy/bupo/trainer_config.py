"""``BuPOConfig``: the settings of ``trl.GRPOConfig`` and of internal policies, and its construction from TrainConfig.

TRL counts updates and the samples of one process; ``TrainConfig`` counts steps and prompts.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from trl import GRPOConfig

from internal_policy.bupo.config import (
    AGGREGATIONS,
    AUTO,
    METHODS,
    POLICY_LENSES,
    PPO_DEFAULTS,
    PPO_OPTIONS,
    STEP_OPTIONS,
    TRL_BATCH_OPTIONS,
    PolicyLens,
    TrainConfig,
    check_values,
    refuse_ppo_options,
)
from internal_policy.models.options import SITES, Site
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.options import require_one_of

_LOSS_TYPES = {"sequence-mean": "grpo", "token-mean": "dapo"}
# TRL would refuse any other type only in the first update.
_TRL_LOSS_TYPES = ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
_CLIPPED_BY_TOKEN = ("grpo", "dapo", "bnpo", "dr_grpo")
"""Losses that differ only in how the clipped objective of the tokens is averaged."""
_USUAL_IN_PPO = {"importance_sampling_level": "token", "off_policy_mask_threshold": None}

_NEUTRAL_IN_ALIGNMENT = {
    "beta": (0.0, "the KL penalty would compare log-probabilities of pi^l with those of the reference's final policy"),
    "off_policy_mask_threshold": (
        None,
        "the mask would compare log-probabilities of pi^l with those of the policy that sampled",
    ),
    "top_entropy_quantile": (1.0, "the tokens would be chosen by the entropy of pi^l, not of the policy"),
    "entropy_coef": (0.0, "the bonus would raise the entropy of pi^l, not of the policy"),
    "use_adaptive_entropy": (False, "the controller would follow the entropy of pi^l, not of the policy"),
}
"""Options whose other values would be wrong in the first phase: the only value that is allowed, and why."""

_FIXED_OPTIONS = {
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step"), "the history has a row per step"),
    **dict.fromkeys(
        ("eval_strategy", "do_eval", "eval_steps", "eval_on_start", "load_best_model_at_end"),
        "the evaluation before and after the training is that of benchmark=",
    ),
    "shuffle_dataset": "the order of the prompts follows from the seed, so that a resumed run sees the same",
    "num_train_epochs": "the run has max_steps steps, over as many passes through the prompts as that takes",
    "disable_tqdm": "progress is shown where standard error is a terminal",
    "model_init_kwargs": "the keywords of `train` say how the model is loaded (dtype, revision, attn_implementation)",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        "a finished run is pushed by bupo.push_to_hub(run, repo_id) or `internal-policy push RUN --repo NAME`, without "
        "checkpoints and optimiser states",
    ),
    "resume_from_checkpoint": "a run is continued by the same call with the same output",
}
"""Options of transformers that `train` sets itself, and why."""
_SHARED_FIELDS = (
    *("method", "ipa_learning_rate", "site", "lens", "aggregation", "freeze_layers", "only_layer", "upper_lr_scale"),
    *("entropy_sequences", "seed", "learning_rate", "num_generations", "temperature"),
    *PPO_OPTIONS,
)
"""Fields of ``TrainConfig`` that ``BuPOConfig`` has under the same name and with the same meaning."""
_LARGEST_BATCH = {"cpu": 64, "cuda": 4}
_CHECKPOINTS_IN_A_RUN = 10
"""At most; a longer run has at least five and one at its end, which are enough to see a trend."""


@dataclass
class BuPOConfig(GRPOConfig):  # type: ignore[misc]  # trl has no types
    """Settings of ``BuPOTrainer``: every option of ``trl.GRPOConfig``, and those of internal policies.

    A *step* is one batch of rollouts with all updates on it, as in the paper; TRL's ``max_steps``, ``save_steps`` and
    the like count updates, of which a step has ``updates_per_step``. Fields that ``TrainConfig`` has too mean the same
    here.
    """

    method: str = "bupo"
    """bupo, grpo, rloo, reinforce++ or ppo: how advantages are computed, and whether an internal policy comes first."""
    layer: int | None = None
    """l, from 1: the layer whose policy is optimised in the first phase; ``upper_lr_scale`` applies above it."""
    ipa_steps: int | str = 0
    """Steps of internal policy alignment; ``auto`` ends it by its dynamics, halfway through the run at the latest."""
    ipa_learning_rate: float | None = None
    """Learning rate in the first phase, with the same schedule; None means ``learning_rate``."""
    site: Site = "layer"
    """What is projected: the layer's output, or the output of its attention (attn) or FFN (ffn)."""
    lens: PolicyLens = "policy"
    """``policy`` as in the paper; ``logit-lens`` applies the final norm (the paper's ablation)."""
    aggregation: str | None = None
    """How the loss is averaged: sequence-mean (arXiv 2512.19673v3, eq. 3) or token-mean."""
    loss_type: str | None = None
    """TRL's own name of a loss, instead of ``aggregation``."""
    freeze_layers: int = 0
    """Layers 1..n and an untied embedding are not updated (a baseline of appendix B.2)."""
    only_layer: int | None = None
    """Only this layer, from 1, is updated, not the others, embedding, head or final norm; at most ``layer`` while there
    is a first phase."""
    upper_lr_scale: float = 1.0
    """Factor on the learning rate of the layers above ``layer`` (a baseline of appendix B.2 uses 0.1)."""
    critic_learning_rate: float | None = None
    """With ``method="ppo"``: learning rate of the critic, under the same schedule; None means 1e-5."""
    gamma: float | None = None
    """With ``method="ppo"``: discount; None means 1."""
    gae_lambda: float | None = None
    """With ``method="ppo"``: lambda of generalised advantage estimation; None means 1."""
    value_clip: float | None = None
    """With ``method="ppo"``: largest change of a value on one batch of rollouts; None means 0.2, 0 no clipping."""
    entropy_sequences: int = 64
    """Rollouts of a step on which the entropy of pi_theta is measured, over all processes; 0 disables it."""
    ddp_find_unused_parameters: bool | None = None
    """DDP's search for parameters without gradient; by default on if there is a first phase."""
    bf16: bool | None = None
    """bfloat16 mixed precision; by default on if the GPU supports it."""

    def __post_init__(self) -> None:
        """Complete the settings, and refuse combinations that would not train what they describe."""
        require_one_of("method", self.method, METHODS)
        require_one_of("site", self.site, SITES)
        require_one_of("lens", self.lens, POLICY_LENSES)
        if self.loss_type is None:
            self.aggregation = self.aggregation or "sequence-mean"
            require_one_of("aggregation", self.aggregation, AGGREGATIONS)
            self.loss_type = _LOSS_TYPES[self.aggregation]
        elif self.aggregation is not None and self.loss_type != _LOSS_TYPES.get(self.aggregation):
            raise UserError(
                f"both aggregation={self.aggregation!r} and loss_type={self.loss_type!r} were given; give one of them"
            )
        require_one_of("loss_type", self.loss_type, _TRL_LOSS_TYPES)
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.aligns:
            if self.ddp_find_unused_parameters is None:
                # In the first phase no gradient reaches the layers above l.
                self.ddp_find_unused_parameters = True
            self._refuse_options_wrong_in_alignment()
        refuse_ppo_options(self, self.method)
        if self.method == "ppo":
            self._complete_ppo()
        super().__post_init__()
        self.check_steps()

    @property
    def aligns(self) -> bool:
        """Whether there is a first phase."""
        return self.method == "bupo" and self.ipa_steps != 0

    @property
    def alignment_rate(self) -> float:
        """Learning rate of the first phase, as a multiple of that of the second."""
        if not self.aligns or self.ipa_learning_rate is None:
            return 1.0
        return float(self.ipa_learning_rate / self.learning_rate)

    @property
    def updates_per_step(self) -> int:
        """Optimiser updates on one batch of rollouts."""
        per_rollout = self.steps_per_generation * self.num_iterations
        return max(1, int(per_rollout // self.gradient_accumulation_steps))

    def _refuse_options_wrong_in_alignment(self) -> None:
        for name, (neutral, why) in _NEUTRAL_IN_ALIGNMENT.items():
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

    def _complete_ppo(self) -> None:
        """Fill in the options of the critic, and refuse others that would not give the loss of PPO."""
        for name, usual in PPO_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, usual)
        if self.loss_type not in _CLIPPED_BY_TOKEN:
            raise UserError(
                f"loss_type={self.loss_type!r} with method='ppo', which clips the ratio of every token; needed is one "
                f"of {', '.join(_CLIPPED_BY_TOKEN)}"
            )
        for name, needed in _USUAL_IN_PPO.items():
            if getattr(self, name) != needed:
                raise UserError(
                    f"{name}={getattr(self, name)!r} with method='ppo', whose ratios and advantages belong to tokens, "
                    "not to whole responses; leave it out"
                )
        if self.fp16:
            raise UserError(
                "fp16=True with method='ppo': the gradients of the critic are not scaled; use bf16, or float32"
            )
        if not self.learning_rate > 0:
            raise UserError(
                f"learning_rate is {self.learning_rate} with method='ppo': the critic follows the policy's schedule; "
                "needed is a learning_rate above 0"
            )

    def check_steps(self) -> None:
        """Check the settings that depend on the layer and the number of steps, which may be known only later."""
        if self.method == "bupo" and self.layer is None and self.ipa_steps != 0:
            raise UserError("method='bupo' without layer; give the layer whose policy comes first, from 1")
        if isinstance(self.ipa_steps, str):
            if self.ipa_steps != AUTO:
                raise UserError(f"ipa_steps is {self.ipa_steps!r}; needed is a number of steps or auto")
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
        if self.only_layer is not None:
            if self.freeze_layers or self.upper_lr_scale != 1.0:
                raise UserError(
                    f"only_layer is {self.only_layer}, freeze_layers {self.freeze_layers} and upper_lr_scale "
                    f"{self.upper_lr_scale}; give only_layer alone, as it leaves no other layer to update"
                )
            if self.aligns and self.layer is not None and self.only_layer > self.layer:
                raise UserError(
                    f"only_layer is {self.only_layer} and layer {self.layer}: the first phase would have nothing to "
                    "train; choose a layer up to that one, or use method='grpo'"
                )
        if self.method in ("rloo", "reinforce++", "ppo"):
            for name, usual in (("scale_rewards", "group"), ("multi_objective_aggregation", "sum_then_normalize")):
                if getattr(self, name) != usual:
                    raise UserError(
                        f"{name}={getattr(self, name)!r} with method={self.method!r}, whose advantages have a scale of "
                        "their own; leave it out"
                    )
        if self.method != "bupo" and self.ipa_steps != 0:
            raise UserError(f"ipa_steps={self.ipa_steps} with method={self.method!r}; only bupo has a first phase")
        per_rollout = self.steps_per_generation * self.num_iterations
        shorter, longer = sorted((per_rollout, self.gradient_accumulation_steps))
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


def check_trl_options(config: TrainConfig) -> None:
    """Check that the options that are passed on to TRL exist, may be set, and have the right type."""
    ours = {f.name for f in fields(TrainConfig)}
    # The fields of TrainConfig are set there, and the run determines the directory of its checkpoints.
    known = {f.name for f in fields(BuPOConfig) if f.init} - {*ours, "output_dir"}
    for name in config.trl_options:
        if name in _FIXED_OPTIONS:
            raise UserError(f"{name} cannot be chosen: {_FIXED_OPTIONS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(ours | known), n=1)
            hint = f"; did you mean {near[0]}?" if near else "; known are the fields of TrainConfig and of GRPOConfig"
            raise UserError(f"unknown option {name!r}{hint}")
    check_values(config.trl_options, get_type_hints(BuPOConfig))


def make_trainer_config(
    config: TrainConfig, layer: int | None, checkpoints: Path, processes: int, device: str
) -> BuPOConfig:
    """Build the trainer's configuration in TRL's terms, from settings that were completed by ``with_preset``."""
    options = dict(config.trl_options)
    assert config.ipa_steps is not None
    assert config.max_steps is not None
    if options.get("use_vllm"):
        # It cannot be used with an internal policy, and all methods should be comparable.
        options.setdefault("vllm_importance_sampling_correction", False)
    if not any(name in options for name in TRL_BATCH_OPTIONS):
        options |= _batch(config, processes, device)
    steps: dict[str, Any] = {name: options.pop(name) for name in STEP_OPTIONS if name in options}
    steps |= {"logging_steps": 1, "max_steps": config.max_steps}
    steps["save_steps"] = config.save_steps or math.ceil(config.max_steps / _CHECKPOINTS_IN_A_RUN)
    if config.max_completion_length is not None:
        options["max_completion_length"] = config.max_completion_length
    # TRL adds a load-balancing loss to a mixture of experts; eq. 10 has none, in either phase.
    options.setdefault("router_aux_loss_coef", 0.0)
    options.setdefault("gradient_checkpointing", device == "cuda")
    options.setdefault("use_cpu", device == "cpu")
    try:
        built = BuPOConfig(
            output_dir=str(checkpoints),
            layer=layer,
            ipa_steps=config.ipa_steps,
            report_to=config.report_to or "none",
            # PromptDataset fixes the order of the prompts: TRL's sampler would start over in each resumed run.
            shuffle_dataset=False,
            disable_tqdm=True,
            **{name: getattr(config, name) for name in _SHARED_FIELDS},
            **options,
        )
    # TRL raises an ImportError if a package such as deepspeed is missing.
    except (ValueError, TypeError, ImportError) as error:
        raise refused(error) from error
    # The number of updates per step is known only now.
    for name, value in steps.items():
        setattr(built, name, _updates(name, value, config.max_steps, built.updates_per_step))
    built.check_steps()
    return built


def refused(error: Exception) -> UserError:
    """Put what the trainer says about its options into one line."""
    return UserError(f"the trainer refuses its options: {' '.join(str(error).split())[:300] or type(error).__name__}")


def _updates(name: str, value: Any, max_steps: int, factor: int) -> Any:
    """Convert a number of steps, or a share of the run (below 1), to updates."""
    if isinstance(value, int) or value >= 1:
        return value * factor
    # A checkpoint between two updates of a step would be useless, because it does not contain the rollouts.
    return value if name == "warmup_steps" else max(1, round(value * max_steps)) * factor


def _batch(config: TrainConfig, processes: int, device: str) -> dict[str, int]:
    """Split the rollouts of a step into mini-batches, and these into batches of one device."""
    assert config.prompts_per_step
    assert config.mini_batches
    samples = config.prompts_per_step * config.num_generations
    share, rest = divmod(samples, config.mini_batches * processes)
    rollouts = f"{config.prompts_per_step} prompts x {config.num_generations} generations"
    if rest or not share:
        raise UserError(
            f"{rollouts} do not divide into {config.mini_batches} mini-batches on {counted(processes, 'process')}; "
            "change prompts_per_step, num_generations or mini_batches"
        )
    size = config.trl_options.get("per_device_train_batch_size")
    if size is None:
        largest = _LARGEST_BATCH.get(device, _LARGEST_BATCH["cuda"])
        size = max(n for n in range(1, min(share, largest) + 1) if share % n == 0)
    elif share % size:
        raise UserError(
            f"per_device_train_batch_size is {size}, and {rollouts} give {share} samples a process and mini-batch; "
            "needed is a divisor of that"
        )
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": share // size,
        "steps_per_generation": share // size * config.mini_batches,
    }
