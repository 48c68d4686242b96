"""What all results have in common on disk: a directory each, a manifest that is written last, and how one is found.

The manifest holds the SHA-256 of every file of the result and one of itself, so that a result that was damaged or
edited after it was written is never read as if it were whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy.utils.errors import UserError
from internal_policy.utils.io import write_atomically, write_text
from internal_policy.utils.locks import locked
from internal_policy.utils.shell import refuse_unmatched

_NAMED = 4

# Before pandas 3.1 the default may miss a float's last digit; from then on it does not, and the choice is deprecated.
EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)
"""What pandas' ``read_csv`` needs to give every number back bit for bit."""


@dataclass(frozen=True)
class Kind:
    """A kind of result: an analysis, an evaluation, an inspection."""

    what: str
    """Its name."""
    plural: str
    """The name of several."""
    command: str
    """The command that makes one."""
    again: str
    """What to do with a broken one."""
    manifest: str
    """The file that is written last: a directory without it holds no finished result."""
    version: int
    """Of what is on disk."""
    files: tuple[str, ...]
    """The files of a result beside the manifest, as far as it has them."""
    depth: int = 1
    """So many directories below the one that is named there may be some."""

    def below(self, directory: Path) -> list[Path]:
        """List the results of a directory.

        Args:
            directory: of one result, or above several.

        Returns:
            The directory alone where it is one; else those below it, in the order of their paths.
        """
        if (directory / self.manifest).is_file():
            return [directory]
        levels = ("/".join(["*"] * depth) for depth in range(1, self.depth + 1))
        return sorted(path.parent for level in levels for path in directory.glob(f"{level}/{self.manifest}"))

    def find(self, directory: Path) -> Path:
        """Find the one result that is meant.

        Args:
            directory: of one result, or one that holds a single one.

        Returns:
            The result's directory.

        Raises:
            UserError: none is there, or several are.
        """
        refuse_unmatched(directory)
        inside = self.below(directory)
        if len(inside) == 1:
            return inside[0]
        if inside:
            names = ", ".join(str(path.relative_to(directory)) for path in inside[:_NAMED])
            more = f" and {len(inside) - _NAMED} more" if len(inside) > _NAMED else ""
            raise UserError(f"{directory}: holds {len(inside)} {self.plural} ({names}{more}); name one of them")
        raise UserError(
            f"{directory}: no finished {self.what} here (no {self.manifest}); run internal-policy {self.command} first"
        )

    @contextmanager
    def reading(self, source: Path) -> Iterator[dict[str, Any]]:
        """Read the manifest, and tell in one line what is broken in it, or in what is read meanwhile.

        Args:
            source: the result's directory.

        Yields:
            What the manifest holds.

        Raises:
            UserError: broken, or written by another version.
        """
        try:
            manifest = json.loads((source / self.manifest).read_text(encoding="utf-8"))
            if manifest["schema_version"] != self.version:
                raise UserError(
                    f"{source}: schema version {manifest['schema_version']}; this version reads {self.version}: "
                    f"{self.again} again, or use the version of internal-policy that wrote it"
                )
            if changed := changed_since(source, self.manifest, manifest):
                raise UserError(
                    f"{source}: {changed} is not what was written there (damaged, or edited); put it back, or "
                    f"{self.again} again"
                )
            yield manifest
        # What libraries raise on a table is theirs to choose; a result is read whole or not at all.
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{source}: broken {self.what} ({type(error).__name__}: {reason}); {self.again} again"
            ) from error

    @contextmanager
    def writing(self, directory: str | Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
        """Make a result's directory, and write the manifest when all else is written.

        Args:
            directory: made where it does not exist; files of the same names are replaced.
            manifest: what the manifest holds; JSON-able, without NaN.

        Yields:
            The directory. Until the manifest is written it holds no finished result.

        Raises:
            UserError: another process writes there.
        """
        target = Path(directory)
        with locked(target):
            target.mkdir(parents=True, exist_ok=True)
            (target / self.manifest).unlink(missing_ok=True)
            yield target
            self.write_manifest(target, manifest)

    def write_manifest(self, directory: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest, or another in its place, whole or not at all.

        Args:
            directory: of the result.
            manifest: what it holds; JSON-able, without NaN.
        """
        write_manifest(directory, self.manifest, manifest, self.files)


def write_manifest(directory: Path, name: str, manifest: Mapping[str, Any], files: Sequence[str]) -> None:
    """Write a manifest with the digests of the files that it stands for, and of itself.

    Args:
        directory: of the result.
        name: of the manifest.
        manifest: what it holds; JSON-able, without NaN.
        files: the result's other files, as far as it has them.
    """
    digests = {file: _digest(directory / file) for file in files if (directory / file).is_file()}
    whole = {**json.loads(json.dumps(manifest, allow_nan=False)), "sha256": digests}
    sealed = {**whole, "seal": _seal(whole)}
    write_text(directory / name, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")


def changed_since(directory: Path, name: str, manifest: Mapping[str, Any]) -> str | None:
    """Compare a result with the digests that were taken when it was written.

    Args:
        directory: of the result.
        name: of the manifest.
        manifest: what it holds now.

    Returns:
        The first file that is another one now; None where all are the same.

    Raises:
        OSError: a file is gone.
        KeyError: the manifest has no digests.
    """
    whole = dict(manifest)
    if whole.pop("seal") != _seal(whole):
        return name
    return next((file for file, digest in whole["sha256"].items() if _digest(directory / file) != digest), None)


def _digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _seal(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# A spreadsheet runs what begins so; a sign alone and a number are harmless.
_FORMULA = re.compile(r"'*[=+\-@\t\r](?s:.)+")
_NUMBER = re.compile(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def to_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Put an apostrophe before texts that a spreadsheet would run as formulas.

    Args:
        table: the table; names, prompts and tokens in it may be anybody's.

    Returns:
        What is written as CSV.
    """
    return _each_text(table, lambda text: f"'{text}" if _is_formula(text) else text)


def from_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Take the apostrophes away again.

    Args:
        table: what was read of a CSV file.

    Returns:
        What ``to_cells`` was given.
    """
    return _each_text(table, lambda text: text[1:] if text.startswith("'") and _is_formula(text[1:]) else text)


def _is_formula(text: str) -> bool:
    return bool(_FORMULA.fullmatch(text)) and not _NUMBER.fullmatch(text)


def _each_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    texts = [name for name, kind in columns_of(table).items() if kind == "text"]
    changed = {name: [change(v) if isinstance(v, str) else v for v in table[name]] for name in texts}
    return table.assign(**{name: pd.Series(v, table.index, table[name].dtype) for name, v in changed.items()})


def write_parquet(path: Path, table: pd.DataFrame) -> None:
    """Write a table as parquet, whole or not at all, with a checksum in every page.

    Args:
        path: the file.
        table: its rows.
    """
    write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False, write_page_checksum=True))


def read_parquet(path: Path) -> pd.DataFrame:
    """Read a table that ``write_parquet`` wrote.

    Args:
        path: the file.

    Returns:
        Its rows.
    """
    return pd.read_parquet(path, page_checksum_verification=True)


def columns_of(table: pd.DataFrame) -> dict[str, str]:
    """Tell the kinds of a table's columns, which CSV does not keep.

    Args:
        table: the table.

    Returns:
        For each column ``text``, or the name of its dtype.
    """
    kinds = {str(name): str(dtype) for name, dtype in table.dtypes.items()}
    return {name: "text" if kind in ("object", "str") else kind for name, kind in kinds.items()}


def read_columns(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """Read a CSV table whose kinds of columns are known: a name such as NA or 007 stays a text.

    Args:
        path: the file.
        columns: of ``columns_of``.

    Returns:
        Its rows; what is empty is not defined.
    """
    kinds: dict[Any, Any] = {name: str if kind == "text" else kind for name, kind in columns.items()}
    table: pd.DataFrame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=[""], **EXACT)
    return from_cells(table)


def write_rows(path: Path, table: pd.DataFrame) -> None:
    """Write a table as JSON lines, whole or not at all.

    Args:
        path: the file.
        table: its rows; a cell may hold a list.
    """
    lines = (json.dumps(row, ensure_ascii=False) for row in table.to_dict("records"))
    write_text(path, "".join(line + "\n" for line in lines))


def read_rows(path: Path) -> pd.DataFrame:
    """Read what ``write_rows`` wrote.

    Args:
        path: the file.

    Returns:
        Its rows.
    """
    # Not splitlines: a text may hold any other line ending, unescaped.
    lines = path.read_text(encoding="utf-8").split("\n")
    return pd.DataFrame([json.loads(line) for line in lines if line])
