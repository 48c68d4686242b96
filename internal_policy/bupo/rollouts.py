"""What the trainer is fed with: the stream of prompts, fixed responses, adapters."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from internal_policy.analysis.results import Analysis
from internal_policy.bupo.config import BuPOConfig
from internal_policy.bupo.plan import Plan
from internal_policy.bupo.presets import AUTO
from internal_policy.data.prompts import NAMED_TEMPLATES, TESTBED, Prompt, read_prompts, render_all
from internal_policy.data.responses import Response
from internal_policy.generation import Request, check_prompt_lengths, sample
from internal_policy.models import LanguageModel, context, eval_mode
from internal_policy.utils.distributed import Processes
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import read_lines_sealed, set_aside, write_lines_sealed
from internal_policy.utils.memory import halving
from internal_policy.utils.progress import status

logger = logging.getLogger(__name__)

PAPERS_PROMPTS = "zwhe99/DeepMath-103K"
EXACT_SAMPLES = 4
"""Samples a problem when embedded models are evaluated after training."""
_STREAM_SEED = 3_000_000
"""Added to the seed of a run for fresh problems: other problems than those of analysis and evaluation."""
_ANALYSED = 128
_DYNAMICS_MEASUREMENTS = 10
FIXED = "dynamics_responses.jsonl"
"""File of the responses that the dynamics are measured on."""
ANALYSIS = "analysis"
"""Directory of the analysis that chose the layer."""
_TRLS_COLUMNS = {
    *("prompt", "prompts", "answer", "completion", "completions", "completion_ids", "image", "images", "environment"),
    *("environments", "trainer_state", "log_extra", "log_metric"),
}
"""Columns under these names would meet TRL's own, or the arguments that it hands to reward functions."""


def is_exact(model: str, source: str | list[Any] | None) -> bool:
    """Tell whether the prompts are the embedded tasks, whose answers are checked exactly.

    Args:
        model: the model's name.
        source: where the prompts come from.

    Returns:
        True for ``testbed``, and for an embedded model's default.
    """
    return source == TESTBED or (source is None and model.startswith("testbed/"))


@dataclass(frozen=True)
class Stream:
    """The prompts in the order in which they are trained on, one for each group of rollouts of the whole run."""

    prompts: list[Prompt]
    """One a group."""

    @property
    def digest(self) -> str:
        """A digest of questions and answers in their order."""
        told = [[p.content, p.answer] for p in self.prompts]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def dataset(self, template: str, tokenizer: Any) -> Dataset:
        """The stream in TRL's form.

        Args:
            template: how a prompt is put to the model.
            tokenizer: the model's.

        Returns:
            Rows with ``prompt`` (a chat where the tokenizer has a template for it, else text), ``answer``, and the
            other columns of the records.
        """
        others = sorted({c for p in self.prompts for c in p.columns} - _TRLS_COLUMNS)
        return Dataset.from_dict(
            {
                "prompt": [_written(p, template, tokenizer) for p in self.prompts],
                "answer": [p.answer for p in self.prompts],
                **{c: _of_one_type([p.columns.get(c) for p in self.prompts]) for c in others},
            }
        )


def _of_one_type(values: list[Any]) -> list[Any]:
    """A column that a data set cannot hold, such as one of numbers and words, becomes text."""
    try:
        Dataset.from_dict({"column": values})
    except (ValueError, TypeError, NotImplementedError, OverflowError):
        # Half a character, as JSON may hold it, is in no text that can be written.
        return [None if value is None else str(value).encode(errors="replace").decode() for value in values]
    return values


def _written(prompt: Prompt, template: str, tokenizer: Any) -> Any:
    if template in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[template](prompt.problem)
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        return prompt.chat
    return "\n\n".join(m["content"] for m in prompt.chat)


def stream(
    name: str,
    source: str | list[Any] | None,
    plan: Plan,
    config: BuPOConfig,
    model: LanguageModel,
    *,
    needs_answer: bool,
) -> Stream:
    """Settle which prompts are trained on, in which order; the same for every method with the same seed.

    Args:
        name: the model's name.
        source: where the prompts come from.
        plan: the plan.
        config: the trainer's configuration.
        model: the model that will read them.
        needs_answer: whether the reward compares with a reference answer.

    Returns:
        The stream: each pass over the prompts in an order of its own, as many as the run needs.

    Raises:
        UserError: unreadable, empty, without answers, or too long for the model.
    """
    groups = config.generation_batch_size // config.num_generations
    micro_steps = config.max_steps * config.gradient_accumulation_steps
    needed = groups * ceil(micro_steps / (config.steps_per_generation * config.num_iterations))
    if is_exact(name, source):
        from internal_policy.data import arithmetic as tasks

        problems = tasks.problems(needed, seed=_STREAM_SEED + config.seed)
        found = [Prompt(p.prompt, p.answer) for p in problems]
    else:
        found = read_prompts(source if source is not None else PAPERS_PROMPTS, split=plan.prompts_split)
    if needs_answer:
        lacking = (i for i, p in enumerate(found, start=1) if p.unusable or not (p.answer or "").strip())
        if (without := next(lacking, None)) is not None:
            has = found[without - 1].unusable or "no answer"
            raise UserError(
                f"prompt {without} has {has}; the reward compares with one: give each record an 'answer', or pass "
                "another reward"
            )
    fitting = _fitting(found, plan, config, model)
    if is_exact(name, source):
        return Stream(fitting)
    order: list[int] = []
    while len(order) < needed:
        rng = np.random.default_rng((config.seed, len(order) // len(fitting)))
        order += rng.permutation(len(fitting)).tolist()
    return Stream([fitting[i] for i in order[:needed]])


def _fitting(found: list[Prompt], plan: Plan, config: BuPOConfig, model: LanguageModel) -> list[Prompt]:
    rendered = render_all(found, plan.template, model.tokenizer)
    requests = [Request(p, ids, i, 0) for i, (p, ids) in enumerate(zip(found, rendered, strict=True))]
    longest = plan.max_prompt_length
    kept = [r for r in requests if len(r.prompt_ids) <= longest]
    if not kept:
        shortest = min(len(r.prompt_ids) for r in requests)
        raise UserError(f"max_prompt_length is {longest} and the shortest prompt has {shortest} tokens; raise it")
    check_prompt_lengths(kept, model)
    room = max(len(r.prompt_ids) for r in kept) + config.max_completion_length
    if model.max_length is not None and room > model.max_length:
        raise UserError(
            f"max_completion_length is {config.max_completion_length}, the longest prompt has "
            f"{room - config.max_completion_length} tokens, and the model's context is {model.max_length}; "
            "lower max_completion_length or max_prompt_length"
        )
    switch = context.length_switch(model.config)
    if switch is not None and room > switch:
        raise UserError(
            f"max_completion_length is {config.max_completion_length}, the longest prompt has "
            f"{room - config.max_completion_length} tokens, and beyond {switch} tokens LongRoPE computes "
            "every sequence of a batch with other positions, so that the ratio compares two models; lower "
            "max_completion_length or max_prompt_length"
        )
    return [r.prompt for r in kept]


def fixed_responses(
    model: LanguageModel, prompts: Stream, plan: Plan, config: BuPOConfig, directory: Path, state: Processes
) -> list[Response]:
    """Sample the responses on which the dynamics are measured, once a run, from the policy as it was given.

    Args:
        model: the model before training.
        prompts: the stream, whose first prompts are answered.
        plan: the plan.
        config: the trainer's configuration.
        directory: the run's; the responses are kept there for a resumed run.
        state: the processes.

    Returns:
        The responses; none where the dynamics are left out.
    """
    if not cadence(plan, config) or state.sharded:
        return []
    path = directory / FIXED
    found: list[Response] = []
    if state.is_main_process:
        lines = read_lines_sealed(path) if path.is_file() else None
        if lines is not None:
            found = [Response(**json.loads(line)) for line in lines]
        else:
            if path.is_file():
                logger.warning("%s: damaged; kept as %s, and made again", path, set_aside(path).name)
            with status("sampling the responses on which the dynamics are measured"):
                found = _answers(model, prompts.prompts[: plan.dynamics_responses], plan, config)
            write_lines_sealed(path, [json.dumps(asdict(r), ensure_ascii=False) for r in found])
    shared: list[Response] = state.broadcast(found)
    return shared


def _answers(model: LanguageModel, prompts: list[Prompt], plan: Plan, config: BuPOConfig) -> list[Response]:
    rendered = render_all(prompts, plan.template, model.tokenizer)
    requests = [Request(p, ids, i, 0) for i, (p, ids) in enumerate(zip(prompts, rendered, strict=True))]
    with eval_mode(model.model):
        found = halving(
            requests,
            lambda part: sample(
                model, part, max_new_tokens=config.max_completion_length, temperature=1.0, seed=config.seed
            ),
            "lower max_completion_length",
        )
    return [r for r in found if r.n_tokens > 0]


def cadence(plan: Plan, config: BuPOConfig) -> int:
    """Steps between two measurements of the dynamics.

    Args:
        plan: the plan.
        config: the trainer's configuration.

    Returns:
        The number; 0 where nothing is measured.
    """
    if config.layer is None:
        return 0
    if plan.dynamics_every is not None:
        return plan.dynamics_every
    return 1 if config.ipa_steps == AUTO else -(-plan.max_steps // _DYNAMICS_MEASUREMENTS)


def analyse(
    model: LanguageModel, prompts: Stream, plan: Plan, directory: Path, limit: int | None, seed: int
) -> Analysis:
    """Analyse the model's own step-0 responses to the prompts it will be trained on.

    Args:
        model: the model before training.
        prompts: the stream.
        plan: the plan.
        directory: the run's; the analysis is kept there.
        limit: tokens of a response.
        seed: the run's seed.

    Returns:
        The analysis.
    """
    from internal_policy.analysis.pipeline import analyze

    return analyze(
        model.model,
        model.tokenizer,
        prompts=[{"prompt": p.content} for p in prompts.prompts[:_ANALYSED]],
        max_responses=_ANALYSED,
        max_new_tokens=limit,
        template=plan.template,
        seed=seed,
        output=directory / ANALYSIS,
        # The main process does this while the others wait.
        alone=True,
    )


def lora(plan: Plan) -> Any:
    """LoRA adapters on all linear modules of the layers.

    Args:
        plan: the plan.

    Returns:
        A peft configuration; None where all weights are trained.

    Raises:
        UserError: peft is not installed.
    """
    if not plan.lora_rank:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("lora_rank needs the package peft; install it with `pip install peft`") from error
    return LoraConfig(
        r=plan.lora_rank, lora_alpha=2 * plan.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
