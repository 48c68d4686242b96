"""`UserError`, the one exception that carries a message for the user, and what turns other exceptions into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WEIGHTS = "its weights"
"""What is loaded when everything else about the checkpoint is known."""
HTTP_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})
"""They are never imported: the hub's client depends on one of them, and their exceptions share no class."""
_PANIC = "PanicException"
"""What tokenizers and safetensors raise if their Rust code panics; it is not a subclass of ``Exception``."""
_PLURALS = {"analysis": "analyses", "process": "processes", "recovery": "recoveries"}


class UserError(Exception):
    """An error that the user can correct, described in one line.

    The message says what was got, what is needed and what to do next. The command line prints it without a
    traceback and exits with code 2; from Python it is an ordinary exception.
    """


class NoNetwork(UserError):
    """The hub cannot be reached, and its cache on this disk does not contain what was requested."""


@contextmanager
def as_user_error(name: str, what: str, *, doing: str = "load", advice: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises on a bad name, file, setting or network into a `UserError` of one line.

    No library has a closed list of such exceptions: tokenizers raises bare ones, a setting of the wrong type fails in
    whatever line first computes with it, and a checkpoint may bring code of its own.

    Args:
        name: the name of the model or the data set.
        what: what is being loaded.
        doing: the verb for it.
        advice: what to do next; by default it follows from the exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = NoNetwork if "couldn't connect to" in str(error).lower() else UserError
        raise kind(f"{name}: {_describe(name, what, doing, advice, error)}") from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise UserError(f"{name}: {_describe(name, what, doing, advice, error)}") from error


def _describe(name: str, what: str, doing: str, advice: str | None, error: BaseException) -> str:
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError):
        return f"broken safetensors file ({first_line(error)}); download or save it again"
    if is_out_of_memory(error):
        return f"out of memory on {what}; use --dtype bfloat16 or a smaller model"
    return f"cannot {doing} {what}: {_explain(name, what, advice, error)}"


def _explain(name: str, what: str, advice: str | None, error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError, HfHubHTTPError)) or not text:
        # The text of other exceptions may be only a name or a number.
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = shorten(text)
    if isinstance(error, ImportError):
        return f"{text}; install what is missing, then repeat this"
    if advice is not None:
        return f"{text}; {advice}"
    if what != WEIGHTS and name.startswith("testbed/"):
        return f"{text}; install internal-policy again"
    if Path(name).exists():
        return f"{text}; repair this directory, or give another"
    lowered = str(error).lower()
    if "safetensors" in lowered and ("does not appear to have" in lowered or "no file named" in lowered):
        return "the repository has no safetensors weights (pickle only?); only safetensors is read"
    if any(sign in lowered for sign in ("gated repo", "401 client error", "403 client error")):
        return "access is restricted; log in with `hf auth login` and accept the model's terms on the hub"
    if "trust_remote_code" in lowered:
        return "it needs code from its repository; read that code, then pass --trust-remote-code"
    if what == WEIGHTS and not isinstance(error, (OSError, HfHubHTTPError)):
        # Its configuration has been read: the model exists, and what fails is how it was to be loaded.
        return f"{text}; change how it is loaded, or give another checkpoint"
    return f"no such model on the hub, or no network ({text}); check the name, or give a local directory"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, at most about 200 characters; its type if there is none."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0]) if lines else type(error).__name__


def shorten(text: str, length: int = 200) -> str:
    """Shorten a line for a message between words, so that an address or a path stays complete or is left out.

    The full stop at the end is removed; three dots show where the line was cut.
    """
    text = text.strip().rstrip(".:")
    if len(text) <= length:
        return text
    space = max(text.rfind(" ", 0, length + 1), text.find(" "))
    return text if space < 0 else f"{text[:space].rstrip('.,:;(')} ..."


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 response``, ``2 responses``."""
    return f"{number} {noun if number == 1 else _PLURALS.get(noun, noun + 's')}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device.

    These are MemoryError, ``torch.OutOfMemoryError``, and the RuntimeError of the CPU allocator.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


def is_http_error(error: BaseException) -> bool:
    """Whether an exception is one of an HTTP library: no answer came, or none that could be read.

    An answer that refuses is an exception of the hub's client.
    """
    return type(error).__module__.partition(".")[0] in HTTP_LIBRARIES
