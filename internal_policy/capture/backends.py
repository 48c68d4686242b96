"""The ways to capture states, and how each opens a model: hooks, transformer-lens and nnsight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch

from internal_policy.capture.hooks import HookExtractor
from internal_policy.capture.states import Extractor
from internal_policy.capture.verify import prove, verify
from internal_policy.errors import UserError
from internal_policy.generation import Request, VllmSampler, sample
from internal_policy.models import LanguageModel, load, wrap

if TYPE_CHECKING:
    from internal_policy.capture.nnsight_backend import NnsightExtractor
    from internal_policy.config import AnalyzeConfig
    from internal_policy.responses import Response

_LOADING = {"revision", "dtype", "device", "device_map", "quantization", "trust_remote_code"}
"""What is settled when a model is loaded."""

Opener: TypeAlias = Callable[[], Extractor]
"""Loads a model and proves it."""


def opener(config: AnalyzeConfig, device: torch.device | None = None) -> Opener:
    """Say how a model is opened that is given by its name.

    Args:
        config: the settings, with the backend.
        device: this process's device, where several processes have one each.

    Returns:
        What loads the model, proves eq. 4 through the backend, and gives the backend.
    """

    def open_model() -> Extractor:
        if config.remote:
            from internal_policy.capture import nnsight_backend

            remote = nnsight_backend.from_hub(
                config.model,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                remote=config.remote,
            )
            verify(remote)
            return remote
        if device is not None and config.device_map is not None:
            raise UserError(
                f"--device-map {config.device_map} was given to several processes, each of which has a device of its "
                "own; start one process, or leave --device-map out"
            )
        # A bare "cuda" is the first one in every process.
        own = device is not None and config.device in ("auto", "cuda")
        model = load(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device=str(device) if own else config.device,
            trust_remote_code=config.trust_remote_code,
            device_map=config.device_map,
            quantization=config.quantization,
        )
        return prove(model, _from_model(config))

    return open_model


def is_object(model: Any, tokenizer: Any, told: Iterable[str]) -> bool:
    """Check that what goes with a model suits how it was given: an object is as it is, a name brings its tokenizer.

    Args:
        model: a name, a path, or an object.
        tokenizer: the tokenizer that was given, if any.
        told: names of the options that were given.

    Returns:
        Whether the model is an object in memory.

    Raises:
        UserError: options of loading with an object, or a tokenizer with a name.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise UserError(f"tokenizer= was given with the name {str(model)!r}, which brings its own; leave it out")
        return False
    if settled := sorted(_LOADING.intersection(told)):
        raise UserError(f"{settled[0]} was given with a model object, which is taken as it is; set it when loading")
    return True


def adopt(value: Any, tokenizer: Any, name: str, config: AnalyzeConfig) -> Opener:
    """Say how a model is opened that is in memory already.

    Args:
        value: a transformers model, a TransformerBridge, or an nnsight model.
        tokenizer: its tokenizer; a bridge and an nnsight model may bring their own.
        name: what to call it.
        config: the settings, with the backend.

    Returns:
        What proves eq. 4 through the backend, and gives the backend.

    Raises:
        UserError: a transformers model without its tokenizer, or a backend that is not the object's own.
    """
    own = library_of(value)
    if own is not None and config.backend != own:
        raise UserError(f"backend {config.backend!r} was given with a model of {own}, which is its own; leave it out")
    if own is None and tokenizer is None:
        raise UserError("a model object was given without its tokenizer; pass tokenizer=")

    def open_model() -> Extractor:
        if own is None:
            return prove(wrap(value, tokenizer, name), _from_model(config))
        if own == "transformer-lens":
            from internal_policy.capture import transformer_lens

            bridged = transformer_lens.from_bridge(value, tokenizer, name)
            return prove(bridged.model, partial(transformer_lens.TransformerLensExtractor, bridge=value))
        from internal_policy.capture import nnsight_backend

        extractor = nnsight_backend.from_nnsight(value, tokenizer, name, remote=config.remote)
        verify(extractor)
        return extractor

    return open_model


def sampler(extractor: Extractor, config: AnalyzeConfig) -> Callable[..., list[Response]]:
    """Say what samples responses: the model here, or where it runs.

    Args:
        extractor: the backend.
        config: the settings.

    Returns:
        ``generation.sample``, or what does the same on a server, without its first argument.
    """
    if config.remote:
        from internal_policy.capture.nnsight_sampling import remote_sample

        # What opens a remote model is this backend.
        return partial(remote_sample, cast("NnsightExtractor", extractor))
    return partial(sample, extractor.model)


@contextmanager
def sampling(
    extractor: Extractor, config: AnalyzeConfig, requests: Sequence[Request], max_new_tokens: int
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


def name_of(value: Any) -> str:
    """Name a model that is in memory.

    Args:
        value: a transformers model, a TransformerBridge, or an nnsight model.

    Returns:
        What it was loaded from; its class where it does not say.
    """
    module = module_of(value)
    config = getattr(module, "config", None)
    name = getattr(module, "name_or_path", "") or getattr(config, "_name_or_path", "") or type(module).__name__
    return str(name)


def module_of(value: Any) -> Any:
    """Find the transformers model inside an object.

    Args:
        value: a transformers model, a TransformerBridge, or an nnsight model.

    Returns:
        The module; the object itself where it is one.
    """
    own = library_of(value)
    if own == "transformer-lens":
        return value.original_model
    return value._module if own == "nnsight" else value


def library_of(value: Any) -> str | None:
    """Tell whose object a model is.

    Args:
        value: a transformers model, a TransformerBridge, or an nnsight model.

    Returns:
        The name of the backend that captures from it; None for a transformers model.
    """
    from internal_policy.capture import nnsight_backend, transformer_lens

    if transformer_lens.is_bridge(value):
        return "transformer-lens"
    return "nnsight" if nnsight_backend.is_nnsight(value) else None


def _from_model(config: AnalyzeConfig) -> Callable[[LanguageModel], Extractor]:
    if config.backend == "transformer-lens":
        from internal_policy.capture import transformer_lens

        return transformer_lens.from_model
    if config.backend == "nnsight":
        from internal_policy.capture import nnsight_backend

        return partial(nnsight_backend.from_model, remote=config.remote)
    return HookExtractor
