"""A finished evaluation that is asked for again, and whether it is the same: told without a model where files can."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from internal_policy.analysis import unchanged
from internal_policy.data.benchmarks import BENCHMARKS
from internal_policy.data.prompts import TESTBED
from internal_policy.evaluation import metrics
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.results import MANIFEST, RESULT_FILES, Evaluation
from internal_policy.evaluation.scoring import reward_name
from internal_policy.utils.options import defaults_of
from internal_policy.utils.workspace import Workspace, differences, in_use

logger = logging.getLogger(__name__)


def complete(config: EvaluateConfig, source: str, root: Path) -> Evaluation | None:
    """Find the evaluation that a command would make again, without loading its model.

    Args:
        config: the settings that were asked for.
        source: the benchmark: a name, a file, or a hub id.
        root: below it the evaluation has its directory.

    Returns:
        The evaluation, with the K that are asked for; None where there is none, or where only the model can tell.

    Raises:
        UserError: an evaluation with other settings, or a broken one.
    """
    config = replace(config, reward=reward_name(config.reward, exact=source == TESTBED))
    directory = root / config.slug
    evaluation = finished(config, directory)
    if evaluation is None or evaluation.config.get("max_problems") != config.max_problems:
        return None
    if not unchanged.is_made_of(partial(digest, config, source), evaluation.config, evaluation.versions):
        return None
    return with_ks(evaluation, config, directory)


def digest(config: EvaluateConfig, source: str) -> str | None:
    """Digest the files that an evaluation is made of: the model's, the problems, and the code of this package.

    Args:
        config: the settings.
        source: the benchmark: a name, a file, or a hub id.

    Returns:
        64 hexadecimal digits; None where something else decides too: the hub, a GPU, another library, other code.
    """
    on_the_hub = source in BENCHMARKS and source != TESTBED
    foreign = config.trust_remote_code or config.generator != "transformers" or config.reward not in ("math", "exact")
    if on_the_hub or foreign or config.revision is not None:
        return None
    return unchanged.digest_of(config.model, [source], config.device)


def finished(config: EvaluateConfig, directory: Path) -> Evaluation | None:
    """Read the evaluation that is already there.

    Args:
        config: the settings that were asked for.
        directory: where the evaluation would be.

    Returns:
        The evaluation; None where there is none.

    Raises:
        UserError: an evaluation with other settings, or a broken one.
    """
    if not (directory / MANIFEST).is_file():
        return None
    evaluation = Evaluation.load(directory)
    wanted = json.loads(json.dumps(config.cache_key()))
    if differing := differing_settings(evaluation, wanted):
        raise in_use(directory, "an evaluation", differing)
    return evaluation


def differing_settings(evaluation: Evaluation, wanted: dict[str, Any]) -> str:
    """Name the settings of an evaluation that are not those that were asked for.

    Args:
        evaluation: what is on disk.
        wanted: what was asked for, or a part of it.

    Returns:
        As `workspace.differences` gives it; empty where nothing differs.
    """
    known = {key: value for key, value in evaluation.config.items() if key in wanted}
    return differences(known, wanted, defaults_of(EvaluateConfig))


def with_ks(finished: Evaluation, config: EvaluateConfig, directory: Path) -> Evaluation:
    """Give what is there already Pass@K for the K that are asked for now: they need no new samples.

    Args:
        finished: the evaluation on disk.
        config: the settings that were asked for.
        directory: where it is.

    Returns:
        The evaluation, which is written again where K are others.
    """
    Workspace(directory, manifest=MANIFEST, result_files=RESULT_FILES, what="evaluation").close()
    logger.warning("%s: this evaluation is complete; nothing to sample", directory)
    if tuple(finished.pass_at_k["k"]) == config.ks:
        return finished
    table = metrics.pass_table(finished.problems, config.ks)
    changed = replace(finished, pass_at_k=table, config={**finished.config, "k": list(config.ks)})
    changed.save(directory)
    return changed
