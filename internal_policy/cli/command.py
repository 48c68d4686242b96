"""What the commands share: the options of every command, and what is checked and printed in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internal_policy.data.records import SUFFIXES, require_file
from internal_policy.models.paths import locate
from internal_policy.utils.imports import require_package
from internal_policy.utils.io import expanded

FIGURES = Path("figures")
"""Directory of the figures when no output is given."""


@dataclass(frozen=True, kw_only=True)
class ConsoleOptions:
    """What a command prints."""

    json: bool = False
    """Print one JSON document instead of tables, for scripts."""
    quiet: bool = False
    """Print errors only; results are written as always."""
    debug: bool = False
    """Show the traceback of an error, and the steps that led to it."""


@dataclass(frozen=True, kw_only=True)
class WaitOptions(ConsoleOptions):
    """What a command does while another process writes to the same place."""

    wait: bool = False
    """If another process writes to the output directory, wait until it has ended."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions(WaitOptions):
    """Where a command writes its results."""

    output: Path | None = None
    """Directory for the results, and for their figures below it. Default: a directory below data, and figures."""

    def place(self, default: Path) -> tuple[Path, Path]:
        """The directories for results (`default` without --output) and for figures."""
        return (default, FIGURES) if self.output is None else (expanded(self.output), expanded(self.output) / "figures")


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(OutputOptions):
    """What a command does if its output directory already contains results."""

    overwrite: bool = False
    """Start over in an output directory that is in use, instead of resuming or reading what is finished."""


def to_json(result: Any) -> dict[str, Any]:
    """Describe a result for a JSON document: the content of its manifest on disk, and where it is.

    `result` is an analysis, evaluation, inspection, comparison or run.
    """
    from internal_policy.analysis.results import REPORT

    path = result.path
    report = None if path is None or not (path / REPORT).is_file() else path / REPORT
    return {**result.manifest(), "path": path, "report": report}


def require_paths(models: Iterable[str], revision: str | None, *sources: str | None) -> None:
    """Raise a `UserError` for paths that do not exist, before anything heavy is imported.

    `models` and `sources` may also be names on the hub, embedded models, benchmarks, or None for a default.
    """
    for model in models:
        locate(model, revision)
    for source in sources:
        if source is not None and Path(source).suffix in SUFFIXES:
            require_file(Path(source))


def require_packages(backend: str, quantization: str | None) -> None:
    """Raise a `UserError` for options whose packages are not installed, before anything heavy is imported."""
    if backend != "hooks":
        require_package(backend.replace("-", "_"), f"--backend {backend}", "backends")
    if quantization is not None:
        require_package("bitsandbytes", f"--quantization {quantization}", "quantized")


def require_key(remote: bool | str) -> None:
    """Raise a `UserError` if --remote has no nnsight or no key for NDIF, before the hub is asked for a model."""
    if remote is True:
        from internal_policy.extractors import nnsight as nnsight_library

        nnsight_library.require_key(nnsight_library.load_nnsight())
