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

from internal_policy.capture.states import Batch, LayerStates
from internal_policy.models import LanguageModel


@contextmanager
def residual_hooks(model: LanguageModel, positions: Tensor, consume: Callable[[LayerStates], None]) -> Iterator[None]:
    """Hand each layer's states to ``consume`` while the decoder runs; the hooks are gone on any exit.

    Args:
        model: the model to hook.
        positions: [n] flat indices into B * T of the wanted states.
        consume: called once a layer, in order, with [n, d] tensors.
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
    attention: nn.Module = operator.attrgetter(family.attention)(module)
    ffn: nn.Module = operator.attrgetter(family.ffn)(module)
    attention_write: nn.Module = operator.attrgetter(family.attention_write or family.attention)(module)
    ffn_write: nn.Module = operator.attrgetter(family.ffn_write or family.ffn)(module)
    held: dict[str, Tensor] = {}

    def pick(states: Tensor) -> Tensor:
        return states.reshape(-1, states.shape[-1]).index_select(0, positions.to(states.device))

    def keep_input(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[name] = pick(_first_tensor(args) if args else kwargs["hidden_states"])

        return hook

    def keep_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            held[name] = pick(_first_tensor(output))

        return hook

    def hand_over(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states = LayerStates(layer=layer, residual_out=pick(_first_tensor(output)), **held)
        held.clear()
        consume(states)

    return [
        module.register_forward_pre_hook(keep_input("residual_in"), with_kwargs=True),
        attention.register_forward_pre_hook(keep_input("attention_in"), with_kwargs=True),
        attention_write.register_forward_hook(keep_output("attention_write")),
        ffn.register_forward_pre_hook(keep_input("ffn_in"), with_kwargs=True),
        ffn_write.register_forward_hook(keep_output("ffn_write")),
        module.register_forward_hook(hand_over),
    ]


def _first_tensor(value: Any) -> Tensor:
    """Attention modules return tuples, MLPs and most layers a tensor."""
    tensor: Tensor = value if isinstance(value, Tensor) else value[0]
    return tensor


class HookExtractor:
    """The hook backend behind the protocol of ``capture.states.Extractor``."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @torch.no_grad()
    def run(self, batch: Batch, consume: Callable[[LayerStates], None]) -> None:
        """Run the decoder once, without the unembedding; see ``Extractor.run``.

        Positions are counted over real tokens, so that padding on either side changes nothing.
        """
        device = self.model.device
        mask = batch.attention_mask.to(device)
        position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with residual_hooks(self.model, batch.positions, consume):
            self.model.backbone(
                input_ids=batch.input_ids.to(device), attention_mask=mask, position_ids=position_ids, use_cache=False
            )
