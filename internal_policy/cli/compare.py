"""The command `internal-policy compare`: checkpoints or models side by side, from disk, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.cli.command import OutputOptions
from internal_policy.cli.report import write_reports
from internal_policy.utils.errors import UserError
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.options import check_options, option
from internal_policy.utils.output import print_json
from internal_policy.utils.shell import figure_name, is_number

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.comparison.results import AnalysisComparison

DATA = Path("data/comparisons")


@dataclass(frozen=True, kw_only=True)
class CompareCommand(OutputOptions):
    """Compare two or more analyses: per layer, by relative depth, over the steps of a training; tables and figures."""

    directories: tuple[Path, ...] = option(positional=True)
    """What analyze wrote; a directory of several analyses includes all of them."""
    baseline: str | None = None
    """What the others are compared with: a label, or a place from 1. Default: the first analysis."""
    label: tuple[str, ...] = ()
    """What to call an analysis, once for each, in their order. Default: from the names."""
    step: tuple[float, ...] = ()
    """The step of a training that an analysis is of, once for each, in their order. Default: from names such as
    checkpoint-40."""
    seed: int = option(0, least=0)
    """Seed of the bootstrap."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        check_options(self)
        from internal_policy.analysis.results import keep_one_lens
        from internal_policy.analysis.sources import collect_analyses, label_and_order
        from internal_policy.cli.display import show_comparison
        from internal_policy.comparison.results import compare

        found = collect_analyses(self.directories)
        kept, _ = keep_one_lens(found)
        # The baseline is counted in the order that is shown.
        label, step = list(self.label) or None, list(self.step) or None
        analyses, labels, *_ = label_and_order(kept, label, step)
        origin = 0 if self.baseline is None else _place(self.baseline, labels)
        root, figures = self.place(DATA)
        name = "compare--" + figure_name([(each, analyses[0].lens) for each in _names(analyses, labels)])
        with locked(root / name, wait=self.wait):
            comparison = compare(found, baseline=origin, labels=label, steps=step, seed=self.seed)
            show_comparison(comparison)
            where = _write(comparison, name, root, figures)
        print_json({"command": "compare", **_to_json(comparison), "path": where})


def _to_json(comparison: AnalysisComparison) -> dict[str, Any]:
    """A comparison in a JSON document: the manifest, and each table."""
    from internal_policy.comparison.results import TABLES

    return {**comparison.manifest(), "tables": {name: getattr(comparison, name) for name in TABLES}}


def compare_sweep(analyses: Sequence[Analysis], root: Path) -> dict[str, Any]:
    """Compare the checkpoints of a sweep: print, draw, and write everything into one directory below `root`.

    `analyses` are in the order of the training. The comparison is returned as in a JSON document, with its path.
    """
    from internal_policy.cli.display import list_files, show_comparison
    from internal_policy.comparison.results import compare
    from internal_policy.plotting import analysis as figures
    from internal_policy.plotting import comparison as comparison_figures

    # The first and the last checkpoint name a sweep: the names of a hundred would be too long.
    ends = [a.path.resolve().name if a.path else a.name for a in (analyses[0], analyses[-1])]
    directory = root / f"sweep-{figure_name([(name, analyses[0].lens) for name in ends])}"
    comparison = compare(analyses)
    show_comparison(comparison)
    with writing(directory):
        comparison.save(directory)
        paths = [
            *figures.save_analysis_figures(analyses, directory),
            *comparison_figures.save_comparison_figures(comparison, directory),
            *sorted(directory.glob("*.csv")),
            directory / "comparison.json",
        ]
    list_files("figures and comparison", paths)
    write_reports([comparison], directory)
    return {**_to_json(comparison), "path": directory}


def redraw_command(directory: Path) -> str:
    """Return the command that makes a stored comparison, with its figures, again.

    Raises:
        UserError: several comparisons, a broken one, or one of analyses that were never on disk.
    """
    import shlex

    from internal_policy.comparison.results import COMPARISON
    from internal_policy.report.reproduce import comparison_words

    source = COMPARISON.find(directory)
    with COMPARISON.reading(source) as manifest:
        words = comparison_words(manifest, source)
    return shlex.join(words)


def _write(comparison: AnalysisComparison, name: str, root: Path, figures: Path) -> Path:
    """Write the tables and the figures, each below a directory of that name, and list the files."""
    from internal_policy.cli.display import files_of, list_files
    from internal_policy.plotting.comparison import save_comparison_figures

    with writing(root / name):
        tables = comparison.save(root / name)
    with writing(figures / name):
        drawn = save_comparison_figures(comparison, figures / name)
    list_files("comparison", files_of(tables))
    list_files("figures", drawn)
    write_reports([comparison], tables)
    return tables


def _names(analyses: list[Analysis], labels: list[str]) -> list[str]:
    """Names for a path: the directories of the analyses, or the labels if the directories have the same name."""
    directories = [a.path.resolve().name if a.path is not None else a.name for a in analyses]
    if len(set(directories)) == len(directories):
        return directories
    return ["".join(c if c.isalnum() or c in "-_.@" else "-" for c in label) for label in labels]


def _place(baseline: str, labels: list[str]) -> int | str:
    """The baseline as a label if it is one, otherwise as an index; on the command line it is counted from 1."""
    if baseline in labels or not is_number(baseline):
        return baseline
    if not 1 <= int(baseline) <= len(labels):
        raise UserError(
            f"--baseline is {baseline}; needed is a place from 1 to {len(labels)}, or one of {', '.join(labels)}"
        )
    return int(baseline) - 1
