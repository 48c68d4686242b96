"""The command `internal-policy compare`: checkpoints or models side by side, from disk, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internal_policy.cli.common import Debug, Json, Quiet, Wait
from internal_policy.cli.report import write_reports
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.output import document
from internal_policy.utils.shell import figure_name, is_number

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.comparison.results import AnalysisComparison

DATA = Path("data/comparisons")
FIGURES = Path("figures")


def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(help="What analyze wrote; one that holds several analyses stands for all."),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with: a label, or a place from 1.", show_default="the first analysis"
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="What to call an analysis; once for each, in their order.", show_default="from the names"),
    ] = None,
    step: Annotated[
        list[float] | None,
        typer.Option(
            help="Which step of a training an analysis is of; once for each, in their order.",
            show_default="from names such as checkpoint-40",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for results.", show_default=f"{DATA}, figures in {FIGURES}"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    wait: Wait = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two or more analyses: per layer, by relative depth, over the steps of a training; tables and figures."""
    from internal_policy.analysis.remarks import keep_one_lens
    from internal_policy.analysis.sources import arrange, gather
    from internal_policy.cli import display_comparison
    from internal_policy.comparison.results import compare as run

    if seed < 0:
        raise UserError(f"--seed is {seed}; needed is a whole number of at least 0")
    found = gather(directories)
    kept, _ = keep_one_lens(found)
    # The baseline is counted in the order that is shown.
    analyses, labels, *_ = arrange(kept, label, step)
    origin = 0 if baseline is None else _place(baseline, labels)
    root = DATA if output is None else expanded(output)
    name = "compare--" + figure_name([(each, analyses[0].lens) for each in _names(analyses, labels)])
    with locked(root / name, wait=wait):
        comparison = run(found, baseline=origin, labels=label, steps=step, seed=seed)
        display_comparison.show_comparison(comparison)
        where = _write(comparison, name, root, FIGURES if output is None else root / "figures")
    document({"command": "compare", **fields(comparison), "path": where})


def fields(comparison: AnalysisComparison) -> dict[str, Any]:
    """Tell a comparison in a JSON document.

    Args:
        comparison: the comparison.

    Returns:
        The manifest, and each table.
    """
    from internal_policy.comparison.results import TABLES

    return {**comparison.manifest(), "tables": {name: getattr(comparison, name) for name in TABLES}}


def compare_sweep(analyses: Sequence[Analysis], root: Path) -> dict[str, Any]:
    """Compare the checkpoints of a sweep: print, draw, and write everything into one directory.

    Args:
        analyses: two or more, in the order of the training.
        root: below it a directory named by the first and the last is written.

    Returns:
        The comparison as in a JSON document, with its path.

    Raises:
        UserError: it cannot be written.
    """
    from internal_policy.cli import display, display_comparison
    from internal_policy.comparison.results import compare as run
    from internal_policy.plotting import analysis as figures
    from internal_policy.plotting import comparison as comparison_figures

    # The ends name a sweep, for all of a hundred checkpoints would be no name.
    ends = [a.path.resolve().name if a.path else a.name for a in (analyses[0], analyses[-1])]
    directory = root / f"sweep-{figure_name([(name, analyses[0].lens) for name in ends])}"
    comparison = run(analyses)
    display_comparison.show_comparison(comparison)
    with writing(directory):
        comparison.save(directory)
        paths = [
            *figures.save_analysis_figures(analyses, directory),
            *comparison_figures.save_comparison_figures(comparison, directory),
            *sorted(directory.glob("*.csv")),
            directory / "comparison.json",
        ]
    display.list_files("figures and comparison", paths)
    write_reports([comparison], directory)
    return {**fields(comparison), "path": directory}


def redrawing(directory: Path) -> str:
    """Say which command makes a stored comparison, with its figures, again.

    Args:
        directory: of the comparison, or one that holds a single comparison.

    Returns:
        The command.

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
    from internal_policy.cli import display
    from internal_policy.plotting.comparison import save_comparison_figures

    with writing(root / name):
        tables = comparison.save(root / name)
    with writing(figures / name):
        drawn = save_comparison_figures(comparison, figures / name)
    display.list_files("comparison", display.files_of(tables))
    display.list_files("figures", drawn)
    write_reports([comparison], tables)
    return tables


def _names(analyses: list[Analysis], labels: list[str]) -> list[str]:
    """Names for a path: the analyses' directories, as everywhere, or the labels where these are not enough."""
    directories = [a.path.resolve().name if a.path is not None else a.name for a in analyses]
    if len(set(directories)) == len(directories):
        return directories
    return ["".join(c if c.isalnum() or c in "-_.@" else "-" for c in label) for label in labels]


def _place(baseline: str, labels: list[str]) -> int | str:
    """A label where it is one, else a place that is counted from 1."""
    if baseline in labels or not is_number(baseline):
        return baseline
    if not 1 <= int(baseline) <= len(labels):
        raise UserError(
            f"--baseline is {baseline}; needed is a place from 1 to {len(labels)}, or one of {', '.join(labels)}"
        )
    return int(baseline) - 1
