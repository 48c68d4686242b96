"""One training run, stage by stage; the only file that knows them all."""

from __future__ import annotations

import json
import logging
import time
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
from internal_policy.bupo.directory import RunDirectory
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.bupo.layer import LayerChoice, choose_layer
from internal_policy.bupo.processes import Processes, processes
from internal_policy.bupo.results import CHECKPOINTS, EVALUATIONS, MANIFEST, Run
from internal_policy.bupo.rewards import as_rewards, failures_of
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.words import AUTO, VERIFIERS
from internal_policy.errors import UserError
from internal_policy.evaluation.benchmarks import read_benchmark
from internal_policy.inputs import Source, as_source
from internal_policy.memory import is_out_of_memory
from internal_policy.models import LanguageModel, load, wrap
from internal_policy.progress import progress, status

logger = logging.getLogger(__name__)

_LIBRARIES = ("internal-policy", "torch", "transformers", "trl", "accelerate", "datasets")


@dataclass
class Session:
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
        """Check everything, choose the layer, train, evaluate, write.

        Args:
            opened: the model, where it was given in memory.
            prompts: where the prompts come from.
            reward: as `train` takes it.
            overwrite: start over.
            peft_config: a peft configuration.
            callbacks: further transformers callbacks.

        Returns:
            The run.

        Raises:
            UserError: bad input; nothing was written, or what was written is taken up by the mended call.
        """
        state = processes(self.options)
        directory = RunDirectory(self.directory)
        directory.check(overwrite)
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
        if config.ipa_steps == AUTO and (state.sharded or not rollouts.cadence(self.plan, config)):
            why = "FSDP or DeepSpeed spreads the weights" if state.sharded else "dynamics_every is 0"
            raise UserError(f"ipa_steps is auto, and nothing measures the dynamics ({why}); give a number of steps")
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
            return directory.finished(settings)
        # The main process changes the directory only when all others have checked it.
        state.wait_for_everyone()
        resumed = directory.open(settings, config.updates_per_step, overwrite, state.is_main_process)
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
        directory.save_model(trainer, model.tokenizer)
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

    def _config(self, layer: int | None, state: Processes, probe: bool = False) -> BuPOConfig:
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

    def _analyse(self, model: LanguageModel, stream: rollouts.Stream, state: Processes) -> LayerChoice:
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

    def _evaluates(self, exact: bool) -> bool:
        return self.plan.eval_samples != 0 and (self.plan.benchmark is not None or exact)

    def _evaluate(
        self,
        model: LanguageModel,
        which: str,
        name: str,
        exact: bool,
        reward: Any,
        state: Processes,
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


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in _LIBRARIES}
