"""The rule of `selection` (its steps 1 to 7) as numerics, over many curves at once: the curve and its resamples."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

_EXPLORATION, _INTEGRATION = 0, 1
_MEDIAN_FACTOR, _NOISE_FACTOR = 1.5, 2.0
_EDGE_MIN, _EDGE_MAX, _LOWER_EDGE_MIN = 0.1, 0.35, 0.05
_MAX_COST = np.array([1.0, 2.0, 1.0])
_CHANGE_COST = 0.75
_MIN_LAST = 0.5
_MIN_SHARE, _MIN_SHARE_OF_GREATEST, _MIN_STDERRS = 0.12, 0.25, 3.0
# E|x - median of three| for a standard normal x
_MEDIAN_OF_THREE_DISTANCE = 0.5642


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
    # rounded so that a tie is settled alike whatever the unit of the curve
    x, errors = np.round(curves / unit, 12), np.round(stderr / unit, 12)
    steady = x.copy()
    steady[:, -1] = x[:, -2] if x.shape[1] > 1 else x[:, -1]
    stages = _cheapest_stages(x / _edges(x, steady, errors))
    return _settle_runs(stages, steady, errors)


def _edges(x: Floats, steady: Floats, errors: Floats) -> Floats:
    """Edge of the zero band on the side where each layer lies, [B, L]."""
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
