"""The charts of an analysis with ``--heads``: maps of what heads and routed experts write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from internal_policy.report.charts import Chart, finite

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

_MAPS = (
    ("heads", "head", "entropy", "Entropy of each head's write (nats)"),
    ("heads", "head", "attribution", "Attribution of each head to the sampled token (logits)"),
    ("experts", "expert", "load", "Load of each expert (share of the tokens)"),
    ("experts", "expert", "entropy", "Entropy of each expert's weighted write (nats)"),
)
_OTHER = {"head": "bias", "expert": "shared"}
_FORMS = {"entropy": ".3f", "attribution": "+.3f", "cosine": "+.3f", "rms": ".3f", "load": ".1%", "weight": ".3f"}
_UNITS = {"entropy": " nats", "attribution": " logits"}


def part_charts(analysis: Analysis) -> dict[str, Chart]:
    """Return the maps by the end of their id, such as ``heads-entropy``; none without ``--heads``."""
    charts: dict[str, Chart] = {}
    for name, part, quantity, title in _MAPS:
        table = analysis.additions.get(name)
        if table is None:
            continue
        rows = table[table[part] > 0] if quantity == "load" else table
        what = f"{title}: a map of layers, from left to right, and {name}, from top to bottom."
        chart = Chart(title, "Layer", part.capitalize(), what)
        _add_map(chart, rows, part, quantity, analysis.n_layers)
        charts[f"{name}-{quantity}"] = chart
    return charts


def _add_map(chart: Chart, rows: pd.DataFrame, part: str, quantity: str, n_layers: int) -> None:
    numbers = sorted(rows[part].unique(), key=lambda number: (number == 0, number))
    names = {number: str(number) if number else _OTHER[part] for number in numbers}
    layers = range(1, n_layers + 1)
    by_cell = rows.set_index([part, "layer"])
    grid = by_cell.reindex(pd.MultiIndex.from_product([numbers, layers], names=[part, "layer"]))
    values = pd.DataFrame(
        grid[quantity].to_numpy(dtype=float).reshape(len(numbers), n_layers),
        index=pd.Index([names[number] for number in numbers]),
        columns=pd.Index(layers),
    )
    others = [q for q in _FORMS if q in rows and q != quantity]
    columns = [f"{quantity}_low", f"{quantity}_high", *others]
    cells: list[list[Any]] = [finite(row) for row in grid[columns].to_numpy(dtype=float)]
    details = [cells[i : i + n_layers] for i in range(0, len(cells), n_layers)]
    form, unit = _FORMS[quantity], _UNITS.get(quantity, "")
    hover = f"layer %{{x}}, {part} %{{y}}<br>{quantity} %{{z:{form}}}{unit}"
    hover += f" [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]"
    for i, other in enumerate(others, start=2):
        hover += f"<br>{other} %{{customdata[{i}]:{_FORMS[other]}}}{_UNITS.get(other, '')}"
    chart.heat_map(values, hover, details, signed=quantity == "attribution")
    chart.layer_axis(n_layers)
