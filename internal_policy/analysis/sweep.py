"""Checkpoints of one training, analysed one after another on the same responses.

    analyses = sweep(checkpoints="runs/x", output="data/analyses")
    analyses = sweep("Qwen/Qwen3-4B", revisions=["step-100", "step-200"])
    compare(analyses)

One checkpoint is in memory at a time. The same call resumes an interrupted sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from internal_policy import models
from internal_policy.analysis.config import DEFAULT_RESPONSES, AnalyzeConfig
from internal_policy.analysis.finished import RESPONSES, SAMPLING_OPTIONS
from internal_policy.analysis.inputs import Source, as_source
from internal_policy.analysis.pipeline import analyze
from internal_policy.analysis.results import ANALYSIS, MANIFEST, Analysis
from internal_policy.analysis.sweep_targets import Target, list_targets, require_distinct_outputs
from internal_policy.extractors.nnsight import load_nnsight, require_key
from internal_policy.utils.distributed import launched_processes, release_memory
from internal_policy.utils.errors import UserError, as_user_error
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import refuse_unknown, takes_options
from internal_policy.utils.workspace import Workspace


@quiet_libraries()
@takes_options(AnalyzeConfig, without=("revision",))
def sweep(
    model: str | None = None,
    *,
    revisions: str | Sequence[str] = (),
    checkpoints: str | Path | Iterable[str | Path] = (),
    own_responses: bool = False,
    prompts: Source | None = None,
    responses: Source | Analysis | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    each: Callable[[Analysis], object] | None = None,
    **options: Any,
) -> list[Analysis]:
    """Analyse several checkpoints, by default on the responses of the first, so that the analyses are paired.

    Args:
        model: the hub model whose revisions are meant; with `checkpoints` the model from which their training started,
            which is then analysed first.
        revisions: branches, tags or commits, in order.
        checkpoints: directories, globs, or a training run's directory; taken in natural order.
        own_responses: let each checkpoint sample its own responses.
        prompts: as for ``analyze``; the first checkpoint answers them.
        responses: as for ``analyze``, or an earlier analysis, whose responses every checkpoint reads.
        output: directory for results, with a directory for each checkpoint; nothing is written without it.
        overwrite: start all of them over.
        wait: if another process writes to one of these directories, start when it has ended.
        each: called with each analysis when it is finished.
        **options: the further fields of ``AnalyzeConfig``.

    Returns:
        One analysis for each checkpoint, in order.

    Raises:
        UserError: bad input, if possible before the first checkpoint is analysed.
    """
    found = list_targets(model, revisions, checkpoints)
    if own_responses and responses is not None:
        raise UserError("both --own-responses and --responses were given; a checkpoint samples, or reads what is given")
    limit = options.get("max_responses")
    prompts = as_source(prompts, limit=limit or DEFAULT_RESPONSES)
    given = as_source(responses.sequences if isinstance(responses, Analysis) else responses, "responses", limit)
    refuse_unknown(AnalyzeConfig, options)
    if "revision" in options:
        raise UserError("revision was given to a sweep; needed is revisions=, with as many as are to be analysed")
    sources: dict[str, Any] = {"prompts": prompts, "responses": given}
    sources = {name: source if isinstance(source, str) else None for name, source in sources.items()}
    configs = [AnalyzeConfig(model=t.model, revision=t.revision, **sources, **options) for t in found]
    require_distinct_outputs(configs)
    if configs[0].remote is True:
        # The key is checked before the hub is queried, because nothing runs without it.
        require_key(load_nnsight())
    trust = bool(options.get("trust_remote_code", False))
    places = []
    for target in found:
        with status(f"looking up {target}"):
            places.append(models.check(target.model, revision=target.revision, trust_remote_code=trust)[0])
    if not own_responses:
        _require_one_vocabulary(found, places, trust)
    directories = [] if output is None else [expanded(output) / config.slug for config in configs]
    analyses: list[Analysis] = []
    with locked(*directories, wait=wait, state=launched_processes()):
        if overwrite:
            start_over(directories)
        for target in found:
            wanted: dict[str, Any] = dict(options)
            source = given
            if analyses and not own_responses:
                first = analyses[0]
                source = as_source(first.sequences if first.path is None else first.path / RESPONSES)
                wanted = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
            analysis = analyze(
                target.model,
                prompts=None if source is not None else prompts,
                responses=source,
                output=output,
                revision=target.revision,
                **wanted,
            )
            analyses.append(analysis)
            release_memory()
            if each is not None:
                each(analysis)
    return analyses


def start_over(directories: Iterable[Path]) -> None:
    """Delete all results that will be made again, at once, so that an interrupted sweep contains no older ones.

    Raises:
        UserError: one of the directories is not writable, or in use for something else.
    """
    workspaces = [Workspace(directory, ANALYSIS) for directory in directories]

    def drop() -> None:
        for workspace in workspaces:
            workspace.check()
        for workspace in workspaces:
            (workspace.directory / MANIFEST).unlink(missing_ok=True)
            workspace.close()

    launched_processes().on_main(drop)


def _require_one_vocabulary(found: Sequence[Target], places: Sequence[str], trust_remote_code: bool) -> None:
    """Refuse checkpoints with different vocabularies, for which the same ids would be different responses."""
    if len(found) < 2:
        return
    from transformers import AutoTokenizer

    first: dict[str, int] = {}
    for target, place in zip(found, places, strict=True):
        with as_user_error(str(target), "its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                place, revision=target.revision, trust_remote_code=trust_remote_code
            )
        vocabulary = dict(tokenizer.get_vocab())
        first = first or vocabulary
        if vocabulary != first:
            token = min(vocabulary.items() ^ first.items(), key=lambda item: item[1])[0]
            raise UserError(
                f"{target}: another tokenizer than {found[0]} (they differ in {token!r}), so the same ids would be "
                "different responses; add --own-responses, or sweep over checkpoints of one training"
            )
