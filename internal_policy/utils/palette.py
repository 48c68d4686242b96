"""How each thing looks wherever it is shown: figures, pages and the terminal read the same table.

Dashes and markers have plotly's names; `style` translates them for matplotlib. Colours have the hues of Okabe and Ito,
which colour-blind readers can distinguish, in one shade for white pages and one for black.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Dash = Literal["solid", "dash", "dot", "dashdot"]
Marker = Literal["circle", "square", "triangle-up", "triangle-down", "diamond", "star", "cross", "x"]


@dataclass(frozen=True)
class Look:
    """Colours, dash and marker of one thing."""

    light: str
    """Its colour on paper and on a light page."""
    dark: str
    """Its colour on a dark page."""
    dash: Dash = "solid"
    marker: Marker = "circle"
    hatched: bool = False
    """Whether its bars are hatched, so that they differ in grey too."""


@dataclass(frozen=True)
class StageLook:
    """How the layers of a stage are shown."""

    light: str
    """Background on paper and on a light page; the lightness differs too, for a grey printer."""
    dark: str
    """Background on a dark page."""
    sign: str
    """Sign before the stage's name in text."""
    terminal: str
    """Colour of the text on a terminal, by rich's name; readable on white and on black."""


LOOKS: Mapping[str, Look] = MappingProxyType(
    {
        "stream": Look("#000000", "#ececec"),
        "attn": Look("#0072b2", "#56b4e9", "solid", "triangle-up"),
        "ffn": Look("#c24e00", "#f58b4c", "dash", "square"),
        "policy": Look("#a8487f", "#e295c4", "solid", "star"),
        "direction": Look("#1f9e78", "#3fc79c", "dot"),
        "length": Look("#8a6d00", "#e8c33c", hatched=True),
        "boundary": Look("#404040", "#d0d0d0", "dashdot", "diamond"),
        "switch": Look("#7f7f7f", "#9a9a9a", "dash"),
        "uniform": Look("#7f7f7f", "#9a9a9a", "dot"),
        "neutral": Look("#7f7f7f", "#9a9a9a"),
    }
)
"""The residual stream, what attention and FFN write, the final policy; the two parts of a change; the boundary layer,
the end of alignment, ln V, and reference lines. The input of a layer or module is the open marker of its output."""

STAGES: Mapping[str, StageLook] = MappingProxyType(
    {
        "exploration": StageLook("#cfe6f4", "#163b52", "▲", "deep_sky_blue3"),
        "integration": StageLook("#efefea", "#32322d", "■", "grey50"),
        "convergence": StageLook("#f7cfb6", "#5a3018", "▼", "dark_orange3"),
    }
)

BOUNDARY_SIGN = "◀"
"""Sign after the boundary layer in a table."""

_SERIES: tuple[tuple[str, str, Marker], ...] = (
    ("#0072b2", "#56b4e9", "circle"),
    ("#c24e00", "#f58b4c", "square"),
    ("#00805d", "#3fc79c", "triangle-up"),
    ("#a8487f", "#e295c4", "triangle-down"),
    ("#8a6d00", "#e8c33c", "cross"),
    ("#000000", "#ececec", "x"),
)
_DASHES: tuple[Dash, ...] = ("solid", "dash", "dot", "dashdot")
N_COLOURS = len(_SERIES)
N_SERIES = len(_SERIES) * len(_DASHES)
"""Number of series that differ in colour or dash."""


def series(index: int) -> Look:
    """How the index-th (from 0) of several models or runs looks; `N_SERIES` looks differ, then they repeat."""
    place, round_ = index % N_COLOURS, index // N_COLOURS
    light, dark, marker = _SERIES[place]
    # By three, so that the first of a round differs from the last of the round before too.
    return Look(light, dark, _DASHES[(place + 3 * round_) % len(_DASHES)], marker)


def stylesheet() -> str:
    """Write the colours as CSS variables (``--attn``, ``--series1``) for light, dark and printed pages."""
    colours: dict[str, Look | StageLook] = {
        **LOOKS,
        **STAGES,
        **{f"series{i + 1}": series(i) for i in range(N_COLOURS)},
    }
    light = " ".join(f"--{name}: {look.light};" for name, look in colours.items())
    dark = " ".join(f"--{name}: {look.dark};" for name, look in colours.items())
    return (
        f":root, :root.printing.printing {{ {light} }}\n"
        f':root[data-theme="dark"] {{ {dark} }}\n'
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark} }} }}'
    )
