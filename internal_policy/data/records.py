"""Read records (dicts) from parquet, jsonl, json or the Hugging Face hub, with one-line errors for bad input."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internal_policy.utils.errors import UserError, as_user_error
from internal_policy.utils.logging import quiet_libraries

SUFFIXES = (".parquet", ".jsonl", ".json")

_MOST_BYTES, _MOST_ROWS = 16 * 2**30, 10_000_000
"""Limits on an unpacked file: a few kilobytes of parquet may expand to terabytes."""


def read_file(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Read the first ``limit`` records of a parquet, jsonl (one object per line) or json file (a list of objects).

    Raises:
        UserError: the file is missing, empty, not UTF-8, broken at line N, or of another format.
    """
    require_file(path)
    if path.suffix == ".parquet":
        records = _read_parquet(path, limit)
    elif path.suffix == ".jsonl":
        records = _read_jsonl(path)
    elif path.suffix == ".json":
        records = _read_json(path)
    else:
        raise UserError(
            f"{path}: format {path.suffix or 'without suffix'!r} is unknown; needed is {', '.join(SUFFIXES)}"
        )
    if not records:
        raise UserError(f"{path}: is empty; needed is at least one record")
    return records[:limit]


def require_file(path: Path) -> None:
    """Refuse a path without a file."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give a {', '.join(SUFFIXES)} file or a hub data set id")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a {', '.join(SUFFIXES)} file or a hub data set id")


def read_hub(name: str, split: str | None = None, usual: str = "test") -> list[dict[str, Any]]:
    """Read a split of a data set of the hub; by default the ``usual`` one if there is one, else the first.

    Raises:
        UserError: unknown data set or split, or no network.
    """
    import datasets

    advice = f"check the name, the split and the network, or give a local {', '.join(SUFFIXES)} file"
    with quiet_libraries(), as_user_error(name, "this data set", advice=advice):
        if split is None:
            splits = datasets.get_dataset_split_names(name)
            split = usual if usual in splits else splits[0]
        dataset = datasets.load_dataset(name, split=split)
        records = [dict(record) for record in dataset]
    if not records:
        raise UserError(f"{name}: split {split!r} is empty; choose another with --prompts-split")
    return records


def _read_parquet(path: Path, limit: int | None) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    records: list[dict[str, Any]] = []
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            size = sum(group.total_byte_size for group in groups)
            rows = file.metadata.num_rows
            if limit is None and (size > _MOST_BYTES or rows > _MOST_ROWS):
                raise UserError(
                    f"{path}: unpacks to {size} bytes and {rows} rows; needed are at most {_MOST_BYTES} and "
                    f"{_MOST_ROWS}: split the file"
                )
            for batch in file.iter_batches(batch_size=1024 if limit is None else min(limit, 1024)):
                records += batch.to_pylist()
                if limit is not None and len(records) >= limit:
                    break
    # Texts that are not UTF-8 and times outside the calendar only fail when they are converted to Python objects.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{path}: not a readable parquet file ({reason}); save it again") from error
    return records


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: not UTF-8 at line {line} (byte {error.start}); save the file as UTF-8") from error


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
    # Only "\n" ends a line: str.splitlines also splits at U+2028, which JSON strings may contain.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        record = _parse(line, path, number, "; needed is one object a line")
        records.append(as_object(record, f"{path}: line {number}"))
    return records


def _read_json(path: Path) -> list[dict[str, Any]]:
    text = _text(path)
    if not text.strip():
        return []
    value = _parse(text, path)
    if not isinstance(value, list):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}; needed is a list of objects")
    return [as_object(record, f"{path}: item {number}") for number, record in enumerate(value, start=1)]


def _parse(text: str, path: Path, line: int | None = None, needed: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON at line {line or error.lineno}: {error.msg}{needed}") from error
    except (ValueError, RecursionError) as error:
        # Python parses neither numbers of thousands of digits nor thousands of nested lists.
        where = "" if line is None else f" at line {line}"
        what = "lists or objects nested too deep" if isinstance(error, RecursionError) else "a number that is too long"
        raise UserError(f"{path}: JSON that cannot be read{where} ({what}); remove it") from error


def as_object(value: Any, where: str) -> dict[str, Any]:
    """Check that a value is a record, and return it as a dict; ``where`` names its position in the message."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} holds a {type(value).__name__}; needed is a JSON object")
    return dict(value)
