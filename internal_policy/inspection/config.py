"""The settings of an inspection; checked before a model is loaded, and before anything heavy is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

from internal_policy.analysis.config import CaptureOptions, LensOptions, SamplingOptions, require_revision, slug_of
from internal_policy.data.prompts import Chat, content_of, whole_text
from internal_policy.models.options import SITES as SITES
from internal_policy.models.options import Site as Site
from internal_policy.models.options import check_lens
from internal_policy.utils.errors import UserError
from internal_policy.utils.options import check_options, option

DEFAULT_NEW_TOKENS = 32
LAST = 24
"""Tokens that are shown where nothing else is asked for."""

_SLUG = 40

Span: TypeAlias = str | tuple[int, int]
"""Positions from 1, both ends included: ``"5:12"``, ``"5:"``, ``":"``, or ``(5, 12)``."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(SamplingOptions, CaptureOptions, LensOptions):
    """What to look into and how. Every field is an option of ``internal-policy inspect``."""

    prompt: str | Chat
    """The prompt; in Python also a chat."""
    response: str | None = None
    """The response to it. Default: it is sampled from the model."""
    max_new_tokens: int | None = option(None, least=0)
    """Largest number of tokens that are sampled; 0 looks at the prompt only. Default: 32."""
    temperature: float = option(1.0, least=0)
    """Sampling temperature; 0 takes the most probable token. The policies are always those of temperature 1."""
    top_k: int = option(5, least=1)
    """Tokens of each policy that the table keeps."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: a value out of range, or settings of a sampling together with a response.
        """
        check_options(self)
        require_revision(self.revision)
        self._check_capture(self.device)
        object.__setattr__(self, "lens", check_lens(self.lens, self.remote))
        object.__setattr__(self, "prompt", content_of(self.prompt, "--prompt"))
        if self.response is None:
            return
        if not self.response:
            raise UserError(
                "--response is an empty text; needed is a response, or --max-new-tokens 0 for the prompt alone"
            )
        whole_text(self.response, "--response")
        if self.max_new_tokens is not None or self.temperature != 1.0:
            flag = "--max-new-tokens" if self.max_new_tokens is not None else "--temperature"
            raise UserError(f"both --response and {flag} were given; a given response is not sampled: leave one out")

    @property
    def generator(self) -> str:
        """What samples the one response."""
        return "transformers"

    @property
    def token_limit(self) -> int:
        """Largest number of tokens that are sampled; 0 where a response is given."""
        if self.response is not None:
            return 0
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    @property
    def slug(self) -> str:
        """Where the result is written, below the output directory: ``<model>--<first words of the prompt>``."""
        return f"{slug_of(self.model, self.revision, self.lens_name)}--{slug(str(self.prompt))}"


def slug(prompt: str) -> str:
    """Name a directory after a prompt: its first words, joined by hyphens."""
    return "-".join(re.findall(r"\w+", prompt))[:_SLUG].strip("-_") or "prompt"


def check_choice(tokens: Span | None, last: int | None) -> tuple[int | None, int | None] | int:
    """Check which tokens are asked for, as far as this is possible without them.

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
