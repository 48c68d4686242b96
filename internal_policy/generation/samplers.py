"""The ways to sample responses: transformers here, vLLM, or NDIF, where token ids travel to the weights and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from internal_policy.data.responses import Response
from internal_policy.extractors.base import Extractor
from internal_policy.extractors.nnsight import NnsightExtractor
from internal_policy.extractors.nnsight_trace import choose_token
from internal_policy.generation.requests import Request
from internal_policy.generation.sampling import sample
from internal_policy.generation.vllm import VllmSampler
from internal_policy.utils.errors import UserError

# nnsight lets a checkpoint's own settings replace whatever a generation config leaves open, which changes the policy.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}
_UNSUPPORTED = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty"),
)


class _Options(Protocol):
    """The fields of a command's configuration that say where responses are sampled; see ``AnalyzeConfig``."""

    @property
    def remote(self) -> bool | str: ...
    @property
    def generator(self) -> str: ...
    @property
    def trust_remote_code(self) -> bool: ...


def sampler(extractor: Extractor, config: _Options) -> Callable[..., list[Response]]:
    """Choose the function that samples responses where the model is: ``sample`` or ``sample_remotely``."""
    if config.remote:
        # Only this backend opens remote models.
        return partial(sample_remotely, cast(NnsightExtractor, extractor))
    return partial(sample, extractor.model)


@contextmanager
def open_sampler(
    extractor: Extractor, config: _Options, requests: Sequence[Request], max_new_tokens: int
) -> Iterator[Callable[..., list[Response]]]:
    """Open the function that samples responses, and release the memory of an engine on exit.

    ``requests`` are all that will be sampled. Yields the result of ``sampler``, or a ``VllmSampler``.
    """
    if config.generator == "vllm":
        with VllmSampler(extractor.model, requests, max_new_tokens, config.trust_remote_code) as draw:
            yield draw
    else:
        yield sampler(extractor, config)


def sample_remotely(
    extractor: NnsightExtractor, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, seed: int
) -> list[Response]:
    """Sample one response per request on NDIF, in one batch and one job; see ``generation.sample``.

    The responses are those of ``generation.sample`` on a CPU, as far as rounding leaves the logits equal.

    Raises:
        UserError: NDIF or the network refused, or the checkpoint forbids or forces tokens.
    """
    own: Any = extractor.model.model.generation_config
    if forced := [name for name in _UNSUPPORTED if getattr(own, name, None) is not None]:
        raise UserError(
            f"{extractor.model.name}: its generation config sets {forced[0]}, which NDIF would apply and which is not "
            "part of the policy; give --responses sampled elsewhere"
        )
    model = replace(extractor.model, model=cast(nn.Module, _NnsightGenerator(extractor)))
    return sample(model, requests, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


class _NnsightGenerator:
    """The part of a transformers model that ``generation.sample`` uses, generating through nnsight."""

    def __init__(self, extractor: NnsightExtractor) -> None:
        self._extractor = extractor
        self._model: Any = extractor.model.model
        self.generation_config = self._model.generation_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self, input_ids: Tensor, *, attention_mask: Tensor, generation_config: Any, logits_processor: Sequence[Any]
    ) -> Tensor:
        """Generate [B, T + new] ids from left-padded ids [B, T]; the sampler chooses each token where the model is."""
        own = self._model.generation_config
        generation_config.update(**{k: v for k, v in _NEUTRAL.items() if getattr(own, k, None) not in (None, v)})
        sampler = next(iter(logits_processor), None)
        extractor, choose, row = self._extractor, choose_token, self._extractor.row()
        save = extractor.nnsight.save
        generated: Tensor = torch.empty(0)
        with warnings.catch_warnings(), extractor.ready() as (root, where, _, _):
            # The number of steps is not known beforehand; nnsight warns when an open loop ends.
            warnings.filterwarnings("ignore", message=".*was never reached")
            with root.generate(generation_config=generation_config, **where) as tracer:
                with tracer.invoke(input_ids=input_ids, attention_mask=attention_mask):
                    for _ in tracer.iter[:]:
                        choose(root, row, sampler)
                with tracer.invoke():
                    generated = save(tracer.result)
        return generated.to(input_ids.device)
