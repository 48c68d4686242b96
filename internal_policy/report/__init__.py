"""One self-contained page of a result: an analysis, a comparison or a training run.

    write_report(analysis)                  # report.html in the analysis' directory
    html = analysis_report([one, another])  # the page as text
    write_report(comparison, "data/comparisons/mine")

The page opens from disk and loads nothing from a network. What a model wrote, and what anything is called, reaches it
as text, never as markup. Nothing here needs a model or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.analysis.results import REPORT, Analysis
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded, write_text

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run
    from internal_policy.comparison.results import AnalysisComparison

__all__ = ["analysis_report", "comparison_report", "training_report", "write_report"]


def analysis_report(analyses: Analysis | Sequence[Analysis]) -> str:
    """Draw up the page of one analysis, or of several one below the other.

    Args:
        analyses: the analysis, or several.

    Returns:
        HTML.

    Raises:
        UserError: no analysis was given.
    """
    from internal_policy.report.analysis import page

    return page([analyses] if isinstance(analyses, Analysis) else list(analyses))


def comparison_report(comparison: AnalysisComparison) -> str:
    """Draw up the page of a comparison.

    Args:
        comparison: the comparison.

    Returns:
        HTML.
    """
    from internal_policy.report.comparison import page

    return page(comparison)


def training_report(run: Run) -> str:
    """Draw up the page of a training run.

    Args:
        run: the run.

    Returns:
        HTML.
    """
    from internal_policy.report.training import page

    return page(run)


def write_report(
    thing: Analysis | AnalysisComparison | Run | Sequence[Analysis], directory: str | Path | None = None
) -> Path:
    """Write the page of a result to ``report.html``, whole or not at all.

    Args:
        thing: an analysis, several of them, a comparison or a run.
        directory: where it goes, made where it does not exist; the result's own where not given.

    Returns:
        The file.

    Raises:
        UserError: the result is in memory only, and no directory was given; or nothing that can be reported on was.
    """
    from internal_policy.bupo.run import Run
    from internal_policy.comparison.results import AnalysisComparison

    if isinstance(thing, Run):
        html = training_report(thing)
    elif isinstance(thing, AnalysisComparison):
        html = comparison_report(thing)
    elif isinstance(thing, (Analysis, Sequence)) and not isinstance(thing, str):
        html = analysis_report(thing)
    else:
        raise UserError(f"got a {type(thing).__name__} to report on; needed is an analysis, a comparison or a run")
    place = directory if directory is not None else getattr(thing, "path", None)
    if place is None:
        raise UserError("this result is in memory only; give a directory for its report, or save it first")
    target = expanded(place)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / REPORT, html)
    return target / REPORT
