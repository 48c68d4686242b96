r"""Gradients of the policy objective at the sampled responses: their sums, inner products and random projections.

A gradient is a sum over responses, accumulated in float32 whatever the dtype of the weights: a sum in bfloat16 would
lose what a single batch adds to it.

The random projection of a gradient has a few thousand numbers, and the inner product of two projections has that of the
gradients as its expectation. It is linear, so that the projection of one group of prompts is what the group adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internal_policy.data.responses import Response, pad
from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.extractors.hooks import first_tensor
from internal_policy.models import LanguageModel
from internal_policy.statistics import Floats
from internal_policy.utils.distributed import release_memory
from internal_policy.utils.errors import UserError, is_out_of_memory

SKETCH = 4093
"""Numbers in a projection: prime, so that the columns of a weight matrix do not fall together."""
_RESAMPLES = 1000

Copy = list[list[Tensor | None]]
"""A gradient, by block and parameter; None where a parameter has none."""


@dataclass(frozen=True)
class Rollout:
    """A sampled response with its advantage."""

    response: Response
    """The response."""
    group: int
    """The group of prompts that it belongs to, from 0."""
    advantage: float
    """A_i of eq. 3."""


class Gradients:
    """The gradient of a model's parameters, in blocks: all outside the layers, each layer, LN_final.

    Usage::

        with Gradients(model) as gradients:
            objective(model, rollouts).backward()
            kept = gradients.take()

    Inside the context every parameter takes a gradient, also one that is frozen, and no ``.grad`` is kept on it.
    Afterwards the parameters are as they were.
    """

    def __init__(self, model: LanguageModel) -> None:
        layers = [list(layer.parameters()) for layer in model.layers]
        norm: Any = model.projection.final_norm
        last = list(norm.parameters()) if isinstance(norm, nn.Module) else []
        inside = {id(p) for block in (*layers, last) for p in block}
        # A shared weight is one parameter, so that tied embeddings count once.
        outside = [p for p in model.model.parameters() if id(p) not in inside]
        self._blocks: list[list[nn.Parameter]] = [outside, *layers, last]
        self._sums: dict[int, Tensor] = {}
        self._before: list[tuple[nn.Parameter, bool, Tensor | None]] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> Gradients:
        parameters = [p for block in self._blocks for p in block]
        self._before = [(p, p.requires_grad, p.grad) for p in parameters]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
                parameter.grad = None
                hook = parameter.register_post_accumulate_grad_hook(self._add)  # type: ignore[no-untyped-call]
                self._hooks.append(hook)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._sums.clear()
        for parameter, required, gradient in self._before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        self._before.clear()

    def _add(self, parameter: Tensor) -> None:
        new = parameter.grad
        parameter.grad = None
        assert new is not None
        held = self._sums.get(id(parameter))
        if held is None:
            self._sums[id(parameter)] = new.to(torch.promote_types(new.dtype, torch.float32))
        else:
            held.add_(new)

    def clear(self) -> None:
        """Delete the gradient."""
        self._sums.clear()

    def take(self) -> Copy:
        """Return the gradient, and leave none."""
        taken = self.current()
        self.clear()
        return taken

    def current(self) -> Copy:
        """The gradient, which later passes add to."""
        return [[self._sums.get(id(p)) for p in block] for block in self._blocks]

    def sketch(self) -> Floats:
        """Project the gradient of each block at random; the inner products of projections are right in expectation.

        Returns:
            [blocks, k] float64.
        """
        return sketch(self.current())


def sketch(gradient: Copy) -> Floats:
    """Project the blocks of a gradient at random: rows of k numbers with random signs are added.

    Args:
        gradient: by block and parameter.

    Returns:
        [blocks, k] float64.
    """
    sketches = np.zeros((len(gradient), SKETCH))
    for number, (own, block) in enumerate(zip(sketches, gradient, strict=True)):
        for place, found in enumerate(block):
            if found is None:
                continue
            # By parameter, so that the projection does not depend on which parameters have a gradient.
            seed = int(np.random.SeedSequence((number, place)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(seed)
            flat = found.detach().flatten()
            rows, rest = divmod(len(flat), SKETCH)
            signs = torch.randint(0, 2, (rows + 1,), generator=generator).mul_(2).sub_(1).to(flat)
            whole, tail = flat[: rows * SKETCH].view(rows, SKETCH), flat[rows * SKETCH :]
            # Devices such as mps have no float64.
            own += (signs[:rows] @ whole).cpu().double().numpy()
            own[:rest] += (signs[rows] * tail).cpu().double().numpy()
    return sketches


def products(own: Copy, other: Copy) -> Floats:
    """Inner products of two gradients, block by block.

    Returns:
        [blocks] float64.
    """
    pairs = zip(own, other, strict=True)
    return np.array([sum(_dot(a, b) for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs])


def _dot(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None:
        return 0.0
    # By rows, whose sums are added in float64: one sum over millions of products would lose digits.
    shape = (len(a) if a.ndim else 1, -1)
    rows = torch.einsum("ij,ij->i", a.reshape(shape), b.reshape(shape))
    return float(rows.cpu().double().sum())


def backward(
    model: LanguageModel,
    rollouts: Sequence[Rollout],
    gradients: Gradients,
    *,
    batch_size: int,
    temperature: float = 1.0,
) -> Floats:
    """Leave the gradient of a sum over rollouts in ``gradients``.

    Args:
        model: the model, which may compute an internal policy (`internal_forward`).
        rollouts: the rollouts.
        gradients: of this model, entered.
        batch_size: sequences in a batch.
        temperature: divides the logits.

    Returns:
        [groups, blocks, k] the projection of the part of each group, ascending.

    Raises:
        UserError: out of memory.
    """
    gradients.clear()
    sketches: list[Floats] = []
    before: Floats | None = None
    for group in sorted({r.group for r in rollouts}):
        own = sorted((r for r in rollouts if r.group == group), key=lambda r: len(r.response.input_ids))
        for start in range(0, len(own), batch_size):
            _run(model, own[start : start + batch_size], temperature)
        after = gradients.sketch()
        sketches.append(after if before is None else after - before)
        before = after
    return np.array(sketches)


def _run(model: LanguageModel, batch: Sequence[Rollout], temperature: float) -> None:
    try:
        objective(model, batch, temperature=temperature).backward()  # type: ignore[no-untyped-call]
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Part of the batch's gradient may be there already, so it is not tried again in halves.
    release_memory()
    raise UserError(
        f"out of memory in the gradient of {len(batch)} responses; lower --batch-size or --max-new-tokens (four "
        "gradients in float32 are held besides the weights)"
    )


def objective(model: LanguageModel, rollouts: Sequence[Rollout], *, temperature: float = 1.0) -> Tensor:
    r"""The sum of A_i / |o_i| sum_t log pi(o_it | q_i, o_i<t) over a batch, of the policy that the model computes now.

    Args:
        model: the model.
        rollouts: responses with advantages other than 0.
        temperature: divides the logits.

    Returns:
        The sum, float32 (float64 if the model is).

    Source: arXiv 2512.19673v3, eqs. 3 and 9, at a ratio of 1.
    """
    ids, _ = pad([r.response.input_ids for r in rollouts], "right")
    weights = torch.zeros(ids.shape, dtype=torch.float64)
    for row, rollout in enumerate(rollouts):
        response = rollout.response
        # The states that predict the response.
        weights[row, response.prompt_length - 1 : len(response.input_ids) - 1] = rollout.advantage / response.n_tokens
    chosen = weights != 0
    targets = ids.roll(-1, dims=1)[chosen]
    # No token attends to the padding behind it. Padding itself attends to tokens: with nothing to attend to, as in a
    # sliding window, its gradient would be NaN.
    states = first_tensor(model.backbone(**model.forward_arguments(ids, torch.ones_like(ids))))
    network: Any = model.model
    # The parameter itself: the projection's matrix is detached.
    live = network.get_output_embeddings()
    head = model.projection
    log_probs, _ = differentiable_log_probs(
        states[chosen.to(states.device)].to(live.weight.device),
        targets.to(live.weight.device),
        live.weight,
        getattr(live, "bias", None),
        temperature=temperature,
        scale=head.scale,
        softcap=head.softcap,
        memory_budget=head.memory_budget,
    )
    return (log_probs * weights[chosen].to(log_probs.dtype).to(log_probs.device)).sum()


def cosine(product: float, own: float, other: float) -> float:
    """Cosine from an inner product and the squared lengths; NaN if one is 0."""
    return float(product / math.sqrt(own * other)) if own > 0 and other > 0 else float("nan")


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
    if np.isnan(cosines).all():
        return float("nan")
    # Each of n groups is drawn with a variance that is (n - 1) / n of that of n independent ones.
    return float(np.nanstd(cosines) * np.sqrt(n / (n - 1)))
