"""How results are shown in a notebook: a title, a few facts and a small table.

    def _repr_html_(self) -> str:
        return card("Analysis", self.name, ["8 layers"], pd.DataFrame({"layer": [1], "change": ["-0.12"]}), "nats")

Names, facts and cells may come from a model or a user. They are shown as text, never as markup.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 12
"""A longer table shows its first and last rows, and its size."""
_MAX_CHARACTERS = 200


def card(kind: str, name: str, facts: Iterable[str] = (), table: pd.DataFrame | None = None, note: str = "") -> str:
    """Return a result as HTML without scripts, style sheets or anything from a network.

    Empty facts are left out; the others are shown on one line. The cells of the table are already formatted; the note
    with its units is shown below it.
    """
    parts = [f"<div><b>{_text(kind)}</b> {_text(name)}</div>"]
    parts += [f"<div>{line}</div>"] if (line := " · ".join(_text(fact) for fact in facts if fact)) else []
    if table is not None and len(table):
        shown, long = table.map(_shorten), len(table) > MOST_ROWS
        parts.append(shown.to_html(index=False, border=0, max_rows=MOST_ROWS, show_dimensions=long))
        parts += [f'<div style="opacity:.75">{_text(note)}</div>'] if note else []
    return f"<div>{''.join(parts)}</div>"


def _text(value: str) -> str:
    return escape(_shorten(value))


def _shorten(value: object) -> str:
    """Put a text on one line, without the middle of a long one: a name may be a path, and a token a page."""
    text = " ".join(str(value).split())
    half = _MAX_CHARACTERS // 2
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:half]} … {text[-half:]}"
