"""The internal policies of one sequence, token by token, in memory and on disk. Nothing here needs torch.

``inspection.json`` is written last: a directory without it is not an inspection.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.inspection.config import Span, check_choice
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat
from internal_policy.utils.table_io import from_cells, read_parquet, to_cells, write_parquet

SCHEMA_VERSION = 1
MANIFEST = "inspection.json"
_SHOWN = 8
"""Rows of the small table in a notebook."""
_FILES = ("values.parquet", "tokens.csv")
INSPECTION = ResultFormat("inspection", "inspections", "inspect", "inspect", MANIFEST, SCHEMA_VERSION, _FILES)


@dataclass(frozen=True)
class Inspection:
    """Every internal policy at every token of one sequence. Entropies in nats, layers counted from 1."""

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, layers L, vocabulary V, dtype, device."""
    config: dict[str, Any]
    """Prompt, and the response if it was given; lens, template, top_k; how the response was sampled, if it was; a
    digest of the weights."""
    tokens: pd.DataFrame
    """A row per token: position (from 1), part (prompt or response), id, token (its text in printable form)."""
    values: pd.DataFrame
    """A row per position, layer and site. ``layer``, ``attn``, ``ffn``: the policies of H^l, A^l, F^l, and ``layer`` at
    layer 0 that of H^0, the embedding; ``policy`` at layer L: pi_theta. They predict the token after ``position``.
    Columns: entropy (nats); next_id, next_rank (from 1), next_probability of the token that came next, empty at the
    last position; top1_id, top1_token, top1_probability, top2_..."""
    path: Path | None = None
    """Its directory."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model["vocabulary"])

    @property
    def n_tokens(self) -> int:
        """T: tokens of prompt and response."""
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        """P: tokens of the prompt."""
        return int((self.tokens["part"] == "prompt").sum())

    @property
    def lens(self) -> str:
        """The name of its lens, such as ``policy`` or ``logit-lens``."""
        return str(self.config["lens"])

    @property
    def top_k(self) -> int:
        """Number of tokens of each policy that are kept."""
        return int(self.config["top_k"])

    def positions(self, tokens: Span | None = None, last: int | None = None) -> range:
        """Choose tokens.

        Args:
            tokens: which ones; not together with ``last``.
            last: the number of tokens at the end; 24 if neither is given.

        Returns:
            Positions, from 1.

        Raises:
            UserError: both were given, or a span without a token.
        """
        n, choice = self.n_tokens, check_choice(tokens, last)
        if isinstance(choice, int):
            return range(max(1, n - choice + 1), n + 1)
        first, end = 1 if choice[0] is None else choice[0], n if choice[1] is None else choice[1]
        if not 1 <= first <= min(end, n):
            raise UserError(f"--tokens is {first}:{end} of {n} tokens; needed are places from 1, the lower one first")
        return range(first, min(end, n) + 1)

    def save(self, directory: str | Path) -> Path:
        """Write the inspection to a directory; the manifest last.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with INSPECTION.writing(directory, self.manifest()) as target:
            write_parquet(target / "values.parquet", self.values)
            write_atomically(target / "tokens.csv", partial(to_cells(self.tokens).to_csv, index=False))
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``inspection.json``.

        Returns:
            JSON-serialisable fields.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": self.model,
            "config": self.config,
            "n_tokens": self.n_tokens,
            "prompt_length": self.prompt_length,
            "versions": self.versions,
        }

    def place(self, root: Path, name: str) -> str:
        """Choose the name of a directory that holds no other inspection.

        Args:
            root: the parent directory.
            name: the preferred name.

        Returns:
            The name if it is free or holds the same inspection, which is then replaced; else the name with the first
            number from 2 for which this is true.
        """
        mine = json.loads(json.dumps({"model": self.model, "config": self.config}))
        for number in itertools.count(1):
            numbered = name if number == 1 else f"{name}-{number}"
            try:
                manifest = json.loads((root / numbered / MANIFEST).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                break
            if all(manifest.get(key) == value for key, value in mine.items()):
                break
        return numbered

    @classmethod
    def load(cls, directory: str | Path) -> Inspection:
        """Read an inspection from disk.

        Args:
            directory: of one inspection, or one that holds a single inspection.

        Returns:
            The inspection.

        Raises:
            UserError: no inspection there, broken, or written by a newer version.
        """
        source = INSPECTION.find(expanded(directory))
        with INSPECTION.reading(source) as manifest:
            # A token such as NA or 007 is text.
            tokens = pd.read_csv(source / "tokens.csv", dtype={"token": str}, keep_default_na=False, na_values=[])
            return cls(
                name=manifest["name"],
                model=manifest["model"],
                config=manifest["config"],
                tokens=from_cells(tokens),
                values=read_parquet(source / "values.parquet"),
                versions=manifest["versions"],
                path=source,
            )

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import card

        shown = self.positions(None, min(_SHOWN, self.n_tokens))
        texts = self.tokens.set_index("position")["token"]
        policy = self.values[(self.values["site"] == "policy") & self.values["position"].isin(shown)]
        cells = [
            (
                row["position"],
                texts[row["position"]],
                texts.get(row["position"] + 1, ""),
                row["top1_token"],
                number(row["entropy"]),
                number(row["next_probability"]),
            )
            for row in policy.sort_values("position").to_dict("records")
        ]
        headings = ["position", "token read", "came next", "top token of π_θ", "H(π_θ)", "p(next)"]
        note = f"the last {len(cells)} of {counted(self.n_tokens, 'token')}; H in nats"
        facts = (
            f"{counted(self.prompt_length, 'token')} of a prompt, {self.n_tokens - self.prompt_length} of a response",
            f"{counted(self.n_layers, 'layer')}, lens {self.lens}",
        )
        return card("Inspection", self.name, facts, pd.DataFrame(cells, columns=headings), note)

    def __repr__(self) -> str:
        return (
            f"Inspection({self.name!r}, {counted(self.prompt_length, 'token')} of a prompt and "
            f"{self.n_tokens - self.prompt_length} of a response, {counted(self.n_layers, 'layer')}, lens {self.lens})"
        )
