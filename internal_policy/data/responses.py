"""Responses: the ids of a prompt followed by those of a response, with the position where the response begins.

Convention for "response token t" (positions counted from 0): the state that PREDICTS it. For T ids whose first P are
the prompt, the analysed states are those at positions P-1 .. T-2.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internal_policy.data import records
from internal_policy.data.prompts import Chat, Prompt, content_of, render_all, token_ids, whole_text
from internal_policy.utils.errors import UserError

_MAX_ID = 2**31


@dataclass(frozen=True)
class Response:
    """One sequence to analyse."""

    prompt: str | Chat
    """The prompt as text or chat, before the template."""
    response: str
    """The response as text."""
    input_ids: list[int]
    """T ids: the templated prompt, then the response."""
    prompt_length: int
    """P: number of ids of the prompt."""
    reward: float | None = None
    """The reward, if known."""

    @property
    def n_tokens(self) -> int:
        """Number of response tokens, T - P."""
        return len(self.input_ids) - self.prompt_length

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The P ids of the prompt."""
        return tuple(self.input_ids[: self.prompt_length])


def prompt_indices(responses: Sequence[Response]) -> list[int]:
    """Number the distinct prompts from 0 in order of appearance, so that samples of one prompt share an index."""
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(r.prompt_ids, len(seen)) for r in responses]


def read_responses(
    source: str | Path | Sequence[Mapping[str, Any]], tokenizer: Any, template: str, *, limit: int | None = None
) -> list[Response]:
    """Read at most ``limit`` responses: ``{"prompt", "response"}`` or ``{"input_ids", "prompt_length"}``.

    The source is a jsonl, json or parquet file, or a list of records; ``template`` applies to prompts given as text or
    chat. A response given as text is tokenised separately from the templated prompt, so that the boundary is exact. No
    end-of-sequence token is added, since it is unknown whether the response ended there.

    Raises:
        UserError: the source is unreadable, has the wrong keys, or has a response without tokens; the message names the
        record.
    """
    if isinstance(source, (str, Path)):
        rows, where = records.read_file(Path(source), limit), str(source)
    else:
        where = "the list of responses"
        rows = [records.as_object(row, f"{where}: item {i}") for i, row in enumerate(source, start=1)]
        if not rows:
            raise UserError(f"{where} is empty; needed is at least one")
    kept = [(row, f"{where}: response {number}") for number, row in enumerate(rows[:limit], start=1)]
    contents = [None if _has_ids(row, place) else content_of(row["prompt"], f"{place}, prompt") for row, place in kept]
    rendered = iter(render_all([Prompt(c) for c in contents if c is not None], template, tokenizer))
    return [
        _from_ids(row, tokenizer, place)
        if content is None
        else _from_text(row, content, next(rendered), tokenizer, place)
        for (row, place), content in zip(kept, contents, strict=True)
    ]


def _has_ids(row: Mapping[str, Any], place: str) -> bool:
    """Whether a record has ids rather than text; a record with neither is refused."""
    present = {key for key, value in row.items() if value is not None}
    if {"input_ids", "prompt_length"} <= present:
        return True
    if {"prompt", "response"} <= present:
        return False
    raise UserError(
        f"{place} has values for {sorted(present)}; needed are prompt and response, or input_ids and prompt_length"
    )


def _from_ids(row: Mapping[str, Any], tokenizer: Any, place: str) -> Response:
    ids = _integers(row["input_ids"])
    if ids is None or any(not 0 <= i < _MAX_ID for i in ids):
        raise UserError(f"{place}: input_ids is not a list of token ids; needed are integers from 0 on")
    if not ids:
        raise UserError(f"{place} has no response tokens: input_ids is empty")
    given = _integers([row["prompt_length"]])
    if given is None or not 1 <= given[0] <= len(ids):
        raise UserError(
            f"{place}: prompt_length is {row['prompt_length']!r}; needed is an integer from 1 to {len(ids) - 1}"
        )
    length = given[0]
    if length == len(ids):
        raise UserError(f"{place} has no response tokens: prompt_length is {length} of {len(ids)} ids")
    prompt, text = row.get("prompt"), row.get("response")
    return Response(
        prompt=tokenizer.decode(ids[:length]) if prompt is None else content_of(prompt, f"{place}, prompt"),
        response=tokenizer.decode(ids[length:]) if text is None else whole_text(str(text), f"{place}, response"),
        input_ids=ids,
        prompt_length=length,
        reward=_reward(row, place),
    )


def _from_text(
    row: Mapping[str, Any], content: str | Chat, prompt_ids: list[int], tokenizer: Any, place: str
) -> Response:
    if not isinstance(row["response"], str):
        raise UserError(f"{place}: response is a {type(row['response']).__name__}; needed is text")
    text = whole_text(row["response"], f"{place}, response")
    response_ids = token_ids(tokenizer, text, add_special_tokens=False)
    if not response_ids:
        raise UserError(f"{place} has no response tokens: the text is {text!r}")
    return Response(content, text, prompt_ids + response_ids, len(prompt_ids), _reward(row, place))


def _integers(values: Any) -> list[int] | None:
    """Plain ints of a list, array or tensor of whole numbers; None for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Iterable):
        return None
    found = []
    for value in values:
        number = int(value) if isinstance(value, float) and value.is_integer() else value
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            return None
        found.append(operator.index(number))
    return found


def _reward(row: Mapping[str, Any], place: str) -> float | None:
    reward = row.get("reward")
    if reward is None or (isinstance(reward, numbers.Real) and math.isfinite(reward)):
        return None if reward is None else float(reward)
    raise UserError(f"{place}: reward is {reward!r}; needed is a number, true, false or null")


def check_responses(responses: Iterable[Response], vocab_size: int, max_length: int | None) -> None:
    """Check ids and lengths against the model, before anything is computed.

    Raises:
        UserError: a prompt without tokens, ids beyond the vocabulary, or a sequence longer than the context.
    """
    for number, response in enumerate(responses, start=1):
        if response.prompt_length < 1:
            raise UserError(f"response {number} has a prompt without tokens; needed is at least one, to predict from")
        low, high = min(response.input_ids), max(response.input_ids)
        if low < 0 or high >= vocab_size:
            bad = low if low < 0 else high
            raise UserError(
                f"response {number}: id {bad} is beyond the vocabulary of {vocab_size}; "
                "were these responses tokenised for another model?"
            )
        if max_length is not None and len(response.input_ids) > max_length:
            raise UserError(
                f"response {number} has {len(response.input_ids)} tokens, more than the model's context of "
                f"{max_length}; shorten or drop it"
            )


def pad(sequences: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Pad sequences on one side to ids [B, T] and a mask [B, T], which is 1 for tokens.

    Padding has id 0, which every vocabulary has, and is masked.
    """
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask
