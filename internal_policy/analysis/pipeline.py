"""The analysis, stage by stage: model, prompts, responses, states, entropies, statistics, boundary layer.

Entropies are computed in the forward pass (`extractors.reduce`); here the values of each batch are averaged over the
tokens of each response, written to the workspace, and assembled into an `Analysis`.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from internal_policy import statistics
from internal_policy.analysis import divergences, tables
from internal_policy.analysis.additions import Measure, add_missing
from internal_policy.analysis.config import ADDITIONS, DEFAULT_RESPONSES, AnalyzeConfig
from internal_policy.analysis.finished import (
    DEFAULTS,
    RESPONSES,
    SAMPLING_OPTIONS,
    config_digest,
    load_finished,
    missing_additions,
    report_finished,
)
from internal_policy.analysis.group_capture import measure_groups
from internal_policy.analysis.heads import measure_heads
from internal_policy.analysis.inputs import (
    Inputs,
    InputSettings,
    Source,
    as_source,
    gather_inputs,
    is_embedded,
    source_label,
)
from internal_policy.analysis.layer_selection import select_layer
from internal_policy.analysis.position_sampling import (
    MEMORY_ADVICE,
    CaptureResult,
    PositionSubset,
    capture_in_rounds,
)
from internal_policy.analysis.random_baseline import add_baseline, architecture
from internal_policy.analysis.results import ANALYSIS, Analysis, with_other_lenses
from internal_policy.analysis.rewards_needed import refuse_sampled, require_rewards
from internal_policy.analysis.sweep_targets import training_record
from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import Response
from internal_policy.data.token_text import texts_of
from internal_policy.extractors import Extractor, Reducer, TokenValues, reduce_responses, registry
from internal_policy.extractors.heads import find_heads
from internal_policy.generation import (
    effective_batch_size,
    end_ids,
    refuse_generator,
    response_limit,
    samplers,
)
from internal_policy.models import LanguageModel, eval_mode, limit_threads, without_autocast
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.models.lenses import open_lens
from internal_policy.models.loading import check, load_tokenizer
from internal_policy.models.options import LensChoice
from internal_policy.utils.distributed import Processes, launched_processes, release_memory, run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import refuse_unknown, takes_options
from internal_policy.utils.workspace import Arrays, Workspace

logger = logging.getLogger(__name__)

ADDITION_MEASURES: dict[str, Measure] = {
    "heads": measure_heads,
    "divergences": divergences.measure,
    "by": measure_groups,
}
"""How each addition is measured, by its option."""
_LIBRARIES = ("internal-policy", "torch", "transformers", "tokenizers", "numpy", "pandas")


@quiet_libraries()
@takes_options(AnalyzeConfig)
@without_autocast()
def analyze(
    model: Any = "testbed/qwen3",
    tokenizer: Any = None,
    *,
    prompts: Source | None = None,
    responses: Source | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    alone: bool = False,
    **options: Any,
) -> Analysis:
    """Analyse the internal policies of one causal language model.

    Under ``accelerate launch`` or torchrun the responses are divided among the processes, and each returns the complete
    analysis.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), a transformers model, a
            ``transformer_lens`` TransformerBridge, or an ``nnsight`` model.
        tokenizer: the tokenizer of a transformers model given as an object; the others bring theirs.
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame: texts, chats, or records with a
            ``prompt``.
        responses: ready responses instead: a jsonl, json or parquet file, or a list or DataFrame of records (see
            ``read_responses``); ``analysis.sequences`` is one.
        output: directory for results; ``<output>/<slug>`` is written, and an interrupted run is resumed from there.
            Without it nothing is written.
        overwrite: start over if the output directory contains another analysis.
        wait: if another process writes there, start when it has ended.
        alone: analyse in this process only, even if a launcher started several.
        **options: the further fields of ``AnalyzeConfig``.

    Returns:
        The analysis, with its tables as DataFrames.

    Raises:
        UserError: bad input; the message says what to do.
    """
    refuse_unknown(AnalyzeConfig, options)
    in_memory = registry.is_object(model, tokenizer, options)
    limit = options.get("max_responses")
    prompts = as_source(prompts, limit=limit or DEFAULT_RESPONSES)
    responses = as_source(responses, "responses", limit)
    name = registry.name_of(model) if in_memory else str(model)
    if in_memory and (library := registry.library_of(model)):
        options = {"backend": library, **options}
    config = AnalyzeConfig(model=name, prompts=source_label(prompts), responses=source_label(responses), **options)
    state = Processes() if alone else launched_processes()
    refuse_generator(config.generator, in_memory=in_memory, processes=state.number)
    with ExitStack() as stack:
        open_given = None
        if in_memory:
            stack.enter_context(eval_mode(registry.module_of(model)))
            open_given = registry.wrap_in_memory(model, tokenizer, name, config)
        network = registry.module_of(model) if in_memory else None
        baseline_architecture = architecture(config, network) if config.random_baseline else None

        def run(directory: Path, overwrite: bool) -> Analysis:
            analysis = _run(config, open_given, prompts, responses, directory, overwrite, state)
            if baseline_architecture is None or analysis.baseline is not None:
                return analysis
            capture = partial(_capture, kind="baseline")
            analysis = add_baseline(analysis, config, baseline_architecture, network, capture, state)
            if missing_additions(config, analysis):
                # They waited for a baseline that had been interrupted.
                analysis = _run(config, open_given, prompts, responses, directory, False, state)
            return analysis

        if output is not None:
            directory = expanded(output) / config.slug
            with locked(directory, wait=wait, state=state):
                return run(directory, overwrite)
        scratch: list[str] = []
        if state.is_main_process:
            scratch.append(stack.enter_context(tempfile.TemporaryDirectory(prefix="internal-policy-")))
        directory = Path(state.broadcast(scratch[:1])[0]) / "run"
        analysis = replace(run(directory, False), path=None)
        state.wait_for_everyone()
        return analysis


def analyze_lenses(model: str, lenses: Sequence[LensChoice], *, output: str | Path, **options: Any) -> list[Analysis]:
    """Analyse one model under several different lenses, all on the responses of the first.

    There is a directory below `output` for each lens; `options` are those of ``analyze``.
    """
    first = analyze(model, output=output, lens=lenses[0], **options)
    assert first.path is not None
    if options.get("responses") is None:
        options = {name: value for name, value in options.items() if name not in ("prompts", *SAMPLING_OPTIONS)}
        options["responses"] = str(first.path / RESPONSES)
    analyses = [first]
    for lens in lenses[1:]:
        release_memory()
        other = analyze(model, output=output, lens=lens, **options)
        if other.path is not None and other.n_truncated is None and first.n_truncated is not None:
            # Given responses do not show whether they were cut; these were sampled under the first lens.
            place, other = other.path, replace(other, n_truncated=first.n_truncated)
            ANALYSIS.write_manifest(place, other.manifest())
        analyses.append(other)
    # The first were loaded before the others were there.
    return [with_other_lenses(analysis) for analysis in analyses]


def _run(
    config: AnalyzeConfig,
    open_given: registry.Opener | None,
    prompts: str | list[Any] | None,
    responses: str | list[Any] | None,
    directory: Path,
    overwrite: bool,
    state: Processes,
) -> Analysis:
    finished = None if overwrite else load_finished(config, directory)
    workspace = Workspace(directory, ANALYSIS)
    if finished is None:
        workspace.check()

    def refuse_resume() -> None:
        if _lens_function(config) and not overwrite and (finished is not None or workspace.begun):
            raise UserError(
                f"{directory}: holds an analysis, and the lens {config.lens_name} is a function, which no digest "
                "covers; choose another output=, or pass overwrite=True to start over"
            )

    state.on_main(refuse_resume)
    named = open_given is None and not isinstance(prompts, list) and not isinstance(responses, list)
    _require_rewards(config, prompts, responses, in_memory=open_given is not None)
    # Before the model is loaded, so that a later change of its files is noticed.
    files = config_digest(config) if named else None
    started = time.perf_counter()
    with status(f"loading {config.model}"):
        extractor = (open_given or registry.opener(config, state.device if state.number > 1 else None))()
    model = extractor.model
    load_seconds = time.perf_counter() - started
    # A lens that does not fit is refused before hours of sampling, and not held meanwhile.
    open_lens(config.lens, model)
    if config.heads:
        # A model whose heads cannot be measured is refused before anything long begins.
        find_heads(model)
    inputs = gather_inputs(config, model, prompts, responses)
    if "correct" in config.by and inputs.requests and inputs.reward is None:
        refuse_sampled()
    hooked = [*attached_code(model.model, extractor.wrapper), *_lens_function(config)]
    identity = _identity(config, model, inputs, hooked)

    def begin() -> bool:
        if hooked and not overwrite and workspace.begun:
            raise resume_refused(directory, hooked)
        return workspace.open(identity, overwrite)

    if finished is not None:
        if hooked:
            raise resume_refused(directory, hooked)
        ANALYSIS.check_settings(directory, finished.config, identity)
        lacks_baseline = config.random_baseline and finished.baseline is None
        if lacks_baseline and workspace.interrupted("baseline"):
            # A directory holds one unfinished work, which is completed first.
            return finished
        if missing_additions(config, finished):
            rows: Any = finished.sequences.to_dict("records")
            with limit_threads(model):
                return add_missing(
                    finished, config, extractor, [Response(**row) for row in rows], ADDITION_MEASURES, state
                )
        if lacks_baseline:
            # It is not complete yet: the caller adds the baseline, and keeps the unfinished work on it.
            return finished
        state.on_main(workspace.close)
        if state.is_main_process:
            report_finished(directory)
        return finished
    # The main process changes the directory only after all others have read it.
    if state.on_main(begin) and state.is_main_process:
        logger.warning("%s: resuming an unfinished analysis", directory)
    with limit_threads(model):
        analysed = sample_responses(config, extractor, inputs, workspace, state)
        captured = _capture(config, extractor, analysed, workspace, state)

    def assemble() -> None:
        timings = {"load": round(load_seconds, 3)}
        for stage in ("generate", "capture"):
            timings[stage] = round(sum(float(shard["seconds"]) for shard in workspace.shards(stage)), 3)
        # What is to be added is not there yet.
        plain = {**config.settings(), **{name: getattr(DEFAULTS, name) for name in ADDITIONS}}
        analysis = _assemble(config, model, analysed, captured, {**plain, **identity, "files": files}, timings)
        if inputs.requests:
            ends = set(end_ids(model))
            cut = [r for r in analysed if r.input_ids[-1] not in ends]
            analysis = replace(analysis, n_truncated=len(cut))
        analysis.save(directory)
        workspace.close()

    state.on_main(assemble)
    with limit_threads(model):
        return add_missing(Analysis.load(directory), config, extractor, analysed, ADDITION_MEASURES, state)


def _require_rewards(
    config: AnalyzeConfig, prompts: str | list[Any] | None, responses: str | list[Any] | None, *, in_memory: bool
) -> None:
    """Refuse ``--by correct`` without rewards before a model is loaded; what is in memory is there already."""
    require_rewards(config.by, prompts, responses, config.max_responses)
    if "correct" in config.by and prompts is None and responses is None and not in_memory:
        # The tokenizer decides whether the default prompts are the embedded tasks, which are scored.
        revision, trusted = config.revision, config.trust_remote_code
        where, _ = check(config.model, revision=revision, trust_remote_code=trusted)
        tokenizer = load_tokenizer(config.model, where, revision=revision, trust_remote_code=trusted)
        if not is_embedded(config.model, tokenizer):
            refuse_sampled()


def _lens_function(config: AnalyzeConfig) -> list[str]:
    """A lens that is a function, as an entry of the code that no digest covers."""
    return [] if isinstance(config.lens, (str, Path)) else [f"lens {config.lens_name}: a function"]


def _identity(config: AnalyzeConfig, model: LanguageModel, inputs: Inputs, hooked: list[str]) -> dict[str, Any]:
    """Everything that determines the numbers, by which an analysis is resumed or recognised."""
    identity = {**config.cache_key(), "weights": model.fingerprint(), "inputs": inputs.digest()}
    identity["hooked"] = hooked or None
    if model.rounds_by_batch:
        identity["batch_size"] = config.batch_size
    if inputs.requests:
        # Random streams depend on the kind of device.
        identity["sampled_on"] = model.device.type
        identity["token_limit"] = response_limit(model, config.max_new_tokens)
        identity["ends"] = end_ids(model)
        # The same prompts are scored only if they come with a verifier.
        identity["scored"] = inputs.reward is not None or None
    return identity


def sample_responses(
    config: InputSettings, extractor: Extractor, inputs: Inputs, workspace: Workspace, state: Processes
) -> list[Response]:
    """Sample the responses that the inputs ask for, batch by batch in the workspace, or return those that are ready."""
    if not inputs.requests:
        return inputs.responses
    requests = inputs.requests
    limit = response_limit(extractor.model, config.max_new_tokens)
    with samplers.open_sampler(extractor, config, requests, limit) as draw:
        run = partial(draw, max_new_tokens=limit, temperature=config.temperature, seed=config.seed)

        def sample(batch: list[int]) -> Arrays:
            new = run_with_oom_retry([requests[i] for i in batch], run, MEMORY_ADVICE)
            new = [_rewarded(r, requests[i].prompt, inputs.reward) for i, r in zip(batch, new, strict=True)]
            return {"json": np.array([json.dumps(asdict(r)) for r in new])}

        portions = workspace.run_stage(
            "generate",
            {i: len(request.prompt_ids) for i, request in enumerate(requests)},
            effective_batch_size(config.generator, config.batch_size),
            sample,
            description="sampling responses",
            processes=state,
        )
    lines = {int(i): str(line) for p in portions for i, line in zip(p["index"], p["json"], strict=True)}
    return [Response(**json.loads(lines[i])) for i in range(len(requests))]


def _rewarded(response: Response, prompt: Prompt, reward: Callable[[str, str], bool] | None) -> Response:
    if reward is None or prompt.answer is None:
        return response
    return replace(response, reward=float(reward(response.response, prompt.answer)))


def _capture(
    config: AnalyzeConfig,
    extractor: Extractor,
    responses: list[Response],
    workspace: Workspace,
    state: Processes,
    kind: str = "capture",
) -> CaptureResult:
    reducer = Reducer(extractor, open_lens(config.lens, extractor.model))
    if config.tolerance is not None:

        def run_chosen(batch: Sequence[PositionSubset]) -> list[TokenValues]:
            return reduce_responses(reducer, [r for r, _ in batch], "right", [tokens for _, tokens in batch])

        return capture_in_rounds(config, responses, run_chosen, workspace, state)

    def run(batch: Sequence[Response]) -> list[TokenValues]:
        return reduce_responses(reducer, batch)

    def capture(batch: list[int]) -> Arrays:
        values = run_with_oom_retry([responses[i] for i in batch], run, MEMORY_ADVICE)
        kept = [v for i, v in zip(batch, values, strict=True) if i < config.keep_tokens]
        empty_layers = np.zeros((0, *values[0].layers.shape[1:]), np.float32)
        return {
            "layers": np.stack([v.layers.mean(axis=0, dtype=np.float64) for v in values]),
            "policy": np.stack([v.policy.mean(axis=0, dtype=np.float64) for v in values]),
            "token_layers": np.concatenate([v.layers for v in kept] or [empty_layers]),
            "token_policy": np.concatenate([v.policy for v in kept] or [np.zeros((0, 2), np.float32)]),
        }

    lengths = {i: len(response.input_ids) for i, response in enumerate(responses)}
    what = "analysing responses" if kind == "capture" else f"analysing responses, {kind}"
    return CaptureResult(
        workspace.run_stage(kind, lengths, config.batch_size, capture, description=what, processes=state)
    )


def _assemble(
    config: AnalyzeConfig,
    model: LanguageModel,
    responses: list[Response],
    captured: CaptureResult,
    settings: dict[str, Any],
    timings: dict[str, float],
) -> Analysis:
    sample = captured.sample
    tokens = None if sample is None else sample.tokens
    per_response = tables.response_table(captured.portions, responses, tokens)
    layers = statistics.layer_table(per_response)
    if sample is not None:
        layers["change_half_width"] = sample.half_widths.ravel()
    selection = select_layer(SimpleNamespace(layers=layers, responses=per_response), seed=config.seed)
    kept = responses[: config.keep_tokens]
    texts = texts_of(model.tokenizer, (i for r in kept for i in r.input_ids[r.prompt_length :]))
    return Analysis(
        name=config.model if config.revision is None else f"{config.model}@{config.revision}",
        model={
            "id": config.model,
            "revision": model.revision,
            "family": model.family.name,
            "layers": model.n_layers,
            "vocabulary": model.vocab_size,
            "hidden_size": int(model.projection.weight.shape[1]),
            "parameters": model.n_parameters,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "device": "ndif" if config.remote else model.placement,
            **({"training": record} if (record := training_record(config.model)) else {}),
        },
        config=settings,
        layers=layers,
        responses=per_response,
        tokens=tables.token_table(captured.portions, responses, config.keep_tokens, tokens, texts),
        sequences=tables.sequence_table(responses),
        policy_entropy=statistics.policy_entropy(per_response),
        selection=selection,
        positions=None if sample is None else sample.summary(),
        timings=timings,
        versions={name: metadata.version(name) for name in _LIBRARIES},
    )
