"""``bupo.train``: model, prompts, layer, reward, trainer, result, in order; the only file that knows them all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.bupo import plan as planning
from internal_policy.bupo import rollouts
from internal_policy.bupo.callbacks import AlignmentRate, Chronicle, DynamicsWatch
from internal_policy.bupo.config import BuPOConfig
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.bupo.layer import LayerChoice, choose_layer
from internal_policy.bupo.results import (
    CHECKPOINTS,
    DYNAMICS,
    DYNAMICS_LAYERS,
    EVALUATIONS,
    HISTORY,
    MANIFEST,
    MODEL,
    Run,
    load_run,
)
from internal_policy.bupo.rewards import as_rewards, failures_of
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.words import AUTO, VERIFIERS
from internal_policy.errors import UserError
from internal_policy.evaluation.benchmarks import read_benchmark
from internal_policy.files import write_text
from internal_policy.inputs import Source, as_source
from internal_policy.memory import is_out_of_memory
from internal_policy.models import LanguageModel, load, wrap
from internal_policy.progress import progress, status
from internal_policy.results import Analysis
from internal_policy.workspace import differences

logger = logging.getLogger(__name__)

DATA = Path("data/runs")
_SETTINGS = "settings.json"
_ADAPTER = "adapter"
_STATE = "trainer_state.json"
_LIBRARIES = ("internal-policy", "torch", "transformers", "trl", "accelerate", "datasets")


def train(
    model: Any = "testbed/qwen3",
    prompts: Source | None = None,
    *,
    layer: int | str | Path | Analysis | None = None,
    ipa_steps: int | str | None = None,
    method: str | None = None,
    reward: Any = None,
    max_steps: int | None = None,
    output: str | Path | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
    peft_config: Any = None,
    callbacks: list[Any] | None = None,
    **options: Any,
) -> Run:
    r"""Train a language model with BuPO, GRPO, RLOO or REINFORCE++.

    A step is one batch of rollouts with all its updates, as in the paper; all ``*_steps`` here count steps.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a transformers model,
            which is then trained in place.
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame of {"prompt", "answer"}. By
            default fresh problems of the embedded tasks for an embedded model, else zwhe99/DeepMath-103K (the paper's).
        layer: the layer whose policy is optimised first, from 1; or an ``Analysis`` or its directory, whose boundary
            layer is taken; or ``auto`` (the default): the model's own responses to the prompts are analysed first.
        ipa_steps: steps of that first phase (s_inter), or ``auto``: until its own dynamics turn. By default the
            preset's share of the run: a tenth for the paper's.
        method: ``bupo`` (the default), ``grpo``, ``rloo`` or ``reinforce++``.
        reward: ``math`` (math-verify on the last ``\boxed{}``; the default), ``exact`` (the default for the embedded
            tasks), ``module:function``, or a callable or list of callables in TRL's form.
        max_steps: steps in all.
        output: directory of the run, ``data/runs/<model>--<method>...`` by default; an interrupted run is taken up.
        tokenizer: the tokenizer of a model given as an object.
        overwrite: start over where the directory holds another run.
        peft_config: a peft configuration; ``lora_rank`` is the short way.
        callbacks: further transformers callbacks.
        **options: the fields of ``Plan``, and every option of ``BuPOConfig`` and so of ``trl.GRPOConfig``.

    Returns:
        The run: ``model_dir``, ``history``, ``dynamics``, ``evaluation``.

    Raises:
        UserError: bad input; the message says what to do.
    """
    name, given_model = _name_of(model, tokenizer, options)
    words = {"method": method, "ipa_steps": ipa_steps, "max_steps": max_steps}
    plan, trainer_options = planning.split(name, words, options)
    seed = trainer_options.get("seed", 0)
    trainer_options["seed"] = seed
    steps = trainer_options["ipa_steps"]
    wanted_layer = (layer if layer is not None else AUTO) if trainer_options["method"] == "bupo" and steps else layer
    directory = (
        Path(output).expanduser()
        if output is not None
        else DATA / planning.slug(name, plan.revision, trainer_options["method"], wanted_layer, steps, seed)
    )
    session = _Session(name, plan, trainer_options, directory, wanted_layer)
    return session.run(given_model, prompts, reward, overwrite, peft_config, callbacks or [])


def _name_of(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> tuple[str, LanguageModel | None]:
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise UserError(f"tokenizer= was given with the name {str(model)!r}, which brings its own; leave it out")
        return str(model), None
    if tokenizer is None:
        raise UserError("a model object was given without its tokenizer; pass tokenizer=")
    if told := sorted(options.keys() & {"revision", "dtype", "trust_remote_code"}):
        raise UserError(f"{told[0]} was given with a model object, which is taken as it is; set it when loading")
    opened = wrap(model, tokenizer)
    return opened.name, opened


@dataclass
class _Session:
    """One call of `train`."""

    name: str
    plan: planning.Plan
    options: dict[str, Any]
    directory: Path
    layer: Any

    def run(
        self,
        opened: LanguageModel | None,
        prompts: Source | None,
        reward: Any,
        overwrite: bool,
        peft_config: Any,
        callbacks: list[Any],
    ) -> Run:
        state = rollouts.processes(self.options)
        self._check_directory(overwrite)
        source = as_source(prompts)
        exact = rollouts.is_exact(self.name, source)
        rewards = as_rewards(reward, exact=exact)
        choice = choose_layer(self.layer)
        with status(f"loading {self.name}"):
            model = opened or load(
                self.name,
                revision=self.plan.revision,
                dtype=self.plan.dtype,
                device="cpu",
                trust_remote_code=self.plan.trust_remote_code,
            )
        choice.check(model)
        config = self._config(choice.layer, state, probe=True)
        if config.freeze_layers > model.n_layers:
            raise UserError(f"freeze_layers is {config.freeze_layers} and the model has {model.n_layers} layers")
        if self._evaluates(exact) and self.plan.benchmark is not None:
            # Read here for its errors, before anything is written.
            read_benchmark(self.plan.benchmark, self.plan.eval_problems)
        stream = rollouts.stream(
            self.name,
            source,
            self.plan,
            config,
            model,
            needs_answer=reward is None or (isinstance(reward, str) and reward in VERIFIERS),
        )
        settings = self._settings(choice, model, stream, peft_config, rewards)
        if not overwrite and (self.directory / MANIFEST).is_file():
            return self._finished(settings)
        # The main process changes the directory only when all others have checked it.
        state.wait_for_everyone()
        resumed = self._open(settings, config.updates_per_step, overwrite, state.is_main_process)
        state.wait_for_everyone()
        timings = {}
        if not state.sharded:
            model.model.to(state.device)
        if choice.layer is None and self.layer is not None:
            started = time.perf_counter()
            choice = self._analyse(model, stream, state)
            timings["analysis"] = round(time.perf_counter() - started, 3)
        config = self._config(choice.layer, state)
        timings["evaluation"] = 0.0
        paths: dict[str, str] = {}
        if self._evaluates(exact):
            self._evaluate(model, "start", self.name, exact, reward, state, paths, timings)
        watched = rollouts.fixed_responses(model, stream, self.plan, config, self.directory, state)
        started = time.perf_counter()
        trainer = BuPOTrainer(
            model=model.model,
            reward_funcs=rewards,
            args=config,
            train_dataset=stream.dataset(self.plan.template, model.tokenizer),
            processing_class=model.tokenizer,
            peft_config=peft_config or rollouts.lora(self.plan),
            callbacks=callbacks,
        )
        with ExitStack() as stack:
            chronicle, watch = self._watch(stack, trainer, model, choice, watched)
            try:
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"out of memory in training; lower per_device_train_batch_size (now "
                    f"{config.per_device_train_batch_size}) or max_completion_length, and start over with --overwrite"
                ) from error
        timings["training"] = round(time.perf_counter() - started, 3)
        history = chronicle.history()
        dynamics, layers = watch.tables() if watch else (pd.DataFrame(), pd.DataFrame())
        self._save_model(trainer, model)
        taken = int((history["phase"] == "ipa").sum()) if len(history) else 0
        run = Run(
            name=self.name,
            method=config.method,
            layer=choice.layer if config.aligns else None,
            layer_reason=choice.reason if config.aligns else "",
            ipa_steps=taken,
            ipa_reason=_ipa_reason(config, watch),
            config=settings,
            history=history,
            dynamics=dynamics,
            dynamics_layers=layers,
            path=self.directory,
            failures=dict(failures_of(rewards)),
            timings=timings,
            versions=_versions(),
            evaluation_paths=paths,
        )
        if self._evaluates(exact):
            trained = wrap(trainer.policy_module, model.tokenizer, self.name)
            self._evaluate(trained, "trained", f"{self.name} {run.label}", exact, reward, state, paths, timings)
        if state.is_main_process:
            run.save()
        state.wait_for_everyone()
        return run

    def _config(self, layer: int | None, state: rollouts.Processes, probe: bool = False) -> BuPOConfig:
        options = {**self.options, "layer": layer}
        if probe and layer is None:
            # The layer is not known before the analysis; everything else can be checked already.
            options["layer"] = 1
        where = str(self.directory / CHECKPOINTS)
        return planning.configure(self.plan, options, where, state.number, state.device.type)

    def _settings(
        self, choice: LayerChoice, model: LanguageModel, stream: rollouts.Stream, peft_config: Any, rewards: list[Any]
    ) -> dict[str, Any]:
        """What decides the result: two calls with the same settings are the same run."""
        fields = {key: value for key, value in asdict(self.plan).items() if not key.startswith("eval_")}
        settings = {
            "model": self.name,
            "weights": model.fingerprint(),
            "prompts": stream.digest,
            "layer": choice.layer or (str(self.layer) if self.layer is not None else None),
            "rewards": [getattr(r, "__name__", type(r).__name__) for r in rewards],
            "peft": str(peft_config) if peft_config is not None else None,
            "plan": fields,
            "trainer": {"site": "layer", "lens": "policy", **self.options},
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    def _check_directory(self, overwrite: bool) -> None:
        existing = next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            what = "is a directory that may not be written to" if existing.is_dir() else "is a file"
            raise UserError(
                f"{self.directory}: cannot be written ({existing} {what}); choose another --output directory"
            )
        ours = {MANIFEST, _SETTINGS}
        if self.directory.is_dir() and any(self.directory.iterdir()):
            if not any((self.directory / name).is_file() for name in ours):
                held = sorted(p.name for p in self.directory.iterdir())[0]
                raise UserError(
                    f"{self.directory}: is in use for something else (it holds {held}); choose another --output "
                    "directory"
                )
            if not overwrite and (self.directory / MANIFEST).is_file():
                load_run(self.directory)

    def _finished(self, settings: dict[str, Any]) -> Run:
        run = load_run(self.directory)
        if differing := _differing(run.config, settings):
            raise UserError(
                f"{self.directory}: already holds a run with other settings ({differing}); choose another --output "
                "directory, or add --overwrite to start over"
            )
        logger.warning("%s: already complete; nothing to train (--overwrite starts over)", self.directory)
        return run

    def _open(self, settings: dict[str, Any], updates_per_step: int, overwrite: bool, main: bool) -> Path | None:
        """Begin the run, or find the checkpoint from which it goes on."""
        stored = self.directory / _SETTINGS
        if stored.is_file() and not overwrite:
            try:
                before = json.loads(stored.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{stored}: cannot be read ({error}); add --overwrite to start over") from error
            if differing := _differing(before, settings):
                raise UserError(
                    f"{self.directory}: holds an unfinished run with other settings ({differing}); repeat its command, "
                    "choose another --output directory, or add --overwrite to start over"
                )
            checkpoint = last_checkpoint(self.directory / CHECKPOINTS, updates_per_step)
            if checkpoint is not None:
                logger.warning("%s: going on from %s", self.directory, checkpoint.name)
            return checkpoint
        if main:
            if overwrite:
                self._clear()
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(stored, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        return None

    def _clear(self) -> None:
        """Remove what an earlier run wrote, the manifest first; nothing else that is there."""
        for name in (MANIFEST, HISTORY, DYNAMICS, DYNAMICS_LAYERS, rollouts.FIXED, _SETTINGS):
            (self.directory / name).unlink(missing_ok=True)
        for name in (CHECKPOINTS, EVALUATIONS, MODEL, f".{MODEL}.tmp", _ADAPTER, rollouts.ANALYSIS):
            shutil.rmtree(self.directory / name, ignore_errors=True)

    def _analyse(self, model: LanguageModel, stream: rollouts.Stream, state: rollouts.Processes) -> LayerChoice:
        found = None
        if state.is_main_process:
            limit = self.options.get("max_completion_length")
            found = choose_layer(
                rollouts.analyse(model, stream, self.plan, self.directory, limit, self.options["seed"])
            )
            found.check(model)
        choice: LayerChoice = state.broadcast(found)
        logger.warning("layer %d: %s", choice.layer, choice.reason)
        return choice

    def _watch(
        self,
        stack: ExitStack,
        trainer: BuPOTrainer,
        model: LanguageModel,
        choice: LayerChoice,
        responses: list[Any],
    ) -> tuple[Chronicle, DynamicsWatch | None]:
        config = trainer.args
        # Ours replace what transformers prints and draws.
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "RichProgressCallback"):
                trainer.remove_callback(callback)
        factor = (
            (config.ipa_learning_rate or config.learning_rate) / config.learning_rate if config.learning_rate else 1.0
        )
        watch = None
        if responses:
            live = replace(model, model=trainer.policy_module)
            dynamics = Dynamics(live, responses, choice.layer or 1, site=config.site, lens=config.lens)
            watch = DynamicsWatch(trainer, dynamics, rollouts.cadence(self.plan, config), self.directory)
            trainer.add_callback(watch)
        if factor != 1.0:
            trainer.add_callback(AlignmentRate(trainer, factor))
        advance = stack.enter_context(progress(f"training {self.name}", self.plan.max_steps))
        chronicle = Chronicle(trainer, self.directory, advance, factor)
        trainer.add_callback(chronicle)
        return chronicle, watch

    def _save_model(self, trainer: BuPOTrainer, model: LanguageModel) -> None:
        """Write the model whole or not at all, with adapters merged, so that anything loads it."""
        target, temporary = self.directory / MODEL, self.directory / f".{MODEL}.tmp"
        unwrapped: Any = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(unwrapped, "merge_and_unload"):
            trainer.save_model(str(self.directory / _ADAPTER))
            if trainer.is_world_process_zero():
                unwrapped.merge_and_unload().save_pretrained(temporary)
        else:
            trainer.save_model(str(temporary))
        if trainer.is_world_process_zero():
            model.tokenizer.save_pretrained(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)

    def _evaluates(self, exact: bool) -> bool:
        return self.plan.eval_samples != 0 and (self.plan.benchmark is not None or exact)

    def _evaluate(
        self,
        model: LanguageModel,
        which: str,
        name: str,
        exact: bool,
        reward: Any,
        state: rollouts.Processes,
        paths: dict[str, str],
        timings: dict[str, float],
    ) -> None:
        """Evaluate on the main process; the same problems and random streams before and after."""
        started = time.perf_counter()
        if state.is_main_process and not state.sharded:
            from internal_policy.evaluation import evaluate

            done = evaluate(
                replace(model, name=name),
                self.plan.benchmark,
                samples=self.plan.eval_samples or (rollouts.EXACT_SAMPLES if exact else None),
                max_problems=self.plan.eval_problems,
                template=self.plan.template,
                max_new_tokens=self.options.get("max_completion_length"),
                reward=reward if self.plan.benchmark is not None else None,
                seed=self.options["seed"],
                output=self.directory / EVALUATIONS,
            )
            assert done.path is not None
            paths[which] = str(done.path.relative_to(self.directory))
        timings["evaluation"] = round(timings["evaluation"] + time.perf_counter() - started, 3)
        state.wait_for_everyone()


def _ipa_reason(config: BuPOConfig, watch: DynamicsWatch | None) -> str:
    if not config.aligns:
        return ""
    if config.ipa_steps != AUTO:
        return "as it was asked for"
    return (watch.reason if watch else None) or "half of the run was over"


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    flat = [{**s, **s.get("plan", {}), **s.get("trainer", {}), "plan": None, "trainer": None} for s in (before, now)]
    return differences(*flat)


def last_checkpoint(directory: Path, updates_per_step: int = 1) -> Path | None:
    """Find the newest checkpoint from which a run can go on as if it had not stopped.

    Args:
        directory: where the trainer puts them.
        updates_per_step: updates on a batch of rollouts.

    Returns:
        It, or None. The trainer's state is the last file of a checkpoint: without it the checkpoint is half-written.
        One from between two updates of a step is passed over, for the rollouts of that step are not in it.
    """
    found = []
    for checkpoint in directory.glob("checkpoint-*"):
        try:
            state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
            update = int(state["global_step"])
        except (OSError, ValueError, KeyError):
            continue
        if update % updates_per_step == 0:
            found.append((update, checkpoint))
    return max(found)[1] if found else None


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}
