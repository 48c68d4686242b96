"""What `train` was asked for, brought into the trainer's terms: words, batch sizes, step counts."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from trl.import_utils import is_vllm_available

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.bupo.config import BuPOConfig, one_of
from internal_policy.bupo.presets import AUTO, METHODS, PAPER, PRESETS, STEP_OPTIONS, preset
from internal_policy.bupo.rehearsal import refused
from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import DTYPES
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.shell import is_number
from internal_policy.utils.validation import MOST_PROMPTS, refuse_too_large

_OURS_BATCH = ("prompts_per_step", "mini_batches")
_TRLS_BATCH = ("gradient_accumulation_steps", "steps_per_generation", "generation_batch_size")
_ROW_A_STEP = "the history has a row a step"
_OWN_DATA = "evaluate with benchmark=, before and after the training"
_SETTLED = {
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step"), _ROW_A_STEP),
    **dict.fromkeys(("eval_strategy", "do_eval", "eval_steps", "eval_on_start", "load_best_model_at_end"), _OWN_DATA),
    "shuffle_dataset": "the order of the prompts follows from the seed, so that a resumed run sees the same",
    "num_train_epochs": "the run has max_steps steps, over as many passes through the prompts as that takes",
    "disable_tqdm": "progress is shown where standard error is a terminal",
    "model_init_kwargs": "the words of `train` say how the model is loaded (dtype, revision, attn_implementation)",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        "a finished run is pushed by bupo.push_to_hub(run, repo_id) or `internal-policy push RUN --repo NAME`, without "
        "checkpoints and optimiser states",
    ),
    "resume_from_checkpoint": "a run is taken up by the same call with the same output",
}
"""Options of transformers that `train` settles, and why."""
_LARGEST_BATCH = {"cpu": 64, "cuda": 4}
_CHECKPOINTS_IN_A_RUN = 10
"""At most, and at least five and the last where the run has more steps than this: enough to see a trend."""
_AT_LEAST = {
    "num_generations": 2,
    **dict.fromkeys(("max_completion_length", "num_iterations", "per_device_train_batch_size", *_TRLS_BATCH), 1),
    **dict.fromkeys(("seed", "learning_rate", "ipa_learning_rate", "freeze_layers", "upper_lr_scale"), 0),
}


@dataclass(frozen=True)
class Plan:
    """The words of `train` beside those of the trainer's configuration."""

    preset: str | None = None
    """Named settings: qwen, qwen3-8b, llama (the paper's), testbed; the one that fits the model where not given."""
    max_steps: int = 300
    """Steps, each one batch of rollouts with all updates on it."""
    prompts_per_step: int = 128
    """Prompts in a batch of rollouts; each is answered ``num_generations`` times."""
    mini_batches: int = 4
    """Updates on a batch of rollouts."""
    template: str = "chat"
    """chat, plain, qwen-math, qwen3 or octothinker."""
    prompts_split: str | None = None
    """Split of a hub data set."""
    max_prompt_length: int = 1024
    """Longer prompts (in tokens) are left out."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    attn_implementation: str | None = None
    """transformers' attention: eager, sdpa, flash_attention_2, a kernel of the hub; its own choice where not given."""
    dtype: str = "auto"
    """dtype of the weights: float32 for auto; bf16 mixed precision is another option."""
    trust_remote_code: bool = False
    """Run code that comes with the checkpoint."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on all linear modules of the layers; 0 trains all weights."""
    dynamics_every: int | None = None
    """Measure figure 5 every so many steps: a tenth of the run, or 1 with ipa_steps="auto"; 0 leaves it out."""
    dynamics_responses: int = 32
    """Fixed responses that it is measured on."""
    benchmark: str | None = None
    """Evaluate start and result on it: a benchmark's name, file or hub id; the embedded tasks for embedded models."""
    eval_samples: int | None = None
    """Samples a problem of the benchmark: 4 for the embedded tasks, else the benchmark's own; 0 leaves it out."""
    eval_problems: int | None = None
    """At most so many problems."""


def split(model: str, words: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """Sort what the user said over the plan and the trainer, on top of the preset.

    Args:
        model: the model's name, which chooses the preset where none is given.
        words: the named arguments of `train` that were given.
        options: the other keyword arguments.

    Returns:
        The plan, and the options of ``BuPOConfig`` that do not depend on the number of processes.

    Raises:
        UserError: an unknown option, or a value out of range.
    """
    given = {**options, **{name: value for name, value in words.items() if value is not None}}
    ours = {f.name for f in fields(Plan)}
    trainers = {f.name for f in fields(BuPOConfig) if f.init} - {"output_dir", "trust_remote_code", "model_init_kwargs"}
    for name in given:
        if name in _SETTLED:
            raise UserError(f"{name} cannot be chosen: {_SETTLED[name]}")
        if name not in ours | trainers:
            near = difflib.get_close_matches(name, sorted(ours | trainers), n=1)
            hint = f"; did you mean {near[0]}?" if near else "; known are those of `train`, BuPOConfig and GRPOConfig"
            raise UserError(f"unknown option {name!r}{hint}")
    named = given.get("preset") or ("testbed" if model.startswith("testbed/") else None)
    defaults = preset(str(named)) if named else {**PAPER, "ipa_steps": PRESETS["llama"]["ipa_steps"]}
    merged = {**defaults, **given, "preset": named}
    if any(name in given for name in _TRLS_BATCH):
        if both := [name for name in _OURS_BATCH if name in given]:
            theirs = next(name for name in _TRLS_BATCH if name in given)
            raise UserError(
                f"both {both[0]} and {theirs} were given; use prompts_per_step and mini_batches, or TRL's own"
            )
        for name in _OURS_BATCH:
            merged.pop(name, None)
    _settle_alignment(merged, given, defaults)
    plan = Plan(**{name: merged.pop(name) for name in list(merged) if name in ours})
    _check(plan)
    _check_values(merged)
    return plan, merged


def _settle_alignment(merged: dict[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Leave the first phase out where there is none, and keep its share of a shorter run."""
    one_of("method", merged.setdefault("method", "bupo"), METHODS)
    steps = merged.get("max_steps", Plan.max_steps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"max_steps is {steps!r}; needed is a number of steps of at least 1")
    refuse_too_large("max_steps", steps)
    ipa = merged["ipa_steps"]
    if isinstance(ipa, str) and ipa != AUTO and is_number(ipa):
        merged["ipa_steps"] = int(ipa)
    if merged["method"] != "bupo":
        if "ipa_steps" in given and merged["ipa_steps"] != 0:
            raise UserError(
                f"ipa_steps={given['ipa_steps']} with method={merged['method']!r}; only bupo has a first phase"
            )
        merged["ipa_steps"] = 0
    elif "ipa_steps" not in given:
        merged["ipa_steps"] = max(1, round(steps * defaults["ipa_steps"] / defaults["max_steps"]))
    ipa = merged["ipa_steps"]
    if not isinstance(ipa, (int, str)) or (isinstance(ipa, int) and not 0 <= ipa <= steps) or isinstance(ipa, bool):
        raise UserError(f"ipa_steps is {ipa!r} and the run has {steps} steps; needed is 0 to {steps}, or auto")


def _check(plan: Plan) -> None:
    one_of("template", plan.template, TEMPLATES)
    one_of("dtype", plan.dtype, DTYPES)
    for name, low in (
        *(("prompts_per_step", 1), ("mini_batches", 1), ("max_prompt_length", 1), ("lora_rank", 0)),
        *(("dynamics_every", 0), ("dynamics_responses", 1), ("eval_samples", 0), ("eval_problems", 1)),
    ):
        value = getattr(plan, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise UserError(f"{name} is {value!r}; needed is a whole number of at least {low}")
        refuse_too_large(name, value)
    if plan.max_steps * plan.prompts_per_step > MOST_PROMPTS:
        raise UserError(
            f"{plan.max_steps} steps of {plan.prompts_per_step} prompts are more than the {MOST_PROMPTS} prompts of "
            "one run; lower max_steps or prompts_per_step"
        )


def _check_values(options: Mapping[str, Any]) -> None:
    """Check the trainer's numbers and switches: a dataclass takes anything, and TRL would fall over it much later."""
    hints = get_type_hints(BuPOConfig)
    for name, value in options.items():
        kinds = set(get_args(hints[name])) or {hints[name]}
        if value is None and type(None) in kinds:
            continue
        kinds.discard(type(None))
        if isinstance(value, int):
            # First of all: of a number of thousands of digits no message can be made.
            refuse_too_large(name, value)
        told = f"{name} is {value!r}; needed is"
        if kinds == {bool} and not isinstance(value, bool):
            raise UserError(f"{told} true or false")
        if kinds == {int} and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise UserError(f"{told} a whole number")
        if kinds == {float} and (
            isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value)
        ):
            raise UserError(f"{told} a number")
        if name in _AT_LEAST and value < _AT_LEAST[name]:
            raise UserError(f"{told} at least {_AT_LEAST[name]}")
        if name in ("temperature", "top_p") and (value <= 0 or (name == "top_p" and value > 1)):
            raise UserError(f"{told} a number above 0" + (", at most 1" if name == "top_p" else ""))


def _check_installed(config: BuPOConfig) -> None:
    get_reporting_integration_callbacks(config.report_to)
    if missing := sorted({"tensorboard", "wandb", "trackio", "mlflow"} & {*config.report_to} - {*_reporters()}):
        raise UserError(f"report_to={missing[0]!r} needs a package of that name; install it, or leave report_to out")
    if config.use_vllm and not is_vllm_available():
        raise UserError("use_vllm=True needs the package vllm; install it with `pip install trl[vllm]`")


def _reporters() -> list[str]:
    found: list[str] = get_available_reporting_integrations()
    return found


def configure(plan: Plan, options: Mapping[str, Any], output_dir: str, processes: int, device: str) -> BuPOConfig:
    """Build the trainer's configuration: TRL counts updates and samples of one process, the plan steps and prompts.

    Args:
        plan: the plan.
        options: options of ``BuPOConfig``.
        output_dir: where the checkpoints go.
        processes: data-parallel processes.
        device: ``cpu`` or ``cuda``.

    Returns:
        The configuration.

    Raises:
        UserError: batch sizes that do not divide, or a value that TRL refuses.
    """
    settled = dict(options)
    if settled.get("use_vllm"):
        # Not with an internal policy, and the methods are to be compared on the same terms.
        settled.setdefault("vllm_importance_sampling_correction", False)
    if not any(name in settled for name in _TRLS_BATCH):
        settled.update(_batch(plan, settled, processes, device))
    counted = {name: settled.pop(name) for name in STEP_OPTIONS if name in settled}
    counted["max_steps"] = plan.max_steps
    counted.setdefault("save_steps", math.ceil(plan.max_steps / _CHECKPOINTS_IN_A_RUN))
    counted["logging_steps"] = 1
    # In TRL a mixture of experts has a load-balancing loss of its own; eq. 10 has none, in either phase.
    settled.setdefault("router_aux_loss_coef", 0.0)
    settled.setdefault("report_to", "none")
    settled.setdefault("gradient_checkpointing", device == "cuda")
    settled.setdefault("use_cpu", device == "cpu")
    # The order of the prompts is settled before: TRL's sampler would start over with each resumed run.
    settled["shuffle_dataset"] = False
    settled["disable_tqdm"] = True
    try:
        probe = BuPOConfig(output_dir=output_dir, **settled)
        factor = probe.updates_per_step
        scaled = {name: _updates(name, value, plan.max_steps, factor) for name, value in counted.items()}
        config = BuPOConfig(output_dir=output_dir, **settled, **scaled)
        _check_installed(config)
        return config
    # A missing package, such as deepspeed, is told by an ImportError.
    except (ValueError, TypeError, ImportError) as error:
        raise refused(error) from error


def _updates(name: str, value: Any, max_steps: int, factor: int) -> Any:
    """Steps, or a share of the run where below 1, in updates."""
    if isinstance(value, int) or value >= 1:
        return value * factor
    # A checkpoint between two updates of a step would be of no use: the rollouts are not in it.
    return value if name == "warmup_steps" else max(1, round(value * max_steps)) * factor


def _batch(plan: Plan, options: Mapping[str, Any], processes: int, device: str) -> dict[str, int]:
    samples = plan.prompts_per_step * int(options.get("num_generations", 8))
    share, rest = divmod(samples, plan.mini_batches * processes)
    told = f"{plan.prompts_per_step} prompts x {options.get('num_generations', 8)} generations"
    if rest or not share:
        raise UserError(
            f"{told} do not divide into {plan.mini_batches} mini-batches on {counted(processes, 'process')}; "
            "change prompts_per_step, num_generations or mini_batches"
        )
    size = options.get("per_device_train_batch_size")
    if size is None:
        largest = _LARGEST_BATCH.get(device, _LARGEST_BATCH["cuda"])
        size = max(n for n in range(1, min(share, largest) + 1) if share % n == 0)
    elif share % size:
        raise UserError(
            f"per_device_train_batch_size is {size}, and {told} give {share} samples a process and mini-batch; "
            "needed is a divisor of that"
        )
    accumulation = share // size
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation * plan.mini_batches,
    }


def slug(model: str, revision: str | None, method: str, layer: Any, ipa_steps: Any, seed: int) -> str:
    """Name a run's directory.

    Args:
        model: the model's name.
        revision: its revision.
        method: bupo, grpo, rloo or reinforce++.
        layer: as it was asked for.
        ipa_steps: steps of the first phase.
        seed: the seed.

    Returns:
        ``testbed--qwen3--bupo-l7-s10-seed0``; ``bupo-auto`` where the layer is yet to be found.
    """
    where = f"l{layer}" if hasattr(layer, "__index__") else "auto"
    first = f"-{where}-s{ipa_steps}" if method == "bupo" else ""
    return f"{AnalyzeConfig(model=model, revision=revision).slug}--{method.replace('+', 'p')}{first}-seed{seed}"
