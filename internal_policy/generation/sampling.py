"""Sample with transformers: each distinct prompt runs through the model once, and a row leaves when its response ends.

A batch is decoded in rounds. The first reads the distinct prompts, whose keys and values all samples of a prompt then
start from. Each further round runs until some responses have ended, which are left out of the next one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from internal_policy.data.responses import Response, pad
from internal_policy.generation.requests import Request, end_ids, length_limits, to_responses
from internal_policy.models import LanguageModel

_LEAVE_TOGETHER = 16
"""A round ends when one in 16 of its responses has ended: more rounds would cost some milliseconds each."""


class RowSampler:
    """A logits processor that makes greedy search sample: it adds Gumbel noise from one generator per row.

    argmax(z / T + g) with g standard Gumbel is a draw from softmax(z / T).
    """

    def __init__(self, seeds: Sequence[int], temperature: float, device: torch.device) -> None:
        self._seeds = list(seeds)
        self._generators = [torch.Generator(device=device).manual_seed(s) for s in seeds]
        self._temperature = temperature
        self._steps = 0

    def __call__(self, input_ids: Tensor | None, scores: Tensor) -> Tensor:
        """Add the noise to [B, V] logits; the argmax of the float32 result is the sample."""
        exponential = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(exponential, self._generators, strict=True):
            row.exponential_(generator=generator)
        self._steps += 1
        return scores.float() / self._temperature - exponential.log()

    def keep(self, rows: Sequence[int], steps: int, width: int) -> None:
        """Continue with some of the rows.

        Args:
            rows: indices of the rows to keep.
            steps: tokens that were sampled so far. If more were drawn (on mps transformers stops one step late, and
                drops that step), the random streams are reset to this step.
            width: V.
        """
        self._seeds = [self._seeds[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        if steps == self._steps:
            return
        for seed, generator in zip(self._seeds, self._generators, strict=True):
            generator.manual_seed(seed)
            for _ in range(steps):
                torch.empty(width, device=generator.device).exponential_(generator=generator)
        self._steps = steps


@torch.no_grad()
def sample(
    model: LanguageModel, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, seed: int
) -> list[Response]:
    """Sample one response per request, in one batch.

    Args:
        model: the model.
        requests: the requests; prompts of similar length need the least padding, and equal prompts are read once.
        max_new_tokens: limit on the tokens of a response; the context may end earlier.
        temperature: divides the logits; 0 takes the most probable token.
        seed: seed of the whole run.

    Returns:
        The responses, each with its end-of-sequence token if one was sampled.
    """
    from transformers import GenerationMixin

    limits = length_limits(model, requests, max_new_tokens)
    # A model that generates in another way, such as on a server, returns ids only.
    decode = _decode_in_rounds if isinstance(model.model, GenerationMixin) else _decode_batch
    ends = end_ids(model)
    sampled: dict[int, list[int]] = {}
    with _plain_generation_config(model.model):
        groups = _within_context(model, requests, limits)
        for group in [own for each in groups for own in _by_frequencies(model, requests, limits, each)]:
            chosen = [requests[i] for i in group]
            sampler = None
            if temperature > 0:
                sampler = RowSampler([r.stream_seed(seed) for r in chosen], temperature, model.device)
            ids = decode(model, [r.prompt_ids for r in chosen], [limits[i] for i in group], ends, sampler)
            sampled |= zip(group, ids, strict=True)
    return to_responses(model, requests, [sampled[i] for i in range(len(requests))], limits)


def _within_context(model: LanguageModel, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
    """Batches in which no row runs beyond the model's positions, which the longest limit would require."""
    longest = max(limits, default=0)
    if model.max_length is None or all(len(r.prompt_ids) + longest <= model.max_length for r in requests):
        return [list(range(len(requests)))]
    return [[i for i, limit in enumerate(limits) if limit == size] for size in sorted(set(limits), reverse=True)]


def _by_frequencies(
    model: LanguageModel, requests: Sequence[Request], limits: Sequence[int], group: list[int]
) -> list[list[int]]:
    """Divide a batch so that all rows change to the long position frequencies of LongRoPE at the same step or never.

    transformers chooses the frequencies by the longest row. Rows that may cross the length at which they change run
    with prompts of their own length only, since these cross it together.
    """
    switch = model.length_switch
    if switch is None:
        return [group]
    own: dict[int, list[int]] = {}
    for i in group:
        n = len(requests[i].prompt_ids)
        key = 0 if n + limits[i] <= switch else -1 if n > switch else n
        own.setdefault(key, []).append(i)
    return list(own.values())


def _decode_batch(
    model: LanguageModel, prompts: list[list[int]], limits: list[int], ends: list[int], sampler: RowSampler | None
) -> list[list[int]]:
    from transformers import LogitsProcessorList

    ids, mask = pad(prompts, "left")
    generate: Any = model.model.generate
    out = generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=_config(ends, max(limits)),
        logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
    )
    sampled: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return sampled


def _decode_in_rounds(
    model: LanguageModel, prompts: list[list[int]], limits: list[int], ends: list[int], sampler: RowSampler | None
) -> list[list[int]]:
    from transformers import LogitsProcessorList, StoppingCriteriaList

    generate: Any = model.model.generate
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    ids, mask = (t.to(model.device) for t in pad(list(distinct), "left"))
    first = generate(
        ids, attention_mask=mask, generation_config=_config(ends, 1, return_dict_in_generate=True, output_logits=True)
    )
    cache = first.past_key_values
    if not _supports_reordering(cache):
        return _decode_batch(model, prompts, limits, ends, sampler)

    # From here on the samples of a prompt differ: each draws its first token from the same logits.
    source = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=model.device)
    scores = first.logits[0][source.to(first.logits[0].device)]
    vocabulary, prompt_width = scores.shape[1], ids.shape[1]
    drawn = (scores if sampler is None else sampler(None, scores)).argmax(dim=-1).to(model.device)
    del first, scores
    cache.reorder_cache(source)
    ids, mask = torch.cat([ids[source], drawn[:, None]], dim=1), mask[source]

    ending = torch.tensor(ends, dtype=torch.long, device=model.device)
    sampled: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    while True:
        steps = ids.shape[1] - prompt_width
        for row, new in zip(rows, ids[:, prompt_width:].tolist(), strict=True):
            sampled[row] = new
        ended = torch.isin(ids[:, -1], ending).tolist()
        left = [i for i, row in enumerate(rows) if not ended[i] and steps < limits[row]]
        if not left:
            return sampled
        if len(left) < len(rows):
            rows = [rows[i] for i in left]
            ids, mask = ids[left], mask[left]
            cache.reorder_cache(torch.tensor(left, device=model.device))
        if sampler is not None:
            sampler.keep(left, steps, vocabulary)
        mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - mask.shape[1])], dim=1)
        out = generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            # No response runs beyond its own limit, beyond which the model may have no positions.
            generation_config=_config(ends, min(limits[row] for row in rows) - steps, return_dict_in_generate=True),
            logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
            stopping_criteria=StoppingCriteriaList([_EnoughHaveEnded(ending, len(rows))]),
        )
        ids, cache = out.sequences, out.past_key_values


class _EnoughHaveEnded:
    """Stops a round for all of its rows when enough have ended."""

    def __init__(self, ends: Tensor, rows: int) -> None:
        self._ends, self._enough = ends, -(-rows // _LEAVE_TOGETHER)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        # A row that has ended is padded with an end token.
        ended = torch.isin(input_ids[:, -1], self._ends).sum()
        return (ended >= self._enough).expand(len(input_ids))


def _supports_reordering(cache: Any) -> bool:
    """Whether rows of a cache can be copied and dropped; only keys and values of attention are supported."""
    from transformers import cache_utils

    known = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return isinstance(cache, cache_utils.DynamicCache) and all(type(layer) in known for layer in cache.layers)


def _config(ends: list[int], new_tokens: int, **more: Any) -> Any:
    from transformers import GenerationConfig

    pad_id = ends[0] if ends else 0
    return GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=pad_id, **more
    )


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Ignore the checkpoint's sampling defaults, such as top-k and penalties, which would change the policy."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
