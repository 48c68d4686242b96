"""The terminal: what is printed there, how tables look, and how an undefined number is written."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterable
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from internal_policy.utils.shell import visible

MIN_WIDTH = 72
"""Tables are laid out for at least this many columns: a truncated number would be read as a different one."""

_ENOUGH_PROMPTS = 40
"""The number of clusters from which on a clustered interval has nearly its nominal coverage."""


class _Terminal(Console):
    """A console that shows control characters instead of obeying them."""

    def render_str(self, text: str, **options: Any) -> Text:
        # Before anything is measured, so that columns stay in line.
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Continue if a reader such as ``head`` has closed the pipe: results have yet to be written to disk."""
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)


def console(*, stderr: bool = False) -> Console:
    """Open the terminal. Text is printed as it is: styles come from ``rich.text.Text``, never from markup.

    Standard output is at least `MIN_WIDTH` columns wide; standard error (`stderr`) has the width of the terminal.
    """
    made = _Terminal(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not stderr and made.width < MIN_WIDTH:
        made.width = MIN_WIDTH
    return made


def say(text: str) -> None:
    """Print a line on standard output; the terminal wraps it, and it is never cut."""
    console().print(text, soft_wrap=True)


def table(
    title: str,
    caption: str | None,
    *headings: str,
    fold: Collection[str] = (),
    left: Collection[str] = (),
    min_width: int | None = None,
) -> Table:
    """Begin a table without rows.

    Cells are aligned to the right and never cut, except in the columns of names (`fold`), which are aligned to the left
    and wrapped, and in those of `left`. Title and caption are wrapped to the width of the table.
    """
    begun = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, min_width=min_width, pad_edge=False)
    for heading in headings:
        if heading in fold:
            begun.add_column(heading, overflow="fold")
        else:
            begun.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return begun


def number(value: float | None, form: str = ".3f") -> str:
    """Format a number; a dash if it is None or NaN."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def of_resamples(share: float | None) -> str:
    """Format a share (0 to 1) of the bootstrap resamples; a dash if it is undefined.

    ``all`` and ``none`` are used because 100% would read as certainty.
    """
    return {1.0: "all", 0.0: "none"}.get(share if share is not None else math.nan, number(share, ".1%"))


def few_prompts(prompts: int) -> str | None:
    """Warn that there are too few prompts for reliable intervals and shares of resamples; None if there are enough."""
    if prompts >= _ENOUGH_PROMPTS:
        return None
    return (
        f"{prompts} prompt{'' if prompts == 1 else 's'} only: intervals and shares of resamples can be relied on from "
        f"about {_ENOUGH_PROMPTS} prompts on"
    )


def plus_minus(stderr: float, form: str = ".3f") -> str:
    """Format a standard error after its mean, with a plus-minus sign; empty if undefined, as for a single prompt."""
    return "" if math.isnan(stderr) else f"±{stderr:{form}}"


def percent_span(low: float, high: float, sign: str = "") -> str:
    """Format an interval of rates (0 to 1) in percent; a dash if undefined. `sign` is ``+`` for differences."""
    return "-" if math.isnan(low) else f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"
