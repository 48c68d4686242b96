"""Sample and score the responses, batch by batch; each finished batch is kept on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from internal_policy.data.prompts import Prompt, render_all
from internal_policy.data.responses import Response
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.scoring import Scorer
from internal_policy.generation import Request, VllmSampler, check_prompt_lengths, end_ids, sample, together
from internal_policy.models import LanguageModel, fitting_threads
from internal_policy.utils.errors import UserError
from internal_policy.utils.memory import halving
from internal_policy.utils.options import MOST_PROMPTS
from internal_policy.utils.progress import progress
from internal_policy.utils.workspace import Workspace

_MEMORY_ADVICE = "lower --max-new-tokens, use --dtype bfloat16 or another --device"


def to_requests(config: EvaluateConfig, model: LanguageModel, problems: Sequence[Prompt]) -> list[Request]:
    """Template every problem, and ask for its samples.

    Args:
        config: the settings.
        model: the model that will answer.
        problems: the problems.

    Returns:
        n requests a problem, problem by problem.

    Raises:
        UserError: a prompt that the model cannot read.
    """
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


def sample_all(
    config: EvaluateConfig,
    model: LanguageModel,
    requests: Sequence[Request],
    limit: int,
    scorer: Scorer,
    workspace: Workspace,
) -> list[dict[str, Any]]:
    """Sample and score batch by batch, so that a reward that cannot be used is told after the first.

    Args:
        config: the settings.
        model: the model.
        requests: what to sample.
        limit: at most so many tokens a response.
        scorer: scores the responses.
        workspace: keeps each finished batch, and has those of an interrupted run.

    Returns:
        A row a request, in order: problem, sample, response, score, n_tokens, truncated.
    """
    found: dict[int, dict[str, Any]] = {}
    for shard in workspace.shards("sample"):
        found |= {int(i): json.loads(str(line)) for i, line in zip(shard["index"], shard["json"], strict=True)}
    ends = set(end_ids(model))

    size = together(config.generator, config.batch_size)
    # Prompts of one length together, the longest first: what does not fit in memory is told early.
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
    with (
        _drawing(config, model, requests, limit) as run,
        progress("sampling responses", len(requests), len(found)) as advance,
        fitting_threads(model),
    ):
        for start in range(0, len(order), size):
            batch = [i for i in order[start : start + size] if i not in found]
            if not batch:
                continue
            clock = [time.perf_counter()]
            responses = halving([requests[i] for i in batch], run, _MEMORY_ADVICE)
            clock.append(time.perf_counter())
            scores, failures = scorer([requests[i].prompt for i in batch], [r.response for r in responses])
            clock.append(time.perf_counter())
            new = {i: _row(requests[i], r, s, ends) for i, r, s in zip(batch, responses, scores, strict=True)}
            workspace.write(
                "sample",
                batch[0],
                {
                    "index": np.array(batch),
                    "json": np.array([json.dumps(row) for row in new.values()]),
                    "failures": np.array(json.dumps(failures)),
                    "sample_seconds": np.array(clock[1] - clock[0]),
                    "score_seconds": np.array(clock[2] - clock[1]),
                },
            )
            found |= new
            advance(len(batch))
    return [found[i] for i in range(len(requests))]


@contextmanager
def _drawing(
    config: EvaluateConfig, model: LanguageModel, requests: Sequence[Request], limit: int
) -> Iterator[Callable[[Sequence[Request]], list[Response]]]:
    options: dict[str, Any] = {"max_new_tokens": limit, "temperature": config.temperature, "seed": config.seed}
    if config.generator == "vllm":
        with VllmSampler(model, requests, limit, config.trust_remote_code) as draw:
            yield partial(draw, **options)
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
