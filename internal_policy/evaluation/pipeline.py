"""The evaluation, stage by stage: problems, model, responses with their scores, rates."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from internal_policy.analysis.inputs import Source, as_source
from internal_policy.data import benchmarks
from internal_policy.data.prompts import MATH_500, TESTBED, Prompt
from internal_policy.evaluation import finishing, metrics
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.results import MANIFEST, RESULT_FILES, Evaluation
from internal_policy.evaluation.sampling import sample_all, to_requests
from internal_policy.evaluation.scoring import Scorer, reward_name
from internal_policy.generation import end_ids, refuse_generator, response_limit
from internal_policy.models import LanguageModel, as_its_dtype_says, evaluating, load
from internal_policy.models.attachments import attached, not_taken_up
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.options import defaults_of, refuse_unknown, takes_options
from internal_policy.utils.progress import status
from internal_policy.utils.quiet import quiet_libraries
from internal_policy.utils.workspace import Workspace, in_use

logger = logging.getLogger(__name__)

_LIBRARIES = ("internal-policy", "torch", "transformers", "tokenizers", "numpy", "pandas", "math-verify", "vllm")


@quiet_libraries()
@takes_options(EvaluateConfig)
@as_its_dtype_says()
def evaluate(
    model: str | Path | LanguageModel = "testbed/qwen3",
    benchmark: Source | None = None,
    *,
    reward: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    **options: Any,
) -> Evaluation:
    """Sample responses to a benchmark's problems, score them, and compute Avg@K and Pass@K.

    As the paper's evaluation (arXiv 2512.19673v3, section 5): temperature 1, no truncation of the distribution.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a ``LanguageModel``
            (`models.load`, `models.wrap`), whose training mode is restored afterwards.
        benchmark: ``math500`` (HuggingFaceH4/MATH-500 on the hub), ``amc23`` (math-ai/amc23), ``aime24``
            (HuggingFaceH4/aime_2024), ``aime25`` (math-ai/aime25), ``testbed`` (held-out problems of the embedded
            tasks), another hub id, a parquet, jsonl or json file, or a list or DataFrame of records with prompt and
            answer. By default math500, or testbed for an embedded model.
        reward: what scores a response, as `bupo.rewards.as_rewards` takes it: from 0 to 1, and a response is correct
            where the score is 1. By default the verifier of mathematical answers; exact for ``testbed``.
        output: directory for results; ``<output>/<model>/<benchmark>`` is written, and an interrupted run is taken up
            from there. Without it nothing is written.
        overwrite: start over where that directory holds another evaluation.
        wait: where another process writes there, start when it has ended.
        **options: the further fields of ``EvaluateConfig``.

    Returns:
        The evaluation.

    Raises:
        UserError: bad input; the message says what to do.
    """
    opened = model if isinstance(model, LanguageModel) else None
    if opened is None and not isinstance(model, (str, Path)):
        raise UserError(f"model is a {type(model).__name__}; needed is a name, or models.wrap(model, tokenizer)")
    refuse_unknown(EvaluateConfig, options)
    if opened is not None and any(
        options.get(key) not in (None, "auto", False) for key in ("dtype", "device", "revision", "trust_remote_code")
    ):
        raise UserError("a loaded model is taken as it is; leave out dtype, device, revision and trust_remote_code")
    name = opened.name if opened is not None else str(model)
    source = as_source(benchmark, "benchmark", options.get("max_problems"))
    if source is None:
        source = TESTBED if name.startswith("testbed/") else default_benchmark()
    config = EvaluateConfig(
        model=name,
        benchmark=benchmarks.label(source),
        reward=reward_name(reward, exact=source == TESTBED),
        **options,
    )
    refuse_generator(config.generator, in_memory=opened is not None)
    scorer = Scorer(reward, exact=source == TESTBED)
    with evaluating(opened.model if opened is not None else None):
        if output is None:
            with tempfile.TemporaryDirectory(prefix="internal-policy-") as scratch:
                return replace(_run(config, opened, source, scorer, Path(scratch) / "run", False), path=None)
        directory = expanded(output) / config.slug
        with locked(directory, wait=wait):
            return _run(config, opened, source, scorer, directory, overwrite)


def default_benchmark() -> str:
    """The benchmark of a model that is not embedded.

    Returns:
        ``math500``.
    """
    return next(name for name, b in benchmarks.BENCHMARKS.items() if b.source == MATH_500)


def _run(
    config: EvaluateConfig,
    opened: LanguageModel | None,
    source: str | list[Any],
    scorer: Scorer,
    directory: Path,
    overwrite: bool,
) -> Evaluation:
    finished = None if overwrite else finishing.finished(config, directory)
    workspace = Workspace(directory, manifest=MANIFEST, result_files=RESULT_FILES, what="evaluation")
    if finished is None:
        workspace.check()
    named = opened is None and isinstance(source, str)
    # Before the model is read: what is written later into its files is then known to be another model.
    files = finishing.digest(config, str(source)) if named else None
    with status(f"reading {config.benchmark}"):
        problems = benchmarks.read_benchmark(source, config.max_problems)
    started = time.perf_counter()
    with status(f"loading {config.model}") if opened is None else nullcontext():
        model = opened or load(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    load_seconds = time.perf_counter() - started
    requests = to_requests(config, model, problems)
    limit = response_limit(model, config.max_new_tokens)
    hooked = attached(model.model)
    identity = {
        **config.cache_key(),
        "weights": model.fingerprint(),
        "problems": benchmarks.digest([(p.problem, p.answer or "") for p in problems]),
        "inputs": hashlib.sha256(json.dumps([r.prompt_ids for r in requests]).encode()).hexdigest()[:16],
        # Each kind of device has random streams of its own.
        "sampled_on": model.device.type,
        "sampled_in": str(model.dtype).removeprefix("torch."),
        "token_limit": limit,
        "ends": end_ids(model),
        "hooked": hooked or None,
    }
    if model.rounds_by_batch:
        identity["batch_size"] = config.batch_size
    if hooked and not overwrite and (finished is not None or workspace.begun):
        raise not_taken_up(directory, hooked, "an evaluation")
    if finished is not None:
        if differing := finishing.differing_settings(finished, identity):
            raise in_use(directory, "an evaluation", differing)
        return finishing.with_ks(finished, config, directory)
    if workspace.open(identity, overwrite, defaults_of(EvaluateConfig)):
        logger.warning("%s: going on with an unfinished evaluation", directory)
    rows = sample_all(config, model, requests, limit, scorer, workspace)
    timings = {"load": round(load_seconds, 3)}
    failures: Counter[str] = Counter()
    for stage in ("sample", "score"):
        timings[stage] = round(sum(float(shard[f"{stage}_seconds"]) for shard in workspace.shards("sample")), 3)
    for shard in workspace.shards("sample"):
        failures.update(json.loads(str(shard["failures"])))
    evaluation = _assemble(config, model, problems, rows, {**asdict(config), **identity, "files": files})
    evaluation = replace(evaluation, failures=dict(failures), timings=timings)
    evaluation = replace(evaluation, path=evaluation.save(directory))
    workspace.close()
    return evaluation


def _assemble(
    config: EvaluateConfig,
    model: LanguageModel,
    problems: Sequence[Prompt],
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
) -> Evaluation:
    samples = pd.DataFrame(rows)
    groups = samples.assign(correct=samples["score"] >= 1.0).groupby("problem")
    table = pd.DataFrame(
        {
            "problem": np.arange(1, len(problems) + 1),
            "prompt": [p.problem for p in problems],
            "answer": [p.answer for p in problems],
            "n": groups.size().to_numpy(),
            "correct": groups["correct"].sum().to_numpy(),
            "mean_score": groups["score"].mean().to_numpy(),
            "mean_length": groups["n_tokens"].mean().to_numpy(),
            "truncated": groups["truncated"].sum().to_numpy(),
        }
    )
    return Evaluation(
        name=config.model if config.revision is None else f"{config.model}@{config.revision}",
        model={
            "id": config.model,
            "revision": model.revision,
            "family": model.family.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        benchmark=config.benchmark,
        config=settings,
        problems=table,
        pass_at_k=metrics.pass_table(table, config.ks),
        avg=metrics.average(table),
        samples=samples,
        versions={name: v for name in _LIBRARIES if (v := _version(name)) is not None},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
