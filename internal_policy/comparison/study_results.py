"""What came of a cross-model study: its analyses, figures 2, 3, 12, 13, 14 of them, and where they are.

``study.json`` lies above the analyses and is written last: a directory without it holds no finished study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis.layer_selection import STAGES
from internal_policy.analysis.results import Analysis
from internal_policy.analysis.sources import unique_labels
from internal_policy.comparison.convergence import convergence_table
from internal_policy.comparison.results import AnalysisComparison, compare
from internal_policy.comparison.study_models import StudyModel
from internal_policy.utils.io import expanded
from internal_policy.utils.result_format import Kind
from internal_policy.utils.wording import counted

SCHEMA_VERSION = 2
MANIFEST = "study.json"
STUDY = Kind("study", "studies", "analyze --preset", "analyse", MANIFEST, SCHEMA_VERSION, ())


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
        from internal_policy.utils.console import number
        from internal_policy.utils.html import card

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
        headings = ["model", "L", "responses", "policy entropy", "boundary", "E/I/C"]
        note = "nats; E/I/C: layers of exploration, integration, convergence; .table and .convergence have more"
        failed = "; ".join(f"{name}: {why}" for name, why in self.failures.items())
        return card(
            "Study",
            f"of {counted(len(self.analyses), 'model')}",
            (f"failed: {failed}" if failed else "",),
            pd.DataFrame(cells, columns=headings),
            note,
        )

    def __repr__(self) -> str:
        failed = f"; {len(self.failures)} failed" if self.failures else ""
        return f"Study({counted(len(self.analyses), 'model')}: {', '.join(self.labels)}{failed})"


def _row(stored: Mapping[str, Any]) -> StudyModel:
    # JSON has no numbers as keys.
    places = {int(number): place for number, place in stored["figures"].items()}
    return StudyModel(stored["model"], stored["template"], places, stored["max_new_tokens"])


def summary_table(analyses: Sequence[Analysis], labels: Sequence[str]) -> pd.DataFrame:
    """Lay out what each analysis found.

    Args:
        analyses: the analyses.
        labels: what to call each.

    Returns:
        A row for each: label, model, template, n_layers, vocabulary, n_responses, n_tokens, n_truncated, reward (mean),
        policy_entropy with its stderr (nats), boundary_layer, and the number of layers in each stage.
    """
    rows = [
        {
            "label": label,
            "model": analysis.name,
            "template": analysis.config["template"],
            "n_layers": analysis.n_layers,
            "vocabulary": analysis.vocab_size,
            "n_responses": analysis.n_responses,
            "n_tokens": analysis.n_tokens,
            "n_truncated": analysis.n_truncated,
            "reward": pd.to_numeric(analysis.sequences["reward"]).mean(),
            "policy_entropy": analysis.policy_entropy["mean"],
            "policy_entropy_stderr": analysis.policy_entropy["stderr"],
            "boundary_layer": analysis.boundary_layer,
            **{stage: list(analysis.stages).count(stage) for stage in STAGES},
        }
        for label, analysis in zip(labels, analyses, strict=True)
    ]
    return pd.DataFrame(rows).astype({"boundary_layer": "Int64", "n_truncated": "Int64"})
