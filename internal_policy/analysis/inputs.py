"""The inputs of an analysis: ready responses, or requests to sample them, checked before anything long runs."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from internal_policy.analysis.config import DEFAULT_RESPONSES
from internal_policy.data.prompts import MATH_500, TESTBED, read_prompts, render_all
from internal_policy.data.responses import Response, check_responses, read_responses
from internal_policy.generation import Request, check_prompt_lengths
from internal_policy.models import LanguageModel, testbed
from internal_policy.utils.errors import UserError

logger = logging.getLogger(__name__)

_MAX_UNKNOWN_SHARE = 0.05
"""A text with a larger share of unknown tokens is not in the tokenizer's language."""

Source = str | Path | Iterable[Any]
"""A name, a path, or the records themselves: a list, a DataFrame, a Series, a generator."""


def as_source(source: Source | None, what: str = "prompts", limit: Any = None) -> str | list[Any] | None:
    """Convert a user's source of records to a name or a list; None stays None.

    Args:
        source: a name or path, or records.
        what: the argument's name, for messages.
        limit: the most records that are taken from an iterable without a length, such as a stream.

    Raises:
        UserError: no sequence of records: a dict of splits or columns, or a set.
    """
    if source is None or isinstance(source, (str, Path)):
        return None if source is None else str(source)
    if isinstance(source, pd.DataFrame):
        rows = source.astype(object).where(source.notna(), None)
        return list(rows.to_dict("records"))
    kind = type(source).__name__
    if isinstance(source, Mapping):
        # For example a DatasetDict, whose iteration gives its keys.
        keys = ", ".join(repr(key) for key in list(source)[:4])
        raise UserError(
            f"{what} is a {kind} with {keys or 'nothing in it'}; needed is a list of records: choose one entry of a "
            f"dict of splits ({what}=data['test']), or put a single record in a list"
        )
    if isinstance(source, (Set, bytes, bytearray)) or not isinstance(source, Iterable):
        more = ", whose order is another in each process" if isinstance(source, Set) else ""
        raise UserError(
            f"{what} is a {kind}{more}; needed is a list of texts or records, a DataFrame, a name or a path"
        )
    bounded = isinstance(limit, int) and limit > 0 and not hasattr(source, "__len__")
    return list(islice(source, limit) if bounded else source)


class InputSettings(Protocol):
    """The settings of a command that say which responses are studied."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    @property
    def template(self) -> str:
        """How prompts are put to it."""
        ...

    @property
    def prompts_split(self) -> str | None:
        """Split of a hub data set."""
        ...

    @property
    def max_responses(self) -> int | None:
        """Largest number of responses."""
        ...

    @property
    def samples_per_prompt(self) -> int:
        """Responses to each prompt."""
        ...

    @property
    def max_new_tokens(self) -> int | None:
        """Largest number of tokens in a response."""
        ...

    @property
    def temperature(self) -> float:
        """Sampling temperature."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the sampling."""
        ...

    @property
    def batch_size(self) -> int:
        """Sequences in a batch."""
        ...

    @property
    def generator(self) -> str:
        """What samples the responses."""
        ...

    @property
    def remote(self) -> bool | str:
        """Whether they are sampled on NDIF."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether code of the checkpoint runs."""
        ...


def source_label(source: str | list[Any] | None) -> str | None:
    """The source in the stored settings: its name, or the number of records that were given."""
    return f"{len(source)} given" if isinstance(source, list) else source


@dataclass(frozen=True)
class Inputs:
    """Ready responses, or requests to sample them."""

    requests: list[Request]
    responses: list[Response]
    reward: Callable[[str, str], bool] | None = None

    def digest(self) -> str:
        """Digest what was read, in 16 hexadecimal digits, so that a changed file of the same name is noticed.

        It covers the ids of prompts, or all fields of ready responses: the result stores their texts and rewards.
        """
        read: list[Any] = [r.prompt_ids for r in self.requests] or [asdict(r) for r in self.responses]
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]


def _is_local(source: str | list[Any]) -> bool:
    return isinstance(source, list) or source == TESTBED or Path(source).exists()


def is_embedded(name: str, tokenizer: Any) -> bool:
    """Whether a model is an embedded one, or was trained from one and has its vocabulary."""
    if name.startswith("testbed/"):
        return True
    words: dict[str, int] = json.loads((testbed.path("testbed/qwen3") / "tokenizer.json").read_text(encoding="utf-8"))[
        "model"
    ]["vocab"]
    own: dict[str, int] = tokenizer.get_vocab()
    return own == words


def _warn_about_unknown_tokens(model: LanguageModel, sequences: Iterable[Sequence[int]]) -> None:
    """Warn if much of the text is not in the tokenizer's vocabulary."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    ids = np.concatenate([np.asarray(s) for s in sequences])
    share = float((ids == unknown).mean())
    if share > _MAX_UNKNOWN_SHARE:
        logger.warning(
            "%.0f%% of the tokens are %s: the tokenizer of %s does not know this text, so the numbers mean little",
            *(100 * share, model.tokenizer.unk_token, model.name),
        )


def gather_inputs(
    config: InputSettings,
    model: LanguageModel,
    prompts: str | list[Any] | None = None,
    responses: str | list[Any] | None = None,
) -> Inputs:
    """Read and check the inputs, before anything long runs.

    The default prompts of the model are used if both sources are None. Bad input raises a `UserError`.
    """
    if responses is not None:
        ready = read_responses(responses, model.tokenizer, config.template, limit=config.max_responses)
        check_responses(ready, model.vocab_size, model.max_length)
        _warn_about_unknown_tokens(model, (r.input_ids for r in ready))
        return Inputs([], ready)
    if config.prompts_split is not None and isinstance(prompts, (str, list)) and _is_local(prompts):
        raise UserError(
            f"--prompts-split {config.prompts_split} was given with a local file; splits are of hub data sets"
        )
    source = prompts if prompts is not None else TESTBED if is_embedded(config.model, model.tokenizer) else MATH_500
    wanted = config.max_responses or DEFAULT_RESPONSES
    needed = -(-wanted // config.samples_per_prompt)
    prompts_read = read_prompts(source, split=config.prompts_split, limit=needed)
    rendered = render_all(prompts_read, config.template, model.tokenizer)
    asked = (
        Request(prompt, ids, number, sample_index)
        for number, (prompt, ids) in enumerate(zip(prompts_read, rendered, strict=True))
        for sample_index in range(config.samples_per_prompt)
    )
    requests = list(islice(asked, wanted))
    check_prompt_lengths(requests, model)
    _warn_about_unknown_tokens(model, (r.prompt_ids for r in requests))
    reward = None
    if source == TESTBED:
        from internal_policy.data import arithmetic as tasks

        reward = tasks.check
    return Inputs(requests, [], reward)
