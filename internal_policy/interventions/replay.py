"""One clean run of a batch, from which runs with changes restart at any layer.

The layers below a change compute the same states with it and without it. The clean run keeps what each layer receives,
with all its arguments: masks, position embeddings, whatever the family passes. A run that restarts at layer l calls the
layers l..L with these, so that an intervention there costs L - l + 1 layer passes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.extractors.hooks import first_tensor
from internal_policy.extractors.verify import tolerance
from internal_policy.interventions.changes import received
from internal_policy.models import LanguageModel, without_autocast
from internal_policy.utils.errors import UserError

_SEQUENCES, _LENGTH = 2, 12


class CleanRun:
    """The states of a batch without changes.

    Args:
        model: the model, which runs once.
        input_ids: [B, T] ids.
        attention_mask: [B, T] 1 for tokens, 0 for padding on either side.
        restarts: the layers, from 1, at which runs will restart.
    """

    def __init__(
        self, model: LanguageModel, input_ids: Tensor, attention_mask: Tensor, restarts: Collection[int]
    ) -> None:
        self._model = model
        self._arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.inputs: dict[int, Tensor] = {}
        """H^{l-1} of each layer at which runs restart, [B, T, d]."""
        final: list[Tensor] = []
        lowest = min(restarts, default=model.n_layers + 1)

        def keep(layer: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if layer in restarts:
                    self.inputs[layer] = received(args, kwargs)
                if layer >= lowest:
                    rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                    self._arguments[layer] = args[1:], rest

            return hook

        def keep_final(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            final.append(first_tensor(output))

        handles = [
            layer.register_forward_pre_hook(keep(number), with_kwargs=True)
            for number, layer in enumerate(model.layers, start=1)
        ]
        handles.append(model.layers[-1].register_forward_hook(keep_final))
        try:
            model.backbone(**model.forward_arguments(input_ids, attention_mask))
        finally:
            for handle in handles:
                handle.remove()
        (self.final,) = final
        """H^L, [B, T, d]."""

    def restart(self, layer: int, states: Tensor | None = None) -> Tensor:
        """Run the layers from one on, with whatever hooks are on them.

        Args:
            layer: the first layer that runs, from 1; L + 1 runs none.
            states: [B, T, d] what it receives; by default what it received in the clean run.

        Returns:
            H^L [B, T, d].
        """
        hidden = self.inputs[layer] if states is None else states
        for number in range(layer, self._model.n_layers + 1):
            hidden = self.step(number, hidden)
        return hidden

    def step(self, layer: int, states: Tensor) -> Tensor:
        """Run one layer, from 1, on states [B, T, d] with the arguments of the clean run."""
        args, kwargs = self._arguments[layer]
        return first_tensor(self._model.layers[layer - 1](states, *args, **kwargs))


@without_autocast()
@torch.no_grad()
def prove_restarts(model: LanguageModel, seed: int = 0) -> None:
    """Prove on random tokens that the layers can be run again from any of them.

    Args:
        model: the model.
        seed: seed of the random tokens.

    Raises:
        UserError: a restart gives other states than the run before, as where layers share more than the stream.
    """
    ids = torch.randint(0, model.vocab_size, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(seed))
    layers = range(1, model.n_layers + 1)
    run = CleanRun(model, ids, torch.ones_like(ids), layers)
    for layer in layers:
        # A copy, so that a layer that writes into its input is found out.
        out = run.step(layer, run.inputs[layer].clone())
        wanted = run.final if layer == model.n_layers else run.inputs[layer + 1]
        error = float((out.double() - wanted.to(out.device).double()).norm() / wanted.double().norm().to(out.device))
        if not error <= tolerance(model.dtype):
            raise UserError(
                f"{model.name}: layer {layer} gives other states when it runs again on the same ones (relative "
                f"difference {error:.1e}); interventions need layers that depend on nothing else"
            )
