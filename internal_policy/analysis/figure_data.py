"""The numbers in the figures, as tidy tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np
import pandas as pd

from internal_policy.analysis.change_parts import PARTS, has_parts
from internal_policy.analysis.layer_selection import DIRECTION
from internal_policy.utils.errors import UserError

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

ModuleSite = Literal["attn", "ffn"]
T = TypeVar("T")
OneOrMany: TypeAlias = T | Iterable[T]
"""The argument of a figure: one result, or several."""

SITE_LABELS: dict[ModuleSite, str] = {"attn": "ATTN", "ffn": "FFN"}
SMOOTH = 5
"""Steps in the trailing mean of the curves of a training (figs. 4 and 7)."""
FIRST_STEP = 1
"""The step whose responses were sampled before any update."""
_ERRORS = ("stderr", "low", "high")
FLOW_POINTS = (
    ("input", "layer", "entropy_in", -0.375),
    ("ATTN", "attn", "entropy_out", -0.125),
    ("FFN", "ffn", "entropy_out", 0.125),
    ("output", "layer", "entropy_out", 0.375),
)
"""Point, its site and column, and its offset from the tick of its layer, in layers."""


def listed(given: T | Iterable[T]) -> list[T]:
    """One result or several as a list."""
    return list(given) if isinstance(given, Iterable) else [given]


def trailing_mean(values: pd.Series, window: int) -> pd.Series:
    """Smooth a quantity over the steps of a training, using only the steps up to each step.

    Step 1 samples from the model before any update. It is not smoothed, and no mean includes it.

    Args:
        values: A value for each step, with the steps as a sorted index; NaN if it was not measured.
        window: Steps in the mean; fewer at the beginning.

    Returns:
        The same steps; NaN if there was none.
    """
    trained = values[values.index > FIRST_STEP]
    # A step that was not measured is not drawn, even if its neighbours were.
    means = trained.rolling(window, min_periods=1).mean().where(trained.notna())
    smoothed: pd.Series = pd.concat([values[values.index <= FIRST_STEP], means])
    return smoothed


def window_for(n_steps: int, window: int) -> int:
    """The window of a trailing mean; 1 if the longest training has too few steps for two different means."""
    return window if n_steps >= window + FIRST_STEP + 1 else 1


def entropy_flow_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of fig. 2.

    Args:
        analyses: One analysis, or one for each panel.

    Returns:
        A row for each panel, layer and point (input, ATTN, FFN, output), then one for the `policy` and one for the
        `uniform` distribution's ln V, which have no layer. `position` is the x coordinate; entropies are in nats.
    """
    return _stack(analyses, _flow_rows)


def entropy_change_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of fig. 3.

    Args:
        analyses: One analysis, or one for each column of panels.

    Returns:
        A row for each panel, site (attn, ffn) and layer: the entropy change in nats, the layer's stage, and whether it
        is the boundary layer.
    """
    return _stack(analyses, _change_rows)


def change_parts_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the parts of every module's entropy change: what direction makes and what length makes.

    Args:
        analyses: One analysis, or one for each column of panels.

    Returns:
        A row for each panel, site (attn, ffn), layer and part (whole, direction, length): its `value` in nats, and
        `base`, at which its bar starts: a part of the same sign as the part before it is stacked on that; whether the
        layer is the `boundary` layer, and whether direction alone makes it so (`boundary_by_direction`).

    Raises:
        ValueError: An analysis is from before the parts were measured.
    """
    return _stack(analyses, _change_part_rows)


def residual_cosine_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of fig. 12.

    Args:
        analyses: One analysis, or one for each panel.

    Returns:
        A row for each panel, site (attn, ffn) and layer: the cosine similarity of what the module writes with the
        residual stream that it is added to.
    """
    return _stack(analyses, _cosine_rows)


def baseline_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of the grey lines in figs. 2 and 3: the same responses through random weights.

    Args:
        analyses: One analysis for each panel; those without a baseline have no rows.

    Returns:
        A row for each panel, site (layer, attn, ffn), layer and quantity (entropy at the output, change), with its
        `value` in nats.
    """
    parts = [pd.DataFrame(columns=["panel", "model", "lens", "layer", "site", "value", *_ERRORS, "quantity"])]
    for panel, analysis in enumerate(listed(analyses), start=1):
        if analysis.baseline is None:
            continue
        random = replace(analysis, layers=analysis.baseline)
        for site in ("layer", *SITE_LABELS):
            for quantity, column in (("entropy", "entropy_out"), ("change", "change")):
                rows = _site_rows(random, site, column, "value").assign(quantity=quantity)
                rows = rows.assign(panel=panel, model=analysis.name, lens=analysis.lens)
                parts.append(rows[parts[0].columns])
    return pd.concat(parts[1:] or parts, ignore_index=True)


def head_map_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of the maps of heads: the table ``heads`` of each analysis (`--heads`).

    Args:
        analyses: One analysis, or one for each row of panels; those without the table have no rows.

    Returns:
        A row for each panel, layer and head, with the columns of the table.
    """
    return _part_rows(analyses, "heads")


def expert_map_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of the maps of experts: the table ``experts`` of each analysis (`--heads`).

    Args:
        analyses: One analysis, or one for each row of panels; those without the table have no rows.

    Returns:
        A row for each panel, layer and expert, with the columns of the table.
    """
    return _part_rows(analyses, "experts")


def _part_rows(analyses: OneOrMany[Analysis], name: str) -> pd.DataFrame:
    """Return the table of parts of every analysis that has it, with the panel (from 1), model and lens."""
    parts = [pd.DataFrame(columns=["panel", "model", "lens"])]
    for panel, analysis in enumerate(listed(analyses), start=1):
        if (table := analysis.additions.get(name)) is not None:
            parts.append(table.assign(panel=panel, model=analysis.name, lens=analysis.lens))
    stacked = pd.concat(parts[1:] or parts, ignore_index=True)
    return stacked[[*parts[0].columns, *(c for c in stacked if c not in parts[0])]]


def stage_sketch_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of fig. 1c.

    Args:
        analyses: One analysis, or one for each strip.

    Returns:
        A row for each panel (the strip, from 1) and layer: its stage, where it starts and ends as a share of the depth,
        and whether it is the boundary layer.
    """
    return _stack(analyses, _stage_rows)


def divergence_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of the figure of divergences.

    Args:
        analyses: One analysis, or one for each panel, measured with ``--divergences``.

    Returns:
        A row for each panel, quantity (kl_policy, kl_next, top1) and layer, with its `value`: nats, or a share of the
        tokens.

    Raises:
        UserError: An analysis has no divergences.
    """
    return _stack(analyses, _divergence_rows)


def divergence_matrix_data(analyses: OneOrMany[Analysis]) -> pd.DataFrame:
    """Return the numbers of the heat map of divergences.

    Args:
        analyses: One analysis, or one for each panel, measured with ``--divergences``.

    Returns:
        A row for each panel, layer and other layer, with kl = KL(pi^layer || pi^other) in nats.

    Raises:
        UserError: An analysis has no divergences.
    """
    return _stack(analyses, lambda analysis: _addition(analysis, "divergence_matrix", "--divergences").copy())


def _stack(given: OneOrMany[Analysis], rows: Callable[[Analysis], pd.DataFrame]) -> pd.DataFrame:
    """Return the rows of every analysis under one another, with the panel (from 1), model and lens."""
    analyses = listed(given)
    require_some(analyses)
    parts = []
    for panel, analysis in enumerate(analyses, start=1):
        part = rows(analysis)
        part.insert(0, "panel", panel)
        part.insert(1, "model", analysis.name)
        part.insert(2, "lens", analysis.lens)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _site_rows(analysis: Analysis, site: str, column: str, name: str) -> pd.DataFrame:
    """Return a site's layers in order, with one of its statistics under `name`, its standard error and 95% interval."""
    rows = analysis.layers[analysis.layers["site"] == site].sort_values("layer")
    return pd.DataFrame(
        {
            "layer": rows["layer"].to_numpy(dtype="int64"),
            "site": site,
            name: rows[column].to_numpy(dtype=float),
            **{end: rows[f"{column}_{end}"].to_numpy(dtype=float) for end in _ERRORS},
        }
    )


def _flow_rows(analysis: Analysis) -> pd.DataFrame:
    parts = []
    for point, site, column, offset in FLOW_POINTS:
        part = _site_rows(analysis, site, column, "entropy").drop(columns="site")
        part.insert(1, "point", point)
        part.insert(2, "position", part["layer"] + offset)
        parts.append(part)
    frame = pd.concat(parts).sort_values("position", kind="stable").astype({"layer": "Int64"})
    policy = analysis.policy_entropy
    ends = pd.DataFrame(
        {
            "layer": pd.array([pd.NA, pd.NA], dtype="Int64"),
            "point": ["policy", "uniform"],
            "position": [analysis.n_layers + 0.5 + policy_gap(analysis.n_layers) / 2, np.nan],
            "entropy": [float(policy["mean"]), float(np.log(analysis.vocab_size))],
            **{end: [float(policy.get(end, np.nan)), np.nan] for end in _ERRORS},
        }
    )
    return pd.concat([frame, ends], ignore_index=True)


def policy_gap(n_layers: int) -> float:
    """Return the width of the strip after the last layer that shows the policy, in layers."""
    return max(1.0, 0.07 * n_layers)


def _change_rows(analysis: Analysis) -> pd.DataFrame:
    frame = pd.concat([_site_rows(analysis, site, "change", "change") for site in SITE_LABELS], ignore_index=True)
    frame["stage"] = [analysis.stages[layer - 1] for layer in frame["layer"]]
    frame["boundary"] = frame["layer"] == analysis.boundary_layer
    return frame


def _change_part_rows(analysis: Analysis) -> pd.DataFrame:
    if not has_parts(analysis.layers):
        raise ValueError(
            f"{analysis.name} was analysed before the parts of its changes were measured; analyse it again."
        )
    by_direction, parts = analysis.selection.sensitivity.get(DIRECTION), []
    for site in SITE_LABELS:
        below: list[pd.Series] = []
        for part, column in {"whole": "change", **PARTS}.items():
            rows = _site_rows(analysis, site, column, "value")
            rows.insert(2, "part", part)
            # The whole change is not stacked.
            rows["base"] = sum((other.where(other * rows["value"] > 0, 0.0) for other in below), start=0.0)
            if part != "whole":
                below.append(rows["value"])
            parts.append(rows)
    frame = pd.concat(parts, ignore_index=True)
    frame["boundary"] = frame["layer"] == analysis.boundary_layer
    frame["boundary_by_direction"] = frame["layer"] == by_direction
    return frame


def _stage_rows(analysis: Analysis) -> pd.DataFrame:
    layers = np.arange(1, analysis.n_layers + 1)
    ends = {"start": (layers - 1) / analysis.n_layers, "end": layers / analysis.n_layers}
    boundary = layers == analysis.boundary_layer
    return pd.DataFrame({"layer": layers, "stage": list(analysis.stages), **ends, "boundary": boundary})


def _cosine_rows(analysis: Analysis) -> pd.DataFrame:
    return pd.concat([_site_rows(analysis, site, "cosine", "cosine") for site in SITE_LABELS], ignore_index=True)


def _divergence_rows(analysis: Analysis) -> pd.DataFrame:
    table = _addition(analysis, "divergences", "--divergences").sort_values("layer")
    parts = [
        pd.DataFrame(
            {
                "layer": table["layer"].to_numpy(dtype="int64"),
                "quantity": quantity,
                "value": table[quantity].to_numpy(dtype=float),
                **{end: table[f"{quantity}_{end}"].to_numpy(dtype=float) for end in _ERRORS},
            }
        )
        for quantity in ("kl_policy", "kl_next", "top1")
    ]
    return pd.concat(parts, ignore_index=True)


def _addition(analysis: Analysis, name: str, option: str) -> pd.DataFrame:
    """Return the table of an addition, or say how it is measured."""
    if name not in analysis.additions:
        raise UserError(f"{analysis.name}: {name} was not measured; repeat the analysis with {option}, which adds it")
    return analysis.additions[name]


def require_some(analyses: Sequence[object]) -> None:
    """Refuse to draw nothing."""
    if not analyses:
        raise ValueError("Got no analysis; a figure needs at least one.")
