"""Charts of the page, drawn by plotly: lines with bands, stages, marks; and the charts of an analysis.

A colour is a CSS variable of the page, ``var(--attn)``, or a place on a scale from 0 to 1, ``var(--shade-0.25)``. The
page's script replaces it by the colour of the light or dark theme, since plotly itself resolves no variables.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import plotly.graph_objects as go

from internal_policy.analysis.change_parts import PARTS, boundary_texts
from internal_policy.analysis.figure_data import SITE_LABELS, ModuleSite
from internal_policy.analysis.layer_selection import DIRECTION
from internal_policy.utils import palette

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.analysis.token_groups import TokenGroups
    from internal_policy.comparison.convergence import Convergence

_MAX_NAME = 36
"""Characters of a name next to a value, so that a phone has room for both."""
LEAST_DIVERGENCE = 1e-4
"""Nats that a logarithmic axis shows at least; float32 resolves little less."""
_MIN_WIDTH = 1.0
"""A line of fewer pixels has a thin sign in the key."""


def look(name: str) -> dict[str, Any]:
    """Return the arguments of `Chart.curve` for a key of `palette.LOOKS`: stream, attn, ffn, policy and so on."""
    known = palette.LOOKS[name]
    return {"color": f"var(--{name})", "dash": known.dash, "symbol": known.marker}


def series_look(index: int) -> dict[str, Any]:
    """Return the arguments of `Chart.curve` for one of several models or runs; `index` counts from 0."""
    known = palette.series(index)
    return {"color": f"var(--series{index % palette.N_COLOURS + 1})", "dash": known.dash, "symbol": known.marker}


def shade(index: int, n: int) -> str:
    """Return the colour of one of n steps, from dark to bright on paper; `index` counts from 0."""
    return f"var(--shade-{index / max(n - 1, 1):.3f})"


def escape_name(value: Any) -> str:
    """Escape a name, as plotly takes the texts of a figure for markup, and leave out the middle of a long one."""
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    # Quotes are no markup between tags, and plotly shows &quot; as it is.
    return html.escape(text if len(text) <= _MAX_NAME else f"{text[:16]}…{text[-19:]}", quote=False)


def finite(values: Iterable[Any]) -> list[float | None]:
    """Return numbers as JSON can hold them: rounded to six decimals, and None where one is missing or infinite."""
    numbers = (math.nan if value is None or pd.isna(value) else float(value) for value in values)
    return [round(number, 6) if math.isfinite(number) else None for number in numbers]


@dataclass
class Chart:
    """A figure of plotly, and the key of its lines that the page shows above it."""

    title: str
    x: str
    """Title of the horizontal axis."""
    y: str
    """Title of the vertical axis."""
    description: str
    """What a screen reader says instead of the figure."""
    single: bool = False
    """Whether the title says everything, and a key would only repeat it."""
    figure: go.Figure = field(default_factory=go.Figure)
    key: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figure.update_layout(xaxis_title_text=self.x, yaxis_title={"text": self.y, "standoff": 12})

    def curve(
        self,
        name: str,
        x: Iterable[Any],
        y: Iterable[Any],
        ends: tuple[Iterable[Any], Iterable[Any]] = ((), ()),
        *,
        color: str,
        dash: str = "solid",
        symbol: str = "circle",
        shown: bool = True,
        markers: bool = True,
        band: bool = True,
        hover: bool = True,
        format: str = ".3f",
        unit: str = " nats",
        width: float = 2,
    ) -> None:
        """Add a line with its 95% intervals, whose lower and upper ends are `ends`.

        `shown` says whether the line is drawn before the reader asks for it, `markers` whether its points are marked,
        `band` whether the intervals are drawn (the hover text has them in any case), and `hover` whether pointing at
        the line shows its values, in `format` and `unit`. `dash` and `symbol` are plotly's names; `width` is in pixels.
        """
        x, y, low, high = finite(x), finite(y), finite(ends[0]), finite(ends[1])
        common: dict[str, Any] = {"name": escape_name(name), "showlegend": False, "visible": None if shown else False}
        known = [i for i in range(len(low)) if None not in (x[i], low[i], high[i])]
        first = len(self.figure.data)
        if band and len(known) > 1:
            around = [*known, *reversed(known)]
            edge = [high[i] for i in known] + [low[i] for i in reversed(known)]
            area = {"x": [x[i] for i in around], "y": edge, "fill": "toself", "fillcolor": color, "opacity": 0.16}
            self.figure.add_scatter(**common, **area, mode="lines", line_width=0, hoverinfo="skip")
        template = f"%{{fullData.name}} %{{y:{format}}}{unit}"
        if known:
            template += f" [%{{customdata[0]:{format}}}, %{{customdata[1]:{format}}}]"
            common["customdata"] = [list(pair) for pair in zip(low, high, strict=True)]
        self.figure.add_scatter(
            **common,
            **({"hovertemplate": f"{template}<extra></extra>"} if hover else {"hoverinfo": "skip"}),
            x=x,
            y=y,
            mode="lines+markers" if markers else "lines",
            line={"color": color, "dash": dash, "width": width},
            # Markers that touch hide the lines and one another.
            marker={"symbol": symbol, "size": 6 if len(x) <= 16 else 4 if len(x) <= 40 else 3, "color": color},
        )
        self._add_key(name, color, dash if width >= _MIN_WIDTH else f"{dash} thin", first, shown)

    def points(
        self, name: str, x: Iterable[Any], y: Iterable[Any], color: Any, what: str, size: int = 12, **more: Any
    ) -> None:
        """Add markers without a line, in one colour or one for each, of `size` pixels.

        `what` is a key of `palette.LOOKS`, whose marker they have; `more` are properties of
        `plotly.graph_objects.Scatter`.
        """
        symbol, first = palette.LOOKS[what].marker, len(self.figure.data)
        marker = {"symbol": symbol, "size": size, "color": color, **more.pop("marker", {})}
        self.figure.add_scatter(
            x=list(x), y=list(y), mode="markers", name=escape_name(name), marker=marker, showlegend=False, **more
        )
        self._add_key(name, color if isinstance(color, str) else "var(--fg)", symbol, first)

    def bars(
        self, name: str, x: Iterable[Any], y: Iterable[Any], ends: tuple[Iterable[Any], Iterable[Any]], what: str
    ) -> None:
        """Add bars with their 95% intervals, stacked on those added before: up if positive, down if negative.

        `what` is a key of `palette.LOOKS`.
        """
        hatched, color, first = palette.LOOKS[what].hatched, f"var(--{what})", len(self.figure.data)
        x, y, low, high = finite(x), finite(y), finite(ends[0]), finite(ends[1])
        more: dict[str, Any] = {}
        template = "%{fullData.name} %{y:+.3f} nats"
        if not {None} & {*y, *low, *high}:
            spans = pd.DataFrame({"value": y, "low": low, "high": high}, dtype=float)
            more["error_y"] = {
                "type": "data",
                "symmetric": False,
                "array": finite(spans["high"] - spans["value"]),
                "arrayminus": finite(spans["value"] - spans["low"]),
                **{"color": "var(--fg)", "thickness": 1, "width": 2},
            }
            more["customdata"] = [list(pair) for pair in zip(low, high, strict=True)]
            template += " [%{customdata[0]:+.3f}, %{customdata[1]:+.3f}]"
        marker: dict[str, Any] = {"color": color, "line": {"color": color, "width": 1}}
        if hatched:
            marker["pattern"] = {"shape": "/", "fillmode": "replace", "size": 6, "solidity": 0.25}
        self.figure.add_bar(
            x=x,
            y=y,
            name=escape_name(name),
            showlegend=False,
            marker=marker,
            hovertemplate=f"{template}<extra></extra>",
            **more,
        )
        self.figure.update_layout(barmode="relative", bargap=0.28)
        self._add_key(name, color, "hatched" if hatched else "filled", first)

    def heat_map(
        self, table: pd.DataFrame, hover: str, details: Sequence[Sequence[Any]], *, signed: bool = False
    ) -> None:
        """Add a map of a table, its first row at the top, instead of lines; zero is the middle of `signed` values.

        `hover` is plotly's template of the text at a cell; the cell's `details` are its customdata.
        """
        values = table.to_numpy(dtype=float)
        reach = max((abs(v) for v in values.ravel() if math.isfinite(v)), default=1.0) or 1.0
        limits = {"zmin": -reach, "zmax": reach, "colorscale": "RdBu", "reversescale": True} if signed else {}
        self.figure.add_heatmap(
            x=[int(column) for column in table.columns],
            y=[str(name) for name in table.index],
            z=[finite(row) for row in values],
            customdata=details,
            hovertemplate=f"{hover}<extra></extra>",
            hoverongaps=False,
            colorbar={"thickness": 12, "outlinewidth": 0},
            **{"colorscale": "Viridis", **limits},
        )
        self.figure.update_yaxes(type="category", autorange="reversed")
        self.single = True

    def _add_key(self, name: str, color: str, sign: str, first: int, shown: bool = True) -> None:
        traces = list(range(first, len(self.figure.data)))
        self.key.append({"name": str(name), "color": color, "sign": sign, "traces": traces, "shown": shown})

    def shade(self, first: float, last: float, color: str, opacity: float = 1.0) -> None:
        """Shade a span of the horizontal axis over the whole height."""
        area = {"fillcolor": color, "opacity": opacity, "line_width": 0, "layer": "below"}
        self.figure.add_shape(type="rect", x0=first, x1=last, y0=0, y1=1, yref="paper", **area)

    def stages(self, stages: Sequence[str]) -> None:
        """Shade the layers of each stage; `stages` are those of layers 1..L."""
        start = 1
        for layer, stage in enumerate(stages, start=1):
            if layer == len(stages) or stages[layer] != stage:
                self.shade(start - 0.5, layer + 0.5, f"var(--{stage})")
                start = layer + 1

    def mark(self, at: float, text: str, what: str) -> None:
        """Draw a vertical line with its name, unless that is empty; `what` is its key in `palette.LOOKS`."""
        line = {"color": f"var(--{what})", "width": 1.5, "dash": palette.LOOKS[what].dash}
        self.figure.add_shape(type="line", x0=at, x1=at, y0=0, y1=1, yref="paper", line=line)
        if text:
            self._write_above(text, x=at)

    def note(self, text: str) -> None:
        """Write a text above the middle of the figure."""
        self._write_above(text, x=0.5, xref="paper")

    def _write_above(self, text: str, **place: Any) -> None:
        place |= {"y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        self.figure.add_annotation(text=escape_name(text), font_color="var(--fg)", **place)

    def level(self, at: float, *, dash: palette.Dash = "dot") -> None:
        """Draw a horizontal line behind the curves."""
        line = {"color": "var(--neutral)", "width": 1, "dash": dash}
        self.figure.add_shape(type="line", x0=0, x1=1, xref="paper", y0=at, y1=at, line=line, layer="below")

    def set_x_axis(self, **properties: Any) -> None:
        """Set properties of the horizontal axis, and of no second one."""
        self.figure.update_layout(xaxis=properties)

    def layer_axis(self, n_layers: int, after: float = 0.5) -> None:
        """Make the horizontal axis one of layers 1..L, with room after the last."""
        step = next((s for s in (1, 2, 4, 5, 10, 20) if n_layers / s <= 9), max(1, n_layers // 8))
        between = [layer for layer in range(step, n_layers, step) if layer > 1 and n_layers - layer >= 0.6 * step]
        ticks = list(dict.fromkeys([1, *between, n_layers]))
        self.set_x_axis(range=[0.5, n_layers + after], tickformat="d", hoverformat="d", tickvals=ticks)

    def depth_axis(self) -> None:
        """Make the horizontal axis one of relative depths from 0 to 1."""
        self.set_x_axis(range=[-0.02, 1.02], hoverformat=".3f")

    def spec(self) -> dict[str, Any]:
        """Return what the page's script draws, as JSON-able data."""
        spec = self.figure.to_plotly_json()
        # The page's own theme decides what plotly's template would.
        layout = {name: value for name, value in spec["layout"].items() if name != "template"}
        return {"traces": spec["data"], "layout": layout, "key": self.key, "single": self.single}


_FLOW = (
    ("layer output", "layer", "entropy_out", "stream", True),
    ("layer input", "layer", "entropy_in", "stream", True),
    ("ATTN output", "attn", "entropy_out", "attn", True),
    ("ATTN input", "attn", "entropy_in", "attn", False),
    ("FFN output", "ffn", "entropy_out", "ffn", True),
    ("FFN input", "ffn", "entropy_in", "ffn", False),
)
_CHANGES = (("layer", "layer", "stream"), ("ATTN", "attn", "attn"), ("FFN", "ffn", "ffn"))


def flow_chart(analysis: Analysis) -> Chart:
    """Draw the entropies at the input and output of each layer and module, as fig. 2 of the paper."""
    what = "Entropy of the internal policies at the input and output of each layer, attention and FFN, over the layers."
    chart = Chart("Entropy flow", "Layer", "Entropy (nats)", what)
    chart.stages(analysis.stages)
    for name, site, column, key, shown in _FLOW:
        drawn = look(key)
        if column == "entropy_in":
            drawn |= {"dash": "dot", "symbol": f"{drawn['symbol']}-open"}
        _add_site(chart, analysis, name, site, column, shown=shown, **drawn)
    _add_baseline(chart, analysis, "layer output", "layer", "entropy_out")
    after = 0.5 + max(1.0, 0.07 * analysis.n_layers)
    _add_policy(chart, analysis.n_layers + after / 2 + 0.25, analysis.policy_entropy)
    span, top = [0.5, analysis.n_layers + after], [math.log(analysis.vocab_size)] * 2
    chart.curve("uniform, ln V", span, top, markers=False, hover=False, **look("uniform"))
    chart.layer_axis(analysis.n_layers, after)
    chart.figure.update_yaxes(rangemode="tozero")
    _mark_boundary(chart, analysis)
    return chart


def change_chart(analysis: Analysis) -> Chart:
    """Draw the entropy change that each layer and module makes, as fig. 3 of the paper."""
    what = "Entropy change that each layer, its attention and its FFN make, over the layers."
    chart = Chart("Entropy change", "Layer", "Entropy change (nats)", what)
    chart.stages(analysis.stages)
    chart.level(0.0, dash="solid")
    for name, site, key in _CHANGES:
        _add_site(chart, analysis, name, site, "change", format="+.3f", **look(key))
    for name, site, _ in reversed(_CHANGES):
        _add_baseline(chart, analysis, name, site, "change", shown=site == "ffn", format="+.3f")
    chart.layer_axis(analysis.n_layers)
    _mark_boundary(chart, analysis)
    return chart


def group_chart(groups: TokenGroups) -> Chart:
    """Draw the entropy change that the FFN of each layer makes at the tokens of each group."""
    what = f"Entropy change that the FFN makes over the layers, a line for each group of tokens by {groups.grouping}."
    title = f"Entropy change by the FFN, tokens by {groups.grouping}"
    chart = Chart(title, "Layer", "Entropy change (nats)", what)
    chart.stages(groups.stages)
    chart.level(0.0, dash="solid")
    n, table = len(groups.groups), groups.layers[groups.layers["site"] == "ffn"]
    ordered = groups.grouping == "position"
    for index, group in enumerate(groups.groups):
        rows = table[table["group"] == group]
        drawn: dict[str, Any] = {"color": shade(index, n)} if ordered else series_look(index)
        ends = (rows["change_low"], rows["change_high"])
        # Bands of ten lines would hide them.
        chart.curve(group, rows["layer"], rows["change"], ends, format="+.3f", band=not ordered, **drawn)
    chart.layer_axis(groups.n_layers)
    return chart


def parts_chart(analysis: Analysis, site: ModuleSite) -> Chart:
    """Draw the entropy changes of attention or FFN, stacked into what direction makes and what length makes."""
    name = SITE_LABELS[site]
    what = f"Entropy change that each {name} makes, as bars of its direction part and its length part, over the layers."
    chart = Chart(f"Parts of the entropy change of {name}", "Layer", f"ΔH {name} (nats)", what)
    rows = analysis.layers[analysis.layers["site"] == site].sort_values("layer")
    chart.level(0.0, dash="solid")
    for part, column in PARTS.items():
        chart.bars(f"{part} part", rows["layer"], rows[column], (rows[f"{column}_low"], rows[f"{column}_high"]), part)
    drawn = {**look("stream"), "symbol": "diamond"}
    _add_site(chart, analysis, "whole change", site, "change", format="+.3f", band=False, width=1, **drawn)
    chart.layer_axis(analysis.n_layers)
    if site == "attn":
        _mark_boundary(chart, analysis)
        return chart
    measured, by_direction = analysis.boundary_layer, analysis.selection.sensitivity.get(DIRECTION)
    for layer, key in ((measured, "boundary"), (None if by_direction == measured else by_direction, "direction")):
        if layer is not None:
            chart.mark(layer, "", key)
    # Two names next to each other would overlap.
    chart.note(boundary_texts(measured, by_direction)[0])
    return chart


def fall_chart(convergence: Convergence) -> Chart:
    """Draw how much of the drop has fallen by each relative depth."""
    what = "Share of the total drop of the entropy that has fallen by each relative depth."
    chart = Chart("Share of the drop so far", "Relative depth, layer / L", "Share of the drop", what)
    chart.level(0.5)
    table = convergence.curve
    ends = (table["low"], table["high"])
    chart.curve("fallen", table["relative_depth"], table["fallen"], ends, format=".2f", unit="", **look("stream"))
    if convergence.n_layers > 1:
        x = [1 / convergence.n_layers, 1.0]
        chart.curve("even fall", x, [0.0, 1.0], markers=False, hover=False, **look("neutral"))
    chart.depth_axis()
    return chart


def divergence_chart(table: pd.DataFrame) -> Chart:
    """Draw how far each layer's policy is from the final one and from the next; `table` is the addition's."""
    what = "Divergence of each layer's policy from the final policy and from the policy of the next layer."
    chart = Chart("Divergence", "Layer", "Divergence (nats)", what)
    rows = table.sort_values("layer")
    for name, column, key in (("KL(π_θ‖π^l)", "kl_policy", "policy"), ("KL(π^l‖π^(l+1))", "kl_next", "stream")):
        # A logarithmic axis has no place for the divergence of a policy from itself.
        known = rows[column] >= LEAST_DIVERGENCE
        ends = rows[f"{column}_low"].clip(lower=LEAST_DIVERGENCE).where(known), rows[f"{column}_high"].where(known)
        chart.curve(name, rows["layer"], rows[column].where(known), ends, **look(key))
    chart.layer_axis(len(rows))
    chart.figure.update_yaxes(type="log", dtick=1)
    return chart


def agreement_chart(table: pd.DataFrame) -> Chart:
    """Draw in which share of the tokens a layer's policy has the top token of the final one."""
    what = "Share of the tokens whose most probable token is the same under each layer's policy and the final one."
    chart = Chart("Same top token as the final policy", "Layer", "Share of the tokens", what, single=True)
    rows = table.sort_values("layer")
    ends = rows["top1_low"], rows["top1_high"]
    chart.curve("same top token", rows["layer"], rows["top1"], ends, format=".1%", unit="", **look("policy"))
    chart.layer_axis(len(rows))
    chart.figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    return chart


def _add_site(chart: Chart, analysis: Analysis, name: str, site: str, column: str, **drawn: Any) -> None:
    rows = analysis.layers[analysis.layers["site"] == site].sort_values("layer")
    chart.curve(name, rows["layer"], rows[column], (rows[f"{column}_low"], rows[f"{column}_high"]), **drawn)


def _add_baseline(chart: Chart, analysis: Analysis, name: str, site: str, column: str, **drawn: Any) -> None:
    """Draw the same quantity with random weights, in grey, if that was measured."""
    if analysis.baseline is not None:
        random = replace(analysis, layers=analysis.baseline)
        _add_site(chart, random, f"random weights, {name}", site, column, color="var(--muted)", symbol="x", **drawn)


def _add_policy(chart: Chart, x: float, entropy: Mapping[str, Any]) -> None:
    """Mark the entropy of the final policy, with its interval, at a position that the axis has no number for."""
    color, template = "var(--policy)", "%{fullData.name} %{y:.3f} nats"
    more: dict[str, Any] = {}
    mean, low, high = finite([entropy.get(name) for name in ("mean", "low", "high")])
    if mean is not None and low is not None and high is not None:
        bar = {"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "color": color}
        more = {"error_y": bar, "customdata": [[low, high]]}
        template += " [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
    more["hovertemplate"] = f"{template}<extra></extra>"
    chart.points("policy π_θ", [x], [mean], color, "policy", xaxis="x2", **more)
    # The title of a hover text is the text of the tick there, and an axis that is not visible has no ticks.
    unseen: dict[str, Any] = dict.fromkeys(("showticklabels", "showline", "showgrid", "zeroline"), False)
    axis = {"tickvals": [x], "ticktext": ["final policy"], "ticks": "", "overlaying": "x", "matches": "x"}
    chart.figure.update_layout(xaxis2={**unseen, **axis})


def _mark_boundary(chart: Chart, analysis: Analysis) -> None:
    if analysis.boundary_layer is not None:
        chart.mark(analysis.boundary_layer, f"boundary layer {analysis.boundary_layer}", "boundary")
