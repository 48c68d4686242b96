"""What libraries raise while they load a model, a tokenizer or a data set, told in one line at one place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internal_policy.utils.errors import UserError

WEIGHTS = "its weights"
"""What is loaded when everything else about the checkpoint is known."""
_PANIC = "PanicException"
"""What tokenizers and safetensors raise where their Rust code gives up; it is no ``Exception``."""


class NoNetwork(UserError):
    """The hub cannot be reached, and its cache on this disk does not have what was asked for."""


@contextmanager
def told_in_one_line(name: str, what: str, *, doing: str = "load", advice: str | None = None) -> Iterator[None]:
    """Turn what a library raises on a bad name, file, setting or network into one line.

    Which exceptions those are is for none of the libraries a closed list: tokenizers raises bare ones, a setting of the
    wrong type falls over in whatever line first computes with it, and a checkpoint may bring code of its own.

    Args:
        name: the name of the model or the data set.
        what: what is being loaded.
        doing: what is done to it.
        advice: what to do next; where not given it follows from what was raised.

    Raises:
        UserError: in place of what was raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = NoNetwork if "couldn't connect to" in str(error).lower() else UserError
        raise kind(f"{name}: {_told(name, what, doing, advice, error)}") from error
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise UserError(f"{name}: {_told(name, what, doing, advice, error)}") from error


def _told(name: str, what: str, doing: str, advice: str | None, error: BaseException) -> str:
    from safetensors import SafetensorError

    from internal_policy.utils.memory import is_out_of_memory

    if isinstance(error, SafetensorError):
        return f"broken safetensors file ({first_line(error)}); download or save it again"
    if is_out_of_memory(error):
        return f"out of memory on {what}; use --dtype bfloat16 or a smaller model"
    return f"cannot {doing} {what}: {_explain(name, what, advice, error)}"


def _explain(name: str, what: str, advice: str | None, error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    text = " ".join(str(error).split())
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError, HfHubHTTPError)) or not text:
        # By itself the text of the others may be no more than a name or a number.
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    text = shorten(text)
    if isinstance(error, ImportError):
        return f"{text}; install what is missing, then repeat this"
    if advice is not None:
        return f"{text}; {advice}"
    if what != WEIGHTS and name.startswith("testbed/"):
        return f"{text}; install internal-policy again"
    if Path(name).exists():
        return f"{text}; mend this directory, or give another"
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
    """The first line of what an exception says.

    Args:
        error: the exception.

    Returns:
        Some 200 characters at most; its type where it says nothing.
    """
    lines = str(error).strip().splitlines()
    return shorten(lines[0]) if lines else type(error).__name__


def shorten(text: str, length: int = 200) -> str:
    """Cut a text for a message where it can be cut: an address or a path stays whole, or is left out.

    Args:
        text: one line.
        length: so many characters at most, unless the first word is longer.

    Returns:
        The text without the stop at its end; with three dots where it was cut.
    """
    text = text.strip().rstrip(".:")
    if len(text) <= length:
        return text
    space = max(text.rfind(" ", 0, length + 1), text.find(" "))
    return text if space < 0 else f"{text[:space].rstrip('.,:;(')} ..."
