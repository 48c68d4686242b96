"""The model of ``gpu_checks.py``: random weights at the shape of Qwen3-4B, made on the device itself."""

from __future__ import annotations

import random
from typing import Any

from internal_policy.data.responses import Response
from internal_policy.models import LanguageModel, wrap

SHAPE = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151_936,
}
QUICK_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 509,
}
PROMPT = 16
"""Ids before a random response."""


def build(dtype: str, device: str, quick: bool) -> LanguageModel:
    """Build a Qwen3 with random weights and a tied embedding.

    Args:
        dtype: a name of torch's.
        device: where it is made; nothing of it is made elsewhere.
        quick: whether it is tiny.

    Returns:
        The model, with a tokenizer whose words are ``w0``, ``w1`` and so on.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = QUICK_SHAPE if quick else SHAPE
    config = AutoConfig.for_model(
        "qwen3",
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model = model.to(device)
    return wrap(model, tokenizer(shape["vocab_size"]), f"random Qwen3, {shape['num_hidden_layers']} layers")


def tokenizer(vocab: int) -> Any:
    """A tokenizer of V words that are separated by spaces, the first two of which begin and end a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def responses(number: int, length: int, vocab: int) -> list[Response]:
    """Sequences of random ids, the first ``PROMPT`` of each of which are its prompt."""
    drawn = random.Random(0)
    prompt = min(PROMPT, length // 2)
    return [
        Response("random", "ids", [drawn.randrange(2, vocab) for _ in range(length)], prompt) for _ in range(number)
    ]
