"""The settings of a training run: ``TrainConfig``, the presets of the paper, and their checks.

``TrainConfig`` is at once the keywords of ``bupo.train``, the options of ``internal-policy train`` and what a run
stores. Importing this module loads neither torch nor TRL.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from internal_policy.analysis.config import EMBEDDED, AnalyzeConfig
from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import DTYPES, SITES, Site
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.options import MOST_PROMPTS, option, refuse_too_large, require_one_of
from internal_policy.utils.shell import is_number

DATA = "data/runs"
"""Where runs are written by default."""
PolicyLens = Literal["policy", "logit-lens"]
"""The lenses under which an internal policy is optimised: without the final norm, or with it."""
POLICY_LENSES = get_args(PolicyLens)
METHODS = ("bupo", "grpo", "rloo", "reinforce++", "ppo")
PPO_DEFAULTS: Mapping[str, float] = MappingProxyType(
    {"critic_learning_rate": 1e-5, "gamma": 1.0, "gae_lambda": 1.0, "value_clip": 0.2}
)
"""Options that only ``method="ppo"`` has, with their defaults; the learning rate is that of arXiv 2512.19673v3,
appendix A.5."""
PPO_OPTIONS = tuple(PPO_DEFAULTS)
AGGREGATIONS = ("sequence-mean", "token-mean")
AUTO = "auto"
PAPER_PROMPTS = "zwhe99/DeepMath-103K"
"""The prompts of the paper, the default of every model that is not embedded."""
VERIFIERS = ("math", "exact")
"""Rewards by name; both compare a response with a reference answer."""
ALIGNMENT = "ipa"
"""The name of the first phase (internal policy alignment); the second phase has the name of its method."""
TRL_BATCH_OPTIONS = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
"""TRL's options for the size of a batch of rollouts, which ``prompts_per_step`` and ``mini_batches`` replace."""
STEP_OPTIONS = ("max_steps", "save_steps", "warmup_steps")
"""Options that ``train`` counts in steps and TRL counts in updates."""

PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "max_steps": 300,
        "ipa_steps": 20,
        "prompts_per_step": 128,
        "mini_batches": 4,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "epsilon": 0.2,
        "beta": 0.0,
        "top_p": 1.0,
    }
)
"""Settings that all runs of the paper share, besides the defaults of ``TrainConfig``; used if there is no preset."""
EVALUATION_SETTINGS = ("eval_samples", "eval_problems")
"""Options that change how a run is evaluated, and not its training."""
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen": {**PAPER, "ipa_steps": 30, "max_completion_length": 7168, "template": "qwen3"},
        "qwen3-8b": {**PAPER, "max_completion_length": 7168, "template": "qwen3"},
        "llama": {**PAPER, "max_completion_length": 3072, "template": "octothinker"},
        "testbed": {
            "max_steps": 60,
            "ipa_steps": 10,
            "prompts_per_step": 16,
            "mini_batches": 2,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "epsilon": 0.2,
            "max_completion_length": 44,
            "critic_learning_rate": 1e-3,
        },
    }
)
"""Settings by name: those of arXiv 2512.19673v3, table 8 (on 8 A100), and those of the embedded models (on a CPU)."""

_AT_LEAST = {
    **dict.fromkeys(("max_steps", "prompts_per_step", "mini_batches", "max_prompt_length", "dynamics_responses"), 1),
    **dict.fromkeys(("eval_layer", "eval_problems", "only_layer", "max_completion_length"), 1),
    **dict.fromkeys(("num_iterations", "per_device_train_batch_size"), 1),
    **dict.fromkeys(TRL_BATCH_OPTIONS, 1),
    **dict.fromkeys(("lora_rank", "dynamics_every", "eval_samples", "seed", "freeze_layers", "entropy_sequences"), 0),
    **dict.fromkeys(("learning_rate", "ipa_learning_rate", "upper_lr_scale"), 0),
    **dict.fromkeys(PPO_OPTIONS, 0),
    "num_generations": 2,
}


@dataclass(frozen=True)
class TrainConfig:
    """What to train and how. Every field is a keyword of ``bupo.train`` and an option of ``internal-policy train``.

    A step is one batch of rollouts with all the updates on it, as in the paper. The preset supplies a field that is
    None; without a preset, the default named in the field's description applies.
    """

    model: str = option("testbed/qwen3", completions=EMBEDDED)
    """Hub id, local directory, or an embedded model (testbed/qwen3, testbed/llama)."""
    prompts: str | None = None
    """Hub data set id, or a parquet, jsonl or json file, with answers. Default: zwhe99/DeepMath-103K (the paper's), or
    fresh problems of the embedded tasks for an embedded model."""
    layer: int | str | None = None
    """Layer whose policy is optimised first, counted from 1; the directory of an analysis, whose boundary layer is
    used; or auto: the model's own responses to the prompts are analysed first. Default: auto."""
    ipa_steps: int | str | None = None
    """Steps of the first phase, internal policy alignment (s_inter), or auto: until its dynamics deteriorate. Default:
    the preset's share of the run, or 20 of 300 steps."""
    method: str = option("bupo", choices=METHODS)
    """bupo, grpo, rloo, reinforce++ or ppo."""
    reward: str | None = option(None, completions=VERIFIERS)
    r"""math (math-verify on the last \boxed{}), exact, or module:function. Default: exact for the embedded tasks, else
    math."""
    max_steps: int | None = None
    """Total number of steps. Default: the preset's, or 300."""
    output: str | None = None
    """Directory of the run; an interrupted run in it is resumed. Default: data/runs/<model>--<method>..."""
    preset: str | None = option(None, choices=PRESETS)
    """Named settings: qwen, qwen3-8b, llama (the paper's) or testbed. Default: testbed for an embedded model."""
    seed: int = 0
    """Seed of all random numbers."""
    learning_rate: float | None = None
    """Learning rate. Default: the preset's, or 1e-6."""
    ipa_learning_rate: float | None = None
    """Learning rate of the first phase, under the same schedule. Default: the learning rate of the second phase."""
    critic_learning_rate: float | None = None
    """With ppo: learning rate of the critic, under the same schedule. Default: the preset's, or 1e-5."""
    gamma: float | None = None
    """With ppo: discount of the rewards, from 0 to 1. Default: 1."""
    gae_lambda: float | None = None
    """With ppo: lambda of generalised advantage estimation, from 0 to 1. Default: 1."""
    value_clip: float | None = None
    """With ppo: largest change of a value on one batch of rollouts, in units of the reward; 0 disables the clipping.
    Default: 0.2."""
    prompts_per_step: int | None = None
    """Prompts in a batch of rollouts. Default: the preset's, or 128."""
    num_generations: int = 8
    """Responses sampled for each prompt."""
    mini_batches: int | None = None
    """Updates on a batch of rollouts. Default: the preset's, or 4."""
    max_completion_length: int | None = None
    """Largest number of tokens in a response. Default: the preset's, or TRL's."""
    max_prompt_length: int = 1024
    """Prompts with more tokens are left out."""
    template: str | None = option(None, choices=TEMPLATES)
    """How a problem becomes a prompt: chat, plain, qwen-math, qwen3 or octothinker. Default: the preset's, or chat."""
    temperature: float = 1.0
    """Sampling temperature."""
    site: Site = "layer"
    """Which policy is optimised first: that of the layer's output (layer), or of the output of its attention (attn) or
    FFN (ffn)."""
    lens: PolicyLens = "policy"
    """Project states without the final norm (policy, as in the paper) or with it (logit-lens, the paper's ablation)."""
    aggregation: str | None = option(None, choices=AGGREGATIONS)
    """How the loss is averaged: sequence-mean (over tokens, then responses; eq. 3 of the paper) or token-mean (over all
    tokens). Default: sequence-mean."""
    freeze_layers: int = 0
    """Layers 1..n and an untied embedding are not updated (a baseline of appendix B.2)."""
    only_layer: int | None = None
    """Only this layer, from 1, is updated, not the others, embedding, head or final norm (with LoRA: its adapters); at
    most the chosen layer while there is a first phase."""
    upper_lr_scale: float = 1.0
    """Factor on the learning rate of the layers above the chosen one (a baseline of appendix B.2 uses 0.1)."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on all linear modules of the layers (needs peft); 0 trains all weights."""
    benchmark: str | None = None
    """Benchmark on which to evaluate the model before and after the training: a name, a file or a hub id. Default: the
    embedded tasks if the training is on them, else no evaluation."""
    eval_samples: int | None = None
    """Responses sampled per problem of the benchmark; 0 disables the evaluation. Default: 4 for the embedded tasks,
    else the benchmark's own number."""
    eval_problems: int | None = None
    """Evaluate at most this many problems."""
    eval_layer: int | None = None
    """Layer whose internal policy, under site and lens, is also sampled and scored on the benchmark: before the first
    step, at the interval of figure 5, and at the end. Default: none."""
    entropy_sequences: int = 64
    """Rollouts of each step on which the entropy of the policy is measured; 0 disables it."""
    dynamics_every: int | None = None
    """Steps between two measurements of figure 5; 0 disables them. Default: ten measurements in the run, or one at
    every step with ipa_steps auto."""
    dynamics_responses: int = 32
    """Fixed responses on which figure 5 is measured."""
    save_steps: float | None = None
    """Steps between two checkpoints; below 1 a share of the run. Default: ten checkpoints in the run."""
    report_to: str | list[str] | None = None
    """wandb, tensorboard or any other integration of transformers. Default: none."""
    dtype: str = option("auto", choices=DTYPES)
    """dtype of the weights: auto (float32), float32, bfloat16 or float16. Mixed precision is TRL's option bf16."""
    attn_implementation: str | None = None
    """transformers' attention: eager, sdpa, flash_attention_2 or a kernel of the hub. Default: transformers' choice."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    prompts_split: str | None = None
    """Split of a hub data set. Default: train if there is one, or the first."""
    overwrite: bool = False
    """Start over if the output directory holds another run."""
    wait: bool = False
    """If another process writes to the output directory, wait until it has ended."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""
    trl_options: dict[str, Any] = field(default_factory=dict)
    """Other options of trl.GRPOConfig, by name. ``bupo.train`` accepts them as keywords."""

    def __post_init__(self) -> None:
        """Check each field, and convert numbers that were given as text."""
        check_values({name: getattr(self, name) for name in _FIELDS if name != "trl_options"}, _HINTS)
        for name in _FIELDS:
            value = getattr(self, name)
            is_text = isinstance(value, str) and name in ("layer", "ipa_steps") and is_number(value)
            # JSON cannot store numpy's integers.
            if is_text or (hasattr(value, "__index__") and not isinstance(value, bool)):
                object.__setattr__(self, name, int(value))
        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                require_one_of(name, getattr(self, name), choices)
        if self.ipa_steps not in (None, AUTO) and type(self.ipa_steps) is not int:
            raise UserError(f"ipa_steps is {self.ipa_steps!r}; needed is a number of steps or auto")
        if isinstance(self.layer, (bool, float)):
            raise UserError(
                f"layer is a {type(self.layer).__name__}; needed is a number from 1, an Analysis, its path, or auto"
            )
        if self.save_steps is not None and self.save_steps > 1 and self.save_steps != int(self.save_steps):
            raise UserError(
                f"save_steps is {self.save_steps}; needed is a number of steps, or a share of the run below 1"
            )
        if self.method != "bupo" and self.ipa_steps not in (None, 0):
            raise UserError(f"ipa_steps={self.ipa_steps} with method={self.method!r}; only bupo has a first phase")
        refuse_ppo_options(self, self.method)
        ours = [name for name in ("prompts_per_step", "mini_batches") if getattr(self, name) is not None]
        theirs = [name for name in TRL_BATCH_OPTIONS if name in self.trl_options]
        if ours and theirs:
            raise UserError(
                f"both {ours[0]} and {theirs[0]} were given; use prompts_per_step and mini_batches, or TRL's own"
            )

    @classmethod
    def from_keywords(cls, **options: Any) -> TrainConfig:
        """Make a configuration from the keywords of ``bupo.train``; names that are not fields are options of TRL."""
        given: dict[str, Any] = {n: str(v) if isinstance(v, Path) else v for n, v in options.items()}
        ours = {name: value for name, value in given.items() if name in _FIELDS and value is not None}
        others = {name: value for name, value in given.items() if name not in _FIELDS}
        further = ours.get("trl_options", {})
        if not isinstance(further, Mapping):
            raise UserError(f"trl_options is of type {type(further).__name__}; needed is a dict of options of TRL")
        return cls(**{**ours, "trl_options": {**further, **others}})

    def to_keywords(self) -> dict[str, Any]:
        """Return the model and all values that differ from the defaults, as keywords for ``from_keywords``."""
        values = {name: getattr(self, name) for name in _FIELDS if name != "trl_options"}
        changed = {name: value for name, value in values.items() if value != _DEFAULTS[name]}
        return {"model": self.model, **changed, **self.trl_options}

    def with_preset(self) -> TrainConfig:
        """Fill in fields that are None from the preset, or from the paper's settings without one.

        The share of alignment steps stays that of the preset if the run has another length.

        Raises:
            UserError: more steps of alignment than steps, or more prompts than a run can have.
        """
        preset = self.preset or ("testbed" if self.model.startswith("testbed/") else None)
        settings = {**PPO_DEFAULTS, **(PRESETS[preset] if preset else PAPER)}
        if self.method != "ppo":
            for name in PPO_OPTIONS:
                del settings[name]
        if any(name in self.trl_options for name in TRL_BATCH_OPTIONS):
            del settings["prompts_per_step"], settings["mini_batches"]
        steps = self.max_steps or settings["max_steps"]
        share = max(1, round(steps * settings["ipa_steps"] / settings["max_steps"]))
        settings["ipa_steps"] = share if self.method == "bupo" else 0
        ours = {name: settings.pop(name) for name in list(settings) if name in _FIELDS}
        missing = {name: value for name, value in ours.items() if getattr(self, name) is None}
        missing.setdefault("template", self.template or "chat")
        filled = replace(self, **missing, preset=preset, trl_options={**settings, **self.trl_options})
        ipa = filled.ipa_steps
        if not isinstance(ipa, str) and not 0 <= (ipa or 0) <= steps:
            raise UserError(f"ipa_steps is {ipa!r} and the run has {steps} steps; needed is 0 to {steps}, or auto")
        if steps * (filled.prompts_per_step or 0) > MOST_PROMPTS:
            raise UserError(
                f"{steps} steps of {filled.prompts_per_step} prompts are more than the {MOST_PROMPTS} prompts of "
                "one run; lower max_steps or prompts_per_step"
            )
        return filled

    @property
    def aligns(self) -> bool:
        """Whether there is a first phase, as far as the configuration with its preset says."""
        return self.method == "bupo" and self.ipa_steps != 0

    @property
    def wanted_layer(self) -> int | str | None:
        """The layer that was given; ``auto`` if there is a first phase and none was given."""
        return AUTO if self.layer is None and self.aligns else self.layer

    @property
    def directory(self) -> Path:
        """Where the run is written: ``output``, or a directory below ``data/runs`` named after the settings."""
        if self.output is not None:
            return expanded(self.output)
        filled = self.with_preset()
        layer = f"l{filled.wanted_layer}" if isinstance(filled.wanted_layer, int) else AUTO
        first = f"-{layer}-s{filled.ipa_steps}" if self.method == "bupo" else ""
        slug = AnalyzeConfig(model=self.model, revision=self.revision).slug
        return Path(DATA) / f"{slug}--{self.method.replace('+', 'p')}{first}-seed{self.seed}"


_FIELDS = tuple(f.name for f in fields(TrainConfig))
_DEFAULTS = {f.name: f.default for f in fields(TrainConfig)}
_HINTS = get_type_hints(TrainConfig)
_CHOICES = {
    "method": METHODS,
    "preset": tuple(PRESETS),
    "template": TEMPLATES,
    "dtype": DTYPES,
    "site": SITES,
    "lens": POLICY_LENSES,
    "aggregation": AGGREGATIONS,
}


def check_values(options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Check values by their type annotations: a dataclass accepts anything, and TRL would fail much later."""
    for name, value in options.items():
        kinds = set(get_args(hints[name])) or {hints[name]}
        if value is None and type(None) in kinds:
            continue
        kinds.discard(type(None))
        if isinstance(value, int):
            # First, because Python cannot print an integer of thousands of digits in the messages below.
            refuse_too_large(name, value)
        message = f"{name} is {value!r}; needed is"
        if kinds == {bool} and not isinstance(value, bool):
            raise UserError(f"{message} true or false")
        if kinds == {str} and not isinstance(value, str):
            raise UserError(f"{message} a text")
        if kinds == {int} and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise UserError(f"{message} a whole number")
        if kinds == {float} and (
            isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value)
        ):
            raise UserError(f"{message} a number")
        if name in _AT_LEAST and value < _AT_LEAST[name]:
            raise UserError(f"{message} at least {_AT_LEAST[name]}")
        if name in ("temperature", "top_p", "save_steps") and (value <= 0 or (name == "top_p" and value > 1)):
            raise UserError(f"{message} a number above 0" + (", at most 1" if name == "top_p" else ""))


def refuse_ppo_options(config: Any, method: str) -> None:
    """Refuse options of the critic with a method that has none, and shares that are above 1."""
    for name in PPO_OPTIONS:
        value = getattr(config, name)
        if value is not None and method != "ppo":
            raise UserError(f"{name}={value} with method={method!r}; only ppo has a critic")
        if name in ("gamma", "gae_lambda") and value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} is {value}; needed is a number from 0 to 1")


def second_phase(method: str) -> str:
    """Return the name of the phase after alignment: ``grpo`` for bupo, else the method."""
    return "grpo" if method == "bupo" else method


def require_layer(layer: str | Path) -> None:
    """Refuse a layer that is neither a number nor ``auto`` nor an existing path."""
    text = str(layer).strip()
    if text != AUTO and not is_number(text) and not expanded(layer).exists():
        raise UserError(f"layer is {str(layer)!r}; needed is a number from 1, auto, or the directory of an analysis")
