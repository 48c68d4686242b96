"""Sampling of responses from the final policy pi_theta: temperature, no truncation of the distribution.

Each response has its own stream of random numbers, seeded by (seed, prompt, sample). An interrupted run that goes on
samples the same responses; so does one with another batch size, as far as the dtype's rounding leaves the logits equal:
in float32 practically always, in bfloat16 a near tie may now and then go the other way. vLLM has streams and rounding
of its own.
"""

from internal_policy.generation.requests import (
    DEFAULT_NEW_TOKENS,
    Request,
    check_prompt_lengths,
    end_ids,
    response_limit,
)
from internal_policy.generation.sampling import RowSampler, sample
from internal_policy.generation.vllm import VllmSampler, refuse_generator, together

__all__ = [
    "DEFAULT_NEW_TOKENS",
    "Request",
    "RowSampler",
    "VllmSampler",
    "check_prompt_lengths",
    "end_ids",
    "refuse_generator",
    "response_limit",
    "sample",
    "together",
]
