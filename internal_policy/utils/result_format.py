"""A finished result on disk: a directory with a manifest that is written last, and how a result is recognised.

The manifest contains the SHA-256 of every file of the result and of itself, so that a result that was damaged or edited
after it was written is never read as if it were intact. A command that would make the same result again recognises it

1. by its settings and by the digests of weights and inputs, which are in the manifest (`check_settings`); and
2. without loading a model, by one digest of the files from which it was made (`source_digest`, `is_up_to_date`).

Unfinished results are in ``workspace``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from internal_policy.utils.errors import UserError
from internal_policy.utils.io import sha256_of, write_text
from internal_policy.utils.locks import locked
from internal_policy.utils.shell import refuse_unmatched

_MAX_NAMED = 4
_PACKAGE = Path(__file__).parents[1]
_ACCELERATORS = ("nvidia*", "nvhost*", "nvmap", "kfd", "dxg")
"""Devices of Linux through which torch finds a GPU."""
_SKIPPED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
"""Pickles: large optimiser states in the directory of a checkpoint."""


@dataclass(frozen=True)
class ResultFormat:
    """How one kind of result is stored: an analysis, an evaluation, a comparison."""

    name: str
    """What one result is called."""
    plural: str
    """What several are called."""
    command: str
    """The command that makes one."""
    redo: str
    """The verb for making a broken one again."""
    manifest: str
    """The file that is written last: a directory without it contains no finished result."""
    version: int
    """The version of the format."""
    files: tuple[str, ...]
    """The other files of a result; some may be absent."""
    drawn: tuple[str, ...] = ()
    """Files that are drawn from a result, which is complete without them."""
    depth: int = 1
    """How many levels below a directory its results may be."""

    def is_in(self, directory: Path) -> bool:
        """Whether a directory contains a finished result: the manifest is there."""
        return (directory / self.manifest).is_file()

    def below(self, directory: Path) -> list[Path]:
        """The directory itself if it is one result; otherwise the results below it, in the order of their paths."""
        if self.is_in(directory):
            return [directory]
        levels = ("/".join(["*"] * depth) for depth in range(1, self.depth + 1))
        return sorted(path.parent for level in levels for path in directory.glob(f"{level}/{self.manifest}"))

    def find(self, directory: Path) -> Path:
        """Find the one result that is meant: in a directory of one result, or one that contains a single one.

        Raises:
            UserError: there is none, or there are several.
        """
        refuse_unmatched(directory)
        inside = self.below(directory)
        if len(inside) == 1:
            return inside[0]
        if inside:
            names = ", ".join(str(path.relative_to(directory)) for path in inside[:_MAX_NAMED])
            more = f" and {len(inside) - _MAX_NAMED} more" if len(inside) > _MAX_NAMED else ""
            raise UserError(f"{directory}: holds {len(inside)} {self.plural} ({names}{more}); name one of them")
        raise UserError(
            f"{directory}: no finished {self.name} here (no {self.manifest}); run internal-policy {self.command} first"
        )

    def free_name(self, root: Path, name: str, fields: Mapping[str, Any]) -> str:
        """Choose the name of a directory below `root` that holds no other result.

        Args:
            root: the parent directory.
            name: the preferred name.
            fields: fields of the manifest by which the same result is recognised.

        Returns:
            The name if it is free or holds the same result, which is then replaced; else the name with the first number
            from 2 for which this is true.
        """
        mine = json.loads(json.dumps(fields))
        for number in itertools.count(1):
            numbered = name if number == 1 else f"{name}-{number}"
            try:
                manifest = json.loads((root / numbered / self.manifest).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                break
            if all(manifest.get(key) == value for key, value in mine.items()):
                break
        return numbered

    @contextmanager
    def reading(self, source: Path) -> Iterator[dict[str, Any]]:
        """Yield the manifest of a result, and report in one line what is broken in it or in files read meanwhile.

        Raises:
            UserError: broken, or written by another version.
        """
        try:
            manifest = json.loads((source / self.manifest).read_text(encoding="utf-8"))
            if manifest["schema_version"] != self.version:
                raise UserError(
                    f"{source}: schema version {manifest['schema_version']}; this version reads {self.version}: "
                    f"{self.redo} again, or use the version of internal-policy that wrote it"
                )
            if changed := self.changed_file(source, manifest):
                raise UserError(
                    f"{source}: {changed} is not what was written there (damaged, or edited); put it back, or "
                    f"{self.redo} again"
                )
            yield manifest
        except UserError:
            raise
        # Libraries raise many kinds of exceptions on a broken table.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{source}: broken {self.name} ({type(error).__name__}: {reason}); {self.redo} again"
            ) from error

    @contextmanager
    def writing(self, directory: str | Path, manifest: Mapping[str, Any]) -> Iterator[Path]:
        """Make a result's directory, and write the manifest when all else is written.

        Args:
            directory: made if it does not exist; files of the same names are replaced.
            manifest: its content; JSON-able, without NaN.

        Yields:
            The directory. Until the manifest is written it contains no finished result.

        Raises:
            UserError: another process writes there.
        """
        target = Path(directory)
        with locked(target):
            target.mkdir(parents=True, exist_ok=True)
            (target / self.manifest).unlink(missing_ok=True)
            yield target
            self.write_manifest(target, manifest)

    def write_manifest(self, directory: Path, manifest: Mapping[str, Any], without: Collection[str] = ()) -> None:
        """Write the manifest with the digests of the other files and of itself, or replace it, atomically.

        `manifest` is JSON-able, without NaN. Files in `without` get no digest: they are about to be replaced.
        """
        present = (file for file in self.files if file not in without and (directory / file).is_file())
        digests = {file: sha256_of(directory / file) for file in present}
        complete = {**json.loads(json.dumps(manifest, allow_nan=False)), "sha256": digests}
        sealed = {**complete, "seal": _seal(complete)}
        write_text(directory / self.manifest, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")

    def changed_file(self, directory: Path, manifest: Mapping[str, Any]) -> str | None:
        """The first file that differs from the digests taken when the result was written; None if all are the same.

        Raises:
            OSError: a file is gone.
            KeyError: the manifest has no digests.
        """
        fields = dict(manifest)
        if fields.pop("seal") != _seal(fields):
            return self.manifest
        changed = (name for name, digest in fields["sha256"].items() if sha256_of(directory / name) != digest)
        return next(changed, None)

    def check_settings(self, directory: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Refuse a finished result with other settings than the wanted ones; further settings in `stored` may differ.

        Raises:
            UserError: one differs; the message names all that do.
        """
        if differing := describe_differences({k: v for k, v in stored.items() if k in wanted}, wanted):
            article = "an" if self.name[0] in "aeiou" else "a"
            raise UserError(
                f"{directory}: already holds {article} {self.name} with other settings ({differing}); choose another "
                "--output directory, or add --overwrite to start over"
            )


def describe_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the settings that differ: ``max_new_tokens 32 -> 64, ...``; empty if none does."""
    wanted = json.loads(json.dumps(wanted))
    keys = sorted(stored.keys() | wanted.keys())
    return ", ".join(f"{k} {stored.get(k)} -> {wanted.get(k)}" for k in keys if stored.get(k) != wanted.get(k))


def is_up_to_date(
    config: Mapping[str, Any], versions: Mapping[str, str], current_digest: Callable[[], str | None]
) -> bool:
    """Whether a finished result was made from the present files, by the present versions of the libraries.

    `config` and `versions` are those of the result. `current_digest` returns the present `source_digest`; it is called
    last, because it reads the files.
    """
    if config.get("files") is None or config.get("hooked"):
        return False
    return all(library_version(name) == known for name, known in versions.items()) and (
        config["files"] == current_digest()
    )


def source_digest(model: Path, inputs: Sequence[Path], device: str = "auto") -> str | None:
    """Digest the files from which a result is made: a model's, its inputs, and the code of this package.

    Reading them takes milliseconds for the embedded models and needs neither torch nor transformers. The digest is None
    if a file is missing, or if the result also depends on a GPU or on another library: the model is then loaded and
    compared by its weights.
    """
    if not _is_cpu(device) or not model.is_dir() or (model / "adapter_config.json").exists():
        return None
    folders = (model, model / "additional_chat_templates")
    files = [p for f in folders if f.is_dir() for p in sorted(f.iterdir()) if p.suffix not in _SKIPPED_SUFFIXES]
    files = [p for p in files if p.is_file()]
    digest = hashlib.sha256()
    try:
        # A pipe is not read here, because its content can be read only once.
        if not all(path.is_file() for path in inputs):
            return None
        # Quantised weights are read by a library whose version is in no result.
        if b"quantization_config" in (model / "config.json").read_bytes():
            return None
        for path in [*files, *inputs, *sorted(_PACKAGE.rglob("*.py"))]:
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def library_version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_cpu(device: str) -> bool:
    if device != "auto":
        return device == "cpu"
    return sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def _seal(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
