"""Stages of a model and its boundary layer, from the FFN's entropy change per layer.

The paper reads three stages off the curve of dH_FFN (arXiv 2512.19673v3, section 3.2): exploration (> 0), integration
(about 0) and convergence (< 0), and trains the boundary layer: the last exploring layer before the FFN turns to
integration or convergence. What "about zero" means depends on the model: +0.1 nats in every layer is how a Llama
explores, while a Qwen that falls to +0.1 after +3 has turned to integration. The rule has two constants:

1. The exploration level P = sum(x^2) / sum(x) over the layers with x > 0 is the change at which the average widening
   nat is added. A long tail of small changes hardly lowers it, and no negative change enters it.
2. A stretch of consecutive layers scores sum(x - P / 5). The exploration stage is the stretch with the highest score.
   The constant says what "about zero" is: less than **a fifth** of the exploration level. A layer above it lengthens
   the stage; layers below it do so only if later ones make up for them, so a layer that dips does not end the stage.
   This is how a cumulative sum locates where a mean rises above a level and falls below it (Page, Biometrika 41, 1954).
3. The boundary layer is the last layer of that stage. There is none if the stage reaches layer L (the model never
   turns), or if its mean change is not beyond **two** standard errors (it never explores). The error of the mean is the
   mean of its layers' errors: layers share their responses, so their errors do not average out.

No negative change enters P, and lower values outside the stage leave its score the highest: how deep a model converges
does not matter. Multiplying the curve by any positive number changes nothing. A curve without standard errors is taken
as exact.

Outside the stage a layer with x > P / 5 explores too, one with x < -min(P, N) / 5 converges, where N is the level of
the negative layers, and the others integrate. Where a model never explores, no layer is called exploring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd

from internal_policy.statistics import Floats, Ints, change_curves
from internal_policy.utils.errors import UserError

STAGES = ("exploration", "integration", "convergence")
THRESHOLD = 0.2
"""Changes below this share of the exploration level are about zero."""
STDERRS = 2.0
"""An exploration stage is one if its mean is further above zero than this number of standard errors."""
MEASURED, DIRECTION, LITERAL = "measured", "direction", "literal"
_OWN_READINGS = (MEASURED, DIRECTION, LITERAL)
_PHRASES = {
    MEASURED: "as measured",
    DIRECTION: "by direction alone",
    LITERAL: "by the paper's literal words",
    "policy": "under the policy lens",
    "logit-lens": "under the logit lens",
    "unit-norm": "under the unit-norm lens",
}
_EXPLORATION, _INTEGRATION, _CONVERGENCE = 0, 1, 2


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
    runner_up: int | None
    """The layer that the resamples of the measured curve give most often, apart from the boundary layer."""
    runner_up_share: float | None
    """Share of these resamples that name the runner-up."""
    candidates: tuple[int, ...]
    """Layers in order of their share; without a boundary layer those that come nearest to being one."""
    reason: str
    """One sentence that says why, with numbers in nats."""
    n_resamples: int = 1000
    """How many curves were drawn for each reading."""
    n_prompts: int | None = None
    """How many prompts they were drawn from; None if a plain curve was given, or if nothing was drawn."""
    sensitivity: dict[str, int | None] = field(default_factory=dict)
    """The boundary layer under other readings of the same data, None where that has none.

    ``direction``: the same rule on the change that is left if every write has the length of its module's input, so that
    no change comes from how long a state is (absent if that was not measured).

    ``literal``: the paper's words "dH_FFN > 0" with nothing counted as about zero: the same rule with a threshold of 0
    and without errors, so the last positive layer after which the changes never add up to a gain again.

    The name of a lens: the result of an analysis of the same responses of the same weights under it, if there is one on
    disk. It is looked up when an analysis is loaded, and not stored with it."""
    shares: dict[str, float] = field(default_factory=dict)
    """Share of the resamples under each reading, ``measured`` being the first, that give the boundary layer; empty if
    the uncertainty of the curve is unknown."""

    @property
    def confidence(self) -> float | None:
        """Share of the pairs of a reading and a resample that give the boundary layer: the mean of `shares`.

        All readings count equally, so it is below 1 if one of them gives another layer. From an Analysis the resamples
        are of its prompts; None if the uncertainty of the curve is unknown.
        """
        return sum(self.shares.values()) / len(self.shares) if self.shares else None

    @property
    def disputed(self) -> bool:
        """Whether another reading gives another boundary layer."""
        return any(layer != self.boundary_layer for layer in self.sensitivity.values())

    @property
    def agreement(self) -> str:
        """What resamples and other readings give.

        For example "all 1000 resamples of the 48 prompts give layer 6; by direction alone it is layer 1".
        """
        found = [self._resampled()] if MEASURED in self.shares else []
        for layer in dict.fromkeys(self.sensitivity.values()):
            names = [name for name, theirs in self.sensitivity.items() if theirs == layer]
            same = layer == self.boundary_layer
            readings = " and ".join(phrase(name) + (self._counted(name) if same else "") for name in names)
            if layer is None:
                found.append(f"{readings} there is none{' either' if same else ''}")
            else:
                found.append(f"{readings} it is layer {layer}{' too' if same else ''}")
        return "; ".join(found)

    def _resampled(self) -> str:
        count = round(self.shares[MEASURED] * self.n_resamples)
        given = f"{'all' if count == self.n_resamples else count or 'none'}"
        whole = self.n_resamples if given == "all" else f"of {self.n_resamples}"
        drawn = "" if self.n_prompts is None else f" of the {self.n_prompts} prompts"
        answer = "no boundary layer" if self.boundary_layer is None else f"layer {self.boundary_layer}"
        return f"{given} {whole} resamples{drawn} give {answer}"

    def _counted(self, reading: str) -> str:
        count = round(self.shares.get(reading, 1.0) * self.n_resamples)
        return "" if count == self.n_resamples else f" (in {count} of {self.n_resamples})"

    def readings(self) -> pd.DataFrame:
        """Tabulate the boundary layer under each reading.

        Returns:
            A row per reading, that of the curve as it was measured first: reading, layer (empty if there is none), and
            share, that of its resamples which give the boundary layer (NaN if unknown).
        """
        layers = {MEASURED: self.boundary_layer, **self.sensitivity}
        shares = [self.shares.get(name, np.nan) for name in layers]
        table = pd.DataFrame({"reading": list(layers), "layer": list(layers.values()), "share": shares})
        return table.astype({"layer": "Int64", "share": "float64"})

    def with_lenses(self, found: Mapping[str, tuple[int | None, float | None]]) -> Selection:
        """Add what the same responses give under other lenses.

        Args:
            found: by lens, the boundary layer, and the share of the resamples that give that of this Selection.
        """
        shares = {lens: share for lens, (_, share) in found.items() if share is not None} if self.shares else {}
        layers = {lens: layer for lens, (layer, _) in found.items()}
        return replace(self, sensitivity={**self.sensitivity, **layers}, shares={**self.shares, **shares})

    def share_of(self, layer: int | None) -> float | None:
        """Share of the resamples of the measured curve that give `layer`, as far as it is recorded."""
        if MEASURED not in self.shares:
            return None
        if layer == self.boundary_layer:
            return self.shares[MEASURED]
        return (self.runner_up_share or 0.0) if layer is not None and layer == self.runner_up else 0.0

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import few_prompts, number, of_resamples
        from internal_policy.utils.html import card

        answer = "none" if self.boundary_layer is None else f"layer {self.boundary_layer}"
        facts = [self.reason, self.agreement]
        if self.runner_up is not None:
            facts.append(f"runner-up: layer {self.runner_up} ({number(self.runner_up_share, '.1%')} of the resamples)")
        few = None if self.n_prompts is None else few_prompts(self.n_prompts)
        cells = [
            (phrase(row["reading"]), "none" if pd.isna(row["layer"]) else row["layer"], of_resamples(row["share"]))
            for row in self.readings().to_dict("records")
        ]
        table = pd.DataFrame(cells, columns=["reading", "boundary layer", f"resamples that give {answer}"])
        return card("Selection", f"of {len(self.stages)} layers", (*facts, few or ""), table)

    def to_dict(self) -> dict[str, Any]:
        """The fields and the confidence as plain Python values that json can write, without what other lenses give."""
        own = replace(
            self,
            sensitivity={name: layer for name, layer in self.sensitivity.items() if name in _OWN_READINGS},
            shares={name: share for name, share in self.shares.items() if name in _OWN_READINGS},
        )
        lists = {"stages": list(self.stages), "candidates": list(self.candidates)}
        return asdict(own) | lists | {"confidence": own.confidence}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Selection:
        """The Selection that `to_dict` wrote."""
        given = {name: value for name, value in fields.items() if name != "confidence"}
        return cls(**{**given, "stages": tuple(fields["stages"]), "candidates": tuple(fields["candidates"])})


def phrase(reading: str) -> str:
    """A reading in a sentence, such as "by direction alone" or "under the logit lens"."""
    return _PHRASES.get(reading, f"under the lens {reading}")


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
        resamples: number of curves that are drawn for the confidence: from an Analysis by drawing prompts again, the
            same for every reading, from a curve with `stderr` by adding normal noise. A curve without `stderr` has no
            confidence.
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
        return _selection([_measured(curve), _literal(curve)], "no standard errors were given")
    errors = _as_curve(stderr, "stderr")
    if errors.shape != curve.shape:
        raise SelectionError(f"stderr has {errors.size} values for {curve.size} layers; one per layer is needed")
    if np.any(errors < 0):
        raise SelectionError(f"stderr is negative at layer {int(np.argmax(errors < 0)) + 1}; it must be 0 or more")
    drawn = curve + errors * np.random.default_rng(seed).standard_normal((resamples, curve.size))
    return _selection([_measured(curve, errors, drawn), _literal(curve, drawn)], "")


@dataclass(frozen=True)
class _Reading:
    """One way of reading the data: a curve [L] with its errors [L], resampled [B, L], and the constants of the rule."""

    name: str
    curve: Floats
    stderr: Floats
    resampled: Floats | None
    threshold: float = THRESHOLD

    def boundaries(self, curves: Floats) -> Ints:
        return classify(curves, self.stderr, threshold=self.threshold)[1]


def _measured(curve: Floats, stderr: Floats | None = None, drawn: Floats | None = None) -> _Reading:
    return _Reading(MEASURED, curve, np.zeros_like(curve) if stderr is None else stderr, drawn)


def _literal(curve: Floats, drawn: Floats | None = None) -> _Reading:
    return _Reading(LITERAL, curve, np.zeros_like(curve), drawn, threshold=0.0)


def _select_from_analysis(analysis: HasLayers, resamples: int, seed: int) -> Selection:
    rows = analysis.layers[analysis.layers["site"] == "ffn"].sort_values("layer")
    if rows["layer"].tolist() != list(range(1, len(rows) + 1)) or rows.empty:
        raise SelectionError("the analysis needs one row of site 'ffn' for each layer 1..L; analyse the FFN too")
    curve = _as_curve(rows["change"], "the analysis' dH_FFN")
    errors = rows["change_stderr"].to_numpy(dtype=np.float64)
    known = not np.isnan(errors).any()

    def draw(quantity: str) -> Floats | None:
        # The same seed draws the same prompts for every quantity.
        return change_curves(analysis.responses, quantity=quantity, resamples=resamples, seed=seed) if known else None

    drawn = draw("change")
    readings = [_measured(curve, errors if known else None, drawn)]
    if "change_direction" in rows and rows["change_direction"].notna().all():
        direction = rows["change_direction"].to_numpy(dtype=np.float64)
        errors = rows["change_direction_stderr"].to_numpy(dtype=np.float64)
        drawn_directions = draw("change_direction")
        readings.append(_Reading(DIRECTION, direction, errors if known else np.zeros_like(curve), drawn_directions))
    readings.append(_literal(curve, drawn))
    if not known:
        return _selection(readings, "the analysis has fewer than two prompts")
    return _selection(readings, "", int(analysis.responses["prompt"].nunique()))


def _selection(readings: Sequence[_Reading], no_confidence: str, n_prompts: int | None = None) -> Selection:
    """The Selection of readings of which the first is the measured one."""
    measured = readings[0]
    curve, stderr = measured.curve, measured.stderr
    stages, (boundary,) = classify(curve[None], stderr)
    names = tuple(STAGES[stage] for stage in stages[0])
    answer = int(boundary) or None
    reason, candidates = _explain(curve, stderr, names, answer)
    sensitivity = {other.name: int(other.boundaries(other.curve[None])[0]) or None for other in readings[1:]}
    if measured.resampled is None:
        reason = f"{reason}; {no_confidence}, so how sure is unknown"
        return Selection(answer, names, None, None, candidates, reason, sensitivity=sensitivity)
    drawn = {r.name: r.boundaries(r.resampled) for r in readings if r.resampled is not None}
    shares = {name: float(np.mean(layers == boundary)) for name, layers in drawn.items()}
    counts = Counter(drawn[MEASURED].tolist()).most_common()
    others = [(layer, count / drawn[MEASURED].size) for layer, count in counts if layer not in (0, boundary)]
    runner_up, runner_up_share = others[0] if others else (None, None)
    if answer is not None:
        candidates = tuple(layer for layer, _ in counts if layer) or candidates
    return Selection(
        boundary_layer=answer,
        stages=names,
        runner_up=runner_up,
        runner_up_share=runner_up_share,
        candidates=candidates,
        reason=reason,
        n_resamples=drawn[MEASURED].size,
        n_prompts=n_prompts,
        sensitivity=sensitivity,
        shares=shares,
    )


def _explain(curve: Floats, stderr: Floats, stages: tuple[str, ...], answer: int | None) -> tuple[str, tuple[int, ...]]:
    """The reason, and the nearest candidates."""
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
    scores = curve[None] - THRESHOLD * _level(curve[None])
    (start,), (end,) = (ends.tolist() for ends in _highest_scoring_stretch(scores))
    if end == 0:
        top = int(np.argmax(curve))
        best = f"no layer has a positive dH_FFN, the highest being layer {top + 1} with {curve[top]:+.3g}"
    else:
        best = (
            f"{_layers(start + 1, end)} average {curve[start:end].mean():+.3g} nats, which is not beyond "
            f"{STDERRS:g} standard errors of {stderr[start:end].mean():.3g}"
        )
    return f"no stretch of layers explores: {best}", _nearest_to_exploring(curve)


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


def classify(
    curves: Floats, stderr: Floats, *, threshold: float = THRESHOLD, stderrs: float = STDERRS
) -> tuple[Ints, Ints]:
    """Stages and boundary layers of curves, each measured against itself.

    Args:
        curves: dH_FFN of layers 1..L, [B, L], nats.
        stderr: standard error of each layer, [L], nats.
        threshold: the share of the exploration level below which a change is about zero.
        stderrs: how many standard errors the mean of the exploration stage has to be above zero.

    Returns:
        Stage of each layer, [B, L]: 0 exploration, 1 integration, 2 convergence. Boundary layer, [B], from 1, or 0.
    """
    n_layers = curves.shape[1]
    x, errors = _without_unit(curves, stderr)
    level = _level(x)
    start, end = _highest_scoring_stretch(x - threshold * level)
    layer = np.arange(n_layers)
    inside = (start[:, None] <= layer) & (layer < end[:, None])
    explores = ((x * inside).sum(axis=1) > stderrs * (errors * inside).sum(axis=1))[:, None]
    stages = np.where(x < -threshold * np.minimum(level, _level(-x)), _CONVERGENCE, _INTEGRATION)
    stages = np.where(explores & (inside | (x > threshold * level)), _EXPLORATION, stages)
    return stages, np.where(explores[:, 0] & (end < n_layers), end, 0)


def _without_unit(curves: Floats, stderr: Floats) -> tuple[Floats, Floats]:
    """Curves [B, L] and errors [L] of each in units of its largest magnitude, [B, L] both.

    They are rounded so that ties are resolved in the same way in every unit of the curve.
    """
    largest = np.abs(curves).max(axis=1, keepdims=True)
    unit = np.where(largest > 0, largest, 1.0)
    return np.round(curves / unit, 12), np.round(stderr / unit, 12)


def _level(x: Floats) -> Floats:
    """sum(x^2) / sum(x) over the positive layers of each curve, [B, 1]; 0 where none is positive."""
    up = np.maximum(x, 0.0)
    total = up.sum(axis=1, keepdims=True)
    level: Floats = (up**2).sum(axis=1, keepdims=True) / np.where(total > 0, total, 1.0)
    return level


def _highest_scoring_stretch(scores: Floats) -> tuple[Ints, Ints]:
    """Python bounds of the consecutive layers with the highest sum of [B, L] scores; (0, 0) if none is positive."""
    n_curves, n_layers = scores.shape
    best, total = np.zeros(n_curves), np.zeros(n_curves)
    begin, start, end = (np.zeros(n_curves, dtype=np.int64) for _ in range(3))
    for layer in range(n_layers):
        begin = np.where(total <= 0, layer, begin)
        total = np.maximum(total, 0.0) + scores[:, layer]
        higher = total > best
        best, start, end = (
            np.where(higher, new, old) for new, old in ((total, best), (begin, start), (layer + 1, end))
        )
    return start, end
