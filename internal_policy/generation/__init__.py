"""Sampling of responses from pi_theta or an internal policy: temperature, no truncation of the distribution.

Each response has its own stream of random numbers, seeded by (seed, prompt, sample). A resumed run samples the same
responses. So does a run with another batch size, as far as the rounding of the dtype leaves the logits equal: in
float32 practically always, in bfloat16 a near tie may go the other way. vLLM has its own random streams and rounding.
"""

from internal_policy.generation.internal import Agreement, InternalPolicy, compare_with_final, sample_internal
from internal_policy.generation.requests import (
    DEFAULT_NEW_TOKENS,
    Request,
    check_prompt_lengths,
    end_ids,
    response_limit,
)
from internal_policy.generation.sampling import RowSampler, sample
from internal_policy.generation.vllm import VllmSampler, effective_batch_size, refuse_generator

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Agreement",
    "InternalPolicy",
    "Request",
    "RowSampler",
    "VllmSampler",
    "check_prompt_lengths",
    "compare_with_final",
    "effective_batch_size",
    "end_ids",
    "refuse_generator",
    "response_limit",
    "sample",
    "sample_internal",
]
