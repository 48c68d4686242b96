"""The evaluation, stage by stage: problems, model, responses with their scores, rates.

Responses are sampled and scored in batches, each of which is kept on disk as soon as it is finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from internal_policy.analysis.inputs import Source, as_source
from internal_policy.data import benchmarks
from internal_policy.data.prompts import MATH_500, TESTBED, Prompt, render_all
from internal_policy.data.responses import Response
from internal_policy.evaluation import metrics
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.depth import choose_layers, require_layer
from internal_policy.evaluation.results import EVALUATION, Evaluation, config_digest, load_finished, with_k
from internal_policy.generation import (
    InternalPolicy,
    Request,
    VllmSampler,
    check_prompt_lengths,
    compare_with_final,
    effective_batch_size,
    end_ids,
    refuse_generator,
    response_limit,
    sample,
    sample_internal,
)
from internal_policy.models import LanguageModel, eval_mode, limit_threads, load, without_autocast
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.models.lenses import open_lens
from internal_policy.rewards.identity import reward_name
from internal_policy.rewards.scoring import Scorer
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import MOST_PROMPTS, refuse_unknown, takes_options
from internal_policy.utils.result_format import library_version
from internal_policy.utils.workspace import Arrays, Workspace

logger = logging.getLogger(__name__)

_MEMORY_ADVICE = "lower --max-new-tokens, use --dtype bfloat16 or another --device"
_LIBRARIES = ("internal-policy", "torch", "transformers", "tokenizers", "numpy", "pandas", "math-verify", "vllm")


@quiet_libraries()
@takes_options(EvaluateConfig)
@without_autocast()
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

    As the paper's evaluation (arXiv 2512.19673v3, section 5): temperature 1, no truncation of the distribution. With a
    layer the responses are those of its internal policy, and are also compared with the model's own policy.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a ``LanguageModel``
            (`models.load`, `models.wrap`), whose training mode is restored afterwards.
        benchmark: ``math500`` (HuggingFaceH4/MATH-500 on the hub), ``amc23`` (math-ai/amc23), ``aime24``
            (HuggingFaceH4/aime_2024), ``aime25`` (math-ai/aime25), ``testbed`` (held-out problems of the embedded
            tasks), another hub id, a parquet, jsonl or json file, or a list or DataFrame of records with prompt and
            answer. By default math500, or testbed for an embedded model.
        reward: what scores a response from 0 to 1, as `rewards.functions.as_rewards` takes it; a response is correct
            if the score is 1. By default the verifier of mathematical answers; exact for ``testbed``.
        output: directory for results; ``<output>/<model>/<benchmark>`` is written, and an interrupted run is resumed
            from there. Without it nothing is written.
        overwrite: start over if that directory holds another evaluation.
        wait: if another process writes there, wait until it has ended.
        **options: the further fields of ``EvaluateConfig``.

    Returns:
        The evaluation.

    Raises:
        UserError: bad input; the message says what to do.
    """
    opened, source, config = _configure(model, benchmark, reward, options)
    if config.layer is not None:
        require_layer(config.layer, opened or config)
    scorer = Scorer(reward, exact=source == TESTBED)
    with eval_mode(opened.model if opened is not None else None):
        return _evaluate(config, _Opener(config, source, opened), source, scorer, output, overwrite, wait)


@quiet_libraries()
@takes_options(EvaluateConfig, without=("layer",))
@without_autocast()
def evaluate_layers(
    model: str | Path | LanguageModel = "testbed/qwen3",
    benchmark: Source | None = None,
    *,
    layers: str | int | Sequence[int] = "all",
    reward: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    **options: Any,
) -> list[Evaluation]:
    """Evaluate the internal policies of several layers on the same problems; the model is loaded once.

    ``depth_table`` puts the results in one table, and ``plotting.accuracy_over_depth`` draws them.

    Args:
        model: see ``evaluate``.
        benchmark: see ``evaluate``.
        layers: ``all``, or numbers from 1, also as text such as ``"2,4-6"``.
        reward: see ``evaluate``.
        output: directory for results; each layer has a directory of its own, ``<model>/<benchmark>--layer-6``, and an
            interrupted run continues with the first that is not finished.
        overwrite: start over where a directory holds another evaluation.
        wait: if another process writes there, wait until it has ended.
        **options: the further fields of ``EvaluateConfig``.

    Returns:
        An evaluation for each layer, in ascending order.

    Raises:
        UserError: bad input; the message says what to do.
    """
    # The settings are checked with any layer before the number of layers is looked up.
    opened, source, config = _configure(model, benchmark, reward, {**options, "layer": 1})
    chosen = choose_layers(layers, opened or config)
    scorer = Scorer(reward, exact=source == TESTBED)
    with eval_mode(opened.model if opened is not None else None):
        opener = _Opener(config, source, opened)
        configs = [replace(config, layer=layer) for layer in chosen]
        return [_evaluate(each, opener, source, scorer, output, overwrite, wait) for each in configs]


def _configure(
    model: Any, benchmark: Source | None, reward: Any, options: dict[str, Any]
) -> tuple[LanguageModel | None, str | list[Any], EvaluateConfig]:
    """Check all arguments: the model if it was given as an object, the benchmark, and the settings."""
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
    return opened, source, config


def _evaluate(
    config: EvaluateConfig,
    opener: _Opener,
    source: str | list[Any],
    scorer: Scorer,
    output: str | Path | None,
    overwrite: bool,
    wait: bool,
) -> Evaluation:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="internal-policy-") as scratch:
            return replace(_run(config, opener, source, scorer, Path(scratch) / "run", False), path=None)
    directory = expanded(output) / config.slug
    with locked(directory, wait=wait):
        return _run(config, opener, source, scorer, directory, overwrite)


def default_benchmark() -> str:
    """Return the benchmark of a model that is not embedded, ``math500``."""
    return next(name for name, b in benchmarks.BENCHMARKS.items() if b.source == MATH_500)


@dataclass
class _Opener:
    """The model of one evaluation or of several: given as an object, or loaded when the first of them needs it."""

    config: EvaluateConfig
    source: str | list[Any]
    opened: LanguageModel | None
    files: str | None = None
    """Digest of the files that everything is made from; None if the model was given as an object."""
    seconds: float = field(default=0.0, init=False)
    """Spent on loading."""
    _named: bool = field(init=False)

    def __post_init__(self) -> None:
        self._named = self.opened is None and isinstance(self.source, str)

    def read_files(self) -> None:
        """Take the digest before the model is loaded, so that a later change of its files is noticed."""
        if self._named and self.opened is None:
            self.files = config_digest(self.config, str(self.source))

    def open(self) -> LanguageModel:
        """Load the model, or return it if that was done before."""
        if self.opened is None:
            started = time.perf_counter()
            with status(f"loading {self.config.model}"):
                self.opened = load(
                    self.config.model,
                    revision=self.config.revision,
                    dtype=self.config.dtype,
                    device=self.config.device,
                    trust_remote_code=self.config.trust_remote_code,
                )
            self.seconds = time.perf_counter() - started
        return self.opened


def _run(
    config: EvaluateConfig,
    opener: _Opener,
    source: str | list[Any],
    scorer: Scorer,
    directory: Path,
    overwrite: bool,
) -> Evaluation:
    finished = None if overwrite else load_finished(config, directory)
    workspace = Workspace(directory, EVALUATION)
    if finished is None:
        workspace.check()
    opener.read_files()
    with status(f"reading {config.benchmark}"):
        problems = benchmarks.read_benchmark(source, config.max_problems)
    model = opener.open()
    requests = _to_requests(config, model, problems)
    limit = response_limit(model, config.max_new_tokens)
    policy = _internal_policy(config, model)
    function = [] if isinstance(config.lens, (str, Path)) else [f"lens {config.lens_name}: a function"]
    hooked = [*attached_code(model.model), *function]
    identity = {
        **config.cache_key(),
        "weights": model.fingerprint(),
        "problems": benchmarks.digest([(p.problem, p.answer or "") for p in problems]),
        "inputs": hashlib.sha256(json.dumps([r.prompt_ids for r in requests]).encode()).hexdigest()[:16],
        # Each kind of device has its own random streams.
        "sampled_on": model.device.type,
        "sampled_in": str(model.dtype).removeprefix("torch."),
        "token_limit": limit,
        "ends": end_ids(model),
        "hooked": hooked or None,
        "reward_code": scorer.code,
    }
    if model.rounds_by_batch:
        identity["batch_size"] = config.batch_size
    if hooked and not overwrite and (finished is not None or workspace.begun):
        raise resume_refused(directory, hooked, "an evaluation")
    if finished is not None:
        EVALUATION.check_settings(directory, finished.config, identity)
        return with_k(finished, config, directory)
    if workspace.open(identity, overwrite):
        logger.warning("%s: resuming an unfinished evaluation", directory)
    portions = _sample_and_score(config, model, policy, requests, limit, scorer, workspace)
    lines = {int(i): str(line) for p in portions for i, line in zip(p["index"], p["json"], strict=True)}
    rows = [json.loads(lines[i]) for i in range(len(requests))]
    # Of several layers, only the first waits for the model.
    timings = {"load": round(opener.seconds, 3)}
    opener.seconds = 0.0
    stages = ("sample", "score") if config.layer is None else ("sample", "score", "compare")
    timings |= {stage: round(sum(float(p[f"{stage}_seconds"]) for p in portions), 3) for stage in stages}
    failures: Counter[str] = Counter()
    for portion in portions:
        failures.update(json.loads(str(portion["failures"])))
    evaluation = _assemble(config, model, problems, rows, {**config.settings(), **identity, "files": opener.files})
    evaluation = replace(evaluation, failures=dict(failures), timings=timings)
    evaluation = replace(evaluation, path=evaluation.save(directory))
    workspace.close()
    return evaluation


def _to_requests(config: EvaluateConfig, model: LanguageModel, problems: Sequence[Prompt]) -> list[Request]:
    """Template the problems; n requests for each, problem by problem."""
    if len(problems) * config.n > MOST_PROMPTS:
        raise UserError(
            f"{len(problems)} problems x {config.n} samples are more than the {MOST_PROMPTS} responses of one "
            "evaluation; lower --samples or --max-problems"
        )
    rendered = render_all(problems, config.template, model.tokenizer)
    requests = [
        Request(prompt, ids, number, index)
        for number, (prompt, ids) in enumerate(zip(problems, rendered, strict=True))
        for index in range(config.n)
    ]
    check_prompt_lengths(requests, model)
    return requests


def _sample_and_score(
    config: EvaluateConfig,
    model: LanguageModel,
    policy: InternalPolicy | None,
    requests: Sequence[Request],
    limit: int,
    scorer: Scorer,
    workspace: Workspace,
) -> list[Arrays]:
    """The portions of the stage, in which ``json`` holds a row for each request of ``index``.

    Each batch is kept in the workspace. A reward that cannot be used is refused after the first of them.
    """
    ends = set(end_ids(model))
    with _open_sampler(config, model, policy, requests, limit) as run, limit_threads(model):

        def sample_batch(batch: list[int]) -> Arrays:
            started = time.perf_counter()
            responses = run_with_oom_retry([requests[i] for i in batch], run, _MEMORY_ADVICE)
            sampled = time.perf_counter()
            scores, failures = scorer([requests[i].prompt for i in batch], [r.response for r in responses])
            scored = time.perf_counter()
            rows = [_row(requests[i], r, s, ends) for i, r, s in zip(batch, responses, scores, strict=True)]
            seconds = {"sample": sampled - started, "score": scored - sampled}
            if policy is not None:
                compare = partial(compare_with_final, model, policy=policy)
                compared = run_with_oom_retry(responses, compare, _MEMORY_ADVICE)
                rows = [{**row, **asdict(one)} for row, one in zip(rows, compared, strict=True)]
                seconds["compare"] = time.perf_counter() - scored
            return {
                "json": np.array([json.dumps(row) for row in rows]),
                "failures": np.array(json.dumps(failures)),
                **{f"{stage}_seconds": np.array(spent) for stage, spent in seconds.items()},
            }

        return workspace.run_stage(
            "sample",
            {i: len(request.prompt_ids) for i, request in enumerate(requests)},
            effective_batch_size(config.generator, config.batch_size),
            sample_batch,
            description=f"sampling responses of {config.policy_label}" if policy else "sampling responses",
        )


def _internal_policy(config: EvaluateConfig, model: LanguageModel) -> InternalPolicy | None:
    """The policy that is sampled from; None for pi_theta. A lens that does not fit the model is refused."""
    if config.layer is None:
        return None
    return InternalPolicy(config.layer, config.site, open_lens(config.lens, model))


@contextmanager
def _open_sampler(
    config: EvaluateConfig,
    model: LanguageModel,
    policy: InternalPolicy | None,
    requests: Sequence[Request],
    limit: int,
) -> Iterator[Callable[[Sequence[Request]], list[Response]]]:
    options: dict[str, Any] = {"max_new_tokens": limit, "temperature": config.temperature, "seed": config.seed}
    if policy is not None:
        yield lambda part: sample_internal(model, part, policy, **options)
    elif config.generator == "vllm":
        with VllmSampler(model, requests, limit, config.trust_remote_code) as sampler:
            yield partial(sampler, **options)
    else:
        yield lambda part: sample(model, part, **options)


def _row(request: Request, response: Response, score: float, ends: set[int]) -> dict[str, Any]:
    return {
        "problem": request.prompt_index + 1,
        "sample": request.sample_index + 1,
        "response": response.response,
        "score": score,
        "n_tokens": response.n_tokens,
        "truncated": response.input_ids[-1] not in ends,
    }


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
    name = config.model if config.revision is None else f"{config.model}@{config.revision}"
    return Evaluation(
        name=f"{name}, {config.policy_label}" if config.policy_label else name,
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
        versions={name: v for name in _LIBRARIES if (v := library_version(name)) is not None},
    )
