"""Synthetic analyses, runs and inspections for figures, and checks of laid-out figures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg

from internal_policy import Inspection, select_layer
from internal_policy.analysis.layer_selection import DIRECTION
from internal_policy.plotting import style

VOCAB = 151_936
ODD = ["$_^", "$x$", "中文", "😀", "⏎⏎", "·the", "שלום", "\\frac{", "W" * 30, "a_b^c", "<E4B8>", "◌\u0301", "%d", "[b]"]


@dataclass(frozen=True)
class FakeAnalysis:
    name: str
    layers: pd.DataFrame
    n_layers: int
    vocab_size: int
    boundary_layer: int | None
    stages: tuple[str, ...]
    lens: str = "policy"
    policy_entropy: dict = field(default_factory=lambda: {"mean": 0.31, "stderr": 0.04})
    baseline: pd.DataFrame | None = None
    groupings: tuple[str, ...] = ()
    n_parameters: int | None = None
    additions: dict = field(default_factory=dict)

    @property
    def selection(self):
        """What the figures read of a Selection: the boundary layer by direction alone."""
        rows = self.layers[self.layers["site"] == "ffn"].sort_values("layer")
        if rows.empty or "change_direction" not in rows:
            return SimpleNamespace(sensitivity={})
        errors = rows["change_direction_stderr"]
        found = select_layer(rows["change_direction"], stderr=None if errors.isna().any() else errors, resamples=1)
        return SimpleNamespace(sensitivity={DIRECTION: found.boundary_layer})


def make_analysis(name, n_layers, kind, vocab_size=151_936, stderr=1.0, lens="policy", boundary=None, seed=0):
    """An analysis shaped as the paper reports: kind is "qwen" (three stages) or "llama" (late collapse)."""
    rng = np.random.default_rng(seed)
    top, depth = math.log(vocab_size), np.arange(1, n_layers + 1) / n_layers
    if kind == "qwen":
        state = top * (1 - depth**1.6) + 0.3
        ffn = np.where(depth <= 1 / 6, 3 * (1 - 6 * depth) + 0.12, np.where(depth <= 26 / 36, 0.0, -9 * (depth - 0.7)))
        attn = 0.6 + 1.2 * np.exp(-8 * depth)
        stages = ["exploration" if d <= 1 / 6 else "integration" if d <= 26 / 36 else "convergence" for d in depth]
    else:
        state = top - np.maximum(0, np.arange(1, n_layers + 1) - (n_layers - 3)) / 3 * (top - 0.4) - 0.02
        ffn = np.where(depth < 1, 0.1, -2.0)
        attn = 0.1 * np.sin(7 * depth) + 0.05
        stages = ["exploration" if d < 1 else "convergence" for d in depth]
    scale = 0.05 * top / 12
    ffn, attn = ffn + rng.normal(0, scale / 3, n_layers), attn + rng.normal(0, scale / 3, n_layers)
    state = np.minimum(state, top - 0.005)
    before = np.array([top - 0.01, *state[:-1]])
    normed = np.maximum(0.8 * before, 0.4 - np.minimum(ffn, 0))
    parts = []
    for site, entropy_in, change, cosine in (
        ("layer", before, state - before, np.full(n_layers, np.nan)),
        ("attn", normed, attn, 0.3 * np.sin(5 * depth)),
        ("ffn", normed, ffn, -0.4 + 0.7 * depth),
    ):
        table = pd.DataFrame({"layer": np.arange(1, n_layers + 1), "site": site})
        out = np.clip(entropy_in + change, 0.05, top)
        for column, values in (
            ("entropy_in", entropy_in),
            ("entropy_out", out),
            ("change", change),
            ("change_direction", 0.4 * change),
            ("change_scale", 0.6 * change),
            ("cosine", cosine),
        ):
            error = scale * stderr * (0.5 + rng.random(n_layers))
            table[column], table[f"{column}_stderr"] = values, error
            # Intervals are longer on one side.
            table[f"{column}_low"], table[f"{column}_high"] = values - 1.8 * error, values + 2.2 * error
        parts.append(table.assign(n_tokens=1000))
    if boundary is None:
        boundary = next((i for i, s in enumerate(stages) if s != "exploration"), 0) or None
    return FakeAnalysis(
        name,
        pd.concat(parts, ignore_index=True),
        n_layers,
        vocab_size,
        boundary or None,
        tuple(stages),
        lens,
        {"mean": 0.31, "stderr": 0.04 * stderr, "low": 0.31 - 0.07 * stderr, "high": 0.31 + 0.09 * stderr},
    )


def with_parts(analysis, n_heads=32, bias=False, n_experts=0, shared=False, first_expert_layer=1, seed=0):
    """An analysis with tables of heads and, if there are any, of experts; random numbers of realistic sizes."""
    rng = np.random.default_rng(seed)
    top = math.log(analysis.vocab_size)

    def table(part, numbers, layers):
        frame = pd.DataFrame([(layer, number) for layer in layers for number in numbers], columns=["layer", part])
        n = len(frame)
        frame["n_tokens"] = 1000
        columns = {
            "entropy": top - rng.gamma(1.0, 0.4, n),
            "rms": rng.gamma(3.0, 0.05, n),
            "cosine": rng.normal(0, 0.1, n),
            "attribution": rng.standard_t(3, n) * 0.05,
        }
        if part == "expert":
            load = rng.gamma(2.0, 1.0, n)
            columns = {"load": load / load.sum() * 8 * len(layers), "weight": rng.uniform(0.05, 0.3, n), **columns}
        for name, values in columns.items():
            error = 0.05 * np.abs(values)
            frame[name], frame[f"{name}_stderr"] = values, error
            frame[f"{name}_low"], frame[f"{name}_high"] = values - 2 * error, values + 2 * error
        return frame

    layers = range(1, analysis.n_layers + 1)
    heads = [*([0] if bias else []), *range(1, n_heads + 1)]
    additions = {"heads": table("head", heads, layers)}
    if n_experts:
        experts = [*([0] if shared else []), *range(1, n_experts + 1)]
        additions["experts"] = table("expert", experts, range(first_expert_layer, analysis.n_layers + 1))
        additions["experts"].loc[additions["experts"]["expert"] == 0, "load"] = 1.0
    return replace(analysis, additions=additions)


NAMES = (
    ("Qwen/Qwen3-4B", 36, "qwen"),
    ("meta-llama/Llama-3.2-3B-Instruct", 28, "llama"),
    ("Qwen/Qwen3-14B", 40, "qwen"),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 28, "qwen"),
    ("testbed/qwen3", 8, "qwen"),
    ("testbed/llama", 12, "llama"),
    ("OctoThinker/OctoThinker-3B-Long-Base", 28, "llama"),
    ("Qwen/Qwen3-4B-Instruct-2507", 36, "qwen"),
    ("meta-llama/Llama-3.1-8B-Instruct", 32, "llama"),
    ("deepseek-ai/deepseek-math-7b-base", 30, "qwen"),
    ("Qwen/Qwen2.5-Math-7B", 28, "qwen"),
    ("OctoThinker/OctoThinker-8B-Long-Base", 32, "llama"),
)


def make_analyses(n_models):
    return [make_analysis(*row, seed=seed) for seed, row in enumerate(NAMES[:n_models])]


@dataclass(frozen=True)
class FakeRun:
    """What the figures read of a run."""

    name: str
    label: str
    method: str
    layer: int | None
    ipa_steps: int | None
    history: pd.DataFrame
    dynamics: pd.DataFrame = field(default_factory=pd.DataFrame)
    dynamics_layers: pd.DataFrame = field(default_factory=pd.DataFrame)
    setting: dict = field(default_factory=dict)


def make_run(
    label="BuPO, layer 6, 10 steps", steps=60, layer=6, n_layers=8, ipa_steps=10, seed=0, name="testbed/qwen3", every=2
):
    """A run shaped as the paper reports: KL falls, then rises; perplexity degrades; reward rises and saturates."""
    rng = np.random.default_rng([seed, len(label)])
    x = np.arange(1, steps + 1)
    speed = 1.0 + 0.3 * rng.standard_normal() + (0.3 if ipa_steps else 0)
    history = pd.DataFrame({"step": x, "phase": np.where(x <= (ipa_steps or 0), "ipa", "grpo")})
    history["reward"] = np.clip(
        0.25 + 0.55 * (1 - np.exp(-3 * speed * x / steps)) + 0.03 * rng.standard_normal(steps), 0, 1
    )
    history["policy_entropy"] = 0.1 + 0.4 * np.exp(-2 * speed * x / steps) + 0.015 * rng.standard_normal(steps)
    history["length"] = 900 + 900 * (x / steps) ** 0.7 * speed + 40 * rng.standard_normal(steps)
    if layer is None:
        return FakeRun(name, label, "grpo", None, 0, history)
    at = np.unique([*range(0, steps + 1, every), steps])
    u = at / max(ipa_steps or 1, 1)
    kl = 1 - 0.35 * u * np.exp(1 - 1.6 * u) + 0.1 * np.maximum(u - 1, 0) ** 0.5
    later = np.arange(layer + 1, n_layers + 1)
    depth = (later - layer) / (n_layers - layer + 1e-9)
    grid = pd.DataFrame(
        {
            "step": np.repeat(at, len(later)),
            "layer": np.tile(later, len(at)),
            "cosine": (np.exp(-1.6 * depth)[None, :] ** (1 - 0.2 * np.minimum(u, 1))[:, None]).ravel(),
            "kl": (kl[:, None] * (0.4 + 7 * depth**2)[None, :]).ravel(),
        }
    )
    log_perplexity = 0.3 + 0.04 * np.minimum(u, 3) ** 2 + 0.002 * rng.standard_normal(len(at))
    dynamics = pd.DataFrame(
        {
            "step": at,
            "phase": np.where(at <= (ipa_steps or 0), "ipa", "grpo"),
            "layer": layer,
            "change": -0.05 + 0.3 * (1 - np.exp(-u)),
            "entropy": 4.0,
            "policy_entropy": 0.4,
            "log_perplexity": log_perplexity,
            "log_perplexity_stderr": 0.02,
            "perplexity": np.exp(log_perplexity),
            "kl_mean": kl * (0.4 + 7 * depth**2).mean() if len(later) else kl,
            "policy_kl": 9 * kl,
        }
    )
    return FakeRun(name, label, "bupo", layer, ipa_steps, history, dynamics, grid)


def make_inspection(n_layers=8, n_tokens=40, prompt=20, words=ODD, lens="policy", seed=0):
    """An inspection of random numbers, with the columns that a real one has."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(words), n_tokens)
    rows = [
        (position, layer, site)
        for position in range(1, n_tokens + 1)
        for layer in range(n_layers + 1)
        for site in (
            ("layer",) if layer == 0 else ("layer", "attn", "ffn", *(("policy",) if layer == n_layers else ()))
        )
    ]
    frame = pd.DataFrame(rows, columns=["position", "layer", "site"])
    frame["entropy"] = rng.uniform(0, math.log(VOCAB), len(frame)).astype(np.float32)
    frame["next_id"] = pd.array([ids[p] if p < n_tokens else pd.NA for p in frame["position"]], dtype="Int64")
    frame["top1_id"] = rng.integers(0, len(words), len(frame))
    frame["top1_token"] = [words[i] for i in frame["top1_id"]]
    frame["top1_probability"] = rng.uniform(0, 1, len(frame))
    tokens = pd.DataFrame(
        {
            "position": range(1, n_tokens + 1),
            "part": ["prompt" if i < prompt else "response" for i in range(n_tokens)],
            "id": ids,
            "token": [words[i] for i in ids],
        }
    )
    config = {"lens": lens, "top_k": 1}
    return Inspection("some/$model_1", {"layers": n_layers, "vocabulary": VOCAB}, config, tokens, frame)


def lay_out(figure):
    """Place everything as in the PNG, at half the cost of drawing it."""
    with style.paper_style():
        figure.set_dpi(mpl.rcParams["savefig.dpi"])
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.get_layout_engine().execute(figure)
        for ax in figure.axes:
            # A colour bar gets its width only when it is drawn.
            ax.apply_aspect()
        # A legend places its entries only when it is drawn.
        for legend in figure.legends:
            legend.draw(renderer)


def text_boxes(figure):
    """Names, boxes [N, 4] in pixels (x0, y0, x1, y1) of every visible text."""
    lay_out(figure)
    texts = [*figure.texts, *[t for legend in figure.legends for t in legend.get_texts()]]
    texts += [text for text in (figure._supxlabel, figure._supylabel) if text is not None]
    for ax in figure.axes:
        texts += [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts]
        for k, axis in enumerate((ax.xaxis, ax.yaxis)):
            low, high = sorted(axis.get_view_interval())
            texts += [label for label in axis.get_majorticklabels() if low <= label.get_position()[k] <= high]
    texts = list({id(t): t for t in texts if t.get_visible() and t.get_text()}.values())
    return [t.get_text() for t in texts], np.array([t.get_window_extent().extents for t in texts])


def assert_legible(figure):
    names, boxes = text_boxes(figure)
    low, high = boxes[:, None, :2], boxes[:, None, 2:]
    shared = np.minimum(high, high.swapaxes(0, 1)) - np.maximum(low, low.swapaxes(0, 1))
    clashes = [(names[i], names[j]) for i, j in np.argwhere((shared > 0.5).all(-1)) if i < j]
    assert not clashes
    outside = (boxes[:, :2] < -0.5).any(1) | (boxes[:, 2:] > np.array(figure.bbox.size) + 0.5).any(1)
    assert not [name for name, out in zip(names, outside, strict=True) if out]
    for ax in figure.axes:
        assert not any(legend.get_window_extent().overlaps(ax.bbox) for legend in figure.legends)


def drawn(ax, label):
    line = next(line for line in ax.lines if line.get_label() == label)
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def band(ax):
    """Lower and upper edges [n] of the bands of a panel, in the order they were drawn."""
    edges = []
    for collection in ax.collections:
        vertices = pd.DataFrame(collection.get_paths()[0].vertices, columns=["x", "y"]).groupby("x")["y"]
        edges.append((vertices.min().to_numpy(), vertices.max().to_numpy()))
    return edges
