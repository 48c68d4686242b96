"""The result of an analysis, in memory and on disk.

A directory contains one analysis of one checkpoint. ``analysis.json`` is written last, so a directory without it is
never read as an analysis.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis import change_parts
from internal_policy.analysis.layer_selection import Selection
from internal_policy.analysis.token_groups import TokenGroups, group_tokens
from internal_policy.analysis.token_labels import LABELS, GroupingName, LabelFunction
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat
from internal_policy.utils.table_io import read_parquet, read_rows, write_parquet, write_rows

SCHEMA_VERSION = 1
MANIFEST = "analysis.json"
REPORT = "report.html"
"""The page that is drawn of a result, which is complete without it."""
BASELINE = "baseline.csv"
ADDITION_FILES = {
    "heads": "heads.csv",
    "experts": "experts.csv",
    "divergences": "divergences.csv",
    "divergence_matrix": "divergence_matrix.csv",
    "groups": "groups.parquet",
}
"""The tables of additions (see ``additions``), and the file of each."""
_FILES = (
    *("layers.csv", BASELINE, "responses.parquet", "tokens.parquet", "responses.jsonl"),
    *ADDITION_FILES.values(),
)
ANALYSIS = ResultFormat("analysis", "analyses", "analyze", "analyse", MANIFEST, SCHEMA_VERSION, _FILES, (REPORT,))


@dataclass(frozen=True)
class LensResult:
    """The result of the same responses and weights under another lens."""

    lens: str
    """Its name."""
    boundary_layer: int | None
    """The boundary layer under it, from 1; None if there is none."""
    path: Path | None
    """The directory of that analysis."""
    share: float | None = None
    """Share of the resamples under it that give the boundary layer of this analysis; None if unknown."""


@dataclass(frozen=True)
class Analysis:
    """Entropies of the internal policies of one checkpoint, with the boundary layer.

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
    """Boundary layer, stages, and how sure they are; once loaded also what other lenses give (`with_other_lenses`)."""
    positions: dict[str, Any] | None = None
    """With a tolerance: the tolerance, analysed and total positions, rounds, and the largest half_width of an
    entropy change with its layer and site; None if every position was analysed."""
    n_truncated: int | None = None
    """Sampled responses that reached the limit of tokens before they ended; None if responses were given."""
    baseline: pd.DataFrame | None = None
    """The rows of `layers` for the same responses with random weights of the same architecture (--random-baseline)."""
    baseline_model: dict[str, Any] | None = None
    """Seed and digest of these weights, with their boundary_layer and policy_entropy."""
    additions: dict[str, pd.DataFrame] = field(default_factory=dict)
    """The tables of optional measurements, by name: heads and experts (--heads), divergences and divergence_matrix
    (--divergences), groups (--by)."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Its directory on disk."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.model["vocabulary"])

    @property
    def n_parameters(self) -> int | None:
        """The number of the model's parameters; None if it was not recorded."""
        return self.model.get("parameters")

    @property
    def lens(self) -> str:
        """The name of its lens, such as ``policy`` or ``logit-lens``."""
        return str(self.config["lens"])

    @property
    def boundary_layer(self) -> int | None:
        """The boundary layer, from 1; None if the rule has no answer."""
        return self.selection.boundary_layer

    @property
    def stages(self) -> tuple[str, ...]:
        """exploration, integration or convergence, for layers 1..L."""
        return self.selection.stages

    @property
    def length_share(self) -> float | None:
        """Share of the exploration that is length and not direction, see `analysis.change_parts`; None if unknown."""
        return change_parts.length_share(self.layers, self.selection)

    @property
    def n_responses(self) -> int:
        """Number of responses."""
        return len(self.sequences)

    @property
    def n_prompts(self) -> int:
        """Number of distinct prompts, over which standard errors are clustered and resamples are drawn."""
        return int(self.responses["prompt"].nunique())

    @property
    def n_tokens(self) -> int:
        """Number of response tokens."""
        return int(self.layers["n_tokens"].iloc[0])

    @property
    def extent(self) -> str:
        """How much was analysed: ``32 responses, 7100 tokens``, or ``428 of 7100 tokens`` with a tolerance."""
        chosen = "" if self.positions is None else f"{self.positions['analysed']} of "
        return f"{counted(self.n_responses, 'response')}, {chosen}{counted(self.n_tokens, 'token')}"

    @property
    def groupings(self) -> tuple[GroupingName, ...]:
        """The groupings of tokens that were measured on all responses (--by), for `by`."""
        groups = self.additions.get("groups")
        measured = set() if groups is None else set(groups["grouping"])
        return tuple(name for name in LABELS if name in measured)

    @cached_property
    def responses_digest(self) -> str:
        """16 hexadecimal digits: the same for the same ids with the same prompt lengths, in any order."""
        rows = zip(self.sequences["prompt_length"], self.sequences["input_ids"], strict=True)
        read = sorted([int(length), *map(int, ids)] for length, ids in rows)
        return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]

    @property
    def other_lenses(self) -> list[LensResult]:
        """The results of the same responses and weights under other lenses that are on disk."""
        return find_other_lenses(self)

    def curve(self, site: str, value: str = "change") -> pd.Series:
        """One column of ``layers`` for one site.

        Args:
            site: layer, attn or ffn.
            value: a column: change, entropy_in, entropy_out, cosine, or one of their ``_stderr``.

        Returns:
            [L] values, indexed by layer from 1.

        Raises:
            UserError: no such site or column.
        """
        columns = [name for name in self.layers if name not in ("layer", "site")]
        for name, asked, known in (("site", site, self.layers["site"].unique()), ("value", value, columns)):
            if asked not in known:
                raise UserError(f"{name} is {asked!r}; needed is one of {', '.join(map(str, known))}")
        rows = self.layers[self.layers["site"] == site]
        return rows.set_index("layer")[value]

    def by(self, labels: GroupingName | LabelFunction) -> TokenGroups:
        """Divide the response tokens into groups, with every statistic of every layer and site for each.

        Args:
            labels: ``kind`` (digit, operator, word, format), ``position`` (decile of the response), ``correct`` (right
                or wrong answer), ``policy-entropy`` (the 20% of tokens with the highest entropy of the final policy,
                against the rest), or a function from a token's text, its index in the response (from 0) and the
                response (a row of `sequences`) to the token's label, or None to leave it out.

        Returns:
            The groups: of all responses if they were measured (``by=("kind",)`` in ``analyze``) and for ``correct``,
            otherwise of the first responses, whose tokens were kept; its `n_responses` and `note` say how many.

        Raises:
            UserError: an unknown name, no tokens were kept, no response has a reward, or positions were chosen at
                random for a tolerance.
        """
        return group_tokens(self, labels)

    def save(self, directory: str | Path) -> Path:
        """Write the analysis to a directory; the manifest last.

        Args:
            directory: made if it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with ANALYSIS.writing(directory, self.manifest()) as target:
            write_atomically(target / "layers.csv", lambda p: self.layers.to_csv(p, index=False))
            write_parquet(target / "responses.parquet", self.responses)
            write_parquet(target / "tokens.parquet", self.tokens)
            write_rows(target / "responses.jsonl", self.sequences)
            for file in (BASELINE, *ADDITION_FILES.values()):
                (target / file).unlink(missing_ok=True)
            self._write_baseline(target)
            self._write_additions(target, self.additions)
        return target

    def save_baseline(self) -> None:
        """Add the baseline to the analysis on disk; the manifest last."""
        assert self.path is not None
        self._write_baseline(self.path)
        ANALYSIS.write_manifest(self.path, self.manifest())

    def save_additions(self, tables: Mapping[str, pd.DataFrame], options: Mapping[str, Any]) -> None:
        """Add tables of additions to the analysis on disk, or replace them; the manifest last.

        Args:
            tables: by name (see `ADDITION_FILES`).
            options: the options that asked for them, with the values that the settings have then.
        """
        assert self.path is not None
        if replaced := tables.keys() & self.additions.keys():
            # First they leave the manifest, so that the analysis on disk is whole whenever this is interrupted.
            kept = {name: table for name, table in self.additions.items() if name not in replaced}
            reduced = replace(self, config={**self.config, **dict.fromkeys(options)}, additions=kept)
            files = {ADDITION_FILES[name] for name in replaced}
            ANALYSIS.write_manifest(self.path, reduced.manifest(), without=files)
        self._write_additions(self.path, tables)
        config, additions = {**self.config, **options}, {**self.additions, **tables}
        ANALYSIS.write_manifest(self.path, replace(self, config=config, additions=additions).manifest())

    def _write_additions(self, directory: Path, tables: Mapping[str, pd.DataFrame]) -> None:
        for name, table in tables.items():
            file = directory / ADDITION_FILES[name]
            if file.suffix == ".csv":
                write_atomically(file, partial(table.to_csv, index=False))
            else:
                write_parquet(file, table)

    def _write_baseline(self, directory: Path) -> None:
        if (baseline := self.baseline) is not None:
            write_atomically(directory / BASELINE, lambda p: baseline.to_csv(p, index=False))

    def manifest(self) -> dict[str, Any]:
        """The content of ``analysis.json``.

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
            "responses_digest": self.responses_digest,
            "positions": self.positions,
            "n_truncated": self.n_truncated,
            "boundary_layer": self.boundary_layer,
            "stages": list(self.stages),
            "selection": self.selection.to_dict(),
            "policy_entropy": _without_nan(self.policy_entropy),
            "baseline": None
            if self.baseline_model is None
            else {**self.baseline_model, "policy_entropy": _without_nan(self.baseline_model["policy_entropy"])},
            "additions": list(self.additions),
            "timings": self.timings,
            "versions": self.versions,
        }

    @classmethod
    def load(cls, directory: str | Path) -> Analysis:
        """Read an analysis from disk.

        Args:
            directory: of one analysis, or one that contains a single analysis.

        Returns:
            The analysis.

        Raises:
            UserError: no analysis there, unfinished, broken, or written by a newer version.
        """
        source = ANALYSIS.find(expanded(directory))
        with ANALYSIS.reading(source) as manifest:
            baseline = manifest.get("baseline")
            analysis = cls(
                name=manifest["name"],
                model=manifest["model"],
                config=manifest["config"],
                layers=pd.read_csv(source / "layers.csv"),
                responses=read_parquet(source / "responses.parquet"),
                tokens=read_parquet(source / "tokens.parquet"),
                sequences=read_rows(source / "responses.jsonl"),
                policy_entropy=_with_nan(manifest["policy_entropy"]),
                selection=Selection.from_dict(manifest["selection"]),
                positions=manifest.get("positions"),
                n_truncated=manifest["n_truncated"],
                baseline=None if baseline is None else pd.read_csv(source / BASELINE),
                baseline_model=baseline and {**baseline, "policy_entropy": _with_nan(baseline["policy_entropy"])},
                additions={name: _read_addition(source, name) for name in manifest.get("additions", ())},
                timings=manifest["timings"],
                versions=manifest["versions"],
                path=source,
            )
            _check_agreement(analysis, manifest)
            return with_other_lenses(analysis)

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import few_prompts, number
        from internal_policy.utils.html import card

        ends = {site: self.curve(site) for site in ("attn", "ffn")}
        entropy, cells, start = self.curve("layer", "entropy_out"), [], 1
        for stage, run in groupby(self.stages):
            end = start + len(list(run)) - 1
            means = (number(curve.loc[start:end].mean(), "+.3f") for curve in ends.values())
            span = str(start) if start == end else f"{start}-{end}"
            cells.append((stage, span, number(entropy.loc[end]), *means))
            start = end + 1
        boundary = "no boundary layer" if self.boundary_layer is None else f"boundary layer {self.boundary_layer}"
        facts = (
            boundary,
            self.selection.agreement,
            few_prompts(self.n_prompts) or "",
            change_parts.length_sentence(self.layers, self.selection, self.lens) or "",
            f"{counted(self.n_layers, 'layer')}, {self.extent}, lens {self.lens}",
            f"policy entropy {number(self.policy_entropy['mean'])} nats",
        )
        table = pd.DataFrame(cells, columns=["stage", "layers", "H at its end", "mean ΔH ATTN", "mean ΔH FFN"])
        return card("Analysis", self.name, facts, table, "nats; .layers has every layer, with standard errors")

    def __repr__(self) -> str:
        boundary = "none" if self.boundary_layer is None else self.boundary_layer
        return f"Analysis({self.name!r}, {counted(self.n_layers, 'layer')}, {self.extent}, boundary layer {boundary})"


def find_other_lenses(analysis: Analysis, among: Sequence[Analysis] = ()) -> list[LensResult]:
    """Find the results of the same responses of the same weights under other lenses, one for each lens.

    Analyses in memory (`among`) come first, then those next to this one on disk, by the names of their directories.
    """
    found: dict[str, LensResult] = {}

    def add(lens: str, selection: Selection, path: Path | None) -> None:
        share = selection.share_of(analysis.boundary_layer)
        found.setdefault(lens, LensResult(lens, selection.boundary_layer, path, share))

    for other in among:
        if other.lens != analysis.lens and _is_same_data(analysis, other.config.get("weights"), other.responses_digest):
            add(other.lens, other.selection, other.path)
    weights = analysis.config.get("weights")
    if analysis.path is None:
        return list(found.values())
    for path in sorted(analysis.path.resolve().parent.glob("*/analysis.json")):
        # A broken analysis is reported when it is loaded itself.
        with suppress(OSError, ValueError, KeyError, TypeError):
            text = path.read_text(encoding="utf-8")
            # A sweep has hundreds of other weights, whose manifests need not be parsed.
            if weights is not None and weights not in text:
                continue
            manifest = json.loads(text)
            lens = manifest["config"]["lens"]
            same = lens != analysis.lens and manifest["config"]["weights"] == weights
            if same and _is_same_data(analysis, weights, manifest["responses_digest"]):
                add(lens, Selection.from_dict(manifest["selection"]), analysis.path.parent / path.parent.name)
    return list(found.values())


def with_other_lenses(analysis: Analysis, found: Sequence[LensResult] | None = None) -> Analysis:
    """Return the analysis with what other lenses give in its `Selection.sensitivity`, which is not stored with it.

    `found` is what `find_other_lenses` returns by default.
    """
    results = find_other_lenses(analysis) if found is None else found
    given = {other.lens: (other.boundary_layer, other.share) for other in results}
    return replace(analysis, selection=analysis.selection.with_lenses(given)) if given else analysis


def keep_one_lens(analyses: Sequence[Analysis]) -> tuple[list[Analysis], list[Analysis]]:
    """Set aside analyses that only repeat another one under another lens, as ``compare DIR/*`` may name both.

    Returns:
        Those of the first one's lens, with those that have no counterpart of that lens; and those that have one.
    """
    first = [a for a in analyses if a.lens == analyses[0].lens]
    others = [a for a in analyses if a.lens != analyses[0].lens]
    aside = [a for a in others if any(_is_same_data(b, a.config.get("weights"), a.responses_digest) for b in first)]
    return [a for a in analyses if all(a is not other for other in aside)], aside


def _is_same_data(analysis: Analysis, weights: str | None, responses_digest: str) -> bool:
    return analysis.config.get("weights") == weights and analysis.responses_digest == responses_digest


def _read_addition(directory: Path, name: str) -> pd.DataFrame:
    file = directory / ADDITION_FILES[name]
    return pd.read_csv(file) if file.suffix == ".csv" else read_parquet(file)


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {k: None if v != v else v for k, v in values.items()}


def _with_nan(values: dict[str, float | None]) -> dict[str, float]:
    return {k: float("nan") if v is None else v for k, v in values.items()}


_NUMBERS = ("entropy_in", "entropy_out", "change", "cosine")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "layers": ("layer", "n_tokens", *_NUMBERS, "change_stderr", "change_low", "change_high"),
    "responses": ("response", "prompt", "layer", "n_tokens", *_NUMBERS),
    "tokens": ("response", "token", "layer", *_NUMBERS),
    "sequences": ("prompt_length",),
}
"""The columns of numbers that the tables of an analysis have at least."""
_TEXT_COLUMNS = {"layers": ("site",), "responses": ("site",), "tokens": ("site",), "sequences": ("prompt", "response")}


def _check_agreement(analysis: Analysis, manifest: dict[str, Any]) -> None:
    """Refuse tables that lack a column, have another type in one, or are of another analysis than the manifest."""
    for name in _COLUMNS:
        table: pd.DataFrame = getattr(analysis, name)
        if name == "tokens" and table.empty:
            continue
        if lacking := [c for c in (*_COLUMNS[name], *_TEXT_COLUMNS[name]) if c not in table]:
            raise ValueError(f"{name} has no column {lacking[0]}")
        if other := [c for c in _COLUMNS[name] if table[c].dtype.kind not in "iuf"]:
            raise ValueError(f"{name} has a column {other[0]} that does not hold numbers")
    n_layers = analysis.n_layers
    rows = set(zip(analysis.layers["layer"], analysis.layers["site"], strict=True))
    wanted = {(layer, site) for layer in range(1, n_layers + 1) for site in ("layer", "attn", "ffn")}
    for what, found, expected in (
        ("layers and sites", rows, wanted),
        ("rows of layers", len(analysis.layers), 3 * n_layers),
        ("stages", len(analysis.stages), n_layers),
        ("responses", analysis.n_responses, manifest["n_responses"]),
        ("responses with means", analysis.responses["response"].nunique(), manifest["n_responses"]),
        ("tokens", analysis.n_tokens, manifest["n_tokens"]),
        ("boundary layers", analysis.boundary_layer, manifest["boundary_layer"]),
    ):
        if found != expected:
            raise ValueError(f"its tables and its manifest disagree about {what}")
