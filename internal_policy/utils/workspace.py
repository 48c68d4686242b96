"""An unfinished result on disk: the portions of an interrupted run, which the same command finds and resumes.

``<output>/<slug>/work/`` contains ``run.json`` (the settings of the run and the digests of its inputs) and a shard for
each finished portion. Every file is renamed into place when it is complete. The name of a shard ends in a digest of its
content and of ``run.json``: a shard that was damaged, or is of another run, is set aside and made again. Finished
results are in ``result_format``.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from internal_policy.utils.distributed import Processes
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import is_temporary, require_writable, set_aside, write_atomically, write_text
from internal_policy.utils.locks import LOCK
from internal_policy.utils.logging import progress
from internal_policy.utils.result_format import ResultFormat, describe_differences

logger = logging.getLogger(__name__)

_RUN_FILE = "run.json"
_SHARD = re.compile(r"((?!damaged-).+-\d{7})-([0-9a-f]{16})\.npz")
_DAMAGED = re.compile(r"damaged-\d+-.*")
Arrays = dict[str, NDArray[Any]]


class Workspace:
    """The portions of one run.

    Args:
        directory: of the result; nothing is made before `open`.
        result: the format of the result.
    """

    def __init__(self, directory: Path, result: ResultFormat) -> None:
        self.directory = directory
        self.work = directory / "work"
        self._result = result

    def check(self) -> None:
        """Raise a `UserError` if the directory contains something else or is not writable, before a long run begins."""
        require_writable(self.directory)
        manifest = self._result.is_in(self.directory)
        others = [
            p for p in self._files() if not self._is_run_file(p) and not (manifest and p.parent == self.directory)
        ]
        if others:
            raise UserError(
                f"{self.directory}: is in use for something else (it holds {others[0].relative_to(self.directory)}); "
                "choose another --output directory"
            )

    def open(self, identity: Mapping[str, Any], overwrite: bool) -> bool:
        """Begin a run, or resume the one that was interrupted, setting aside its damaged portions.

        Args:
            identity: all settings that determine the numbers, and digests of weights and inputs.
            overwrite: delete what an earlier run left there.

        Returns:
            True if an interrupted run is resumed.

        Raises:
            UserError: not writable, or the interrupted run had another identity.
        """
        path = self.work / _RUN_FILE
        try:
            if overwrite:
                # The manifest goes first: a kill in between leaves nothing that reads as a result.
                (self.directory / self._result.manifest).unlink(missing_ok=True)
                self.close()
            self.work.mkdir(parents=True, exist_ok=True)
            old = self._read_identity()
            if old is None:
                write_text(path, json.dumps(identity, indent=2))
                # Shards of this run are used even if run.json was lost.
                return self._check_shards()
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror or error}); choose another --output directory"
            ) from error
        if differing := describe_differences(old, identity):
            raise UserError(
                f"{self.directory}: holds an unfinished {self._result.name} with other settings ({differing}); repeat "
                "its command to resume it, add --overwrite to start over, or choose another --output directory"
            )
        self._check_shards()
        return True

    def shards(self, kind: str) -> Iterator[Arrays]:
        """Read the arrays of each finished portion of a stage."""
        for path in sorted(self.work.glob(f"{kind}-*.npz")):
            if path.name.startswith("damaged-"):
                # It was set aside earlier.
                continue
            data = path.read_bytes()
            name = _SHARD.fullmatch(path.name)
            if name is None or name[2] != self._seal(name[1], data):
                # Another process may have set it aside first.
                with suppress(FileNotFoundError):
                    aside = set_aside(path)
                    logger.warning("%s: damaged, or of another run; kept as %s, and made again", path, aside.name)
                continue
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                yield dict(arrays)

    def write(self, kind: str, first: int, arrays: Arrays) -> None:
        """Write a finished portion; `first` is the index of its first item, which no other portion has."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        data, stem = buffer.getvalue(), f"{kind}-{first:07d}"
        path = self.work / f"{stem}-{self._seal(stem, data)}.npz"
        write_atomically(path, lambda temporary: temporary.write_bytes(data))

    def run_stage(
        self,
        stage: str,
        lengths: Mapping[int, int],
        batch_size: int,
        compute: Callable[[list[int]], Arrays],
        *,
        description: str,
        processes: Processes | None = None,
    ) -> list[Arrays]:
        """Compute the portions of a stage that are missing, batch by batch, and return all of them.

        Items are divided into batches of similar length, the longest first so that too little memory shows at once. The
        division among processes does not depend on what is done, because a process that starts later finds more of it.

        Args:
            stage: its name.
            lengths: number of ids of each item, by the item's index.
            batch_size: items in a batch.
            compute: returns the arrays of the items with these indices.
            description: what the progress bar says.
            processes: the processes that share the work; by default this is the only one.

        Returns:
            The arrays of each portion, with its ``index`` and the ``seconds`` that it took.

        Raises:
            UserError: the processes do not share the directory.
        """
        state = processes or Processes()
        order = sorted(lengths, key=lambda i: (-lengths[i], i))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        batches = batches[state.rank :: state.number]
        mine = {i for batch in batches for i in batch}
        done = {int(i) for shard in self.shards(stage) for i in shard["index"]}
        with progress(description, len(mine), len(done & mine)) as advance:
            for batch in batches:
                if not (missing := [i for i in batch if i not in done]):
                    continue
                started = time.perf_counter()
                arrays = compute(missing)
                seconds = np.array(time.perf_counter() - started)
                self.write(stage, missing[0], {"index": np.array(missing), "seconds": seconds, **arrays})
                advance(len(missing))
        state.wait_for_everyone()
        portions = list(self.shards(stage))
        if (found := sum(len(shard["index"]) for shard in portions)) < len(lengths):
            raise UserError(
                f"{self.directory}: {found} of {len(lengths)} responses are there after all processes have finished; "
                "needed is an --output directory that all of them share"
            )
        return portions

    @property
    def begun(self) -> bool:
        """Whether an unfinished run is there."""
        return self.work.is_dir() and any(p.name == _RUN_FILE or _SHARD.fullmatch(p.name) for p in self.work.iterdir())

    def interrupted(self, name: str) -> bool:
        """Whether an unfinished run is there in whose identity a setting of this name has a value."""
        try:
            found = json.loads((self.work / _RUN_FILE).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(found, dict) and found.get(name) is not None

    def close(self) -> None:
        """Delete the portions and unrenamed files of a killed run once the result is complete; nothing else."""
        # run.json goes last: a kill in between leaves no shards without it.
        for path in sorted(self._files(), key=lambda path: path.name == _RUN_FILE):
            if is_temporary(path) or (
                path.parent == self.work and (path.name == _RUN_FILE or _SHARD.fullmatch(path.name))
            ):
                path.unlink(missing_ok=True)
        self.__dict__.pop("_key", None)
        if self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()

    def _read_identity(self) -> dict[str, Any] | None:
        """The content of run.json; None if it is missing or damaged."""
        path = self.work / _RUN_FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if isinstance(found, dict):
            return found
        logger.warning("%s: damaged; kept as %s, and made again", path, set_aside(path).name)
        return None

    def _check_shards(self) -> bool:
        """Set damaged shards aside, before other processes read them, and return whether any are left."""
        return sum(1 for _ in self.shards("*")) > 0

    @cached_property
    def _key(self) -> bytes:
        return json.dumps(json.loads((self.work / _RUN_FILE).read_bytes()), sort_keys=True).encode()

    def _seal(self, stem: str, data: bytes) -> str:
        digest = hashlib.sha256(self._key)
        digest.update(stem.encode())
        digest.update(data)
        return digest.hexdigest()[:16]

    def _files(self) -> list[Path]:
        inside = (p for d in (self.directory, self.work) if d.is_dir() for p in d.iterdir())
        return sorted(p for p in inside if p not in (self.work, self.directory / LOCK))

    def _is_run_file(self, path: Path) -> bool:
        """Whether a file is one that a run writes before its manifest."""
        if is_temporary(path):
            return True
        if path.parent == self.work:
            return path.name == _RUN_FILE or any(known.fullmatch(path.name) for known in (_SHARD, _DAMAGED))
        return path.name in (self._result.manifest, *self._result.files, *self._result.drawn)
