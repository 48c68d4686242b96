"""The result of activation patching, in memory and on disk. Nothing here needs torch.

``patching.json`` is written last: a directory without it is not a result of patching.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.utils.errors import counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat
from internal_policy.utils.table_io import columns_of, read_columns, read_parquet, to_cells, write_parquet

SCHEMA_VERSION = 1
MANIFEST = "patching.json"
_FILES = ("values.parquet", "tokens.csv")
PATCHING = ResultFormat("patching", "patchings", "patch", "patch", MANIFEST, SCHEMA_VERSION, _FILES)


@dataclass(frozen=True)
class Patching:
    """What each state of a clean run recovers in the run on a corrupted prompt. Layers and positions from 1."""

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, layers L, vocabulary V, dtype, device."""
    config: dict[str, Any]
    """The settings, with a digest of the weights."""
    metric: dict[str, Any]
    """Its name; its values clean and corrupted (nats); answer_id and answer_token, wrong_id and wrong_token."""
    tokens: pd.DataFrame
    """A row per position: clean_id, clean_token, corrupted_id, corrupted_token."""
    values: pd.DataFrame
    """A row per layer, site and position: value, the metric with this one state of the clean run, and recovery
    (value - corrupted) / (clean - corrupted): 0 is nothing, 1 all of the difference."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Its directory."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def n_tokens(self) -> int:
        """Tokens of each prompt."""
        return len(self.tokens)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that were patched."""
        return tuple(dict.fromkeys(self.values["site"]))

    def labels(self) -> dict[int, str]:
        """How each position is labelled: its token, and both where they differ (``22→21``)."""
        pairs = self.tokens[["position", "clean_token", "corrupted_token"]].itertuples(index=False)
        return {int(p): str(one) if one == other else f"{one}→{other}" for p, one, other in pairs}

    def save(self, directory: str | Path) -> Path:
        """Write the result to a directory; the manifest last.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with PATCHING.writing(directory, self.manifest()) as target:
            write_parquet(target / "values.parquet", self.values)
            write_atomically(target / "tokens.csv", partial(to_cells(self.tokens).to_csv, index=False))
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``patching.json``.

        Returns:
            JSON-serialisable fields.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": self.model,
            "config": self.config,
            "metric": self.metric,
            "n_tokens": self.n_tokens,
            "columns": columns_of(self.tokens),
            "versions": self.versions,
        }

    @classmethod
    def load(cls, directory: str | Path) -> Patching:
        """Read a result from disk.

        Args:
            directory: of one result, or one that holds a single result.

        Returns:
            The result.

        Raises:
            UserError: no result there, broken, or written by a newer version.
        """
        source = PATCHING.find(expanded(directory))
        with PATCHING.reading(source) as manifest:
            return cls(
                name=manifest["name"],
                model=manifest["model"],
                config=manifest["config"],
                metric=manifest["metric"],
                tokens=read_columns(source / "tokens.csv", manifest["columns"]),
                values=read_parquet(source / "values.parquet"),
                versions=manifest["versions"],
                path=source,
            )

    def describe_metric(self) -> str:
        """Say what is recovered: ``logit of 18 less that of 19``."""
        answer, wrong = self.metric["answer_token"], self.metric["wrong_token"]
        return f"log-probability of {answer}" if wrong is None else f"logit of {answer} less that of {wrong}"

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import MOST_ROWS, card

        labels, best = self.labels(), self.values.nlargest(MOST_ROWS, "recovery")
        cells = [
            (row["layer"], row["site"], row["position"], labels[row["position"]], number(row["recovery"], ".2f"))
            for row in best.to_dict("records")
        ]
        facts = (
            f"{self.describe_metric()}: {self.metric['clean']:.3f} clean, {self.metric['corrupted']:.3f} corrupted",
            counted(self.n_tokens, "token"),
        )
        table = pd.DataFrame(cells, columns=["layer", "site", "position", "token", "recovery"])
        note = f"the {len(best)} largest of {counted(len(self.values), 'recovery')}; 1 is all of the difference"
        return card("Patching", self.name, facts, table, note)

    def __repr__(self) -> str:
        return (
            f"Patching({self.name!r}, {counted(self.n_tokens, 'token')}, {self.describe_metric()}: "
            f"{self.metric['clean']:.3f} clean, {self.metric['corrupted']:.3f} corrupted)"
        )
