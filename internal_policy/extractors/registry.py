"""The backends that capture states, and how each opens a model: hooks, transformer-lens and nnsight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch

from internal_policy.extractors import nnsight, transformer_lens
from internal_policy.extractors.base import Extractor
from internal_policy.extractors.hooks import HookExtractor
from internal_policy.extractors.verify import prove, verify
from internal_policy.models import LanguageModel, load, wrap
from internal_policy.utils.errors import UserError

_LOADING = {"revision", "dtype", "device", "device_map", "quantization", "trust_remote_code"}
"""Options that apply while a model is loaded, and not to one in memory."""


class _Options(Protocol):
    """The fields of a command's configuration that say how a model is opened; ``AnalyzeConfig`` documents each."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def backend(self) -> str: ...
    @property
    def remote(self) -> bool | str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def device_map(self) -> str | None: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...


Opener: TypeAlias = Callable[[], Extractor]
"""Loads a model and proves it."""


def opener(config: _Options, device: torch.device | None = None) -> Opener:
    """Prepare to open a model by its name: load it, prove eq. 4 through the backend, and return the backend.

    ``device`` is the device of this process, if several processes have one each.
    """

    def open_model() -> Extractor:
        if config.remote:
            remote = nnsight.from_hub(
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


def is_object(model: Any, tokenizer: Any, given: Iterable[str]) -> bool:
    """Check whether a model is an object in memory and not a name or a path.

    Options of loading with an object, and a tokenizer with a name, are refused; ``given`` holds the names of the
    options that the caller set.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise UserError(f"tokenizer= was given with the name {str(model)!r}, which brings its own; leave it out")
        return False
    if loading := sorted(_LOADING.intersection(given)):
        raise UserError(f"{loading[0]} was given with a model object, which is taken as it is; set it when loading")
    return True


def wrap_in_memory(value: Any, tokenizer: Any, name: str, config: _Options) -> Opener:
    """Prepare to open a model that is in memory: prove eq. 4 through the backend, and return the backend.

    The model is a transformers model, a TransformerBridge, or an nnsight model; the latter two may bring their own
    tokenizer. A transformers model without its tokenizer is refused, and so is a backend of another library.
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
            bridged = transformer_lens.from_bridge(value, tokenizer, name)
            return prove(bridged.model, partial(transformer_lens.TransformerLensExtractor, bridge=value))
        extractor = nnsight.from_nnsight(value, tokenizer, name, remote=config.remote)
        verify(extractor)
        return extractor

    return open_model


def name_of(value: Any) -> str:
    """Name a model in memory by what it was loaded from, or else by its class."""
    module = module_of(value)
    config = getattr(module, "config", None)
    name = getattr(module, "name_or_path", "") or getattr(config, "_name_or_path", "") or type(module).__name__
    return str(name)


def module_of(value: Any) -> Any:
    """Find the transformers model inside a TransformerBridge or an nnsight model, or return the object itself."""
    own = library_of(value)
    if own == "transformer-lens":
        return value.original_model
    return value._module if own == "nnsight" else value


def library_of(value: Any) -> str | None:
    """Find which library's object a model is: the name of its backend, or None for a transformers model."""
    if transformer_lens.is_bridge(value):
        return "transformer-lens"
    return "nnsight" if nnsight.is_nnsight(value) else None


def _from_model(config: _Options) -> Callable[[LanguageModel], Extractor]:
    if config.backend == "transformer-lens":
        return transformer_lens.from_model
    if config.backend == "nnsight":
        return partial(nnsight.from_model, remote=config.remote)
    return HookExtractor
