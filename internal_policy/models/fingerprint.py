"""What identifies a model: a digest of everything that its numbers depend on, and its commit on the hub.

The digest covers the bytes of every weight, the configuration, and the classes of the modules with their settings.
It is the same on whichever device the weights are. Hooks and replaced methods are in no digest: ``attached_code`` lists
them, and a result of a model with attached code is neither resumed nor reused.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from internal_policy.models import devices
from internal_policy.utils.errors import UserError

logger = logging.getLogger(__name__)

_LIBRARIES = frozenset(
    {
        *("torch", "transformers", "accelerate", "bitsandbytes", "peft", "nnsight", "transformer_lens"),
        "internal_policy",
    }
)
"""Their classes are identified by their names, and their hooks only place weights or read states."""

_REGISTRIES = (
    ("attention function", "_attn_implementation", "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("mask function", "_attn_implementation", "transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("experts function", "_experts_implementation", "transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
)
"""Functions that a field of the configuration chooses by name, and the registry that holds them."""

_IGNORED_KEYS = frozenset(
    {
        # Where it came from, what wrote it, and what the tensors and classes say themselves.
        *("name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"),
        # What a forward pass returns in addition to the logits, and what it keeps.
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "attn_implementation"),
        # What ends or fills a response counts where responses are sampled; a forward pass does not read it.
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        # How a checkpoint was quantised, and which kernels and devices multiply.
        *("dataset", "tokenizer", "backend", "use_exllama", "exllama_config", "llm_int8_enable_fp32_cpu_offload"),
    }
)
"""Keys of a configuration that do not affect the numbers; keys that begin with an underscore do not either."""

_CHANGING_ATTRIBUTES = frozenset({"training", "gradient_checkpointing", "compute_type_is_set"})
"""Plain attributes of a module that change while it is used."""

_ADAPTER_SWITCHES = ("active_adapters", "disable_adapters", "merged_adapters")
"""Which adapters of peft are active; the first two are properties over private attributes."""

_PLACEMENT_ATTRIBUTES = frozenset({"device", "kwargs"})
"""Attributes that say where a module is; ``kwargs`` of an adapter holds the device map that it was created with."""

_CHUNK = 1 << 25
"""Elements that are copied from another device at a time."""

_LARGEST_BUFFER = 4096
"""Size of a computed buffer above which rounding would differ between kinds of devices."""


def digest(model: nn.Module) -> str:
    """Compute a digest of 16 hexadecimal digits of everything that the numbers of a model depend on.

    Any other bit of a weight, another configuration or other classes give another digest.
    """
    buffers = _non_persistent_buffers(model)
    tensors = {**model.state_dict(), **buffers}
    # Equal layouts over one storage are read once. Which tensors share storage is no part of the digest, since a weight
    # that is offloaded to disk has no storage.
    groups: dict[Any, list[str]] = {}
    for name, stored in tensors.items():
        groups.setdefault((name in buffers, _storage_key(stored)), []).append(name)

    def described(names: list[str]) -> list[Any]:
        stored = tensors[names[0]]
        if not isinstance(stored, Tensor):
            return [_jsonable(stored)]
        tensor = devices.materialize(model, names[0], stored)
        return [str(tensor.dtype), list(tensor.shape), _digest_of(tensor, exact=names[0] not in buffers)]

    # A thread has one tensor at a time, and hashing lets the others run.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        found = threads.map(described, groups.values())
        weights = {name: each for names, each in zip(groups.values(), found, strict=True) for name in names}
    config: Any = model.config
    contents = {
        "weights": weights,
        "config": _jsonable(config),
        "modules": _module_settings(model),
        "code": _source_digests(model),
    }
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def _storage_key(stored: Any) -> Any:
    """What equal entries of a state dict share."""
    if type(stored) in (Tensor, nn.Parameter) and not stored.is_meta and stored.numel():
        return stored.device, stored.data_ptr(), stored.shape, stored.stride(), stored.dtype
    return id(stored)


def _digest_of(tensor: Tensor, exact: bool = True) -> str:
    found = hashlib.sha256()
    if hasattr(tensor, "__tensor_flatten__"):
        inner, context = tensor.__tensor_flatten__()
        found.update(repr(_jsonable(context)).encode())
        for name in inner:
            found.update(_digest_of(getattr(tensor, name)).encode())
        return found.hexdigest()
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        values = flat[start : start + _CHUNK].to("cpu")
        if not exact and values.is_floating_point():
            values = values.to(torch.bfloat16)
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _non_persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no state dict has: position frequencies, embedding scales, masks.

    They are computed on the model's device, and their last bits differ between kinds of devices; they are therefore
    compared as bfloat16. In a long table some number would still round the other way. Such tables, and buffers that a
    forward pass replaces, are covered by the configuration from which they are computed.
    """
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules()
        if not _has_changing_positions(module)
        for name in sorted(module._non_persistent_buffers_set)
        if (buffer := module._buffers.get(name)) is not None
        and "cached" not in name
        and (not buffer.is_floating_point() or buffer.numel() <= _LARGEST_BUFFER)
    }


def _has_changing_positions(module: nn.Module) -> bool:
    """Whether a module holds position frequencies that change with the length of the sequence."""
    return any(kind in str(vars(module).get("rope_type", "")) for kind in ("dynamic", "longrope"))


def _module_settings(model: nn.Module) -> dict[str, list[Any]]:
    """The class of each module with its plain settings, such as an epsilon or a scale."""
    return {path: [type(module).__qualname__, _settings(module)] for path, module in model.named_modules()}


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numeric settings of a module; for an adapter or a class of no library, also texts and collections.

    The classes of the libraries keep the rest in the configuration. Adapters keep their scales in dicts by name, and a
    user's own class may name the heads or layers that it changes.
    """
    if _has_changing_positions(module):
        return {}
    public = {
        name: value
        for name, value in vars(module).items()
        if not (name.startswith("_") or "cached" in name or name in _CHANGING_ATTRIBUTES)
    }
    found = {name: value for name, value in public.items() if type(value) in (bool, int, float)}
    adapter = any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__)
    # The attributes of a whole model, such as its name and its device map, describe where it came from.
    own = not _is_library_class(type(module)) and not hasattr(module, "name_or_path")
    if adapter:
        public |= {name: getattr(module, name) for name in _ADAPTER_SWITCHES if hasattr(module, name)}
    if adapter or own:
        for name, value in public.items():
            if value is not None and name not in _PLACEMENT_ATTRIBUTES and name not in _IGNORED_KEYS:
                with suppress(TypeError):
                    found[name] = _plain_setting(value, objects=adapter)
    return found


def _plain_setting(value: Any, objects: bool) -> Any:
    """Convert a plain value, or a collection of such, to JSON-able data; TypeError for anything else.

    With ``objects``, a value of a dict that is not plain is replaced by the name of its class.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain_setting(each, objects) for key, each in _with_class_names(value, objects).items()}
    if isinstance(value, (list, tuple)):
        return [_plain_setting(each, objects) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain_setting(each, objects) for each in value), key=repr)
    raise TypeError(f"a {type(value).__name__} is no setting")


def _with_class_names(values: Mapping[Any, Any], objects: bool) -> Mapping[Any, Any]:
    known = (type(None), bool, int, float, str, Mapping, list, tuple, set, frozenset)
    return {k: v if isinstance(v, known) or not objects else type(v).__qualname__ for k, v in values.items()}


def _source_digests(model: nn.Module) -> list[str]:
    """Digests of the sources of classes that are in no library, such as those that ship with a checkpoint."""
    sources = {source for kind in _own_classes(model) for source in _sources(kind)}
    return sorted(hashlib.sha256(source.encode()).hexdigest()[:16] for source in sources)


def _own_classes(model: nn.Module) -> set[type]:
    classes = {kind for module in model.modules() for kind in type(module).__mro__}
    builtin = ("builtins", "typing", "abc")
    return {kind for kind in classes if not _is_library_class(kind) and kind.__module__ not in builtin}


def _sources(kind: type) -> Iterator[str]:
    module = kind.__module__
    names = [module]
    if module.startswith("transformers_modules."):
        # The code of one checkpoint: its files import each other.
        package = module.rpartition(".")[0] + "."
        names = [name for name in sys.modules if name.startswith(package)]
    # Of a script or a notebook only the class belongs to the model.
    for target in [kind] if module == "__main__" else [sys.modules[name] for name in names if name in sys.modules]:
        try:
            yield inspect.getsource(target)
        except (OSError, TypeError):
            yield kind.__qualname__


def _is_library_class(kind: type) -> bool:
    return kind.__module__.split(".")[0] in _LIBRARIES


def _jsonable(value: Any) -> Any:
    """Convert a value to JSON-able data that is the same in every process."""
    if isinstance(value, Mapping):
        kept = {str(key): _jsonable(each) for key, each in value.items()}
        return {key: each for key, each in kept.items() if key not in _IGNORED_KEYS and not key.startswith("_")}
    if isinstance(value, Enum):
        return _jsonable(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_jsonable(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_jsonable(each)) for each in value)
    for name in ("to_dict", "tolist"):
        if callable(convert := getattr(value, name, None)) and not isinstance(value, type):
            return _jsonable(convert())
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def commit_now(name: str) -> str | None:
    """Look up the commit of a hub model on the hub, or else in the cache; None if neither has it."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        return HfApi().model_info(name, timeout=3).sha
    # The type of the error depends on the versions of the libraries. If the hub cannot be reached or denies access, the
    # model would be loaded from the cache.
    except Exception as error:
        logger.debug("%s: %s", name, error)
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def attached_code(model: nn.Module, wrapper: Any = None) -> list[str]:
    """List the hooks, replaced methods and registered functions that change a model and appear in no digest.

    ``wrapper`` is the nnsight model or the TransformerBridge around the model, if there is one. An entry reads
    ``model.layers.3.mlp: forward hook``. The list is empty for a model as it was loaded: code of the libraries, which
    places weights or reads states, does not count.
    """
    hooks = {"hook": torch_module._global_forward_hooks, "pre-hook": torch_module._global_forward_pre_hooks}
    found = [f"every module: forward {kind}" for kind, each in hooks.items() if any(map(_is_foreign, each.values()))]
    bridged = getattr(wrapper, "original_model", None)
    for root in (model, bridged) if isinstance(bridged, nn.Module) else (model,):
        for path, module in root.named_modules():
            place = path.replace("._original_component", "") or type(model).__name__
            found += [f"{place}: {what}" for what in _attached_to(module)]
    for what, field, home, registry in _REGISTRIES:
        name = getattr(model.config, field, None)
        function = getattr(sys.modules.get(home), registry, {}).get(name)
        if (what, name) == ("attention function", "eager"):
            function = getattr(sys.modules.get(type(model).__module__), "eager_attention_forward", None)
        repository = str(name).rpartition("|")[2]
        if "/" in repository:
            foreign = not repository.startswith("kernels-community/")
        elif str(getattr(function, "__module__", "")).startswith("transformers_modules."):
            # The code that ships with a checkpoint is in the digest; the values of a closure are not.
            foreign = bool(getattr(function, "__closure__", None))
        else:
            # A partial of a library's function passes it other arguments.
            foreign = _is_foreign(function) or isinstance(function, functools.partial)
        if function is not None and foreign:
            found.append(f"{what} {name!r}")
    unseen = [kind.__name__ for kind in _own_classes(model) if issubclass(kind, nn.Module) and not _has_source(kind)]
    found += [f"class {name} without a source" for name in unseen]
    found += ["nnsight edit" for _ in getattr(wrapper, "__dict__", {}).get("_edits") or ()]
    return list(dict.fromkeys(found))


def resume_refused(directory: Path, attached: Sequence[str], what: str = "an analysis") -> UserError:
    """Create the error for a directory with a result, since it cannot be compared with a model that has attached code.

    ``attached`` is the result of ``attached_code``, not empty; ``what`` is ``an analysis``, ``an evaluation`` or ``a
    run``.
    """
    more = f" and {len(attached) - 1} more" if len(attached) > 1 else ""
    return UserError(
        f"{directory}: holds {what}, and this model has code attached ({attached[0]}{more}), which no digest covers; "
        "remove it from the model, choose another output=, or pass overwrite=True to start over"
    )


def _attached_to(module: nn.Module) -> Iterator[str]:
    for what, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        yield from (what for hook in hooks.values() if _is_foreign(hook))
    kind = type(module)
    # nnsight replaces every forward, and keeps one that had been replaced before in a closure.
    body = getattr(vars(module).get("__nnsight__"), "body", None)
    for name, value in vars(module).items():
        if callable(value) and callable(getattr(kind, name, None)):
            holder = getattr(value, "__self__", module)
            borrowed = isinstance(holder, nn.Module) and holder is not module
            if borrowed or _is_foreign(value) or "module_body.<locals>" in getattr(body, "__qualname__", ""):
                yield f"replaced {name}"
    home = next(each for each in kind.__mro__ if "forward" in vars(each))
    if _is_library_class(home) and _is_foreign(kind.forward):
        yield f"replaced forward of {home.__name__}"


def _is_foreign(function: Any) -> bool:
    """Whether a callable, or one that it wraps, is in no file of a library; a wrapper may borrow a library's name."""
    libraries = [getattr(sys.modules.get(name), "__file__", None) for name in (*_LIBRARIES, "trl")]
    roots = tuple(f"{Path(file).parent}{os.sep}" for file in libraries if file)
    while function is not None:
        inner = function.func if isinstance(function, functools.partial) else function
        code = getattr(getattr(inner, "__func__", inner), "__code__", None)
        file = code.co_filename if code else getattr(sys.modules.get(type(inner).__module__), "__file__", None)
        if not str(file).startswith(roots):
            return True
        function = getattr(function, "__wrapped__", inner if inner is not function else None)
    return False


def _has_source(kind: type) -> bool:
    try:
        return bool(inspect.getsource(kind))
    except (OSError, TypeError):
        return False
