"""Capture through nnsight, here or on NDIF's servers: from there only what a reduction returns travels.

A model that is not nnsight's yet is wrapped for the time of a run and unwrapped after it, so that it stays as it was.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.capture.nnsight_block import projection_there, reduce_layers, reduce_logits, split_states
from internal_policy.capture.nnsight_shipping import by_value, plain
from internal_policy.capture.states import Batch, LayerReduction, LayerStates, LogitReduction
from internal_policy.errors import UserError
from internal_policy.models import LanguageModel, Projection, wrap

KEY = "NDIF_API_KEY"

Remote = bool | str
"""False: here; True: NDIF; ``local``: everything that NDIF would do, here; else a host of one's own, http://..."""


@dataclass(frozen=True)
class RemoteLanguageModel(LanguageModel):
    """A model whose weights are on a server; here are its shapes."""

    @property
    def device(self) -> torch.device:
        """Where token ids wait for the journey."""
        return torch.device("cpu")

    def fingerprint(self) -> str:
        """A digest of name and commit, as there are no weights to look at.

        Returns:
            16 hexadecimal digits.
        """
        return hashlib.sha256(f"{self.name}@{self.revision}".encode()).hexdigest()[:16]


class NnsightExtractor:
    """The nnsight backend behind the protocol of ``capture.states.Extractor``."""

    def __init__(self, model: LanguageModel, root: Any = None, remote: Remote = False) -> None:
        """Take a model.

        Args:
            model: the model.
            root: its nnsight model, where there is one already.
            remote: where to run it.

        Raises:
            UserError: nnsight is not installed; no key for NDIF; an nnsight model that cannot run remotely.
        """
        self.model = model
        self.remote = remote
        self._root = root
        self._nnsight = load_nnsight()
        if remote is True:
            require_key(self._nnsight)
        if remote and root is not None and not hasattr(root, "to_model_key"):
            raise UserError(
                f"{model.name}: a {type(root).__name__} cannot run remotely; give a nnsight.TransformersModel, or a name"
            )

    def run(self, batch: Batch, reduce: LayerReduction) -> list[Tensor]:
        """Run the decoder once, without the unembedding; see ``Extractor.run``."""
        save = self._nnsight.save
        walk, positions, row = reduce_layers, batch.positions, self._row()
        reduced: list[Tensor] = []
        with self._ready() as (root, where, project, states):
            with root.trace(**self._arguments(batch), **where) as tracer:
                reduced = save(walk(root, row, positions, reduce, states, project(root, row)))
                tracer.stop()
        return reduced

    def logits(self, batch: Batch, reduce: LogitReduction) -> Tensor:
        """Run the whole model once; see ``Extractor.logits``."""
        save = self._nnsight.save
        walk, positions, row = reduce_logits, batch.positions, self._row()
        reduced = torch.empty(0)
        with self._ready() as (root, where, project, _), root.trace(**self._arguments(batch), **where):
            reduced = save(walk(root, row, positions, reduce, project(root, row)))
        return reduced

    @contextmanager
    def _ready(self) -> Iterator[tuple[Any, dict[str, Any], Any, Any]]:
        """The nnsight model, where to trace it, and what builds the projection and the states there."""
        with ExitStack() as stack:
            stack.enter_context(told_in_one_line(self.model.name))
            stack.enter_context(torch.no_grad())
            root = self._root
            if root is None:
                root = stack.enter_context(wrapped(self._nnsight, self.model, self.remote))
            if not self.remote:
                yield root, {}, partial(projection_there, make_projection=Projection), LayerStates
                return
            stack.enter_context(by_value())
            stack.enter_context(quiet(self._nnsight))
            projection, states = plain(Projection), plain(LayerStates, split=split_states)
            where = {"remote": destination(self.remote)}
            yield root, where, partial(projection_there, make_projection=projection), states

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return self.model.forward_arguments(batch.input_ids, batch.attention_mask)

    def _row(self) -> dict[str, Any]:
        """What the block has to know of the model, in words and numbers."""
        family, projection = self.model.family, self.model.projection
        return {
            "layers": family.layers,
            "final_norm": family.final_norm,
            "unembedding": family.unembedding,
            "attention": family.attention,
            "ffn": family.ffn,
            "attention_write": family.attention_write or family.attention,
            "ffn_write": family.ffn_write or family.ffn,
            "multiplier": self.model.write_multiplier,
            "vocabulary": self.model.vocab_size,
            "width": int(projection.weight.shape[1]),
            "dtype": str(projection.weight.dtype).removeprefix("torch."),
            "biased": projection.bias is not None,
            "transform": {
                "scale": projection.scale,
                "softcap": projection.softcap,
                "memory_budget": projection.memory_budget,
            },
        }


def from_model(model: LanguageModel, remote: Remote = False) -> NnsightExtractor:
    """Capture from a transformers model in memory.

    Args:
        model: the model; it is left as it was.
        remote: False, or ``local`` to try what NDIF would do.

    Returns:
        The extractor.

    Raises:
        UserError: nnsight is not installed, or the model would have to travel.
    """
    if remote not in (False, "local"):
        raise UserError(f"{model.name}: a model in memory does not travel to NDIF; give its name on the hub")
    return NnsightExtractor(model, remote=remote)


def from_nnsight(root: Any, tokenizer: Any = None, name: str | None = None, remote: Remote = False) -> NnsightExtractor:
    """Capture from an nnsight model in memory, with its edits.

    Args:
        root: an nnsight model of a causal LM.
        tokenizer: its tokenizer; its own where not given.
        name: what to call it.
        remote: where to run it.

    Returns:
        The extractor, with its ``LanguageModel``.

    Raises:
        UserError: no tokenizer, or not a causal LM.
    """
    load_nnsight()
    name = name or getattr(root, "repo_id", None) or getattr(root._module, "name_or_path", "") or type(root).__name__
    tokenizer = tokenizer if tokenizer is not None else root.__dict__.get("tokenizer")
    if tokenizer is None:
        raise UserError(f"{name}: an nnsight model was given without its tokenizer; pass tokenizer=")
    if not remote and not root.__dict__.get("dispatched", True):
        with told_in_one_line(name):
            root.dispatch()
    model = wrap(root._module, tokenizer, name)
    if next(root._module.parameters()).is_meta:
        model = _elsewhere(model, root.__dict__.get("revision"))
    return NnsightExtractor(model, root, remote)


def from_hub(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    remote: Remote = True,
) -> NnsightExtractor:
    """Capture on NDIF from a model that it hosts; here only its configuration and its tokenizer are loaded.

    Args:
        name: hub id.
        revision: branch, tag or commit.
        trust_remote_code: run code that comes with the checkpoint, here and there.
        attn_implementation: transformers' attention; its own choice where not given.
        remote: NDIF, or a host of one's own.

    Returns:
        The extractor, with its ``RemoteLanguageModel``.

    Raises:
        UserError: nnsight is not installed, no key, or no such model.
    """
    nnsight = load_nnsight()
    if remote is True:
        require_key(nnsight)
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    with told_in_one_line(name):
        root = nnsight.TransformersModel(name, revision=revision, task="text-generation", **options)
        root._module.generation_config = _generation_config(name, revision) or root._module.generation_config
    model = _elsewhere(wrap(root._module, root.tokenizer, name), revision)
    return NnsightExtractor(model, root, remote)


def is_nnsight(value: object) -> bool:
    """Tell an nnsight model from anything else, without loading nnsight.

    Args:
        value: what the user gave.

    Returns:
        True for an nnsight model.
    """
    nnsight = sys.modules.get("nnsight")
    return nnsight is not None and isinstance(value, nnsight.Envoy)


def load_nnsight() -> Any:
    """Import nnsight.

    Returns:
        The library.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("nnsight")
    except ImportError as error:
        raise UserError(
            f"the nnsight backend is not installed ({error}); install it with pip install 'internal-policy[backends]'"
        ) from error


def require_key(nnsight: Any) -> None:
    """Give nnsight the key for NDIF that is in the environment now.

    Args:
        nnsight: the library.

    Raises:
        UserError: there is none, nor one that nnsight keeps.
    """
    settings = importlib.import_module(f"{nnsight.__name__}.schema.config").CONFIG.API
    settings.APIKEY = os.environ.get(KEY) or settings.APIKEY
    if not settings.APIKEY:
        raise UserError(f"no key for NDIF; get one at https://login.ndif.us and set it: export {KEY}=...")


def destination(remote: Remote) -> Remote:
    """Where a remote trace goes: NDIF_HOST, where it is set, stands for NDIF.

    Args:
        remote: what the user said.

    Returns:
        nnsight's ``remote=``.
    """
    return os.environ.get("NDIF_HOST") or True if remote is True else remote


@contextmanager
def quiet(nnsight: Any) -> Iterator[None]:
    """Keep nnsight's own progress off the terminal, and its local server from changing the import path."""
    settings = importlib.import_module(f"{nnsight.__name__}.schema.config").CONFIG.APP
    logging, path = settings.REMOTE_LOGGING, list(sys.path)
    settings.REMOTE_LOGGING = False
    try:
        yield
    finally:
        settings.REMOTE_LOGGING = logging
        sys.path[:] = path


@contextmanager
def wrapped(nnsight: Any, model: LanguageModel, remote: Remote) -> Iterator[Any]:
    """Wrap a transformers model for a while; nnsight writes into each module, and that is undone on any exit.

    Args:
        nnsight: the library.
        model: the model.
        remote: where it will run.

    Yields:
        The nnsight model.
    """
    before = [(module, dict(module.__dict__)) for module in model.model.modules()]
    try:
        if remote:
            tokenizer = copy.deepcopy(model.tokenizer)
            yield nnsight.TransformersModel(model.model, tokenizer=tokenizer, task="text-generation")
        else:
            yield nnsight.NNsight(model.model)
    finally:
        for module, attributes in before:
            _restore(module, attributes)


@contextmanager
def told_in_one_line(name: str) -> Iterator[None]:
    """Turn what nnsight, NDIF and the network raise into one line.

    Args:
        name: the model's name.

    Raises:
        UserError: what went wrong.
        torch.OutOfMemoryError: the server ran out of memory, which a smaller batch may mend.
    """
    try:
        yield
    except Exception as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [kind]
        if kind.endswith("OutOfOrderError"):
            raise UserError(
                f"{name}: this model runs its modules in an order that nnsight cannot follow ({lines[0][:200]}); "
                "use --backend hooks"
            ) from error
        if kind.endswith("RemoteError"):
            if "out of memory" in str(error).lower():
                raise torch.OutOfMemoryError(lines[-1]) from error
            raise UserError(
                f"{name}: NDIF refused or failed: {lines[-1].strip()[:300]}; "
                "see https://nnsight.net/status for the models that it hosts, or leave --remote out"
            ) from error
        if isinstance(error, OSError) or kind.startswith(("httpx.", "websocket.", "huggingface_hub.")):
            raise UserError(
                f"{name}: no connection to NDIF or the hub ({lines[0].strip()[:200]}); check the name and the network"
            ) from error
        raise


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in module.__dict__.keys() - attributes.keys():
        del module.__dict__[name]
    module.__dict__.update(attributes)


def _elsewhere(model: LanguageModel, revision: str | None) -> RemoteLanguageModel:
    commit = getattr(model.config, "_commit_hash", None) or revision
    return RemoteLanguageModel(model.name, commit, model.model, model.tokenizer, model.family, model.projection)


def _generation_config(name: str, revision: str | None) -> Any:
    """The checkpoint's generation config, which says what ends a response; a model on meta comes without."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None
