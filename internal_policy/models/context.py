"""The maximum length of a sequence, the memory that its length takes, and where it changes what a model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def max_length(config: Any) -> int | None:
    """Find the longest sequence that a model is configured for; None if its configuration names no length.

    That is ``max_position_embeddings``, or with YaRN, whose checkpoints often leave that at the original length, the
    original length times the factor if that is more.
    """
    length = int(getattr(config, "max_position_embeddings", None) or 0)
    if not length:
        return None
    yarn = [rope for rope in _ropes(config) if _kind(rope) == "yarn"]
    originals = [int(rope.get("original_max_position_embeddings") or length) for rope in yarn]
    factors = [float(rope.get("factor") or 1.0) for rope in yarn]
    return max([length, *(int(factor * original) for factor, original in zip(factors, originals, strict=True))])


def cache_bytes(config: Any) -> int | None:
    """Compute the bytes that one position takes in the cache of keys and values of all layers, in 16 bits.

    Sliding windows are ignored. None if the configuration does not name the sizes.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
    return 2 * 2 * int(text.num_hidden_layers) * int(kept) * int(width) if kept and width else None


def length_switch(config: Any) -> int | None:
    """Find the length beyond which LongRoPE uses its long factors for the whole batch; None for other models.

    transformers chooses by the longest sequence of a batch, so that a long sequence changes the results of a short one.
    Code that forms batches keeps sequences on either side of this length apart (``group_by_length``).
    """
    found = [rope for rope in _ropes(config) if _kind(rope) == "longrope"]
    lengths = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in found
    ]
    return min((int(length) for length in lengths if length), default=None)


def group_by_length(lengths: list[int], boundary: int | None) -> list[list[int]]:
    """Split a batch into groups of sequences that may run together; the groups hold indices into ``lengths``."""
    if boundary is None:
        return [list(range(len(lengths)))]
    short = [i for i, length in enumerate(lengths) if length <= boundary]
    long = [i for i, length in enumerate(lengths) if length > boundary]
    return [group for group in (short, long) if group]


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary positions: one for all layers, or one per type of layer."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping):
        nested = [value for value in rope.values() if isinstance(value, Mapping)]
        yield from nested if "rope_type" not in rope and nested else [rope]


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))
