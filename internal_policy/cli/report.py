"""The command `internal-policy report`, and how the other commands write the page of what they have made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.cli.command import WaitOptions
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.options import option
from internal_policy.utils.output import note_files, print_json
from internal_policy.utils.shell import refuse_unmatched

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.bupo.run import Run
    from internal_policy.comparison.results import AnalysisComparison

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportCommand(WaitOptions):
    """Draw report.html again in the directories of analyses, comparisons and training runs, without a model."""

    directories: tuple[Path, ...] = option(positional=True)
    """What analyze, compare or train wrote, also mixed; a directory that holds several stands for all of them."""

    def run(self) -> None:
        """Run the command.

        Raises:
            UserError: no finished result, or a directory that cannot be written.
        """
        from internal_policy.analysis.sources import only_figures
        from internal_policy.cli.display import list_files
        from internal_policy.report import write_report

        # All are read before any is drawn, so that a bad one is refused at once.
        named = [expanded(directory) for directory in self.directories]
        if len(named) > 1:
            # A shell's DIR/* names the figures next to the results too.
            named = [directory for directory in named if not only_figures(directory)] or named
        held = [thing for directory in named for thing in _read(directory)]
        places = [place for thing in held if (place := thing.path) is not None]
        with locked(*places, wait=self.wait):
            for thing, place in zip(held, places, strict=True):
                with writing(place):
                    # Who held the directory until now may have written another result there.
                    path = write_report(type(thing).load(place))
                list_files("report", [path])
        print_json({"command": "report"})


def write_reports(
    things: Sequence[Analysis | AnalysisComparison | Run],
    directory: Path | None = None,
    *,
    tell: bool = True,
    keep: bool = False,
) -> None:
    """Write the page of each result that is on disk already, and say where.

    A page that cannot be drawn is told in one line, and nothing else of the command is lost for it.

    Args:
        things: the results.
        directory: where a comparison's goes; the others go into their own.
        tell: whether to say where.
        keep: leave a page that was drawn after its result was written.
    """
    from internal_policy.analysis.results import REPORT
    from internal_policy.cli.display import list_files
    from internal_policy.report import write_report

    for thing in things:
        place = directory or thing.path
        if place is None:
            continue
        try:
            path = place / REPORT
            if not (keep and _is_newer(path, place)):
                path = write_report(_placed(thing, place), place)
        # Whatever it is, the result is whole without its page.
        except Exception as error:
            # A page of earlier results beside new ones would be believed.
            with suppress(OSError):
                (place / REPORT).unlink(missing_ok=True)
            old = ", and the page there is of earlier results" if _is_there(place / REPORT) else ""
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            logger.warning(
                "%s: no %s could be written (%s)%s; the results are whole, internal-policy report %s tries again",
                *(place, REPORT, why, old, place),
            )
            logger.debug("%s", place, exc_info=error)
            continue
        if tell:
            list_files("report", [path])
        else:
            note_files("report", [path])


def redraw_other_lenses(analyses: Sequence[Analysis]) -> None:
    """Draw the pages again of earlier analyses of the same responses under another lens, which did not know of these.

    Args:
        analyses: what has just been analysed.
    """
    from internal_policy.analysis.results import REPORT, Analysis, find_other_lens

    paths = [analysis.path for analysis in analyses]
    for other in (find_other_lens(analysis) for analysis in analyses):
        if other is not None and other.path not in paths and other.path is not None and _is_there(other.path / REPORT):
            write_reports([Analysis.load(other.path)], tell=False)


def _placed(thing: Analysis | AnalysisComparison | Run, place: Path) -> Analysis | AnalysisComparison | Run:
    """The result, knowing where it is: its page says how to make it again there."""
    return thing if thing.path is not None else replace(thing, path=place)


def _is_newer(page: Path, place: Path) -> bool:
    """Whether a page was drawn after the result beside it was written."""
    results = [path.stat().st_mtime_ns for path in place.glob("*.json")]
    return page.is_file() and bool(results) and page.stat().st_mtime_ns > max(results)


def _is_there(path: Path) -> bool:
    # A directory that may not be entered hides what is in it.
    with suppress(OSError):
        return path.exists()
    return False


def show_and_report(analysis: Analysis, *, keep: bool = False) -> None:
    """Print the line of an analysis among many, and write its page into the directory that the line names.

    Args:
        analysis: the analysis.
        keep: as for ``write_reports``.
    """
    from internal_policy.cli.display import show_line

    show_line(analysis)
    write_reports([analysis], tell=False, keep=keep)


def kind_of(directory: Path) -> str:
    """Tell what a directory holds; a run holds evaluations, and perhaps an analysis, of its own.

    Args:
        directory: of one result, or above several.

    Returns:
        run, analysis, evaluation, inspection or comparison.

    Raises:
        UserError: nothing that is finished.
    """
    refuse_unmatched(directory)
    if any((directory / name).exists() for name in ("run.json", "checkpoints")):
        return "run"
    # What is not a run may be named by a directory above it.
    for kind, depths in _DEPTHS.items():
        if any(path for depth in depths for path in directory.glob(f"{depth}{kind}.json")):
            return kind
    raise UserError(
        f"{directory}: no finished analysis here, nor a training run or an evaluation (no analysis.json, run.json or "
        "evaluation.json); run internal-policy analyze, train or evaluate first"
    )


_DEPTHS = {
    "analysis": ("", "*/"),
    "evaluation": ("", "*/", "*/*/"),
    "inspection": ("", "*/"),
    "comparison": ("", "*/"),
}


def _read(directory: Path) -> list[Analysis | AnalysisComparison | Run]:
    """All that a directory holds and there is a page of."""
    from internal_policy.analysis.results import ANALYSIS, Analysis
    from internal_policy.bupo.run import MANIFEST, Run
    from internal_policy.comparison.results import COMPARISON, AnalysisComparison

    runs = sorted(path.parent for path in directory.glob(f"*/{MANIFEST}") if path.parent.name != "work")
    found = {"analysis": ANALYSIS.below(directory), "comparison": COMPARISON.below(directory), "run": runs}
    if not any(found.values()) or (directory / MANIFEST).is_file():
        kind = kind_of(directory)
        if kind == "run":
            return [Run.load(directory)]
        if kind not in found:
            raise UserError(
                f"{directory}: holds an {kind}, of which there is no report; its figures are drawn by "
                "internal-policy figures"
            )
    return [
        *(Analysis.load(path) for path in found["analysis"]),
        *(AnalysisComparison.load(path) for path in found["comparison"]),
        *(Run.load(path) for path in found["run"]),
    ]
