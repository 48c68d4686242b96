"""Stages of a model and its boundary layer, from the FFN's entropy change per layer.

The paper reads three stages off the curve of dH_FFN (arXiv 2512.19673v3, section 3.2): exploration (> 0), integration
(about 0) and convergence (< 0), and trains the boundary layer: the last exploring layer before the FFN turns to
integration or convergence. What "about zero" means depends on the model: +0.1 nats in every layer is how a Llama
explores, while a Qwen that falls to +0.1 after +3 has turned to integration. So the rule measures a curve against
itself, and multiplying the curve by any number changes nothing:

1. The curve x is divided by its largest magnitude. The last layer may collapse by 20 nats, so wherever a scale is
   measured it counts as its predecessor.
2. Exploration level P = sum(x^2) / sum(x) over the positive layers, the level at which the average widening nat is
   added. Convergence level N likewise over the negative ones.
3. Wobble w = mean distance of a layer from the median of itself and its two neighbours (0 on any monotone stretch),
   as a standard deviation. Noise s = the larger of w and the layer's standard error.
4. Zero band: x is about zero up to clip(1.5 * positive part of the median + 2 s, 0.1 P, 0.35 P) and down to the mirror
   image of that with N, but not less than 0.05 P. The two edges differ on purpose: a deep final collapse must not
   hide a long weak exploration, and ripples after a large one are no convergence. Neither edge is finer than the
   layer's standard error.
5. With y = x / edge, layer by layer, exploration costs 1 - y, integration |y| - 1, convergence 1 + y, clipped to [0, 1]
   (integration to [0, 2]), and each change of stage 0.75: one layer that dips does not end a stage, two do. The stages
   are the cheapest sequence (Viterbi), but an exploration run that turns ends with a layer of y >= 0.5.
6. An exploration run counts if its sum is at least 0.12 of sum|x|, a quarter of the greatest run's and three of its
   own standard errors; the others are integration.
7. The boundary layer is the end of the last counting run below the top. There is none if no run counts or if the
   greatest one reaches layer L: the model never explores, or never turns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy.statistics import Floats, Ints, change_curves
from internal_policy.utils.errors import UserError

COVERS = "which covers the drawing of prompts only"
"""Resamples of the prompts do not cover the choice of the lens, of the sampling or of the rule."""
STAGES = ("exploration", "integration", "convergence")

_EXPLORATION, _INTEGRATION = 0, 1
_MEDIAN_FACTOR, _NOISE_FACTOR = 1.5, 2.0
_EDGE_MIN, _EDGE_MAX, _LOWER_EDGE_MIN = 0.1, 0.35, 0.05
_MAX_COST = np.array([1.0, 2.0, 1.0])
_CHANGE_COST = 0.75
_MIN_LAST = 0.5
_MIN_SHARE, _MIN_SHARE_OF_GREATEST, _MIN_STDERRS = 0.12, 0.25, 3.0
# E|x - median of three| for a standard normal x.
_MEDIAN_OF_THREE_DISTANCE = 0.5642


class SelectionError(UserError, ValueError):
    """A curve from which no layer can be selected, such as one with a NaN."""


@runtime_checkable
class HasLayers(Protocol):
    """The attributes of an Analysis that `select_layer` reads."""

    layers: pd.DataFrame
    responses: pd.DataFrame


@dataclass(frozen=True)
class Selection:
    """The boundary layer of a model, how sure it is and why. Layers are counted from 1."""

    boundary_layer: int | None
    """Last layer of the exploration stage, which is the target layer of BuPO; None if the model has none."""
    stages: tuple[str, ...]
    """Stage of each layer: "exploration", "integration" or "convergence"."""
    confidence: float | None
    """Share of the resampled curves that give the same answer; None if the uncertainty of the curve is unknown. From
    an Analysis it covers the drawing of prompts only, and not, for example, the choice of the lens."""
    runner_up: int | None
    """The layer that the resamples give most often, apart from the boundary layer."""
    runner_up_share: float | None
    """Share of the resamples that name the runner-up."""
    candidates: tuple[int, ...]
    """Layers in order of their share; without a boundary layer those that come nearest to being one."""
    reason: str
    """One sentence that says why, with numbers in nats."""
    n_resamples: int = 1000
    """How many curves were drawn for the confidence."""
    n_prompts: int | None = None
    """How many prompts they were drawn from; None if a plain curve was given, or if nothing was drawn."""

    @property
    def agreement(self) -> str | None:
        """How many of the resamples give the answer, such as "all 1000 resamples of the 48 prompts give layer 6"."""
        if self.confidence is None:
            return None
        count = round(self.confidence * self.n_resamples)
        given = f"{'all' if count == self.n_resamples else count or 'none'}"
        whole = self.n_resamples if given == "all" else f"of {self.n_resamples}"
        drawn = "" if self.n_prompts is None else f" of the {self.n_prompts} prompts"
        answer = "no boundary layer" if self.boundary_layer is None else f"layer {self.boundary_layer}"
        return f"{given} {whole} resamples{drawn} give {answer}"

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import few_prompts, of_resamples
        from internal_policy.utils.html import card

        answer = "none" if self.boundary_layer is None else str(self.boundary_layer)
        cells = [
            ("boundary layer", answer, of_resamples(self.confidence)),
            ("runner-up", "none" if self.runner_up is None else self.runner_up, of_resamples(self.runner_up_share)),
        ]
        few = None if self.n_prompts is None else few_prompts(self.n_prompts)
        table = pd.DataFrame(cells, columns=["", "layer", "resamples of the prompts"])
        return card("Selection", f"of {len(self.stages)} layers", (self.reason, few or ""), table)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values that json can write."""
        return asdict(self) | {"stages": list(self.stages), "candidates": list(self.candidates)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Selection:
        """The Selection that `to_dict` wrote."""
        return cls(**{**fields, "stages": tuple(fields["stages"]), "candidates": tuple(fields["candidates"])})


def select_layer(
    x: HasLayers | Sequence[float] | npt.NDArray[Any] | pd.Series[Any],
    *,
    stderr: Sequence[float] | npt.NDArray[Any] | pd.Series[Any] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Selection:
    """Find the stages and the boundary layer of a model, by the rule in this module's docstring.

    Args:
        x: an Analysis, or dH_FFN of layers 1..L in nats, [L].
        stderr: standard error of each layer, [L], nats; only with a plain curve.
        resamples: number of curves that are drawn for the confidence: from an Analysis by drawing prompts again, from
            a curve with `stderr` by adding normal noise. A curve without `stderr` has no confidence.
        seed: of the random generator; the same seed gives the same Selection.

    Returns:
        the Selection.

    Raises:
        SelectionError: (a UserError and a ValueError) if the curve is empty, not one-dimensional or not finite, if
            `stderr` has another length or is negative, or if an Analysis has no FFN rows.
    """
    if resamples < 1:
        raise SelectionError(f"resamples is {resamples}; at least 1 is needed")
    if isinstance(x, HasLayers):
        if stderr is not None:
            raise SelectionError("stderr was given with an Analysis, which has standard errors; leave it out")
        return _select_from_analysis(x, resamples, seed)
    curve = _as_curve(x, "the curve of dH_FFN")
    if stderr is None:
        return _selection(curve, np.zeros_like(curve), None, "no standard errors were given")
    errors = _as_curve(stderr, "stderr")
    if errors.shape != curve.shape:
        raise SelectionError(f"stderr has {errors.size} values for {curve.size} layers; one per layer is needed")
    if np.any(errors < 0):
        raise SelectionError(f"stderr is negative at layer {int(np.argmax(errors < 0)) + 1}; it must be 0 or more")
    noise = np.random.default_rng(seed).standard_normal((resamples, curve.size))
    return _selection(curve, errors, curve + noise * errors, "")


def _select_from_analysis(analysis: HasLayers, resamples: int, seed: int) -> Selection:
    rows = analysis.layers[analysis.layers["site"] == "ffn"].sort_values("layer")
    if rows["layer"].tolist() != list(range(1, len(rows) + 1)) or rows.empty:
        raise SelectionError("the analysis needs one row of site 'ffn' for each layer 1..L; analyse the FFN too")
    curve = _as_curve(rows["change"], "the analysis' dH_FFN")
    errors = rows["change_stderr"].to_numpy(dtype=np.float64)
    if np.isnan(errors).any():
        return _selection(curve, np.zeros_like(curve), None, "the analysis has fewer than two prompts")
    resampled = change_curves(analysis.responses, resamples=resamples, seed=seed)
    return _selection(curve, errors, resampled, "", int(analysis.responses["prompt"].nunique()))


def _selection(
    curve: Floats, stderr: Floats, resampled: Floats | None, no_confidence: str, n_prompts: int | None = None
) -> Selection:
    stages, boundaries = classify(curve[None], stderr)
    names = tuple(STAGES[stage] for stage in stages[0])
    answer = int(boundaries[0]) or None
    reason, candidates = _explain(curve, names, answer)
    if resampled is None:
        return Selection(
            answer, names, None, None, None, candidates, f"{reason}; {no_confidence}, so how sure is unknown"
        )
    draws = Counter((classify(resampled, stderr)[1]).tolist())
    shares = {layer: count / len(resampled) for layer, count in draws.most_common()}
    confidence = shares.get(answer or 0, 0.0)
    others = [layer for layer in shares if layer not in (0, answer)]
    runner_up = others[0] if others else None
    if answer is not None:
        candidates = tuple(layer for layer in shares if layer) or candidates
    selection = Selection(
        boundary_layer=answer,
        stages=names,
        confidence=confidence,
        runner_up=runner_up,
        runner_up_share=None if runner_up is None else shares[runner_up],
        candidates=candidates,
        reason=reason,
        n_resamples=len(resampled),
        n_prompts=n_prompts,
    )
    covered = "" if n_prompts is None else f", {COVERS}"
    return replace(selection, reason=f"{reason}; {selection.agreement}{covered}")


def _explain(curve: Floats, stages: tuple[str, ...], answer: int | None) -> tuple[str, tuple[int, ...]]:
    """The reason without its confidence, and the nearest candidates."""
    if answer is not None:
        start = answer
        while start > 1 and stages[start - 2] == "exploration":
            start -= 1
        end = answer + 1
        while end < len(stages) and stages[end] == stages[answer]:
            end += 1
        before, after = curve[start - 1 : answer].mean(), curve[answer:end].mean()
        return (
            f"dH_FFN averages {before:+.3g} nats over {_layers(start, answer)} (exploration) and {after:+.3g} over "
            f"{_layers(answer + 1, end)} ({stages[answer]})"
        ), (answer,)
    if "exploration" in stages:
        drops = curve[:-1] - curve[1:]
        steepest = [int(layer) + 1 for layer in np.argsort(-drops, kind="stable")[:3] if drops[layer] > 0]
        first = stages.index("exploration") + 1
        return (
            f"dH_FFN still explores at the last layer, {len(stages)} ({curve[-1]:+.3g} nats; "
            f"{curve[first - 1 :].mean():+.3g} on average from layer {first} on), so it never turns"
        ), tuple(steepest) or (len(stages),)
    gain, loss = np.maximum(curve, 0).sum(), np.maximum(-curve, 0).sum()
    top = int(np.argmax(curve))
    return (
        f"no stretch of layers explores: dH_FFN adds {gain:.3g} nats over its positive layers and takes {loss:.3g} "
        f"over its negative ones, the highest being layer {top + 1} with {curve[top]:+.3g}"
    ), _nearest_to_exploring(curve)


def _nearest_to_exploring(curve: Floats) -> tuple[int, ...]:
    """Ends of the positive runs, the greatest sum first; the highest layers if none is positive."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], curve > 0, [False]]).astype(np.int64)))
    runs = [(float(curve[start:end].sum()), int(end)) for start, end in edges.reshape(-1, 2)]
    if runs:
        return tuple(end for _, end in sorted(runs, reverse=True)[:3])
    return tuple(int(layer) + 1 for layer in np.argsort(-curve, kind="stable")[:3])


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _as_curve(values: Any, what: str) -> Floats:
    try:
        curve = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SelectionError(f"{what} is not a sequence of numbers: {error}") from None
    if curve.ndim != 1 or curve.size == 0:
        raise SelectionError(f"{what} has shape {curve.shape}; one number per layer is needed, [L] with L >= 1")
    if not np.isfinite(curve).all():
        bad = int(np.argmin(np.isfinite(curve)))
        raise SelectionError(f"{what} is {curve[bad]} at layer {bad + 1}; every layer needs a finite number")
    return curve


def classify(curves: Floats, stderr: Floats) -> tuple[Ints, Ints]:
    """Stages and boundary layers of curves, each measured against itself.

    Args:
        curves: dH_FFN of layers 1..L, [B, L], nats.
        stderr: standard error of each layer, [L], nats.

    Returns:
        Stage of each layer, [B, L]: 0 exploration, 1 integration, 2 convergence. Boundary layer, [B], from 1, or 0.
    """
    largest = np.abs(curves).max(axis=1, keepdims=True)
    unit = np.where(largest > 0, largest, 1.0)
    # Rounded so that ties are resolved in the same way in every unit of the curve.
    x, errors = np.round(curves / unit, 12), np.round(stderr / unit, 12)
    steady = x.copy()
    steady[:, -1] = x[:, -2] if x.shape[1] > 1 else x[:, -1]
    stages = _cheapest_stages(x / _edges(x, steady, errors))
    return _settle_runs(stages, steady, errors)


def _edges(x: Floats, steady: Floats, errors: Floats) -> Floats:
    """Edge of the zero band on the side of each layer, [B, L]."""
    up, down = np.maximum(steady, 0), np.maximum(-steady, 0)
    level_up, level_down = (
        (side**2).sum(1, keepdims=True) / np.maximum(side.sum(1, keepdims=True), 1e-300) for side in (up, down)
    )
    noise = np.maximum(errors, _wobble(x)) * _NOISE_FACTOR
    middle = _MEDIAN_FACTOR * np.median(steady, axis=1, keepdims=True)
    upper = np.clip(noise + np.maximum(middle, 0), _EDGE_MIN * level_up, _EDGE_MAX * level_up)
    lower = np.clip(noise + np.maximum(-middle, 0), _EDGE_MIN * level_down, _EDGE_MAX * level_down)
    lower = np.maximum(lower, _LOWER_EDGE_MIN * level_up)
    edges: Floats = np.maximum(np.maximum(np.where(x > 0, upper, lower), errors), 1e-12)
    return edges


def _wobble(x: Floats) -> Floats:
    if x.shape[1] < 3:
        return np.zeros((x.shape[0], 1))
    medians = np.median(np.lib.stride_tricks.sliding_window_view(x, 3, axis=1), axis=2)
    wobble: Floats = np.abs(x[:, 1:-1] - medians).mean(axis=1, keepdims=True) / _MEDIAN_OF_THREE_DISTANCE
    return wobble


def _cheapest_stages(y: Floats) -> Ints:
    """Viterbi over the three stages, all curves at once; y is [B, L] in units of the zero band's edge."""
    n_curves, n_layers = y.shape
    costs = np.clip(np.stack([1 - y, np.abs(y) - 1, 1 + y], axis=-1), 0.0, _MAX_COST)
    change = _CHANGE_COST * (1 - np.eye(3))
    best = np.zeros((n_curves, n_layers, 3), dtype=np.int64)
    total = costs[:, 0]
    for layer in range(1, n_layers):
        options = total[:, :, None] + change
        best[:, layer] = options.argmin(axis=1)
        total = options.min(axis=1) + costs[:, layer]
    stages = np.zeros((n_curves, n_layers), dtype=np.int64)
    stages[:, -1] = total.argmin(axis=1)
    for layer in range(n_layers - 1, 0, -1):
        stages[:, layer - 1] = best[np.arange(n_curves), layer, stages[:, layer]]
    for layer in range(n_layers - 2, -1, -1):
        turns = (stages[:, layer] == _EXPLORATION) & (stages[:, layer + 1] != _EXPLORATION)
        stages[turns & (y[:, layer] < _MIN_LAST), layer] = _INTEGRATION
    return stages


def _settle_runs(stages: Ints, steady: Floats, errors: Floats) -> tuple[Ints, Ints]:
    """Turn exploration runs that do not count into integration, and find the boundary layer."""
    n_curves, n_layers = stages.shape
    explores = stages == _EXPLORATION
    ends = explores & np.column_stack([~explores[:, 1:], np.ones(n_curves, dtype=bool)])
    sums, variances = np.zeros((n_curves, n_layers)), np.zeros((n_curves, n_layers))
    run_sum, run_variance = np.zeros(n_curves), np.zeros(n_curves)
    for layer in range(n_layers):
        run_sum = np.where(explores[:, layer], run_sum + steady[:, layer], 0.0)
        run_variance = np.where(explores[:, layer], run_variance + errors[:, layer] ** 2, 0.0)
        sums[:, layer], variances[:, layer] = run_sum, run_variance
    counts = ends & (sums > 0) & (sums >= _MIN_STDERRS * np.sqrt(variances))
    counts &= sums >= _MIN_SHARE * np.abs(steady).sum(axis=1, keepdims=True)
    sums = np.where(counts, sums, -np.inf)
    counts &= sums >= _MIN_SHARE_OF_GREATEST * sums.max(axis=1, keepdims=True)
    turns = counts[:, :-1].any(axis=1) & (sums.argmax(axis=1) < n_layers - 1)
    last = n_layers - 1 - np.argmax(counts[:, -2::-1], axis=1) if n_layers > 1 else np.zeros(n_curves, dtype=np.int64)
    keep = counts.copy()
    for layer in range(n_layers - 2, -1, -1):
        keep[:, layer] |= explores[:, layer] & ~ends[:, layer] & keep[:, layer + 1]
    return np.where(explores & ~keep, _INTEGRATION, stages), np.where(turns, last, 0)
