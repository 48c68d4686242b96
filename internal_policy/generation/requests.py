"""Requests to sample responses: one per response, with its random seed, its length limit and its end tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import Response
from internal_policy.models import LanguageModel
from internal_policy.utils.errors import UserError

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

    def stream_seed(self, seed: int) -> int:
        """Derive the seed, below 2^32, of this response's own stream of random numbers from the seed of the run."""
        sequence = np.random.SeedSequence((seed, self.prompt_index, self.sample_index))
        return int(sequence.generate_state(1)[0])


def check_prompt_lengths(requests: Sequence[Request], model: LanguageModel) -> None:
    """Refuse a prompt that fills the context, is empty, or has ids beyond the vocabulary."""
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


def length_limits(model: LanguageModel, requests: Sequence[Request], max_new_tokens: int) -> list[int]:
    """Compute how long each response may be: ``max_new_tokens``, or less if the context ends earlier."""
    if model.max_length is None:
        return [max_new_tokens] * len(requests)
    return [min(max_new_tokens, model.max_length - len(r.prompt_ids)) for r in requests]


def to_responses(
    model: LanguageModel, requests: Sequence[Request], sampled: Sequence[Sequence[int]], limits: Sequence[int]
) -> list[Response]:
    """Truncate the sampled ids where each response ends, and decode them; an end token belongs to its response."""
    ends = set(end_ids(model))
    responses = []
    for request, row, limit in zip(requests, sampled, limits, strict=True):
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answer = list(row[: min(stop, limit)])
        text = model.tokenizer.decode(answer, skip_special_tokens=True)
        responses.append(Response(request.prompt.content, text, request.prompt_ids + answer, len(request.prompt_ids)))
    return responses


def response_limit(model: LanguageModel, wanted: int | None) -> int:
    """Choose the limit on the tokens of a response: the user's, else that of the generation config, else 1024.

    Raises:
        UserError: the checkpoint's limit is not a number of tokens.
    """
    own = getattr(getattr(model.model, "generation_config", None), "max_new_tokens", None)
    if not wanted and own is not None and (isinstance(own, bool) or not isinstance(own, int) or own < 1):
        raise UserError(
            f"{model.name}: generation_config.json says max_new_tokens {own!r}; needed is a number of at least 1: "
            "correct it, or give --max-new-tokens"
        )
    return wanted or own or DEFAULT_NEW_TOKENS


def end_ids(model: LanguageModel) -> list[int]:
    """Collect the ids that end a response, from the model's generation config and the tokenizer, without duplicates.

    Raises:
        UserError: the checkpoint's end tokens are not ids.
    """
    configured = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = [i for i in [*ids, model.tokenizer.eos_token_id] if i is not None]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise UserError(
            f"{model.name}: the checkpoint says eos_token_id {configured!r}; needed is a token id or a list of them: "
            "correct generation_config.json, or config.json if there is none"
        )
    return list(dict.fromkeys(found))
