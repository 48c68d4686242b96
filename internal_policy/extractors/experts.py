"""What each routed expert of a mixture writes to the residual stream, computed by the model's own module.

The module that holds the experts receives states, the chosen experts of each and their weights. Called once for each
place of the choice, with that place alone, it returns the weighted write of one expert for every state, whatever the
layout, quantisation or kernel of the experts. ``find_experts`` proves that these and the shared experts add up to F^l.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internal_policy.extractors.base import LayerStates
from internal_policy.extractors.hooks import first_tensor, pick, residual_hooks
from internal_policy.extractors.parts import portion, precise, rounding_error, shared_by_norm, sum_bound
from internal_policy.models import LanguageModel, without_autocast
from internal_policy.models.linear import LinearNorm
from internal_policy.utils.errors import UserError

_EXPERTS = "experts"
"""The name of the module of the routed experts inside the FFN, in every family of transformers."""
_SEQUENCES, _LENGTH = 2, 12


@dataclass(frozen=True)
class Routing:
    """What the experts of a layer received and returned at n positions."""

    states: Tensor
    """[n, d] what each chosen expert reads."""
    chosen: Tensor
    """[n, k] the experts, from 0, that the router chose."""
    weights: Tensor
    """[n, k] the router's weights of them."""
    output: Tensor
    """[n, d] the weighted sum of the experts' outputs."""
    ffn_output: Tensor
    """[n, d] what the whole FFN returned, with the shared experts."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of a model."""

    model: LanguageModel
    """The model."""
    layers: tuple[int, ...]
    """The layers that have routed experts, from 1."""
    n_experts: int
    """Routed experts of such a layer."""
    has_shared: bool
    """Whether the FFN writes something that no routed expert does: that of the shared experts, one more part."""
    norms: tuple[LinearNorm | None, ...]
    """For each layer of the model the norm after its FFN, if there is one."""

    @property
    def numbers(self) -> list[int]:
        """The number of each part: experts from 1, and 0 for the shared experts if there are any, which come last."""
        return [*range(1, self.n_experts + 1), *([0] if self.has_shared else [])]

    def writes(self, states: LayerStates, routing: Routing) -> Iterator[Tensor]:
        """Compute the writes of the experts that were chosen in a layer, a portion of the positions at a time.

        Args:
            states: the layer's states at n positions.
            routing: what its experts received there.

        Yields:
            [p, k (+ 1), d] writes in float32 or more, weighted by the router, in the order of its choice and then that
            of the shared experts; they add up to F^l.
        """
        write, k = states.ffn_write, routing.chosen.shape[1]
        size, dtype = portion(k + int(self.has_shared), write.shape[-1]), precise(write.dtype)
        tensors = (t.split(size) for t in (write, *vars(routing).values()))
        for part, *received in zip(*tensors, strict=True):
            here = Routing(*received)
            parts = _outputs(self.model, states.layer, here, dtype)
            if self.has_shared:
                shared = here.ffn_output.to(dtype) - here.output.to(dtype)
                parts = torch.cat([parts, shared[:, None]], dim=1)
            yield shared_by_norm(parts, part, self.norms[states.layer - 1], self.model.write_multiplier)


def _outputs(model: LanguageModel, layer: int, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The weighted outputs of the chosen experts of a layer, [n, k, d]."""
    # `forward` has the hooks that fetch offloaded weights, and none of those that capture.
    run, k = experts_of(model, layer).forward, routing.chosen.shape[1]
    places = [run(routing.states, routing.chosen[:, i : i + 1], routing.weights[:, i : i + 1]) for i in range(k)]
    return torch.stack([place.to(dtype) for place in places], dim=1)


def ffn_of(model: LanguageModel, layer: int) -> nn.Module:
    """The FFN of a layer, from 1."""
    module: nn.Module = operator.attrgetter(model.family.ffn)(model.layers[layer - 1])
    return module


def experts_of(model: LanguageModel, layer: int) -> Any:
    """The module of the routed experts of a layer, from 1; None if its FFN is dense."""
    return getattr(ffn_of(model, layer), _EXPERTS, None)


@contextmanager
def expert_hooks(model: LanguageModel, positions: Tensor, held: dict[int, Routing]) -> Iterator[None]:
    """Keep what the routed experts of each layer receive while the decoder runs; hooks are removed on any exit.

    Args:
        model: the model to hook.
        positions: [n] flat indices into B * T.
        held: gets the routing at the positions under the layer's number; whoever reads an entry removes it.

    Raises:
        UserError: experts receive something else than states, chosen experts and weights.
    """
    outputs: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            received = [*args, *kwargs.values()]
            if len(received) != 3 or not all(isinstance(value, Tensor) for value in (*received, output)):
                raise _refusal(model, f"those of layer {layer} do not receive states, chosen experts and weights")
            x, chosen, weights = received
            if chosen.shape != weights.shape or chosen.is_floating_point() or not weights.is_floating_point():
                raise _refusal(model, f"those of layer {layer} do not receive the chosen experts with their weights")
            chosen, weights = pick(chosen, positions), pick(weights, positions)
            outputs[layer] = pick(x, positions), chosen, weights, pick(output, positions)

        return hook

    def finish(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if layer not in outputs:
                raise _refusal(model, f"those of layer {layer} did not run as a module of their own")
            held[layer] = Routing(*outputs.pop(layer), pick(first_tensor(output), positions))

        return hook

    with ExitStack() as hooks:
        for layer in range(1, model.n_layers + 1):
            if (experts := experts_of(model, layer)) is not None:
                hooks.callback(experts.register_forward_hook(keep(layer), with_kwargs=True).remove)
                hooks.callback(ffn_of(model, layer).register_forward_hook(finish(layer)).remove)
        yield


@without_autocast()
@torch.no_grad()
def find_experts(model: LanguageModel, norms: tuple[LinearNorm | None, ...], seed: int = 0) -> Experts | None:
    """Find the routed experts of a model, and prove on random tokens that they are the parts of its FFN.

    In every layer with experts, the weighted writes of the chosen ones and that of the shared experts add up to F^l,
    element by element, within rounding. For the proof the write of the shared experts is computed by running the FFN
    with routed experts that write nothing.

    Args:
        model: the model.
        norms: for each layer the norm after its FFN, if there is one.
        seed: seed of the random tokens.

    Returns:
        The experts; None if the model is dense.

    Raises:
        UserError: why they cannot be measured, and in which layer.
    """
    layers = tuple(layer for layer in range(1, model.n_layers + 1) if experts_of(model, layer) is not None)
    if not layers:
        if getattr(model.config, "num_experts_per_tok", None):
            raise _refusal(model, f"no FFN of this mixture holds them in a module named {_EXPERTS}")
        return None
    numbers = {getattr(experts_of(model, layer), "num_experts", None) for layer in layers}
    n_experts = numbers.pop()
    if numbers or not isinstance(n_experts, int):
        raise _refusal(model, "its layers do not say that they all have the same number of them")
    ids = torch.randint(0, model.vocab_size, (_SEQUENCES, _LENGTH), generator=torch.Generator().manual_seed(seed))
    positions, held = torch.arange(ids.numel()), dict[int, Routing]()
    reached: list[tuple[LayerStates, Routing]] = []

    def collect(states: LayerStates) -> None:
        if states.layer in layers:
            if states.layer not in held:
                raise _refusal(model, f"those of layer {states.layer} did not run as a module of their own")
            reached.append((states, held.pop(states.layer)))

    with expert_hooks(model, positions, held), residual_hooks(model, positions, collect):
        model.backbone(**model.forward_arguments(ids, torch.ones_like(ids)))
    has_shared = False
    for states, routing in reached:
        layer, write = states.layer, states.ffn_write
        if int(routing.chosen.min()) < 0 or int(routing.chosen.max()) >= n_experts:
            raise _refusal(model, f"layer {layer} chooses experts beyond its {n_experts}")
        shared = _without_routed(model, states)
        has_shared = has_shared or bool(shared.any())
        parts = _outputs(model, layer, routing, precise(write.dtype))
        parts = torch.cat([parts, shared.to(parts)[:, None]], dim=1)
        parts = shared_by_norm(parts, write, norms[layer - 1], model.write_multiplier)
        error = float(rounding_error(parts, write, norms[layer - 1] is not None).max())
        bound = sum_bound(write.dtype)
        if not error <= bound:
            raise _refusal(
                model,
                f"in layer {layer} the writes of the chosen experts do not add up to that of the FFN: the sum differs "
                f"by {error:.3g} times what rounding explains (at most {bound:g})",
            )
    return Experts(model, layers, n_experts, has_shared, norms)


def _without_routed(model: LanguageModel, states: LayerStates) -> Tensor:
    """What the FFN returns if its routed experts write nothing, [n, d]."""

    def write_nothing(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    ffn, experts = ffn_of(model, states.layer), experts_of(model, states.layer)
    handle = experts.register_forward_hook(write_nothing)
    try:
        found = first_tensor(ffn.forward(states.ffn_in[None]))
    finally:
        handle.remove()
    return found.reshape(-1, found.shape[-1])


def _refusal(model: LanguageModel, why: str) -> UserError:
    return UserError(f"{model.name}: the experts cannot be measured: {why}")
