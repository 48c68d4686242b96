"""Sample responses from the final policy pi_theta: temperature, no truncation of the distribution.

Each response has its own stream of random numbers, seeded by (seed, prompt, sample). An interrupted run that goes on
samples the same responses; so does one with another batch size, as far as the dtype's rounding leaves the logits equal:
in float32 practically always, in bfloat16 a near tie may now and then go the other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internal_policy.errors import UserError
from internal_policy.models import LanguageModel
from internal_policy.prompts import Prompt
from internal_policy.responses import Response, pad

DEFAULT_NEW_TOKENS = 1024


@dataclass(frozen=True)
class Request:
    """One response to sample."""

    prompt: Prompt
    """The question."""
    prompt_ids: list[int]
    """Its ids, templated."""
    prompt_index: int
    """Which prompt, from 0."""
    sample_index: int
    """Which sample of that prompt, from 0."""


class RowSampler:
    """A logits processor that makes greedy search sample: it adds Gumbel noise from one generator a row.

    argmax(z / T + g) with g standard Gumbel is a draw from softmax(z / T).
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._generators = [torch.Generator(device=device).manual_seed(s) for s in seeds]
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the noise.

        Args:
            input_ids: [B, T], not used.
            scores: [B, V] logits.

        Returns:
            [B, V] float32, whose argmax is the sample.
        """
        exponential = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(exponential, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() / self._temperature - exponential.log()


def check_prompt_lengths(requests: Sequence[Request], model: LanguageModel) -> None:
    """Check that every prompt leaves room for a response.

    Args:
        requests: what will be sampled.
        model: the model.

    Raises:
        UserError: a prompt fills the context, is empty, or has ids beyond the vocabulary.
    """
    for request in requests:
        length = len(request.prompt_ids)
        if length == 0:
            raise UserError(f"prompt {request.prompt_index + 1} has no tokens; needed is at least one")
        if max(request.prompt_ids) >= model.vocab_size:
            raise UserError(
                f"prompt {request.prompt_index + 1}: id {max(request.prompt_ids)} is beyond the vocabulary of "
                f"{model.vocab_size}; does this tokenizer belong to this model?"
            )
        if model.max_length is not None and length >= model.max_length:
            raise UserError(
                f"prompt {request.prompt_index + 1} has {length} tokens and the model's context is {model.max_length}; "
                "shorten or drop it"
            )


@torch.no_grad()
def sample(
    model: LanguageModel, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, seed: int
) -> list[Response]:
    """Sample one response a request, in one batch.

    Args:
        model: the model.
        requests: what to sample; prompts of similar length waste least.
        max_new_tokens: at most so many response tokens; fewer where the context ends first.
        temperature: divides the logits; 0 takes the most probable token.
        seed: seed of the whole run.

    Returns:
        The responses; the end-of-sequence token, where one was sampled, belongs to the response.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    longest = max(len(r.prompt_ids) for r in requests)
    room = [model.max_length - len(r.prompt_ids) if model.max_length else max_new_tokens for r in requests]
    limits = [min(max_new_tokens, r) for r in room]
    ends = end_ids(model)
    ids, mask = pad([r.prompt_ids for r in requests], "left")
    processors = LogitsProcessorList()
    if temperature > 0:
        seeds = [
            int(np.random.SeedSequence((seed, r.prompt_index, r.sample_index)).generate_state(1)[0]) for r in requests
        ]
        processors.append(RowSampler(seeds, temperature, model.device))
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max(limits), eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    with _plain_generation_config(model.model):
        generate: Any = model.model.generate
        out = generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=processors,
        )
    responses = []
    for request, row, limit in zip(requests, out[:, longest:].tolist(), limits, strict=True):
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answer = row[: min(stop, limit)]
        text = model.tokenizer.decode(answer, skip_special_tokens=True)
        responses.append(Response(request.prompt.content, text, request.prompt_ids + answer, len(request.prompt_ids)))
    return responses


def response_limit(model: LanguageModel, wanted: int | None) -> int:
    """The longest response to sample.

    Args:
        model: the model.
        wanted: what the user said, if anything.

    Returns:
        That; else what the checkpoint's generation config says; else 1024.
    """
    own = getattr(getattr(model.model, "generation_config", None), "max_new_tokens", None)
    return wanted or own or DEFAULT_NEW_TOKENS


def end_ids(model: LanguageModel) -> list[int]:
    """The ids that end a response: of the model's generation config and of the tokenizer.

    Args:
        model: the model.

    Returns:
        Ids, without repetition.
    """
    configured = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(i for i in [*ids, model.tokenizer.eos_token_id] if i is not None))


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Set the checkpoint's sampling defaults aside: top-k, penalties and the like would change the policy."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
