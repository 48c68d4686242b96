"""What a sample of positions says of all of them: means, how far they may be off, and how many positions it takes.

The aim is the figure that analysing every position of the same responses would give: the mean over all M response
tokens. With N_h positions in block h, of which n_h were analysed, the estimate is sum_h N_h m_h / M, unbiased, and its
variance is sum_h (N_h / M)^2 (1 / n_h - 1 / N_h) s_h^2 with the variance s_h^2 within the block (Cochran, Sampling
Techniques, eqs. 5.1 and 5.13). Positions are drawn without regard to which response they are of, so that tokens of a
response are alike makes the draw no less certain: the responses themselves are given here. How much other responses
would change the mean is another question, which the standard errors of an analysis answer, clustered by prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from internal_policy.positions import Design, by_block
from internal_policy.statistics import Floats

_LEVEL = 0.95
_LUCK = 0.2
"""Chance that the first round finds so little variance that the second, as large as that says, is too small."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Means over all positions, estimated from the first n of a design."""

    mean: Floats
    """[K]."""
    half_width: Floats
    """Half of the 95% interval for what all positions would give, [K]; 0 where all were analysed."""
    spread: Floats
    """Variance within each block, [H, K]."""
    degrees: Floats
    """Degrees of freedom of each variance, [K]."""


def estimate(design: Design, values: Floats) -> Estimate:
    """Estimate means over all positions.

    The degrees of freedom are Satterthwaite's, from the blocks' variances: (sum_h g_h)^2 / sum_h (g_h^2 / (n_h - 1)) of
    their shares g_h. An estimated s^2 squares to (n_h + 1) / (n_h - 1) times what it should, which is taken back.

    Args:
        design: the positions.
        values: of its first n positions, in its order, [n, K].

    Returns:
        The estimate.
    """
    from scipy.stats import t as scipy_t

    n = len(values)
    sizes, taken = design.sizes[:, None], design.taken(n)[:, None]
    blocks = design.block[design.order[:n]]
    means = by_block(values, blocks, len(sizes)) / taken
    squares = by_block((values - means[blocks]) ** 2, blocks, len(sizes))
    spread = squares / np.maximum(taken - 1, 1)
    total = len(design.order)
    shares = (sizes / total) ** 2 * (1 / taken - 1 / sizes) * spread
    variance = shares.sum(axis=0)
    fourth = (shares**2 / (taken + 1)).sum(axis=0)
    degrees = np.divide(variance**2, fourth, out=np.full_like(variance, np.inf), where=fourth > 0)
    half_width = np.asarray(scipy_t.ppf((1 + _LEVEL) / 2, degrees)) * np.sqrt(variance)
    return Estimate((sizes * means).sum(axis=0) / total, half_width, spread, degrees)


def positions_needed(design: Design, found: Estimate, tolerance: float) -> int:
    """Find how many positions bring every half-width under a tolerance.

    Args:
        design: the positions.
        found: what the positions so far say.
        tolerance: the largest half-width allowed, in the unit of the values.

    Returns:
        The number, so that a second round seldom falls short.
    """
    from scipy.stats import chi2
    from scipy.stats import t as scipy_t

    total = len(design.order)
    finite = np.where(np.isfinite(found.degrees), found.degrees, 1e9)
    luck = finite / chi2.ppf(_LUCK, finite)
    reach = np.asarray(scipy_t.ppf((1 + _LEVEL) / 2, finite)) ** 2 * luck
    sizes = design.sizes[:, None]

    def enough(n: int) -> bool:
        taken = design.taken(n)[:, None]
        variance = ((sizes / total) ** 2 * (1 / taken - 1 / sizes) * found.spread).sum(axis=0)
        return bool((reach * variance <= tolerance**2).all())

    low, high = design.pilot, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low


def response_means(design: Design, values: Floats) -> Floats:
    """Estimate the mean of every response, so that what is made of them is the estimate over all positions.

    A position that was not analysed counts as the mean of its block; one that was adds how far it is from there, times
    c_h (the difference estimator: Särndal, Swensson and Wretman, Model Assisted Survey Sampling, section 6.3). Over all
    responses these distances cancel, so the mean over tokens is `estimate`'s. A response is known roughly, one without
    an analysed position by its tokens alone, but errors are all there: with c_h^2 = (N_h^2 / n_h - 1) / (n_h - 1) the
    scatter of the responses is what it would be of all positions, plus the variance of the sample. A standard error
    clustered by response thus holds both. Where all positions were analysed, c_h is 1 and the means are exact.

    Args:
        design: the positions.
        values: of its first n positions, in its order, [n, K].

    Returns:
        [G, K] means of the G responses.
    """
    from scipy.sparse import csr_array

    n, total = len(values), len(design.order)
    sizes, taken = design.sizes, design.taken(n)
    chosen = design.order[:n]
    blocks = design.block[chosen]
    means = by_block(values, blocks, len(sizes)) / taken[:, None]
    scale = np.sqrt((sizes**2 / taken - 1) / np.maximum(taken - 1, 1))
    lengths = np.bincount(design.response)
    shape = (len(lengths), len(sizes))
    counts = csr_array((np.ones(total), (design.response, design.block)), shape=shape)
    distances = (values - means[blocks]) * scale[blocks, None]
    sums: Floats = counts @ means + by_block(distances, design.response[chosen], len(lengths))
    return sums / lengths[:, None]
