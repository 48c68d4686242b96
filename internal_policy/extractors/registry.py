"""The ways to capture states, and how each opens a model: hooks, transformer-lens and nnsight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from internal_policy.extractors.base import Extractor
from internal_policy.extractors.hooks import HookExtractor
from internal_policy.extractors.verify import prove, verify
from internal_policy.models import LanguageModel, load, wrap
from internal_policy.utils.errors import UserError

_LOADING = {"revision", "dtype", "device", "device_map", "quantization", "trust_remote_code"}
"""What is settled when a model is loaded."""


class OpenOptions(Protocol):
    """What of a command's settings says how a model is opened; ``AnalyzeConfig`` describes each."""

    @property
    def model(self) -> str:
        """As in ``AnalyzeConfig``."""

    @property
    def revision(self) -> str | None:
        """As in ``AnalyzeConfig``."""

    @property
    def backend(self) -> str:
        """As in ``AnalyzeConfig``."""

    @property
    def remote(self) -> bool | str:
        """As in ``AnalyzeConfig``."""

    @property
    def dtype(self) -> str:
        """As in ``AnalyzeConfig``."""

    @property
    def device(self) -> str:
        """As in ``AnalyzeConfig``."""

    @property
    def device_map(self) -> str | None:
        """As in ``AnalyzeConfig``."""

    @property
    def quantization(self) -> str | None:
        """As in ``AnalyzeConfig``."""

    @property
    def trust_remote_code(self) -> bool:
        """As in ``AnalyzeConfig``."""


Opener: TypeAlias = Callable[[], Extractor]
"""Loads a model and proves it."""


def opener(config: OpenOptions, device: torch.device | None = None) -> Opener:
    """Say how a model is opened that is given by its name.

    Args:
        config: the settings, with the backend.
        device: this process's device, where several processes have one each.

    Returns:
        What loads the model, proves eq. 4 through the backend, and gives the backend.
    """

    def open_model() -> Extractor:
        if config.remote:
            from internal_policy.extractors import nnsight as nnsight_backend

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


def adopt(value: Any, tokenizer: Any, name: str, config: OpenOptions) -> Opener:
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
            from internal_policy.extractors import transformer_lens

            bridged = transformer_lens.from_bridge(value, tokenizer, name)
            return prove(bridged.model, partial(transformer_lens.TransformerLensExtractor, bridge=value))
        from internal_policy.extractors import nnsight as nnsight_backend

        extractor = nnsight_backend.from_nnsight(value, tokenizer, name, remote=config.remote)
        verify(extractor)
        return extractor

    return open_model


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
    from internal_policy.extractors import nnsight as nnsight_backend
    from internal_policy.extractors import transformer_lens

    if transformer_lens.is_bridge(value):
        return "transformer-lens"
    return "nnsight" if nnsight_backend.is_nnsight(value) else None


def _from_model(config: OpenOptions) -> Callable[[LanguageModel], Extractor]:
    if config.backend == "transformer-lens":
        from internal_policy.extractors import transformer_lens

        return transformer_lens.from_model
    if config.backend == "nnsight":
        from internal_policy.extractors import nnsight as nnsight_backend

        return partial(nnsight_backend.from_model, remote=config.remote)
    return HookExtractor
