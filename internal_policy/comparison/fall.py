"""The curve of H_Layer and how much of it has fallen by which layer: measures of curves, and their intervals.

All curves here are H^1..H^L, one row each. What has fallen is a share of the drop from the highest layer to the last.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy.statistics import Floats
from internal_policy.utils.errors import UserError

LAST = 3
"""How many layers "the last three" are."""
_ENDS = (2.5, 97.5)
_NEAR_PEAK = 2.0


def entropy_curves(responses: pd.DataFrame) -> tuple[Floats, Floats, Floats]:
    """Entropy of every state of the residual stream, response by response.

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


def peak_of(curves: Floats) -> npt.NDArray[np.int64]:
    """Find the highest layer of each curve, the last of several.

    Args:
        curves: nats, [B, L].

    Returns:
        Its place from 0, [B].
    """
    places: npt.NDArray[np.int64] = curves.shape[1] - 1 - np.argmax(curves[:, ::-1], axis=1)
    return places


def fallen_shares(curves: Floats, top: Floats | None = None) -> tuple[Floats, Floats]:
    """Measure how much of the drop has fallen by each layer.

    Args:
        curves: nats, [B, L].
        top: from where each falls, nats, [B]; its own highest value where not given.

    Returns:
        The share, 0 before the peak, [B, L] (NaN where nothing falls); the drop top - H^L, nats, [B].
    """
    highest = curves.max(axis=1) if top is None else top
    drop = highest - curves[:, -1]
    safe = np.where(drop > 0, drop, np.nan)[:, None]
    share = np.maximum((highest[:, None] - curves) / safe, 0.0)
    return np.where(np.arange(curves.shape[1]) < peak_of(curves)[:, None], 0 * safe, share), drop


def half_depth(fallen: Floats) -> Floats:
    """Find from which relative depth on at least half has fallen, linear between layers.

    Args:
        fallen: of `fallen_shares`, [B, L].

    Returns:
        The depth, l / L, [B].
    """
    n_layers = fallen.shape[1]
    if n_layers < 2:
        return np.full(len(fallen), np.nan)
    rows = np.arange(len(fallen))
    # The peak has 0 and the end 1, so there is a last layer below 1/2, and one after it.
    below = n_layers - 2 - np.argmax(fallen[:, -2::-1] < 0.5, axis=1)
    before, after = fallen[rows, below], fallen[rows, below + 1]
    depths: Floats = (below + 1 + (0.5 - before) / (after - before)) / n_layers
    return depths


def last_share(fallen: Floats) -> Floats:
    """Measure the share of the drop that the last three layers take.

    Args:
        fallen: of `fallen_shares`, [B, L].

    Returns:
        The share, [B]; below 0 where the entropy rises at the end.
    """
    return 1.0 - fallen[:, max(fallen.shape[1] - 1 - LAST, 0)]


def at_depth(fallen: Floats, depth: Floats) -> Floats:
    """Interpolate at relative depths.

    Args:
        fallen: of `fallen_shares`, [B, L].
        depth: l / L, from 0 to 1, [D].

    Returns:
        The share fallen, [B, D]; before layer 1 that of layer 1.
    """
    n_layers = fallen.shape[1]
    places = np.clip(depth * n_layers - 1, 0, n_layers - 1)
    left = places.astype(np.int64)
    weight = places - left
    values: Floats = (1 - weight) * fallen[:, left] + weight * fallen[:, np.minimum(left + 1, n_layers - 1)]
    return values


def possible_falls(mean: Floats, drawn: Floats, n_prompts: int) -> list[tuple[Floats, Floats]]:
    """Falls that may be the true one, judged by data sets that are drawn again.

    A resample's error is taken off the mean instead of added to it (the basic bootstrap): a curve that may be the true
    one. Its top needs more care, since the maximum over a noisy plateau is too high, and a maximum is not smooth, so
    that resampling does not know by how much (the ordinary bootstrap fails there: Andrews 2000). The error of the
    maximum is that of the highest error among the layers that may be the peak, those less than two standard errors of
    the difference below it (Fang and Santos 2019). Where only one of them is the peak that would take off too much, so
    there are two sets: one for the peak alone, one for all that may be it.

    Errors are wider by sqrt(n / (n - 1)) and by Student's t over the normal, as resamples of few prompts vary too
    little.

    Args:
        mean: H^1..H^L, nats, [L].
        drawn: resamples of it, [B, L].
        n_prompts: how many prompts there are, at least two.

    Returns:
        For each of the two sets, what `fallen_shares` gives: [B, L] and [B].
    """
    from scipy.stats import norm, t

    wider = np.sqrt(n_prompts / (n_prompts - 1)) * t.ppf(0.975, n_prompts - 1) / norm.ppf(0.975)
    errors = (drawn - mean) * wider
    peak = int(peak_of(mean[None])[0])
    margin = _NEAR_PEAK * np.std(errors - errors[:, [peak]], axis=0)
    may_be = mean[peak] - mean <= margin
    curves = mean - errors
    return [fallen_shares(curves, mean[peak] - error) for error in (errors[:, peak], errors[:, may_be].max(axis=1))]


def interval(estimate: Floats, draws: list[Floats]) -> Floats:
    """The outermost ends of the 95% intervals over several sets of draws, reaching at least to the estimate.

    Args:
        estimate: what was measured, [...].
        draws: sets of what may be true, [B, ...] each; none where the prompts cannot be drawn again.

    Returns:
        Ends, [2, ...]; NaN where nothing is defined.
    """
    ends = np.full((2, *estimate.shape), np.nan)
    defined = ~np.isnan(estimate) & np.all([~np.isnan(d).all(axis=0) for d in draws], axis=0)
    if draws and defined.any():
        found = np.array([_percentiles(d[:, defined]) for d in draws])
        ends[0, defined] = np.minimum(found[:, 0].min(axis=0), estimate[defined])
        ends[1, defined] = np.maximum(found[:, 1].max(axis=0), estimate[defined])
    return ends


def _percentiles(draws: Floats) -> Floats:
    """Ends of the 95% interval, [2, K]; where a draw is not defined, of the others."""
    # The one that knows of NaN goes column by column, thirty times as slowly.
    ends: Floats = (np.nanpercentile if np.isnan(draws).any() else np.percentile)(draws, _ENDS, axis=0)
    return ends
