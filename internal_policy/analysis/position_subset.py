"""Which positions are analysed under --tolerance, and how uncertain the means over them are.

A position is the state that predicts one response token. What a layer does there depends most on the tokens around it,
and these are known before anything is analysed. So all positions of all responses are sorted by the token that is
predicted, then by the one that is read, then by the two before it, and cut into blocks of about equal size, if
possible between different tokens. Within a block every position is equally likely, and each block contributes its
share: a stratified random sample without replacement (Cochran, Sampling Techniques, sections 5.3 and 5.6). Each block
contributes two or more in the first round, from which its variance is known without bias.

What is estimated is the mean over all M response tokens of the same responses. With N_h positions in block h, of which
n_h were analysed, the estimate is sum_h N_h m_h / M, unbiased, and its variance is
sum_h (N_h / M)^2 (1 / n_h - 1 / N_h) s_h^2 with the variance s_h^2 within the block (Cochran, eqs. 5.1 and 5.13). That
tokens of one response are similar does not matter here: positions are drawn without regard to their response, and the
responses are given. The standard errors of an analysis, clustered by prompt, say how much other responses
would change the mean.

The estimate is unbiased for each n. But the n at which an analysis stops depends on the variance that it found, which
for skewed values goes with the mean that it found; `_quantile` and the least numbers of positions keep that bias small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from internal_policy.data.responses import Response
from internal_policy.statistics import Floats, Ints

Flags: TypeAlias = npt.NDArray[np.bool_]

_PER_BLOCK = 32
_MAX_BLOCKS = 512
_MIN_BLOCKS = 40
_MIN_PER_BLOCK = 4
_MIN_PILOT = 400
_MAX_PILOT_SHARE = 1 / 4
_SHORTEST_BLOCK, _LONGEST_BLOCK = 0.7, 1.4
_TOKENS_BEFORE = 3
_SEED_STREAM = 5
_CONFIDENCE = 0.95
_SHORTFALL = 0.2
"""Chance that the first round finds so little variance that the second, sized by it, is too small."""
_ENOUGH_WITHOUT_VARIANCE = 1024
"""A value without variance over so many positions counts as constant; one sample in 20 misses three in a thousand."""
_WIDE = 0.1
"""If the correction for skewness, which is of first order, widens an interval by more, it rests on a few values."""
_ROUNDING = 1e-9
"""A smaller half-width is the rounding error of a sum of equal values."""


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
        """How many of the first n positions are in each block, [H]."""
        return np.bincount(self.block[self.order[:n]], minlength=int(self.block.max()) + 1).astype(np.int64)


def design_positions(responses: Sequence[Response], seed: int) -> Design:
    """Lay out the positions of some responses, given in order.

    The same seed and responses give the same random order on every machine.
    """
    lengths = [r.n_tokens for r in responses]
    response = np.repeat(np.arange(len(responses)), lengths)
    token = np.concatenate([np.arange(n) for n in lengths])
    total = len(token)
    n_blocks = min(max(total // _PER_BLOCK, min(_MIN_BLOCKS, total // _MIN_PER_BLOCK), 1), _MAX_BLOCKS)
    block = _blocks(_context_tokens(responses, response, token), n_blocks)
    generator = np.random.default_rng(np.random.SeedSequence((seed, _SEED_STREAM)))
    sizes = np.bincount(block)
    shuffled = np.lexsort((generator.random(total), block))
    rank = np.empty(total)
    rank[shuffled] = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # With a random start in each block, the first n positions take the same share of all blocks, rounded at random.
    share = (rank + generator.random(len(sizes))[block]) / sizes[block]
    order = np.lexsort((share, rank >= 2))
    pilot = max(int(np.minimum(sizes, 2).sum()), min(_MIN_PILOT, int(_MAX_PILOT_SHARE * total)))
    return Design(response, token, block.astype(np.int64), order, pilot)


def _context_tokens(responses: Sequence[Response], response: Ints, token: Ints) -> list[Ints]:
    """Ids of the token that each position predicts, of the one it reads, and of those before; -1 before the first."""
    padding = [-1] * _TOKENS_BEFORE
    ids = np.fromiter(chain.from_iterable((*padding, *r.input_ids) for r in responses), dtype=np.int64)
    ends = np.cumsum([_TOKENS_BEFORE + len(r.input_ids) for r in responses])
    first = ends - [r.n_tokens for r in responses]
    places = first[response] + token
    return [ids[places - back] for back in range(1 + _TOKENS_BEFORE)]


def _blocks(keys: Sequence[Ints], n_blocks: int) -> Ints:
    """Cut the sorted positions into about `n_blocks` blocks, where the most significant key nearby changes."""
    total = len(keys[0])
    order = np.lexsort(keys[::-1])
    change = np.full(total, len(keys))
    for depth in reversed(range(len(keys))):
        change[1:][np.diff(keys[depth][order]) != 0] = depth
    wanted = total / n_blocks
    shortest = max(int(np.ceil(_SHORTEST_BLOCK * wanted)), 2)
    starts = np.zeros(total, dtype=np.int64)
    start = 0
    while (last := min(start + int(_LONGEST_BLOCK * wanted), total - shortest)) >= start + shortest:
        places = np.arange(start + shortest, last + 1)
        start = int(places[np.lexsort((np.abs(places - start - wanted), change[places]))[0]])
        starts[start] = 1
    blocks = np.empty(total, dtype=np.int64)
    blocks[order] = np.cumsum(starts)
    return blocks


@dataclass(frozen=True, eq=False)
class Estimate:
    """Means over all positions, estimated from the first n of a design."""

    n: int
    """Number of analysed positions."""
    mean: Floats
    """[K]."""
    half_width: Floats
    """Half of the 95% interval for what all positions would give, [K]; 0 if all were analysed."""
    spread: Floats
    """Variance within each block, [H, K]."""
    degrees: Floats
    """Degrees of freedom of each variance, [K]."""
    skewness: Floats
    """Skewness of the values over all blocks, squared, [K]."""

    def rests_on_few(self, total: int) -> Flags:
        """Find the half-widths that rest on a few of all positions, so that they miss more often than one time in 20.

        Returns:
            [K], true where skewness widens the interval by more than a tenth: in simulation such intervals hold 84
            to 93% of the time.
        """
        few: Flags = _widening(self.skewness, self.n, total) > _WIDE
        return few


def estimate(design: Design, values: Floats) -> Estimate:
    """Estimate means over all positions from `values` [n, K] of the first n, in the order of the design.

    The degrees of freedom are Satterthwaite's, V^2 / sum_h (g_h^2 / (n_h - 1)) with the blocks' shares g_h of the
    variance V, less what estimating V and g_h adds to their squares: an estimated g_h^2 is (n_h + 1) / (n_h - 1) times
    too large, and V^2 by V's own variance, so that they are V^2 / sum_h (g_h^2 / (n_h + 1)) - 2; in one block, n - 1.
    """
    n, total = len(values), len(design.order)
    sizes, taken = design.sizes[:, None], design.taken(n)[:, None]
    blocks = design.block[design.order[:n]]
    means = _sum_by_block(values, blocks, len(sizes)) / taken
    squares = _sum_by_block((values - means[blocks]) ** 2, blocks, len(sizes))
    spread = squares / np.maximum(taken - 1, 1)
    shares = _shares(design, n, spread)
    variance = shares.sum(axis=0)
    fourth = (shares**2 / (taken + 1)).sum(axis=0)
    degrees = np.divide(variance**2, fourth, out=np.full_like(variance, np.inf), where=fourth > 0) - 2
    mean = (sizes * means).sum(axis=0) / total
    weights = (sizes / total / taken)[blocks]
    second, third = ((weights * (values - mean) ** power).sum(axis=0) for power in (2, 3))
    skewness = np.divide(third**2, second**3, out=np.zeros_like(second), where=second**3 > 0)
    half_width = _quantile(degrees, skewness, n, total) * np.sqrt(variance)
    return Estimate(n, mean, half_width, spread, degrees, skewness)


def _shares(design: Design, n: int, spread: Floats) -> Floats:
    """Each block's share of the variance of an estimate from n positions, [H, K]."""
    sizes, taken = design.sizes[:, None], design.taken(n)[:, None]
    shares: Floats = (sizes / len(design.order)) ** 2 * (1 / taken - 1 / sizes) * spread
    return shares


def _quantile(degrees: Floats, skewness: Floats, n: int, total: int) -> Floats:
    """Student's quantile, wider for values that are skewed, [K].

    If large values are rare, a sample with too few of them has both too small a mean and too small a variance.
    Of n values of skewness g the quantile z of a studentised mean grows by g^2 (z^4 + 2 z^2 - 3) / (18 n) of itself
    (Hall, The Bootstrap and Edgeworth Expansion, section 2.6); the term of the kurtosis would take some of it back.
    """
    from scipy.stats import t as scipy_t

    at = (1 + _CONFIDENCE) / 2
    return np.asarray(scipy_t.ppf(at, degrees)) * (1 + _widening(skewness, n, total))


def _widening(skewness: Floats, n: int, total: int) -> Floats:
    """The relative growth of the quantile with the skewness, [K]."""
    from scipy.stats import norm

    z = norm.ppf((1 + _CONFIDENCE) / 2)
    wider: Floats = skewness * (z**4 + 2 * z**2 - 3) / 18 * (1 / n - 1 / total)
    return wider


def is_precise_enough(design: Design, found: Estimate, tolerance: float) -> bool:
    """Whether every half-width is within the tolerance, or there are no more positions.

    A value that did not vary at all needs more positions: what makes it vary may be rare.
    """
    known = (found.half_width <= tolerance) & ((found.half_width > _ROUNDING) | (found.n >= _ENOUGH_WITHOUT_VARIANCE))
    return bool(known.all()) or found.n == len(design.order)


def positions_needed(design: Design, found: Estimate, tolerance: float) -> int:
    """Find how many positions bring every half-width under a tolerance, given an estimate that is not precise enough.

    The number is such that a second round seldom falls short; it is twice the present one if a value never varied.
    """
    from scipy.stats import chi2

    total = len(design.order)
    finite = np.where(np.isfinite(found.degrees), found.degrees, 1e9)
    margin = finite / chi2.ppf(_SHORTFALL, finite)

    def enough(n: int) -> bool:
        variance = _shares(design, n, found.spread).sum(axis=0)
        reach = _quantile(finite, found.skewness, n, total) ** 2 * margin
        return bool((reach * variance <= tolerance**2).all())

    doubled = found.n < _ENOUGH_WITHOUT_VARIANCE and (found.half_width <= _ROUNDING).any()
    low, high = min(2 * found.n if doubled else found.n + 1, total), total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def response_means(design: Design, values: Floats) -> Floats:
    """Estimate the means [G, K] of the G responses, whose mean over tokens is the estimate over all positions.

    A position that was not analysed counts as the mean of its block; one that was adds its distance from that mean,
    times c_h (the difference estimator: Särndal, Swensson and Wretman, Model Assisted Survey Sampling, section 6.3).
    Over all responses these distances cancel, so the mean over tokens is that of `estimate`. Single responses are known
    roughly, those without an analysed position by their tokens alone, but no error is lost: with
    c_h^2 = (N_h^2 / n_h - 1) / (n_h - 1) the scatter of the responses is what it would be of all positions, plus the
    variance of the sample. A standard error clustered by response thus contains both. If all positions were analysed,
    c_h is 1 and the means are exact.

    Args:
        design: the positions.
        values: of its first n positions, in its order, [n, K].
    """
    from scipy.sparse import csr_array

    n, total = len(values), len(design.order)
    sizes, taken = design.sizes, design.taken(n)
    chosen = design.order[:n]
    blocks = design.block[chosen]
    means = _sum_by_block(values, blocks, len(sizes)) / taken[:, None]
    scale = np.sqrt((sizes**2 / taken - 1) / np.maximum(taken - 1, 1))
    lengths = np.bincount(design.response)
    shape = (len(lengths), len(sizes))
    counts = csr_array((np.ones(total), (design.response, design.block)), shape=shape)
    distances = (values - means[blocks]) * scale[blocks, None]
    sums: Floats = counts @ means + _sum_by_block(distances, design.response[chosen], len(lengths))
    return sums / lengths[:, None]


def _sum_by_block(values: Floats, blocks: Ints, n_blocks: int) -> Floats:
    """Sum the rows of values [n, K] by their block, [H, K]."""
    sums = np.zeros((n_blocks, values.shape[1]))
    np.add.at(sums, blocks, values)
    return sums
