"""Capture through nnsight, here or on NDIF's servers, from which only what a reduction returns travels.

A transformers model that is not yet an nnsight model is wrapped for the duration of a run and unwrapped after it.

nnsight sends a trace as source text together with what it refers to, so that client and server may run different
versions of Python. This package is not installed on the server: its functions are sent by value. Two things have no
source that nnsight could find, and are given one here: the methods that ``dataclass`` generates, and functions behind a
decorator.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from internal_policy.extractors.base import Batch, LayerReduction, LayerStates, LogitReduction
from internal_policy.extractors.nnsight_trace import build_projection, reduce_layers, reduce_logits
from internal_policy.models import LanguageModel, Projection, check, wrap
from internal_policy.utils.errors import UserError, as_user_error, is_http_error, shorten

KEY = "NDIF_API_KEY"
_PACKAGE = __name__.split(".")[0]

Remote: TypeAlias = bool | str
"""False: here; True: NDIF; ``local``: everything that NDIF would do, here; else the address of a host, http://..."""


@dataclass(frozen=True)
class RemoteLanguageModel(LanguageModel):
    """A model whose weights are on a server; its parameters are on the meta device."""

    @property
    def device(self) -> torch.device:
        """Where token ids are before they are sent."""
        return torch.device("cpu")

    def fingerprint(self) -> str:
        """Compute a digest of name and commit, since the weights cannot be read."""
        return hashlib.sha256(f"{self.name}@{self.revision}".encode()).hexdigest()[:16]


class NnsightExtractor:
    """The nnsight backend; see ``Extractor``."""

    def __init__(self, model: LanguageModel, root: Any = None, remote: Remote = False) -> None:
        """Connect a model to nnsight, or to its nnsight model ``root``, if there is one already.

        Raises:
            UserError: nnsight is not installed, there is no key for NDIF, or the nnsight model cannot run remotely.
        """
        self.model = model
        self.remote = remote
        self._root = root
        self.nnsight = load_nnsight()
        if remote is True:
            require_key(self.nnsight)
        if remote and root is not None and not hasattr(root, "to_model_key"):
            raise UserError(
                f"{model.name}: a {type(root).__name__} cannot run remotely; needed is an nnsight.TransformersModel"
            )

    @property
    def wrapper(self) -> Any:
        """The nnsight model, if one was given."""
        return self._root

    def run(self, batch: Batch, reduce: LayerReduction, at_once: int = 1) -> list[Tensor]:
        """Run the decoder once, without the unembedding; see ``Extractor.run``."""
        save = self.nnsight.save
        walk, positions, row = reduce_layers, batch.positions, self.row()
        reduced: list[Tensor] = []
        with self.ready() as (root, where, project, states), root.trace(**self._arguments(batch), **where) as tracer:
            reduced = save(walk(root, row, positions, reduce, at_once, states, project(root, row)))
            tracer.stop()
        return reduced

    def logits(self, batch: Batch, reduce: LogitReduction) -> Tensor:
        """Run the whole model once; see ``Extractor.logits``."""
        save = self.nnsight.save
        walk, positions, row = reduce_logits, batch.positions, self.row()
        reduced: Tensor = torch.empty(0)
        with self.ready() as (root, where, project, _), root.trace(**self._arguments(batch), **where):
            reduced = save(walk(root, row, positions, reduce, project(root, row)))
        return reduced

    @contextmanager
    def ready(self) -> Iterator[tuple[Any, dict[str, Any], Any, Any]]:
        """Yield nnsight model, arguments of its trace, and what builds projection and states there."""
        with ExitStack() as stack:
            stack.enter_context(as_nnsight_error(self.model.name))
            stack.enter_context(torch.no_grad())
            root = self._root
            if root is None:
                root = stack.enter_context(_wrapped(self.nnsight, self.model, self.remote))
            if not self.remote:
                yield root, {}, partial(build_projection, projection_class=Projection), LayerStates
                return
            stack.enter_context(_quiet(self.nnsight))
            self.nnsight.register(importlib.import_module(_PACKAGE))
            # A server refuses the named tuple that `changes` returns, and no trace calls it.
            projection, states = _plain_class(Projection, without=("changes",)), _plain_class(LayerStates)
            where = {"remote": _destination(self.remote)}
            yield root, where, partial(build_projection, projection_class=projection), states

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return self.model.forward_arguments(batch.input_ids, batch.attention_mask)

    def row(self) -> dict[str, Any]:
        """Describe the model to a trace in strings and numbers, which travel to any server."""
        family, projection = self.model.family, self.model.projection
        return {
            "layers": family.layers,
            "final_norm": family.final_norm,
            "unembedding": family.unembedding,
            **family.capture_paths()._asdict(),
            "multiplier": self.model.write_multiplier,
            "vocabulary": self.model.vocab_size,
            "width": int(projection.weight.shape[1]),
            "dtype": str(projection.weight.dtype).removeprefix("torch."),
            "transform": {
                "scale": projection.scale,
                "softcap": projection.softcap,
                "memory_budget": projection.memory_budget,
            },
        }


def from_model(model: LanguageModel, remote: Remote = False) -> NnsightExtractor:
    """Capture from a transformers model in memory, which does not change; ``local`` tries what NDIF would do."""
    if remote not in (False, "local"):
        raise UserError(f"{model.name}: a model in memory does not travel to NDIF; give its name on the hub")
    return NnsightExtractor(model, remote=remote)


def from_nnsight(root: Any, tokenizer: Any = None, name: str | None = None, remote: Remote = False) -> NnsightExtractor:
    """Capture from an nnsight model of a causal LM in memory, with its edits.

    Raises:
        UserError: it has no tokenizer, or is not a causal LM.
    """
    load_nnsight()
    name = name or getattr(root, "repo_id", None) or getattr(root._module, "name_or_path", "") or type(root).__name__
    tokenizer = tokenizer if tokenizer is not None else root.__dict__.get("tokenizer")
    if tokenizer is None:
        raise UserError(f"{name}: an nnsight model was given without its tokenizer; pass tokenizer=")
    if not remote and not root.__dict__.get("dispatched", True):
        with as_nnsight_error(name):
            root.dispatch()
    model = wrap(root._module, tokenizer, name)
    if next(root._module.parameters()).is_meta:
        model = _as_remote(model, root.__dict__.get("revision"))
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

    ``remote`` is True for NDIF, or the address of another host. With ``trust_remote_code``, code that comes with the
    checkpoint runs both here and there.

    Raises:
        UserError: nnsight is not installed, there is no key, or no such model.
    """
    nnsight = load_nnsight()
    if remote is True:
        require_key(nnsight)
    from transformers import AutoTokenizer

    where, _ = check(name, revision=revision, trust_remote_code=trust_remote_code)
    if _destination(remote) is True and Path(where).exists():
        raise UserError(f"{name}: NDIF has models of the hub only; leave --remote out for a model on this machine")
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    with as_user_error(name, "its configuration and tokenizer"), as_nnsight_error(name):
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, **options)
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        root = nnsight.TransformersModel(
            where, revision=revision, task="text-generation", tokenizer=tokenizer, **options
        )
        root._module.generation_config = _generation_config(where, revision) or root._module.generation_config
    model = _as_remote(wrap(root._module, root.tokenizer, name), revision)
    return NnsightExtractor(model, root, remote)


def _as_remote(model: LanguageModel, revision: str | None) -> RemoteLanguageModel:
    commit = getattr(model.config, "_commit_hash", None) or revision
    return RemoteLanguageModel(model.name, commit, model.model, model.tokenizer, model.family, model.projection)


def _generation_config(name: str, revision: str | None) -> Any:
    """The checkpoint's generation config, which says what ends a response; a model on meta comes without."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError):
        return None


def is_nnsight(value: object) -> bool:
    """Check whether an object is an nnsight model, without importing nnsight."""
    nnsight = sys.modules.get("nnsight")
    return nnsight is not None and isinstance(value, nnsight.Envoy)


def load_nnsight() -> Any:
    """Import nnsight, or say how to install it."""
    try:
        return importlib.import_module("nnsight")
    except ImportError as error:
        raise UserError(
            f"the nnsight backend is not installed ({error}); in a clone: pip install -e '.[backends]'"
        ) from error


def require_key(nnsight: Any) -> None:
    """Pass the key for NDIF from the environment to nnsight, which may also have stored one."""
    settings = importlib.import_module(f"{nnsight.__name__}.schema.config").CONFIG.API
    settings.APIKEY = os.environ.get(KEY) or settings.APIKEY
    if not settings.APIKEY:
        raise UserError(f"no key for NDIF; get one at https://ndif.us and set it: export {KEY}=...")


def _destination(remote: Remote) -> Remote:
    """Nnsight's ``remote=``: the environment variable NDIF_HOST, if set, replaces NDIF's own address."""
    return os.environ.get("NDIF_HOST") or True if remote is True else remote


@contextmanager
def _quiet(nnsight: Any) -> Iterator[None]:
    """Keep nnsight's progress off the terminal, and undo what its local server changes in the import path."""
    settings = importlib.import_module(f"{nnsight.__name__}.schema.config").CONFIG.APP
    logging, path = settings.REMOTE_LOGGING, list(sys.path)
    settings.REMOTE_LOGGING = False
    try:
        yield
    finally:
        settings.REMOTE_LOGGING = logging
        sys.path[:] = path


@contextmanager
def _wrapped(nnsight: Any, model: LanguageModel, remote: Remote) -> Iterator[Any]:
    """Wrap a transformers model as an nnsight model, and undo on any exit what nnsight writes into each module."""
    before = [(module, dict(module.__dict__)) for module in model.model.modules()]
    try:
        if remote:
            tokenizer = copy.deepcopy(model.tokenizer)
            yield nnsight.TransformersModel(model.model, tokenizer=tokenizer, task="text-generation")
        else:
            yield nnsight.NNsight(model.model)
    finally:
        for module, attributes in before:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)


@contextmanager
def as_nnsight_error(name: str) -> Iterator[None]:
    """Turn an exception of nnsight, NDIF or the network into an error message of one line.

    Raises:
        UserError: what went wrong.
        torch.OutOfMemoryError: the server ran out of memory; a smaller batch may succeed.
    """
    try:
        yield
    except Exception as error:
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        lines = [line for line in str(error).strip().splitlines() if line.strip()] or [kind]
        if kind.endswith("OutOfOrderError"):
            raise UserError(
                f"{name}: this model runs its modules in an order that nnsight cannot follow ({shorten(lines[0])}); "
                "use --backend hooks"
            ) from error
        if any(sign in str(error).lower() for sign in ("api key", "401 unauthorized", "403 forbidden")):
            raise UserError(f"{name}: NDIF does not take this key ({shorten(lines[-1])}); check {KEY}") from error
        if kind.endswith("RemoteError"):
            if "out of memory" in str(error).lower():
                raise torch.OutOfMemoryError(lines[-1]) from error
            raise UserError(
                f"{name}: NDIF refused or failed: {shorten(lines[-1], 300)}; "
                "see https://nnsight.net/status/ for the models that it hosts, or leave --remote out"
            ) from error
        if isinstance(error, OSError) or is_http_error(error) or kind.startswith(("websocket.", "huggingface_hub.")):
            raise UserError(
                f"{name}: no connection to NDIF or the hub ({shorten(lines[0])}); check the name and the network"
            ) from error
        raise


def _plain_class(cls: type, without: Sequence[str] = ()) -> type:
    """Rewrite a dataclass as a class with the same methods that any version of Python can build from its source.

    The methods ``without`` are left out.
    """
    own = {
        name: _undecorated(member)
        for name, member in vars(cls).items()
        if inspect.isfunction(member) and not (name.startswith("__") and name.endswith("__")) and name not in without
    }
    return type(cls.__name__, (), {**own, "__init__": _take_fields})


def _take_fields(self: object, **fields: object) -> None:
    for name, value in fields.items():
        setattr(self, name, value)


def _undecorated(function: FunctionType) -> FunctionType:
    """Let a function refer to this package's functions without their decorators.

    nnsight looks up the names that a decorated function uses in the module of the decorator, and misses them.
    """
    names = {
        name: inspect.unwrap(value) if inspect.isfunction(value) and value.__module__.startswith(_PACKAGE) else value
        for name, value in function.__globals__.items()
    }
    bare = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    bare.__kwdefaults__ = function.__kwdefaults__
    return bare
