"""The page of one or several analyses: summary, boundary layer, stages, charts, tokens, and how to reproduce it."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from internal_policy.analysis.change_parts import (
    PARTS,
    has_parts,
    length_sentence,
    share_sentence,
    undoes_length,
)
from internal_policy.analysis.layer_selection import STAGES, phrase
from internal_policy.analysis.remarks import positions_line, remarks
from internal_policy.analysis.results import Analysis
from internal_policy.comparison.convergence import Convergence, measure_convergence
from internal_policy.report import reproduce
from internal_policy.report.charts import (
    Chart,
    agreement_chart,
    change_chart,
    divergence_chart,
    fall_chart,
    flow_chart,
    group_chart,
    parts_chart,
)
from internal_policy.report.page import clean, interval, number, render, settings_tables
from internal_policy.report.part_charts import part_charts
from internal_policy.utils.console import few_prompts, of_resamples
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.palette import STAGES as STAGE_LOOKS

SITES = ("layer", "attn", "ffn")
MAX_VALUES = 1_500_000
"""Maximum number of values in a page, two bytes each: 4 MB of text."""
MAX_TOKENS = 1200
"""Maximum number of tokens of one response: each is an element of the page."""
_UNKNOWN = -(2**15)
_MAX_TEXT = 20_000


def page(analyses: Sequence[Analysis]) -> str:
    """Return the page of analyses as HTML.

    Raises:
        UserError: There is no analysis.
    """
    if not analyses:
        raise UserError("there is no analysis to report on; give at least one")
    charts: dict[str, Chart] = {}
    tokens: dict[str, Any] = {}
    parts = [_part(analysis, f"a{i}", charts, tokens) for i, analysis in enumerate(analyses, start=1)]
    title = str(analyses[0].name) if len(analyses) == 1 else f"{analyses[0].name} and {len(analyses) - 1} more"
    return render("analysis.html.j2", title=f"Internal policies of {title}", charts=charts, tokens=tokens, parts=parts)


def _part(analysis: Analysis, key: str, charts: dict[str, Chart], tokens: dict[str, Any]) -> dict[str, Any]:
    """Return what the template shows of one analysis, and add its charts and token view under ids with `key`."""
    convergence = measure_convergence(analysis, seed=int(analysis.config.get("seed", 0)))
    own = {"flow": flow_chart(analysis), "change": change_chart(analysis), "fall": fall_chart(convergence)}
    maps = part_charts(analysis)
    parts = has_parts(analysis.layers)
    if parts:
        own |= {"parts_ffn": parts_chart(analysis, "ffn"), "parts_attn": parts_chart(analysis, "attn")}
    table = analysis.additions.get("divergences")
    if table is not None:
        own |= {"divergence": divergence_chart(table), "agreement": agreement_chart(table)}
    charts.update({f"{key}-{name}": chart for name, chart in (own | maps).items()})
    groups = _groups(analysis)
    charts.update({f"{key}-groups-{group['name']}": group["chart"] for group in groups})
    view = token_view(analysis)
    if view is not None:
        tokens[f"{key}-tokens"] = view["data"]
    return {
        "key": key,
        "name": clean(analysis.name),
        "summary": summary(analysis, convergence),
        "target": _boundary(analysis),
        "remarks": remarks(analysis),
        "readings": _readings(analysis),
        "few": few_prompts(analysis.n_prompts),
        "positions": None if analysis.positions is None else positions_line(analysis.positions),
        "stages": _stages(analysis),
        "strip": [
            {"layer": n, "stage": stage, "mark": STAGE_LOOKS[stage].sign, "target": n == analysis.boundary_layer}
            for n, stage in enumerate(analysis.stages, start=1)
        ],
        "charts": own,
        "maps": maps,
        "rows": _layer_rows(analysis),
        "parts": _parts(analysis) if parts else None,
        "divergences": None if table is None else _divergences(table, analysis.additions["divergence_matrix"]),
        "convergence": _convergence_rows(convergence),
        "reading": convergence.reading,
        "reason": convergence.reason,
        "groups": groups,
        "tokens": view,
        "settings": settings_tables(analysis),
        "again": reproduce.analysis_commands(analysis),
    }


def summary(analysis: Analysis, convergence: Convergence) -> str:
    """Return what the analysis found in sentences that can be quoted."""
    chosen, name = analysis.selection, clean(analysis.name)
    responses, _, tokens = analysis.extent.partition(", ")
    size = f"{responses} ({tokens})"
    if chosen.boundary_layer is None:
        boundary = f"it has no boundary layer, for {chosen.reason}"
    else:
        boundary = f"its boundary layer is {chosen.boundary_layer}"
    boundary += f" ({chosen.agreement})"
    length = share_sentence(analysis.layers, analysis.selection)
    if length is not None and not undoes_length(analysis.layers, analysis.lens):
        boundary += f". {length[0].upper()}{length[1:]}"
    adverbs = {"progressive": "progressively", "abrupt": "abruptly", "mixed": "neither progressively nor abruptly"}
    falls = adverbs.get(convergence.reading)
    if falls is None:
        course = f"Whether its entropy converges progressively or abruptly cannot be said: {convergence.reason}."
    else:
        course = (
            f"Its entropy converges {falls}: half of the drop of {number(convergence.total_drop, '.2f')} nats has "
            f"fallen at depth {number(convergence.half_drop_depth, '.2f')}, and the last three layers take "
            f"{number(convergence.last_three_share, '.0%')} of it."
        )
    return f"{name} has {counted(analysis.n_layers, 'layer')}; on {size} {boundary}. {course}"


def _boundary(analysis: Analysis) -> dict[str, Any]:
    """Return the texts about the boundary layer by name."""
    chosen = analysis.selection
    runner_up = None
    if chosen.runner_up is not None:
        runner_up = f"layer {chosen.runner_up} ({number(chosen.runner_up_share, '.1%')} of the resamples)"
    agreed = chosen.agreement
    return {
        "layer": "none" if chosen.boundary_layer is None else str(chosen.boundary_layer),
        "answer": "none" if chosen.boundary_layer is None else f"layer {chosen.boundary_layer}",
        "agreement": f"{agreed[0].upper()}{agreed[1:]}",
        "confidence": None if chosen.confidence is None else of_resamples(chosen.confidence),
        "runner_up": runner_up or "none in any resample" if chosen.confidence is not None else "not known",
        "reason": chosen.reason,
    }


def _readings(analysis: Analysis) -> list[dict[str, Any]]:
    """Return the boundary layer under each reading of the data, and how many resamples give that of the analysis."""
    return [
        {
            "reading": phrase(row["reading"]),
            "layer": "none" if pd.isna(row["layer"]) else str(row["layer"]),
            "share": of_resamples(row["share"]),
            "same": row["layer"] == analysis.boundary_layer
            or (pd.isna(row["layer"]) and analysis.boundary_layer is None),
        }
        for row in analysis.selection.readings().to_dict("records")
    ]


def _stages(analysis: Analysis) -> list[dict[str, str]]:
    """Return each stage with its mark and its layers."""
    rows = []
    for stage in STAGES:
        layers = [n for n, name in enumerate(analysis.stages, start=1) if name == stage]
        text = f"layer{'s' if len(layers) > 1 else ''} {_spans(layers)}" if layers else "no layer"
        rows.append({"stage": stage, "mark": STAGE_LOOKS[stage].sign, "layers": text})
    return rows


def _spans(layers: Sequence[int]) -> str:
    """Write rising layers as ranges: ``1–3, 5``."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _convergence_rows(convergence: Convergence) -> list[dict[str, str]]:
    """Return the convergence measures as rows of measure, value and interval."""
    sure = of_resamples(convergence.reading_share)
    measures = {
        "highest entropy at": (f"layer {convergence.peak_layer}", ""),
        "total drop": (f"{number(convergence.total_drop)} nats", interval(*convergence.total_drop_interval)),
        "half has fallen at depth": (number(convergence.half_drop_depth), interval(*convergence.half_drop_interval)),
        "share of the last three layers": (
            number(convergence.last_three_share, ".1%"),
            interval(*convergence.last_three_interval, ".1%"),
        ),
        "reading": (convergence.reading, f"{sure} of the resamples of the prompts" if sure != "-" else ""),
    }
    return [{"measure": name, "value": value, "interval": ends} for name, (value, ends) in measures.items()]


def _layer_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """Return a row for each layer: its stage, whether it is the boundary layer, and cells of value and interval."""
    columns = [("layer", "entropy_in", ".3f"), ("layer", "entropy_out", ".3f")]
    columns += [(site, "change", "+.3f") for site in SITES]
    table = analysis.layers.set_index(["site", "layer"])

    return [
        {
            "layer": layer,
            "stage": stage,
            "mark": STAGE_LOOKS[stage].sign,
            "target": layer == analysis.boundary_layer,
            "cells": [_cell(table, layer, *column) for column in columns],
        }
        for layer, stage in enumerate(analysis.stages, start=1)
    ]


def _groups(analysis: Analysis) -> list[dict[str, Any]]:
    """Return a chart and the rows of a table for each grouping of tokens that was measured on all responses."""
    shown = []
    for name in analysis.groupings:
        groups = analysis.by(name)
        rows = []
        for row in groups.summary.to_dict("records"):
            policy = groups.policy_entropy.set_index("group").loc[row["group"]]
            span = interval(row["difference_low"], row["difference_high"], "+.3f")
            rows.append(
                {
                    "group": row["group"],
                    "tokens": f"{row['n_tokens']} ({number(row['share'], '.1%')})",
                    "policy": {"value": number(policy["mean"]), "interval": interval(policy["low"], policy["high"])},
                    "change": {"value": number(row["change"], "+.3f"), "interval": ""},
                    "difference": {"value": number(row["difference"], "+.3f"), "interval": span},
                }
            )
        note = "; ".join(filter(None, (groups.note, groups.nothing_to_compare)))
        shown.append({"name": name, "note": note, "rows": rows, "chart": group_chart(groups)})
    return shown


def _cell(table: pd.DataFrame, layer: int, site: str, column: str, form: str) -> dict[str, str]:
    """Return a value and its interval as text; `table` is indexed by site and layer."""
    value, low, high = table.loc[(site, layer), [column, f"{column}_low", f"{column}_high"]]
    return {"value": number(value, form), "interval": interval(low, high, form)}


def _parts(analysis: Analysis) -> dict[str, Any]:
    """Return what the page says about direction and length: a sentence, and a row of cells for each layer."""
    columns = [
        *((site, name, "+.3f") for site in ("ffn", "attn") for name in PARTS.values()),
        *((site, "rms_out", "#.3g") for site in SITES),
    ]
    table = analysis.layers.set_index(["site", "layer"])
    sentence = length_sentence(analysis.layers, analysis.selection, analysis.lens)
    if sentence is None:
        sentence = f"the lens {analysis.lens} undoes the length of a state, so next to nothing of a change is length"
    return {
        "sentence": f"{sentence[0].upper()}{sentence[1:]}.",
        "rows": [
            {
                "layer": layer,
                "target": layer == analysis.boundary_layer,
                "cells": [_cell(table, layer, *column) for column in columns],
            }
            for layer in range(1, analysis.n_layers + 1)
        ],
    }


def _divergences(table: pd.DataFrame, matrix: pd.DataFrame) -> dict[str, Any]:
    """Return a row for each layer, and the divergences of all pairs of layers as rows of texts."""
    columns = (("kl_policy", ".3f"), ("kl_next", ".3f"), ("top1", ".1%"))
    rows = [
        {
            "layer": int(row["layer"]),
            "cells": [
                {"value": number(row[name], form), "interval": interval(row[f"{name}_low"], row[f"{name}_high"], form)}
                for name, form in columns
            ],
        }
        for row in table.sort_values("layer").to_dict("records")
    ]
    values = matrix.pivot_table(index="layer", columns="other", values="kl")
    pairs = [
        {"layer": int(layer), "cells": [number(value, ".2f") for value in values.loc[layer]]} for layer in values.index
    ]
    return {"rows": rows, "pairs": pairs}


def token_view(analysis: Analysis) -> dict[str, Any] | None:
    """Pack the values of the kept responses, so that a page of thousands of tokens stays quick; None if there are none.

    Returns:
        `data` for the page's script, with thousandths of a nat as little-endian 16-bit numbers in base64: [site,
        quantity, layer, token] with the quantities entropy and change, then the entropy of pi_theta [token]; and for
        the template `notes`, the number of `layers` and the one to `start` with.
    """
    table = analysis.tokens
    if table.empty:
        return None
    kept = sorted(int(r) for r in table["response"].unique())
    room = MAX_VALUES // (len(SITES) * 2 * analysis.n_layers + 1)
    shown, cut, left_out = [], 0, 0
    for response in kept:
        rows = table[table["response"] == response]
        size = int(rows["token"].nunique())
        take = min(size, MAX_TOKENS, room)
        if take < 1:
            left_out += 1
            continue
        room -= take
        cut += take < size
        shown.append(_response(analysis, rows, response, take, size))
    notes = []
    if cut:
        what = "response is" if cut == 1 else "responses are"
        notes.append(f"{cut} {what} cut after {MAX_TOKENS} tokens or fewer, so that this page stays quick.")
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
    return {"data": {**data, "start": start}, "notes": notes, "layers": analysis.n_layers, "start": start}


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
    """Return a prompt, which may be a text, a chat or unknown, as text; a very long one is cut."""
    if isinstance(value, str):
        text = value
    elif value is None or isinstance(value, float):
        text = ""
    else:
        text = "\n\n".join(f"{message.get('role') or ''}: {message.get('content') or ''}" for message in value)
    return clean(text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} […]")
