"""Sample responses from an internal policy pi^l, and compare what it chose with pi_theta.

Usage::

    policy = InternalPolicy(layer=6)
    responses = sample_internal(model, requests, policy, max_new_tokens=512, temperature=1.0, seed=0)
    agreements = compare_with_final(model, responses, policy)

Sampling is that of ``generation.sample``, with its seeds, padding, batches, end tokens and cache of keys and values;
layers above l do not run. The comparison is one pass of the whole model over the finished responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internal_policy.data.responses import Response, pad
from internal_policy.entropy import token_log_probs
from internal_policy.extractors.base import LayerStates
from internal_policy.extractors.hooks import residual_hooks
from internal_policy.extractors.truncated import check_layer, internal_forward
from internal_policy.generation.requests import Request
from internal_policy.generation.sampling import sample
from internal_policy.models import LanguageModel, Projection, exclusive_use, without_autocast
from internal_policy.models.context import group_by_length
from internal_policy.models.options import Lens, Site


@dataclass(frozen=True)
class InternalPolicy:
    """Which policy of a model is meant: that of a layer, at a site, through a lens."""

    layer: int
    """l, counted from 1."""
    site: Site = "layer"
    """``layer`` for H^l, ``attn`` or ``ffn`` for what that module of the layer writes."""
    lens: Lens = "policy"
    """What a state goes through before the unembedding: a name, or a lens from ``open_lens``."""


@dataclass(frozen=True)
class Agreement:
    """What an internal policy and pi_theta say about one response; means over its tokens, at temperature 1."""

    agreement: float
    """Share of the tokens at which both policies have the same most probable token, after the same prefix."""
    kl: float
    """Mean of KL(pi^l || pi_theta), nats."""
    log_prob: float
    """Mean log-probability of the response's tokens under the internal policy, nats."""
    policy_log_prob: float
    """Mean log-probability of the response's tokens under pi_theta, nats."""


def sample_internal(
    model: LanguageModel,
    requests: Sequence[Request],
    policy: InternalPolicy,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[Response]:
    """Sample one response per request from an internal policy, in one batch; see ``generation.sample``.

    Only layers 1..l run; with site ``attn`` this includes the FFN of layer l, which nothing reads. The policy of layer
    L under the logit lens is pi_theta, and gives its samples, token for token.

    Args:
        model: the model; it is restored on any exit.
        requests: the requests.
        policy: the policy that is sampled from.
        max_new_tokens: limit on the tokens of a response; the context may end earlier.
        temperature: divides the logits; 0 takes the most probable token.
        seed: seed of the whole run.

    Returns:
        The responses, each with its end-of-sequence token if one was sampled.

    Raises:
        UserError: the model has no such layer.

    Source: arXiv 2512.19673v3, eqs. 5 and 6.
    """
    options: dict[str, Any] = {"site": policy.site, "lens": policy.lens, "family": model.family}
    with (
        exclusive_use(model.model),
        internal_forward(model.model, policy.layer, projection=model.projection, **options),
    ):
        return sample(model, requests, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


def compare_with_final(
    model: LanguageModel, responses: Sequence[Response], policy: InternalPolicy, *, batch_size: int = 16
) -> list[Agreement]:
    """Compare an internal policy with pi_theta on the tokens of responses, in one pass of the whole model.

    Args:
        model: the model.
        responses: responses with at least one token each, sampled from either policy.
        policy: the internal policy.
        batch_size: sequences per forward pass; it does not change the result.

    Returns:
        The comparison for each response, in order.

    Raises:
        UserError: the model has no such layer.
    """
    check_layer(policy.layer, model.n_layers)
    found: dict[int, Agreement] = {}
    # Batches of similar lengths need the least padding.
    order = sorted(range(len(responses)), key=lambda i: len(responses[i].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        for group in group_by_length([len(responses[i].input_ids) for i in batch], model.length_switch):
            chosen = [batch[i] for i in group]
            found |= zip(chosen, _compare_batch(model, [responses[i] for i in chosen], policy), strict=True)
    return [found[i] for i in range(len(responses))]


@without_autocast()
@torch.no_grad()
def _compare_batch(model: LanguageModel, responses: Sequence[Response], policy: InternalPolicy) -> list[Agreement]:
    ids, mask = pad([r.input_ids for r in responses], "right")
    spans = [torch.arange(r.prompt_length - 1, len(r.input_ids) - 1) for r in responses]
    positions = torch.cat([span + row * ids.shape[1] for row, span in enumerate(spans)])
    targets = ids.flatten()[positions + 1]
    projection = model.projection
    held: list[Tensor] = []
    columns: list[Tensor] = []

    def consume(states: LayerStates) -> None:
        if states.layer == policy.layer:
            own = {"layer": states.residual_out, "attn": states.attention_write, "ffn": states.ffn_write}[policy.site]
            held.append(projection.apply_lens(policy.lens, own, policy.layer))
        if states.layer == model.n_layers:
            columns.extend(_compare(held.pop(), projection.apply_final_norm(states.residual_out), targets, projection))

    with residual_hooks(model, positions, consume):
        model.backbone(**model.forward_arguments(ids, mask))
    per_token = torch.stack(columns, dim=1).cpu().double()
    parts = torch.split(per_token, [len(span) for span in spans])
    return [Agreement(*part.mean(dim=0).tolist()) for part in parts]


def _compare(own: Tensor, final: Tensor, targets: Tensor, projection: Projection) -> list[Tensor]:
    """The fields of ``Agreement`` at each token, [n] each."""
    device = projection.weight.device
    both, targets = [own.to(device), final.to(device)], targets.to(device)
    head = {name: getattr(projection, name) for name in ("bias", "scale", "softcap", "memory_budget")}
    log_probs = [token_log_probs(states, targets, projection.weight, **head) for states in both]
    divergences, top = projection.divergences(both)
    return [(top[:, 0] == top[:, 1]).to(divergences.dtype), divergences[:, 0, 1], *log_probs]
