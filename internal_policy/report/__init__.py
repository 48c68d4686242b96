"""One self-contained page of a result: an analysis, a comparison or a training run.

    write_report(analysis)                  # report.html in the analysis' directory
    html = analysis_report([one, another])  # the page as text
    write_report(comparison, "data/comparisons/mine")

The page opens from disk and loads nothing from a network. Texts of a model, and all names, reach it
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
    import pandas as pd

    from internal_policy.bupo.run import Run
    from internal_policy.comparison.results import AnalysisComparison

__all__ = [
    "analysis_report",
    "comparison_report",
    "layer_report",
    "training_report",
    "write_layer_report",
    "write_report",
]


def analysis_report(analyses: Analysis | Sequence[Analysis]) -> str:
    """Return the page of one analysis, or of several one below the other.

    Args:
        analyses: One analysis or several.

    Returns:
        HTML.

    Raises:
        UserError: There is no analysis.
    """
    from internal_policy.report.analysis import page

    return page([analyses] if isinstance(analyses, Analysis) else list(analyses))


def comparison_report(comparison: AnalysisComparison) -> str:
    """Return the page of a comparison.

    Args:
        comparison: The comparison.

    Returns:
        HTML.
    """
    from internal_policy.report.comparison import page

    return page(comparison)


def layer_report(table: pd.DataFrame, name: str) -> str:
    """Return the page that asks whether the boundary layer matters.

    Args:
        table: Of `bupo.layer_evidence`.
        name: The model's name.

    Returns:
        HTML.
    """
    from internal_policy.report.evidence import page

    return page(table, name)


def write_layer_report(table: pd.DataFrame, directory: str | Path, name: str) -> Path:
    """Write the page that asks whether the boundary layer matters to ``layers.html``, atomically.

    Args:
        table: Of `bupo.layer_evidence`.
        directory: Where to write, made if it is missing.
        name: The model's name.

    Returns:
        The path of the page.
    """
    from internal_policy.report.evidence import PAGE

    target = expanded(directory)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / PAGE, layer_report(table, name))
    return target / PAGE


def training_report(run: Run) -> str:
    """Return the page of a training run.

    Args:
        run: The run.

    Returns:
        HTML.
    """
    from internal_policy.report.training import page

    return page(run)


def write_report(
    result: Analysis | AnalysisComparison | Run | Sequence[Analysis], directory: str | Path | None = None
) -> Path:
    """Write the page of a result to ``report.html``, atomically.

    Args:
        result: An analysis, several of them, a comparison or a run.
        directory: Where to write, made if it is missing; by default the directory of the result.

    Returns:
        The path of the page.

    Raises:
        UserError: The result is in memory only and there is no directory, or it is of a kind that has no page.
    """
    from internal_policy.bupo.run import Run
    from internal_policy.comparison.results import AnalysisComparison

    if isinstance(result, Run):
        html = training_report(result)
    elif isinstance(result, AnalysisComparison):
        html = comparison_report(result)
    elif isinstance(result, (Analysis, Sequence)) and not isinstance(result, str):
        html = analysis_report(result)
    else:
        raise UserError(f"got a {type(result).__name__} to report on; needed is an analysis, a comparison or a run")
    place = directory if directory is not None else getattr(result, "path", None)
    if place is None:
        raise UserError("this result is in memory only; give a directory for its report, or save it first")
    target = expanded(place)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / REPORT, html)
    return target / REPORT
