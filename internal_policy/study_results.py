"""What came of a cross-model study: its analyses, figures 2, 3, 12, 13, 14 of them, and where they are.

``study.json`` lies above the analyses and is written last: a directory without it holds no finished study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from internal_policy import figures, style
from internal_policy.comparison import figures as comparison_figures
from internal_policy.comparison.analyses import AnalysisComparison, compare
from internal_policy.comparison.convergence import convergence_table
from internal_policy.comparison.sources import unique_labels
from internal_policy.files import expanded, write_atomically
from internal_policy.results import Analysis
from internal_policy.selection import STAGES
from internal_policy.stored import Kind, to_cells
from internal_policy.study_models import StudyModel
from internal_policy.summary import summary_table
from internal_policy.wording import counted

SCHEMA_VERSION = 2
MANIFEST = "study.json"
STUDY = Kind("study", "studies", "analyze --preset", "analyse", MANIFEST, SCHEMA_VERSION, ())
PAPER_FIGURES: tuple[tuple[str, int, Callable[..., Figure]], ...] = (
    ("fig2_entropy_flow", 2, figures.entropy_flow),
    ("fig3_entropy_change", 3, figures.entropy_change),
    ("fig12_residual_cosine", 12, figures.residual_cosine),
    ("fig13_entropy_flow", 13, figures.entropy_flow),
    ("fig14_entropy_change", 14, figures.entropy_change),
)
"""What each of the paper's figures is called on disk, its number, and what draws it."""


@dataclass(frozen=True)
class Study:
    """What came of a preset's models."""

    models: tuple[StudyModel, ...]
    """The rows of the preset that were analysed."""
    analyses: tuple[Analysis, ...]
    """One analysis for each of them."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why, for each model that could not be analysed."""

    def of_figure(self, number: int) -> list[Analysis]:
        """The analyses that a figure of the paper shows.

        Args:
            number: of the figure: 2, 3, 12, 13 or 14.

        Returns:
            They, in the order of its panels; none where the study has no model of it.
        """
        shown = [pair for pair in zip(self.models, self.analyses, strict=True) if number in pair[0].figures]
        return [analysis for _, analysis in sorted(shown, key=lambda pair: pair[0].figures[number])]

    @cached_property
    def labels(self) -> list[str]:
        """What tables and figures call the models."""
        return unique_labels(self.analyses)

    @cached_property
    def comparison(self) -> AnalysisComparison | None:
        """The models side by side by relative depth; None of a single one."""
        return compare(self.analyses, labels=self.labels) if len(self.analyses) > 1 else None

    @cached_property
    def convergence(self) -> pd.DataFrame:
        """How the entropy falls, a row a model; see ``convergence_table``."""
        if self.comparison is not None:
            return self.comparison.convergence
        return convergence_table(self.analyses, labels=self.labels)

    @cached_property
    def table(self) -> pd.DataFrame:
        """What each model's analysis found, a row a model; see ``summary_table``."""
        return summary_table(self.analyses, self.labels)

    def save(self, directory: str | Path) -> list[Path]:
        """Write the figures as PNG and PDF and the tables as CSV. The same analyses give the same bytes.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The paths written. A figure shows the models whose rows name it; there is none where no row does.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        drawings: dict[str, Callable[[], Figure] | None] = {}
        for stem, number, draw_figure in PAPER_FIGURES:
            shown = self.of_figure(number)
            drawings[stem] = partial(draw_figure, shown) if shown else None
        drawings |= {"depth_overlay": None, "convergence": None}
        tables = {"models": self.table, "convergence": self.convergence}
        if self.comparison is not None:
            tables["layers"] = self.comparison.layers
            drawings["depth_overlay"] = partial(comparison_figures.depth_overlay, self.comparison)
            drawings["convergence"] = partial(comparison_figures.entropy_fall, self.comparison)
        else:
            (target / "layers.csv").unlink(missing_ok=True)
        paths = []
        for stem, draw in drawings.items():
            if draw is not None:
                paths += style.save_figure(draw(), target / stem)
            else:
                # What an earlier study left under this name is of other models.
                for kind in ("png", "pdf"):
                    (target / f"{stem}.{kind}").unlink(missing_ok=True)
        for name, table in tables.items():
            write_atomically(target / f"{name}.csv", partial(to_cells(table).to_csv, index=False))
            paths.append(target / f"{name}.csv")
        return paths

    def record(self, directory: str | Path) -> Path:
        """Write what belongs to the study beside its analyses, so that ``Study.load`` finds them.

        Args:
            directory: the one that the analyses were written below.

        Returns:
            The file.
        """
        rows = [
            {**asdict(model), "directory": analysis.path.name if analysis.path is not None else None}
            for model, analysis in zip(self.models, self.analyses, strict=True)
        ]
        manifest = {"schema_version": SCHEMA_VERSION, "models": rows, "failures": self.failures}
        with STUDY.writing(directory, manifest) as target:
            return target / MANIFEST

    @classmethod
    def load(cls, directory: str | Path) -> Study:
        """Read a study from disk.

        Args:
            directory: of one study, or one that holds a single study.

        Returns:
            The study with its analyses.

        Raises:
            UserError: no study there, unfinished, broken, or written by another version; or an analysis of it is gone.
        """
        source = STUDY.find(expanded(directory))
        with STUDY.reading(source) as manifest:
            rows = manifest["models"]
            return cls(
                models=tuple(_row(row) for row in rows),
                analyses=tuple(Analysis.load(source / row["directory"]) for row in rows),
                failures=manifest["failures"],
            )

    def _repr_html_(self) -> str:
        from internal_policy.notebook import Rows, card
        from internal_policy.printing import number

        cells = [
            (
                row["label"],
                row["n_layers"],
                row["n_responses"],
                number(row["policy_entropy"]),
                "none" if pd.isna(row["boundary_layer"]) else row["boundary_layer"],
                "/".join(str(row[stage]) for stage in STAGES),
            )
            for row in self.table.to_dict("records")
        ]
        headings = ("model", "L", "responses", "policy entropy", "boundary", "E/I/C")
        note = "nats; E/I/C: layers of exploration, integration, convergence; .table and .convergence have more"
        failed = "; ".join(f"{name}: {why}" for name, why in self.failures.items())
        return card(
            "Study",
            f"of {counted(len(self.analyses), 'model')}",
            (f"failed: {failed}" if failed else "",),
            Rows(headings, cells, left=("model",), note=note),
            # All twelve side by side would be too small to be read.
            figures.entropy_change(self.of_figure(3) or self.analyses),
        )

    def __repr__(self) -> str:
        failed = f"; {len(self.failures)} failed" if self.failures else ""
        return f"Study({counted(len(self.analyses), 'model')}: {', '.join(self.labels)}{failed})"


def _row(stored: Mapping[str, Any]) -> StudyModel:
    # JSON has no numbers as keys.
    places = {int(number): place for number, place in stored["figures"].items()}
    return StudyModel(stored["model"], stored["template"], places, stored["max_new_tokens"])
