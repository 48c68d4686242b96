"""Hooks that change what modules write while the decoder runs, and that read it; they are removed on any exit.

Usage::

    with changed_writes(model, [Change(layer=3, site="ffn", how="zero")]):
        model.backbone(input_ids=..., attention_mask=...)

A write is changed where the module returns it: A^l and F^l at the modules whose outputs are added to the stream, that
of a layer between its input and its output, that of a head before the output projection, which is linear, and that of
an expert at the router's weight. A family's factor on both writes comes after all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from internal_policy.extractors.experts import experts_of
from internal_policy.extractors.heads import projection_path
from internal_policy.extractors.hooks import first_tensor
from internal_policy.interventions.config import How, Site
from internal_policy.models import LanguageModel

Point: TypeAlias = Literal["attn", "ffn", "layer", "heads"]
"""Where tensors are read: the outputs of modules and layers, or the heads' results before the output projection."""
_POINTS: dict[Site, Point] = {"attn": "attn", "ffn": "ffn", "layer": "layer"}


@dataclass(frozen=True)
class Change:
    """One write that is changed."""

    layer: int
    """l, from 1."""
    site: Site
    """What writes."""
    how: How
    """What its write is replaced by."""
    alpha: float = 1.0
    """The factor of a write that is scaled."""
    head: int | None = None
    """The head, from 1, if only its write is changed."""
    expert: int | None = None
    """The routed expert, from 1, if only its write is changed."""

    @property
    def point(self) -> Point:
        """Where the write can be read."""
        return "heads" if self.head is not None else _POINTS[self.site]

    @property
    def factor(self) -> float | None:
        """What the write is multiplied by; None if it is replaced by another."""
        return {"zero": 0.0, "scale": self.alpha}.get(self.how)


@dataclass(frozen=True)
class Intervention:
    """Writes that are changed at the same time."""

    changes: tuple[Change, ...]

    @property
    def first(self) -> int:
        """The lowest layer that is changed, from 1."""
        return min(change.layer for change in self.changes)

    def points(self, how: How) -> set[tuple[int, Point]]:
        """Where the writes are read by which others are replaced in this way."""
        return {(change.layer, change.point) for change in self.changes if change.how == how}


Given: TypeAlias = Mapping[tuple[How, int, Point], Tensor]
"""What writes are replaced by: means [width], or those of other responses [B, T, width], by layer and point."""


@contextmanager
def changed_writes(model: LanguageModel, changes: Iterable[Change], given: Given | None = None) -> Iterator[None]:
    """Change writes while the model runs.

    Args:
        model: the model to hook.
        changes: the writes to change.
        given: what those are replaced by that are neither set to zero nor scaled.
    """
    with ExitStack() as hooks:
        for change in changes:
            other = (
                None if change.factor is not None or given is None else given[change.how, change.layer, change.point]
            )
            hooks.callback(_hook(model, change, other).remove)
        yield


def _hook(model: LanguageModel, change: Change, other: Tensor | None) -> torch.utils.hooks.RemovableHandle:
    layer = model.layers[change.layer - 1]
    if change.expert is not None:
        return _scale_expert(experts_of(model, change.layer), change.expert - 1, change.factor or 0.0)
    if change.head is not None:
        return _change_head(model, change, other)
    if change.site == "layer":
        return layer.register_forward_hook(_change_layer(change, other), with_kwargs=True)

    def change_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        write = first_tensor(output)
        return with_first(output, _replacement(write, change, other))

    return writer(model, change.layer, change.site).register_forward_hook(change_output)


def _change_layer(change: Change, other: Tensor | None) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        before, after = received(args, kwargs), first_tensor(output)
        before = before.to(after.device)
        if change.factor is not None:
            # Exact at both ends: at 0 the stream passes unchanged, at 1 the layer's output does.
            return with_first(output, torch.lerp(before, after, change.factor))
        return with_first(output, before + _replacement(after, change, other))

    return hook


def _change_head(model: LanguageModel, change: Change, other: Tensor | None) -> torch.utils.hooks.RemovableHandle:
    head = change.head or 1
    n_heads = int(model.config.num_attention_heads)
    projection = operator.attrgetter(projection_path(model, change.layer))(model.model)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        results = first_tensor(args or tuple(kwargs.values()))
        width = results.shape[-1] // n_heads
        own = slice((head - 1) * width, head * width)
        changed = results.clone()
        changed[..., own] = _replacement(results[..., own], change, None if other is None else other[..., own])
        if args:
            return (changed, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): changed}

    handle: torch.utils.hooks.RemovableHandle = projection.register_forward_pre_hook(hook, with_kwargs=True)
    return handle


def _scale_expert(experts: Any, expert: int, factor: float) -> torch.utils.hooks.RemovableHandle:
    """The experts receive states, the chosen experts and their weights, which ``find_experts`` has proved."""

    def scaled(chosen: Tensor, weights: Tensor) -> Tensor:
        return torch.where(chosen == expert, weights * factor, weights)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states, chosen, weights = (*args, *kwargs.values())
        return (states, chosen, scaled(chosen, weights)), {}

    handle: torch.utils.hooks.RemovableHandle = experts.register_forward_pre_hook(hook, with_kwargs=True)
    return handle


def _replacement(write: Tensor, change: Change, other: Tensor | None) -> Tensor:
    if change.factor is not None:
        return torch.zeros_like(write) if change.how == "zero" else write * change.factor
    assert other is not None
    other = other.to(write.device, write.dtype)
    return other.expand_as(write) if other.ndim == 1 else other.reshape(write.shape)


@contextmanager
def read_writes(
    model: LanguageModel, points: Iterable[tuple[int, Point]], consume: Callable[[int, Point, Tensor], None]
) -> Iterator[None]:
    """Pass what modules write to ``consume`` while the decoder runs, without changing it.

    Args:
        model: the model to hook.
        points: which layers, from 1, and where in them.
        consume: called with layer, point and the module's own tensor: [B, T, width], or [B * T, width] as in some
            mixtures of experts.
    """

    def keep_output(layer: int, point: Point) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            write = first_tensor(output)
            consume(layer, point, write - received(args, kwargs).to(write.device) if point == "layer" else write)

        return hook

    def keep_input(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            consume(layer, "heads", first_tensor(args or tuple(kwargs.values())))

        return hook

    with ExitStack() as hooks:
        for layer, point in points:
            if point == "heads":
                projection = operator.attrgetter(projection_path(model, layer))(model.model)
                handle = projection.register_forward_pre_hook(keep_input(layer), with_kwargs=True)
            else:
                module = model.layers[layer - 1] if point == "layer" else writer(model, layer, point)
                handle = module.register_forward_hook(keep_output(layer, point), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def writer(model: LanguageModel, layer: int, site: str) -> nn.Module:
    """The module of a layer, from 1, whose output is A^l or F^l, but for the family's factor."""
    paths = model.family.capture_paths()
    path = paths.attention_write if site == "attn" else paths.ffn_write
    module: nn.Module = operator.attrgetter(path)(model.layers[layer - 1])
    return module


def received(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states that a decoder layer receives."""
    return first_tensor(args) if args else kwargs["hidden_states"]


def with_first(output: Any, changed: Tensor) -> Any:
    """What a module returned, with other states."""
    return changed if isinstance(output, Tensor) else (changed, *output[1:])
