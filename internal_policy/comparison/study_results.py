"""The result of a cross-model study: its analyses, and which of figures 2, 3, 12, 13 and 14 show each.

``study.json`` is in the directory above the analyses and is written last: a directory without it is not a finished
study. Nothing here needs torch.
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
from internal_policy.comparison.study_presets import StudyModel
from internal_policy.utils.errors import counted
from internal_policy.utils.io import expanded
from internal_policy.utils.result_format import ResultFormat

SCHEMA_VERSION = 2
MANIFEST = "study.json"
STUDY = ResultFormat("study", "studies", "analyze --preset", "analyse", MANIFEST, SCHEMA_VERSION, ())


@dataclass(frozen=True)
class Study:
    """The analyses of a preset's models."""

    models: tuple[StudyModel, ...]
    """The rows of the preset that were analysed."""
    analyses: tuple[Analysis, ...]
    """One analysis for each of them."""
    failures: dict[str, str] = field(default_factory=dict)
    """Why, for each model that could not be analysed."""

    def of_figure(self, number: int) -> list[Analysis]:
        """Return the analyses that a figure of the paper shows.

        Args:
            number: of the figure: 2, 3, 12, 13 or 14.

        Returns:
            The analyses in the order of the panels; empty if no model of the study is in the figure.
        """
        shown = [pair for pair in zip(self.models, self.analyses, strict=True) if number in pair[0].figures]
        return [analysis for _, analysis in sorted(shown, key=lambda pair: pair[0].figures[number])]

    @cached_property
    def labels(self) -> list[str]:
        """The names of the models in tables and figures."""
        return unique_labels(self.analyses)

    @cached_property
    def comparison(self) -> AnalysisComparison | None:
        """The models compared by relative depth; None for a single one."""
        return compare(self.analyses, labels=self.labels) if len(self.analyses) > 1 else None

    @cached_property
    def convergence(self) -> pd.DataFrame:
        """How the entropy falls, a row per model; see ``convergence_table``."""
        if self.comparison is not None:
            return self.comparison.convergence
        return convergence_table(self.analyses, labels=self.labels)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The results of each analysis, a row per model; see ``summary_table``."""
        return summary_table(self.analyses, self.labels)

    def record(self, directory: str | Path) -> Path:
        """Write ``study.json`` to the directory of the analyses, so that ``Study.load`` finds them.

        Args:
            directory: the directory below which the analyses were written.

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
            UserError: there is no study, it is unfinished, broken, or written by another version, or one of its
                analyses is missing.
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
    # The keys of a JSON object are strings.
    positions = {int(number): position for number, position in stored["figures"].items()}
    return StudyModel(stored["model"], stored["template"], positions, stored["max_new_tokens"])


def summary_table(analyses: Sequence[Analysis], labels: Sequence[str]) -> pd.DataFrame:
    """Tabulate the results of each analysis.

    Args:
        analyses: the analyses.
        labels: one for each.

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
