"""Training dynamics on fixed responses: the internal policy pi^l, the layers after it, and pi_theta.

    dynamics = Dynamics(model, responses, layer=6)
    history = [{"step": 0, **dynamics.measure().row()}]
    ...                                     # some steps of training, then again
    history.append({"step": 2, **dynamics.measure().row()})
    reason = alignment_end(history)         # None, or why internal policy alignment should end here

The responses stay the same, so only the model changes from one measurement to the next.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from internal_policy.bupo.config import AUTO, POLICY_LENSES, PolicyLens, TrainConfig
from internal_policy.data.prompts import Prompt, render_all
from internal_policy.data.responses import Response, check_responses, pad, prompt_indices
from internal_policy.entropy import policy_divergence, token_log_probs
from internal_policy.extractors import LayerStates, residual_hooks
from internal_policy.extractors.truncated import check_layer
from internal_policy.generation import Request, sample
from internal_policy.models import LanguageModel, context, eval_mode, projection_of
from internal_policy.models.options import SITES, Site
from internal_policy.statistics import clustered_mean
from internal_policy.utils.distributed import Processes, run_with_oom_retry
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import read_lines_sealed, set_aside, write_lines_sealed
from internal_policy.utils.logging import status
from internal_policy.utils.options import require_one_of

logger = logging.getLogger(__name__)

FIXED_RESPONSES = "dynamics_responses.jsonl"
"""File with the responses on which the dynamics are measured."""
_MEASUREMENTS = 10
"""Default number of measurements in a run."""
_CHUNK_SIZE = 2048
"""Number of positions whose states are normed and compared at a time."""


@dataclass(frozen=True)
class Measurement:
    """The state of a model in training: means over all tokens of the fixed responses, in nats except the cosines."""

    layer: int
    """l, counted from 1."""
    change: float
    """dH_Layer^l = H(H^l) - H(H^{l-1}), of the whole layer for every site; arXiv 2512.19673v3, eq. 11."""
    entropy: float
    """H(pi^l)."""
    policy_entropy: float
    """H(pi_theta)."""
    log_perplexity: float
    """Mean of -log pi_theta(token) over the response tokens."""
    log_perplexity_stderr: float
    """Its standard error, clustered by prompt; NaN with one prompt."""
    perplexity: float
    """exp(log_perplexity); arXiv 2512.19673v3, fig. 5c."""
    kl_mean: float
    """Mean of the divergences in ``layers``; ``policy_kl`` if l is the last layer."""
    policy_kl: float
    """KL(pi^l || pi_theta)."""
    layers: pd.DataFrame
    """A row for each later layer m = l+1..L: layer, cosine of pi^l's state with H^m, kl = KL(pi^l || pi^m)."""

    def row(self) -> dict[str, float]:
        """Return all fields except the table of later layers."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}


class Dynamics:
    """Measures a model in training repeatedly on the same responses.

    A measurement changes neither the modes of the modules nor gradients nor random generators. It reads the current
    weights, even if the optimiser has replaced the tensors.
    """

    def __init__(
        self,
        model: LanguageModel,
        responses: Sequence[Response],
        layer: int,
        *,
        site: Site = "layer",
        lens: PolicyLens = "policy",
        batch_size: int = 16,
        side: Literal["left", "right"] = "right",
    ) -> None:
        """Check what is measured: positions P-1 .. T-2 of each response, as everywhere.

        Args:
            model: the model in training.
            responses: the fixed responses.
            layer: l, counted from 1.
            site: ``layer`` for pi^l = softmax(H^l E_u^T); ``attn``, ``ffn`` for the policy of A^l, F^l.
            lens: ``logit-lens`` applies the final norm to every internal state before it is projected. Cosines are
                those of the states themselves.
            batch_size: sequences per forward pass; it does not change the result.
            side: side of the padding; it does not change the result.
        """
        check_layer(layer, model.n_layers)
        if site not in SITES:
            raise UserError(f"site is {site!r}; use one of {', '.join(SITES)}")
        require_one_of("lens", lens, POLICY_LENSES)
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; needed is at least 1")
        if not responses:
            raise UserError("there are no responses to measure the training on; needed is at least one")
        check_responses(responses, model.vocab_size, model.max_length)
        empty = next((i for i, r in enumerate(responses, start=1) if r.n_tokens < 1), None)
        if empty is not None:
            raise UserError(f"response {empty} has no response tokens; drop it")
        self.model, self.layer, self.site, self.lens, self.side = model, layer, site, lens, side
        # Batches of similar lengths need the least padding.
        self._responses = sorted(responses, key=lambda r: len(r.input_ids))
        self._prompts = prompt_indices(self._responses)
        self._batch_size = batch_size

    def measure(self) -> Measurement:
        """Compute means over all response tokens; NaN or inf in a state is an error (the training has diverged).

        Source: arXiv 2512.19673v3, eqs. 5-7 and 11; fig. 5 for cosine, perplexity and divergence.
        """
        model = with_current_projection(self.model)
        sums: defaultdict[tuple[str, int], float] = defaultdict(float)
        losses: list[float] = []
        with eval_mode(model.model), torch.no_grad():
            for batch in self._batches(context.length_switch(model.config)):
                for (name, layer), values in self._run(model, batch).items():
                    sums[name, layer] += float(values.sum())
                    if not np.isfinite(sums[name, layer]):
                        raise UserError(
                            f"{model.name}: NaN or inf at layer {layer} ({name}); the training has diverged: use a "
                            "lower learning rate or fewer steps of alignment"
                        )
                    if name == "loss":
                        losses += [float(part.mean()) for part in torch.split(values, [r.n_tokens for r in batch])]
        counts = [r.n_tokens for r in self._responses]
        means = {key: total / sum(counts) for key, total in sums.items()}
        _, stderr = clustered_mean(np.array(losses)[:, None], counts, self._prompts)
        own, last = self.layer, model.n_layers
        later = [{"layer": m, **{q: means[q, m] for q in ("cosine", "kl")}} for m in range(own + 1, last + 1)]
        table = pd.DataFrame(later, columns=["layer", "cosine", "kl"]).astype(
            {"layer": int, "cosine": float, "kl": float}
        )
        with np.errstate(over="ignore"):
            perplexity = float(np.exp(means["loss", last]))
        return Measurement(
            layer=own,
            change=means["after", own] - means["before", own],
            entropy=means["entropy", own],
            policy_entropy=means["policy_entropy", last],
            log_perplexity=means["loss", last],
            log_perplexity_stderr=float(stderr[0]),
            perplexity=perplexity,
            kl_mean=float(table["kl"].mean()) if later else means["policy_kl", last],
            policy_kl=means["policy_kl", last],
            layers=table,
        )

    def _batches(self, switch: int | None) -> Iterator[list[Response]]:
        """Batch the responses in order of length; a batch never has lengths on both sides of LongRoPE's switch."""
        for start in range(0, len(self._responses), self._batch_size):
            batch = self._responses[start : start + self._batch_size]
            for group in context.group_by_length([len(r.input_ids) for r in batch], switch):
                yield [batch[i] for i in group]

    def _run(self, model: LanguageModel, responses: Sequence[Response]) -> dict[tuple[str, int], Tensor]:
        """Measure one batch: values by name and layer, [n] each on the CPU. Only the states of layer l are kept."""
        ids, mask = pad([r.input_ids for r in responses], self.side)
        width = ids.shape[1]
        starts = [width - len(r.input_ids) if self.side == "left" else 0 for r in responses]
        spans = [torch.arange(r.prompt_length - 1, len(r.input_ids) - 1) for r in responses]
        positions = torch.cat([span + row * width + starts[row] for row, span in enumerate(spans)])
        head = model.projection
        device = head.weight.device
        targets = ids.flatten()[positions + 1].to(device)
        options: dict[str, Any] = {name: getattr(head, name) for name in ("scale", "softcap", "memory_budget")}
        values: dict[tuple[str, int], Tensor] = {}
        held: list[Tensor] = []

        def divergence(own: Tensor, other: Tensor) -> Tensor:
            return policy_divergence(head.apply_lens(self.lens, own), other, head.weight, head.bias, **options)

        def keep(name: str, layer: int, parts: Iterable[Tensor]) -> None:
            values[name, layer] = torch.cat(list(parts)).cpu().double()

        def consume(states: LayerStates) -> None:
            layer, out = states.layer, states.residual_out.to(device)
            if layer == self.layer:
                own = {"layer": out, "attn": states.attention_write, "ffn": states.ffn_write}[self.site].to(device)
                held.append(own)
                for name, x in (("before", states.residual_in.to(device)), ("after", out), ("entropy", own)):
                    keep(name, layer, (head.entropy(head.apply_lens(self.lens, part)) for part in _chunks(x)))
            pairs = [pair for x in held for pair in zip(_chunks(x), _chunks(out), strict=True)]
            if layer > self.layer:
                keep("cosine", layer, (cosine_similarity(a.float(), b.float(), dim=-1) for a, b in pairs))
                keep("kl", layer, (divergence(a, head.apply_lens(self.lens, b)) for a, b in pairs))
            if layer == model.n_layers:
                normed = [head.apply_final_norm(b) for _, b in pairs]
                keep("policy_entropy", layer, map(head.entropy, normed))
                keep("policy_kl", layer, (divergence(a, b) for (a, _), b in zip(pairs, normed, strict=True)))
                tokens = zip(normed, _chunks(targets), strict=True)
                keep("loss", layer, (-token_log_probs(b, t, head.weight, head.bias, **options) for b, t in tokens))

        with torch.no_grad(), residual_hooks(model, positions, consume):
            model.backbone(**model.forward_arguments(ids, mask))
        return values


def eval_interval(config: TrainConfig, layer: int | None) -> int:
    """Return the number of steps between two measurements of the dynamics; 0 if nothing is measured."""
    if layer is None:
        return 0
    if config.dynamics_every is not None:
        return config.dynamics_every
    return 1 if config.ipa_steps == AUTO else -(-int(config.max_steps or 0) // _MEASUREMENTS)


def fixed_responses(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    max_new_tokens: int,
    directory: Path,
    state: Processes,
) -> list[Response]:
    """Sample the responses on which the dynamics are measured from the initial policy, or read those of the run."""
    path = directory / FIXED_RESPONSES
    found: list[Response] = []
    if state.is_main_process:
        lines = read_lines_sealed(path) if path.is_file() else None
        if lines is not None:
            found = [Response(**json.loads(line)) for line in lines]
        else:
            if path.is_file():
                logger.warning("%s: damaged; kept as %s, and made again", path, set_aside(path).name)
            rendered = render_all(prompts[: config.dynamics_responses], config.template or "chat", model.tokenizer)
            requests = [Request(p, ids, i, 0) for i, (p, ids) in enumerate(zip(prompts, rendered, strict=False))]
            with status("sampling the responses on which the dynamics are measured"), eval_mode(model.model):
                found = run_with_oom_retry(
                    requests,
                    lambda part: sample(model, part, max_new_tokens=max_new_tokens, temperature=1.0, seed=config.seed),
                    "lower max_completion_length",
                )
            found = [response for response in found if response.n_tokens > 0]
            write_lines_sealed(path, [json.dumps(asdict(r), ensure_ascii=False) for r in found])
    shared: list[Response] = state.broadcast(found)
    return shared


def alignment_end(
    history: Sequence[Mapping[str, Any]],
    *,
    kl_margin: float = 0.05,
    perplexity_tolerance: float = 0.05,
) -> str | None:
    """Decide from the measurements so far whether internal policy alignment should end (``ipa_steps="auto"``).

    Too much alignment harms the model: the divergence between pi^l and the later layers falls and then rises, while the
    perplexity of pi_theta degrades (arXiv 2512.19673v3, fig. 5). Either sign ends it:

    - ``kl_mean`` has turned up: the last two measurements both exceed the lowest before them by more than
      ``kl_margin`` of it (and by at least 0.001 nats, in case it is about 0). A single one may be noise: at layer 6 of
      testbed/qwen3 it varies by 4 to 5% between steps. A divergence that rises from the start also ends the alignment.
    - ``log_perplexity`` exceeds the first measurement's by more than ``perplexity_tolerance``. On responses that the
      model sampled before training, this rise estimates KL(pi_before || pi_theta) per token, whatever the initial
      entropy; therefore the bound is absolute. Its standard error is irrelevant: both values are measured on the same
      tokens, so the variation between tokens cancels.

    Args:
        history: rows in order of training, the first from before it, with the keys step, kl_mean and log_perplexity of
            ``Measurement.row``.
        kl_margin: relative rise of the divergence that counts.
        perplexity_tolerance: largest rise of the log-perplexity that is allowed, in nats per token.

    Returns:
        The reason in a sentence, or None to continue.
    """
    if len(history) < 2:
        return None
    first, last = history[0], history[-1]
    # Negated so that NaN ends the alignment too.
    if not last["log_perplexity"] <= first["log_perplexity"] + perplexity_tolerance:
        rise = last["log_perplexity"] - first["log_perplexity"]
        return (
            f"log-perplexity on the fixed responses rose by {rise:.3f} nats per token to {last['log_perplexity']:.3f} "
            f"at step {last['step']:.0f}; {perplexity_tolerance:g} is allowed"
        )
    if len(history) < 3:
        return None
    lowest = min(history[:-2], key=lambda row: row["kl_mean"])
    bound = lowest["kl_mean"] + max(kl_margin * lowest["kl_mean"], 1e-3)
    if all(row["kl_mean"] > bound for row in history[-2:]):
        return (
            f"KL to later layers turned up at step {history[-2]['step']:.0f}: {last['kl_mean']:.3g} at step "
            f"{last['step']:.0f} after a minimum of {lowest['kl_mean']:.3g} at step {lowest['step']:.0f}"
        )
    return None


def with_current_projection(model: LanguageModel) -> LanguageModel:
    """Take the current E_u and LN_final from the model."""
    fresh = projection_of(model.model, model.family)
    return replace(model, projection=replace(fresh, memory_budget=model.projection.memory_budget))


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x, _CHUNK_SIZE)
