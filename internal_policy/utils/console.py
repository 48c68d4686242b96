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

NARROWEST = 72
"""Tables are laid out for at least this many columns: a number that was cut off would be read as another one."""


class _Terminal(Console):
    """A console that shows control characters in place of obeying them."""

    def render_str(self, text: str, **options: Any) -> Text:
        # Before anything is measured, so that columns stay in line.
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Continue if a reader such as ``head`` has left: results are still to be written to disk."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def console(*, stderr: bool = False) -> Console:
    """Open the terminal. Text is printed as it is: styles come from ``rich.text.Text``, never from markup.

    Args:
        stderr: print on standard error, with the width of the terminal however narrow it is.

    Returns:
        A console.
    """
    made = _Terminal(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not stderr and made.width < NARROWEST:
        made.width = NARROWEST
    return made


def say(text: str) -> None:
    """Print a line on standard output; the terminal wraps it, and it is never cut.

    Args:
        text: the line.
    """
    console().print(text, soft_wrap=True)


_ENOUGH_PROMPTS = 40
"""The number of clusters from which on a clustered interval has nearly its nominal coverage."""


def table(
    title: str,
    caption: str | None,
    *headings: str,
    fold: Collection[str] = (),
    left: Collection[str] = (),
    min_width: int | None = None,
) -> Table:
    """Begin a table.

    Args:
        title: printed above it.
        caption: printed below it.
        headings: of the columns, whose cells are aligned to the right and never cut.
        fold: the columns of names, which are aligned to the left and wrapped.
        left: further columns that are aligned to the left.
        min_width: smallest width of the table; title and caption are wrapped to its width.

    Returns:
        The table, without rows.
    """
    begun = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, min_width=min_width, pad_edge=False)
    for heading in headings:
        if heading in fold:
            begun.add_column(heading, overflow="fold")
        else:
            begun.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return begun


def number(value: float | None, form: str = ".3f") -> str:
    """Write a number.

    Args:
        value: the number; None and NaN are undefined.
        form: its format.

    Returns:
        The number; a dash if it is undefined.
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def of_resamples(share: float | None) -> str:
    """Write a share of the bootstrap resamples, where 100% would read as certainty.

    Args:
        share: 0 to 1; None and NaN are undefined.

    Returns:
        ``all``, ``none``, or a percentage; a dash if it is undefined.
    """
    return {1.0: "all", 0.0: "none"}.get(share if share is not None else math.nan, number(share, ".1%"))


def few_prompts(prompts: int) -> str | None:
    """Warn that there are too few prompts for intervals and shares of resamples to be reliable.

    Args:
        prompts: number of prompts.

    Returns:
        The sentence; None if there are enough prompts.
    """
    if prompts >= _ENOUGH_PROMPTS:
        return None
    return (
        f"{prompts} prompt{'' if prompts == 1 else 's'} only: intervals and shares of resamples can be relied on from "
        f"about {_ENOUGH_PROMPTS} prompts on"
    )


def plus_minus(stderr: float, form: str = ".3f") -> str:
    """Write a standard error behind its mean.

    Args:
        stderr: the standard error.
        form: its format.

    Returns:
        The error behind a plus-minus sign; nothing if it is undefined, as for a single prompt.
    """
    return "" if math.isnan(stderr) else f"±{stderr:{form}}"


def percent_span(low: float, high: float, sign: str = "") -> str:
    """Write an interval of rates.

    Args:
        low: 0 to 1.
        high: 0 to 1.
        sign: ``+`` to show the sign of differences.

    Returns:
        The interval in percent; a dash if there is none, as for a single problem.
    """
    return "-" if math.isnan(low) else f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"
