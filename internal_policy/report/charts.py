"""Figures for plotly as plain data: traces, bands, shading; colours by name, so that the page's theme decides them.

``$attn`` in a colour is the page's CSS variable ``--attn``; ``$attn/0.2`` is the same with that opacity.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from internal_policy.report.numbers import plain, plain_all
from internal_policy.utils import palette

_LONGEST = 36
"""Characters of a name beside a value, where a phone has room for both."""
_THIN = 1.0
"""Below so many pixels a line has a thin sign in the key."""


def look(name: str) -> dict[str, Any]:
    """Say how a thing of `palette` is drawn.

    Args:
        name: stream, attn, ffn, policy or another key of `palette.LOOKS`.

    Returns:
        Arguments of `Chart.curve`.
    """
    known = palette.LOOKS[name]
    return {"colour": f"${name}", "dash": known.dash, "symbol": known.marker}


def series_look(index: int) -> dict[str, Any]:
    """Say how one of several models or runs is drawn.

    Args:
        index: its place, from 0.

    Returns:
        Arguments of `Chart.curve`.
    """
    known = palette.series(index)
    return {"colour": f"$series{index % palette.N_COLOURS + 1}", "dash": known.dash, "symbol": known.marker}


def label(value: Any) -> str:
    """Escape a name: plotly takes the texts of a figure for markup.

    Args:
        value: the name.

    Returns:
        Text in which every character stands for itself; the middle of a long one is left out, as it tells least.
    """
    text = str(value).encode("utf-8", "replace").decode("utf-8")
    # Quotes are no markup between tags, and plotly shows &quot; as it is.
    return html.escape(text if len(text) <= _LONGEST else f"{text[:16]}…{text[-19:]}", quote=False)


@dataclass
class Chart:
    """One figure: what plotly draws, and the key that the page shows above it."""

    title: str
    x: str
    y: str
    described: str
    """What a reader hears who does not see it."""
    traces: list[dict[str, Any]] = field(default_factory=list)
    key: list[dict[str, Any]] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    x_axis: dict[str, Any] = field(default_factory=dict)
    y_axis: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    """A second horizontal axis, unseen, for what has a position but no number on the first."""
    plain: bool = False
    """Whether the title says all, and a key would only repeat it."""

    def curve(
        self,
        name: str,
        x: Sequence[Any] | pd.Series,
        y: Sequence[Any] | pd.Series,
        ends: tuple[Sequence[Any] | pd.Series, Sequence[Any] | pd.Series] | None = None,
        *,
        colour: str,
        dash: str = "solid",
        symbol: str = "circle",
        shown: bool = True,
        marks: bool = True,
        band: bool = True,
        hover: bool = True,
        form: str = ".3f",
        unit: str = " nats",
        width: float = 2,
    ) -> None:
        """Add a line with its 95% intervals.

        Args:
            name: of the line, as text.
            x: positions.
            y: values.
            ends: lower and upper ends of the intervals.
            colour: of both.
            dash: of the line.
            symbol: of the marks.
            shown: whether it is drawn before the reader asks for it.
            marks: whether the points are marked.
            band: whether the intervals are drawn; the hover text has them anyway.
            hover: whether pointing at it tells its values.
            form: of the numbers in the hover text.
            unit: of the values.
            width: of the line, pixels.
        """
        here, values = plain_all(x), plain_all(y)
        low, high = ([], []) if ends is None else (plain_all(ends[0]), plain_all(ends[1]))
        hidden = {} if shown else {"visible": False}
        places = []
        known = [i for i in range(len(low)) if None not in (here[i], low[i], high[i])]
        if band and len(known) > 1:
            around = [*known, *reversed(known)]
            edge = [high[i] for i in known] + [low[i] for i in reversed(known)]
            area = {"x": [here[i] for i in around], "y": edge, "fill": "toself", "fillcolor": f"{colour}/0.16"}
            outline = {
                "type": "scatter",
                "mode": "lines",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "name": label(name),
            }
            places.append(len(self.traces))
            self.traces.append({**outline, **area, "showlegend": False, **hidden})
        template = f"%{{fullData.name}} %{{y:{form}}}{unit}"
        extra: dict[str, Any] = {}
        if known:
            template += f" [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]"
            extra["customdata"] = [[a, b] for a, b in zip(low, high, strict=True)]
        drawn = {"type": "scatter", "mode": "lines+markers" if marks else "lines", "name": label(name)}
        line = {"color": colour, "dash": dash, "width": width}
        places.append(len(self.traces))
        self.traces.append(
            {
                **{**drawn, "x": here, "y": values, "line": line, "showlegend": False},
                **{"marker": {"symbol": symbol, "size": _mark_size(len(here)), "color": colour}, **extra},
                **({"hovertemplate": f"{template}<extra></extra>"} if hover else {"hoverinfo": "skip"}),
                **hidden,
            }
        )
        sign = dash if width >= _THIN else f"{dash} thin"
        self.key.append({"name": str(name), "colour": colour, "dash": sign, "traces": places, "shown": shown})

    def shade(self, first: float, last: float, colour: str) -> None:
        """Shade positions over the whole height.

        Args:
            first: where it starts.
            last: where it ends.
            colour: of the shading.
        """
        area = {"type": "rect", "xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1}
        self.shapes.append({**area, "fillcolor": colour, "line": {"width": 0}, "layer": "below"})

    def stages(self, stages: Sequence[str]) -> None:
        """Shade the layers of each stage.

        Args:
            stages: of layers 1..L.
        """
        start = 1
        for layer, stage in enumerate(stages, start=1):
            if layer == len(stages) or stages[layer] != stage:
                self.shade(start - 0.5, layer + 0.5, f"${stage}")
                start = layer + 1

    def mark(self, at: float, text: str, what: str) -> None:
        """Draw a vertical line with its name.

        Args:
            at: where.
            text: the name, as text.
            what: boundary or switch, of `palette.LOOKS`.
        """
        colour, dash = f"${what}", palette.LOOKS[what].dash
        line = {"type": "line", "xref": "x", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1}
        self.shapes.append({**line, "line": {"color": colour, "width": 1.5, "dash": dash}})
        note = {"x": at, "xref": "x", "y": 1.0, "yref": "paper", "yanchor": "bottom", "showarrow": False}
        self.notes.append({**note, "text": label(text), "font": {"color": "$fg"}})

    def level(self, at: float, *, dash: palette.Dash = "dot") -> None:
        """Draw a horizontal line.

        Args:
            at: where.
            dash: of the line.
        """
        line = {"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": at, "y1": at}
        self.shapes.append({**line, "line": {"color": "$neutral", "width": 1, "dash": dash}, "layer": "below"})

    def layers(self, n_layers: int, after: float = 0.5) -> None:
        """Make the horizontal axis one of layers.

        Args:
            n_layers: L.
            after: room after the last layer.
        """
        self.x_axis |= {"range": [0.5, n_layers + after], "tickformat": "d", "hoverformat": "d"}
        step = next((s for s in (1, 2, 4, 5, 10, 20) if n_layers / s <= 9), max(1, n_layers // 8))
        between = [layer for layer in range(step, n_layers, step) if layer > 1 and n_layers - layer >= 0.6 * step]
        self.x_axis |= {"tickvals": list(dict.fromkeys([1, *between, n_layers]))}

    def spec(self) -> dict[str, Any]:
        """Return what the page draws.

        Returns:
            JSON-able data.
        """
        x_axis: Mapping[str, Any] = {"title": {"text": self.x}, **self.x_axis}
        y_axis: Mapping[str, Any] = {"title": {"text": self.y, "standoff": 12}, **self.y_axis}
        layout: dict[str, Any] = {"xaxis": x_axis, "yaxis": y_axis, "shapes": self.shapes, "annotations": self.notes}
        if self.beside:
            # An axis that is not visible has no ticks at all, and so no texts for them.
            unseen: dict[str, Any] = dict.fromkeys(("showticklabels", "showline", "showgrid", "zeroline"), False)
            layout["xaxis2"] = {**self.beside, **unseen, "ticks": "", "overlaying": "x", "matches": "x"}
        return {"traces": self.traces, "layout": layout, "key": self.key, "plain": self.plain}


def _mark_size(n: int) -> int:
    """Pixels; marks that touch hide the lines and one another."""
    return 6 if n <= 16 else 4 if n <= 40 else 3


def point(chart: Chart, name: str, x: float, row: Mapping[str, Any], *, what: str, title: str) -> None:
    """Add one value with its interval, at a position that the axis has no number for.

    Args:
        chart: where.
        name: of the value, as text.
        x: its position.
        row: mean, and low and high where they are known, nats.
        what: policy or another key of `palette.LOOKS`.
        title: of the hover text, in place of the position.
    """
    colour, symbol = f"${what}", palette.LOOKS[what].marker
    mean, low, high = (plain(row.get(key)) for key in ("mean", "low", "high"))
    template, extra = "%{fullData.name} %{y:.3f} nats", {}
    if mean is not None and low is not None and high is not None:
        bar = {"type": "data", "symmetric": False, "array": [high - mean], "arrayminus": [mean - low], "color": colour}
        extra = {"error_y": bar, "customdata": [[low, high]]}
        template += " [%{customdata[0]:.3f}, %{customdata[1]:.3f}]"
    mark = {"symbol": symbol, "size": 12, "color": colour}
    # The title of a hover text is the text of the tick at its position, on the axis of its line.
    chart.beside |= {"tickvals": [x], "ticktext": [title]}
    drawn = {"type": "scatter", "mode": "markers", "name": label(name), "marker": mark}
    chart.key.append({"name": name, "colour": colour, "dash": symbol, "traces": [len(chart.traces)], "shown": True})
    chart.traces.append(
        {
            **{**drawn, "x": [x], "y": [mean], "xaxis": "x2", **extra},
            **{"hovertemplate": f"{template}<extra></extra>", "showlegend": False},
        }
    )
