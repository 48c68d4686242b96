"""The kept responses token by token, packed so that a page of thousands of tokens stays quick."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from internal_policy.analysis.results import Analysis
from internal_policy.report.page import clean
from internal_policy.utils.errors import counted

SITES = ("layer", "attn", "ffn")
MOST_VALUES = 1_500_000
"""Numbers in a page, two bytes each: 4 MB of text."""
MOST_TOKENS = 1200
"""Tokens of one response: each is an element of the page."""
_UNKNOWN = -(2**15)
_MOST_TEXT = 20_000


def token_view(analysis: Analysis) -> dict[str, Any] | None:
    """Pack the values of the kept responses.

    Args:
        analysis: the analysis.

    Returns:
        `data` for the page's script: thousandths of a nat as little-endian 16-bit numbers in base64, [site, quantity,
        layer, token] with the quantities entropy and change, then the entropy of pi_theta [token]. And what is `told`
        beside it. None where no response was kept.
    """
    table = analysis.tokens
    if table.empty:
        return None
    kept = sorted(int(r) for r in table["response"].unique())
    room = MOST_VALUES // (len(SITES) * 2 * analysis.n_layers + 1)
    shown, cut, left_out = [], 0, 0
    for response in kept:
        rows = table[table["response"] == response]
        size = int(rows["token"].nunique())
        take = min(size, MOST_TOKENS, room)
        if take < 1:
            left_out += 1
            continue
        room -= take
        cut += take < size
        shown.append(_response(analysis, rows, response, take, size))
    notes = []
    if cut:
        what = "response is" if cut == 1 else "responses are"
        notes.append(f"{cut} {what} cut after {MOST_TOKENS} tokens or fewer, so that this page stays quick.")
    if left_out:
        notes.append(f"{counted(left_out, 'kept response')} left out, so that this page stays quick.")
    if analysis.positions is not None:
        notes.append("Positions were chosen at random for a tolerance: only those are shown, gaps are marked “…”.")
    if "token_text" not in table:
        notes.append("This analysis stores no texts of single tokens, so their ids are shown; a new one stores them.")
    notes.append(
        f"{len(kept)} of {counted(analysis.n_responses, 'response')} kept token by token (--keep-tokens); all values "
        "are in tokens.parquet."
    )
    top = math.log(analysis.vocab_size)
    data = {"layers": analysis.n_layers, "top": round(top, 4), "target": analysis.boundary_layer, "responses": shown}
    start = analysis.boundary_layer or max(1, analysis.n_layers // 2)
    return {"data": {**data, "start": start}, "told": {"notes": notes, "layers": analysis.n_layers, "start": start}}


def _response(analysis: Analysis, rows: pd.DataFrame, response: int, take: int, size: int) -> dict[str, Any]:
    places = np.sort(rows["token"].unique())[:take]
    rows = rows[rows["token"].isin(places)]
    values = np.full((len(SITES), 2, analysis.n_layers, take), np.nan)
    for i, site in enumerate(SITES):
        own = rows[rows["site"] == site]
        at = own["layer"].to_numpy() - 1, np.searchsorted(places, own["token"].to_numpy())
        values[i, 0][at] = own["entropy_out"].to_numpy()
        values[i, 1][at] = own["change"].to_numpy()
    policy = np.full(take, np.nan)
    own = rows[rows["site"] == "policy"]
    policy[np.searchsorted(places, own["token"].to_numpy())] = own["entropy_out"].to_numpy()
    first = rows.drop_duplicates("token").sort_values("token")
    ids = [int(i) for i in first["token_id"]]
    texts = [clean(t) for t in first["token_text"]] if "token_text" in first else [f"#{i}" for i in ids]
    sequence = analysis.sequences.iloc[response]
    reward = sequence.get("reward")
    return {
        "number": response + 1,
        "ids": ids,
        "texts": texts,
        "places": [int(p) + 1 for p in places],
        "size": size,
        "reward": None if reward is None or pd.isna(reward) else float(reward),
        "prompt": _text(sequence["prompt"]),
        "response": _text(sequence["response"]),
        "values": _packed(np.concatenate([values.ravel(), policy])),
    }


def _packed(values: NDArray[np.float64]) -> str:
    thousandths = np.clip(np.rint(np.nan_to_num(values * 1000, nan=_UNKNOWN)), _UNKNOWN, 2**15 - 1)
    return base64.b64encode(thousandths.astype("<i2").tobytes()).decode("ascii")


def _text(value: Any) -> str:
    """A prompt is a text, a chat, or nothing where none is known; what is very long is cut."""
    if isinstance(value, str):
        text = value
    elif value is None or isinstance(value, float):
        text = ""
    else:
        text = "\n\n".join(f"{message.get('role') or ''}: {message.get('content') or ''}" for message in value)
    return clean(text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} […]")
