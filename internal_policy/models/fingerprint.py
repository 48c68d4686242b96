"""What tells one model from another: a digest of all that its numbers come from, and its commit on the hub.

The digest has the bytes of every weight, the configuration, and the classes of the modules with their plain settings.
It is the same on whichever device the weights are. What it cannot know is listed by ``attachments.attached``.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.models import devices
from internal_policy.models.attachments import of_a_library

logger = logging.getLogger(__name__)

_UNDECIDED = frozenset(
    {
        # Where it came from, what wrote it, and what the tensors and classes say themselves.
        *("name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"),
        # What a forward pass returns beside the logits, and what it keeps.
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "attn_implementation"),
        # What ends or fills a response counts where responses are sampled; a forward pass does not read it.
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        # How a checkpoint was quantised, and which kernels and devices multiply.
        *("dataset", "tokenizer", "backend", "use_exllama", "exllama_config", "llm_int8_enable_fp32_cpu_offload"),
    }
)
"""Keys of a configuration that do not decide the numbers; neither do those that begin with an underscore."""

_STATES = frozenset({"training", "gradient_checkpointing", "compute_type_is_set"})
"""Plain attributes of a module that change while it is used."""

_SWITCHES = ("active_adapters", "disable_adapters", "merged_adapters")
"""Which adapters of peft are at work; the first two are properties, behind which it has private attributes."""

_PLACES = frozenset({"device", "kwargs"})
"""Attributes that say where a module is: of an adapter, how it was made, with the map of the devices."""

_PORTION = 1 << 25
"""Elements that are copied from another device at a time."""

_TABLE = 4096
"""Elements of a computed buffer beyond which rounding would tell devices apart."""


def digest(model: nn.Module) -> str:
    """Digest what the numbers of a model come from.

    Args:
        model: a transformers causal LM, wherever its weights are.

    Returns:
        16 hexadecimal digits; any other bit of a weight, another configuration or other classes give others.
    """
    unsaved = _unsaved(model)
    tensors = {**model.state_dict(), **unsaved}
    # Equal layouts over one storage are read once; by themselves they are no mark, as a weight that was set aside on
    # the disk has no storage to be told by.
    groups: dict[Any, list[str]] = {}
    for name, stored in tensors.items():
        groups.setdefault((name in unsaved, _place(stored)), []).append(name)

    def described(names: list[str]) -> list[Any]:
        stored = tensors[names[0]]
        if not isinstance(stored, Tensor):
            return [_plain(stored)]
        tensor = devices.resident(model, names[0], stored)
        return [str(tensor.dtype), list(tensor.shape), _digest_of(tensor, exact=names[0] not in unsaved)]

    # A thread has one tensor at a time, and hashing lets the others run.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        found = threads.map(described, groups.values())
        weights = {name: told for names, told in zip(groups.values(), found, strict=True) for name in names}
    config: Any = model.config
    told = {"weights": weights, "config": _plain(config), "modules": _modules(model), "code": _code(model)}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _place(stored: Any) -> Any:
    """What equal entries of a state dict share."""
    if type(stored) in (Tensor, nn.Parameter) and not stored.is_meta and stored.numel():
        return stored.device, stored.data_ptr(), stored.shape, stored.stride(), stored.dtype
    return id(stored)


def _digest_of(tensor: Tensor, exact: bool = True) -> str:
    found = hashlib.sha256()
    if hasattr(tensor, "__tensor_flatten__"):
        inner, context = tensor.__tensor_flatten__()
        found.update(repr(_plain(context)).encode())
        for name in inner:
            found.update(_digest_of(getattr(tensor, name)).encode())
        return found.hexdigest()
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PORTION):
        values = flat[start : start + _PORTION].to("cpu")
        if not exact and values.is_floating_point():
            values = values.to(torch.bfloat16)
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no state dict has: position frequencies, embedding scales, masks.

    They are computed where the model is, in the last bits otherwise on each kind of device, and therefore compared by 8
    bits; in a long table one number would even so round the other way. Such tables, and what a forward pass replaces,
    are left to the configuration that they come from.
    """
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not _moving(module)
        for name in sorted(module._non_persistent_buffers_set)
        if (buffer := module._buffers.get(name)) is not None
        and "cached" not in name
        and (not buffer.is_floating_point() or buffer.numel() <= _TABLE)
    }


def _moving(module: nn.Module) -> bool:
    """Whether these are position frequencies that follow the length of what the model reads."""
    return any(kind in str(vars(module).get("rope_type", "")) for kind in ("dynamic", "longrope"))


def _modules(model: nn.Module) -> dict[str, list[Any]]:
    """The class of each module with its plain settings, such as an epsilon or a scale."""
    return {path: [type(module).__qualname__, _settings(module)] for path, module in model.named_modules()}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers of a module; of an adapter, and of a class that no library has, texts and collections too.

    The classes of the libraries keep the rest in the configuration. Adapters have their scales by name, and what
    somebody wrote himself may have which heads or layers it is about.
    """
    if _moving(module):
        return {}
    public = {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("_") or "cached" in name or name in _STATES)
    }
    found = {name: value for name, value in public.items() if type(value) in (bool, int, float)}
    adapter = any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)
    # What a whole model keeps, such as its name and the map of its devices, is about where it came from.
    own = not of_a_library(type(module)) and not hasattr(module, "name_or_path")
    if adapter:
        public |= {name: getattr(module, name) for name in _SWITCHES if hasattr(module, name)}
    if adapter or own:
        for name, value in public.items():
            if value is not None and name not in _PLACES and name not in _UNDECIDED:
                with suppress(TypeError):
                    found[name] = _collection(value, objects=adapter)
    return found


def _collection(value: Any, objects: bool) -> Any:
    """A plain value or a collection of such, JSON-able.

    Args:
        value: an attribute.
        objects: name the class of what is not plain, where a dict holds it.

    Raises:
        TypeError: it is anything else, such as what was kept of a forward pass.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _collection(each, objects) for key, each in _named(value, objects).items()}
    if isinstance(value, (list, tuple)):
        return [_collection(each, objects) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_collection(each, objects) for each in value), key=repr)
    raise TypeError(f"a {type(value).__name__} is no setting")


def _named(values: Mapping[Any, Any], objects: bool) -> Mapping[Any, Any]:
    known = (type(None), bool, int, float, str, Mapping, list, tuple, set, frozenset)
    return {k: v if isinstance(v, known) or not objects else type(v).__qualname__ for k, v in values.items()}


def _code(model: nn.Module) -> list[str]:
    """Digests of the sources of classes that no library has, such as those that come with a checkpoint."""
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    builtin = ("builtins", "typing", "abc")
    own = (kind for kind in classes if not of_a_library(kind) and kind.__module__ not in builtin)
    sources = {source for kind in own for source in _sources(kind)}
    return sorted(hashlib.sha256(source.encode()).hexdigest()[:16] for source in sources)


def _sources(kind: type) -> Iterator[str]:
    module = kind.__module__
    names = [module]
    if module.startswith("transformers_modules."):
        # The code of one checkpoint: its files import each other.
        package = module.rpartition(".")[0] + "."
        names = [name for name in sys.modules if name.startswith(package)]
    # Of a script or a notebook only the class is the model's.
    for target in [kind] if module == "__main__" else [sys.modules[name] for name in names if name in sys.modules]:
        try:
            yield inspect.getsource(target)
        except (OSError, TypeError):
            # `attachments` lists it.
            yield kind.__qualname__


def _plain(value: Any) -> Any:
    """Something JSON-able that says the same in every process."""
    if isinstance(value, Mapping):
        kept = {str(key): _plain(each) for key, each in value.items()}
        return {key: each for key, each in kept.items() if key not in _UNDECIDED and not key.startswith("_")}
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_plain(each)) for each in value)
    for name in ("to_dict", "tolist"):
        if callable(convert := getattr(value, name, None)) and not isinstance(value, type):
            return _plain(convert())
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def commit_now(name: str) -> str | None:
    """Find the commit that a hub model stands for now, without reading the model.

    Args:
        name: hub id.

    Returns:
        That of the hub, else that of the cache; None where neither can be had.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(name, timeout=3).sha
    # Which errors those are depends on the hub's library and on the network's. Where it cannot be reached, or does not
    # let us look, the cache is what would be loaded.
    except Exception as error:
        logger.debug("%s: %s", name, error)
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None
