"""The prompts of a run: their selection, their order, and their form for TRL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from datasets import Dataset

from internal_policy.bupo.config import PAPER_PROMPTS, TrainConfig
from internal_policy.bupo.trainer_config import BuPOConfig
from internal_policy.data import arithmetic
from internal_policy.data.prompts import NAMED_TEMPLATES, TESTBED, Prompt, read_prompts, render_all
from internal_policy.generation import Request, check_prompt_lengths
from internal_policy.models import LanguageModel, context
from internal_policy.utils.errors import UserError

_PROBLEM_SEED = 3_000_000
"""Added to the seed of a run, so that its problems differ from those of analysis and evaluation."""
_TRL_COLUMNS = {
    *("prompt", "prompts", "answer", "completion", "completions", "completion_ids", "image", "images", "environment"),
    *("environments", "trainer_state", "log_extra", "log_metric"),
}
"""Columns with these names would collide with TRL's own, or with the arguments that it passes to reward functions."""


def is_testbed(model: str, source: str | list[Any] | None) -> bool:
    """Return whether the prompts are the embedded tasks, whose answers are checked exactly."""
    return source == TESTBED or (source is None and model.startswith("testbed/"))


@dataclass(frozen=True)
class PromptDataset:
    """The prompts of a whole run in order, one per group of rollouts."""

    prompts: list[Prompt]

    @property
    def digest(self) -> str:
        """A digest of the questions and answers in order."""
        contents = [[p.content, p.answer] for p in self.prompts]
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]

    def to_trl(self, template: str, tokenizer: Any) -> Dataset:
        """Convert the prompts to TRL's columns.

        These are ``prompt`` (a chat if the tokenizer has a chat template, else text), ``answer``, and the other columns
        of the records.
        """
        others = sorted({c for p in self.prompts for c in p.columns} - _TRL_COLUMNS)
        return Dataset.from_dict(
            {
                "prompt": [_format(p, template, tokenizer) for p in self.prompts],
                "answer": [p.answer for p in self.prompts],
                **{c: _as_one_type([p.columns.get(c) for p in self.prompts]) for c in others},
            }
        )


def _as_one_type(values: list[Any]) -> list[Any]:
    """Convert a column that a data set cannot hold, such as one of numbers and words, to text."""
    try:
        Dataset.from_dict({"column": values})
    except (ValueError, TypeError, NotImplementedError, OverflowError):
        # JSON may contain lone surrogates, which cannot be encoded.
        return [None if value is None else str(value).encode(errors="replace").decode() for value in values]
    return values


def _format(prompt: Prompt, template: str, tokenizer: Any) -> Any:
    if template in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[template](prompt.problem)
    if template == "chat" and getattr(tokenizer, "chat_template", None):
        return prompt.chat
    return "\n\n".join(m["content"] for m in prompt.chat)


def make_prompt_dataset(
    config: TrainConfig,
    source: str | list[Any] | None,
    trainer_config: BuPOConfig,
    model: LanguageModel,
    *,
    needs_answer: bool,
) -> PromptDataset:
    """Choose as many prompts as the run needs, in an order that only the seed determines, not the method.

    Each pass over the prompts has a different order. Prompts without answers are refused if ``needs_answer``, that is
    if the reward compares with one; so are prompts that leave no room in the model's context.
    """
    groups = trainer_config.generation_batch_size // trainer_config.num_generations
    micro_steps = trainer_config.max_steps * trainer_config.gradient_accumulation_steps
    needed = groups * ceil(micro_steps / (trainer_config.steps_per_generation * trainer_config.num_iterations))
    fresh = is_testbed(config.model, source)
    if fresh:
        problems = arithmetic.problems(needed, seed=_PROBLEM_SEED + config.seed)
        found = [Prompt(p.prompt, p.answer) for p in problems]
    else:
        found = read_prompts(source if source is not None else PAPER_PROMPTS, split=config.prompts_split, usual="train")
    if needs_answer:
        require_answers(found)
    fitting = _select_fitting(found, config, trainer_config.max_completion_length, model)
    if fresh:
        return PromptDataset(fitting)
    order: list[int] = []
    while len(order) < needed:
        rng = np.random.default_rng((config.seed, len(order) // len(fitting)))
        order += rng.permutation(len(fitting)).tolist()
    return PromptDataset([fitting[i] for i in order[:needed]])


def require_answers(prompts: Sequence[Prompt]) -> None:
    """Raise a `UserError` that names the first prompt without an answer with which a response can be compared."""
    lacking = (i for i, p in enumerate(prompts, start=1) if p.unusable or not (p.answer or "").strip())
    if (without := next(lacking, None)) is not None:
        has = prompts[without - 1].unusable or "no answer"
        raise UserError(
            f"prompt {without} has {has}; the reward compares with one: give each record an 'answer', or pass another "
            "reward"
        )


def _select_fitting(
    found: list[Prompt], config: TrainConfig, max_completion_length: int, model: LanguageModel
) -> list[Prompt]:
    rendered = render_all(found, config.template or "chat", model.tokenizer)
    requests = [Request(p, ids, i, 0) for i, (p, ids) in enumerate(zip(found, rendered, strict=True))]
    kept = [r for r in requests if len(r.prompt_ids) <= config.max_prompt_length]
    if not kept:
        shortest = min(len(r.prompt_ids) for r in requests)
        raise UserError(
            f"max_prompt_length is {config.max_prompt_length} and the shortest prompt has {shortest} tokens; raise it"
        )
    check_prompt_lengths(kept, model)
    longest = max(len(r.prompt_ids) for r in kept)
    room = longest + max_completion_length
    lengths = f"max_completion_length is {max_completion_length}, the longest prompt has {longest} tokens, and"
    if model.max_length is not None and room > model.max_length:
        raise UserError(
            f"{lengths} the model's context is {model.max_length}; lower max_completion_length or max_prompt_length"
        )
    switch = context.length_switch(model.config)
    if switch is not None and room > switch:
        raise UserError(
            f"{lengths} beyond {switch} tokens LongRoPE computes every sequence of a batch with other positions, so "
            "that the ratio compares two models; lower max_completion_length or max_prompt_length"
        )
    return [r.prompt for r in kept]
