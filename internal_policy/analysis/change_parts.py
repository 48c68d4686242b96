"""How much of an entropy change is what a module says, and how much is how long its state is.

A projection without a norm reads the length of a state as an inverse temperature: a long state gives a sharp policy, a
short one a flat policy, whatever its direction. With X the input of a module and W what it writes,

    dH = [H(W |X|/|W|) - H(X)] + [H(W) - H(W |X|/|W|)]      direction + length

is an identity. The columns `change_direction` and `change_scale` of an analysis hold its two terms.
"""

from __future__ import annotations

import pandas as pd

from internal_policy.analysis.layer_selection import DIRECTION, Selection
from internal_policy.models.options import LENSES

PARTS = {"direction": "change_direction", "length": "change_scale"}
"""The parts of a change in the order they are stacked, and the column of each."""
_NORMING = ("logit-lens", "unit-norm")
"""Named lenses that norm every state, so that its length changes nothing."""
_ROUNDS_TO_A_PERCENT = 0.005
"""Shares below read as 0%. The epsilon of a norm leaves less: at most 0.0004 of a change on the embedded models."""


def has_parts(layers: pd.DataFrame) -> bool:
    """Whether the parts of the changes were measured; analyses from before they were lack the columns."""
    return all(column in layers and bool(layers[column].notna().any()) for column in PARTS.values())


def undoes_length(layers: pd.DataFrame, lens: str) -> bool:
    """Whether a lens undoes the length of a state, so that all of a change is direction.

    That is known of the named lenses. Of any other it was measured: `change_scale` compares the policies of each write
    and of each H^l at two lengths, and a lens that ends in a norm gives both the same.

    Args:
        layers: the table of that name of an analysis, with the parts of the changes.
        lens: the name of its lens.

    Returns:
        True if no layer and site has a `change_scale` above half a percent of the largest change; always for
        ``logit-lens`` and ``unit-norm``, never for ``policy``.
    """
    if lens in LENSES:
        return lens in _NORMING
    by_length, change = (float(layers[name].abs().max()) for name in ("change_scale", "change"))
    return by_length <= _ROUNDS_TO_A_PERCENT * change


def exploring_layers(selection: Selection) -> tuple[int, int] | None:
    """Find the exploration stage.

    Returns:
        Its first and its last layer, from 1: the run of exploring layers that ends with the boundary layer or, in a
        model that never turns, with layer L. None if the model never explores.
    """
    stages, last = selection.stages, selection.boundary_layer
    if last is None:
        if stages[-1] != "exploration":
            return None
        last = len(stages)
    first = last
    while first > 1 and stages[first - 2] == "exploration":
        first -= 1
    return first, last


def length_share(layers: pd.DataFrame, selection: Selection) -> float | None:
    """Share of the exploration that is length.

    Args:
        layers: the table of that name of an analysis.
        selection: its boundary layer and stages.

    Returns:
        Sum of the FFN's `change_scale` over the exploration stage (`exploring_layers`), divided by that of its
        `change`: below 0 if length takes away, above 1 if direction does. None if the parts were not measured or the
        model never explores.
    """
    found = _mean_parts(layers, selection)
    return None if found is None else found[1] / sum(found)


def length_sentence(layers: pd.DataFrame, selection: Selection, lens: str) -> str | None:
    """Say how much of the exploration is length, and which boundary layer direction alone gives.

    For example "61% of the exploration of layers 1-6 is length; by direction alone the boundary layer is 1". None if
    the parts were not measured, or if the lens undoes length.
    """
    if not has_parts(layers) or undoes_length(layers, lens):
        return None
    share = share_sentence(layers, selection)
    layer, other = selection.boundary_layer, selection.sensitivity.get(DIRECTION)
    if other is None:
        boundary = f"by direction alone there is no boundary layer{' either' if layer is None else ''}"
    else:
        boundary = f"by direction alone the boundary layer is {other}{' too' if other == layer else ''}"
        if layer is None:
            boundary += ", while the changes as measured give none"
    return boundary if share is None else f"{share}; {boundary}"


def boundary_texts(measured: int | None, by_direction: int | None) -> tuple[str, str]:
    """Name the boundary layer and that by direction alone in a figure, at length and in brief."""
    if measured is None and by_direction is None:
        return "no boundary layer, nor by direction", "no boundary layer"
    own = "no boundary layer" if measured is None else f"boundary layer {measured}"
    if measured == by_direction:
        other = "by direction too"
    else:
        other = f"by direction {'none' if by_direction is None else by_direction}"
    return f"{own}; {other}", f"{own.removeprefix('boundary ')}; {other}"


def share_sentence(layers: pd.DataFrame, selection: Selection) -> str | None:
    """Say how much of the exploration is length; None if the model never explores."""
    run, parts = exploring_layers(selection), _mean_parts(layers, selection)
    if run is None or parts is None:
        return None
    direction, length = parts
    share = length / (direction + length)
    exploration = f"the exploration of {f'layer {run[0]}' if run[0] == run[1] else f'layers {run[0]}-{run[1]}'}"
    if abs(share) < _ROUNDS_TO_A_PERCENT:
        return f"all of {exploration} is direction and none of it length"
    if abs(share - 1) < _ROUNDS_TO_A_PERCENT:
        return f"all of {exploration} is length and none of it direction"
    if share < 0:
        return (
            f"all of {exploration} is direction: of the {direction:.3g} nats per layer that direction adds, length "
            f"takes away {-length:.3g}"
        )
    if share > 1:
        return (
            f"all of {exploration} is length: of the {length:.3g} nats per layer that length adds, direction takes "
            f"away {-direction:.3g}"
        )
    return f"{share:.0%} of {exploration} is length"


def _mean_parts(layers: pd.DataFrame, selection: Selection) -> tuple[float, float] | None:
    """Mean direction and length part of the FFN's changes over the exploration stage, nats."""
    run = exploring_layers(selection)
    if run is None or not has_parts(layers):
        return None
    rows = layers[(layers["site"] == "ffn") & layers["layer"].between(*run)]
    direction, length = (float(rows[column].mean()) for column in PARTS.values())
    return direction, length
