r"""``bupo.transfer``: how far the gradient of internal policy alignment points in the direction of GRPO's.

At the policy that sampled the responses every importance ratio is 1, so that the objectives of eqs. 3 and 9 have the
gradients::

    g(pi) = mean_i A_i / |o_i| sum_t grad log pi(o_it | q_i, o_i<t)

of pi_theta and of pi^l. Both reach the embedding, layers 1..l and E_u; the cosine is that over these parameters. The
gradient of pi_theta is kept, and the others are compared with it one layer at a time. Both are sums over the same
sampled responses and share their noise; so the cosine is also taken across two halves of the prompts, where it is at
most that of pi_theta's gradient with itself, the ceiling.

The interval comes from resampling prompts. For that each group of prompts leaves a random projection of its gradient,
from which the inner products of any resample follow; the cosine itself is exact.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from internal_policy.analysis.inputs import Source, as_source
from internal_policy.bupo.config import PAPER_PROMPTS
from internal_policy.bupo.forward import internal_forward
from internal_policy.bupo.prompts import is_testbed
from internal_policy.bupo.transfer_results import COLUMNS, TRANSFER, Transfer, TransferConfig
from internal_policy.data.prompts import TESTBED, read_prompts, render_all
from internal_policy.data.responses import Response, pad
from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.evaluation.scoring import Scorer, reward_name
from internal_policy.generation import Request, check_prompt_lengths, end_ids, response_limit, sample
from internal_policy.models import LanguageModel, eval_mode, limit_threads, load, without_autocast
from internal_policy.models.fingerprint import attached_code, resume_refused
from internal_policy.statistics import Floats
from internal_policy.utils.distributed import run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked
from internal_policy.utils.logging import quiet_libraries, status
from internal_policy.utils.options import refuse_unknown, takes_options
from internal_policy.utils.result_format import library_version
from internal_policy.utils.workspace import Arrays, Workspace

logger = logging.getLogger(__name__)

_LIBRARIES = ("internal-policy", "torch", "transformers", "numpy")
_MEMORY_ADVICE = "lower --batch-size or --max-new-tokens"
_GROUPS = 32
"""Groups of prompts whose gradients are told apart; they are what the bootstrap draws."""
_RESAMPLES = 1000
_SKETCH = 4093
"""Numbers in the projection of a gradient: prime, so that the columns of a weight matrix do not fall together."""
_ADVANTAGE_EPS = 1e-4
"""Added to the standard deviation of a group's rewards, as TRL does."""


@dataclass(frozen=True)
class Rollout:
    """A sampled response with its advantage."""

    response: Response
    """The response."""
    group: int
    """The group of prompts that it belongs to, from 0."""
    advantage: float
    """A_i of eq. 3."""


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

    Responses are sampled and scored once; then each layer takes one backward pass over them. Nothing is trained. Four
    gradients are held, where training with AdamW holds one and its two moments.

    Args:
        model: hub id, local directory, embedded model (``testbed/qwen3``, ``testbed/llama``), or a ``LanguageModel``
            (`models.load`, `models.wrap`).
        prompts: hub data set id, parquet, jsonl or json file, or a list or DataFrame of {"prompt", "answer"}.
        reward: what scores a response, as for ``evaluate``.
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
    name = opened.name if opened is not None else str(model)
    source = as_source(prompts, limit=options.get("max_prompts"))
    testbed = is_testbed(name, source)
    label = f"{len(source)} given" if isinstance(source, list) else source
    config = TransferConfig(model=name, prompts=label, reward=reward_name(reward, exact=testbed), **options)
    scorer = Scorer(reward, exact=testbed)
    where = source if source is not None else TESTBED if testbed else PAPER_PROMPTS
    with eval_mode(opened.model if opened is not None else None):
        run = partial(_run, config, opened, where, scorer)
        if output is None:
            with tempfile.TemporaryDirectory(prefix="internal-policy-") as scratch:
                return run(Path(scratch) / "run", False)
        directory = expanded(output) / config.slug
        with locked(directory, wait=wait):
            run(directory, overwrite)
            return Transfer.load(directory)


def _run(
    config: TransferConfig,
    opened: LanguageModel | None,
    source: str | list[Any],
    scorer: Scorer,
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
    layers = config.chosen_layers(model.n_layers)
    if model.quantization is not None:
        raise UserError(f"{model.name}: its weights are quantised ({model.quantization}) and have no gradient")
    requests = _to_requests(config, model, source)
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
    }
    if hooked and not overwrite and (finished is not None or workspace.begun):
        raise resume_refused(directory, hooked, "a measurement")
    if finished is not None:
        TRANSFER.check_settings(directory, finished.config, identity)
        if set(layers) <= set(finished.table["layer"]):
            logger.warning("%s: already complete; nothing to do (--overwrite starts over)", directory)
            return finished
    if workspace.open(identity, overwrite):
        logger.warning("%s: resuming an unfinished measurement", directory)
    with limit_threads(model):
        portions = _sample(config, model, requests, limit, scorer, workspace)
        rows = {int(i): json.loads(str(row)) for p in portions for i, row in zip(p["index"], p["json"], strict=True)}
        responses = [Response(**rows[i]["response"]) for i in range(len(requests))]
        rewards = np.array([rows[i]["score"] for i in range(len(requests))]).reshape(-1, config.num_generations)
        rollouts = make_rollouts(responses, rewards)
        if (informative := len({r.group for r in rollouts})) < 2:
            raise UserError(
                f"{model.name}: the responses differ in reward for {informative} of the {len(rewards)} prompts (mean "
                f"reward {rewards.mean():.2f}); needed are at least 2, since equal rewards give no gradient: use "
                "prompts that the model solves sometimes, or more of them"
            )
        measured = _measure(config, model, rollouts, layers, workspace)
    stages = {"sample": portions, "gradients": measured}
    table = pd.DataFrame(
        [{name: value.item() for name, value in p.items() if name in COLUMNS} for p in measured],
        columns=list(COLUMNS),
    )
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
        config={**asdict(config), **identity},
        table=table.sort_values("layer", ignore_index=True),
        n_prompts=len(rewards),
        n_informative=int((rewards != rewards[:, :1]).any(axis=1).sum()),
        mean_reward=float(rewards.mean()),
        timings={stage: round(sum(float(p["seconds"]) for p in found), 3) for stage, found in stages.items()},
        versions={name: v for name in _LIBRARIES if (v := library_version(name)) is not None},
    )
    result.save(directory)
    workspace.close()
    return result


def _to_requests(config: TransferConfig, model: LanguageModel, source: str | list[Any]) -> list[Request]:
    found = read_prompts(source, split=config.prompts_split, limit=config.max_prompts)[: config.max_prompts]
    if len(found) < 2:
        raise UserError(f"{len(found)} prompt was given; needed are at least 2, whose halves are compared")
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
    scorer: Scorer,
    workspace: Workspace,
) -> list[Arrays]:
    run = partial(sample, model, max_new_tokens=limit, temperature=1.0, seed=config.seed)

    def sample_batch(batch: list[int]) -> Arrays:
        responses = run_with_oom_retry([requests[i] for i in batch], lambda part: run(part), _MEMORY_ADVICE)
        scores, _ = scorer([requests[i].prompt for i in batch], [r.response for r in responses])
        rows = [{"response": asdict(r), "score": s} for r, s in zip(responses, scores, strict=True)]
        return {"json": np.array([json.dumps(row) for row in rows])}

    lengths = {i: len(request.prompt_ids) for i, request in enumerate(requests)}
    # A batch of equal prompts reads each of them once.
    size = max(config.batch_size, config.num_generations)
    return workspace.run_stage("sample", lengths, size, sample_batch, description="sampling responses")


def make_rollouts(responses: Sequence[Response], rewards: Floats) -> list[Rollout]:
    """Compute the advantages of sampled responses, and divide the prompts into groups.

    Args:
        responses: the responses, prompt by prompt.
        rewards: [prompts, responses to each].

    Returns:
        The responses whose advantage is not 0.

    Source: arXiv 2512.19673v3, eq. 3.
    """
    n = len(rewards)
    advantages = (rewards - rewards.mean(axis=1, keepdims=True)) / (
        rewards.std(axis=1, ddof=1, keepdims=True) + _ADVANTAGE_EPS
    )
    # Of prompts that have a gradient, so that each half has some.
    informative = (advantages != 0).any(axis=1)
    ranks, count = informative.cumsum() - 1, int(informative.sum())
    groups = ranks * min(count, _GROUPS) // max(count, 1)
    place = [(prompt, index) for prompt in range(n) for index in range(rewards.shape[1])]
    return [
        Rollout(response, int(groups[prompt]), float(advantages[prompt, index]))
        for response, (prompt, index) in zip(responses, place, strict=True)
        if advantages[prompt, index] != 0
    ]


Copy = list[list[Tensor | None]]
"""A gradient, by block and parameter; None where a parameter has none."""


class Gradients:
    """The parameters of a model in blocks, whose ``.grad`` is read: all outside the layers, each layer, LN_final."""

    def __init__(self, model: LanguageModel) -> None:
        layers = [list(layer.parameters()) for layer in model.layers]
        norm: Any = model.projection.final_norm
        last = list(norm.parameters()) if isinstance(norm, nn.Module) else []
        inside = {id(p) for block in (*layers, last) for p in block}
        outside = [p for p in model.model.parameters() if id(p) not in inside]
        self.blocks: list[list[nn.Parameter]] = [outside, *layers, last]

    def clear(self) -> None:
        """Delete the gradients."""
        for block in self.blocks:
            for parameter in block:
                parameter.grad = None

    def take(self) -> Copy:
        """Return the gradients, and leave none."""
        taken = [[p.grad for p in block] for block in self.blocks]
        self.clear()
        return taken

    def products(self, other: Copy | None = None) -> Floats:
        """Inner product with a copy, by default with themselves, block by block, [blocks] float64."""
        return _products([[p.grad for p in block] for block in self.blocks], other)

    def sketch(self) -> Floats:
        """A random projection of the gradients of each block, which keeps inner products in expectation.

        Returns:
            [blocks, k] float64.
        """
        sketches = np.zeros((len(self.blocks), _SKETCH))
        for number, (sketch, block) in enumerate(zip(sketches, self.blocks, strict=True)):
            generator = torch.Generator().manual_seed(number)
            for parameter in block:
                rows = -(-parameter.numel() // _SKETCH)
                signs = torch.randint(0, 2, (rows,), generator=generator).mul_(2).sub_(1)
                if parameter.grad is None:
                    continue
                flat = parameter.grad.detach().float().flatten()
                padded = nn.functional.pad(flat, (0, rows * _SKETCH - len(flat))).view(rows, _SKETCH)
                sketch += (signs.to(padded) @ padded).double().cpu().numpy()
        return sketches


def _products(own: Copy, other: Copy | None = None) -> Floats:
    pairs = zip(own, own if other is None else other, strict=True)
    return np.array([sum(_dot(a, b) for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs])


def _dot(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0
    # In rows, whose sums are added in float64: one sum over millions of products would lose digits.
    rows = (a.detach().float() * b.detach().float()).reshape(len(a), -1).sum(dim=1)
    return float(rows.double().sum())


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
    with _trainable(model):
        gradients = Gradients(model)

        def compare(batch: list[int]) -> Arrays:
            (layer,) = batch
            if not reference:
                # Computed again after an interruption, if a layer is left.
                for half in halves:
                    sketches = _backward(config, model, half, gradients)
                    reference.append(_Half(gradients.take(), sketches))
            first, second = reference
            shared = slice(0, layer + 1)
            with internal_forward(model.model, layer, family=model.family):
                one = _backward(config, model, halves[0], gradients)
                kept = gradients.take()
                two = _backward(config, model, halves[1], gradients)

            def product(a: Copy | None, b: Copy | None) -> float:
                # None is the gradient that the parameters have: that of this layer on the second half.
                found = gradients.products(b) if a is None else _products(a, b)
                return float(found[shared].sum())

            own = product(kept, kept) + product(None, None) + 2 * product(None, kept)
            theirs = sum(product(a, b) for a, b in ((first.gradient, first.gradient), (second.gradient,) * 2))
            between = product(first.gradient, second.gradient)
            with_first = product(kept, first.gradient), product(None, first.gradient)
            with_second = product(kept, second.gradient), product(None, second.gradient)
            cosine = _cosine(sum(with_first) + sum(with_second), own, theirs + 2 * between)
            lengths = [product(None, None), product(kept, kept)]
            squares = [product(each.gradient, each.gradient) for each in (first, second)]
            across = [_cosine(with_first[1], lengths[0], squares[0]), _cosine(with_second[0], lengths[1], squares[1])]
            stderr = bootstrap_error(
                np.concatenate([one, two])[:, shared],
                np.concatenate([first.sketches, second.sketches])[:, shared],
                config.seed,
            )
            gradients.clear()
            row = {"layer": layer, "cosine": cosine, "stderr": stderr}
            row |= {"low": max(-1.0, cosine - 1.96 * stderr), "high": min(1.0, cosine + 1.96 * stderr)}
            row |= {"across": float(np.mean(across)), "ceiling": _cosine(between, *squares)}
            return {name: np.array(value) for name, value in row.items()}

        return workspace.run_stage(
            "gradients", dict(zip(layers, layers, strict=True)), 1, compare, description="comparing gradients"
        )


def _backward(
    config: TransferConfig, model: LanguageModel, rollouts: Sequence[Rollout], gradients: Gradients
) -> Floats:
    """Leave the gradient of the sum over rollouts in ``.grad``, and return the sketch of each group's own part.

    Returns:
        [groups, blocks, k].
    """
    gradients.clear()
    sketches, before = [], np.zeros((len(gradients.blocks), _SKETCH))
    for group in sorted({r.group for r in rollouts}):
        own = sorted((r for r in rollouts if r.group == group), key=lambda r: len(r.response.input_ids))
        for start in range(0, len(own), config.batch_size):
            _objective(model, own[start : start + config.batch_size]).backward()  # type: ignore[no-untyped-call]
        # A sketch is linear, so the part of a group is what it added.
        after = gradients.sketch()
        sketches.append(after - before)
        before = after
    return np.array(sketches)


def _objective(model: LanguageModel, rollouts: Sequence[Rollout]) -> Tensor:
    """The sum of A_i / |o_i| sum_t log pi(o_it) over a batch, of the policy that the model computes now."""
    ids, mask = pad([r.response.input_ids for r in rollouts], "right")
    ids = ids.to(model.device)
    head = model.projection
    states = model.backbone(**model.forward_arguments(ids, mask)).last_hidden_state
    weights = torch.zeros(ids.shape, device=ids.device)
    for row, rollout in enumerate(rollouts):
        response = rollout.response
        # The states that predict the response.
        weights[row, response.prompt_length - 1 : len(response.input_ids) - 1] = rollout.advantage / response.n_tokens
    chosen = weights != 0
    targets = ids.roll(-1, dims=1)[chosen]
    network: Any = model.model
    live = network.get_output_embeddings()
    log_probs, _ = differentiable_log_probs(
        states[chosen].to(live.weight.device),
        targets.to(live.weight.device),
        live.weight,
        live.bias,
        scale=head.scale,
        softcap=head.softcap,
        memory_budget=head.memory_budget,
    )
    return (log_probs * weights[chosen].to(log_probs)).sum()


@contextmanager
def _trainable(model: LanguageModel) -> Iterator[None]:
    """Let every parameter take a gradient; afterwards all are as they were, without the gradients of this module."""
    with ExitStack() as stack:
        before = [(p, p.requires_grad, p.grad) for p in model.model.parameters()]

        def restore() -> None:
            for parameter, required, gradient in before:
                parameter.requires_grad_(required)
                parameter.grad = gradient

        stack.callback(restore)
        for parameter, _, _ in before:
            parameter.requires_grad_(True)
            parameter.grad = None
        yield


def _cosine(product: float, own: float, other: float) -> float:
    return float(product / np.sqrt(own * other)) if own > 0 and other > 0 else float("nan")


def bootstrap_error(own: Floats, other: Floats, seed: int = 0, resamples: int = _RESAMPLES) -> float:
    """Standard error of the cosine of two sums over groups of prompts, by drawing groups again.

    Args:
        own: [groups, ...] the terms of one sum.
        other: those of the other.
        seed: of the draws.
        resamples: number of draws.

    Returns:
        The standard deviation of the cosine over the draws; NaN for fewer than two groups.
    """
    n = len(own)
    if n < 2:
        return float("nan")
    a, b = own.reshape(n, -1), other.reshape(n, -1)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    product, first, second = (np.einsum("rg,gh,rh->r", draws, x @ y.T, draws) for x, y in ((a, b), (a, a), (b, b)))
    lengths = np.sqrt(np.maximum(first, 0) * np.maximum(second, 0))
    cosines = np.divide(product, lengths, out=np.full(resamples, np.nan), where=lengths > 0)
    # Each of n groups is drawn with a variance that is (n - 1) / n of that of n independent ones.
    return float(np.nanstd(cosines) * np.sqrt(n / (n - 1)))
