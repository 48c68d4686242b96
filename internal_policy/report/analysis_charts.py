"""The figures of an analysis: entropy flow, entropy change, and how much of the drop has fallen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from internal_policy.report.charts import Chart, look, point

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.comparison.convergence import Convergence

_SITES = (
    ("layer output", "layer", "entropy_out", "stream", True),
    ("layer input", "layer", "entropy_in", "stream", True),
    ("ATTN output", "attn", "entropy_out", "attn", True),
    ("ATTN input", "attn", "entropy_in", "attn", False),
    ("FFN output", "ffn", "entropy_out", "ffn", True),
    ("FFN input", "ffn", "entropy_in", "ffn", False),
)
_CHANGES = (("layer", "layer", "stream"), ("ATTN", "attn", "attn"), ("FFN", "ffn", "ffn"))


def flow_chart(analysis: Analysis) -> Chart:
    """Draw the entropies at the input and output of each layer and module, as fig. 2 of the paper.

    Args:
        analysis: the analysis.

    Returns:
        The figure.
    """
    chart = Chart(
        "Entropy flow",
        "Layer",
        "Entropy (nats)",
        "Entropy of the internal policies at the input and output of each layer, attention and FFN, over the layers.",
    )
    chart.stages(analysis.stages)
    for name, site, column, what, shown in _SITES:
        drawn = look(what)
        if column == "entropy_in":
            drawn |= {"dash": "dot", "symbol": f"{drawn['symbol']}-open"}
        _curve(chart, analysis, name, site, column, shown=shown, **drawn)
    _baseline(chart, analysis, "layer output", "layer", "entropy_out")
    after = 0.5 + max(1.0, 0.07 * analysis.n_layers)
    beyond = analysis.n_layers + after / 2 + 0.25
    point(chart, "policy π_θ", beyond, analysis.policy_entropy, what="policy", title="final policy")
    top = [float(np.log(analysis.vocab_size))] * 2
    ends_of_axis = [0.5, analysis.n_layers + after]
    chart.curve("uniform, ln V", ends_of_axis, top, marks=False, hover=False, **look("uniform"))
    chart.layers(analysis.n_layers, after)
    chart.y_axis["rangemode"] = "tozero"
    _mark_boundary(chart, analysis)
    return chart


def change_chart(analysis: Analysis) -> Chart:
    """Draw the entropy change that each layer and module makes, as fig. 3 of the paper.

    Args:
        analysis: the analysis.

    Returns:
        The figure.
    """
    chart = Chart(
        "Entropy change",
        "Layer",
        "Entropy change (nats)",
        "Entropy change that each layer, its attention and its FFN make, over the layers.",
    )
    chart.stages(analysis.stages)
    chart.level(0.0, dash="solid")
    for name, site, what in _CHANGES:
        _curve(chart, analysis, name, site, "change", form="+.3f", **look(what))
    for name, site, _ in reversed(_CHANGES):
        _baseline(chart, analysis, name, site, "change", shown=site == "ffn", form="+.3f")
    chart.layers(analysis.n_layers)
    _mark_boundary(chart, analysis)
    return chart


def fall_chart(convergence: Convergence) -> Chart:
    """Draw how much of the drop has fallen by each layer.

    Args:
        convergence: the measures.

    Returns:
        The figure.
    """
    chart = Chart(
        "Share of the drop so far",
        "Relative depth, layer / L",
        "Share of the drop",
        "Share of the total drop of the entropy that has fallen by each relative depth.",
    )
    table = convergence.curve
    chart.level(0.5)
    depth, ends = table["relative_depth"], (table["low"], table["high"])
    chart.curve("fallen", depth, table["fallen"], ends, form=".2f", unit="", **look("stream"))
    if convergence.n_layers > 1:
        x = [1 / convergence.n_layers, 1.0]
        chart.curve("even fall", x, [0.0, 1.0], marks=False, hover=False, **look("neutral"))
    chart.x_axis |= {"range": [-0.02, 1.02], "hoverformat": ".3f"}
    return chart


def _curve(chart: Chart, analysis: Analysis, name: str, site: str, column: str, **drawn: Any) -> None:
    rows = analysis.layers[analysis.layers["site"] == site].sort_values("layer")
    chart.curve(name, rows["layer"], rows[column], (rows[f"{column}_low"], rows[f"{column}_high"]), **drawn)


def _baseline(chart: Chart, analysis: Analysis, name: str, site: str, column: str, **drawn: Any) -> None:
    """The same through random weights, in grey, where that was measured."""
    if analysis.baseline is not None:
        random = replace(analysis, layers=analysis.baseline)
        _curve(chart, random, f"random weights, {name}", site, column, colour="$muted", symbol="x", **drawn)


def _mark_boundary(chart: Chart, analysis: Analysis) -> None:
    if analysis.boundary_layer is not None:
        chart.mark(analysis.boundary_layer, f"boundary layer {analysis.boundary_layer}", "boundary")
