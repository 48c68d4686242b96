"""Made analyses to draw, and what a figure shows once it is laid out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg

from internal_policy.plotting import style


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
    n_parameters: int | None = None


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


def make_set(n_models):
    return [make_analysis(*row, seed=seed) for seed, row in enumerate(NAMES[:n_models])]


def lay_out(figure):
    """Place everything as in the PNG, at half the cost of drawing it."""
    with style.paper_style():
        figure.set_dpi(mpl.rcParams["savefig.dpi"])
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.get_layout_engine().execute(figure)
        # A legend places its entries only as it is drawn.
        for legend in figure.legends:
            legend.draw(renderer)


def text_boxes(figure):
    """Names, boxes [N, 4] in pixels (x0, y0, x1, y1) of every text that shows."""
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
