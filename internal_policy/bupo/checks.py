"""Checks before the first update, and errors of a training in one line.

Before anything is written, they establish where the model's parts are, that TRL computes the model's own logits, and
that TRL and transformers accept every option.
"""

from __future__ import annotations

import errno
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationConfig, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available
from trl.import_utils import is_vllm_available

from internal_policy.bupo.config import AUTO, TrainConfig
from internal_policy.bupo.trainer_config import BuPOConfig, refused
from internal_policy.data.benchmarks import read_benchmark
from internal_policy.extractors import prove
from internal_policy.models import Family, LanguageModel, eval_mode, wrap
from internal_policy.models.checkpoint_files import weight_files
from internal_policy.models.devices import in_float64
from internal_policy.utils.errors import UserError, as_user_error, counted, is_out_of_memory
from internal_policy.utils.options import require_one_of

logger = logging.getLogger(__name__)

_SEQUENCES, _LENGTH, _SHIFT = 2, 12, 256
_DISK_FULL = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EFBIG: "File too large",
}
_CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
}
_RANGES: dict[str, tuple[float, float, str]] = {
    "repetition_penalty": (1e-6, float("inf"), "a number above 0"),
    "top_k": (0, float("inf"), "a number of at least 0"),
    "min_p": (0.0, 1.0, "a share from 0 to 1"),
    "seed": (0, 2**32 - 1, "a number from 0 to 2^32 - 1"),
    "dataloader_num_workers": (0, float("inf"), "a number of at least 0"),
    "ref_model_sync_steps": (1, float("inf"), "a number of at least 1"),
}


def check_run(
    config: TrainConfig,
    trainer_config: BuPOConfig,
    model: LanguageModel,
    peft_config: Any,
    sharded: bool,
    *,
    processes: int,
    measures: bool,
    evaluates: bool,
) -> None:
    """Refuse, before anything is written, settings on which the trainer would fail later or be silently wrong."""
    if config.ipa_steps == AUTO and not measures:
        why = "FSDP or DeepSpeed spreads the weights" if sharded else "dynamics_every is 0"
        raise UserError(f"ipa_steps is auto, and nothing measures the dynamics ({why}); give a number of steps")
    check_experts(trainer_config, model.config)
    if config.method == "ppo":
        check_critic(processes, sharded=sharded, adapters=peft_config is not None)
    for name in ("freeze_layers", "only_layer"):
        if (getattr(config, name) or 0) > model.n_layers:
            raise UserError(f"{name} is {getattr(config, name)} and the model has {model.n_layers} layers")
    if trainer_config.sync_ref_model and not trainer_config.beta:
        raise UserError("sync_ref_model=True without a reference model; give beta, or leave it out")
    if trainer_config.beta and peft_config is None:
        # TRL loads the reference model again from the policy's source, where it must not find pickles.
        where = str(model.config._name_or_path)
        advice = "beta needs the model as it was before training: save it, and give its directory"
        with as_user_error(config.model, "the reference model", advice=advice):
            if not weight_files(where, model.config, model.revision, config.model):
                raise UserError(
                    f"{config.model}: no safetensors weights in {where!r} to read the reference model from; {advice}"
                )
    if peft_config is not None and not hasattr(peft_config, "peft_type"):
        raise UserError(f"peft_config is a {type(peft_config).__name__}; needed is one of peft, such as LoraConfig")
    if peft_config is not None and sharded:
        raise UserError(
            "adapters under FSDP or DeepSpeed are not supported: they cannot be merged into the model that is "
            "written at the end; use DDP, or train all weights"
        )
    asked = next((name for name in ("eval_problems", "eval_samples") if getattr(config, name)), None)
    if asked and config.eval_samples != 0 and not evaluates:
        raise UserError(
            f"{asked} was given, and there is nothing to evaluate on: prompts of your own are trained on only; "
            "give benchmark, or leave it out"
        )
    if config.eval_layer is not None:
        if not 1 <= config.eval_layer <= model.n_layers:
            raise UserError(f"eval_layer is {config.eval_layer}; {model.name} has {model.n_layers} layers")
        if not evaluates:
            raise UserError(
                "eval_layer was given, and there is nothing to evaluate on; give benchmark and eval_samples"
            )
        if sharded:
            raise UserError(
                "eval_layer was given, and FSDP or DeepSpeed spreads the weights, from which no process can sample; "
                "leave it out"
            )
    if evaluates and config.benchmark is not None:
        read_benchmark(config.benchmark, config.eval_problems)


def check_critic(processes: int, *, sharded: bool, adapters: bool) -> None:
    """Refuse set-ups in which the critic of PPO would not be trained as described."""
    if sharded or processes > 1:
        where = "FSDP or DeepSpeed" if sharded else counted(processes, "process")
        raise UserError(
            f"method='ppo' under {where}: the critic is trained in one process that holds all its weights; start one "
            "process, or use another method"
        )
    if adapters:
        raise UserError(
            "method='ppo' with adapters: the critic is a copy of all weights, which are all trained; leave out "
            "lora_rank and peft_config, or use another method"
        )


def try_options(config: BuPOConfig, rewards: Sequence[Any]) -> None:
    """Check the options, and build what TRL and transformers build from them only after the training has begun."""
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            require_one_of(name, getattr(config, name), [choice for choice in choices if isinstance(choice, str)])
    for name, (low, high, needed) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value!r}; needed is {needed}")
    weights = config.reward_weights
    if weights is not None and len(weights) != len(rewards):
        raise UserError(f"reward_weights has {len(weights)} numbers for {len(rewards)} rewards; give one for each")
    if missing := sorted({"tensorboard", "wandb", "trackio", "mlflow"} & {*config.report_to} - {*_reporters()}):
        raise UserError(f"report_to={missing[0]!r} needs a package of that name; install it, or leave report_to out")
    if config.use_vllm and not is_vllm_available():
        raise UserError("use_vllm=True needs the package vllm; install it with `pip install trl[vllm]`")
    if config.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("use_liger_kernel=True needs the package liger-kernel; install it, or leave it out")
    try:
        get_reporting_integration_callbacks(config.report_to)
        torch.tensor(weights or [], dtype=torch.float32)
        GenerationConfig(cache_implementation=config.cache_implementation, **(config.generation_kwargs or {}))
        make, options = Trainer.get_optimizer_cls_and_kwargs(config)
        # Arguments of optimisers that apply to some layers only, which need a real model.
        options = {key: value for key, value in options.items() if key not in ("optim_target_modules", "model")}
        optimizer = make([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.get_warmup_steps(config.max_steps),
            num_training_steps=config.max_steps,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ImportError, AttributeError, KeyError) as error:
        raise refused(error) from error


def _reporters() -> list[str]:
    found: list[str] = get_available_reporting_integrations()
    return found


def prove_model(model: LanguageModel) -> LanguageModel:
    """Verify where a model's parts are; a family without a row of the table gets the likeliest guess that is verified.

    Refused are a row that does not fit, a guess that cannot be verified because no process has the whole model, and
    quantised weights, which no gradient reaches.
    """
    if model.quantization is not None:
        raise UserError(
            f"{model.name}: its weights are quantised ({model.quantization}), and training updates them; give the "
            "checkpoint that it was made from"
        )
    if not _has_all_weights(model.model):
        if model.family.guessed:
            raise UserError(
                f"{model.name}: family {model.family.name!r} is not in the table, and what its structure says cannot "
                "be proved where DeepSpeed spreads the weights; use DDP or FSDP, or write its row in models/families.py"
            )
        return model
    with eval_mode(model.model):
        return prove(model).model


def prove_family(model: nn.Module, tokenizer: Any) -> Family:
    """Verify where the parts of a bare causal LM are, and return its row."""
    config: Any = model.config
    with eval_mode(model):
        return prove_model(wrap(model, tokenizer, getattr(config, "_name_or_path", "") or config.model_type)).family


def check_experts(args: BuPOConfig, config: Any) -> None:
    """Refuse settings with which a mixture of experts cannot be trained.

    TRL would add the load-balancing loss in the first phase too, and transformers cannot sample from a model that
    returns its router logits.
    """
    text = config.get_text_config()
    if not hasattr(text, "output_router_logits"):
        return
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
    if args.aligns and coefficient:
        raise UserError(
            "a mixture of experts with an internal policy: in the first phase the load-balancing loss would see "
            "layers 1..l only; pass router_aux_loss_coef=0"
        )
    if text.output_router_logits and not args.use_vllm:
        raise UserError(
            "output_router_logits is true in the model's configuration, and transformers cannot sample with it; set "
            "it to false in config.json"
        )


def check_head(model: nn.Module, temperature: float) -> None:
    """Check that TRL's log-probabilities equal those of the model's own logits up to rounding.

    TRL multiplies the decoder's last state by E_u itself, and knows only some of the fields of a configuration that
    transform the logits.

    Raises:
        UserError: they differ.
    """
    if not _has_all_weights(model):
        return
    arguments = _random_inputs(model)
    ids = arguments["input_ids"]
    with eval_mode(model), torch.no_grad():
        logits = model(**arguments).logits[:, :-1].float() / temperature
        theirs = model(**arguments, labels=ids, fused_lm_head=True).log_probs.float()
    own = logits.log_softmax(dim=-1).gather(-1, ids[:, 1:, None].to(logits.device)).squeeze(-1)
    error = float((own - theirs.to(own.device)).abs().mean())
    # The model rounds each logit in its own dtype; the mean error is a few roundings of the largest logit.
    bound = 4 * _eps(model) * max(1.0, float(logits.abs().max()))
    if not error <= bound:
        raise UserError(
            f"TRL's log-probabilities are not those of this model's logits (mean difference {error:.1e} nats, at most "
            f"{bound:.1e}): it does not know how {type(model).__name__} makes them, so no method can train it here"
        )


def depends_on_absolute_positions(model: nn.Module) -> bool:
    """Return whether a decoder depends on the position of the first token, like one with learned positions.

    TRL pads prompts on the left and passes no positions, so such a model would see other positions than in sampling.
    False if positions are relative, or if the decoder counts them over real tokens itself.
    """
    config: Any = model.config
    decoder: Any = getattr(model, "base_model", None)
    if config.get_text_config() is not config or not isinstance(decoder, nn.Module):
        return False
    if "position_ids" not in inspect.signature(decoder.forward).parameters or not _has_all_weights(model):
        return False
    arguments = _random_inputs(model)
    length = arguments["input_ids"].shape[1]
    room = int(getattr(config, "max_position_embeddings", None) or _SHIFT) - length
    positions = torch.arange(length, device=arguments["input_ids"].device).expand_as(arguments["input_ids"])
    with eval_mode(model), torch.no_grad():
        here, there = (
            in_float64(decoder(**arguments, position_ids=positions + shift).last_hidden_state)
            for shift in (0, max(0, min(_SHIFT, room)))
        )
    # Rotary embeddings differ only by rounding. Counting positions unnecessarily would change only roundings.
    return bool((here - there).norm() > math.sqrt(_eps(model)) * here.norm())


def warn_of_dropout(model: nn.Module) -> bool:
    """Warn if old and new log-probabilities are computed under different dropout masks.

    Returns whether there is any dropout in training, including that of adapters and attention weights.
    """
    everywhere = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    found = [n for n in everywhere if "lora_" not in n]
    if found:
        logger.warning(
            "%s drops out in training (%s and %d more): the ratio compares policies under different dropouts; pass "
            "disable_dropout=True",
            *(type(model).__name__, found[0], len(found) - 1),
        )
    # Attention has its dropout as a number, not as a module.
    rates = (getattr(m, "attention_dropout", None) for m in model.modules())
    return bool(everywhere) or any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _has_all_weights(model: nn.Module) -> bool:
    """Return whether this process has all weights of the model."""
    return not any(hasattr(p, "ds_id") or p.is_meta for p in model.parameters())


def _random_inputs(model: nn.Module) -> dict[str, Any]:
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows, device = int(embedding.weight.shape[0]), embedding.weight.device
    ids = torch.randint(0, rows, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _eps(model: nn.Module) -> float:
    """Return the machine epsilon of the coarsest dtype among the model's weights."""
    return max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())


@contextmanager
def errors_in_one_line(config: BuPOConfig, directory: Path, state: Any = None) -> Iterator[None]:
    """Convert refusals of TRL, lack of memory, and a full disk to one-line errors.

    ``state`` is that of the trainer, if it exists; an error before the first update is taken to concern the options.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        if state is not None and state.global_step:
            raise
        raise refused(error) from error
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if (why := _disk_full_reason(error)) is not None:
            raise UserError(
                f"{directory}: a file could not be written to its end ({why}); make room, then repeat the command: it "
                "resumes from the last complete checkpoint"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory in training; lower per_device_train_batch_size (now {config.per_device_train_batch_size}) "
            "or max_completion_length, and start over with --overwrite"
        ) from error


def _disk_full_reason(error: BaseException) -> str | None:
    """Return why a file could not be written; None for other errors."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return _DISK_FULL[error.errno]
    message, torch_failure = str(error), "PytorchStreamWriter failed"
    if isinstance(error, SafetensorError):
        return next((why for why in _DISK_FULL.values() if why in message), None)
    # torch writes in C++ and gives no reason.
    return torch_failure if torch_failure in message or "inline_container" in message else None
