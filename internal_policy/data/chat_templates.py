"""Chat templates, which are programs that ship with a checkpoint, run in a process that can be killed.

A template may loop forever, or build a text of gigabytes in one operation that nothing in this process can interrupt.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from internal_policy.utils.errors import UserError

SECONDS = 10.0
"""Time limit of the template for one chat."""
MEMORY = 2**30
"""Memory limit in bytes, beyond what the parent process uses."""
LONGEST = 10_000_000
"""Maximum number of characters of a prompt."""


def apply_chat_template(tokenizer: Any, chats: Sequence[list[dict[str, str]]]) -> list[str]:
    """Apply the tokenizer's template to chats, up to the start of the assistant's turn.

    Raises:
        UserError: the template refuses a chat, or needs too much time or memory for it.
    """
    # A daemonic worker of a pool may not start processes.
    if "fork" not in multiprocessing.get_all_start_methods() or multiprocessing.current_process().daemon:
        return [_checked(_apply(tokenizer, chat), chat) for chat in chats]
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(theirs, tokenizer, chats), daemon=True)
    with warnings.catch_warnings():
        # Python warns about forking with threads; the child only runs the template, and uses none of their locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    theirs.close()
    try:
        return list(_receive(ours, chats))
    finally:
        child.kill()
        child.join()
        ours.close()


def _receive(connection: Connection, chats: Sequence[list[dict[str, str]]]) -> Iterator[str]:
    for chat in chats:
        if not connection.poll(SECONDS):
            raise _refused(chat, f"it took more than {SECONDS:g} seconds")
        try:
            answer = connection.recv()
        except EOFError:
            raise _refused(chat, "its process ended") from None
        yield _checked(answer, chat)


def _checked(answer: tuple[str, str], chat: Sequence[dict[str, str]]) -> str:
    text, error = answer
    if error:
        raise _refused(chat, error)
    return text


def _refused(chat: Sequence[dict[str, str]], why: str) -> UserError:
    roles = [message["role"] for message in chat]
    return UserError(f"the chat template refuses a chat with roles {roles} ({why}); try --template plain")


def _answer(connection: Connection, tokenizer: Any, chats: Sequence[list[dict[str, str]]]) -> None:
    _limit_memory()
    for chat in chats:
        connection.send(_apply(tokenizer, chat))


def _apply(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[str, str]:
    """The text and the error message, one of them empty."""
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except MemoryError:
        return "", f"it needs more than {MEMORY >> 20} MiB"
    # A template may raise anything.
    except Exception as error:
        return "", " ".join(str(error).split())[:300] or type(error).__name__
    if not isinstance(text, str) or len(text) > LONGEST:
        what = f"{len(text)} characters" if isinstance(text, str) else f"a {type(text).__name__}"
        return "", f"it makes {what}; needed is a text of at most {LONGEST}"
    return text, ""


def _limit_memory() -> None:
    import resource

    try:
        with open("/proc/self/statm", encoding="ascii") as handle:  # noqa: PTH123  (avoids imports after the fork)
            used = int(handle.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit, hard = used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    except (OSError, ValueError):
        # macOS has no such limit; the limits of time and length apply regardless.
        return
