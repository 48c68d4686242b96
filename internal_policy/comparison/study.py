"""A cross-model study: the models of a preset analysed one after the other, and figures 2, 3, 12, 13, 14 of them.

    done = study("testbed", output="data/studies/testbed")
    done.convergence                   # progressive or abrupt, a row a model
    save_study(done, "figures/study-testbed")

One model is in memory at a time. A model that fails does not stop the others; the same call tries it again, and reads
finished analyses without loading their models.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants

from internal_policy import models
from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.finished import is_up_to_date
from internal_policy.analysis.pipeline import analyze
from internal_policy.analysis.results import ANALYSIS, Analysis
from internal_policy.analysis.sweep import start_over
from internal_policy.analysis.sweep_targets import require_distinct_outputs
from internal_policy.comparison.study_presets import STUDIES, StudyModel
from internal_policy.comparison.study_results import Study
from internal_policy.models import context
from internal_policy.models.fingerprint import commit_now
from internal_policy.models.options import DEFAULT_LENS, check_lens, is_own_lens
from internal_policy.utils.distributed import launched_processes, release_memory
from internal_policy.utils.errors import NoNetwork, UserError, counted
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import refuse_unknown, takes_options
from internal_policy.utils.result_format import describe_differences
from internal_policy.utils.workspace import Workspace

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_NO_NETWORK = "no network"
_WARN_FROM = 2e9
"""Bytes of a batch's keys and values above which a warning is logged."""


@quiet_libraries()
@takes_options(AnalyzeConfig, without=("model", "revision", "template", "responses"))
def study(
    preset: str | Sequence[StudyModel] = "testbed",
    *,
    prompts: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    each: Callable[[Analysis], object] | None = None,
    **options: Any,
) -> Study:
    """Analyse the models of a preset, each on its own responses, as the paper does.

    Args:
        preset: paper, small, testbed, or rows of your own.
        prompts: as for ``analyze``; by default that of each model.
        output: directory for the analyses, one below it for each model; nothing is written without it.
        overwrite: start from the beginning.
        wait: if another process writes to one of these directories, wait until it has ended.
        each: called with each analysis when it is done.
        **options: the other fields of ``AnalyzeConfig`` except ``template``, which the preset has. By default
            ``max_new_tokens`` is that of each row (paper: 7168).

    Returns:
        The analyses, and why the others failed.

    Raises:
        UserError: bad settings, raised before the first model is loaded, or no model could be analysed. With several
            processes, any failure.
    """
    rows = _rows(preset)
    if fixed := sorted(options.keys() & {"template", "revision", "responses"}):
        raise UserError(f"{fixed[0]} was given with a preset, which settles it for each model; leave it out")
    refuse_unknown(AnalyzeConfig, options)
    lens = options.get("lens", DEFAULT_LENS)
    if isinstance(lens, (str, Path)) and is_own_lens(check_lens(lens)):
        raise UserError(f"--lens {lens} was given with a preset of several models; a trained lens is of one model")
    prompts = None if prompts is None else str(prompts)
    settings = [_settings(row, options) for row in rows]
    configs = [AnalyzeConfig(model=row.model, prompts=prompts, **own) for row, own in zip(rows, settings, strict=True)]
    directories = [None if output is None else expanded(output) / config.slug for config in configs]
    if output is not None:
        _refuse_one_place(configs)
    places = [directory for directory in directories if directory is not None]
    # The directory of the study contains its manifest and the directories of its analyses.
    with locked(*([] if output is None else [expanded(output)]), *places, wait=wait, state=launched_processes()):
        if overwrite:
            start_over(places)
        return _study(rows, configs, directories, prompts, output, each, settings)


def _study(
    rows: Sequence[StudyModel],
    configs: Sequence[AnalyzeConfig],
    directories: Sequence[Path | None],
    prompts: str | None,
    output: str | Path | None,
    each: Callable[[Analysis], object] | None,
    settings: Sequence[dict[str, Any]],
) -> Study:
    finished = launched_processes().on_main(lambda: _are_finished(configs, directories))
    stored = [
        Analysis.load(directory) if directory is not None and known else None
        for directory, known in zip(directories, finished, strict=True)
    ]
    failures: dict[str, str] = {}
    caches: dict[str, int] = {}
    for config, before in zip(configs, stored, strict=True):
        if before is None:
            # Without a network each look-up takes half a minute of retries; one is enough.
            offline = _NO_NETWORK in failures.values()
            look_up = partial(_look_up, config.model, config.trust_remote_code, offline)
            per_token = _attempt(config.model, failures, look_up)
            caches[config.model] = config.batch_size * (config.max_new_tokens or 0) * (per_token or 0)
    unreached = [name for name, why in failures.items() if why == _NO_NETWORK]
    if unreached:
        if len(unreached) == len(rows):
            raise UserError(
                f"no network, and the hub's cache has none of the {counted(len(rows), 'model')}: go online, or take "
                "--preset testbed, which needs no network"
            )
        names = ", ".join(unreached)
        logger.warning("no network, and the hub's cache does not have %s: going on with the others", names)
    _warn_of_memory(configs, caches)
    done: list[tuple[StudyModel, Analysis]] = []
    for row, own, before in zip(rows, settings, stored, strict=True):
        if row.model in failures:
            continue
        run = partial(analyze, row.model, prompts=prompts, output=output, **own)
        analysis = before if before is not None else _attempt(row.model, failures, run)
        release_memory()
        if analysis is None:
            continue
        done.append((row, analysis))
        if each is not None:
            each(analysis)
    if not done:
        name, why = next(iter(failures.items()))
        raise UserError(f"none of the {len(rows)} models could be analysed; {name}: {why}")
    found = Study(tuple(row for row, _ in done), tuple(analysis for _, analysis in done), failures)
    if output is not None:
        launched_processes().on_main(partial(found.record, expanded(output)))
    return found


def _rows(preset: str | Sequence[StudyModel]) -> tuple[StudyModel, ...]:
    if not isinstance(preset, str):
        return tuple(preset)
    found = {str(name): rows for name, rows in STUDIES.items()}.get(preset)
    if found is None:
        raise UserError(f"--preset is {preset!r}; needed is one of {', '.join(STUDIES)}")
    return found


def _settings(row: StudyModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one model: those given, with those that its row determines."""
    wanted = options.get("max_new_tokens")
    limit = row.max_new_tokens if wanted is None else wanted
    return {**options, "template": row.template, "max_new_tokens": limit}


def _warn_of_memory(configs: Sequence[AnalyzeConfig], caches: Mapping[str, int]) -> None:
    """Warn of the memory that long responses take, before the first of them is sampled."""
    largest = max(caches, key=caches.__getitem__, default=None)
    # vLLM never takes more memory than there is.
    if largest is None or caches[largest] < _WARN_FROM or configs[0].generator == "vllm":
        return
    config = next(config for config in configs if config.model == largest)
    logger.warning(
        "%s: %d responses of up to %d tokens hold up to %.0f GB of keys and values together, in 16 bits, beside the "
        "weights, the most of these models; a lower --batch-size takes less memory, a lower --max-new-tokens less of "
        "memory and time",
        *(largest, config.batch_size, config.max_new_tokens, caches[largest] / 1e9),
    )


def _refuse_one_place(configs: Sequence[AnalyzeConfig]) -> None:
    require_distinct_outputs(configs)
    by_slug: dict[str, AnalyzeConfig] = {}
    for config in configs:
        before = by_slug.setdefault(config.slug, config)
        if before is not config:
            raise UserError(
                f"{config.model} is in two rows (templates {before.template} and {config.template}), which would "
                f"both be written to {config.slug}; make them two studies, each with its own --output"
            )


def _are_finished(configs: Sequence[AnalyzeConfig], directories: Sequence[Path | None]) -> list[bool]:
    """Whether each analysis is finished and needs no model; a directory that cannot be written to is refused here."""
    for directory in directories:
        # A finished analysis is read, or `analyze` reports what is wrong with it.
        if directory is not None and not ANALYSIS.is_in(directory):
            Workspace(directory, ANALYSIS).check()
    return [_is_finished(config, directory) for config, directory in zip(configs, directories, strict=True)]


def _is_finished(config: AnalyzeConfig, directory: Path | None) -> bool:
    """Whether an analysis of these settings, prompts and weights exists, as far as is known without the model."""
    if directory is None or not ANALYSIS.is_in(directory):
        return False
    try:
        analysis = Analysis.load(directory)
    except UserError:
        # `analyze` will report what is wrong with it, without stopping the others.
        return False
    if config.random_baseline and analysis.baseline is None:
        return False
    wanted = {**config.cache_key(), "prompts": config.prompts, "model": config.model}
    known = {key: value for key, value in analysis.config.items() if key in wanted}
    if analysis.config.get("hooked") or describe_differences(known, wanted):
        return False
    # Files on this disk may have changed since; if their digests do not decide, `analyze` loads and compares.
    here = config.model.startswith("testbed/") or Path(config.model).exists()
    if here or (config.prompts is not None and Path(config.prompts).exists()):
        return is_up_to_date(config, analysis)
    commit = analysis.model.get("revision")
    if commit is None:
        return True
    with status(f"looking up {config.model}"):
        now = commit_now(config.model)
    # If the hub cannot be reached, the finished analysis is kept.
    return now is None or now == commit


def _look_up(model: str, trust_remote_code: bool, offline: bool) -> int | None:
    """Check that the model is available; return the bytes of its key-value cache per token."""
    with status(f"looking up {model}"), _offline() if offline else nullcontext():
        _, config = models.check(model, trust_remote_code=trust_remote_code)
    return context.cache_bytes(config)


@contextmanager
def _offline() -> Iterator[None]:
    """Restrict the hub's client to its cache, as HF_HUB_OFFLINE=1 does."""
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _attempt(model: str, failures: dict[str, str], do: Callable[[], Result]) -> Result | None:
    try:
        return do()
    except UserError as error:
        if launched_processes().number > 1:
            # The failure may be this process's alone, with the others waiting; the launcher ends all of them.
            raise
        if isinstance(error, NoNetwork):
            # Reported once for all models.
            failures[model] = _NO_NETWORK
            return None
        failures[model] = str(error).removeprefix(f"{model}: ")
    # Hours of work on other models must not be lost to what one checkpoint's code or one driver raises.
    except Exception as error:
        if launched_processes().number > 1:
            raise
        failures[model] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.debug("%s", model, exc_info=error)
    logger.warning("%s: failed, going on with the others (%s)", model, failures[model])
    return None
