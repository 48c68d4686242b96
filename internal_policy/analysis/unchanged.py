"""A finished result that the same command would make again, told by the bytes of the files that it was made of.

Reading them takes milliseconds for the embedded models, and neither torch nor transformers. Wherever more than files on
this disk decides, nothing is concluded, and the model is loaded and compared by all that its numbers come from.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.data.prompts import TESTBED
from internal_policy.models import testbed
from internal_policy.utils.options import defaults_of

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

logger = logging.getLogger(__name__)

DEFAULTS = AnalyzeConfig()
RESPONSES = "responses.jsonl"
"""Of an analysis: what others read of it as ready responses."""
OF_SAMPLING = ("prompts_split", "max_responses", "samples_per_prompt", "max_new_tokens", "temperature", "generator")
"""Settings that have no meaning where responses are given; max_responses has chosen them already."""

_PACKAGE = Path(__file__).parents[1]
_ACCELERATORS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Devices of Linux through which torch finds a GPU."""
_NEVER_READ = (".bin", ".pt", ".pth", ".ckpt")
"""Pickles: optimiser states beside a checkpoint, which are large."""


def complete(configs: Sequence[AnalyzeConfig], root: Path, *, follow: bool = False) -> list[Analysis] | None:
    """Find the analyses that a command would make again, without loading a model.

    Args:
        configs: the settings that were asked for, of one analysis or several.
        root: below it each analysis has its directory.
        follow: whether the later ones read the responses of the first.

    Returns:
        All of them; None where one is not there, or where only a model can tell.

    Raises:
        UserError: an analysis with other settings, or a broken one.
    """
    found: list[Analysis] = []
    wanted = list(configs)
    if follow:
        others: dict[str, Any] = {name: getattr(DEFAULTS, name) for name in OF_SAMPLING}
        others |= {"prompts": None, "responses": str(root / configs[0].slug / RESPONSES)}
        wanted[1:] = [replace(config, **others) for config in configs[1:]]
    for config in wanted:
        directory = root / config.slug
        analysis = finished(config, directory) if directory.is_dir() else None
        if analysis is None or not is_unchanged(config, analysis):
            return None
        if config.random_baseline and analysis.baseline is None:
            return None
        found.append(analysis)
    for config in configs:
        tell_complete(root / config.slug)
    return found


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
    from internal_policy.analysis.results import MANIFEST, Analysis
    from internal_policy.utils.workspace import in_use

    if not (directory / MANIFEST).is_file():
        return None
    analysis = Analysis.load(directory)
    if differing := differing_settings(analysis, json.loads(json.dumps(config.cache_key()))):
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
    from internal_policy.utils.workspace import differences

    known = {key: value for key, value in analysis.config.items() if key in wanted}
    return differences(known, wanted, defaults_of(AnalyzeConfig))


def is_unchanged(config: AnalyzeConfig, analysis: Analysis) -> bool:
    """Whether an analysis with these settings was made of the same files, by the same code and libraries.

    Args:
        config: the settings that were asked for.
        analysis: what is on disk.

    Returns:
        False also where that cannot be known.
    """
    return is_made_of(lambda: digest(config), analysis.config, analysis.versions)


def is_made_of(files: Callable[[], str | None], config: Mapping[str, Any], versions: Mapping[str, str]) -> bool:
    """Whether a result was made of the files that are there now, by the same libraries.

    Args:
        files: digests these files; asked for last, for it reads them.
        config: of the result; ``files`` is the digest of those that it was made of.
        versions: of the libraries, by name.

    Returns:
        False also where that cannot be known.
    """
    if config.get("files") is None or config.get("hooked"):
        return False
    return all(_version(name) == known for name, known in versions.items()) and config["files"] == files()


def digest(config: AnalyzeConfig) -> str | None:
    """Digest the files that an analysis is made of: the model's, prompts or responses, and the code of this package.

    Args:
        config: the settings.

    Returns:
        64 hexadecimal digits; None where something else decides too: the hub, a GPU, another library, remote code.
    """
    elsewhere = ("backend", "remote", "generator", "device_map", "quantization", "trust_remote_code", "revision")
    if any(getattr(config, name) != getattr(DEFAULTS, name) for name in elsewhere):
        return None
    given = config.responses if config.responses is not None else config.prompts
    return digest_of(config.model, [given], config.device)


def digest_of(model: str, sources: Iterable[str | None], device: str = "auto") -> str | None:
    """Digest the files of a model, others that are read beside them, and the code of this package.

    Args:
        model: local directory, or embedded model.
        sources: files; ``testbed`` for the embedded tasks, which None means too where the model is embedded.
        device: what the model is loaded on.

    Returns:
        64 hexadecimal digits; None where one of them is not on this disk, or something else decides too.
    """
    embedded = model in testbed.NAMES and not Path(model).exists()
    directory = testbed.path(model) if embedded else Path(model)
    if not _on_the_cpu(device) or not directory.is_dir() or (directory / "adapter_config.json").exists():
        return None
    files = list(_of_model(directory))
    found = hashlib.sha256()
    try:
        for source in sources:
            # The embedded tasks are code of this package. What another model reads by default is on the hub.
            if source == TESTBED or (source is None and embedded):
                continue
            if source is None or not Path(source).is_file():
                return None
            files.append(Path(source))
        # A library that no result names reads such weights.
        if b"quantization_config" in (directory / "config.json").read_bytes():
            return None
        for path in [*files, *sorted(_PACKAGE.rglob("*.py"))]:
            with path.open("rb") as opened:
                found.update(f"{path.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    except (OSError, ValueError):
        return None
    return found.hexdigest()


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
