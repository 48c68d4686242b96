"""How a model's entropy falls over its layers, as numbers: how far, how deep in, and how much of it at the very top.

The paper reads two shapes off the curve of H_Layer (arXiv 2512.19673v3, section 3.2): Qwen falls progressively, Llama
stays high and falls abruptly within the last three layers. The curve is H^1..H^L, in nats: the entropies of the layer
policies (eq. 5). H^0, of the embedding, is left out because it is no layer's policy and tells of the embedding alone:
where that shares its weights with the unembedding it is near zero, since each token is all but certain of itself, and
near ln V where it is small and has weights of its own. The first layer would seem to rise or to fall far.

1. The total drop is max(H) - H^L, from the peak and not from the start: a model may explore before it converges.
2. The fallen share at layer l is (max(H) - H^l) / drop, and 0 before the peak. It ends at 1; it is above 1 where the
   entropy goes below its last value and comes back.
3. The half-drop depth is where the fallen share passes 1/2 for good, by linear interpolation, as a share of L. A layer
   that dips and recovers has not converged.
4. The last three layers' share is 1 less the fallen share at L - 3; below 0 where the entropy rises at the end.
5. Reading. From H^1 to H^L there are L - 1 steps, and an even fall puts e = 3 / (L - 1) into any three of them, so a
   share s is measured by its excess (s - e) / (1 - e): 0 for an even fall, 1 where three layers do it all, whatever L.
   The fall is abrupt where the excess of the last three is at least 1/2. It is progressive where that is at most 1/4,
   no three layers in a row anywhere have 1/2, and no layer by itself takes half of the drop. Else it is mixed: a cliff
   below the top, or a fall over some six to nine layers. Where the fall lies, the half-drop depth says; a late but
   gradual one is progressive.
6. There is no reading where the drop is below 1/20 of the peak or three of its own standard errors, since noise has a
   maximum too, or where the model has four layers or fewer: all of their steps are "the last three".

The intervals are over prompts drawn again, by `fall.possible_falls`: plain percentiles will not do, because the maximum
over a long plateau whose layers' errors are independent is some two standard errors too high and the resamples are so
once more; of 12 prompts on an abrupt curve they hold the drop in 0.22 of the draws. Simulated with errors that are
normal, skewed or correlated between layers at 12 and 40 prompts, and normal at 6, these hold the drop, the depth and
the share of progressive and abrupt curves in 0.92 to 1.00 of 300 draws: on a plateau they are longer than they need be.
The measures themselves are not corrected: there the drop is too large by as much. The readings do not hang on so
little. Of fewer than six prompts nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy.comparison.fall import (
    LAST,
    at_depth,
    entropy_curves,
    fallen_shares,
    half_depth,
    interval,
    last_share,
    peak_of,
    possible_falls,
)
from internal_policy.statistics import Floats, bootstrap_means, clustered_mean

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

Reading = Literal["progressive", "abrupt", "mixed", "none"]

_ABRUPT, _PROGRESSIVE = 0.5, 0.25
_MIN_SHARE_OF_PEAK, _MIN_STDERRS = 0.05, 3.0
_TENTHS = np.linspace(0.0, 1.0, 11)


@dataclass(frozen=True)
class Convergence:
    """How one model's H_Layer falls. Depths are shares of L; intervals are 95% and hold the measure."""

    name: str
    """The model's name."""
    n_layers: int
    """L."""
    peak_layer: int
    """The layer with the highest entropy, from 1; the last of several."""
    total_drop: float
    """max(H) - H^L, nats."""
    total_drop_interval: tuple[float, float]
    """Its ends."""
    half_drop_depth: float
    """Depth l / L from which on more than half has fallen, in [1 / L, 1]; NaN where nothing falls."""
    half_drop_interval: tuple[float, float]
    """Its ends."""
    last_three_share: float
    """Share of the drop in the last three layers; NaN where nothing falls."""
    last_three_interval: tuple[float, float]
    """Its ends."""
    reading: Reading
    """progressive, abrupt, mixed, or none, by the rule in this module's docstring."""
    reading_share: float
    """Share of the resamples with the same reading; NaN with fewer than two prompts."""
    reason: str
    """One sentence that says why."""
    curve: pd.DataFrame
    """One row per layer 1..L: layer, relative_depth, entropy (nats), fallen, low, high (fallen share so far)."""
    shares: pd.DataFrame
    """One row per tenth of the depth: relative_depth (its end), share (of the drop), fallen, low, high (of share)."""

    def __repr__(self) -> str:
        return (
            f"Convergence({self.name!r}: {self.reading}, drop {self.total_drop:.2f} nats, half of it at depth "
            f"{self.half_drop_depth:.2f}, {self.last_three_share:.0%} in the last three of {self.n_layers} layers)"
        )


def measure_convergence(analysis: Analysis, *, resamples: int = 1000, seed: int = 0) -> Convergence:
    """Measure how the entropy of the layers falls, by the rule in this module's docstring.

    Args:
        analysis: the analysis.
        resamples: how often the prompts are drawn again for the intervals.
        seed: of that draw.

    Returns:
        The measures; with fewer than two prompts the intervals are NaN.

    Raises:
        UserError: the responses lack a layer, or `resamples` is below 1.
    """
    values, tokens, prompts = entropy_curves(analysis.responses)
    values = values[:, 1:]
    mean = clustered_mean(values, tokens, prompts)[0][None]
    layers, n_prompts, peak = np.arange(1, mean.size + 1), len(np.unique(prompts)), int(peak_of(mean)[0])
    fallen, drop = fallen_shares(mean)
    _, stderr = clustered_mean(values[:, [peak]] - values[:, -1:], tokens, prompts)
    reading, falls, reason = _read(mean[0], fallen[0], peak, float(stderr[0]))
    if not falls:
        fallen = np.full_like(fallen, np.nan)
    half, last, tenths = half_depth(fallen), last_share(fallen), np.diff(at_depth(fallen, _TENTHS), axis=1)
    # Without a second prompt every resample would be the same, and look certain.
    possible, same = [], np.nan
    if n_prompts > 1:
        drawn = bootstrap_means(values, tokens, prompts, resamples=resamples, seed=seed)
        possible = possible_falls(mean[0], drawn, n_prompts)
        if reading != "none":
            same = float(np.mean(_shapes(fallen_shares(drawn)[0]) == reading))
    again = [shares for shares, _ in possible]
    return Convergence(
        name=analysis.name,
        n_layers=mean.size,
        peak_layer=peak + 1,
        total_drop=float(drop[0]),
        total_drop_interval=_pair(drop, [np.maximum(drops, 0.0) for _, drops in possible]),
        half_drop_depth=float(half[0]),
        half_drop_interval=_pair(half, [half_depth(shares) for shares in again]),
        last_three_share=float(last[0]),
        last_three_interval=_pair(last, [last_share(shares) for shares in again]),
        reading=reading,
        reading_share=same,
        reason=reason,
        curve=_frame(
            interval(fallen[0], again),
            layer=layers,
            relative_depth=layers / mean.size,
            entropy=mean[0],
            fallen=fallen[0],
        ),
        shares=_frame(
            interval(tenths[0], [np.diff(at_depth(shares, _TENTHS), axis=1) for shares in again]),
            relative_depth=_TENTHS[1:],
            share=tenths[0],
            fallen=tenths[0].cumsum(),
        ),
    )


def convergence_table(
    analyses: Sequence[Analysis | Convergence],
    *,
    labels: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Lay out how the entropy falls in several models.

    Args:
        analyses: the analyses, or what was measured of them.
        labels: what to call them; their names where not given.
        resamples: as for `measure_convergence`.
        seed: as for `measure_convergence`.

    Returns:
        A row for each: label, n_layers, peak_layer, total_drop (nats), half_drop_depth, last_three_share, each of these
        three followed by its `_low` and `_high`, even_share (what the last three layers have in an even fall, three of
        L - 1 steps), reading, reading_share, reason.
    """
    measured = [
        a if isinstance(a, Convergence) else measure_convergence(a, resamples=resamples, seed=seed) for a in analyses
    ]
    rows = []
    for m in measured:
        row: dict[str, object] = {"n_layers": m.n_layers, "peak_layer": m.peak_layer}
        for name, value, ends in (
            ("total_drop", m.total_drop, m.total_drop_interval),
            ("half_drop_depth", m.half_drop_depth, m.half_drop_interval),
            ("last_three_share", m.last_three_share, m.last_three_interval),
        ):
            row |= {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}
        row["even_share"] = _even_share(m.n_layers)
        rows.append(row | {"reading": m.reading, "reading_share": m.reading_share, "reason": m.reason})
    table = pd.DataFrame(rows)
    table.insert(0, "label", [m.name for m in measured] if labels is None else list(labels))
    return table


def _frame(ends: Floats, **columns: npt.NDArray[np.generic]) -> pd.DataFrame:
    return pd.DataFrame({**columns, "low": ends[0], "high": ends[1]})


def _pair(estimate: Floats, draws: list[Floats]) -> tuple[float, float]:
    low, high = interval(estimate, [values[:, None] for values in draws])[:, 0]
    return float(low), float(high)


def _even_share(n_layers: int) -> float:
    """What an even fall puts into three of its L - 1 steps."""
    return min(1.0, LAST / max(n_layers - 1, 1))


def _excess(share: Floats, n_layers: int) -> Floats:
    """How far a share of three layers lies between that of an even fall (0) and all (1)."""
    even = _even_share(n_layers)
    return (share - even) / (1 - even)


def _shapes(fallen: Floats) -> npt.NDArray[np.str_]:
    """The reading of each row, [B]."""
    n_layers = fallen.shape[1]
    last = _excess(last_share(fallen), n_layers)
    cliff = _excess((fallen[:, LAST:] - fallen[:, :-LAST]).max(axis=1), n_layers) >= _ABRUPT
    cliff |= np.diff(fallen, axis=1).max(axis=1) >= _ABRUPT
    gradual = np.where((last <= _PROGRESSIVE) & ~cliff, "progressive", "mixed")
    return np.where(np.isnan(last), "none", np.where(last >= _ABRUPT, "abrupt", gradual))


def _read(mean: Floats, fallen: Floats, peak: int, stderr: float) -> tuple[Reading, bool, str]:
    """The reading, whether there is a fall to be measured, and why."""
    n_layers, top, drop = len(fallen), float(mean[peak]), float(mean[peak] - mean[-1])
    if drop <= _MIN_SHARE_OF_PEAK * top or np.isnan(fallen).any():
        why = f"the entropy ends {drop:.3g} nats below its peak of {top:.3g} (layer {peak + 1}): it does not fall"
        return "none", False, why
    if drop < _MIN_STDERRS * stderr:
        why = f"the drop of {drop:.3g} nats is within the noise (standard error {stderr:.2g}): more prompts"
        return "none", False, why
    if n_layers <= LAST + 1:
        return "none", True, f"{n_layers} layers are too few: all steps between them are among the last three"
    reading = cast(Reading, str(_shapes(fallen[None])[0]))
    last, half = last_share(fallen[None])[0], half_depth(fallen[None])[0]
    reason = (
        f"the last three of {n_layers} layers take {last:.0%} of the drop of {drop:.3g} nats, where an even fall has "
        f"{_even_share(n_layers):.0%}; half has fallen at depth {half:.2f}"
    )
    if reading == "mixed":
        alone, three = np.diff(fallen), fallen[LAST:] - fallen[:-LAST]
        first = int(np.argmax(three)) + 2
        if alone.max() >= _ABRUPT:
            reason += f"; layer {int(np.argmax(alone)) + 2} alone takes {alone.max():.0%}"
        elif _excess(three, n_layers).max() >= _ABRUPT:
            reason += f"; layers {first}-{first + LAST - 1} take {three.max():.0%}"
    return reading, True, reason
