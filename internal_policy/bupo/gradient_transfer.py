r"""``bupo.transfer``: how far the gradient of internal policy alignment points in the direction of GRPO's.

At the policy that sampled the responses every importance ratio is 1, so that the objectives of eqs. 3 and 9 have the
gradients::

    g(pi) = mean_i A_i / |o_i| sum_t grad log pi(o_it | q_i, o_i<t)

of pi_theta and of pi^l. Both reach the embedding, layers 1..l and E_u; the cosine is that over these parameters. The
gradient of pi_theta is kept, and the others are compared with it one layer at a time.

Both are sums over the same sampled responses and share their noise, which raises the cosine. So it is also taken across
two halves of the prompts, next to the cosine of each gradient with itself across the halves: if one's is c and the
other's d, directions that are the same without noise agree across the halves to sqrt(c d).

The interval comes from drawing groups of prompts again. For that each group leaves a random projection of its gradient,
from which the inner products of any resample follow; the cosine itself is exact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from internal_policy.analysis.inputs import Source, as_source, source_label
from internal_policy.bupo.config import PAPER_PROMPTS
from internal_policy.bupo.gradients import Copy, Gradients, Rollout, backward, bootstrap_error, cosine, products
from internal_policy.bupo.prompts import is_testbed, require_answers
from internal_policy.bupo.transfer_config import TransferConfig
from internal_policy.bupo.transfer_results import COLUMNS, TRANSFER, Transfer
from internal_policy.data.prompts import TESTBED, Prompt, read_prompts, render_all
from internal_policy.data.responses import Response
from internal_policy.extractors.truncated import internal_forward
from internal_policy.generation import Request, check_prompt_lengths, end_ids, response_limit, sample
from internal_policy.models import LanguageModel, eval_mode, limit_threads, load, without_autocast
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.rewards.functions import as_rewards, needs_answers, score
from internal_policy.rewards.identity import digest_code, reward_name
from internal_policy.statistics import Floats
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import choose_numbers, refuse_unknown, takes_options, write_numbers
from internal_policy.utils.result_format import library_version
from internal_policy.utils.workspace import Arrays, Workspace

logger = logging.getLogger(__name__)

_LIBRARIES = ("internal-policy", "torch", "transformers", "trl", "numpy")
_MEMORY_ADVICE = "lower --max-new-tokens, use --dtype bfloat16 or another --device"
_GROUPS = 32
"""Groups of prompts whose gradients are told apart; they are what the bootstrap draws."""
_SAMPLED_TOGETHER = 4
"""Batches of the backward pass in one of sampling, which keeps no activations."""
_ADVANTAGE_EPS = 1e-4
"""Added to the standard deviation of a group's rewards, as TRL does."""
_OF_A_NAME = {"dtype": "auto", "device": "auto", "revision": None, "trust_remote_code": False}
"""Options with which a model is loaded, and their defaults."""


@quiet_libraries()
@takes_options(TransferConfig)
@without_autocast()
@torch.inference_mode(False)
@torch.enable_grad()
def transfer(
    model: Any = "testbed/qwen3",
    prompts: Source | None = None,
    *,
    reward: Any = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    wait: bool = False,
    **options: Any,
) -> Transfer:
    r"""Measure at which layers the alignment of an internal policy moves the parameters as GRPO does.

    Responses are sampled and scored once; then each layer takes one backward pass over them. Nothing is trained, and a
    model that was given is as before afterwards. Four gradients in float32 are held besides the weights, where training
    with AdamW holds one and its two moments. All weights take part, frozen ones too.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a ``LanguageModel``
            (`models.load`, `models.wrap`).
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame of {"prompt", "answer"}.
        reward: what scores a response, as for ``train``; several rewards are added.
        output: directory for results; ``<output>/<model>`` is written, and an interrupted measurement is resumed from
            there. Without it nothing is written.
        overwrite: start over if that directory contains another result.
        wait: if another process writes there, wait until it has ended.
        **options: the further fields of ``TransferConfig``; ``layers`` may also be a list of numbers.

    Returns:
        The cosine of each layer, with its interval and its ceiling.

    Raises:
        UserError: bad input, or no prompt whose responses have different rewards; the message says what to do.

    Source: arXiv 2512.19673v3, eqs. 3, 9, 14 and 15.
    """
    opened = model if isinstance(model, LanguageModel) else None
    if opened is None and not isinstance(model, (str, Path)):
        raise UserError(f"model is a {type(model).__name__}; needed is a name, or models.wrap(model, tokenizer)")
    refuse_unknown(TransferConfig, options)
    if opened is not None and any(options.get(key, usual) != usual for key, usual in _OF_A_NAME.items()):
        raise UserError("a loaded model is taken as it is; leave out dtype, device, revision and trust_remote_code")
    name = opened.name if opened is not None else str(model)
    source = as_source(prompts, limit=options.get("max_prompts"))
    testbed = is_testbed(name, source)
    named = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    rewards = ", ".join(reward_name(each, exact=testbed) for each in named)
    config = TransferConfig(model=name, prompts=source_label(source), reward=rewards, **options)
    scorer = _Scorer(as_rewards(reward, exact=testbed))
    where = source if source is not None else TESTBED if testbed else PAPER_PROMPTS
    with eval_mode(opened.model if opened is not None else None):
        run = partial(_run, config, opened, where, scorer)
        if output is None:
            with tempfile.TemporaryDirectory(prefix="internal-policy-") as scratch:
                return replace(run(Path(scratch) / "run", False), path=None)
        directory = expanded(output) / config.slug
        with locked(directory, wait=wait):
            run(directory, overwrite)
            # What is returned is what is on disk, digit for digit.
            return Transfer.load(directory)


class _Scorer:
    """The sum of some rewards."""

    def __init__(self, rewards: Sequence[Callable[..., Any]]) -> None:
        self.rewards = rewards
        self.code = digest_code(rewards)
        self.needs_answers = needs_answers(rewards)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        answers = [prompt.answer or "" for prompt in prompts]
        found = [score(reward, texts, answers, [prompt.content for prompt in prompts]) for reward in self.rewards]
        totals = [math.fsum(values) for values in zip(*found, strict=True)]
        if any(math.isnan(total) for total in totals):
            raise UserError("the reward gave no score to a response; needed is a number for each")
        return totals


def _run(
    config: TransferConfig,
    opened: LanguageModel | None,
    source: str | list[Any],
    scorer: _Scorer,
    directory: Path,
    overwrite: bool,
) -> Transfer:
    workspace = Workspace(directory, TRANSFER)
    finished = Transfer.load(directory) if TRANSFER.is_in(directory) and not overwrite else None
    if finished is None:
        workspace.check()
    with status(f"loading {config.model}"):
        model = opened or load(
            config.model,
            revision=config.revision,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    layers = choose_numbers("--layers", str(config.layers), model.n_layers, "layers")
    if model.quantization is not None:
        raise UserError(
            f"{model.name}: its weights are quantised ({model.quantization}) and have no gradient; give the model "
            "without quantisation"
        )
    if any(parameter.is_meta for parameter in model.model.parameters()):
        raise UserError(
            f"{model.name}: some of its weights are not in memory (offloaded) and have no gradient; load it without "
            "offloading"
        )
    requests = _to_requests(config, model, source, scorer.needs_answers)
    hooked = attached_code(model.model)
    limit = response_limit(model, config.max_new_tokens)
    identity = {
        **config.cache_key(),
        "weights": model.fingerprint(),
        "inputs": hashlib.sha256(json.dumps([(r.prompt_ids, r.prompt.answer) for r in requests]).encode()).hexdigest()[
            :16
        ],
        "sampled_on": model.device.type,
        "token_limit": limit,
        "ends": end_ids(model),
        "hooked": hooked or None,
        "reward_code": scorer.code,
    }
    if hooked and not overwrite and (finished is not None or workspace.begun):
        raise resume_refused(directory, hooked, "a measurement")
    if finished is not None:
        TRANSFER.check_settings(directory, finished.config, identity)
        if not (layers := [layer for layer in layers if layer not in set(finished.table["layer"])]):
            logger.warning("%s: already complete; nothing to do (--overwrite starts over)", directory)
            return finished
    if workspace.open(identity, overwrite):
        logger.warning("%s: resuming an unfinished measurement", directory)
    with limit_threads(model):
        portions = _sample(config, model, requests, limit, scorer, workspace)
        rows = {int(i): json.loads(str(row)) for p in portions for i, row in zip(p["index"], p["json"], strict=True)}
        responses = [Response(**rows[i]["response"]) for i in range(len(requests))]
        rewards = np.array([rows[i]["score"] for i in range(len(requests))]).reshape(-1, config.num_generations)
        if (informative := int(differ(rewards).sum())) < 2:
            raise UserError(
                f"{model.name}: the responses differ in reward for {informative} of the {len(rewards)} prompts (mean "
                f"reward {rewards.mean():.2f}); needed are at least 2, since equal rewards give no gradient: use "
                "prompts that the model solves sometimes, or more of them"
            )
        rollouts = make_rollouts(responses, rewards)
        measured = _measure(config, model, rollouts, layers, workspace)
    stages = {"sample": portions, "gradients": measured}
    table = pd.DataFrame(
        [{name: value.item() for name, value in p.items() if name in COLUMNS} for p in measured],
        columns=list(COLUMNS),
    )
    timings = {stage: sum(float(p["seconds"]) for p in found) for stage, found in stages.items()}
    if finished is not None:
        table = pd.concat([finished.table, table])
        timings = {stage: seconds + finished.timings.get(stage, 0.0) for stage, seconds in timings.items()}
    table = table.sort_values("layer", ignore_index=True)
    covered = config.layers if finished is None else write_numbers(tuple(table["layer"]))
    result = Transfer(
        name=config.model if config.revision is None else f"{config.model}@{config.revision}",
        model={
            "id": config.model,
            "revision": model.revision,
            "family": model.family.name,
            "layers": model.n_layers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        config={**asdict(config), "layers": covered, **identity},
        table=table,
        n_prompts=len(rewards),
        n_informative=informative,
        mean_reward=float(rewards.mean()),
        timings={stage: round(seconds, 3) for stage, seconds in timings.items()},
        versions={name: v for name in _LIBRARIES if (v := library_version(name)) is not None},
    )
    saved = result.save(directory)
    workspace.close()
    return replace(result, path=saved)


def _to_requests(
    config: TransferConfig, model: LanguageModel, source: str | list[Any], needs_answer: bool
) -> list[Request]:
    found = read_prompts(source, split=config.prompts_split, usual="train", limit=config.max_prompts)
    if len(found) < 2:
        raise UserError(f"{len(found)} prompt was given; needed are at least 2, whose halves are compared")
    if needs_answer:
        require_answers(found)
    rendered = render_all(found, config.template, model.tokenizer)
    requests = [
        Request(prompt, ids, number, index)
        for number, (prompt, ids) in enumerate(zip(found, rendered, strict=True))
        for index in range(config.num_generations)
    ]
    check_prompt_lengths(requests, model)
    return requests


def _sample(
    config: TransferConfig,
    model: LanguageModel,
    requests: Sequence[Request],
    limit: int,
    scorer: _Scorer,
    workspace: Workspace,
) -> list[Arrays]:
    run = partial(sample, model, max_new_tokens=limit, temperature=config.temperature, seed=config.seed)

    def sample_batch(batch: list[int]) -> Arrays:
        responses = run_with_oom_retry([requests[i] for i in batch], lambda part: run(part), _MEMORY_ADVICE)
        scores = scorer([requests[i].prompt for i in batch], [r.response for r in responses])
        rows = [{"response": asdict(r), "score": s} for r, s in zip(responses, scores, strict=True)]
        return {"json": np.array([json.dumps(row) for row in rows])}

    lengths = {i: len(request.prompt_ids) for i, request in enumerate(requests)}
    # A batch of equal prompts reads each of them once.
    size = max(_SAMPLED_TOGETHER * config.batch_size, config.num_generations)
    return workspace.run_stage("sample", lengths, size, sample_batch, description="sampling responses")


def differ(rewards: Floats) -> NDArray[np.bool_]:
    """Whether the responses to each prompt have different rewards, and so a gradient.

    Args:
        rewards: [prompts, responses to each].

    Returns:
        [prompts] of bool.
    """
    found: NDArray[np.bool_] = (rewards != rewards[:, :1]).any(axis=1)
    return found


def make_rollouts(responses: Sequence[Response], rewards: Floats) -> list[Rollout]:
    """Compute the advantages of sampled responses, and divide the prompts into groups.

    Args:
        responses: the responses, prompt by prompt.
        rewards: [prompts, responses to each].

    Returns:
        The responses whose advantage is not 0. Each group has prompts with a gradient, so that each half has some.

    Source: arXiv 2512.19673v3, eq. 3.
    """
    advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (
        rewards.std(axis=1, ddof=1, keepdims=True) + _ADVANTAGE_EPS
    )
    # Rounding would leave some of the mean of equal rewards.
    informative = differ(rewards)
    advantages[~informative] = 0.0
    ranks, count = informative.cumsum() - 1, int(informative.sum())
    groups = ranks * min(count, _GROUPS) // max(count, 1)
    place = [(prompt, index) for prompt in range(len(rewards)) for index in range(rewards.shape[1])]
    return [
        Rollout(response, int(groups[prompt]), float(advantages[prompt, index]))
        for response, (prompt, index) in zip(responses, place, strict=True)
        if advantages[prompt, index] != 0
    ]


@dataclass(frozen=True)
class _Half:
    """The gradient of one half of the prompts, and the sketch of each group's part, [groups, blocks, k]."""

    gradient: Copy
    sketches: Floats


def _measure(
    config: TransferConfig,
    model: LanguageModel,
    rollouts: Sequence[Rollout],
    layers: Sequence[int],
    workspace: Workspace,
) -> list[Arrays]:
    """The row of each layer."""
    middle = (max(r.group for r in rollouts) + 1) // 2
    halves = [[r for r in rollouts if r.group < middle], [r for r in rollouts if r.group >= middle]]
    reference: list[_Half] = []
    with Gradients(model) as gradients:

        def halve() -> list[_Half]:
            found = []
            for half in halves:
                sketches = backward(
                    model, half, gradients, batch_size=config.batch_size, temperature=config.temperature
                )
                found.append(_Half(gradients.take(), sketches))
            return found

        def compare(batch: list[int]) -> Arrays:
            (layer,) = batch
            if not reference:
                # Computed again after an interruption, if a layer is left.
                reference.extend(halve())
            with internal_forward(model.model, layer, family=model.family):
                own = halve()
            row = {"layer": layer, **_row(own, reference, layer, config.seed)}
            return {name: np.array(value) for name, value in row.items()}

        return workspace.run_stage(
            "gradients", dict(zip(layers, layers, strict=True)), 1, compare, description="comparing gradients"
        )


def _row(own: Sequence[_Half], other: Sequence[_Half], layer: int, seed: int) -> dict[str, float]:
    """The columns of a layer from the halves of its gradient and of pi_theta's."""
    # All that is outside the layers, and layers 1..l.
    shared = slice(0, layer + 1)

    def product(a: _Half, b: _Half) -> float:
        return float(products(a.gradient[shared], b.gradient[shared]).sum())

    def gram(halves: Sequence[_Half]) -> tuple[list[float], float]:
        return [product(half, half) for half in halves], product(halves[0], halves[1])

    (own_squares, own_between), (squares, between) = gram(own), gram(other)
    mixed = [[product(a, b) for b in other] for a in own]
    whole = cosine(sum(map(sum, mixed)), sum(own_squares) + 2 * own_between, sum(squares) + 2 * between)
    across = [cosine(mixed[i][1 - i], own_squares[i], squares[1 - i]) for i in (0, 1)]
    terms = [np.concatenate([half.sketches[:, shared] for half in halves]) for halves in (own, other)]
    stderr = bootstrap_error(terms[0], terms[1], seed)
    low, high = np.clip([whole - 1.96 * stderr, whole + 1.96 * stderr], -1.0, 1.0)
    return {
        "cosine": whole,
        "stderr": stderr,
        "low": float(low),
        "high": float(high),
        "across": float(np.mean(across)),
        "ceiling": cosine(between, *squares),
        "own_ceiling": cosine(own_between, *own_squares),
    }
