"""Finished analyses that the same command would make again, recognised without torch or transformers.

The mechanism is in ``utils.result_format``; this module says which files an analysis is made from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import ADDITIONS, AnalyzeConfig
from internal_policy.data.prompts import TESTBED
from internal_policy.models import testbed
from internal_policy.models.options import is_own_lens, lens_files
from internal_policy.utils import result_format

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

logger = logging.getLogger(__name__)

DEFAULTS = AnalyzeConfig()
RESPONSES = "responses.jsonl"
"""The file of an analysis that others read as ready responses."""
SAMPLING_OPTIONS = (
    *("prompts_split", "max_responses", "samples_per_prompt", "max_new_tokens", "temperature", "generator"),
)
"""Settings that have no meaning if responses are given."""


def find_finished(configs: Sequence[AnalyzeConfig], root: Path, *, follow: bool = False) -> list[Analysis] | None:
    """Find the analyses that a command would make again, without loading a model.

    With `follow` the later analyses read the responses of the first. The result is None if one is missing, or if the
    model has to be loaded to decide.

    Raises:
        UserError: an analysis with other settings, or a broken one.
    """
    found: list[Analysis] = []
    wanted = list(configs)
    if follow:
        others: dict[str, Any] = {name: getattr(DEFAULTS, name) for name in SAMPLING_OPTIONS}
        others |= {"prompts": None, "responses": str(root / configs[0].slug / RESPONSES)}
        wanted[1:] = [replace(config, **others) for config in configs[1:]]
    for config in wanted:
        directory = root / config.slug
        analysis = load_finished(config, directory) if directory.is_dir() else None
        if analysis is None or not is_up_to_date(config, analysis):
            return None
        if (config.random_baseline and analysis.baseline is None) or missing_additions(config, analysis):
            return None
        found.append(analysis)
    for config in configs:
        report_finished(root / config.slug)
    return found


def load_finished(config: AnalyzeConfig, directory: Path) -> Analysis | None:
    """Load the analysis that is already in a directory; None if there is none.

    Raises:
        UserError: an analysis with other settings, or a broken one.
    """
    from internal_policy.analysis.results import ANALYSIS, Analysis

    if not ANALYSIS.is_in(directory):
        return None
    analysis = Analysis.load(directory)
    ANALYSIS.check_settings(directory, analysis.config, config.cache_key())
    return analysis


def missing_additions(config: AnalyzeConfig, analysis: Analysis) -> dict[str, Any]:
    """The options of additions that an analysis lacks, with the values that complete it."""
    missing: dict[str, Any] = {}
    for option in ADDITIONS:
        wanted, made = getattr(config, option), analysis.config.get(option)
        if isinstance(wanted, tuple):
            # One pass measures all groupings, those that are there as well.
            if new := [name for name in wanted if name not in (made or ())]:
                missing[option] = (*(made or ()), *new)
        elif wanted and not made:
            missing[option] = wanted
    return missing


def is_up_to_date(config: AnalyzeConfig, analysis: Analysis) -> bool:
    """Whether an analysis with these settings was made from the same files, by the same code and libraries."""
    return result_format.is_up_to_date(analysis.config, analysis.versions, lambda: config_digest(config))


def report_finished(directory: Path) -> None:
    """Log that there is nothing to do."""
    logger.warning("%s: already complete; nothing to do (--overwrite starts over)", directory)


def config_digest(config: AnalyzeConfig) -> str | None:
    """Digest the files from which an analysis is made: the model's, its prompts or responses, and this package's code.

    The digest also covers the files of a trained lens. It is None if the result depends on more: the hub, a GPU,
    another library, remote code, a lens that is a function.
    """
    elsewhere = ("backend", "remote", "generator", "device_map", "quantization", "trust_remote_code", "revision")
    if any(getattr(config, name) != getattr(DEFAULTS, name) for name in elsewhere):
        return None
    inputs = [config.responses if config.responses is not None else config.prompts]
    if is_own_lens(config.lens):
        # No file holds all that a function depends on.
        if not isinstance(config.lens, (str, Path)):
            return None
        inputs += map(str, lens_files(config.lens))
    return source_digest(config.model, inputs, config.device)


def source_digest(model: str, inputs: Iterable[str | None], device: str = "auto") -> str | None:
    """Digest the files of a model by its name, those of its inputs, and the code of this package.

    `inputs` are files, or ``testbed`` for the embedded tasks, which are also the default (None) of an embedded model.
    The result is that of ``result_format.source_digest``; also None if an input is on the hub.
    """
    embedded = model in testbed.NAMES and not Path(model).exists()
    # The embedded tasks are code of this package.
    read = [each for each in inputs if each != TESTBED and not (each is None and embedded)]
    if None in read:
        return None
    directory = testbed.path(model) if embedded else Path(model)
    return result_format.source_digest(directory, [Path(each) for each in read if each is not None], device)
