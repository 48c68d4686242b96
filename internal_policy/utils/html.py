"""How results show themselves in a notebook: a small table, in light and dark themes.

    def _repr_html_(self) -> str:
        return card("Analysis", self.name, facts=["8 layers"], table=Rows(["layer"], [["1"]]))

Whatever comes from a model or from a user is text: it is escaped here, and nowhere else. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

MOST_ROWS = 12
"""More rows than these are told by their number."""
_LONGEST, _LONGEST_FACT = 120, 600
"""Characters of a name or a cell, and of a fact; a name may be a path, and a token a page."""

# Only the layout and half-transparent greys: text has the colour that the notebook's own theme gives it.
_BOX = "display:inline-block;max-width:100%;border:1px solid rgba(128,128,128,.45);border-radius:4px;padding:8px 12px"
_TABLE = "border-collapse:collapse;margin:6px 0;background:transparent;color:inherit;font-size:92%"
_CELL = "padding:2px 10px 2px 0;border:0;background:transparent;color:inherit;white-space:pre-wrap"
_RULE = "border-bottom:1px solid rgba(128,128,128,.6)"


@dataclass(frozen=True)
class Rows:
    """A small table."""

    headings: Sequence[str]
    """One for each column."""
    cells: Sequence[Sequence[Any]]
    """Rows of texts or numbers."""
    left: Sequence[str] = ()
    """Headings of the columns that are not numbers."""
    note: str = ""
    """Units and what else a reader must know."""


def card(kind: str, name: str, facts: Iterable[str] = (), table: Rows | None = None) -> str:
    """Lay out a result for a notebook.

    Args:
        kind: what it is.
        name: its name; any text.
        facts: short texts, one beside the other.
        table: its numbers.

    Returns:
        HTML without scripts or style sheets, and without anything from a network.
    """
    parts = [f"<div><b>{_text(kind)}</b> {_text(name)}</div>"]
    if told := " · ".join(_text(fact, _LONGEST_FACT) for fact in facts if fact):
        parts.append(f'<div style="opacity:.85;font-size:92%">{told}</div>')
    if table is not None and table.cells:
        parts.append(_table(table))
    return f'<div style="{_BOX}">{"".join(parts)}</div>'


def _table(rows: Rows) -> str:
    def line(tag: str, cells: Sequence[Any], more: str = "") -> str:
        sides = ("left" if heading in rows.left else "right" for heading in rows.headings)
        written = (
            f'<{tag} style="{_CELL};text-align:{side}{more}">{_text(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(written)}</tr>"

    head = line("th", rows.headings, f";{_RULE};font-weight:600")
    body = "".join(line("td", cells) for cells in rows.cells[:MOST_ROWS])
    left_out = len(rows.cells) - MOST_ROWS
    notes = [f"and {left_out} more rows"] if left_out > 0 else []
    notes += [rows.note] if rows.note else []
    foot = f'<div style="opacity:.75;font-size:85%;margin-bottom:4px">{_text("; ".join(notes))}</div>' if notes else ""
    return f'<table style="{_TABLE}"><thead>{head}</thead><tbody>{body}</tbody></table>{foot}'


def _text(value: Any, longest: int = _LONGEST) -> str:
    """Any value as text that is no markup, on one line; the middle of a long one is left out."""
    text = " ".join(str(value).split())
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return escape(text, quote=True)
