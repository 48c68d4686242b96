"""Captured values as tidy tables: a row for each response, layer and site, and for each token of the kept responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from internal_policy.data.responses import Response, prompt_indices
from internal_policy.extractors import QUANTITIES
from internal_policy.statistics import QUANTITIES as QUANTITY_COLUMNS
from internal_policy.statistics import Ints
from internal_policy.utils.workspace import Arrays

_SITES = ("layer", "attn", "ffn")


def response_table(
    captured: Sequence[Arrays], responses: Sequence[Response], tokens: Sequence[Ints] | None = None
) -> pd.DataFrame:
    """Means over the tokens of each response.

    Args:
        captured: portions with ``index`` [R], ``layers`` [R, L, Q] and ``policy`` [R, 2].
        responses: all responses, in order.
        tokens: which tokens of each were analysed; None for all.

    Returns:
        Columns response, prompt, n_tokens, layer, site, and the ``statistics.QUANTITIES``: entropy_in, entropy_out,
        change with its parts change_direction and change_scale (nats), cosine, rms_in and rms_out; the rows of site
        ``policy`` hold the entropy of H^L without the final norm (in) and of pi_theta (out). If `tokens` is given, also
        n_analysed, and the means are estimates (``position_subset.response_means``).
    """
    order = np.argsort(np.concatenate([c["index"] for c in captured]))
    values = np.concatenate([c["layers"] for c in captured])[order]
    policy = np.concatenate([c["policy"] for c in captured])[order]
    keys = pd.DataFrame(
        {
            "response": np.arange(len(responses)),
            "prompt": prompt_indices(responses),
            "n_tokens": [r.n_tokens for r in responses],
            **({} if tokens is None else {"n_analysed": list(map(len, tokens))}),
        }
    )
    return _tidy(keys, values, policy, sort=["response", "layer"])


def token_table(
    captured: Sequence[Arrays],
    responses: Sequence[Response],
    keep: int,
    tokens: Sequence[Ints] | None = None,
    texts: Mapping[int, str] | None = None,
) -> pd.DataFrame:
    """The values of every analysed token of the first responses.

    Args:
        captured: portions with ``index`` [R], ``token_layers`` [n, L, Q] and ``token_policy`` [n, 2].
        responses: all responses, in order.
        keep: how many responses were kept.
        tokens: which tokens of each were analysed; None for all.
        texts: how each id is shown, so that the tokens can be read without a tokenizer.

    Returns:
        Columns response, token (0-based index within the response), token_id, token_text if `texts` is given, layer,
        site, and the ``statistics.QUANTITIES``; float32.
    """
    kept = [int(i) for c in captured for i in c["index"] if i < keep]
    keys = pd.DataFrame(
        [
            {"response": i, "token": int(t), "token_id": responses[i].input_ids[responses[i].prompt_length + t]}
            for i in kept
            for t in (range(responses[i].n_tokens) if tokens is None else tokens[i])
        ],
        columns=["response", "token", "token_id"],
        dtype=np.int64,
    )
    if texts is not None:
        keys["token_text"] = keys["token_id"].map(dict(texts)).astype(object)
    values = np.concatenate([c["token_layers"] for c in captured])
    policy = np.concatenate([c["token_policy"] for c in captured])
    return _tidy(keys, values, policy, sort=["response", "token", "layer"])


def group_table(
    captured: Sequence[Arrays], responses: Sequence[Response], groupings: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Means over the tokens of each response that are in each group.

    Args:
        captured: portions with ``layers`` [m, L, Q], ``policy`` [m, 2], and for each of these means its ``response``,
            its ``grouping`` and ``group`` (by their places in `groupings`) and its ``n_tokens``, [m].
        responses: all responses, in order.
        groupings: the groups of each grouping.

    Returns:
        Columns as `response_table`, with grouping and group.
    """
    values, policy = (np.concatenate([c[name] for c in captured]) for name in ("layers", "policy"))
    response, grouping, group, n_tokens = (
        np.concatenate([c[name] for c in captured]) for name in ("response", "grouping", "group", "n_tokens")
    )
    names = list(groupings)
    keys = pd.DataFrame(
        {
            "response": response,
            "prompt": np.array(prompt_indices(responses))[response],
            "grouping": [names[i] for i in grouping],
            "group": [groupings[names[i]][j] for i, j in zip(grouping, group, strict=True)],
            "n_tokens": n_tokens,
        }
    )
    return _tidy(keys, values, policy, sort=["grouping", "response", "group", "layer"])


def sequence_table(responses: Sequence[Response]) -> pd.DataFrame:
    """The responses, with columns prompt, response, input_ids, prompt_length, reward."""
    frame = pd.DataFrame([asdict(r) for r in responses])
    frame["reward"] = frame["reward"].astype(object).where(frame["reward"].notna(), None)
    return frame


def _tidy(
    keys: pd.DataFrame, values: NDArray[np.floating], policy: NDArray[np.floating], sort: list[str]
) -> pd.DataFrame:
    """Long form of [n, L, Q] layer values and [n, 2] policy values."""
    n, n_layers, _ = values.shape
    column = {name: values[:, :, q] for q, name in enumerate(QUANTITIES)}
    frames = []
    for site in _SITES:
        frame = keys.loc[keys.index.repeat(n_layers)].reset_index(drop=True)
        frame["layer"] = np.tile(np.arange(1, n_layers + 1), n)
        frame["site"] = site
        frame["entropy_in"] = column[f"{site}_in"].ravel()
        frame["entropy_out"] = column[f"{site}_out"].ravel()
        frame["change_direction"] = (column[f"{site}_rescaled"] - column[f"{site}_in"]).ravel()
        frame["change_scale"] = (column[f"{site}_out"] - column[f"{site}_rescaled"]).ravel()
        for end in ("rms_in", "rms_out"):
            frame[end] = column[f"{site}_{end}"].ravel()
        frame["cosine"] = column[f"{site}_cosine"].ravel() if site != "layer" else np.nan
        frames.append(frame)
    last = keys.assign(layer=n_layers, site="policy", entropy_in=policy[:, 0], entropy_out=policy[:, 1])
    table = pd.concat([*frames, last], ignore_index=True)
    table["change"] = table["entropy_out"] - table["entropy_in"]
    for name in QUANTITY_COLUMNS:
        table[name] = table.pop(name).astype(values.dtype)
    return table.sort_values(sort, kind="stable", ignore_index=True)
