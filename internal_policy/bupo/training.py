"""``bupo.train``: one training run, stage by stage."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from internal_policy.analysis.inputs import Source, as_source
from internal_policy.analysis.results import Analysis
from internal_policy.bupo.callbacks import CheckpointDigestCallback, DynamicsCallback, HistoryCallback, StepCallback
from internal_policy.bupo.checks import check_run, errors_in_one_line, prove_model, try_options
from internal_policy.bupo.config import ALIGNMENT, AUTO, EVALUATION_SETTINGS, PPO_OPTIONS, TrainConfig
from internal_policy.bupo.dynamics import Dynamics, eval_interval, fixed_responses
from internal_policy.bupo.hub import write_card
from internal_policy.bupo.layer_accuracy import watch_layer
from internal_policy.bupo.layer_choice import LayerChoice, analyse, choose_layer, copied_rewards
from internal_policy.bupo.prompts import PromptDataset, is_testbed, make_prompt_dataset
from internal_policy.bupo.resume import RunDirectory
from internal_policy.bupo.run import (
    ADAPTER,
    CHECKPOINTS,
    EVALUATIONS,
    MANIFEST,
    MODEL,
    Run,
    call_digest,
    is_on_the_hub,
)
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.trainer_config import check_trl_options, make_trainer_config
from internal_policy.data import benchmarks
from internal_policy.data.prompts import TESTBED
from internal_policy.models import LanguageModel, exclusive_use, load, without_autocast, wrap
from internal_policy.models.checkpoint_files import refuse_pickles
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.rewards.functions import as_rewards, needs_answers
from internal_policy.rewards.identity import digest_code
from internal_policy.utils.distributed import Processes, training_processes
from internal_policy.utils.errors import UserError
from internal_policy.utils.imports import require_package
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import progress, quiet_libraries, status
from internal_policy.utils.options import takes_options

logger = logging.getLogger(__name__)

_LIBRARIES = ("internal-policy", "torch", "transformers", "trl", "accelerate", "datasets")
_TESTBED_SAMPLES = 4
"""Samples per problem when embedded models are evaluated."""


@quiet_libraries()
@takes_options(TrainConfig, more=True)
@without_autocast()
@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: Any = "testbed/qwen3",
    prompts: Source | None = None,
    *,
    layer: int | str | Path | Analysis | None = None,
    reward: Any = None,
    tokenizer: Any = None,
    peft_config: Any = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> Run:
    r"""Train a language model with BuPO, GRPO, RLOO, REINFORCE++ or PPO.

    A step is one batch of rollouts with all its updates, as in the paper; all ``*_steps`` here count steps. Options
    that are not given come from the preset, or else are the defaults of ``TrainConfig``.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a transformers model,
            which is then trained in place.
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame of {"prompt", "answer"}. By
            default fresh problems of the embedded tasks for an embedded model, else zwhe99/DeepMath-103K (the paper's).
        layer: the layer whose policy is optimised first, from 1; or an ``Analysis`` or its directory, whose boundary
            layer is used; or ``auto`` (the default): the model's own responses to the prompts are analysed first.
        reward: ``math`` (math-verify on the last ``\boxed{}``; the default), ``exact`` (the default for the embedded
            tasks), ``module:function``, or a callable or list of callables in TRL's form.
        tokenizer: the tokenizer of a model given as an object.
        peft_config: a peft configuration; ``lora_rank`` is a shortcut for LoRA.
        callbacks: additional transformers callbacks.
        **options: the other fields of ``TrainConfig``, and options of ``trl.GRPOConfig``, by name.

    Returns:
        The run: ``model_dir``, ``history``, ``dynamics``, ``evaluation``.

    Raises:
        UserError: bad input; the message says what to do.
    """
    loaded = _wrap_loaded(model, tokenizer, options)
    if not isinstance(callbacks, (list, tuple, type(None))):
        raise UserError(f"callbacks is of type {type(callbacks).__name__}; needed is a list of transformers callbacks")
    config = TrainConfig.from_keywords(
        model=loaded.name if loaded else str(model),
        prompts=prompts if isinstance(prompts, (str, Path)) else None,
        layer=(layer.path or layer.boundary_layer) if isinstance(layer, Analysis) else layer,
        reward=reward if isinstance(reward, str) else None,
        **options,
    )
    objects = {
        "model": loaded,
        "tokenizer": tokenizer,
        "peft_config": peft_config,
        "callbacks": callbacks or None,
        "prompts": None if config.prompts else prompts,
        "reward": None if config.reward else reward,
    }
    call = _describe_call(config, [name for name, value in objects.items() if value is not None], model)
    config = config.with_preset()
    check_trl_options(config)
    state = training_processes(config.trl_options)
    with exclusive_use(loaded.model if loaded else None), locked(config.directory, wait=config.wait, state=state):
        choice = choose_layer(layer if isinstance(layer, Analysis) else config.layer)
        return _train(config, call, state, loaded, prompts, choice, reward, peft_config, list(callbacks or []))


def _train(
    config: TrainConfig,
    call: dict[str, Any],
    state: Processes,
    loaded: LanguageModel | None,
    prompts: Source | None,
    choice: LayerChoice,
    reward: Any,
    peft_config: Any,
    callbacks: list[Any],
) -> Run:
    path = config.directory
    directory = RunDirectory(path)
    directory.check(config.overwrite)
    source = as_source(prompts)
    testbed = is_testbed(config.model, source)
    rewards = as_rewards(reward, exact=testbed)
    peft_config = peft_config or _lora(config.lora_rank)
    model = prove_model(loaded or _load(config))
    choice.check(model)
    # If the analysis has yet to choose the layer, everything else is checked with the last one in its place.
    placeholder = model.n_layers if config.wanted_layer is not None else None
    trainer_config = make_trainer_config(
        config, choice.layer or placeholder, path / CHECKPOINTS, state.number, state.device.type
    )
    interval = 0 if state.sharded else eval_interval(config, trainer_config.layer)
    evaluates = config.eval_samples != 0 and (config.benchmark is not None or testbed)
    measured = {"measures": interval > 0, "evaluates": evaluates}
    check_run(config, trainer_config, model, peft_config, state.sharded, processes=state.number, **measured)
    try_options(trainer_config, rewards)
    dataset = make_prompt_dataset(config, source, trainer_config, model, needs_answer=needs_answers(rewards))
    hooked = attached_code(model.model)
    if hooked and not config.overwrite and directory.begun:
        raise resume_refused(path, hooked, "a run")
    evaluation = _evaluation_settings(config, testbed) if evaluates else {}
    settings = {**_settings(config, choice, model, dataset, peft_config, rewards), **evaluation}
    settings["hooked"] = hooked or None
    if not config.overwrite and (path / MANIFEST).is_file():
        return directory.finished(settings)

    # The main process changes the directory only after all others have checked it.
    updates = trainer_config.updates_per_step
    resumed = state.on_main(lambda: directory.open(settings, updates, config.overwrite, state.number))
    state.wait_for_everyone()
    if resumed is not None:
        refuse_pickles(resumed)
    if not state.sharded:
        model.model.to(state.device)
    timings = {"evaluation": 0.0}
    if choice.layer is None and config.wanted_layer is not None:
        started = time.perf_counter()
        choice = analyse(config, trainer_config, model, dataset, copied_rewards(reward, exact=testbed), state)
        timings["analysis"] = round(time.perf_counter() - started, 3)
        trainer_config.layer = choice.layer
        trainer_config.check_steps()
    evaluations: dict[str, str] = {}
    if evaluates:
        evaluations["start"] = _evaluate(config, model, config.model, evaluation["eval_samples"], state, timings)
    responses = []
    if interval:
        length = trainer_config.max_completion_length
        responses = fixed_responses(model, dataset.prompts, config, length, path, state)

    if trainer_config.beta:
        # TRL loads the reference model with these, from the policy's source.
        trainer_config.model_init_kwargs = {"use_safetensors": True, "revision": model.revision}
    with errors_in_one_line(trainer_config, path), _without_ignored_kwargs_notice():
        trainer = BuPOTrainer(
            model=model.model,
            reward_funcs=rewards,
            args=trainer_config,
            train_dataset=dataset.to_trl(config.template or "chat", model.tokenizer),
            processing_class=model.tokenizer,
            # PEFT modifies it, and the caller may reuse it.
            peft_config=copy.deepcopy(peft_config),
            family=model.family,
            callbacks=callbacks,
        )
    with (
        errors_in_one_line(trainer_config, path, trainer.state),
        progress(f"training {config.model}", int(config.max_steps or 0)) as advance,
    ):
        dynamics_callback = None
        if responses:
            assert choice.layer is not None
            live = replace(model, model=trainer.policy_module)
            dynamics = Dynamics(live, responses, choice.layer, site=config.site, lens=config.lens)
            dynamics_callback = DynamicsCallback(trainer, dynamics, interval, path, resumed)
        recorder = HistoryCallback(trainer, path, advance)
        watch = watch_layer(trainer, model, config, evaluation.get("eval_samples"), state, resumed)
        _set_callbacks(trainer, [each for each in (dynamics_callback, watch) if each is not None], recorder, settings)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    with errors_in_one_line(trainer_config, path, trainer.state):
        _save_model(trainer, model.tokenizer, path)

    history = recorder.history()
    timings["training"] = round(float(history["seconds"].sum()), 3)
    tables = dynamics_callback.tables() if dynamics_callback else (pd.DataFrame(), pd.DataFrame())
    run = Run(
        name=config.model,
        method=config.method,
        layer=choice.layer if config.aligns else None,
        layer_reason=choice.reason if config.aligns else "",
        ipa_steps=int((history["phase"] == ALIGNMENT).sum()),
        ipa_reason=_ipa_reason(config, dynamics_callback),
        config=settings,
        history=history,
        dynamics=tables[0],
        dynamics_layers=tables[1],
        path=path,
        layer_accuracy=watch.table() if watch else pd.DataFrame(),
        failures=recorder.failures(),
        timings=timings,
        versions={name: metadata.version(name) for name in _LIBRARIES},
        evaluation_paths=evaluations,
        call=call,
    )
    if evaluates:
        # Without accelerate's mixed precision, so that both models are evaluated in the same way.
        bare: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
        trained = wrap(bare, model.tokenizer, f"{config.model} {run.label}", family=model.family)
        evaluations["trained"] = _evaluate(config, trained, trained.name, evaluation["eval_samples"], state, timings)
    if state.is_main_process:
        # The card comes before the manifest, so that every finished run has one.
        write_card(run)
        run.save()
    state.wait_for_everyone()
    return run


def _wrap_loaded(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> LanguageModel | None:
    """Wrap a model that was given as an object; return None for a name."""
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise UserError(f"tokenizer= was given with the name {str(model)!r}, which brings its own; leave it out")
        return None
    if tokenizer is None:
        raise UserError("a model object was given without its tokenizer; pass tokenizer=")
    for name in ("attn_implementation", "dtype", "revision", "trust_remote_code"):
        if name in options:
            raise UserError(f"{name} was given with a model object, which is taken as it is; set it when loading")
    return wrap(model, tokenizer)


def _describe_call(config: TrainConfig, objects: list[str], model: Any) -> dict[str, Any]:
    """Record the call in the form that ``Run.call`` documents."""
    options: dict[str, Any] = {}
    unserializable = list(objects)
    for name, value in {**config.to_keywords(), "output": str(config.directory)}.items():
        try:
            plain = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            unserializable.append(name)
            continue
        if name not in (*objects, "overwrite", "wait"):
            options[name] = plain
    # Recorded now, because a name that is a directory here may not exist later or elsewhere.
    sources = {"model": model, "prompts": config.prompts}
    from_hub = [name for name, source in sources.items() if is_on_the_hub(source)]
    digest = None if unserializable else call_digest(config)
    return {"options": options, "objects": unserializable, "from_hub": from_hub, "digest": digest}


def _load(config: TrainConfig) -> LanguageModel:
    with status(f"loading {config.model}"):
        return load(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device="cpu",
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
        )


def _lora(rank: int) -> Any:
    """Return LoRA adapters for all linear modules of the layers; None for rank 0."""
    if not rank:
        return None
    require_package("peft", "lora_rank", "train")
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _settings(
    config: TrainConfig,
    choice: LayerChoice,
    model: LanguageModel,
    dataset: PromptDataset,
    peft_config: Any,
    rewards: list[Any],
) -> dict[str, Any]:
    """Return everything that determines the result: two calls with the same settings are the same run."""
    left_out = ("reward", "output", "overwrite", "wait", "trl_options", *EVALUATION_SETTINGS)
    settings = {
        **{name: value for name, value in asdict(config).items() if name not in left_out},
        **config.trl_options,
        "weights": model.fingerprint(),
        "prompts": dataset.digest,
        "layer": choice.layer or config.wanted_layer,
        "rewards": [getattr(r, "__name__", type(r).__name__) for r in rewards],
        "reward_code": digest_code(rewards),
        "peft": None if peft_config is None else _describe_adapters(peft_config),
    }
    for name in ("eval_layer", "reward_code", *PPO_OPTIONS):
        # Absent rather than None, so that the table of settings of a run shows only what applies to it.
        if settings[name] is None:
            del settings[name]
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def _evaluation_settings(config: TrainConfig, testbed: bool) -> dict[str, Any]:
    """How a run is evaluated, with the number of samples that it comes to."""
    source = config.benchmark if config.benchmark is not None else TESTBED
    usual = _TESTBED_SAMPLES if testbed else benchmarks.default_samples(benchmarks.label(source))
    return dict(zip(EVALUATION_SETTINGS, (config.eval_samples or usual, config.eval_problems), strict=True))


def _describe_adapters(peft_config: Any) -> dict[str, Any]:
    """Return the settings of adapters; sets are sorted, because their order differs between processes."""
    found = {name: value for name, value in peft_config.to_dict().items() if value is not None}
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in found.items()}


def _evaluate(
    config: TrainConfig,
    model: LanguageModel,
    name: str,
    samples: int,
    state: Processes,
    timings: dict[str, float],
) -> str:
    """Evaluate on the main process with the benchmark's own verifier: a shaped reward does not measure accuracy."""
    started = time.perf_counter()
    found = None
    if state.is_main_process:
        from internal_policy.evaluation import evaluate

        done = evaluate(
            replace(model, name=name),
            config.benchmark if config.benchmark is not None else TESTBED,
            samples=samples,
            max_problems=config.eval_problems,
            template=config.template or "chat",
            max_new_tokens=config.max_completion_length,
            seed=config.seed,
            output=config.directory / EVALUATIONS,
        )
        assert done.path is not None
        found = str(done.path.relative_to(config.directory))
    where: str = state.broadcast(found)
    timings["evaluation"] = round(timings["evaluation"] + time.perf_counter() - started, 3)
    return where


def _set_callbacks(
    trainer: BuPOTrainer, measuring: list[Any], recorder: HistoryCallback, settings: dict[str, Any]
) -> None:
    """Replace the console output of transformers by the run's own callbacks."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "RichProgressCallback"):
            trainer.remove_callback(callback)
    for callback in measuring:
        trainer.add_callback(callback)
    trainer.add_callback(StepCallback(trainer.args.updates_per_step))
    trainer.add_callback(recorder)
    # The last one, because it records the files that the others add to a checkpoint.
    trainer.add_callback(CheckpointDigestCallback(trainer, settings))


def _save_model(trainer: BuPOTrainer, tokenizer: Any, directory: Path) -> None:
    """Write the model atomically, with adapters merged, so that any library can load it."""
    target, temporary = directory / MODEL, directory / f".{MODEL}.tmp"
    if trainer.is_world_process_zero():
        # A killed process may have left files there.
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(unwrapped, "merge_and_unload"):
        trainer.save_model(str(directory / ADAPTER))
        if trainer.is_world_process_zero():
            unwrapped.merge_and_unload().save_pretrained(temporary)
    else:
        trainer.save_model(str(temporary))
    if trainer.is_world_process_zero():
        if not any(temporary.glob("*.safetensors")):
            raise UserError(
                f"{temporary}: the launcher's configuration wrote no whole weights; use FULL_STATE_DICT (FSDP) or "
                "zero3_save_16bit_model (DeepSpeed). The checkpoints are kept: the same command resumes from them"
            )
        tokenizer.save_pretrained(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)


@contextmanager
def _without_ignored_kwargs_notice() -> Iterator[None]:
    """Drop TRL's notice that it ignores ``model_init_kwargs``, which is untrue for the reference model."""

    def keep(record: logging.LogRecord) -> bool:
        return "You passed `model_init_kwargs`" not in str(record.msg)

    trl_logger = logging.getLogger("trl.trainer.grpo_trainer")
    trl_logger.addFilter(keep)
    try:
        yield
    finally:
        trl_logger.removeFilter(keep)


def _ipa_reason(config: TrainConfig, dynamics: DynamicsCallback | None) -> str:
    if not config.aligns:
        return ""
    if config.ipa_steps != AUTO:
        return "as it was asked for"
    return (dynamics.reason if dynamics else None) or "half of the run was over"
