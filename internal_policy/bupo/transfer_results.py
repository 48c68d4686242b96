"""Which layer carries the reward: the result of ``bupo.transfer``. Nothing here needs torch.

``transfer.json`` is written last, so that a directory without it is not a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.utils.console import number
from internal_policy.utils.errors import counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat
from internal_policy.utils.table_io import EXACT

SCHEMA_VERSION = 1
MANIFEST = "transfer.json"
TABLE = "transfer.csv"
TRANSFER = ResultFormat("transfer", "transfers", "transfer", "measure", MANIFEST, SCHEMA_VERSION, (TABLE,))
COLUMNS = ("layer", "cosine", "stderr", "low", "high", "across", "ceiling", "own_ceiling")


@dataclass(frozen=True)
class Transfer:
    """How much of the gradient of GRPO the alignment of each layer's policy already follows. Layers from 1."""

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, layers L, dtype, device."""
    config: dict[str, Any]
    """The settings, with digests of weights and prompts."""
    table: pd.DataFrame
    """A row per layer: cosine of the two gradients over the parameters that both reach, its stderr over prompts, low
    and high (95% interval); across, the mean cosine of one's gradient on one half of the prompts with the other's on
    the other half, which share no noise; ceiling, the cosine of GRPO's own gradients on the two halves, and
    own_ceiling, that of the alignment's."""
    n_prompts: int
    """Prompts."""
    n_informative: int
    """Prompts whose responses have different rewards; the others have no gradient."""
    mean_reward: float
    """Mean reward of the responses."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds of sampling and of the gradients."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Its directory."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def summary(self) -> str:
        """One sentence that says at which layer the two objectives agree most, below L, where they nearly coincide."""
        below = self.table[self.table["layer"] < self.n_layers]
        shown = below if len(below) else self.table
        top = shown.sort_values("cosine", kind="stable", na_position="first").to_dict("records")[-1]
        where = f"below layer {self.n_layers} " if len(below) else ""
        return (
            f"{where}alignment agrees most with GRPO at layer {int(top['layer'])}: cosine "
            f"{number(top['cosine'], '.2f')} (95% {number(top['low'], '.2f')} to {number(top['high'], '.2f')}); across "
            "two halves of the prompts "
            f"{number(top['across'], '.2f')}, where GRPO agrees with itself to {number(top['ceiling'], '.2f')}"
        )

    def save(self, directory: str | Path) -> Path:
        """Write the result to a directory; the manifest last.

        Args:
            directory: made if it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with TRANSFER.writing(directory, self.manifest()) as target:
            write_atomically(target / TABLE, partial(self.table.to_csv, index=False))
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``transfer.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in ("name", "model", "config", "n_prompts", "n_informative")},
            **{name: getattr(self, name) for name in ("mean_reward", "timings", "versions")},
        }

    @classmethod
    def load(cls, directory: str | Path) -> Transfer:
        """Read a result from disk.

        Args:
            directory: of one result, or one that contains a single one.

        Returns:
            The result.

        Raises:
            UserError: none there, unfinished, broken, or written by a newer version.
        """
        source = TRANSFER.find(expanded(directory))
        with TRANSFER.reading(source) as manifest:
            table = pd.read_csv(source / TABLE, **EXACT)
            if lacking := [name for name in COLUMNS if name not in table]:
                raise ValueError(f"{TABLE} has no column {lacking[0]}")
            stored = ("name", "model", "config", "n_prompts", "n_informative", "mean_reward", "timings", "versions")
            return cls(table=table, path=source, **{name: manifest[name] for name in stored})

    def _repr_html_(self) -> str:
        from internal_policy.utils.html import card

        rows = [
            (
                int(row["layer"]),
                number(row["cosine"], "+.3f"),
                f"{number(row['low'], '+.3f')} to {number(row['high'], '+.3f')}",
                number(row["across"], "+.3f"),
                number(row["ceiling"], "+.3f"),
                number(row["own_ceiling"], "+.3f"),
            )
            for row in self.table.to_dict("records")
        ]
        facts = (
            f"{counted(self.n_prompts, 'prompt')}, {self.n_informative} with different rewards",
            f"mean reward {number(self.mean_reward, '.3f')}",
        )
        headings = ["layer", "cosine with GRPO", "95% interval", "across halves", "ceiling", "own ceiling"]
        return card("Transfer", self.name, facts, pd.DataFrame(rows, columns=headings), self.summary)

    def __repr__(self) -> str:
        return f"Transfer({self.name!r}, {counted(len(self.table), 'layer')}, {counted(self.n_prompts, 'prompt')})"


def transfer_data(results: Transfer | Sequence[Transfer]) -> pd.DataFrame:
    """Return the numbers of the figure: the table of each result, with its model."""
    given = [results] if isinstance(results, Transfer) else list(results)
    return pd.concat([result.table.assign(model=result.name) for result in given], ignore_index=True)
