"""Inputs of the contenders of ``benchmark_analysis.py``: models and responses, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from internal_policy import analyze
from internal_policy.models import LanguageModel, load, wrap

MODEL = "testbed/qwen3"
"""The embedded model."""
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
}
SMALL = {
    "hidden_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1152,
    "vocab_size": 32_768,
}
PROMPT = 16
"""Ids before a random response."""

_EMBEDDING_STD, _FIRST_WRITES = 0.045, 8.0


@dataclass(frozen=True)
class Job:
    """The inputs of all contenders."""

    shape: dict[str, int]
    """Configuration fields of a Qwen3 with random weights; empty for testbed/qwen3."""
    responses: list[dict[str, Any]]
    """Fields of each ``Response``."""
    device: str = "cpu"
    """A torch device."""


def build(shape: Mapping[str, int], device: str = "cpu") -> LanguageModel:
    """Build testbed/qwen3, or a Qwen3 of a job's shape whose random weights are the same each time, in float32.

    Writes of a layer are small, and their sum grows until a few tokens take the policy. The first layer writes more
    than the others, as in trained models (in testbed/qwen3 some five times): else the token that was read would win or
    lose by chance against the whole vocabulary, since its embedding is tied, and entropies would jump between tokens.
    """
    embedded = load("testbed/qwen3", dtype="float32", device=device)
    if not shape:
        return embedded
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"tie_word_embeddings": True, "max_position_embeddings": 4096, "initializer_range": 0.02, **shape}
    config = AutoConfig.for_model("qwen3", **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding *= _EMBEDDING_STD / embedding.std()
        first = model.model.layers[0]
        first.self_attn.o_proj.weight.mul_(_FIRST_WRITES)
        first.mlp.down_proj.weight.mul_(_FIRST_WRITES)
    # No text is read or written, so any tokenizer will do.
    return wrap(model.to(device).eval(), embedded.tokenizer, "random")


def random_response(tokens: int, vocab: int, seed: int = 0) -> dict[str, Any]:
    """Fields of a ``Response`` of random ids: ``PROMPT`` for the prompt, then ``tokens`` for the response."""
    ids = np.random.default_rng(seed).integers(2, vocab, PROMPT + tokens).tolist()
    return {"prompt": "random", "response": "ids", "input_ids": ids, "prompt_length": PROMPT}


def own_responses(number: int) -> list[dict[str, Any]]:
    """Fields of ``Response`` objects that the embedded model sampled for its own tasks."""
    sequences = analyze(MODEL, max_responses=number, keep_tokens=0).sequences
    rows = sequences[["input_ids", "prompt_length"]].to_dict("records")
    texts = {"prompt": "sampled", "response": "ids"}
    return [{**texts, "input_ids": [int(i) for i in r["input_ids"]], "prompt_length": r["prompt_length"]} for r in rows]
