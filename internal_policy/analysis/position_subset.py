"""Which positions are analysed where not all are: a random order of them, any beginning of which is a fair sample.

A position is the state that predicts one response token. What a layer does there depends most on the tokens about it,
and these are known before anything is analysed. So all positions of all responses are sorted by the token that is
predicted, then by the one that is read, then by the two before it, and cut into blocks of about equal size, where
possible between different tokens. Within a block every position is equally likely, and each block gives its share: a
stratified random sample without replacement (Cochran, Sampling Techniques, sections 5.3 and 5.6). Each block gives two
or more in the first round, from which its variance is known without bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from internal_policy.data.responses import Response
from internal_policy.statistics import Floats, Ints

_PER_BLOCK = 32
_MOST_BLOCKS = 512
_FEW_BLOCKS = 40
_FEWEST_PER_BLOCK = 4
_FEWEST_FIRST = 400
_MOST_FIRST = 1 / 4
_SHORTEST, _LONGEST = 0.7, 1.4
_TOKENS_BEFORE = 3
_STREAM = 5


@dataclass(frozen=True, eq=False)
class Design:
    """The positions of some responses, M in all, in blocks and in the order in which they are analysed."""

    response: Ints
    """Response of each position, from 0, [M]; positions are numbered response by response."""
    token: Ints
    """Which token of the response each predicts, from 0, [M]."""
    block: Ints
    """Block of each position, from 0, [M]."""
    order: Ints
    """The positions in the order in which they are analysed, [M]."""
    pilot: int
    """How many the first round takes: two of every block, and 400 in all or, if that is fewer, a quarter of them."""

    @property
    def sizes(self) -> Ints:
        """Positions in each block, [H]."""
        return np.bincount(self.block).astype(np.int64)

    def taken(self, n: int) -> Ints:
        """Count what the first n positions take of each block.

        Args:
            n: how many positions.

        Returns:
            [H] counts.
        """
        return np.bincount(self.block[self.order[:n]], minlength=int(self.block.max()) + 1).astype(np.int64)


def design_positions(responses: Sequence[Response], seed: int) -> Design:
    """Lay out the positions of some responses.

    Args:
        responses: the responses, in order.
        seed: of the random order; the same seed and responses give the same order, whatever computes them.

    Returns:
        The design.
    """
    lengths = [r.n_tokens for r in responses]
    response = np.repeat(np.arange(len(responses)), lengths)
    token = np.concatenate([np.arange(n) for n in lengths])
    total = len(token)
    n_blocks = min(max(total // _PER_BLOCK, min(_FEW_BLOCKS, total // _FEWEST_PER_BLOCK), 1), _MOST_BLOCKS)
    block = _blocks(_tokens_about(responses, response, token), n_blocks)
    generator = np.random.default_rng(np.random.SeedSequence((seed, _STREAM)))
    sizes = np.bincount(block)
    shuffled = np.lexsort((generator.random(total), block))
    rank = np.empty(total)
    rank[shuffled] = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # With a start of its own in each block, every beginning takes the same share of all, rounded at random.
    share = (rank + generator.random(len(sizes))[block]) / sizes[block]
    order = np.lexsort((share, rank >= 2))
    pilot = max(int(np.minimum(sizes, 2).sum()), min(_FEWEST_FIRST, int(_MOST_FIRST * total)))
    return Design(response, token, block.astype(np.int64), order, pilot)


def _tokens_about(responses: Sequence[Response], response: Ints, token: Ints) -> list[Ints]:
    """Ids of the token that each position predicts, of the one it reads, and of those before; -1 before the first."""
    padding = [-1] * _TOKENS_BEFORE
    ids = np.fromiter(chain.from_iterable((*padding, *r.input_ids) for r in responses), dtype=np.int64)
    ends = np.cumsum([_TOKENS_BEFORE + len(r.input_ids) for r in responses])
    first = ends - [r.n_tokens for r in responses]
    places = first[response] + token
    return [ids[places - back] for back in range(1 + _TOKENS_BEFORE)]


def _blocks(keys: Sequence[Ints], n_blocks: int) -> Ints:
    """Cut the sorted positions into about so many blocks, where the most significant key changes if one does nearby."""
    total = len(keys[0])
    order = np.lexsort(keys[::-1])
    change = np.full(total, len(keys))
    for depth in reversed(range(len(keys))):
        change[1:][np.diff(keys[depth][order]) != 0] = depth
    wanted = total / n_blocks
    shortest = max(int(np.ceil(_SHORTEST * wanted)), 2)
    starts = np.zeros(total, dtype=np.int64)
    start = 0
    while (last := min(start + int(_LONGEST * wanted), total - shortest)) >= start + shortest:
        places = np.arange(start + shortest, last + 1)
        start = int(places[np.lexsort((np.abs(places - start - wanted), change[places]))[0]])
        starts[start] = 1
    blocks = np.empty(total, dtype=np.int64)
    blocks[order] = np.cumsum(starts)
    return blocks


def by_block(values: Floats, blocks: Ints, n_blocks: int) -> Floats:
    """Sum values block by block.

    Args:
        values: [n, K].
        blocks: block of each row, [n].
        n_blocks: how many blocks there are.

    Returns:
        [H, K] sums.
    """
    sums = np.zeros((n_blocks, values.shape[1]))
    np.add.at(sums, blocks, values)
    return sums
