"""What a backend hands over, and the one protocol that every backend follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

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
    """What the FFN receives: LN_mid(H(2l-1)); in a parallel block the norm of H^{l-1} that it is given."""
    ffn_write: Tensor
    """F^l: what the FFN adds to the stream."""
    residual_out: Tensor
    """H^l."""

    def split(self, size: int) -> Iterator[LayerStates]:
        """Cut into portions of positions.

        Args:
            size: positions in a portion, the last one apart.

        Yields:
            The portions, in order; views, not copies.
        """
        # Nothing of the dataclasses module: this travels to servers as source.
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


LayerReduction: TypeAlias = Callable[[LayerStates, Projection], Tensor]
"""What is made of one layer's states, where they are: a function of them and of the model's projection only."""

LogitReduction: TypeAlias = Callable[[Tensor, Tensor, Projection], Tensor]
"""What is made of the model's own logits [n, V] and of H^L [n, d]."""


class Extractor(Protocol):
    """A backend: it runs the model on a batch and reduces each layer's states as the forward pass makes them.

    States never leave the place where they are made: what travels, from a remote machine too, is what a reduction
    returns.
    """

    model: LanguageModel

    def run(self, batch: Batch, reduce: LayerReduction) -> list[Tensor]:
        """Run the decoder once, without the unembedding.

        Args:
            batch: what to run, and the positions whose states are wanted.
            reduce: called for layers 1..L in order; the states are freed when it returns.

        Returns:
            What ``reduce`` made of each layer, in order.
        """
        ...

    def logits(self, batch: Batch, reduce: LogitReduction) -> Tensor:
        """Run the whole model once, for a few positions only.

        Args:
            batch: what to run, and the positions whose logits are wanted.
            reduce: called with the model's own logits and H^L.

        Returns:
            What ``reduce`` made of them.
        """
        ...
