"""Tables of a result as files: CSV, parquet and JSON lines, without loss of any value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.utils.io import write_atomically, write_text

# Before pandas 3.1 the default may miss a float's last digit; from then on it does not, and the choice is deprecated.
EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)
"""What pandas' ``read_csv`` needs to give every number back bit for bit."""

# A spreadsheet runs texts that begin like this; a sign alone and a number are harmless.
_FORMULA = re.compile(r"'*[=+\-@\t\r](?s:.)+")
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def to_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before texts that a spreadsheet would run as formulas: names and prompts may hold anything."""
    return _each_text(table, lambda text: f"'{text}" if _is_formula(text) else text)


def from_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Remove the apostrophes of `to_cells` from a table that was read."""
    return _each_text(table, lambda text: text[1:] if text.startswith("'") and _is_formula(text[1:]) else text)


def _is_formula(text: str) -> bool:
    return bool(_FORMULA.fullmatch(text)) and not _NUMBER.fullmatch(text)


def _each_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    texts = [name for name, kind in columns_of(table).items() if kind == "text"]
    changed = {name: [change(v) if isinstance(v, str) else v for v in table[name]] for name in texts}
    return table.assign(**{name: pd.Series(v, table.index, table[name].dtype) for name, v in changed.items()})


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, atomically, with a checksum in every page."""
    write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False, write_page_checksum=True))


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a table that `write_parquet` wrote."""
    return pd.read_parquet(path, page_checksum_verification=True)


def columns_of(table: pd.DataFrame) -> dict[str, str]:
    """The type of each column, which CSV does not keep: ``text``, or the name of its dtype."""
    kinds = {str(name): str(dtype) for name, dtype in table.dtypes.items()}
    return {name: "text" if kind in ("object", "str") else kind for name, kind in kinds.items()}


def read_columns(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a CSV table by the types of `columns_of`: NA or 007 stays a text, and an empty cell is not defined."""
    kinds: dict[Any, Any] = {name: str if kind == "text" else kind for name, kind in columns.items()}
    table: pd.DataFrame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=[""], **EXACT)
    return from_cells(table)


def write_rows(path: Path, table: pd.DataFrame) -> None:
    """Write a table as JSON lines, atomically; a cell may hold a list."""
    lines = (json.dumps(row, ensure_ascii=False) for row in table.to_dict("records"))
    write_text(path, "".join(line + "\n" for line in lines))


def read_rows(path: Path) -> pd.DataFrame:
    """Read a table that `write_rows` wrote."""
    # Not splitlines: a text may hold any other line ending, unescaped.
    lines = path.read_text(encoding="utf-8").split("\n")
    return pd.DataFrame([json.loads(line) for line in lines if line])
