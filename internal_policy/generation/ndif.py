"""Sample responses on NDIF, where the weights are: token ids travel there and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from internal_policy.data.responses import Response
from internal_policy.extractors.nnsight import NnsightExtractor
from internal_policy.extractors.nnsight_trace import choose_token
from internal_policy.generation import Request, sample
from internal_policy.utils.errors import UserError

# A checkpoint's own settings fill in what is left open here, and would change the policy.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
}
_WITHOUT_NEUTRAL = (
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id"),
    *("forced_eos_token_id", "exponential_decay_length_penalty"),
)


def remote_sample(
    extractor: NnsightExtractor, requests: Sequence[Request], *, max_new_tokens: int, temperature: float, seed: int
) -> list[Response]:
    """Sample one response a request, in one batch and one job.

    Args:
        extractor: the model on NDIF.
        requests: what to sample.
        max_new_tokens: at most so many response tokens; fewer where the context ends first.
        temperature: divides the logits; 0 takes the most probable token.
        seed: seed of the whole run.

    Returns:
        The responses; those that ``generation.sample`` gives on cpu, as far as rounding leaves the logits equal.

    Raises:
        UserError: what NDIF or the network refused; a checkpoint that forbids or forces tokens.
    """
    own: Any = extractor.model.model.generation_config
    if forced := [name for name in _WITHOUT_NEUTRAL if getattr(own, name, None) is not None]:
        raise UserError(
            f"{extractor.model.name}: its generation config sets {forced[0]}, which NDIF would apply and which is no "
            "part of the policy; give --responses sampled elsewhere"
        )
    model = replace(extractor.model, model=cast(nn.Module, _Generating(extractor)))
    return sample(model, requests, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)


class _Generating:
    """What ``generation.sample`` asks of a model; the model generates through nnsight."""

    def __init__(self, extractor: NnsightExtractor) -> None:
        self._extractor = extractor
        self._model: Any = extractor.model.model
        self.generation_config = self._model.generation_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(
        self, input_ids: Tensor, *, attention_mask: Tensor, generation_config: Any, logits_processor: Sequence[Any]
    ) -> Tensor:
        """Generate; the sampler chooses each token beside the model.

        Args:
            input_ids: [B, T], padded on the left.
            attention_mask: [B, T].
            generation_config: how long, and what ends a response.
            logits_processor: the sampler, or none for the most probable token.

        Returns:
            [B, T + new] ids.
        """
        own = self._model.generation_config
        generation_config.update(**{k: v for k, v in _NEUTRAL.items() if getattr(own, k, None) not in (None, v)})
        sampler = next(iter(logits_processor), None)
        extractor, choose, row = self._extractor, choose_token, self._extractor.row()
        save = extractor.nnsight.save
        generated: Tensor = torch.empty(0)
        with warnings.catch_warnings(), extractor.ready() as (root, where, _, _):
            # Nothing says beforehand how many steps there are; nnsight warns when an open loop has had them all.
            warnings.filterwarnings("ignore", message=".*was never reached")
            with root.generate(generation_config=generation_config, **where) as tracer:
                with tracer.invoke(input_ids=input_ids, attention_mask=attention_mask):
                    for _ in tracer.iter[:]:
                        choose(root, row, sampler)
                with tracer.invoke():
                    generated = save(tracer.result)
        return generated.to(input_ids.device)
