"""Texts on a terminal, names of directories, and the processes that a launcher has started."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from pathlib import Path

from internal_policy.utils.errors import UserError


def figure_name(analyses: list[tuple[str, str]]) -> str:
    """Name a directory for the figures of several results, given by the directory name and the lens of each.

    All names are joined; if that is too long, it is the first one, the number of others, and a digest of all.
    """
    names = list(
        dict.fromkeys(
            name if lens == "policy" or name.endswith(f"--{lens}") else f"{name}--{lens}" for name, lens in analyses
        )
    )
    whole = "--".join(names)
    if len(whole) <= 120:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:8]
    return f"{names[0][:80]}--and-{len(names) - 1}-more-{digest}"


# Characters that move the cursor, hide text or reverse its direction, and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066\u2067\ud800-\udfff]")
_LINE_ENDS = {ord(end): "\N{SYMBOL FOR NEWLINE}" for end in "\n\x85\u2028\u2029"} | {ord("\t"): " "}


def is_number(text: str) -> bool:
    """Whether a text is a whole number, with or without a sign, that ``int`` reads.

    ``²`` is a digit but not a number, and ``int`` refuses 5000 digits: at most 18 are accepted.
    """
    return bool(re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text))


def visible(text: str, *, one_line: bool = False) -> str:
    """Replace the control characters of a text, which a terminal would obey instead of showing them.

    They become control pictures (U+2400 and following) or the replacement character; `one_line` also replaces ends of
    lines and tabs.
    """
    if one_line:
        text = text.translate(_LINE_ENDS)
    return _UNPRINTABLE.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else "\N{REPLACEMENT CHARACTER}"


def refuse_unmatched(directory: Path) -> None:
    """Raise a `UserError` for a glob pattern that the shell has left unexpanded because nothing matches it."""
    if glob.has_magic(str(directory)) and not directory.exists():
        raise UserError(f"{directory}: nothing matches this pattern; leave it out, or name what is there")


def rank() -> int:
    """The rank, from 0, of this process among those that accelerate, torchrun or MPI started."""
    return _launched("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK") or 0


def world_size() -> int:
    """The number of processes that accelerate, torchrun or MPI started; at least 1."""
    return _launched("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE") or 1


def _launched(*names: str) -> int | None:
    return next((int(os.environ[name]) for name in names if is_number(os.environ.get(name, ""))), None)


def is_main_process() -> bool:
    """Whether this process prints: the only one, or the first of those that a launcher started."""
    return rank() == 0
