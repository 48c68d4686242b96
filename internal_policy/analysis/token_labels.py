"""The kinds of tokens by which the statistics of an analysis are divided: built-in labels, and the rules behind them.

A label is a text for each response token, the token that a state predicts. `LABELS` names the groups of each built-in
grouping in their order. The functions need the texts, the places or the rewards of tokens only, so that they apply to
an analysis while it runs and to one that was loaded from disk.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from internal_policy.utils.errors import UserError, counted

GroupingName = Literal["kind", "position", "correct", "policy-entropy"]

FORKING_SHARE = 0.2
"""The share of tokens with the highest entropy that are called forking (arXiv 2506.01939, section 4)."""
_DECILES = tuple(f"decile {n}" for n in range(1, 11))

LABELS: Mapping[GroupingName, tuple[str, ...]] = MappingProxyType(
    {
        "kind": ("digit", "operator", "word", "format"),
        "position": _DECILES,
        "correct": ("right", "wrong"),
        "policy-entropy": ("forking", "rest"),
    }
)
"""The built-in groupings, with their groups in order."""

LabelFunction: TypeAlias = Callable[[str, int, Any], Any]
"""From a token's text, its index in the response (from 0) and the response (a row of ``Analysis.sequences``) to its
label; None leaves the token out."""

_MARKUP = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]{2,}\]")
"""A token that as a whole is a mark of a template or of markup: ``<|im_end|>``, ``</s>``, ``<think>``, ``[PAD]``."""
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_RULE = re.compile(r"([-*=~_#])\1+")
"""The same sign repeated, as Markdown's rules, headings and bold type are; ``==`` is a relation."""
_BULLET = re.compile(r"^[ \t]*[-*](?=[ \t])", re.MULTILINE)
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_OPERATOR_COMMANDS = re.compile(
    r"""times|cdots?|div|pm|mp|ast|star|circ|oplus|otimes|cap|cup|setminus|wedge|vee|land|lor|lnot|neg|forall|exists
    |leq?|leqslant|geq?|geqslant|lt|gt|ll|gg|neq?|approx|equiv|cong|sim|simeq|propto|in|notin|ni|subset|subseteq|supset
    |supseteq|mid|parallel|perp|to|gets|mapsto|(long|Long)?(left|right|leftright|Left|Right|Leftright)arrow
    |implies|impliedby|iff|therefore|because
    |sum|prod|i{0,2}int|oint|lim|limsup|liminf|sup|inf|max|min|gcd|lcm|log|ln|lg|exp|(arc)?(sin|cos|tan)h?|cot|sec|csc
    |det|dim|deg|arg|[bp]?mod|sqrt|[dt]?frac|[dt]?binom|partial|nabla|infty""",
    re.VERBOSE,
)
"""Commands of LaTeX that write an operator, a relation, a quantifier or a named function."""
_LETTER_COMMANDS = re.compile(
    r"(var)?(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|upsilon|phi|chi"
    r"|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega)|ell|hbar"
)
"""Commands of LaTeX that write a letter. All others are format."""
_SIGNS = frozenset("-*/^·")
"""Operators that Unicode does not count as mathematical symbols."""
_NO_SIGNS = frozenset("|~")
"""Mathematical symbols of Unicode that are markup more often, in tables and as LaTeX's space."""
_PRIORITY = "wdof"
_KINDS = dict(zip(_PRIORITY, ("word", "digit", "operator", "format"), strict=True))


def kinds(texts: Sequence[str], special: Collection[int] = ()) -> list[str]:
    r"""Label the tokens of one response as ``digit``, ``operator``, ``word`` or ``format``.

    Each character of the response has a kind, and a token has the kind of its most telling character: that of a letter
    before that of a digit, an operator and the rest. So a leading space does not matter, ``",x"`` is a word, and
    ``")="`` an operator.

    - A letter, in any script, with its marks is a word: ``Step``, ``中``, and a variable ``x`` too.
    - A digit or another number is a digit: ``7``, ``²``, ``½``.
    - An operator is a mathematical symbol of Unicode (``+ = < ≤ × → ∑``) other than ``|`` and ``~``, or one of
      ``- * / ^ ·``. A sign that opens an item of a list, and one that is repeated (``**``, ``---``), is format; ``==``
      is not.
    - A command of LaTeX, even if its letters are several tokens, is an operator if it writes an operator, a relation or
      a function (``\times``, ``\leq``, ``\frac``), a word if it writes a letter (``\alpha``), and format otherwise
      (``\boxed``, ``\text``, ``\left``).
    - Everything else is format: white space, punctuation, brackets, emoji, special tokens and marks such as
      ``<think>``.

    A token of a few bytes of a character, as byte-level BPE has them, is of the kind of that character if the response
    has all of it, and format otherwise.

    Args:
        texts: the text of each token, [n]; bytes that form no character are lone surrogates (``surrogateescape``).
        special: indices of the tokens that are special in the tokenizer, whatever their text is.

    Returns:
        [n] labels.
    """
    marks = {i for i, text in enumerate(texts) if _MARKUP.fullmatch(text.strip())} | set(special)
    # A mark separates what is before it from what follows, as a line break does.
    parts = [
        b"\n" if i in marks else _NO_BYTES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        for i, text in enumerate(texts)
    ]
    whole = b"".join(parts).decode("utf-8", "surrogateescape")
    characters = _character_kinds(whole)
    # The character to which each byte belongs.
    widths = [len(c.encode("utf-8", "surrogateescape")) for c in whole]
    owner = np.repeat(np.arange(len(whole)), widths)
    ends = np.cumsum([len(part) for part in parts])
    labels = []
    for i, (part, end) in enumerate(zip(parts, ends, strict=True)):
        own = set() if i in marks or not part else set(characters[owner[end - len(part)] : owner[end - 1] + 1])
        labels.append(_KINDS[next((kind for kind in _PRIORITY if kind in own), "f")])
    return labels


def _character_kinds(text: str) -> str:
    """The kind of every character of a text, by its first letter."""
    found = list(text.translate(_CHARACTERS))

    def fill(start: int, end: int, kind: str) -> None:
        found[start:end] = kind * (end - start)

    for match in _RULE.finditer(text):
        if match[0] != "==":
            fill(*match.span(), "f")
    for match in _BULLET.finditer(text):
        fill(*match.span(), "f")
    for match in _COMMAND.finditer(text):
        letter, operator = (known.fullmatch(match[1]) for known in (_LETTER_COMMANDS, _OPERATOR_COMMANDS))
        fill(*match.span(), "w" if letter else "o" if operator else "f")
    return "".join(found)


class _CharacterTable(dict[int, str]):
    """The kind of a character taken alone, looked up once for each."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in _SIGNS or (category == "Sm" and character not in _NO_SIGNS):
            kind = "o"
        else:
            kind = {"L": "w", "M": "w", "N": "d"}.get(category[0], "f")
        self[code] = kind
        return kind


_CHARACTERS = _CharacterTable()


@dataclass(frozen=True, eq=False)
class ResponseTokens:
    """What the built-in labels depend on, of one response of n tokens."""

    texts: Sequence[str]
    """The text of each token, [n]."""
    reward: float | None = None
    """Its reward; None if it was not scored."""
    entropies: npt.NDArray[np.floating] | None = None
    """Entropy of the final policy at each token, nats, [n]; needed for ``policy-entropy``."""
    special: Collection[int] = ()
    """Indices of special tokens."""


def label_responses(name: GroupingName, responses: Sequence[ResponseTokens]) -> list[list[str | None]]:
    """Label every token of some responses by a built-in grouping.

    Args:
        name: of the grouping.
        responses: all responses, because ``policy-entropy`` has one threshold for their tokens together.

    Returns:
        For each response [n] labels, from ``LABELS[name]``; None if it has no label.

    Raises:
        UserError: ``correct``, and no response has a reward.
    """
    if name == "kind":
        return [[*kinds(r.texts, r.special)] for r in responses]
    if name == "position":
        return [[*deciles(np.arange(len(r.texts)), len(r.texts))] for r in responses]
    if name == "correct":
        if all(correctness(r.reward) is None for r in responses):
            raise no_rewards(len(responses))
        return [[correctness(r.reward)] * len(r.texts) for r in responses]
    found = forking(np.concatenate([r.entropies for r in responses if r.entropies is not None]))
    ends = np.cumsum([len(r.texts) for r in responses])[:-1]
    return [["forking" if each else "rest" for each in part] for part in np.split(found, ends)]


def no_rewards(n_responses: int) -> UserError:
    """Make the error of responses that are to be grouped by their rewards, and have none."""
    return UserError(
        f"--by correct needs rewards, and none of the {counted(n_responses, 'response')} has one; give --responses "
        "with a reward each"
    )


def deciles(places: npt.NDArray[np.int64], n_tokens: int) -> list[str]:
    """Label tokens by the tenth of their response that they are in, ``decile 1`` to ``decile 10``.

    Args:
        places: index of each token in its response, from 0, [n].
        n_tokens: number of tokens of the response; with fewer than ten some deciles have none.

    Returns:
        [n] labels.
    """
    return [_DECILES[10 * int(place) // n_tokens] for place in places]


def correctness(reward: float | None) -> str | None:
    """Label a response by its reward: ``right`` from 1 on, as in an evaluation, ``wrong`` below; None if unscored."""
    if reward is None or np.isnan(reward):
        return None
    return "right" if reward >= 1.0 else "wrong"


def forking(entropies: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Find the forking tokens: the 20% of all tokens with the highest entropy of the final policy.

    Of equal entropies at the threshold the earlier tokens are taken, so that the number is exactly a fifth, rounded to
    the nearest whole number, and at least one.

    Args:
        entropies: of pi_theta at each token of all responses, in their order, nats, [n].

    Returns:
        [n], true for forking tokens.

    Source: arXiv 2506.01939, section 4, where only the 20% of tokens with the highest entropy are trained on.
    """
    n = entropies.size
    found = np.zeros(n, dtype=bool)
    found[np.argsort(-entropies, kind="stable")[: max(1, round(FORKING_SHARE * n))]] = True
    return found


def require_grouping(name: str) -> GroupingName:
    """Return the name of a built-in grouping.

    Raises:
        UserError: an unknown name; the message names what was probably meant.
    """
    if name in LABELS:
        return cast(GroupingName, name)
    meant = suggestion(name, LABELS)
    raise UserError(
        f"tokens are grouped by {name!r}; needed is one of {', '.join(LABELS)}, or a function of token, position and "
        f"response{meant}"
    )


def suggestion(word: str, known: Iterable[str]) -> str:
    """Say in brackets which known word was probably meant; empty if none is close."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
