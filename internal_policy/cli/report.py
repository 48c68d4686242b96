"""The command `internal-policy report`, and how the other commands write the pages of their results."""

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
    """What analyze, compare or train wrote, also mixed; a directory of several includes all of them."""

    evidence: tuple[Path, ...] = ()
    """Evaluations of the layers, an ablation, a transfer or training runs of the model of one analysis (repeat it):
    instead of report.html, write layers.html and its figure there, which ask whether the boundary layer matters."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        if self.evidence:
            _write_layers(self.directories, self.evidence, self.wait)
            return
        from internal_policy.analysis.sources import has_only_figures
        from internal_policy.cli.display import list_files
        from internal_policy.report import write_report

        # All are read before any is drawn, so that a bad one is refused at once.
        named = [expanded(directory) for directory in self.directories]
        if len(named) > 1:
            # The shell expands DIR/* to the figures next to the results as well.
            named = [directory for directory in named if not has_only_figures(directory)] or named
        loaded = [result for directory in named for result in _read(directory)]
        places = [place for result in loaded if (place := result.path) is not None]
        with locked(*places, wait=self.wait):
            for result, place in zip(loaded, places, strict=True):
                with writing(place):
                    # The process that held the lock until now may have written another result there.
                    path = write_report(type(result).load(place))
                list_files("report", [path])
        print_json({"command": "report"})


def _write_layers(directories: tuple[Path, ...], evidence: tuple[Path, ...], wait: bool) -> None:
    """Write the page and the figure that compare what was measured of each layer of one model."""
    from internal_policy.analysis.results import Analysis
    from internal_policy.bupo.evidence import (
        evidence_sentence,
        layer_evidence,
        require_same_weights,
        training_outcomes,
    )
    from internal_policy.bupo.run import Run
    from internal_policy.bupo.transfer_results import TRANSFER, Transfer
    from internal_policy.cli.display import list_files
    from internal_policy.evaluation.results import EVALUATION, Evaluation
    from internal_policy.interventions.results import ABLATION, Ablation
    from internal_policy.plotting.evidence import save_layer_evidence
    from internal_policy.report import write_layer_report
    from internal_policy.utils.console import console

    if len(directories) != 1:
        raise UserError(f"--evidence was given with {len(directories)} directories; needed is that of one analysis")
    analysis = Analysis.load(expanded(directories[0]))
    assert analysis.path is not None
    evaluations: list[Evaluation] = []
    ablations: list[Ablation] = []
    transfers: list[Transfer] = []
    runs: list[Run] = []
    for given in evidence:
        directory = expanded(given)
        kind = kind_of(directory)
        if kind == "evaluation":
            evaluations += [Evaluation.load(path) for path in EVALUATION.below(directory)]
        elif kind == "ablation":
            ablations += [Ablation.load(path) for path in ABLATION.below(directory)]
        elif kind == "transfer":
            transfers += [Transfer.load(path) for path in TRANSFER.below(directory)]
        elif kind == "run":
            runs.append(Run.load(directory))
        else:
            raise UserError(
                f"{directory}: holds a result of another kind ({kind}); needed is an evaluation, ablation, transfer or "
                "training run"
            )
    for name, found in (("ablations", ablations), ("transfers", transfers)):
        if len(found) > 1:
            raise UserError(f"--evidence names {len(found)} {name}; needed is one of the model of {analysis.name}")
    for run in runs:
        require_same_weights(analysis, run)
    table = layer_evidence(
        analysis,
        evaluations=evaluations,
        ablation=ablations[0] if ablations else None,
        transfer=transfers[0] if transfers else None,
        outcomes=training_outcomes(runs) if runs else None,
    )
    with locked(analysis.path, wait=wait), writing(analysis.path):
        page = write_layer_report(table, analysis.path, analysis.name)
        paths = save_layer_evidence(table, analysis.path, title=analysis.name)
    console().print(evidence_sentence(table))
    list_files("report", [page])
    list_files("figures", paths)
    print_json({"command": "report", "layers": table.reset_index()})


def write_reports(
    results: Sequence[Analysis | AnalysisComparison | Run],
    directory: Path | None = None,
    *,
    announce: bool = True,
    keep: bool = False,
) -> None:
    """Write the page of each result into its directory, or into `directory` for a comparison.

    A page that cannot be drawn is reported in one line, and the command continues. With `keep`, a page that was drawn
    after its result was written is left as it is. With `announce`, the path is printed.
    """
    from internal_policy.analysis.results import REPORT
    from internal_policy.cli.display import list_files
    from internal_policy.report import write_report

    for result in results:
        place = directory or result.path
        if place is None:
            continue
        try:
            path = place / REPORT
            if not (keep and _is_newer(path, place)):
                # The page says how to make the result again, which needs its path.
                path = write_report(result if result.path is not None else replace(result, path=place), place)
        # The result is complete without its page, so no error may end the command.
        except Exception as error:
            # A page of earlier results would be taken for one of the new results.
            with suppress(OSError):
                (place / REPORT).unlink(missing_ok=True)
            old = ", and the page there is of earlier results" if _exists(place / REPORT) else ""
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            logger.warning(
                "%s: no %s could be written (%s)%s; the results are complete, internal-policy report %s tries again",
                *(place, REPORT, why, old, place),
            )
            logger.debug("%s", place, exc_info=error)
            continue
        if announce:
            list_files("report", [path])
        else:
            note_files("report", [path])


def redraw_other_lenses(analyses: Sequence[Analysis]) -> None:
    """Redraw the pages of earlier analyses that used another lens on the same responses, to mention the new ones."""
    from internal_policy.analysis.results import REPORT, Analysis

    new = {analysis.path for analysis in analyses}
    paths = dict.fromkeys(other.path for analysis in analyses for other in analysis.other_lenses)
    for path in paths:
        if path is not None and path not in new and _exists(path / REPORT):
            write_reports([Analysis.load(path)], announce=False)


def _is_newer(page: Path, place: Path) -> bool:
    """Whether a page was drawn after the result in the same directory was written."""
    written = [path.stat().st_mtime_ns for path in place.glob("*.json")]
    return page.is_file() and bool(written) and page.stat().st_mtime_ns > max(written)


def _exists(path: Path) -> bool:
    # A directory that may not be entered raises PermissionError.
    with suppress(OSError):
        return path.exists()
    return False


def show_and_report(analysis: Analysis, *, keep: bool = False) -> None:
    """Print an analysis among many in one line, and write its page into the directory that the line names."""
    from internal_policy.cli.display import show_line

    show_line(analysis)
    write_reports([analysis], announce=False, keep=keep)


def kind_of(directory: Path) -> str:
    """Find out what kind of result a directory contains: ``run``, ``analysis``, ``evaluation`` and so on.

    A run also contains evaluations, and perhaps an analysis.

    Raises:
        UserError: there is no finished result.
    """
    refuse_unmatched(directory)
    if any((directory / name).exists() for name in ("run.json", "checkpoints")):
        return "run"
    # Results other than runs may be in a subdirectory.
    for kind, depths in _DEPTHS.items():
        if any(path for depth in depths for path in directory.glob(f"{depth}{kind}.json")):
            return kind
    raise UserError(
        f"{directory}: no finished analysis here, nor another result (no analysis.json, run.json, evaluation.json, "
        "ablation.json, transfer.json, ...); run internal-policy analyze, train, evaluate, ablate or transfer first"
    )


_DEPTHS = {
    "analysis": ("", "*/"),
    "evaluation": ("", "*/", "*/*/"),
    "inspection": ("", "*/"),
    "comparison": ("", "*/"),
    "ablation": ("", "*/"),
    "patching": ("", "*/"),
    "transfer": ("", "*/"),
}


def _read(directory: Path) -> list[Analysis | AnalysisComparison | Run]:
    """All results in a directory that have a page."""
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
            article = "an" if kind[0] in "aeiou" else "a"
            raise UserError(
                f"{directory}: holds {article} {kind}, of which there is no report; its figures are drawn by "
                "internal-policy figures"
            )
    return [
        *(Analysis.load(path) for path in found["analysis"]),
        *(AnalysisComparison.load(path) for path in found["comparison"]),
        *(Run.load(path) for path in found["run"]),
    ]
