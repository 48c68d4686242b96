"""How long a sequence may be, what memory its length takes, and where it changes what the model computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def limit(config: Any) -> int | None:
    """The longest sequence that a model is configured for.

    Args:
        config: its transformers configuration.

    Returns:
        ``max_position_embeddings``; with YaRN, whose checkpoints often leave that at the length before stretching, the
        original length times the factor, where that is more. None where the configuration names no length.
    """
    length = getattr(config, "max_position_embeddings", None)
    if not length:
        return None
    return max(int(length), *(_stretched(rope, int(length)) for rope in _ropes(config)), 0)


def cache_bytes(config: Any) -> int | None:
    """What a position of one sequence takes of the memory while a response is sampled.

    Args:
        config: the transformers configuration.

    Returns:
        Bytes of the keys and values of all layers in 16 bits, as if no window let go of any. None where the
        configuration does not name the sizes.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kept = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
    return 2 * 2 * int(text.num_hidden_layers) * int(kept) * int(width) if kept and width else None


def switch(config: Any) -> int | None:
    """The length beyond which LongRoPE takes its long factors, for the whole batch.

    transformers chooses by the longest sequence of a batch, so that a short one beside a long one is not computed as
    it is alone. Who batches keeps sequences on either side of this length apart (`groups`).

    Args:
        config: the transformers configuration.

    Returns:
        The length, or None where a batch's lengths change nothing.
    """
    found = [rope for rope in _ropes(config) if _kind(rope) == "longrope"]
    lengths = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in found
    ]
    return min((int(length) for length in lengths if length), default=None)


def groups(lengths: list[int], boundary: int | None) -> list[list[int]]:
    """Split a batch into sequences that may run together.

    Args:
        lengths: tokens of each sequence.
        boundary: what `switch` said of the model.

    Returns:
        Indices into ``lengths``, in order; one group where nothing keeps the sequences apart.
    """
    if boundary is None:
        return [list(range(len(lengths)))]
    short = [i for i, length in enumerate(lengths) if length <= boundary]
    long = [i for i, length in enumerate(lengths) if length > boundary]
    return [group for group in (short, long) if group]


def _ropes(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary positions: one for all layers, or one a type of layer."""
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping):
        nested = [value for value in rope.values() if isinstance(value, Mapping)]
        yield from nested if "rope_type" not in rope and nested else [rope]


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type"))


def _stretched(rope: Mapping[str, Any], length: int) -> int:
    if _kind(rope) != "yarn":
        return 0
    return int(float(rope.get("factor") or 1.0) * int(rope.get("original_max_position_embeddings") or length))
