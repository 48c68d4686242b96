"""Fonts for tokens of any script: which can be drawn here, and how much of one has room."""

from __future__ import annotations

from functools import cache, lru_cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties

from internal_policy.plotting import style

_SHIPPED = ("STIXGeneral", "DejaVu Sans")
# Fonts that systems have for what the shipped ones lack; colour emoji fonts are no outlines and cannot be drawn.
_INSTALLED = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo"),
    *("Microsoft YaHei", "SimHei", "MS Gothic", "Yu Gothic", "Malgun Gothic", "IPAGothic", "NanumGothic"),
    *("Noto Sans", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali"),
    *("Noto Sans Tamil", "Noto Sans Thai", "FreeSans", "FreeSerif", "Arial Unicode MS", "Tahoma", "Nirmala UI"),
    *("Noto Emoji", "Noto Sans Symbols", "Noto Sans Symbols 2", "Symbola", "Segoe UI Symbol", "Unifont"),
)


@cache
def families() -> tuple[str, ...]:
    """Find the fonts to draw tokens in, the first that has a character draws it.

    Returns:
        Names: those shipped with matplotlib, then those installed here that are known to help.
    """
    here = {entry.name for entry in font_manager.fontManager.ttflist}
    return (*_SHIPPED, *(name for name in _INSTALLED if name in here))


@lru_cache(maxsize=64)
def font(size: float) -> FontProperties:
    """Give the font of tokens.

    Args:
        size: points.

    Returns:
        Its properties; not to be changed.
    """
    return FontProperties(family=list(families()), size=size)


@cache
def _characters() -> frozenset[int]:
    found: set[int] = set()
    for name in families():
        path = font_manager.findfont(FontProperties(family=name), fallback_to_default=False)
        found.update(font_manager.get_font(path).get_charmap())
    return frozenset(found)


def drawable(text: str, token_id: int) -> str:
    """Replace a token that no font here can draw by its id.

    Args:
        text: the token, as it is shown.
        token_id: its id.

    Returns:
        The text, or ``#1234``.
    """
    return text if all(ord(character) in _characters() for character in text) else f"#{token_id}"


@lru_cache(maxsize=65536)
def fit(text: str, room: float, size: float) -> str:
    """Cut a token to the room that it has.

    Args:
        text: the token.
        room: width, points.
        size: of the type, points.

    Returns:
        The text, or its beginning and an ellipsis.
    """
    if style.text_width(text, font(size)) <= room:
        return text
    low, high = 1, max(1, len(text) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if style.text_width(f"{text[:middle]}…", font(size)) <= room else (low, middle - 1)
    return f"{text[:low]}…"
