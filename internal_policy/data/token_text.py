"""Token ids as short visible texts, without invisible white space, byte marks and control characters.

A space is ``·``, a line break ``⏎``, a tab ``⇥``; four or more of one are ``·×4``. Bytes that form no character are
``<E4B8>``, invisible characters ``<U+200D>``, and ids without a text ``#151700``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"})
_SPACE, _BYTE = "▁", re.compile(r"<0x([0-9A-F]{2})>")
_RUN = re.compile(f"([{''.join(_MARKS.values())}])\\1{{3,}}")
_HALVES = re.compile("[\udc80-\udcff]+")
_SHOWN_RUN = re.compile(f"([{''.join(_MARKS.values())}])×([4-9]|[1-9][0-9]+)")
_SHOWN_CODE = re.compile(r"<U\+([0-9A-F]{4,6})>|<((?:[89A-F][0-9A-F])+)>")
_CHARACTERS = {shown: character for character, shown in _MARKS.items()}


def _byte_alphabet() -> dict[str, int]:
    """The characters that represent bytes in byte-level BPE (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def texts_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Format each token id as a visible text that differs from others; ids may be beyond the vocabulary."""
    return {token_id: visible(_text(tokenizer, token_id)) or f"#{token_id}" for token_id in {int(i) for i in ids}}


def raw_texts_of(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Read the text of each token id; empty if it has none, with bytes that form no character as lone surrogates."""
    return {token_id: _text(tokenizer, token_id) for token_id in {int(i) for i in ids}}


def unknown_pieces(tokenizer: Any, text: str) -> list[str]:
    """Find the parts of a text that become the tokenizer's unknown token, each once, in visible form."""
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return []
    if tokenizer.is_fast:
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = zip(read["input_ids"], read["offset_mapping"], strict=True)
        pieces = [text[first:last] for token_id, (first, last) in places if token_id == unknown]
    else:
        pieces = [piece for piece in tokenizer.tokenize(text) if tokenizer.convert_tokens_to_ids(piece) == unknown]
    # Some tokenizers use another token for it, such as the end-of-text token, which the text may contain on purpose.
    return [visible(piece) for piece in dict.fromkeys(pieces) if piece not in ("", tokenizer.unk_token)]


def _text(tokenizer: Any, token_id: int) -> str:
    """The text of a token, empty if it has none; bytes that form no character become lone surrogates."""
    try:
        piece = tokenizer.convert_ids_to_tokens(token_id)
    # Tokenizers differ in what they raise or return for the padding rows of the unembedding.
    except (IndexError, KeyError, OverflowError, ValueError):
        return ""
    if isinstance(piece, bytes):
        return piece.decode("utf-8", "surrogateescape")
    if not piece:
        return ""
    if byte := _BYTE.fullmatch(piece):
        return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if "\ufffd" in text and all(character in _BYTES for character in piece):
        return bytes(_BYTES[character] for character in piece).decode("utf-8", "surrogateescape")
    if piece.startswith(_SPACE):
        # Decoders drop the leading space of a text, and here every token is decoded as a text.
        rest = piece.lstrip(_SPACE)
        return " " * (len(piece) - len(rest)) + text.lstrip(" ")
    return text or str(piece)


def visible(text: str) -> str:
    """Format a text so that all of it is visible on one line; lone surrogates represent incomplete characters."""
    text = _HALVES.sub(lambda m: f"<{m[0].encode('utf-8', 'surrogateescape').hex().upper()}>", text)
    shown = "".join(_MARKS.get(c) or (f"<U+{ord(c):04X}>" if unicodedata.category(c) in _UNSEEN else c) for c in text)
    # A combining mark would attach to whatever precedes the cell.
    shown = f"◌{shown}" if shown and unicodedata.category(shown[0]).startswith("M") else shown
    return _RUN.sub(lambda m: f"{m[1]}×{len(m[0])}", shown)


def from_visible(shown: str) -> str:
    """Read the text of a token from its visible form; bytes that form no character become lone surrogates.

    The visible form of a few texts is also that of another: a ``·`` in a text reads as a space.
    """

    def character(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else bytes.fromhex(match[2]).decode("utf-8", "surrogateescape")

    if re.fullmatch(r"#[0-9]+", shown):
        return ""
    text = _SHOWN_RUN.sub(lambda m: m[1] * int(m[2]), shown.removeprefix("◌"))
    text = "".join(_CHARACTERS.get(c, c) for c in text)
    return _SHOWN_CODE.sub(character, text)
