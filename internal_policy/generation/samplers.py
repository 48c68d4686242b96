"""What samples responses: transformers here, vLLM, or the server that the model runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from internal_policy.data.responses import Response
from internal_policy.extractors.base import Extractor
from internal_policy.generation.requests import Request
from internal_policy.generation.sampling import sample
from internal_policy.generation.vllm import VllmSampler

if TYPE_CHECKING:
    from internal_policy.extractors.nnsight import NnsightExtractor


class SamplerOptions(Protocol):
    """What of a command's settings says where responses are sampled; ``AnalyzeConfig`` describes each."""

    @property
    def remote(self) -> bool | str:
        """As in ``AnalyzeConfig``."""

    @property
    def generator(self) -> str:
        """As in ``AnalyzeConfig``."""

    @property
    def trust_remote_code(self) -> bool:
        """As in ``AnalyzeConfig``."""


def sampler(extractor: Extractor, config: SamplerOptions) -> Callable[..., list[Response]]:
    """Say what samples responses: the model here, or where it runs.

    Args:
        extractor: the backend.
        config: the settings.

    Returns:
        ``generation.sample``, or what does the same on a server, without its first argument.
    """
    if config.remote:
        from internal_policy.generation.ndif import remote_sample

        # What opens a remote model is this backend.
        return partial(remote_sample, cast("NnsightExtractor", extractor))
    return partial(sample, extractor.model)


@contextmanager
def sampling(
    extractor: Extractor, config: SamplerOptions, requests: Sequence[Request], max_new_tokens: int
) -> Iterator[Callable[..., list[Response]]]:
    """Hold what samples responses for as long as there are some to sample: an engine gives its memory back after.

    Args:
        extractor: the backend.
        config: the settings, with the generator.
        requests: all that will be sampled.
        max_new_tokens: at most so many tokens a response.

    Yields:
        What `sampler` returns, or what does the same by vLLM.

    Raises:
        UserError: vLLM is asked for and the model is not where it samples.
    """
    if config.generator == "vllm":
        with VllmSampler(extractor.model, requests, max_new_tokens, config.trust_remote_code) as draw:
            yield draw
    else:
        yield sampler(extractor, config)
