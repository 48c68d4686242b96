"""nnsight itself: whether it is there, its key and its terminal, and what it says when something fails."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from internal_policy.models import LanguageModel
from internal_policy.utils.errors import UserError, is_http_error, shorten

KEY = "NDIF_API_KEY"

Remote: TypeAlias = bool | str
"""False: here; True: NDIF; ``local``: everything that NDIF would do, here; else a host of one's own, http://..."""


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
            f"the nnsight backend is not installed ({error}); in a clone: pip install -e '.[backends]'"
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
        raise UserError(f"no key for NDIF; get one at https://ndif.us and set it: export {KEY}=...")


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


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    for name in module.__dict__.keys() - attributes.keys():
        del module.__dict__[name]
    module.__dict__.update(attributes)
