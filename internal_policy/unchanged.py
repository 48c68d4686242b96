"""A finished analysis that the same command would make again, told by the bytes of the files that it was made of.

Reading them takes milliseconds for the embedded models, and neither torch nor transformers. Wherever more than files on
this disk decides, nothing is concluded, and the model is loaded and compared by all that its numbers come from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy import testbed
from internal_policy.config import AnalyzeConfig, defaults
from internal_policy.prompts import TESTBED

if TYPE_CHECKING:
    from internal_policy.results import Analysis

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).parent
_ACCELERATORS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Devices of Linux through which torch finds a GPU."""
_NEVER_READ = (".bin", ".pt", ".pth", ".ckpt")
"""Pickles: optimiser states beside a checkpoint, which are large."""


def complete(config: AnalyzeConfig, directory: Path) -> Analysis | None:
    """Find the analysis that a command would make again, without loading its model.

    Args:
        config: the settings that were asked for.
        directory: where the analysis would be.

    Returns:
        The analysis; None where there is none, or where only the model can tell.

    Raises:
        UserError: an analysis with other settings, or a broken one.
    """
    analysis = finished(config, directory) if directory.is_dir() else None
    if analysis is None or not is_unchanged(config, analysis):
        return None
    if config.random_baseline and analysis.baseline is None:
        return None
    tell_complete(directory)
    return analysis


def tell_complete(directory: Path) -> None:
    """Say that there is nothing to do.

    Args:
        directory: of the analysis.
    """
    logger.warning("%s: already complete; nothing to do (--overwrite starts over)", directory)


def finished(config: AnalyzeConfig, directory: Path) -> Analysis | None:
    """Read the analysis that is already there.

    Args:
        config: the settings that were asked for.
        directory: where the analysis would be.

    Returns:
        The analysis; None where there is none.

    Raises:
        UserError: an analysis with other settings, or a broken one.
    """
    from internal_policy.results import MANIFEST, Analysis
    from internal_policy.workspace import in_use

    if not (directory / MANIFEST).is_file():
        return None
    analysis = Analysis.load(directory)
    if differing := differing_settings(analysis, json.loads(json.dumps(config.decisive()))):
        raise in_use(directory, "an analysis", differing)
    return analysis


def differing_settings(analysis: Analysis, wanted: dict[str, Any]) -> str:
    """Name the settings of an analysis that are not those that were asked for.

    Args:
        analysis: what is on disk.
        wanted: what was asked for, or a part of it.

    Returns:
        As `workspace.differences` gives it; empty where nothing differs.
    """
    from internal_policy.workspace import differences

    known = {key: value for key, value in analysis.config.items() if key in wanted}
    return differences(known, wanted, defaults(AnalyzeConfig))


def is_unchanged(config: AnalyzeConfig, analysis: Analysis) -> bool:
    """Whether an analysis with these settings was made of the same files, by the same code and libraries.

    Args:
        config: the settings that were asked for.
        analysis: what is on disk.

    Returns:
        False also where that cannot be known.
    """
    stored = analysis.config.get("files")
    if stored is None or analysis.config.get("hooked") or analysis.model.get("quantization"):
        return False
    return all(_version(name) == known for name, known in analysis.versions.items()) and stored == digest(config)


def digest(config: AnalyzeConfig) -> str | None:
    """Digest the files that an analysis is made of: the model's, prompts or responses, and the code of this package.

    Args:
        config: the settings.

    Returns:
        64 hexadecimal digits; None where something else decides too: the hub, a GPU, another library, remote code.
    """
    files = _files(config)
    if files is None:
        return None
    found = hashlib.sha256()
    try:
        for path in [*files, *sorted(_PACKAGE.rglob("*.py"))]:
            with path.open("rb") as opened:
                found.update(f"{path.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    except OSError:
        return None
    return found.hexdigest()


def _files(config: AnalyzeConfig) -> list[Path] | None:
    plain = AnalyzeConfig()
    elsewhere = ("backend", "remote", "generator", "device_map", "quantization", "trust_remote_code", "revision")
    if any(getattr(config, name) != getattr(plain, name) for name in elsewhere) or not _on_the_cpu(config.device):
        return None
    embedded = config.model in testbed.NAMES and not Path(config.model).exists()
    directory = testbed.path(config.model) if embedded else Path(config.model)
    if not directory.is_dir() or (directory / "adapter_config.json").exists():
        return None
    given = config.responses if config.responses is not None else config.prompts
    # The embedded tasks are code of this package. What another model reads by default is on the hub.
    if given == TESTBED or (given is None and embedded):
        return list(_of_model(directory))
    if given is None or not Path(given).is_file():
        return None
    return [*_of_model(directory), Path(given)]


def _of_model(directory: Path) -> Iterator[Path]:
    for folder in (directory, directory / "additional_chat_templates"):
        if folder.is_dir():
            yield from sorted(p for p in folder.iterdir() if p.is_file() and p.suffix not in _NEVER_READ)


def _on_the_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    return sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
