"""What code is attached to a model that no digest of its weights can know: hooks, replaced methods, edits."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from internal_policy.utils.errors import UserError

_LIBRARIES = frozenset(
    {
        *("torch", "transformers", "accelerate", "bitsandbytes", "peft", "nnsight", "transformer_lens"),
        "internal_policy",
    }
)
"""Whose code is known by its version: it stands in no digest, and its hooks only watch or place."""

_FUSED = "_fused_forward"
"""What TRL puts before the forward of a model that it trains: of a call without labels it passes everything on."""

_KERNELS = "kernels-community/"
"""Whose kernels transformers trusts: they compute what its own functions compute."""

_REGISTRIES = (
    ("attention function", "attn", "ALL_ATTENTION_FUNCTIONS", "transformers.modeling_utils"),
    ("mask function", "attn", "ALL_MASK_ATTENTION_FUNCTIONS", "transformers.masking_utils"),
    ("experts function", "experts", "ALL_EXPERTS_FUNCTIONS", "transformers.integrations.moe"),
)
"""What a configuration names, under ``_attn_implementation`` or ``_experts_implementation``, and who keeps it."""


def attached(model: nn.Module, wrapper: Any = None) -> list[str]:
    """List what changes what a model computes, or may, and stands in no weight and no configuration.

    Args:
        model: a transformers causal LM.
        wrapper: the nnsight model or the TransformerBridge around it, where there is one.

    Returns:
        One entry each, such as ``model.layers.3.mlp: forward hook`` or ``attention function 'mine'``; empty for a model
        as it was loaded. Hooks of the libraries themselves, by which they place weights or read states, do not count,
        and neither do their attention functions and the kernels of kernels-community.
    """
    found = [
        f"every module: {what}"
        for what, hooks in (
            ("forward hook", torch_module._global_forward_hooks),
            ("forward pre-hook", torch_module._global_forward_pre_hooks),
        )
        for hook in hooks.values()
        if _foreign(hook)
    ]
    found += [
        f"{path or type(model).__name__}: {what}" for path, module in model.named_modules() for what in _on(module)
    ]
    shipped = _shipped(model)
    found += dict.fromkeys(each for module in model.modules() for each in _chosen(module, shipped))
    if isinstance(bridged := getattr(wrapper, "original_model", None), nn.Module):
        for path, module in bridged.named_modules():
            # What a bridge wraps has the model's own hooks.
            place = path.replace("._original_component", "")
            found += [each for what in _on(module) if (each := f"{place}: {what}") not in found]
    edits = getattr(wrapper, "__dict__", {}).get("_edits") or ()
    return [*found, *("nnsight edit" for _ in edits)]


def not_taken_up(directory: Path, found: Sequence[str], what: str = "an analysis") -> UserError:
    """Make the error for a directory that holds what came of a model with code attached, or may have.

    Args:
        directory: the directory of the result.
        found: what `attached` found on the model, not empty.
        what: ``an analysis``, ``an evaluation``, ``a run``.

    Returns:
        The error, to be raised.
    """
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return UserError(
        f"{directory}: holds {what}, and this model has code attached ({found[0]}{more}) that no digest can tell "
        "apart; take it off the model, choose another output=, or pass overwrite=True to start over"
    )


def _on(module: nn.Module) -> Iterator[str]:
    for what, hooks in (("forward hook", module._forward_hooks), ("forward pre-hook", module._forward_pre_hooks)):
        yield from (what for hook in hooks.values() if _foreign(hook))
    kind = type(module)
    for name, value in vars(module).items():
        own = getattr(kind, name, None)
        if callable(value) and callable(own) and _replaced(module, value, own):
            yield f"replaced {name}"
    home = next(each for each in kind.__mro__ if "forward" in vars(each))
    if of_a_library(home) and any(map(_foreign_layer, _layers(kind.forward))):
        yield f"replaced forward of {home.__name__}"
    for each in kind.__mro__:
        if issubclass(each, nn.Module) and not of_a_library(each) and not _has_source(each):
            yield f"class {each.__name__} without a source"


def _chosen(module: nn.Module, shipped: set[Path]) -> Iterator[str]:
    """What a module calls by a name in its configuration, and somebody registered under that name."""
    config = getattr(module, "config", None)
    # The file of a module may have a registry of its own, and has the eager attention.
    here = vars(sys.modules.get(type(module).__module__, object))
    for what, kind, registry, home in _REGISTRIES:
        name = getattr(config, f"_{kind}_implementation", None)
        if not isinstance(name, str):
            continue
        functions = here.get(registry) or getattr(sys.modules.get(home), registry, {})
        function = functions.get(name)
        if function is None and (what, name) == ("attention function", "eager"):
            function = here.get("eager_attention_forward")
        code = getattr(function, "__code__", None)
        if function is None or (code and Path(code.co_filename).parent in shipped and not function.__closure__):
            continue
        repository = name.rpartition("|")[2]
        kernel = "/" in repository
        # A partial of a library's function gives it other arguments.
        if (not repository.startswith(_KERNELS)) if kernel else _foreign(function) or _is_partial(function):
            yield f"{what} {name!r}"


def _is_partial(function: Any) -> bool:
    return any(isinstance(layer, functools.partial) for layer in _layers(function))


def _shipped(model: nn.Module) -> set[Path]:
    """Folders of the code that came with a checkpoint, all of which stands in the digest."""
    places = {type(module).__module__ for module in model.modules()}
    files = (getattr(sys.modules.get(p), "__file__", None) for p in places if p.startswith("transformers_modules."))
    return {Path(file).parent for file in files if file}


def of_a_library(kind: type) -> bool:
    """Whether a class is known by its name and a library's version.

    Args:
        kind: the class.

    Returns:
        False for one whose source has to be looked at.
    """
    return kind.__module__.split(".")[0] in _LIBRARIES


def _has_source(kind: type) -> bool:
    try:
        return bool(inspect.getsource(kind))
    except (OSError, TypeError):
        return False


def _replaced(module: nn.Module, value: Any, own: Any) -> bool:
    """Whether an instance has a method of its own; accelerate and nnsight put theirs around the class's."""
    known = {id(layer) for layer in _layers(own)}
    # nnsight keeps a forward that was there before it in a function of its own.
    body = getattr(vars(module).get("__nnsight__"), "body", None)
    if "module_body.<locals>" in getattr(body, "__qualname__", ""):
        return True
    for layer in _layers(value):
        holder = getattr(layer, "__self__", None)
        if isinstance(holder, nn.Module) and holder is not module:
            return True
        if id(getattr(layer, "__func__", layer)) not in known and _foreign_layer(layer):
            return True
    return False


def _foreign(hook: Any) -> bool:
    return any(map(_foreign_layer, _layers(hook)))


def _layers(value: Any) -> Iterator[Any]:
    """A callable and what it is wrapped around, the outermost first."""
    for _ in range(100):
        yield value
        function = getattr(value, "__func__", value)
        inner = value.func if isinstance(value, functools.partial) else None
        inner = getattr(function, "_torchdynamo_orig_callable", None) or getattr(function, "__wrapped__", inner)
        if inner is None:
            return
        value = inner


def _foreign_layer(value: Any) -> bool:
    """Whether code is in no library that is known; it is looked for in its file, for a wrapper borrows its name."""
    value = value.func if isinstance(value, functools.partial) else value
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    home = getattr(sys.modules.get(type(value).__module__), "__file__", None)
    where = str(home or "") if code is None else code.co_filename
    if code is not None and code.co_name == _FUSED and where.startswith(_roots(("trl",))):
        return False
    return not where.startswith(_roots())


def _roots(libraries: Iterable[str] = _LIBRARIES) -> tuple[str, ...]:
    files = (getattr(sys.modules.get(name), "__file__", None) for name in libraries)
    return tuple(f"{Path(file).parent}{os.sep}" for file in files if file)
