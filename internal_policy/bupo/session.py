"""One training run, stage by stage; the only file that knows them all."""

from __future__ import annotations

import copy
import json
import logging
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis.inputs import Source, as_source
from internal_policy.bupo import plan as planning
from internal_policy.bupo import rollouts
from internal_policy.bupo.callbacks import Chronicle, DynamicsWatch, StepRecord
from internal_policy.bupo.card import write_card
from internal_policy.bupo.checkpoint import Seal
from internal_policy.bupo.config import BuPOConfig
from internal_policy.bupo.directory import RunDirectory
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.bupo.layer import LayerChoice, choose_layer
from internal_policy.bupo.presets import ALIGNMENT, AUTO
from internal_policy.bupo.proof import check_experts, proved
from internal_policy.bupo.refusals import refusing
from internal_policy.bupo.rehearsal import rehearse
from internal_policy.bupo.results import CHECKPOINTS, EVALUATIONS, MANIFEST, Run
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.data.benchmarks import read_benchmark
from internal_policy.data.prompts import TESTBED
from internal_policy.models import LanguageModel, load, wrap
from internal_policy.models.checkpoint_files import refuse_pickles, weight_files
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.rewards.functions import as_rewards, compare
from internal_policy.utils.distributed import Processes, processes
from internal_policy.utils.errors import UserError
from internal_policy.utils.loading_errors import told_in_one_line
from internal_policy.utils.locks import locked
from internal_policy.utils.progress import progress, status

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
    call: dict[str, Any] = field(default_factory=dict)

    def run(
        self,
        opened: LanguageModel | None,
        prompts: Source | None,
        reward: Any,
        overwrite: bool,
        wait: bool,
        peft_config: Any,
        callbacks: list[Any],
    ) -> Run:
        """Check everything, choose the layer, train, evaluate, write.

        Args:
            opened: the model, where it was given in memory.
            prompts: where the prompts come from.
            reward: as `train` takes it.
            overwrite: start over.
            wait: where another process writes to the directory, start when it has ended.
            peft_config: a peft configuration.
            callbacks: further transformers callbacks.

        Returns:
            The run.

        Raises:
            UserError: bad input; what was written before it was noticed is taken up or replaced by the mended call.
        """
        state = processes(self.options)
        with locked(self.directory, wait=wait, state=state):
            return self._run(state, opened, prompts, reward, overwrite, peft_config, callbacks)

    def _run(
        self,
        state: Processes,
        opened: LanguageModel | None,
        prompts: Source | None,
        reward: Any,
        overwrite: bool,
        peft_config: Any,
        callbacks: list[Any],
    ) -> Run:
        directory = RunDirectory(self.directory)
        directory.check(overwrite)
        source = as_source(prompts)
        exact = rollouts.is_exact(self.name, source)
        rewards = as_rewards(reward, exact=exact)
        choice = choose_layer(self.layer)
        peft_config = peft_config or rollouts.lora(self.plan)
        with status(f"loading {self.name}"):
            model = opened or load(
                self.name,
                revision=self.plan.revision,
                dtype=self.plan.dtype,
                device="cpu",
                trust_remote_code=self.plan.trust_remote_code,
                attn_implementation=self.plan.attn_implementation,
            )
        model = proved(model)
        choice.check(model)
        # A layer that the analysis has yet to find may be any; everything else can be checked already.
        open_layer = model.n_layers if self.layer is not None else None
        config = self._config(choice.layer or open_layer, state)
        self._refuse(config, model, state, exact, peft_config)
        rehearse(config, rewards)
        stream = rollouts.stream(self.name, source, self.plan, config, model, needs_answer=compare(rewards))
        hooked = attached_code(model.model)
        if hooked and not overwrite and directory.begun:
            raise resume_refused(self.directory, hooked, "a run")
        settings = {**self._settings(choice, model, stream, peft_config, rewards), "hooked": hooked or None}
        if not overwrite and (self.directory / MANIFEST).is_file():
            return directory.finished(settings)
        # The main process changes the directory only when all others have checked it.
        resumed = state.on_main(lambda: directory.open(settings, config.updates_per_step, overwrite, state.number))
        state.wait_for_everyone()
        if resumed is not None:
            refuse_pickles(resumed)
        if not state.sharded:
            model.model.to(state.device)
        timings = {"evaluation": 0.0}
        if choice.layer is None and self.layer is not None:
            started = time.perf_counter()
            choice = self._analyse(model, stream, state)
            timings["analysis"] = round(time.perf_counter() - started, 3)
        config = self._config(choice.layer, state)
        paths: dict[str, str] = {}
        if self._evaluates(exact):
            paths["start"] = self._evaluate(model, self.name, exact, state, timings)
        if config.beta:
            # With these TRL reads the reference model by itself, from where the policy came from.
            config.model_init_kwargs = {"use_safetensors": True, "revision": model.revision}
            logging.getLogger("trl.trainer.grpo_trainer").addFilter(_are_not_ignored)
        watched = rollouts.fixed_responses(model, stream, self.plan, config, self.directory, state)
        with refusing(config, self.directory):
            trainer = BuPOTrainer(
                model=model.model,
                reward_funcs=rewards,
                args=config,
                train_dataset=stream.dataset(self.plan.template, model.tokenizer),
                processing_class=model.tokenizer,
                # It is filled in, and the caller's shall serve for further calls.
                peft_config=copy.deepcopy(peft_config),
                family=model.family,
                callbacks=callbacks,
            )
        with refusing(config, self.directory, trainer), ExitStack() as stack:
            chronicle, watch = self._watch(stack, trainer, model, choice, watched, resumed)
            # After the others: what they add to a checkpoint is sealed with it.
            trainer.add_callback(Seal(trainer, settings))
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        with refusing(config, self.directory, trainer):
            directory.save_model(trainer, model.tokenizer)
        history = chronicle.history()
        timings["training"] = round(float(history["seconds"].sum()), 3)
        dynamics, layers = watch.tables() if watch else (pd.DataFrame(), pd.DataFrame())
        run = Run(
            name=self.name,
            method=config.method,
            layer=choice.layer if config.aligns else None,
            layer_reason=choice.reason if config.aligns else "",
            ipa_steps=int((history["phase"] == ALIGNMENT).sum()),
            ipa_reason=_ipa_reason(config, watch),
            config=settings,
            history=history,
            dynamics=dynamics,
            dynamics_layers=layers,
            path=self.directory,
            failures=chronicle.failures(),
            timings=timings,
            versions={name: metadata.version(name) for name in _LIBRARIES},
            evaluation_paths=paths,
            call=self.call,
        )
        if self._evaluates(exact):
            # Without accelerate's mixed precision around it: both ends of the comparison are computed alike.
            bare: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            bare = bare.get_base_model() if hasattr(bare, "get_base_model") else bare
            trained = wrap(bare, model.tokenizer, f"{self.name} {run.label}", family=model.family)
            paths["trained"] = self._evaluate(trained, trained.name, exact, state, timings)
        if state.is_main_process:
            # Before the manifest: a run that has ended has its card.
            write_card(run)
            run.save()
        state.wait_for_everyone()
        return run

    def _refuse(
        self, config: BuPOConfig, model: LanguageModel, state: Processes, exact: bool, peft_config: Any
    ) -> None:
        """Refuse, before anything is written, what the trainer would fall over later, or do silently wrong."""
        if config.ipa_steps == AUTO and (state.sharded or not rollouts.cadence(self.plan, config)):
            why = "FSDP or DeepSpeed spreads the weights" if state.sharded else "dynamics_every is 0"
            raise UserError(f"ipa_steps is auto, and nothing measures the dynamics ({why}); give a number of steps")
        check_experts(config, model.config)
        if config.freeze_layers > model.n_layers:
            raise UserError(f"freeze_layers is {config.freeze_layers} and the model has {model.n_layers} layers")
        if config.sync_ref_model and not config.beta:
            raise UserError("sync_ref_model=True without a reference model; give beta, or leave it out")
        if config.beta and peft_config is None:
            self._refuse_reference(model)
        if peft_config is not None and not hasattr(peft_config, "peft_type"):
            raise UserError(f"peft_config is a {type(peft_config).__name__}; needed is one of peft, such as LoraConfig")
        if peft_config is not None and state.sharded:
            raise UserError(
                "adapters under FSDP or DeepSpeed are not supported: they cannot be merged into the model that is "
                "written at the end; use DDP, or train all weights"
            )
        asked = next((n for n in ("eval_problems", "eval_samples") if getattr(self.plan, n)), None)
        if asked and self.plan.eval_samples != 0 and not self._evaluates(exact):
            raise UserError(
                f"{asked} was given, and there is nothing to evaluate on: prompts of your own are trained on only; "
                "give benchmark, or leave it out"
            )
        if self._evaluates(exact) and self.plan.benchmark is not None:
            read_benchmark(self.plan.benchmark, self.plan.eval_problems)

    def _refuse_reference(self, model: LanguageModel) -> None:
        """Refuse a reference model that TRL could not read again from where the policy came from, or only in pickle."""
        where = str(model.config._name_or_path)
        advice = "beta needs the model as it was before training: save it, and give its directory"
        with told_in_one_line(self.name, "the reference model", advice=advice):
            if not weight_files(where, model.config, model.revision, self.name):
                raise UserError(
                    f"{self.name}: no safetensors weights in {where!r} to read the reference model from; {advice}"
                )

    def _config(self, layer: int | None, state: Processes) -> BuPOConfig:
        options = {**self.options, "layer": layer}
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
            "peft": _told_alike(peft_config) if peft_config is not None else None,
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
        resumed: Path | None,
    ) -> tuple[Chronicle, DynamicsWatch | None]:
        config = trainer.args
        # Ours replace what transformers prints and draws.
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "RichProgressCallback"):
                trainer.remove_callback(callback)
        watch = None
        if responses:
            live = replace(model, model=trainer.policy_module)
            dynamics = Dynamics(live, responses, choice.layer or 1, site=config.site, lens=config.lens)
            watch = DynamicsWatch(trainer, dynamics, rollouts.cadence(self.plan, config), self.directory, resumed)
            trainer.add_callback(watch)
        advance = stack.enter_context(progress(f"training {self.name}", self.plan.max_steps))
        trainer.add_callback(StepRecord(config.updates_per_step))
        chronicle = Chronicle(trainer, self.directory, advance)
        trainer.add_callback(chronicle)
        return chronicle, watch

    def _evaluates(self, exact: bool) -> bool:
        return self.plan.eval_samples != 0 and (self.plan.benchmark is not None or exact)

    def _evaluate(
        self, model: LanguageModel, name: str, exact: bool, state: Processes, timings: dict[str, float]
    ) -> str:
        """Evaluate on the main process, by the benchmark's own verifier: a shaped reward is no measure of accuracy."""
        started = time.perf_counter()
        found = None
        if state.is_main_process:
            from internal_policy.evaluation import evaluate

            done = evaluate(
                replace(model, name=name),
                self.plan.benchmark if self.plan.benchmark is not None else TESTBED,
                samples=self.plan.eval_samples or (rollouts.EXACT_SAMPLES if exact else None),
                max_problems=self.plan.eval_problems,
                template=self.plan.template,
                max_new_tokens=self.options.get("max_completion_length"),
                seed=self.options["seed"],
                output=self.directory / EVALUATIONS,
            )
            assert done.path is not None
            found = str(done.path.relative_to(self.directory))
        where: str = state.broadcast(found)
        timings["evaluation"] = round(timings["evaluation"] + time.perf_counter() - started, 3)
        return where


def _are_not_ignored(record: logging.LogRecord) -> bool:
    """Whether this is anything but TRL's word that it ignores how a model is loaded: of the reference it does not."""
    return "You passed `model_init_kwargs`" not in str(record.msg)


def _told_alike(peft_config: Any) -> str:
    """The same text for the same adapters in every process: the order of a set is not."""
    told = copy.copy(peft_config)
    for name, value in vars(peft_config).items():
        if isinstance(value, (set, frozenset)):
            setattr(told, name, sorted(value))
    return str(told)


def _ipa_reason(config: BuPOConfig, watch: DynamicsWatch | None) -> str:
    if not config.aligns:
        return ""
    if config.ipa_steps != AUTO:
        return "as it was asked for"
    return (watch.reason if watch else None) or "half of the run was over"
