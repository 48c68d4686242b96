"""One prompt on the terminal: the most probable token and the entropy of each policy, coloured by entropy.

Without colours (``NO_COLOR``, a file, a pipe) the same text says the same.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence

import pandas as pd
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

from internal_policy.inspection.figure_data import inspection_data
from internal_policy.inspection.results import Inspection
from internal_policy.inspection.settings import Site, Span
from internal_policy.plotting.inspection import TITLES, cell_colors
from internal_policy.utils.console import console as open_console

_WIDEST, _NARROWEST = 9, 3
_NUMBER = 4
_HIT, _BORDER = "✓", "│"
_ISOLATE, _END = "\u2068", "\u2069"
_POLICY, _NEXT, _READ = "π_θ", "next", "read"


def show(
    inspection: Inspection,
    site: Site = "layer",
    *,
    tokens: Span | None = None,
    last: int | None = None,
    console: Console | None = None,
) -> None:
    """Print one site's policies: a row a layer, a column a token, as many side by side as the terminal is wide.

    Args:
        inspection: what was looked at.
        site: ``layer``, ``attn`` or ``ffn``.
        tokens: which tokens, from 1.
        last: so many at the end; 24 where neither is given.
        console: where; standard output where not given.
    """
    console = console or open_console()
    lens = "" if inspection.lens == "policy" else f", lens {inspection.lens}"
    places = inspection.positions(tokens, last)
    span = f"tokens {places[0]} to {places[-1]} of {inspection.n_tokens}, {inspection.prompt_length} in the prompt"
    _say(console, Text(f"{inspection.name}: {TITLES[site]} policies{lens}; {span}", style="bold"))
    for block in blocks(inspection, site, tokens=tokens, last=last, width=console.width):
        for line in block:
            _say(console, line)
        _say(console, Text())
    _say(
        console,
        Text(
            f"cells: top token and entropy in nats (ln V = {math.log(inspection.vocab_size):.2f}); "
            f"{_HIT} it came next; {_BORDER} the response begins"
        ),
        wrap=True,
    )


def blocks(
    inspection: Inspection,
    site: Site = "layer",
    *,
    tokens: Span | None = None,
    last: int | None = None,
    width: int = 80,
) -> Iterator[list[Text]]:
    """Lay out one site's policies in blocks of columns.

    Args:
        inspection: what was looked at.
        site: ``layer``, ``attn`` or ``ffn``.
        tokens: which tokens, from 1.
        last: so many at the end; 24 where neither is given.
        width: of the terminal, columns.

    Yields:
        The lines of each block: places, what came next, the final policy, layers from L to 1, what was read.
    """
    frame = inspection_data(inspection, [site], tokens=tokens, last=last)
    label = max(len(str(inspection.n_layers)), cell_len(_NEXT)) + 1
    widest = max(cell_len(text) for text in frame["top1_token"])
    word = min(max(widest, _NARROWEST), _WIDEST, max(1, width - label - _NUMBER - 2))
    # A border or a space, the token, the mark of a hit or a space, the number.
    cell = word + _NUMBER + 2
    columns = frame.drop_duplicates("position").reset_index(drop=True)
    room = max(1, (width - label) // cell)
    for start in range(0, len(columns), room):
        shown = columns.iloc[start : start + room]
        own = frame[frame["position"].isin(shown["position"])]
        borders = [_BORDER if p == inspection.prompt_length + 1 else " " for p in shown["position"]]
        yield list(_block(own, shown, borders, label, word, inspection))


def _block(
    own: pd.DataFrame, shown: pd.DataFrame, borders: Sequence[str], label: int, word: int, inspection: Inspection
) -> Iterator[Text]:
    def heading(name: str, texts: Sequence[str], shift: int) -> Text:
        line = Text(name.rjust(label - 1) + " ")
        for position, text, border in zip(shown["position"], texts, borders, strict=True):
            style = "dim" if position + shift <= inspection.prompt_length else "bold"
            line.append(border).append(_fit(text, word + _NUMBER + 1), style=style)
        return line

    yield heading("", [str(p) for p in shown["position"]], 0)
    yield heading(_NEXT, list(shown["next_token"]), 1)
    for site, layer in (("policy", inspection.n_layers), *((None, n) for n in range(inspection.n_layers, 0, -1))):
        rows = own[(own["layer"] == layer) & ((own["site"] == "policy") == (site == "policy"))]
        line = Text((_POLICY if site else str(layer)).rjust(label - 1) + " ")
        rgb, ink = cell_colors(rows["entropy"].to_numpy(), inspection.vocab_size)
        cells = zip(borders, rows["top1_token"], rows["hit"], rows["entropy"], rgb, ink, strict=True)
        for border, text, hit, entropy, colour, pen in cells:
            background = Color.from_rgb(*(255 * colour))
            written = f"{_fit(text, word)}{_HIT if hit else ' '}{_number(entropy)}"
            line.append(border).append(written, style=Style(color=str(pen), bgcolor=background))
        yield line
    yield heading(_READ, list(shown["token"]), 0)


def _number(entropy: float) -> str:
    """Four characters, from 0.00 to 12.3."""
    return f"{entropy:.2f}" if entropy < 9.995 else f"{entropy:.1f}"


def _fit(text: str, width: int) -> str:
    """A token in so many columns; what is written from the right keeps to its own cell."""
    short = text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip(" ") + "…"
    padding = " " * (width - cell_len(short))
    if any(unicodedata.bidirectional(character) in {"R", "AL"} for character in short):
        short = f"{_ISOLATE}{short}{_END}"
    return short + padding


def _say(console: Console, line: Text, *, wrap: bool = False) -> None:
    console.print(line, no_wrap=not wrap, overflow="fold" if wrap else "crop", crop=not wrap)
