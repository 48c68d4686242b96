"""Compare several analyses: checkpoints of one training, or different models.

    comparison = compare("data/analyses/a", "data/analyses/b")
    comparison.differences     # per layer and site, less the baseline, with 95% intervals
    comparison.trends          # slope over the steps, largest move and where
    comparison.convergence     # progressive or abrupt, as numbers

What cannot be compared is refused (another lens) or marked: `paired` says whether both analyses are of the same
responses, `same_vocabulary` whether nats mean the same share of ln V. Layers are counted from 1, entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis.results import Analysis, keep_one_lens
from internal_policy.analysis.sources import (
    StepsFrom,
    Unit,
    architecture_differences,
    baseline_index,
    collect_analyses,
    label_and_order,
)
from internal_policy.comparison import tables
from internal_policy.comparison.convergence import convergence_table, measure_convergence
from internal_policy.comparison.pairing import Item, is_paired
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat
from internal_policy.utils.table_io import columns_of, read_columns, to_cells

SCHEMA_VERSION = 1
MANIFEST = "comparison.json"
TABLES = ("layers", "differences", "depths", "boundaries", "stages", "trends", "convergence", "fall")
_FILES = tuple(f"{name}.csv" for name in TABLES)
_SOURCE = ("model", "path", "weights", "inputs")
_STORED_AS_IS = ("baseline", "lens", "steps_from", "unit", "one_architecture", "labels_given", "seed", "no_trends")
COMPARISON = ResultFormat("comparison", "comparisons", "compare", "compare", MANIFEST, SCHEMA_VERSION, _FILES)


@dataclass(frozen=True)
class AnalysisComparison:
    """Several analyses, each less the baseline, and how they move over the steps."""

    labels: tuple[str, ...]
    """The name of each analysis, in the order given; the model that a training started from is first."""
    baseline: str
    """The label of the analysis that the others are compared with."""
    lens: str
    """The lens of all of them."""
    steps: tuple[float, ...]
    """The step of a training that each is of; the indices from 0 where no steps are known."""
    steps_from: StepsFrom
    """Where the steps come from: given, name (checkpoint-40, step_40), or order: none are known."""
    unit: Unit
    """What the steps count: ``step``, a batch of rollouts, or ``update`` if the checkpoints do not record how many of
    the trainer's updates make a step."""
    paired: dict[str, bool]
    """Whether each analysis is of the same sequences as the baseline."""
    differing: dict[str, dict[str, tuple[Any, Any]]]
    """Settings that differ, other than model and responses: (of the analysis, of the baseline)."""
    notes: tuple[str, ...]
    """What could not be compared, and why."""
    layers: pd.DataFrame
    """A row per analysis, layer and site: every mean with its standard error and 95% interval."""
    differences: pd.DataFrame
    """A row per analysis, layer, site and quantity, less the baseline; only where the numbers of layers agree."""
    depths: pd.DataFrame
    """A row per analysis, relative depth and quantity, less the baseline; entropies are interpolated between layers."""
    boundaries: pd.DataFrame
    """A row per analysis: its number in the figures, boundary layer and stages, and how far they moved."""
    stages: pd.DataFrame
    """A row per analysis and layer: its stage and the baseline's."""
    trends: pd.DataFrame
    """A row per layer, site and quantity: slope over the steps, total move, largest move and where; empty if there are
    no trends."""
    convergence: pd.DataFrame
    """A row per analysis: how far, at which depth and how abruptly the entropy falls."""
    fall: pd.DataFrame
    """A row per analysis and layer 1..L: entropy of the layer policy, and the share of the total drop so far."""
    sources: tuple[dict[str, Any], ...] = ()
    """Model, directory and digests of each analysis."""
    no_trends: str | None = None
    """Why there are no trends; None if there are some."""
    one_architecture: bool = True
    """Whether model family, layers, vocabulary and hidden size are the same for all."""
    labels_given: bool = False
    """Whether the labels are the user's own."""
    seed: int = 0
    """Of the bootstrap behind the intervals of the convergence measures."""
    path: Path | None = None
    """Its directory, if it was read from disk."""

    def save(self, directory: str | Path) -> Path:
        """Write every table as CSV, and the manifest last.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with COMPARISON.writing(directory, self.manifest()) as target:
            for name in TABLES:
                write_atomically(target / f"{name}.csv", partial(to_cells(getattr(self, name)).to_csv, index=False))
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``comparison.json``.

        Returns:
            JSON-serialisable fields.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in _STORED_AS_IS},
            "analyses": [
                {"label": label, "step": step, "paired": self.paired[label], **source}
                for label, step, source in zip(self.labels, self.steps, self.sources, strict=True)
            ],
            "differing": {
                label: {name: list(pair) for name, pair in settings.items()}
                for label, settings in self.differing.items()
            },
            "notes": list(self.notes),
            "tables": {name: columns_of(getattr(self, name)) for name in TABLES},
        }

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import card

        rows = zip(self.boundaries.to_dict("records"), self.convergence.to_dict("records"), strict=True)
        cells = [
            (
                place["label"],
                place["n_layers"],
                "none" if pd.isna(place["boundary_layer"]) else place["boundary_layer"],
                number(measures["total_drop"], ".2f"),
                number(measures["half_drop_depth"], ".2f"),
                number(measures["last_three_share"], ".0%"),
                measures["reading"],
            )
            for place, measures in rows
        ]
        headings = ["analysis", "L", "boundary", "drop", "half", "last 3", "reading"]
        note = "drop of H layer, nats; half: relative depth of half of it; last 3: share of the last three layers"
        pairs = f"{sum(self.paired.values()) - 1} of {len(self.labels) - 1} paired with the baseline"
        return card(
            "AnalysisComparison",
            f"of {len(self.labels)}, baseline {self.baseline}",
            (pairs, f"lens {self.lens}", self.no_trends or ""),
            pd.DataFrame(cells, columns=headings),
            note,
        )

    @classmethod
    def load(cls, directory: str | Path) -> AnalysisComparison:
        """Read a comparison from disk; its analyses need not be there any more.

        Args:
            directory: of one comparison, or one that holds a single comparison.

        Returns:
            The comparison, with the tables as CSV has them.

        Raises:
            UserError: no comparison there, unfinished, broken, or written by a newer version.
        """
        source = COMPARISON.find(expanded(directory))
        with COMPARISON.reading(source) as manifest:
            rows = manifest["analyses"]
            differing = {
                label: {name: (pair[0], pair[1]) for name, pair in settings.items()}
                for label, settings in manifest["differing"].items()
            }
            fields: dict[str, Any] = {name: manifest[name] for name in _STORED_AS_IS}
            fields |= {name: read_columns(source / f"{name}.csv", manifest["tables"][name]) for name in TABLES}
            return cls(
                **fields,
                labels=tuple(row["label"] for row in rows),
                steps=tuple(float(row["step"]) for row in rows),
                paired={row["label"]: row["paired"] for row in rows},
                differing=differing,
                notes=tuple(manifest["notes"]),
                sources=tuple({key: row[key] for key in _SOURCE} for row in rows),
                path=source,
            )

    def __repr__(self) -> str:
        n = len(self.labels)
        names = ", ".join(label[-40:] for label in self.labels[:3]) + (f" and {n - 3} more" if n > 3 else "")
        pairs = f"{sum(self.paired.values()) - 1} of {n - 1} paired with it"
        lacking = f"; {self.no_trends}" if self.no_trends else ""
        return f"AnalysisComparison({names}; baseline {self.baseline[-40:]!r}, {pairs}; lens {self.lens}{lacking})"


def compare(
    *analyses: Analysis | str | Path | Iterable[Any],
    baseline: int | str = 0,
    labels: Sequence[str] | None = None,
    steps: Sequence[float] | None = None,
    seed: int = 0,
) -> AnalysisComparison:
    """Compare two or more analyses layer by layer, by relative depth, and over the steps of a training.

    Args:
        analyses: analyses, directories of analyses (one that holds several stands for all, in the order of their steps
            or else of their names), or lists of them. If all names but one have a step, that one is the start of the
            training and comes first, unless steps are given. The same responses of the same weights under another lens
            are set aside; only their boundary layers are shown.
        baseline: what the others are compared with: a label, or an index from 0 in the order of the comparison.
        labels: one for each; by default as much of each name as distinguishes it.
        steps: the step of a training that each is of; by default read from names such as checkpoint-40, and converted
            if the checkpoints record how many updates a step has. Without steps, or with models of several
            architectures, there are no trends.
        seed: of the bootstrap behind the intervals of the convergence measures.

    Returns:
        The comparison.

    Raises:
        UserError: fewer than two analyses, different lenses, or labels, steps or a baseline that do not fit.
    """
    found = collect_analyses(analyses)
    found, aside = keep_one_lens(found)
    if len(found) < 2 and aside:
        answers = " and ".join(f"{a.boundary_layer or 'none'} ({a.lens})" for a in (*found, *aside))
        raise UserError(
            f"got {found[0].name} under {1 + len(aside)} lenses, with the boundary layers {answers}, and nothing to "
            "compare it with; needed is an analysis of another checkpoint or model"
        )
    if len(found) < 2:
        raise UserError(f"got {len(found)} analysis to compare; needed are at least two")
    found, names, numbers, steps_from, unit = label_and_order(found, labels, steps)
    _require_one_lens(found, names)
    items = [Item(name, step, a) for name, step, a in zip(names, numbers, found, strict=True)]
    origin = items[baseline_index(baseline, names)]
    pairs = {item.label: item is origin or is_paired(item, origin) for item in items}
    measured = [measure_convergence(item.analysis, seed=seed) for item in items]
    no_trend = tables.why_no_trends(items, steps_from)
    if no_trend is None:
        trends = tables.trend_rows(items).assign(steps_from=steps_from, unit=unit)
    else:
        trends = pd.DataFrame(columns=[*tables.TREND_COLUMNS, "steps_from", "unit"])
    notes = [
        *tables.find_duplicates(items),
        *([no_trend] if no_trend else []),
        *([tables.UPDATES] if unit == "update" else []),
        *tables.find_incomparable(items, origin, pairs),
        *tables.find_few_prompts(items),
    ]
    return AnalysisComparison(
        labels=tuple(names),
        baseline=origin.label,
        lens=origin.analysis.lens,
        steps=tuple(numbers),
        steps_from=steps_from,
        unit=unit,
        paired=pairs,
        differing={item.label: d for item in items if (d := tables.differing_settings(item.analysis, origin.analysis))},
        notes=tuple(notes),
        layers=tables.layer_rows(items),
        differences=tables.difference_rows(items, origin),
        depths=tables.depth_rows(items, origin),
        boundaries=tables.boundary_rows(items, origin, aside),
        stages=tables.stage_rows(items, origin),
        trends=trends,
        convergence=convergence_table(measured, labels=names),
        fall=pd.concat(
            [m.curve.assign(label=name) for m, name in zip(measured, names, strict=True)], ignore_index=True
        )[["label", *measured[0].curve.columns]],
        sources=tuple(
            {
                "model": item.analysis.name,
                "path": None if item.analysis.path is None else str(item.analysis.path),
                "weights": item.analysis.config.get("weights"),
                "inputs": item.analysis.config.get("inputs"),
            }
            for item in items
        ),
        no_trends=no_trend,
        one_architecture=not architecture_differences(found),
        labels_given=labels is not None,
        seed=seed,
    )


def as_comparison(
    given: AnalysisComparison | Iterable[Analysis], label: Iterable[str] | None = None
) -> AnalysisComparison:
    """Convert what a figure of a comparison is given into a comparison.

    Args:
        given: a comparison, or analyses, of which the first is then the baseline.
        label: labels to use instead of the comparison's, in their order.

    Returns:
        The comparison.

    Raises:
        UserError: analyses that cannot be compared, or labels that do not fit.
    """
    names = [label] if isinstance(label, str) else list(label or [])
    if not isinstance(given, AnalysisComparison):
        return compare(given, labels=names or None)
    if not names:
        return given
    if len(names) != len(given.labels) or len(set(names)) < len(names):
        raise UserError(f"got labels {names}; needed are {len(given.labels)} that differ, one for each analysis")
    new = dict(zip(given.labels, names, strict=True))
    tables_with = {name: getattr(given, name) for name in TABLES if "label" in getattr(given, name)}
    renamed: dict[str, Any] = {name: table.assign(label=table["label"].map(new)) for name, table in tables_with.items()}
    renamed |= {name: {new[k]: v for k, v in getattr(given, name).items()} for name in ("paired", "differing")}
    return replace(given, **renamed, labels=tuple(names), baseline=new[given.baseline], labels_given=True, path=None)


def _require_one_lens(analyses: Sequence[Analysis], names: Sequence[str]) -> None:
    for analysis, name in zip(analyses, names, strict=True):
        if analysis.lens != analyses[0].lens:
            raise UserError(
                f"{names[0]} was analysed with the lens {analyses[0].lens} and {name} with {analysis.lens}, whose "
                "entropies are of other policies; analyse both with the same --lens"
            )
