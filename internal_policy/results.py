"""The result of an analysis, in memory and on disk.

A directory holds one analysis of one checkpoint. ``analysis.json`` is written last: a directory without it is not an
analysis, so nothing half-written is ever read as whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.files import expanded, write_atomically
from internal_policy.selection import Selection
from internal_policy.stored import Kind, read_rows, write_rows

SCHEMA_VERSION = 1
MANIFEST = "analysis.json"
REPORT = "report.html"
"""The page that is drawn of a result; results are whole without it."""
RESULT_FILES = ("layers.csv", "responses.parquet", "tokens.parquet", "responses.jsonl", MANIFEST, REPORT)
ANALYSIS = Kind("analysis", "analyses", "analyze", "analyse", MANIFEST, SCHEMA_VERSION)


@dataclass(frozen=True)
class Analysis:
    """Entropies of the internal policies of one checkpoint, with the target layer.

    All entropies are in nats, all layers are counted from 1.
    """

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, layers L, vocabulary V, hidden size d, dtype, device."""
    config: dict[str, Any]
    """The settings, with digests of weights and inputs."""
    layers: pd.DataFrame
    """One row per layer and site (layer, attn, ffn): means over tokens with clustered standard errors; with a tolerance
    also change_half_width, how far the change may be off because not every position was analysed."""
    responses: pd.DataFrame
    """One row per response, layer and site: the means of that response; with a tolerance estimates of them."""
    tokens: pd.DataFrame
    """One row per analysed token, layer and site, for the responses that were kept token by token; token_text is how
    the token is shown (analyses from before it was stored lack the column)."""
    sequences: pd.DataFrame
    """What was analysed: prompt, response, input_ids, prompt_length, reward."""
    policy_entropy: dict[str, float]
    """mean and stderr of the entropy of pi_theta; final_state_mean, final_state_stderr: of H^L without the norm."""
    selection: Selection
    """Target layer, stages, and how sure they are."""
    positions: dict[str, Any] | None = None
    """Where a tolerance was given: tolerance, analysed and total positions, rounds, and the largest half_width of an
    entropy change with its layer and site; None where every position was analysed."""
    n_truncated: int | None = None
    """Sampled responses that reached the limit of tokens before they ended; None where responses were given."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Where it is on disk."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model["vocabulary"])

    @property
    def lens(self) -> str:
        """``policy`` or ``logit-lens``."""
        return str(self.config["lens"])

    @property
    def boundary_layer(self) -> int | None:
        """The target layer, from 1; None where the rule has no answer."""
        return self.selection.boundary_layer

    @property
    def stages(self) -> tuple[str, ...]:
        """exploration, integration or convergence, for layers 1..L."""
        return self.selection.stages

    @property
    def n_responses(self) -> int:
        """Number of responses."""
        return len(self.sequences)

    @property
    def n_tokens(self) -> int:
        """Number of response tokens."""
        return int(self.layers["n_tokens"].iloc[0])

    def curve(self, site: str, value: str = "change") -> pd.Series:
        """One column of ``layers`` for one site.

        Args:
            site: layer, attn or ffn.
            value: a column: change, entropy_in, entropy_out, cosine, or one of their ``_stderr``.

        Returns:
            [L] values, indexed by layer from 1.
        """
        rows = self.layers[self.layers["site"] == site]
        return rows.set_index("layer")[value]

    def save(self, directory: str | Path) -> Path:
        """Write the analysis to a directory; the manifest last.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with ANALYSIS.writing(directory, self.manifest()) as target:
            write_atomically(target / "layers.csv", lambda p: self.layers.to_csv(p, index=False))
            write_atomically(target / "responses.parquet", lambda p: self.responses.to_parquet(p, index=False))
            write_atomically(target / "tokens.parquet", lambda p: self.tokens.to_parquet(p, index=False))
            write_rows(target / "responses.jsonl", self.sequences)
        return target

    def manifest(self) -> dict[str, Any]:
        """What ``analysis.json`` holds.

        Returns:
            JSON-able fields; NaN is null.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": self.model,
            "config": self.config,
            "n_responses": self.n_responses,
            "n_tokens": self.n_tokens,
            "positions": self.positions,
            "n_truncated": self.n_truncated,
            "boundary_layer": self.boundary_layer,
            "stages": list(self.stages),
            "selection": self.selection.to_dict(),
            "policy_entropy": {k: None if v != v else v for k, v in self.policy_entropy.items()},
            "timings": self.timings,
            "versions": self.versions,
        }

    @classmethod
    def load(cls, directory: str | Path) -> Analysis:
        """Read an analysis from disk.

        Args:
            directory: of one analysis, or one that holds a single analysis.

        Returns:
            The analysis.

        Raises:
            UserError: no analysis there, unfinished, broken, or written by a newer version.
        """
        source = ANALYSIS.find(expanded(directory))
        with ANALYSIS.reading(source) as manifest:
            return cls(
                name=manifest["name"],
                model=manifest["model"],
                config=manifest["config"],
                layers=pd.read_csv(source / "layers.csv"),
                responses=pd.read_parquet(source / "responses.parquet"),
                tokens=pd.read_parquet(source / "tokens.parquet"),
                sequences=read_rows(source / "responses.jsonl"),
                policy_entropy={k: float("nan") if v is None else v for k, v in manifest["policy_entropy"].items()},
                selection=Selection.from_dict(manifest["selection"]),
                positions=manifest.get("positions"),
                n_truncated=manifest["n_truncated"],
                timings=manifest["timings"],
                versions=manifest["versions"],
                path=source,
            )

    @classmethod
    def load_all(cls, directory: str | Path) -> list[Analysis]:
        """Read every analysis below a directory, such as those of a sweep.

        Args:
            directory: of one analysis, or above several.

        Returns:
            The analyses, in the order of their steps where their names tell them, else of their names.

        Raises:
            UserError: no analysis there, or a broken one.
        """
        from internal_policy.comparison.sources import gather

        return gather([directory])

    def _repr_html_(self) -> str:
        from internal_policy.figures import entropy_change
        from internal_policy.notebook import Rows, card
        from internal_policy.printing import number

        ends = {site: self.curve(site) for site in ("attn", "ffn")}
        entropy, cells, start = self.curve("layer", "entropy_out"), [], 1
        for stage, run in groupby(self.stages):
            end = start + len(list(run)) - 1
            means = (number(curve.loc[start:end].mean(), "+.3f") for curve in ends.values())
            span = str(start) if start == end else f"{start}-{end}"
            cells.append((stage, span, number(entropy.loc[end]), *means))
            start = end + 1
        sure = self.selection.confidence
        boundary = "no boundary layer" if self.boundary_layer is None else f"boundary layer {self.boundary_layer}"
        facts = (
            boundary + ("" if sure is None else f" ({sure:.0%} of the resamples)"),
            f"{self.n_layers} layers, {self.n_responses} responses, {self.n_tokens} tokens, lens {self.lens}",
            f"policy entropy {number(self.policy_entropy['mean'])} nats",
        )
        headings = ("stage", "layers", "H at its end", "mean ΔH ATTN", "mean ΔH FFN")
        table = Rows(headings, cells, left=("stage",), note="nats; .layers has every layer, with standard errors")
        return card("Analysis", self.name, facts, table, entropy_change([self]))

    def __repr__(self) -> str:
        boundary = "none" if self.boundary_layer is None else self.boundary_layer
        return (
            f"Analysis({self.name!r}, {self.n_layers} layers, {self.n_responses} responses, {self.n_tokens} tokens, "
            f"boundary layer {boundary})"
        )
