"""The result of an ablation, in memory and on disk. Nothing here needs torch.

``ablation.json`` is written last: a directory without it is not an ablation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.analysis.finished import source_digest
from internal_policy.interventions.config import AblateConfig
from internal_policy.interventions.tables import keys_of
from internal_policy.utils.errors import counted
from internal_policy.utils.io import expanded, write_atomically
from internal_policy.utils.result_format import ResultFormat, is_up_to_date
from internal_policy.utils.table_io import (
    columns_of,
    read_columns,
    read_parquet,
    read_rows,
    to_cells,
    write_parquet,
    write_rows,
)

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "ablation.json"
_FILES = ("table.csv", "effects.parquet", "responses.jsonl", "samples.jsonl")
ABLATION = ResultFormat("ablation", "ablations", "ablate", "ablate", MANIFEST, SCHEMA_VERSION, _FILES)


@dataclass(frozen=True)
class Ablation:
    """What changed writes do to the final policy of one checkpoint. Numbers in nats, layers counted from 1."""

    name: str
    """The model's name."""
    model: dict[str, Any]
    """id, revision, family, layers L, vocabulary V, dtype, device."""
    config: dict[str, Any]
    """The settings, with digests of weights and inputs."""
    table: pd.DataFrame
    """A row per intervention: layer, last_layer if several were changed together, site, head or expert if parts were
    changed (a number, or a text such as ``1,4-6`` for several together), how; kl, entropy_change, log_prob_change and
    flips, each with ``_stderr``, ``_low`` and ``_high`` (95% interval, clustered by prompt); with samples also accuracy
    and accuracy_change; n_tokens."""
    responses: pd.DataFrame
    """A row per response and intervention: the means over the tokens of that response."""
    sequences: pd.DataFrame
    """The responses: prompt, response, input_ids, prompt_length, reward."""
    clean: dict[str, float]
    """The model without a change: entropy and log_prob with ``_stderr``; with samples also accuracy with its
    interval."""
    samples: pd.DataFrame | None = None
    """A row per response that was sampled under an intervention: intervention (from 1, a row of `table`; 0 without a
    change), prompt, sample, response, score, n_tokens, truncated; None if none was."""
    failures: dict[int, dict[str, int]] = field(default_factory=dict)
    """With samples, comparisons that failed in the verifier: by intervention, as in `samples`, crashes and timeouts.
    Such responses have score 0."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    path: Path | None = None
    """Its directory."""

    @property
    def n_layers(self) -> int:
        """L."""
        return int(self.model["layers"])

    @property
    def n_responses(self) -> int:
        """Number of responses."""
        return len(self.sequences)

    @property
    def n_prompts(self) -> int:
        """Number of different prompts, the clusters of the errors."""
        return int(self.responses["prompt"].nunique())

    @property
    def n_tokens(self) -> int:
        """Response tokens."""
        return int(self.table["n_tokens"].iloc[0])

    @property
    def keys(self) -> list[str]:
        """The columns of `table` that say what was changed."""
        return keys_of(self.table)

    def save(self, directory: str | Path) -> Path:
        """Write the ablation to a directory; the manifest last.

        Args:
            directory: made where it does not exist; files of the same names are replaced.

        Returns:
            The directory.
        """
        with ABLATION.writing(directory, self.manifest()) as target:
            write_atomically(target / "table.csv", partial(to_cells(self.table).to_csv, index=False))
            write_parquet(target / "effects.parquet", self.responses)
            write_rows(target / "responses.jsonl", self.sequences)
            (target / "samples.jsonl").unlink(missing_ok=True)
            if self.samples is not None:
                write_rows(target / "samples.jsonl", self.samples)
        return target

    def manifest(self) -> dict[str, Any]:
        """Return the content of ``ablation.json``.

        Returns:
            JSON-serialisable fields; NaN is null.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "model": self.model,
            "config": self.config,
            "n_responses": self.n_responses,
            "n_tokens": self.n_tokens,
            "clean": {k: None if v != v else v for k, v in self.clean.items()},
            "columns": columns_of(self.table),
            "failures": {str(number): failed for number, failed in self.failures.items()},
            "timings": self.timings,
            "versions": self.versions,
        }

    @classmethod
    def load(cls, directory: str | Path) -> Ablation:
        """Read an ablation from disk.

        Args:
            directory: of one ablation, or one that holds a single ablation.

        Returns:
            The ablation.

        Raises:
            UserError: no ablation there, unfinished, broken, or written by a newer version.
        """
        source = ABLATION.find(expanded(directory))
        with ABLATION.reading(source) as manifest:
            sampled = source / "samples.jsonl"
            return cls(
                name=manifest["name"],
                model=manifest["model"],
                config=manifest["config"],
                table=read_columns(source / "table.csv", manifest["columns"]),
                responses=read_parquet(source / "effects.parquet"),
                sequences=read_rows(source / "responses.jsonl"),
                clean={k: float("nan") if v is None else v for k, v in manifest["clean"].items()},
                samples=read_rows(sampled) if "samples.jsonl" in manifest["sha256"] else None,
                failures={int(number): failed for number, failed in manifest["failures"].items()},
                timings=manifest["timings"],
                versions=manifest["versions"],
                path=source,
            )

    def describe(self) -> str:
        """Say in a few words what was changed: ``attn, ffn set to zero``."""
        return f"{self.config['sites'].replace(',', ', ')}: {self.config['how'].replace(',', ', ')}"

    def _repr_html_(self) -> str:
        from internal_policy.utils.console import number
        from internal_policy.utils.html import MOST_ROWS, card

        shown = self.table.nlargest(MOST_ROWS, "kl")
        cells = {name: shown[name].map(str) for name in self.keys}
        forms = {"kl": ".3f", "entropy_change": "+.3f", "log_prob_change": "+.3f", "flips": ".1%", "accuracy": ".1%"}
        cells |= {
            name: shown[name].map(lambda v, f=form: number(v, f)) for name, form in forms.items() if name in shown
        }
        facts = (
            f"{counted(len(self.table), 'intervention')} on {counted(self.n_responses, 'response')}, "
            f"{counted(self.n_tokens, 'token')}",
            f"H(π_θ) {self.clean['entropy']:.3f}",
            f"accuracy {self.clean['accuracy']:.1%}" if "accuracy" in self.clean else "",
        )
        note = "nats, means over tokens; the largest KL first; flips: share of tokens with another top token"
        note += f"; {len(shown)} of {len(self.table)} interventions" if len(shown) < len(self.table) else ""
        return card("Ablation", self.name, facts, pd.DataFrame(cells), note)

    def __repr__(self) -> str:
        return (
            f"Ablation({self.name!r}, {counted(len(self.table), 'intervention')} on "
            f"{counted(self.n_responses, 'response')}, {self.describe()})"
        )


def find_finished(config: AblateConfig, root: Path) -> Ablation | None:
    """Find the ablation that a command would make again, without loading its model.

    Args:
        config: the settings that are asked for.
        root: holds a directory for each ablation.

    Returns:
        The ablation; None if there is none, or if the model has to be loaded to tell.

    Raises:
        UserError: an ablation with other settings, or a broken one.
    """
    directory = root / config.slug
    ablation = load_finished(config, directory)
    if ablation is None or not is_up_to_date(ablation.config, ablation.versions, partial(config_digest, config)):
        return None
    report_finished(directory)
    return ablation


def load_finished(config: AblateConfig, directory: Path) -> Ablation | None:
    """Load the ablation that is already in a directory, if any; refuse one with other settings."""
    if not ABLATION.is_in(directory):
        return None
    ablation = Ablation.load(directory)
    ABLATION.check_settings(directory, ablation.config, config.cache_key())
    return ablation


def report_finished(directory: Path) -> None:
    """Log that there is nothing to do."""
    logger.warning("%s: already complete; nothing to do (--overwrite starts over)", directory)


def config_digest(config: AblateConfig) -> str | None:
    """Digest the files from which an ablation is made; None if it depends on more."""
    foreign = (config.device_map, config.quantization, config.revision)
    if any(foreign) or config.trust_remote_code or config.reward not in (None, "math", "exact"):
        return None
    given = config.responses if config.responses is not None else config.prompts
    return source_digest(config.model, [given], config.device)
