"""Capture through nnsight, here or on NDIF's servers: from there only what a reduction returns travels.

A model that is not nnsight's yet is wrapped for the time of a run and unwrapped after it, so that it stays as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internal_policy.extractors.base import Batch, LayerReduction, LayerStates, LogitReduction
from internal_policy.extractors.nnsight_block import projection_there, reduce_layers, reduce_logits
from internal_policy.extractors.nnsight_library import (
    Remote,
    destination,
    is_nnsight,
    load_nnsight,
    quiet,
    require_key,
    told_in_one_line,
    wrapped,
)
from internal_policy.extractors.nnsight_shipping import by_value, plain
from internal_policy.models import LanguageModel, Projection, check, wrap
from internal_policy.utils.errors import UserError, as_user_error

__all__ = ["NnsightExtractor", "RemoteLanguageModel", "from_hub", "from_model", "from_nnsight", "is_nnsight"]


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
        self.nnsight = load_nnsight()
        if remote is True:
            require_key(self.nnsight)
        if remote and root is not None and not hasattr(root, "to_model_key"):
            raise UserError(
                f"{model.name}: a {type(root).__name__} cannot run remotely; needed is an nnsight.TransformersModel"
            )

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
        """Open the model for one trace.

        Yields:
            The nnsight model, the arguments that say where to trace it, and what builds projection and states there.
        """
        with ExitStack() as stack:
            stack.enter_context(told_in_one_line(self.model.name))
            stack.enter_context(torch.no_grad())
            root = self._root
            if root is None:
                root = stack.enter_context(wrapped(self.nnsight, self.model, self.remote))
            if not self.remote:
                yield root, {}, partial(projection_there, make_projection=Projection), LayerStates
                return
            stack.enter_context(by_value())
            stack.enter_context(quiet(self.nnsight))
            projection, states = plain(Projection), plain(LayerStates)
            where = {"remote": destination(self.remote)}
            yield root, where, partial(projection_there, make_projection=projection), states

    def _arguments(self, batch: Batch) -> dict[str, Any]:
        return self.model.forward_arguments(batch.input_ids, batch.attention_mask)

    def row(self) -> dict[str, Any]:
        """Describe the model to a block, in words and numbers.

        Returns:
            Paths of its parts, factors, and the shape of the unembedding.
        """
        family, projection = self.model.family, self.model.projection
        attention, attention_write, ffn, ffn_write = family.sites()
        return {
            "layers": family.layers,
            "final_norm": family.final_norm,
            "unembedding": family.unembedding,
            "attention": attention,
            "attention_write": attention_write,
            "ffn": ffn,
            "ffn_write": ffn_write,
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
    from transformers import AutoTokenizer

    where, _ = check(name, revision=revision, trust_remote_code=trust_remote_code)
    if destination(remote) is True and Path(where).exists():
        raise UserError(f"{name}: NDIF has models of the hub only; leave --remote out for a model on this machine")
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    with as_user_error(name, "its configuration and tokenizer"), told_in_one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, **options)
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        root = nnsight.TransformersModel(
            where, revision=revision, task="text-generation", tokenizer=tokenizer, **options
        )
        root._module.generation_config = _generation_config(where, revision) or root._module.generation_config
    model = _elsewhere(wrap(root._module, root.tokenizer, name), revision)
    return NnsightExtractor(model, root, remote)


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
