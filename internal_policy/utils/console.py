"""The one way to the terminal: what is printed there, the looks of tables, and how a number not defined is written."""

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
"""No table is laid out for fewer columns: a number that was cut off would be read as another one."""


class _Terminal(Console):
    """A console on which text cannot do anything but be read, whoever wrote it."""

    def render_str(self, text: str, **options: Any) -> Text:
        # Before anything is measured, so that columns stay in line.
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def on_broken_pipe(self) -> None:
        """Go on without a reader, such as ``head``, who has left: what was asked for is still to be written to disk."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def console(*, stderr: bool = False) -> Console:
    """Open the terminal; text is printed as it is, and styles are ``rich.text.Text``'s, never markup.

    Args:
        stderr: standard error in place of standard output, in its own width however narrow that is.

    Returns:
        A console.
    """
    made = _Terminal(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not stderr and made.width < NARROWEST:
        made.width = NARROWEST
    return made


def say(text: str) -> None:
    """Print a line on standard output, which the terminal folds and nothing cuts.

    Args:
        text: the line.
    """
    console().print(text, soft_wrap=True)


_ENOUGH_PROMPTS = 40
"""Clusters from which on a clustered interval covers what it says, nearly."""


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
        title: above it.
        caption: below it.
        headings: of the columns, whose cells stand on the right and stay whole.
        fold: those among them whose cells are names: on the left, and folded where they are long.
        left: those whose cells stand on the left.
        min_width: of the whole, columns; title and caption are folded to its width.

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
        value: the number; None and NaN are not defined.
        form: its format.

    Returns:
        The number; a stroke where it is not defined.
    """
    return "-" if value is None or math.isnan(value) else format(value, form)


def of_resamples(share: float | None) -> str:
    """Write a share of the resamples of the prompts, which in percent would read as certainty.

    Args:
        share: 0 to 1; None and NaN are not defined.

    Returns:
        ``all`` or ``none``, else in percent; a stroke where it is not defined.
    """
    return {1.0: "all", 0.0: "none"}.get(share if share is not None else math.nan, number(share, ".1%"))


def few_prompts(prompts: int) -> str | None:
    """Say that intervals and shares of resamples are of too few prompts to be relied on.

    Args:
        prompts: how many prompts there are.

    Returns:
        The sentence; None of enough prompts.
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
        With its sign; nothing where it is not defined, as of a single prompt.
    """
    return "" if math.isnan(stderr) else f"±{stderr:{form}}"


def percent_span(low: float, high: float, sign: str = "") -> str:
    """Write an interval of rates.

    Args:
        low: 0 to 1.
        high: 0 to 1.
        sign: ``+`` for differences, which show theirs.

    Returns:
        In percent; a stroke where there is none, as of a single problem.
    """
    return "-" if math.isnan(low) else f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"
