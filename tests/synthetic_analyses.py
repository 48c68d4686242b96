"""Synthetic analyses with the entropy curves of the paper and per-response values, so that intervals are realistic."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd

from internal_policy import statistics
from internal_policy.analysis.layer_selection import select_layer
from internal_policy.analysis.results import Analysis


def abrupt(n_layers=28, vocab=128_256, falls=3, early=0.0):
    """H^0..H^L of a Llama: near ln V, then to almost nothing over the last layers; `early` nats are lost before."""
    top, layers = math.log(vocab) - 0.1, np.arange(n_layers + 1)
    start = n_layers - falls
    return top - early * np.minimum(layers / start, 1) - np.maximum(layers - start, 0) / falls * (top - early - 0.3)


def progressive(n_layers=36, vocab=151_936, power=1.6, start=0.0, rise=0.0):
    """H^0..H^L of a Qwen: falls over the layers from relative depth `start` on; `rise` nats are gained first."""
    top, depth = math.log(vocab) - 0.1, np.arange(n_layers + 1) / n_layers
    fall = np.clip((depth - start) / (1 - start), 0, 1) ** power
    gained = -rise * np.clip(1 - depth / max(start, 1e-9), 0, 1) if rise else 0.0
    return top - (top - 0.2) * fall + gained


def stream(curve, *, prompts=12, noise=0.0, shared=0.0, seed=0):
    """The parts of an analysis that `measure_convergence` reads, with responses of equal length."""
    curve = np.asarray(curve, dtype=float)
    n_layers, draw = len(curve) - 1, np.random.default_rng(seed)
    states = curve + shared * draw.normal(size=(prompts, 1)) + noise * draw.normal(size=(prompts, n_layers + 1))
    rows = {
        "response": np.repeat(np.arange(prompts), n_layers),
        "prompt": np.repeat(np.arange(prompts), n_layers),
        "n_tokens": 10,
        "layer": np.tile(np.arange(1, n_layers + 1), prompts),
        "site": "layer",
        "entropy_in": states[:, :-1].ravel(),
        "entropy_out": states[:, 1:].ravel(),
    }
    return SimpleNamespace(name="stream", responses=pd.DataFrame(rows))


def layer_table(parts, tokens, prompts):
    """`statistics.layer_table` in one go, for responses that are complete and in order."""
    names, n = list(statistics.QUANTITIES), len(tokens)
    # All sites at once: [G, sites, L, quantities].
    values = np.stack([part[names].to_numpy().reshape(n, -1, len(names)) for part in parts], axis=1)
    flat = values.reshape(n, -1)
    ends = (*statistics.clustered_mean(flat, tokens, prompts), *statistics.confidence_interval(flat, tokens, prompts))
    numbers = dict(zip(("", "_stderr", "_low", "_high"), (x.reshape(values.shape[1:]) for x in ends), strict=True))
    tables = []
    for place, part in enumerate(parts):
        columns = {f"{name}{end}": x[place, :, k] for k, name in enumerate(names) for end, x in numbers.items()}
        keys = {"layer": np.arange(1, values.shape[2] + 1), "site": part["site"].iloc[0]}
        tables.append(pd.DataFrame({**keys, **columns, "n_tokens": tokens.sum()}))
    return pd.concat(tables).sort_values("layer", kind="stable", ignore_index=True)


def make(
    curve,
    name="model",
    *,
    vocab=151_936,
    prompts=12,
    samples=1,
    noise=0.0,
    shared=0.0,
    seed=0,
    data_seed=0,
    lens="policy",
    path=None,
    **model,
):
    """An analysis with a given curve H^0..H^L.

    `noise` is of each response and layer in nats, drawn by `seed`; `shared` is of each prompt, drawn by `data_seed` as
    the responses themselves are, so that analyses with one data_seed are paired and share what makes a prompt hard.
    """
    curve = np.asarray(curve, dtype=float)
    n_layers, n = len(curve) - 1, prompts * samples
    data, own = np.random.default_rng(data_seed), np.random.default_rng(seed + 1000)
    prompt = np.repeat(np.arange(prompts), samples)
    tokens = data.integers(8, 60, n)
    ids = [[int(p), *data.integers(2, 1000, int(t)).tolist()] for p, t in zip(prompt, tokens, strict=True)]
    hard = shared * data.normal(size=prompts)[prompt]
    states = np.maximum(curve + hard[:, None] + noise * own.normal(size=(n, n_layers + 1)), 0.0)
    layers = np.tile(np.arange(1, n_layers + 1), n)
    depth = np.tile(np.arange(1, n_layers + 1) / n_layers, n)
    parts = []
    for site in ("layer", "attn", "ffn"):
        before, after = states[:, :-1].ravel(), states[:, 1:].ravel()
        if site != "layer":
            width = 1.0 if site == "attn" else 2.0
            before = 0.8 * before + 0.1
            after = (
                before
                + width * np.where(depth < 0.2, 1 - 4 * depth, -0.2 * depth)
                + 0.2 * noise * own.normal(size=depth.size)
            )
        # Outputs grow with depth, and half of what they change is length.
        length = 0.02 * 2 ** (6 * depth)
        parts.append(
            pd.DataFrame(
                {
                    "response": np.repeat(np.arange(n), n_layers),
                    "prompt": np.repeat(prompt, n_layers),
                    "n_tokens": np.repeat(tokens, n_layers),
                    "layer": layers,
                    "site": site,
                    "entropy_in": before,
                    "entropy_out": after,
                    "cosine": np.nan
                    if site == "layer"
                    else 0.3 * np.sin(5 * depth) + 0.02 * own.normal(size=depth.size),
                    "change": after - before,
                    "change_direction": 0.5 * (after - before),
                    "change_scale": 0.5 * (after - before),
                    "rms_in": 1.0,
                    "rms_out": length,
                }
            )
        )
    responses = pd.concat(parts, ignore_index=True)
    table = layer_table(parts, tokens, prompt)
    ffn = table[table["site"] == "ffn"]
    stderr = None if ffn["change_stderr"].isna().any() else ffn["change_stderr"]
    return Analysis(
        name=name,
        model={"id": name, "revision": None, "layers": n_layers, "vocabulary": vocab, "dtype": "float32", **model},
        config={"lens": lens, "responses": "given", "weights": f"w{seed}", "inputs": f"i{data_seed}"},
        layers=table,
        responses=responses,
        tokens=pd.DataFrame(),
        sequences=pd.DataFrame(
            {"prompt": [f"p{p}" for p in prompt], "response": "r", "input_ids": ids, "prompt_length": 1, "reward": None}
        ),
        policy_entropy={"mean": 0.3, "stderr": 0.02},
        selection=select_layer(ffn["change"], stderr=stderr, resamples=50),
        path=path,
    )


def training(n_steps=5, n_layers=36, moves=-0.02, name="run/checkpoint-{}", **options):
    """Checkpoints of one training on the same responses; layer l moves by `moves` * l / L nats a checkpoint."""
    base = progressive(n_layers)
    depth = np.arange(n_layers + 1) / n_layers
    return [
        make(base + moves * k * depth, name.format(10 * k), seed=k, **{"noise": 0.05, "shared": 0.3, **options})
        for k in range(n_steps)
    ]
