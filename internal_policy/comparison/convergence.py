"""How a model's entropy falls over its layers, in numbers: how far, at which depth, and how much of it at the very top.

The paper reads two shapes off the curve of H_Layer (arXiv 2512.19673v3, section 3.2): Qwen falls progressively, Llama
stays high and falls abruptly within the last three layers. The curve is H^1..H^L, in nats: the entropies of the layer
policies (eq. 5). H^0, of the embedding, is left out because it is no layer's policy and describes the embedding alone:
where that shares its weights with the unembedding it is near zero, since each token is all but certain of itself, and
near ln V where it is small and has weights of its own. The first layer would seem to rise or to fall far.

1. The total drop is max(H) - H^L, from the peak and not from the start: a model may explore before it converges.
2. The fallen share at layer l is (max(H) - H^l) / drop, and 0 before the peak. It ends at 1; it is above 1 where the
   entropy goes below its last value and comes back.
3. The half-drop depth is where the fallen share passes 1/2 for good, by linear interpolation, as a share of L. A layer
   that dips and recovers has not converged.
4. The last three layers' share is 1 less the fallen share at L - 3; it is below 0 where the entropy rises at the end.
5. Reading. From H^1 to H^L there are L - 1 steps, and an even fall puts e = 3 / (L - 1) into any three of them, so a
   share s is measured by its excess (s - e) / (1 - e): 0 for an even fall, 1 where three layers do it all, whatever L.
   The fall is abrupt if the excess of the last three is at least 1/2. It is progressive if that is at most 1/4, no
   three consecutive layers anywhere have 1/2, and no single layer takes half of the drop. Otherwise it is mixed: a
   cliff below the top, or a fall over some six to nine layers. The half-drop depth says where the fall lies; a late but
   gradual one is progressive.
6. There is no reading where the drop is below 1/20 of the peak or three of its own standard errors, since noise has a
   maximum too, or where the model has four layers or fewer: all of their steps are "the last three".

The intervals come from resampled prompts, by `_bootstrap_drops`. Plain percentiles are not valid here: the maximum over
a long plateau whose layers' errors are independent is some two standard errors too high, and the resamples are again.
With 12 prompts on an abrupt curve they cover the drop in 0.22 of the draws. Simulated with errors that are normal,
skewed or correlated between layers at 12 and 40 prompts, and normal at 6, the intervals used here cover the drop, the
depth and the share of progressive and abrupt curves in 0.92 to 1.00 of 300 draws: on a plateau they are longer than
necessary. The measures themselves are not corrected; there the drop is too large by as much. The readings do not depend
on so little. Nothing is claimed for fewer than six prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy.statistics import Floats, bootstrap_means, clustered_mean
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

Reading = Literal["progressive", "abrupt", "mixed", "none"]

_ABRUPT, _PROGRESSIVE = 0.5, 0.25
_MIN_SHARE_OF_PEAK, _MIN_STDERRS = 0.05, 3.0
_LAST = 3
"""How many layers "the last three" are."""
_NEAR_PEAK = 2.0
"""Standard errors below the peak within which another layer may be the true peak."""
_PERCENTILES = (2.5, 97.5)
_TENTHS = np.linspace(0.0, 1.0, 11)


@dataclass(frozen=True)
class Convergence:
    """How one model's H_Layer falls. Depths are shares of L; intervals are 95% and contain the measure."""

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
        resamples: number of bootstrap resamples of the prompts behind the intervals.
        seed: of the bootstrap.

    Returns:
        The measures; with fewer than two prompts the intervals are NaN.

    Raises:
        UserError: the responses lack a layer, or `resamples` is below 1.
    """
    values, tokens, prompts = entropy_curves(analysis.responses)
    values = values[:, 1:]
    mean = clustered_mean(values, tokens, prompts)[0][None]
    layers, n_prompts, peak = np.arange(1, mean.size + 1), len(np.unique(prompts)), int(_peak(mean)[0])
    fallen, drop = _fallen_shares(mean)
    _, stderr = clustered_mean(values[:, [peak]] - values[:, -1:], tokens, prompts)
    reading, falls, reason = _read(mean[0], fallen[0], peak, float(stderr[0]))
    if not falls:
        fallen = np.full_like(fallen, np.nan)
    half, last, tenths = _half_drop_depth(fallen), _last_three_share(fallen), _shares_of_tenths(fallen)
    # With a single prompt all resamples would be equal and the result would look certain.
    draws, same_reading = [], np.nan
    if n_prompts > 1:
        resampled = bootstrap_means(values, tokens, prompts, resamples=resamples, seed=seed)
        draws = _bootstrap_drops(mean[0], resampled, n_prompts)
        if reading != "none":
            same_reading = float(np.mean(_readings(_fallen_shares(resampled)[0]) == reading))
    shares = [fallen_draws for fallen_draws, _ in draws]
    return Convergence(
        name=analysis.name,
        n_layers=mean.size,
        peak_layer=peak + 1,
        total_drop=float(drop[0]),
        total_drop_interval=_scalar_interval(drop, [np.maximum(drops, 0.0) for _, drops in draws]),
        half_drop_depth=float(half[0]),
        half_drop_interval=_scalar_interval(half, [_half_drop_depth(s) for s in shares]),
        last_three_share=float(last[0]),
        last_three_interval=_scalar_interval(last, [_last_three_share(s) for s in shares]),
        reading=reading,
        reading_share=same_reading,
        reason=reason,
        curve=_with_ends(
            _interval(fallen[0], shares),
            layer=layers,
            relative_depth=layers / mean.size,
            entropy=mean[0],
            fallen=fallen[0],
        ),
        shares=_with_ends(
            _interval(tenths[0], [_shares_of_tenths(s) for s in shares]),
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
    """Tabulate how the entropy falls in several models.

    Args:
        analyses: the analyses, or the measures of them.
        labels: one for each; by default their names.
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


def entropy_curves(responses: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
    """Return the entropy of every state of the residual stream, response by response.

    Args:
        responses: one row per response, layer and site, as in an Analysis.

    Returns:
        H^0 (of the embedding) and H^1..H^L in nats, [G, L + 1]; response tokens [G]; the prompt of each response [G].

    Raises:
        UserError: there is no row of site layer, or a response lacks a layer.
    """
    rows = responses[responses["site"] == "layer"].sort_values(["response", "layer"], kind="stable")
    n_layers = rows["layer"].nunique()
    if not n_layers or len(rows) != n_layers * rows["response"].nunique():
        raise UserError("the responses need one row of site 'layer' for each response and layer; analyse them again")
    after = rows["entropy_out"].to_numpy(dtype=np.float64).reshape(-1, n_layers)
    before = rows["entropy_in"].to_numpy(dtype=np.float64).reshape(-1, n_layers)[:, :1]
    first = rows.iloc[::n_layers]
    tokens, prompts = (first[c].to_numpy(dtype=np.float64) for c in ("n_tokens", "prompt"))
    return np.hstack([before, after]), tokens, prompts


# Below, curves are H^1..H^L in nats, a row each, [B, L], and `fallen` is what `_fallen_shares` returns of them, [B, L].


def _peak(curves: Floats) -> npt.NDArray[np.int64]:
    """Index of the highest layer of each curve, the last of several, [B]."""
    places: npt.NDArray[np.int64] = curves.shape[1] - 1 - np.argmax(curves[:, ::-1], axis=1)
    return places


def _fallen_shares(curves: Floats, top: Floats | None = None) -> tuple[Floats, Floats]:
    """Share of the drop that has fallen by each layer, [B, L] (NaN where nothing falls), and the drop, nats, [B].

    The drop is top - H^L, where `top`, [B], is by default the highest value of each curve.
    """
    highest = curves.max(axis=1) if top is None else top
    drop = highest - curves[:, -1]
    safe = np.where(drop > 0, drop, np.nan)[:, None]
    share = np.maximum((highest[:, None] - curves) / safe, 0.0)
    return np.where(np.arange(curves.shape[1]) < _peak(curves)[:, None], 0 * safe, share), drop


def _half_drop_depth(fallen: Floats) -> Floats:
    """Relative depth l / L from which on at least half has fallen, linear between layers, [B]."""
    n_layers = fallen.shape[1]
    if n_layers < 2:
        return np.full(len(fallen), np.nan)
    rows = np.arange(len(fallen))
    # The peak has 0 and the end has 1, so there is a last layer below 1/2 and one after it.
    below = n_layers - 2 - np.argmax(fallen[:, -2::-1] < 0.5, axis=1)
    before, after = fallen[rows, below], fallen[rows, below + 1]
    depths: Floats = (below + 1 + (0.5 - before) / (after - before)) / n_layers
    return depths


def _last_three_share(fallen: Floats) -> Floats:
    """Share of the drop that the last three layers take, [B]; below 0 where the entropy rises at the end."""
    return 1.0 - fallen[:, max(fallen.shape[1] - 1 - _LAST, 0)]


def _shares_of_tenths(fallen: Floats) -> Floats:
    """Share of the drop in each tenth of the depth, [B, 10], linear between layers; above layer 1 nothing falls."""
    n_layers = fallen.shape[1]
    places = np.clip(_TENTHS * n_layers - 1, 0, n_layers - 1)
    left = places.astype(np.int64)
    weight = places - left
    values: Floats = (1 - weight) * fallen[:, left] + weight * fallen[:, np.minimum(left + 1, n_layers - 1)]
    return np.diff(values, axis=1)


def _bootstrap_drops(mean: Floats, resampled: Floats, n_prompts: int) -> list[tuple[Floats, Floats]]:
    """Draws of curves that may be the true one, from resamples [B, L] of the mean curve [L], at least two prompts.

    A resample's error is subtracted from the mean instead of added to it (the basic bootstrap). The top needs more
    care: the maximum over a noisy plateau is too high, and a maximum is not smooth, so that the ordinary bootstrap does
    not know by how much (Andrews 2000). The error of the maximum is the highest error among the layers that may be the
    peak, those less than two standard errors of the difference below it (Fang and Santos 2019). Where only one of
    them is the peak that would subtract too much, so there are two sets of draws: one for the peak alone, one for all
    that may be it. Each is what `_fallen_shares` returns.

    Errors are widened by sqrt(n / (n - 1)) and by Student's t over the normal, as resamples of few prompts vary too
    little.
    """
    from scipy.stats import norm, t

    widening = np.sqrt(n_prompts / (n_prompts - 1)) * t.ppf(0.975, n_prompts - 1) / norm.ppf(0.975)
    errors = (resampled - mean) * widening
    peak = int(_peak(mean[None])[0])
    margin = _NEAR_PEAK * np.std(errors - errors[:, [peak]], axis=0)
    may_be_peak = mean[peak] - mean <= margin
    curves = mean - errors
    return [
        _fallen_shares(curves, mean[peak] - error) for error in (errors[:, peak], errors[:, may_be_peak].max(axis=1))
    ]


def _interval(estimate: Floats, draws: list[Floats]) -> Floats:
    """Outermost ends of the 95% intervals over several sets of draws, [2, ...], extended to hold the estimate [...].

    Each set is [B, ...]; there is none where the prompts cannot be resampled. NaN where nothing is defined.
    """
    ends = np.full((2, *estimate.shape), np.nan)
    defined = ~np.isnan(estimate) & np.all([~np.isnan(d).all(axis=0) for d in draws], axis=0)
    if draws and defined.any():
        found = np.array([_percentiles(d[:, defined]) for d in draws])
        ends[0, defined] = np.minimum(found[:, 0].min(axis=0), estimate[defined])
        ends[1, defined] = np.maximum(found[:, 1].max(axis=0), estimate[defined])
    return ends


def _percentiles(draws: Floats) -> Floats:
    # The variant that ignores NaN goes column by column, thirty times as slowly.
    ends: Floats = (np.nanpercentile if np.isnan(draws).any() else np.percentile)(draws, _PERCENTILES, axis=0)
    return ends


def _scalar_interval(estimate: Floats, draws: list[Floats]) -> tuple[float, float]:
    low, high = _interval(estimate, [values[:, None] for values in draws])[:, 0]
    return float(low), float(high)


def _with_ends(ends: Floats, **columns: npt.NDArray[np.generic]) -> pd.DataFrame:
    return pd.DataFrame({**columns, "low": ends[0], "high": ends[1]})


def _even_share(n_layers: int) -> float:
    """What an even fall puts into three of its L - 1 steps."""
    return min(1.0, _LAST / max(n_layers - 1, 1))


def _excess(share: Floats, n_layers: int) -> Floats:
    """Position of a share of three layers between that of an even fall (0) and everything (1)."""
    even = _even_share(n_layers)
    return (share - even) / (1 - even)


def _readings(fallen: Floats) -> npt.NDArray[np.str_]:
    """The reading of each row, [B]."""
    n_layers = fallen.shape[1]
    last = _excess(_last_three_share(fallen), n_layers)
    cliff = _excess((fallen[:, _LAST:] - fallen[:, :-_LAST]).max(axis=1), n_layers) >= _ABRUPT
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
    if n_layers <= _LAST + 1:
        return "none", True, f"{n_layers} layers are too few: all steps between them are among the last three"
    reading = cast(Reading, str(_readings(fallen[None])[0]))
    last, half = _last_three_share(fallen[None])[0], _half_drop_depth(fallen[None])[0]
    reason = (
        f"the last three of {n_layers} layers take {last:.0%} of the drop of {drop:.3g} nats, where an even fall has "
        f"{_even_share(n_layers):.0%}; half has fallen at depth {half:.2f}"
    )
    if reading == "mixed":
        alone, three = np.diff(fallen), fallen[_LAST:] - fallen[:-_LAST]
        first = int(np.argmax(three)) + 2
        if alone.max() >= _ABRUPT:
            reason += f"; layer {int(np.argmax(alone)) + 2} alone takes {alone.max():.0%}"
        elif _excess(three, n_layers).max() >= _ABRUPT:
            reason += f"; layers {first}-{first + _LAST - 1} take {three.max():.0%}"
    return reading, True, reason
