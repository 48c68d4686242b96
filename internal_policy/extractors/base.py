"""The protocol that every backend follows, and the residual states that it passes to a reduction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from internal_policy.models import LanguageModel, Projection


@dataclass(frozen=True)
class LayerStates:
    """The residual states of one layer at the analysed positions; every tensor is [n, d]."""

    layer: int
    """l, counted from 1."""
    residual_in: Tensor
    """H^{l-1}: what the layer receives."""
    attention_in: Tensor
    """LN_in(H(2l-2)): what the attention module receives."""
    attention_write: Tensor
    """A^l: what the attention adds to the stream."""
    ffn_in: Tensor
    """What the FFN receives: LN_mid(H(2l-1)), or in a parallel block its norm of H^{l-1}."""
    ffn_write: Tensor
    """F^l: what the FFN adds to the stream."""
    residual_out: Tensor
    """H^l."""

    def split(self, size: int) -> Iterator[LayerStates]:
        """Split the positions into portions.

        Args:
            size: positions in a portion; the last portion may have fewer.

        Yields:
            The portions in order, as views.
        """
        # No function of the dataclasses module: servers build this method from its source.
        tensors = {name: value.split(size) for name, value in vars(self).items() if name != "layer"}
        for parts in zip(*tensors.values(), strict=True):
            yield type(self)(layer=self.layer, **dict(zip(tensors, parts, strict=True)))


@dataclass(frozen=True)
class Batch:
    """Token ids of several sequences, padded to one length."""

    input_ids: Tensor
    """[B, T] ids."""
    attention_mask: Tensor
    """[B, T] 1 for tokens, 0 for padding."""
    positions: Tensor
    """[n] flat indices into B * T of the analysed states."""


LayerReduction: TypeAlias = Callable[[Sequence[LayerStates], Projection], Tensor]
"""Reduces the states of consecutive layers where they are; a function of the states and the projection only."""

LogitReduction: TypeAlias = Callable[[Tensor, Tensor, Projection], Tensor]
"""Reduces the model's own logits [n, V] and H^L [n, d]."""


class LayerGroups:
    """Collects the states of consecutive layers, and reduces and frees them in groups of ``at_once`` layers.

    The group that layer L completes may be smaller.
    """

    def __init__(self, reduce: LayerReduction, projection: Projection, n_layers: int, at_once: int) -> None:
        self.reduced: list[Tensor] = []
        """The result for each group so far."""
        self._reduce, self._projection = reduce, projection
        self._n_layers, self._at_once = n_layers, at_once
        self._held: list[LayerStates] = []

    def append(self, states: LayerStates) -> None:
        """Add the states of the next layer, and reduce the group if it is complete."""
        if self._held:
            # The input of a layer is the output of the layer below: one copy is enough.
            below = self._held[-1].residual_out
            states = replace(states, residual_in=below.to(states.residual_out.device))
        self._held.append(states)
        if len(self._held) == self._at_once or states.layer == self._n_layers:
            group, self._held = self._held, []
            self.reduced.append(self._reduce(group, self._projection))


class Extractor(Protocol):
    """A backend: it runs the model on a batch and reduces each layer's states as the forward pass computes them.

    States never leave the device or the machine where they are computed; only what a reduction returns does.
    """

    model: LanguageModel

    @property
    def wrapper(self) -> Any:
        """The library's own object around the model, in which code may be attached too; None if there is none."""
        ...

    def run(self, batch: Batch, reduce: LayerReduction, at_once: int = 1) -> list[Tensor]:
        """Run the decoder once, without the unembedding.

        Args:
            batch: the sequences, and the positions whose states are analysed.
            reduce: called for layers 1..L in order, in groups; the states are freed when it returns.
            at_once: layers in a group; the last group may have fewer.

        Returns:
            What ``reduce`` returned for each group, in order.
        """
        ...

    def logits(self, batch: Batch, reduce: LogitReduction) -> Tensor:
        """Run the whole model once, for a few positions only.

        Args:
            batch: the sequences, and the positions whose logits are analysed.
            reduce: called with the model's own logits and H^L.

        Returns:
            What ``reduce`` returned.
        """
        ...
