"""Capture with PyTorch hooks: the default backend.

Usage::

    with residual_hooks(model, positions, consume):
        model.backbone(input_ids=..., attention_mask=...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.extractors.base import Batch, LayerGroups, LayerReduction, LayerStates, LogitReduction
from internal_policy.models import LanguageModel, without_autocast


@contextmanager
def residual_hooks(model: LanguageModel, positions: Tensor, consume: Callable[[LayerStates], None]) -> Iterator[None]:
    """Pass each layer's states to ``consume`` while the decoder runs; the hooks are removed on any exit.

    Args:
        model: the model to hook.
        positions: [n] flat indices into B * T of the analysed states.
        consume: called once per layer, in order, with [n, d] tensors.
    """
    with ExitStack() as hooks:
        for layer, module in enumerate(model.layers, start=1):
            for handle in _hook_layer(model, layer, module, positions, consume):
                hooks.callback(handle.remove)
        yield


def _hook_layer(
    model: LanguageModel, layer: int, module: nn.Module, positions: Tensor, consume: Callable[[LayerStates], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    family = model.family
    attention, attention_write, ffn, ffn_write = (operator.attrgetter(path)(module) for path in family.capture_paths())
    multiplier = model.write_multiplier
    held: dict[str, Tensor] = {}

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[name] = pick(first_tensor(args) if args else kwargs["hidden_states"], positions)

        return hook

    def keep_write(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            write = pick(first_tensor(output), positions)
            held[name] = write if multiplier == 1.0 else write * multiplier

        return hook

    def pass_on(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        out = pick(first_tensor(output), positions)
        # The first layer on a device receives the stream from the previous device.
        here = {name: state.to(out.device) for name, state in held.items()}
        held.clear()
        consume(LayerStates(layer=layer, residual_out=out, **here))

    return [
        module.register_forward_pre_hook(keep_input("residual_in"), with_kwargs=True),
        attention.register_forward_pre_hook(keep_input("attention_in"), with_kwargs=True),
        attention_write.register_forward_hook(keep_write("attention_write")),
        ffn.register_forward_pre_hook(keep_input("ffn_in"), with_kwargs=True),
        ffn_write.register_forward_hook(keep_write("ffn_write")),
        module.register_forward_hook(pass_on),
    ]


def pick(states: Tensor, positions: Tensor) -> Tensor:
    """Select the [n, d] states at flat positions of a batch [B, T, d], or [B * T, d] as in some mixtures of experts."""
    return states.reshape(-1, states.shape[-1]).index_select(0, positions.to(states.device))


def first_tensor(value: Any) -> Tensor:
    """Take the states from what a module receives or returns: attention modules return tuples, MLPs a tensor."""
    tensor: Tensor = value if isinstance(value, Tensor) else value[0]
    return tensor


class HookExtractor:
    """The backend of PyTorch hooks; see ``Extractor``."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @property
    def wrapper(self) -> None:
        """None: the hooks are on the model itself."""
        return None

    @without_autocast()
    @torch.no_grad()
    def run(self, batch: Batch, reduce: LayerReduction, at_once: int = 1) -> list[Tensor]:
        """Run the decoder once, without the unembedding; see ``Extractor.run``.

        Positions are counted over real tokens, so that padding on either side does not change the result.
        """
        groups = LayerGroups(reduce, self.model.projection, self.model.n_layers, at_once)
        with residual_hooks(self.model, batch.positions, groups.append):
            self.model.backbone(**self.model.forward_arguments(batch.input_ids, batch.attention_mask))
        return groups.reduced

    @without_autocast()
    @torch.no_grad()
    def logits(self, batch: Batch, reduce: LogitReduction) -> Tensor:
        """Run the whole model once; see ``Extractor.logits``."""
        last: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last.append(pick(first_tensor(output), batch.positions))

        handle = self.model.layers[-1].register_forward_hook(keep)
        try:
            own = self.model.model(**self.model.forward_arguments(batch.input_ids, batch.attention_mask)).logits
        finally:
            handle.remove()
        return reduce(pick(own, batch.positions), last[0], self.model.projection)
