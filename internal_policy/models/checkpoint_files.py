"""The weight files of a checkpoint, inspected before they are loaded.

Weights in pickle format can run code, and transformers reads whatever files an index of shards names, even if only
safetensors was requested. Files are therefore checked here by name; the targets of links say nothing, since the cache
of the hub keeps its files as links to ``../../blobs``.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from internal_policy.utils.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
_NARROW = ("I8", "U8", "I4", "U4", "F8", "F6", "F4")
_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors refuses longer headers."""


def weight_files(where: str, config: Any, revision: str | None, name: str) -> list[Path]:
    """Find the files from which transformers will read weights; an empty list if there are none.

    Raises:
        UserError: weights in pickle format, outside the checkpoint, or of adapters that would change the model.
    """
    if _file(where, _ADAPTER, revision) is not None:
        raise UserError(
            f"{name}: holds LoRA adapters next to the model ({_ADAPTER}), which would be added to its weights; merge "
            "them (peft: model.merge_and_unload().save_pretrained(...)), or remove them if they are merged already"
        )
    chosen = getattr(config, "transformers_weights", None)
    if chosen is not None:
        _refuse_unsafe([chosen], "config.json (transformers_weights)", name, index=True)
    elif Path(where).is_dir() and any(Path(where).glob("shard-*-model-*-of-*.safetensors")):
        raise UserError(
            f"{name}: the weights are in the shards of a distributed training; gather them in one model first "
            "(model.save_pretrained(directory))"
        )
    for wanted in [chosen] if chosen is not None else [WEIGHTS_FILE, INDEX_FILE]:
        found = _file(where, wanted, revision)
        if found is not None and wanted.endswith(".json"):
            return [path for shard in shards(found, name) if (path := _file(where, shard, revision)) is not None]
        if found is not None:
            return [found]
    return []


def shards(index: Path, name: str) -> list[str]:
    """Read the names of the files in an index, without duplicates, and refuse all but safetensors in its directory."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        found = list(dict.fromkeys(named))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name}: {index.name} is not an index of shards ({type(error).__name__}); download or save it again"
        ) from error
    _refuse_unsafe(found, index.name, name)
    return found


def _refuse_unsafe(files: list[Any], by: str, name: str, index: bool = False) -> None:
    for file in files:
        text = str(file)
        suffixes = (".safetensors", ".safetensors.index.json") if index else (".safetensors",)
        if not isinstance(file, str) or not text.endswith(suffixes):
            raise UserError(
                f"{name}: {by} names {text!r}; weights in another format may be pickles, which can run code, so only "
                "safetensors is read. Convert with model.save_pretrained(directory)"
            )
        if "\\" in text or PurePosixPath(text).is_absolute() or ".." in PurePosixPath(text).parts or ":" in text:
            raise UserError(
                f"{name}: {by} names {text!r}, which lies outside the model; give a checkpoint whose files are all in "
                "its own directory"
            )


def refuse_pickles(directory: Path) -> None:
    """Refuse a checkpoint of a training run from which weights in pickle format would be read."""
    for index in sorted(directory.rglob("*.safetensors.index.json")):
        shards(index, str(directory))
    for pattern in ("pytorch_model.bin*", "pytorch_model-*.bin", "adapter_model.bin"):
        if found := next(directory.rglob(pattern), None):
            raise UserError(
                f"{directory}: holds weights in pickle format ({found.name}), which can run code and are not read; "
                "remove this checkpoint, and the same command resumes from the one before"
            )


def refuse_unscaled(files: list[Path], name: str) -> None:
    """Refuse weights in integers or 8-bit floats that no quantiser will scale, and that are meaningless unscaled."""
    for file in files:
        for key, (dtype, shape) in header(file).items():
            weight = key.endswith("weight") or (len(shape) > 1 and dtype.startswith(_NARROW))
            if dtype not in _PLAIN and weight and not is_causal_mask(key, shape):
                raise UserError(
                    f"{name}: {key} is stored as {dtype} and config.json has no quantization_config that says how to "
                    "scale it; give the checkpoint with its own config.json, or one that is not quantised"
                )


def refuse_read_as_plain(files: list[Path], model: Any, name: str) -> None:
    """Refuse weights in integers or 8-bit floats that were read as plain numbers despite a quantiser in config.json."""
    loaded = dict(model.named_parameters())
    stored = {key: dtype for file in files for key, (dtype, _) in header(file).items()}
    for key, dtype in stored.items():
        kept = loaded.get(key)
        if dtype in _PLAIN or kept is None:
            continue
        plain = (
            type(kept) is torch.nn.Parameter and type(model.get_submodule(key.rpartition(".")[0])) is torch.nn.Linear
        )
        if not plain and not (kept.is_floating_point() and kept.element_size() > 1):
            continue
        # If scales are stored too, the quantiser may have dequantised the weights, as some do on a CPU.
        if not any(other.startswith(f"{key}_scale") or other == f"{key}.absmax" for other in stored):
            raise UserError(
                f"{name}: {key} is stored as {dtype}, and the quantization_config of config.json has it read as plain "
                "numbers; give the checkpoint with its own config.json, or one that is not quantised"
            )


def header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Read dtype and shape of each tensor of a safetensors file; empty for a damaged file, which loading reports."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _LONGEST_HEADER:
                return {}
            found = json.loads(stream.read(length))
        found.pop("__metadata__", None)
        return {key: (str(tensor["dtype"]), list(tensor["shape"])) for key, tensor in found.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def is_causal_mask(key: str, shape: list[int]) -> bool:
    """Recognise the causal masks [1, 1, T, T] of old checkpoints, which are called biases, and their fill value."""
    return (key.endswith(".bias") and len(shape) == 4 and shape[:2] == [1, 1] and shape[2] == shape[3]) or (
        key.endswith(".masked_bias") and len(shape) <= 1
    )


def _file(where: str, file: str, revision: str | None) -> Path | None:
    if Path(where).is_dir():
        path = Path(where) / file
        return path if path.is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        where,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        # Without a network the cache has every file that is loaded, but no record of files that do not exist.
        _raise_exceptions_for_connection_errors=file != _ADAPTER,
    )
    return None if found is None else Path(found)
