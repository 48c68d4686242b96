"""Work in progress on disk: finished portions of an interrupted run, found again by the same command.

``<output>/<slug>/work/`` holds ``run.json`` (what is being worked on) and a shard for each finished portion. Every file
is renamed into place when whole, so whatever is there can be used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internal_policy.errors import UserError
from internal_policy.files import write_atomically, write_text
from internal_policy.results import MANIFEST, RESULT_FILES

_RUN = "run.json"
Arrays = dict[str, NDArray[Any]]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> str:
    """Name the settings that differ.

    Args:
        old: what is on disk.
        new: what was asked for.
        before: what a setting that `old` lacks stands for, where it was written before there was that setting.

    Returns:
        ``max_new_tokens 32 -> 64, ...``; empty where nothing differs.
    """
    old = {**{k: v for k, v in (before or {}).items() if k in new}, **old}
    keys = sorted(old.keys() | new.keys())
    return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in keys if old.get(k) != new.get(k))


def in_use(directory: Path, what: str, differing: str) -> UserError:
    """Make the error for a directory that holds a finished result of other settings.

    Args:
        directory: the directory.
        what: ``an analysis``, ``a run``.
        differing: what `differences` found.

    Returns:
        The error, to be raised.
    """
    return UserError(
        f"{directory}: already holds {what} with other settings ({differing}); choose another --output directory, "
        "or add --overwrite to start over"
    )


class Workspace:
    """The portions of one run."""

    def __init__(
        self,
        directory: Path,
        *,
        manifest: str = MANIFEST,
        result_files: Sequence[str] = RESULT_FILES,
        what: str = "analysis",
    ) -> None:
        """Name the directory; nothing is made yet.

        Args:
            directory: of one result.
            manifest: the file that a whole result has, written last.
            result_files: all files of a result.
            what: what messages call the result.
        """
        self.directory = directory
        self.work = directory / "work"
        self.manifest = manifest
        self.result_files = result_files
        self.what = what

    def check(self) -> None:
        """Refuse a directory that is not ours or not writable, before anything long begins; make nothing yet.

        Raises:
            UserError: not writable, or in use for something else.
        """
        existing = next(p for p in (self.directory, *self.directory.absolute().parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            what = "is a directory that may not be written to" if existing.is_dir() else "is a file"
            raise UserError(
                f"{self.directory}: cannot be written ({existing} {what}); choose another --output directory"
            )
        manifest = (self.directory / self.manifest).is_file()
        others = [p for p in self._files() if not self._ours(p) and not (manifest and p.parent == self.directory)]
        if others:
            raise UserError(
                f"{self.directory}: is in use for something else (it holds {others[0].relative_to(self.directory)}); "
                "choose another --output directory"
            )

    def open(self, identity: dict[str, Any], overwrite: bool, before: Mapping[str, Any] | None = None) -> bool:
        """Begin a run, or take up the one that was interrupted.

        Args:
            identity: settings, weights and inputs that decide the numbers.
            overwrite: delete what an earlier run left there.
            before: as in `differences`.

        Returns:
            True where an interrupted run is taken up.

        Raises:
            UserError: not writable, or the interrupted run was of something else.
        """
        path = self.work / _RUN
        try:
            if overwrite:
                # The manifest goes first: a kill in between leaves nothing that reads as a result.
                (self.directory / self.manifest).unlink(missing_ok=True)
                self.close()
            self.work.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                write_text(path, json.dumps(identity, indent=2))
                return False
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror or error}); choose another --output directory"
            ) from error
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: is broken; add --overwrite to start over") from error
        differing = differences(old, json.loads(json.dumps(identity)), before)
        if differing:
            raise UserError(
                f"{self.directory}: holds an unfinished {self.what} with other settings ({differing}); repeat its "
                "command to go on, add --overwrite to start over, or choose another --output directory"
            )
        return True

    def shards(self, kind: str) -> Iterator[Arrays]:
        """Read the finished portions of a stage.

        Args:
            kind: the stage's name.

        Yields:
            The arrays of each portion.
        """
        for path in sorted(self.work.glob(f"{kind}-*.npz")):
            with np.load(path, allow_pickle=False) as arrays:
                yield dict(arrays)

    def write(self, kind: str, first: int, arrays: Arrays) -> None:
        """Write a finished portion.

        Args:
            kind: the stage's name.
            first: the index of its first item, which no other portion has.
            arrays: what to keep.
        """

        def save(temporary: Path) -> None:
            with temporary.open("wb") as handle:
                np.savez(handle, allow_pickle=False, **arrays)

        write_atomically(self.work / f"{kind}-{first:07d}.npz", save)

    def close(self) -> None:
        """Drop the portions, and what a killed run left unrenamed, once the result is whole; nothing else."""
        for path in self._files():
            if self._ours(path) and (path.parent == self.work or path.suffix == ".tmp"):
                path.unlink(missing_ok=True)
        if self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()

    def _files(self) -> list[Path]:
        return sorted(p for d in (self.directory, self.work) if d.is_dir() for p in d.iterdir() if p != self.work)

    def _ours(self, path: Path) -> bool:
        """Tell what a run writes before its manifest from what anybody else may have put there."""
        if path.name.startswith(".") and path.suffix == ".tmp":
            return True
        if path.parent == self.work:
            return path.name == _RUN or path.suffix == ".npz"
        return path.name in self.result_files
