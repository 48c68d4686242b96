"""A cross-model study: the models of a preset analysed one after the other, and figures 2, 3, 12, 13, 14 of them.

    done = study("testbed", output="data/studies/testbed")
    done.convergence                   # progressive or abrupt, a row a model
    done.save("figures/study-testbed")

One model is in memory at a time. A model that fails does not stop the others; the same call tries it again, and reads
what is finished of hub models without loading them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from internal_policy import models
from internal_policy.checkpoints import refuse_one_place
from internal_policy.config import AnalyzeConfig, defaults, refuse_unknown
from internal_policy.errors import UserError
from internal_policy.locks import locked
from internal_policy.models.identity import commit_now
from internal_policy.pipeline import analyze
from internal_policy.processes import launched
from internal_policy.progress import status
from internal_policy.results import MANIFEST, Analysis
from internal_policy.study_models import STUDIES, StudyModel
from internal_policy.study_results import Study
from internal_policy.sweeps import release, start_over
from internal_policy.workspace import Workspace, differences

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


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
        prompts: as for ``analyze``; the default of each model where not given.
        output: directory for the analyses, one below it for each model; nothing is written without it.
        overwrite: start all over.
        wait: where another process writes to one of these directories, start when it has ended.
        each: called with each analysis when it is done.
        **options: the further fields of ``AnalyzeConfig`` but ``template``, which the preset has.

    Returns:
        The analyses, and why the others failed.

    Raises:
        UserError: bad settings, told before the first model, or not one model that could be analysed. Under a launcher
            of several processes any failure.
    """
    rows = _rows(preset)
    if told := sorted(options.keys() & {"template", "revision", "responses"}):
        raise UserError(f"{told[0]} was given with a preset, which settles it for each model; leave it out")
    refuse_unknown(options)
    prompts = None if prompts is None else str(prompts)
    configs = [AnalyzeConfig(model=row.model, prompts=prompts, template=row.template, **options) for row in rows]
    directories = [None if output is None else Path(output).expanduser() / config.slug for config in configs]
    if output is not None:
        _refuse_one_place(configs)
    places = [directory for directory in directories if directory is not None]
    # The study has a file of its own beside its analyses.
    with locked(*([] if output is None else [Path(output).expanduser()]), *places, wait=wait, state=launched()):
        if overwrite:
            start_over(places)
        return _study(rows, configs, directories, prompts, output, each, options)


def _study(
    rows: Sequence[StudyModel],
    configs: Sequence[AnalyzeConfig],
    directories: Sequence[Path | None],
    prompts: str | None,
    output: str | Path | None,
    each: Callable[[Analysis], object] | None,
    options: dict[str, Any],
) -> Study:
    taken = launched().on_main(lambda: _taken(configs, directories))
    stored = [
        Analysis.load(directory) if directory is not None and known else None
        for directory, known in zip(directories, taken, strict=True)
    ]
    failures: dict[str, str] = {}
    for row, before in zip(rows, stored, strict=True):
        if before is None:
            _attempt(row.model, failures, partial(_look_up, row.model, bool(options.get("trust_remote_code", False))))
    done: list[tuple[StudyModel, Analysis]] = []
    for row, before in zip(rows, stored, strict=True):
        if row.model in failures:
            continue
        run = partial(analyze, row.model, prompts=prompts, output=output, template=row.template, **options)
        analysis = before if before is not None else _attempt(row.model, failures, run)
        release()
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
        launched().on_main(partial(found.record, Path(output).expanduser()))
    return found


def _rows(preset: str | Sequence[StudyModel]) -> tuple[StudyModel, ...]:
    if not isinstance(preset, str):
        return tuple(preset)
    found = {str(name): rows for name, rows in STUDIES.items()}.get(preset)
    if found is None:
        raise UserError(f"--preset is {preset!r}; needed is one of {', '.join(STUDIES)}")
    return found


def _refuse_one_place(configs: Sequence[AnalyzeConfig]) -> None:
    refuse_one_place(configs)
    taken: dict[str, AnalyzeConfig] = {}
    for config in configs:
        before = taken.setdefault(config.slug, config)
        if before is not config:
            raise UserError(
                f"{config.model} stands in two rows (templates {before.template} and {config.template}), which would "
                f"both be written to {config.slug}; make them two studies, each with its own --output"
            )


def _taken(configs: Sequence[AnalyzeConfig], directories: Sequence[Path | None]) -> list[bool]:
    """Which analyses are finished and need no model; directories that cannot be written to are told here."""
    for directory in directories:
        # A finished analysis is read, or `analyze` says what is wrong with it.
        if directory is not None and not (directory / MANIFEST).is_file():
            Workspace(directory).check()
    return [_is_finished(config, directory) for config, directory in zip(configs, directories, strict=True)]


def _is_finished(config: AnalyzeConfig, directory: Path | None) -> bool:
    """Whether an analysis of these settings, prompts and weights is there, and that is known without its model."""
    if directory is None or not (directory / MANIFEST).is_file():
        return False
    # Weights on this disk may have changed since: `analyze` loads them and compares their digest. A file may hold other
    # prompts by now.
    here = config.model.startswith("testbed/") or Path(config.model).exists()
    if here or (config.prompts is not None and Path(config.prompts).exists()):
        return False
    try:
        analysis = Analysis.load(directory)
    except UserError:
        # In its turn, and without stopping the others, `analyze` says what is wrong with it.
        return False
    wanted = {**json.loads(json.dumps(config.decisive())), "prompts": config.prompts, "model": config.model}
    known = {key: value for key, value in analysis.config.items() if key in wanted}
    if analysis.config.get("hooked") or differences(known, wanted, defaults(AnalyzeConfig)):
        return False
    commit = analysis.model.get("revision")
    if commit is None:
        return True
    with status(f"looking up {config.model}"):
        now = commit_now(config.model)
    # Where nobody can say, what is finished stands.
    return now is None or now == commit


def _look_up(model: str, trust_remote_code: bool) -> None:
    with status(f"looking up {model}"):
        models.check(model, trust_remote_code=trust_remote_code)


def _attempt(model: str, failures: dict[str, str], do: Callable[[], Result]) -> Result | None:
    try:
        return do()
    except UserError as error:
        if launched().number > 1:
            # It may be this process's own, and the others wait for it; all of them end, as the launcher sees to.
            raise
        failures[model] = str(error).removeprefix(f"{model}: ")
    # Hours of other models are not to be lost to what one checkpoint's code or one driver raises.
    except Exception as error:
        if launched().number > 1:
            raise
        failures[model] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logger.debug("%s", model, exc_info=error)
    logger.warning("%s: failed, going on with the others (%s)", model, failures[model])
    return None
