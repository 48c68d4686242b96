"""What can be asked of an inspection; checked before a model is loaded, and before anything heavy is imported."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias, get_args

from internal_policy.data.prompts import Chat, content_of, whole_text
from internal_policy.utils.errors import UserError
from internal_policy.utils.validation import refuse_too_large

DEFAULT_NEW_TOKENS = 32
LAST = 24
"""Tokens that are shown where nothing else is asked for."""

_SLUG = 40

Site: TypeAlias = Literal["layer", "attn", "ffn"]
"""The policies of a layer: of H^l, A^l, F^l (arXiv 2512.19673v3, eqs. 5-6)."""
SITES: tuple[Site, ...] = get_args(Site)
Span: TypeAlias = str | tuple[int, int]
"""Positions from 1, both ends included: ``"5:12"``, ``"5:"``, ``":"``, or ``(5, 12)``."""


def check_settings(
    prompt: str | Chat, response: str | None, max_new_tokens: int | None, top_k: int, temperature: float = 1.0
) -> tuple[str | Chat, int]:
    """Check what needs no model.

    Args:
        prompt: text, or a chat.
        response: what was answered, where it is given.
        max_new_tokens: tokens to sample at most.
        top_k: how many tokens of each policy to keep.
        temperature: of the sampling.

    Returns:
        The prompt, and how many tokens to sample at most; 0 where a response is given.

    Raises:
        UserError: a value out of range, or settings of a sampling beside a response.
    """
    content = content_of(prompt, "--prompt")
    for flag, value, low in (("--max-new-tokens", max_new_tokens, 0), ("--top-k", top_k, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise UserError(f"{flag} is {value!r}; needed is a whole number of at least {low}")
        refuse_too_large(flag.removeprefix("--").replace("-", "_"), value, flag)
    if response is None:
        return content, DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    if not response:
        raise UserError("--response is an empty text; needed is a response, or --max-new-tokens 0 for the prompt alone")
    whole_text(response, "--response")
    if max_new_tokens is not None or temperature != 1.0:
        flag = "--max-new-tokens" if max_new_tokens is not None else "--temperature"
        raise UserError(f"both --response and {flag} were given; a given response is not sampled: leave one out")
    return content, 0


def slug(prompt: str) -> str:
    """Name a prompt for a directory.

    Args:
        prompt: text.

    Returns:
        Its first words, joined by hyphens.
    """
    return "-".join(re.findall(r"\w+", prompt))[:_SLUG].strip("-_") or "prompt"


def check_choice(tokens: Span | None, last: int | None) -> tuple[int | None, int | None] | int:
    """Check which tokens are wanted, as far as it can be told without them.

    Args:
        tokens: which ones; not together with ``last``.
        last: so many at the end; 24 where neither is given.

    Returns:
        Both ends, from 1, None for one left out; or how many at the end.

    Raises:
        UserError: both, or neither a span nor a number.
    """
    if tokens is None:
        last = LAST if last is None else last
        if last < 1:
            raise UserError(f"--last is {last}; needed is a number of at least 1, or --tokens : for all")
        return last
    if last is not None:
        raise UserError("both --tokens and --last were given; give one of them")
    if isinstance(tokens, str):
        if found := re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", tokens):
            first, end = (int(part) if part else None for part in found.groups())
            return _in_order(tokens, first, end)
    elif len(tokens) == 2 and all(isinstance(end, int) for end in tokens):
        return _in_order(tokens, *tokens)
    raise UserError(f"--tokens is {tokens!r}; needed is FIRST:LAST, places from 1, as 5:12, 5: or :")


def _in_order(tokens: Span, first: int | None, end: int | None) -> tuple[int | None, int | None]:
    if (1 if first is None else first) < 1 or (end is not None and end < (first or 1)):
        raise UserError(f"--tokens is {tokens!r}; needed are places from 1, the lower one first, as 5:12")
    return first, end
