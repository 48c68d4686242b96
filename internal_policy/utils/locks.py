"""One writer at a time for a directory: a lock that the system releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.utils.errors import UserError
from internal_policy.utils.io import remove_stale

if TYPE_CHECKING:
    from internal_policy.utils.distributed import Processes

logger = logging.getLogger(__name__)

LOCK = ".internal-policy.lock"
"""The file that is locked while a process writes to its directory, and removed afterwards."""

# The directories that this thread has locked already: a sweep locks those of its analyses.
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
_kept_locks: ContextVar[ExitStack | None] = ContextVar("keeper", default=None)
_handles: set[int] = set()

_NOT_WRITABLE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


@contextmanager
def locked(*directories: Path, wait: bool = False, state: Processes | None = None) -> Iterator[None]:
    """Keep other processes from writing to directories, which are made if they do not exist and removed if still empty.

    Args:
        *directories: the directories.
        wait: if another process writes to one of them, wait until it has ended.
        state: the processes of this run, of which the main one holds the locks; by default there is only this one.

    Raises:
        UserError: another process writes to one of them, or it cannot be written to.
    """
    with ExitStack() as own:
        stack = _kept_locks.get() or own

        def take() -> None:
            # In one order everywhere, so that no two processes wait for each other.
            for place, directory in sorted({path.resolve(): path for path in directories}.items()):
                stack.enter_context(_lock(place, directory, wait))

        if state is None:
            take()
        else:
            state.on_main(take)
        yield
        if state is not None:
            # The others may still be reading what was written.
            state.wait_for_everyone()


@contextmanager
def keep_locks() -> Iterator[None]:
    """Hold every lock that is taken inside until the end: a command draws figures after its result is written."""
    with ExitStack() as stack:
        token = _kept_locks.set(stack)
        try:
            yield
        finally:
            _kept_locks.reset(token)


@contextmanager
def writing(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Make and lock a directory for results or figures; a `UserError` if it, or a file in it, cannot be written."""
    with locked(directory, wait=wait):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise UserError(
                f"{directory}: cannot be written ({error.strerror or error}); choose another --output"
            ) from error


@contextmanager
def _lock(place: Path, directory: Path, wait: bool) -> Iterator[None]:
    if place in _held.get():
        yield
        return
    missing = [path for path in (place, *place.parents) if not path.exists()]
    handle = _acquire(place, directory, wait)
    if handle is None:
        yield
        return
    _handles.add(handle)
    _held.set(_held.get() | {place})
    try:
        remove_stale(place)
        yield
    finally:
        _held.set(_held.get() - {place})
        _handles.discard(handle)
        with suppress(OSError):
            # While it is locked: a process that waits for it then sees that it is gone, and makes a new one.
            (place / LOCK).unlink()
        os.close(handle)
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _acquire(place: Path, directory: Path, wait: bool) -> int | None:
    """Lock a directory's file and write the holder into it; None if there can be no lock.

    Messages name the directory as it was given.
    """
    try:
        import fcntl
    except ImportError:
        # Windows has no such lock.
        return None
    path = place / LOCK
    while True:
        try:
            handle = _open_lock_file(path)
        except FileNotFoundError:
            # The process that held it has just removed the empty directory.
            continue
        except OSError as error:
            if error.errno in _NOT_WRITABLE_ERRNOS:
                # Nothing can be written there; the message depends on what is there, and comes from the caller.
                return None
            raise UserError(
                f"{directory}: cannot be written ({error.strerror or error}); choose another --output directory"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            who = _describe_holder(handle)
            if not wait:
                os.close(handle)
                raise UserError(
                    f"{directory}: another process is writing there ({who}); add --wait to start when it has ended, "
                    "or choose another --output directory"
                ) from None
            try:
                _wait_for_lock(handle, directory, who)
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            os.close(handle)
            logger.warning(
                "%s: its file system has no locks (%s), so nothing keeps a second process from writing there",
                *(directory, error.strerror or error),
            )
            return None
        if _is_still_linked(handle, path):
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
            with suppress(OSError):
                # The file of another user's killed process cannot be written; the lock itself is held anyway.
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(me).encode(), 0)
            return handle
        os.close(handle)


def _open_lock_file(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Following a link would overwrite another file.
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _is_still_linked(handle: int, path: Path) -> bool:
    """Whether the locked file is still in the directory: the process that held it before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def _wait_for_lock(handle: int, directory: Path, who: str) -> None:
    import fcntl

    from internal_policy.utils.logging import status

    logger.warning("%s: another process is writing there (%s); waiting until it has ended", directory, who)
    with status(f"waiting for {who}"):
        fcntl.flock(handle, fcntl.LOCK_EX)


def _describe_holder(handle: int) -> str:
    try:
        held = json.loads(os.pread(handle, 1000, 0))
        return f"process {held['pid']} on {held['host']} since {held['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not recorded its number yet"


def _release_after_fork() -> None:
    """Release what a forked child has inherited: a child that outlives its parent must not keep the locks."""
    for handle in _handles:
        with suppress(OSError):
            os.close(handle)
    _handles.clear()
    _held.set(frozenset())
    _kept_locks.set(None)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_after_fork)
