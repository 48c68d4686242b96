"""Ablation, stage by stage: model, responses, means of writes, effects of every intervention, sampling under them.

from internal_policy import ablate

ablation = ablate("testbed/qwen3", sites="attn,ffn", how="zero")
ablation.table             # DataFrame: KL, change of entropy and of log-probability, flips, per layer and site
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from internal_policy.analysis.inputs import Inputs, Source, as_source, gather_inputs, source_label
from internal_policy.analysis.pipeline import sample_responses
from internal_policy.analysis.tables import sequence_table
from internal_policy.data.responses import Response, prompt_indices
from internal_policy.extractors import Extractor, registry
from internal_policy.generation import Request, end_ids, response_limit, samplers
from internal_policy.interventions import tables
from internal_policy.interventions.changes import Given, Intervention, Point, changed_writes
from internal_policy.interventions.config import AblateConfig
from internal_policy.interventions.effects import choose_donors, measure_effects, sum_writes
from internal_policy.interventions.plan import plan_interventions
from internal_policy.interventions.replay import prove_restarts
from internal_policy.interventions.results import ABLATION, Ablation, config_digest, load_finished, report_finished
from internal_policy.models import LanguageModel, eval_mode, limit_threads, without_autocast
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.rewards.identity import reward_name
from internal_policy.rewards.scoring import Scorer
from internal_policy.utils.distributed import Processes, run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import refuse_unknown, takes_options
from internal_policy.utils.workspace import Arrays, Workspace

logger = logging.getLogger(__name__)

_ADVICE = "lower --batch-size, shorten the responses, use --dtype bfloat16 or another --device"
_LIBRARIES = ("internal-policy", "torch", "transformers", "tokenizers", "numpy", "pandas")


@quiet_libraries()
@takes_options(AblateConfig)
@without_autocast()
def ablate(
    model: Any = "testbed/qwen3",
    tokenizer: Any = None,
    *,
    prompts: Source | None = None,
    responses: Source | None = None,
    reward: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    **options: Any,
) -> Ablation:
    """Change what modules write, and measure what becomes of the final policy on response tokens.

    Each intervention is made alone, at every token of a sequence. The layers below it are computed once.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a transformers model.
        tokenizer: the tokenizer of a model given as an object.
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame: texts, chats, or records with a
            ``prompt``, and with an ``answer`` if responses are scored.
        responses: ready responses instead: a jsonl, json or parquet file, or a list or DataFrame of records;
            ``analysis.sequences`` is one.
        reward: what scores sampled responses from 0 to 1, as `rewards.functions.as_rewards` takes it; a response is
            correct if the score is 1. By default the verifier of mathematical answers; exact for the embedded tasks.
        output: directory for results; ``<output>/<model>--<how>`` is written, and an interrupted run is resumed from
            there. Without it nothing is written.
        overwrite: start over if that directory holds another ablation.
        wait: if another process writes there, start when it has ended.
        **options: the further fields of ``AblateConfig``.

    Returns:
        The ablation, with its tables as DataFrames.

    Raises:
        UserError: bad input, or a model in which the intervention cannot be made; the message says what to do.
    """
    refuse_unknown(AblateConfig, options)
    in_memory = registry.is_object(model, tokenizer, options)
    prompts = as_source(prompts, limit=options.get("max_responses"))
    responses = as_source(responses, "responses", options.get("max_responses"))
    name = registry.name_of(model) if in_memory else str(model)
    refuse_other_library(model)
    config = AblateConfig(model=name, prompts=source_label(prompts), responses=source_label(responses), **options)
    if reward is not None:
        # The name is what is stored and compared.
        config = replace(config, reward=reward_name(reward, exact=False))
    with ExitStack() as stack:
        open_given = None
        if in_memory:
            stack.enter_context(eval_mode(registry.module_of(model)))
            open_given = registry.wrap_in_memory(model, tokenizer, name, config)
        if output is not None:
            directory = expanded(output) / config.slug
            with locked(directory, wait=wait):
                return _run(config, open_given, prompts, responses, reward, directory, overwrite)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="internal-policy-"))
        return replace(_run(config, open_given, prompts, responses, reward, Path(scratch) / "run", False), path=None)


def refuse_other_library(model: Any) -> None:
    """Raise a `UserError` if a model is an object of another library, whose own interventions apply."""
    if (library := registry.library_of(model)) is not None:
        raise UserError(
            f"a model of {library} was given, and interventions are made by PyTorch hooks; give the transformers model "
            "inside it with its tokenizer, or intervene with that library"
        )


def _run(
    config: AblateConfig,
    open_given: registry.Opener | None,
    prompts: str | list[Any] | None,
    responses: str | list[Any] | None,
    reward: Any,
    directory: Path,
    overwrite: bool,
) -> Ablation:
    finished = None if overwrite else load_finished(config, directory)
    workspace = Workspace(directory, ABLATION)
    if finished is None:
        workspace.check()
    named = open_given is None and not isinstance(prompts, list) and not isinstance(responses, list)
    # Before the model is loaded, so that a later change of its files is noticed.
    files = config_digest(config) if named else None
    started = time.perf_counter()
    with status(f"loading {config.model}"):
        extractor = (open_given or registry.opener(config))()
    model = extractor.model
    load_seconds = time.perf_counter() - started
    prove_restarts(model)
    interventions = plan_interventions(config, model)
    inputs = gather_inputs(config, model, prompts, responses)
    scorer = _scorer(config, inputs, reward)
    hooked = attached_code(model.model, extractor.wrapper)
    code = {"hooked": hooked or None, "reward_code": scorer.code if scorer is not None else None}
    identity = {**config.cache_key(), **_identity(config, model, inputs), **code}
    if hooked and not overwrite and (finished is not None or workspace.begun):
        raise resume_refused(directory, hooked, "an ablation")
    if finished is not None:
        ABLATION.check_settings(directory, finished.config, identity)
        workspace.close()
        report_finished(directory)
        return finished
    if workspace.open(identity, overwrite):
        logger.warning("%s: resuming an unfinished ablation", directory)
    with limit_threads(model):
        studied = sample_responses(config, extractor, inputs, workspace, Processes())
        means = _mean_writes(config, model, interventions, studied, workspace)
        changed, clean = _effects(config, model, interventions, studied, means, workspace)
        samples: pd.DataFrame | None = None
        failures: dict[int, dict[str, int]] = {}
        if scorer is not None:
            samples, failures = _sample(config, extractor, interventions, means, inputs, scorer, workspace)
    keys = tables.key_table(interventions)
    effects = tables.response_effects(keys, changed, clean, prompt_indices(studied), [r.n_tokens for r in studied])
    table, means_of_clean = tables.effect_table(effects), tables.clean_means(effects)
    if samples is not None:
        rates = tables.accuracy_table(samples)
        own = [name for name in rates.columns if not name.startswith("accuracy_change")]
        means_of_clean |= {str(name): float(rates[name].iloc[0]) for name in own}
        table = pd.concat(
            [table.drop(columns="n_tokens"), rates.iloc[1:].reset_index(drop=True), table["n_tokens"]], axis=1
        )
    timings = {"load": round(load_seconds, 3)}
    for stage in ("generate", "means", "effects", "sample"):
        seconds = sum(float(shard["seconds"]) for shard in workspace.shards(f"{stage}*"))
        timings |= {stage: round(seconds, 3)} if seconds else {}
    ablation = Ablation(
        name=config.model if config.revision is None else f"{config.model}@{config.revision}",
        model={
            "id": config.model,
            "revision": model.revision,
            "family": model.family.name,
            "layers": model.n_layers,
            "vocabulary": model.vocab_size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "device": model.placement,
        },
        config={**asdict(config), **identity, "files": files},
        table=table,
        responses=effects,
        sequences=sequence_table(studied),
        clean=means_of_clean,
        samples=samples,
        failures=failures,
        timings=timings,
        versions={library: metadata.version(library) for library in _LIBRARIES},
    )
    ablation = replace(ablation, path=ablation.save(directory))
    workspace.close()
    return ablation


def _identity(config: AblateConfig, model: LanguageModel, inputs: Inputs) -> dict[str, Any]:
    """Everything that determines the numbers beside the settings, by which an ablation is resumed or recognised."""
    identity: dict[str, Any] = {"weights": model.fingerprint(), "inputs": inputs.digest()}
    if model.rounds_by_batch:
        identity["batch_size"] = config.batch_size
    if inputs.requests:
        # Random streams depend on the kind of device.
        identity["sampled_on"] = model.device.type
        identity["token_limit"] = response_limit(model, config.max_new_tokens)
        identity["ends"] = end_ids(model)
    if config.samples is not None:
        answers = [[request.prompt.content, request.prompt.answer] for request in inputs.requests]
        identity["answers"] = hashlib.sha256(json.dumps(answers).encode()).hexdigest()[:16]
    return identity


def _scorer(config: AblateConfig, inputs: Inputs, reward: Any) -> Scorer | None:
    """What scores sampled responses; None if none are sampled."""
    if config.samples is None:
        return None
    exact = inputs.reward is not None
    missing = sum(request.prompt.answer is None for request in inputs.requests)
    if missing and reward_name(config.reward, exact=exact) in ("math", "exact"):
        raise UserError(
            f"--samples needs reference answers, and {missing} of {len(inputs.requests)} prompts have none; give "
            "--prompts with a column answer, or a --reward that needs none"
        )
    return Scorer(reward, exact=exact)


def _mean_writes(
    config: AblateConfig,
    model: LanguageModel,
    interventions: Sequence[Intervention],
    responses: Sequence[Response],
    workspace: Workspace,
) -> Given:
    """The means over response tokens of the writes that are replaced by theirs."""
    points = sorted(set().union(*(each.points("mean") for each in interventions)))
    if not points:
        return {}

    def run(batch: Sequence[Response]) -> list[dict[tuple[int, Point], Tensor]]:
        # One sum for the batch: the others are empty, so that a batch that was halved adds up to the same.
        return [sum_writes(model, set(points), batch), *({} for _ in batch[1:])]

    def add_up(batch: list[int]) -> Arrays:
        parts = run_with_oom_retry([responses[i] for i in batch], run, _ADVICE)
        sums = {point: sum(part[point] for part in parts if point in part) for point in points}
        return {f"{layer} {point}": np.asarray(sums[layer, point]) for layer, point in points}

    portions = workspace.run_stage(
        "means",
        {i: len(response.input_ids) for i, response in enumerate(responses)},
        config.batch_size,
        add_up,
        description="averaging writes",
    )
    n_tokens = sum(response.n_tokens for response in responses)
    return {
        ("mean", layer, point): torch.from_numpy(sum(p[f"{layer} {point}"] for p in portions) / n_tokens)
        for layer, point in points
    }


def _effects(
    config: AblateConfig,
    model: LanguageModel,
    interventions: Sequence[Intervention],
    responses: list[Response],
    means: Given,
    workspace: Workspace,
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    donors: list[int] = []
    if any(each.points("resample") for each in interventions):
        donors = choose_donors(responses, prompt_indices(responses), config.seed)

    def run(batch: Sequence[int]) -> list[tuple[Any, Any]]:
        found = measure_effects(
            model,
            interventions,
            [responses[i] for i in batch],
            means,
            [responses[donors[i]] for i in batch] if donors else [],
        )
        return list(zip(found.changed, found.clean, strict=True))

    def measure(batch: list[int]) -> Arrays:
        found = run_with_oom_retry(batch, run, _ADVICE)
        return {"changed": np.stack([changed for changed, _ in found]), "clean": np.stack([c for _, c in found])}

    portions = workspace.run_stage(
        "effects",
        {i: len(response.input_ids) for i, response in enumerate(responses)},
        config.batch_size,
        measure,
        description=f"intervening {len(interventions)} times",
    )
    order = np.argsort(np.concatenate([portion["index"] for portion in portions]))
    changed, clean = (np.concatenate([portion[name] for portion in portions])[order] for name in ("changed", "clean"))
    return changed, clean


def _sample(
    config: AblateConfig,
    extractor: Extractor,
    interventions: Sequence[Intervention],
    means: Given,
    inputs: Inputs,
    scorer: Scorer,
    workspace: Workspace,
) -> tuple[pd.DataFrame, dict[int, dict[str, int]]]:
    """Sample responses without a change (0) and under each intervention, and score them; with the same random noise.

    The failures of the verifier are those of the interventions that have some.
    """
    model = extractor.model
    prompts = {request.prompt_index: request for request in inputs.requests}
    requests = [replace(request, sample_index=k) for request in prompts.values() for k in range(config.samples or 1)]
    limit, ends = response_limit(model, config.max_new_tokens), set(end_ids(model))
    draw = samplers.sampler(extractor, config)
    run = partial(draw, max_new_tokens=limit, temperature=config.temperature, seed=config.seed)
    frames, failures = [], {}
    for number, changes in enumerate([(), *(each.changes for each in interventions)]):
        with changed_writes(model, changes, means):
            frame, failed = _sample_once(config, requests, run, scorer, workspace, number, ends, len(interventions))
        frames.append(frame)
        if failed:
            failures[number] = failed
    return pd.concat(frames, ignore_index=True), failures


def _sample_once(
    config: AblateConfig,
    requests: Sequence[Request],
    run: Callable[[Sequence[Request]], list[Response]],
    scorer: Scorer,
    workspace: Workspace,
    number: int,
    ends: set[int],
    total: int,
) -> tuple[pd.DataFrame, dict[str, int]]:
    def sample_batch(batch: list[int]) -> Arrays:
        responses = run_with_oom_retry([requests[i] for i in batch], run, _ADVICE)
        scores, failures = scorer([requests[i].prompt for i in batch], [r.response for r in responses])
        rows = [
            {
                "intervention": number,
                "prompt": requests[i].prompt_index,
                "sample": requests[i].sample_index,
                "response": response.response,
                "score": score,
                "n_tokens": response.n_tokens,
                "truncated": response.input_ids[-1] not in ends,
            }
            for i, response, score in zip(batch, responses, scores, strict=True)
        ]
        return {"json": np.array([json.dumps(row) for row in rows]), "failures": np.array(json.dumps(failures))}

    portions = workspace.run_stage(
        f"sample{number}",
        {i: len(request.prompt_ids) for i, request in enumerate(requests)},
        config.batch_size,
        sample_batch,
        description=f"sampling under intervention {number} of {total}" if number else "sampling without a change",
    )
    lines = {int(i): str(line) for p in portions for i, line in zip(p["index"], p["json"], strict=True)}
    failed: Counter[str] = Counter()
    for portion in portions:
        failed.update(json.loads(str(portion["failures"])))
    return pd.DataFrame([json.loads(lines[i]) for i in range(len(requests))]), dict(failed)
