"""Ablations and results of patching for figures and storage, made without a model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd

from internal_policy import Ablation, Patching
from internal_policy.interventions import tables
from internal_policy.interventions.changes import Change, Intervention


def make_ablation(n_layers=8, sites=("attn", "ffn"), hows=("zero",), heads=0, samples=False, name="some/model", seed=0):
    """An ablation of twelve responses to six prompts; with heads of the attention only."""
    rng = np.random.default_rng(seed)
    parts = range(1, heads + 1) if heads else [None]
    own = ("attn",) if heads else sites
    rows = itertools.product(range(1, n_layers + 1), hows, own, parts)
    keys = pd.DataFrame([{"layer": layer, "site": s, "head": h, "how": how} for layer, how, s, h in rows])
    keys = keys if heads else keys.drop(columns="head")
    changed = rng.normal(0, 1, (12, len(keys), len(tables.QUANTITIES)))
    changed[:, :, 0] = np.abs(changed[:, :, 0])
    changed[:, :, 3] = rng.random((12, len(keys)))
    prompts, n_tokens = np.arange(12) // 2, rng.integers(5, 40, 12)
    responses = tables.response_effects(keys, changed, rng.random((12, 2)), prompts, n_tokens)
    table, clean, sampled = tables.effect_table(responses), tables.clean_means(responses), None
    if samples:
        cells = list(itertools.product(range(len(keys) + 1), range(6), range(4)))
        sampled = pd.DataFrame(cells, columns=["intervention", "prompt", "sample"])
        sampled = sampled.assign(response="=1", score=rng.integers(0, 2, len(cells)).astype(float), n_tokens=3)
        sampled["truncated"] = False
        rates = tables.accuracy_table(sampled)
        clean |= {column: float(rates[column].iloc[0]) for column in rates if "change" not in column}
        table = pd.concat([table, rates.iloc[1:].reset_index(drop=True)], axis=1)
    sequences = pd.DataFrame({"prompt": "+a", "response": "007", "input_ids": [[1, 2]] * 12, "prompt_length": 1})
    return Ablation(
        name=name,
        model={"layers": n_layers},
        config={"sites": ",".join(own), "how": ",".join(hows), "alpha": 0.5 if "scale" in hows else None},
        table=table,
        responses=responses,
        sequences=sequences,
        clean=clean,
        samples=sampled,
    )


def make_together(layers, sites=("attn", "ffn"), hows=("zero",), heads=None, name="some/model"):
    """An ablation that changes all of its layers, and of these the heads if there are any, at once."""
    own = ("attn",) if heads else sites
    changes = [(layer, site, head) for layer in layers for site in own for head in heads or [None]]
    interventions = [Intervention(tuple(Change(n, site, how, head=head) for n, site, head in changes)) for how in hows]
    one = make_ablation(n_layers=1, sites=("attn",), hows=hows, name=name)
    keys = tables.key_table(interventions)
    table = pd.concat([keys, one.table.drop(columns=one.keys)], axis=1)
    config = {**one.config, "layers": ",".join(map(str, layers))}
    return replace(one, table=table, config=config)


def make_patching(n_layers=8, n_tokens=16, words=("a", "=", "22", ","), seed=0):
    """A result whose third token differs between the prompts."""
    rng = np.random.default_rng(seed)
    rows = itertools.product(range(1, n_layers + 1), ("layer", "attn", "ffn"), range(1, n_tokens + 1))
    values = pd.DataFrame(rows, columns=["layer", "site", "position"])
    values["value"] = rng.normal(0, 4, len(values))
    values["recovery"] = (values["value"] + 4) / 8
    clean = [words[i % len(words)] for i in range(n_tokens)]
    tokens = pd.DataFrame({"position": range(1, n_tokens + 1), "clean_id": range(n_tokens), "clean_token": clean})
    tokens = tokens.assign(corrupted_id=tokens["clean_id"], corrupted_token=clean)
    tokens.loc[2, ["corrupted_id", "corrupted_token"]] = [99, "21"]
    metric = {"name": "logit-difference", "clean": 4.0, "corrupted": -4.0, "answer_id": 1, "answer_token": "22"}
    metric |= {"wrong_id": 2, "wrong_token": "21"}
    return Patching("some/model", {"layers": n_layers}, {"clean": "a"}, metric, tokens, values)
