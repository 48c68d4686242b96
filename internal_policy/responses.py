"""Responses: a prompt's ids followed by a response's ids, with the place where the response begins.

Convention for "response token t" (positions counted from 0): the state that PREDICTS it. For T ids whose first P are
the prompt, the analysed states are those at positions P-1 .. T-2.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internal_policy import records
from internal_policy.errors import UserError
from internal_policy.prompts import Chat, Prompt, content_of, render


@dataclass(frozen=True)
class Response:
    """One sequence to analyse."""

    prompt: str | Chat
    """What was asked: text or chat, before the template."""
    response: str
    """What was answered, as text."""
    input_ids: list[int]
    """T ids: the templated prompt, then the response."""
    prompt_length: int
    """P: how many of the ids are the prompt."""
    reward: float | None = None
    """The reward, where known."""

    @property
    def n_tokens(self) -> int:
        """Number of response tokens, T - P."""
        return len(self.input_ids) - self.prompt_length

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """The P ids of the prompt."""
        return tuple(self.input_ids[: self.prompt_length])


def prompt_indices(responses: Sequence[Response]) -> list[int]:
    """Number the distinct prompts, so that several samples of one prompt share an index.

    Args:
        responses: the responses.

    Returns:
        One index a response, from 0, in order of first appearance.
    """
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(r.prompt_ids, len(seen)) for r in responses]


def read_responses(
    source: str | Path | Sequence[Mapping[str, Any]], tokenizer: Any, template: str, *, limit: int | None = None
) -> list[Response]:
    """Read ready responses: ``{"prompt", "response"}`` or ``{"input_ids", "prompt_length"}``, an object a line.

    A response given as text is tokenised by itself, after the templated prompt, so that the boundary is exact; no
    end-of-sequence token is added, since nobody knows whether it ended there.

    Args:
        source: a jsonl, json or parquet file, or a list of records.
        tokenizer: the model's tokenizer.
        template: how prompts given as text or chat are templated.
        limit: at most so many, from the start.

    Returns:
        The responses.

    Raises:
        UserError: unreadable, wrong keys, or a response without tokens; the message says which.
    """
    if isinstance(source, (str, Path)):
        rows, where = records.read_file(Path(source)), str(source)
    else:
        rows, where = [dict(row) for row in source], "the list of responses"
        if not rows:
            raise UserError("the list of responses is empty; needed is at least one")
    found = []
    for number, row in enumerate(rows[:limit], start=1):
        place = f"{where}: response {number}"
        if "input_ids" in row and "prompt_length" in row:
            found.append(_from_ids(row, tokenizer, place))
        elif "prompt" in row and "response" in row:
            found.append(_from_text(row, tokenizer, template, place))
        else:
            raise UserError(
                f"{place} has the keys {sorted(row)}; needed are prompt and response, or input_ids and prompt_length"
            )
    return found


def _from_ids(row: Mapping[str, Any], tokenizer: Any, place: str) -> Response:
    ids, length = row["input_ids"], row["prompt_length"]
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"{place}: input_ids is not a list of integers")
    if not ids:
        raise UserError(f"{place} has no response tokens: input_ids is empty")
    if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= len(ids):
        raise UserError(f"{place}: prompt_length is {length!r}; needed is an integer from 1 to {len(ids) - 1}")
    if length == len(ids):
        raise UserError(f"{place} has no response tokens: prompt_length is {length} of {len(ids)} ids")
    prompt = row.get("prompt")
    return Response(
        prompt=tokenizer.decode(ids[:length]) if prompt is None else content_of(prompt, place),
        response=str(row["response"]) if row.get("response") is not None else tokenizer.decode(ids[length:]),
        input_ids=ids,
        prompt_length=length,
        reward=row.get("reward"),
    )


def _from_text(row: Mapping[str, Any], tokenizer: Any, template: str, place: str) -> Response:
    if not isinstance(row["response"], str):
        raise UserError(f"{place}: response is a {type(row['response']).__name__}; needed is text")
    content = content_of(row["prompt"], f"{place}, prompt")
    prompt_ids = render(Prompt(content), template, tokenizer)
    response_ids = list(tokenizer(row["response"], add_special_tokens=False)["input_ids"])
    if not response_ids:
        raise UserError(f"{place} has no response tokens: the text is {row['response']!r}")
    return Response(content, row["response"], prompt_ids + response_ids, len(prompt_ids), row.get("reward"))


def check_responses(responses: Iterable[Response], vocab_size: int, max_length: int | None) -> None:
    """Check ids and lengths against the model, before anything is computed.

    Args:
        responses: the responses.
        vocab_size: V.
        max_length: the model's context, where it has one.

    Raises:
        UserError: ids beyond the vocabulary, or a sequence longer than the context.
    """
    for number, response in enumerate(responses, start=1):
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
    """Pad sequences to one length.

    Args:
        sequences: B lists of ids.
        side: where the padding goes.

    Returns:
        ids [B, T] and mask [B, T], 1 for tokens. Padding has id 0: it is masked, and every vocabulary has it.
    """
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        start = longest - len(sequence) if side == "left" else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence)
        mask[row, start : start + len(sequence)] = 1
    return ids, mask


def to_jsonl(responses: Iterable[Response]) -> str:
    """Write responses as jsonl, the form that ``read_responses`` reads.

    Args:
        responses: the responses.

    Returns:
        One JSON object a line.
    """
    return "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in responses)


def from_jsonl(text: str) -> list[Response]:
    """Read what ``to_jsonl`` wrote.

    Args:
        text: one JSON object a line.

    Returns:
        The responses.
    """
    return [Response(**json.loads(line)) for line in text.split("\n") if line]
