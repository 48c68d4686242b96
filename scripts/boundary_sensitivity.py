"""Draw how the boundary layer depends on the two constants of its rule: `python scripts/boundary_sensitivity.py`.

The curves have the shape of the paper's models, or are measured on the embedded models. The figure of docs/method.md is
written to docs/assets, and the ranges that the page quotes are printed. It takes half a minute on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internal_policy import Analysis, analyze
from internal_policy.analysis.layer_selection import STDERRS, THRESHOLD, classify
from internal_policy.plotting.style import FEED_FORWARD, NEUTRAL, TWO_COLUMNS, paper_style
from internal_policy.statistics import Floats, Ints

PAGE = Path(__file__).parents[1] / "docs" / "assets" / "boundary_sensitivity.png"
THRESHOLDS = np.round(np.arange(0.0, 0.5001, 0.0025), 4)
ERRORS = np.round(np.arange(0.0, 5.0001, 0.025), 4)
SEEDS = 2000


@dataclass(frozen=True)
class Case:
    """A curve of dH_FFN [L] and its standard errors [L], nats."""

    name: str
    curve: Floats
    stderr: Floats

    def layers(self, threshold: float = THRESHOLD, stderrs: float = STDERRS) -> int:
        """The boundary layer under these constants, 0 if there is none."""
        return int(classify(self.curve[None], self.stderr, threshold=threshold, stderrs=stderrs)[1][0])

    def hits(self, threshold: float) -> float:
        """The share of curves with normal noise of the size of the errors that give the same layer."""
        noise = self.stderr * np.random.default_rng(0).standard_normal((SEEDS, self.curve.size))
        return float(np.mean(classify(self.curve + noise, self.stderr, threshold=threshold)[1] == self.layers()))


def paper_shaped() -> list[Case]:
    """Curves of the shape that the paper's figure 3 and section 3.2 describe, with errors."""

    def case(name: str, stderr: float, *parts: Floats | list[float]) -> Case:
        curve = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
        return Case(name, curve, np.full(curve.size, stderr))

    fall = -np.linspace(0.3, 3.0, 10)
    deep = -np.linspace(0.5, 8.0, 21)
    return [
        case("Qwen3: 3 to 0.5, then 0.1", 0.06, np.linspace(3.0, 0.5, 6), np.full(20, 0.1), fall),
        case("Qwen3: 3 to 0.5, then 0", 0.06, np.linspace(3.0, 0.5, 6), np.zeros(20), fall),
        case("Llama-3.2-3B", 0.04, np.full(27, 0.1), [-5.0]),
        case("OctoThinker-3B", 0.01, np.full(26, 0.1), [0.0, -5.0]),
        case("OctoThinker-8B", 0.03, np.full(30, 0.1), [-0.2, -10.0]),
        case("0.6, then 0.02, then deep", 0.05, np.full(4, 0.6), np.full(5, 0.02), deep),
        case("DeepSeek-Math: 0.03 ± 0.1", 0.1, np.full(15, 0.03), -np.linspace(1.0, 4.0, 15)),
        case("never turns", 0.03, np.full(28, 0.1)),
    ]


def embedded() -> list[Case]:
    """Curves of the embedded models on 64 responses: as measured, by direction alone, and under the logit lens."""
    cases = []
    for model in ("testbed/qwen3", "testbed/llama"):
        for lens in ("policy", "logit-lens"):
            analysis = analyze(model, max_responses=64, lens=lens)
            cases.append(measured(analysis, model if lens == "policy" else f"{model}, {lens}", "change"))
            if lens == "policy":
                cases.append(measured(analysis, f"{model}, direction", "change_direction"))
    return cases


def measured(analysis: Analysis, name: str, quantity: str) -> Case:
    """A curve of an analysis."""
    return Case(name, *(analysis.curve("ffn", quantity + end).to_numpy(dtype=np.float64) for end in ("", "_stderr")))


def common_range(cases: list[Case], values: Floats, chosen: float, constant: str) -> tuple[float, float]:
    """The range around the chosen value in which every case has the same boundary layer."""
    same = np.array([all(c.layers(**{constant: v}) == c.layers() for c in cases) for v in values])
    at = int(np.abs(values - chosen).argmin())
    low = at - int(np.argmin(np.append(same[at::-1], False))) + 1
    high = at + int(np.argmin(np.append(same[at:], False))) - 1
    return float(values[low]), float(values[high])


def draw(axes: Axes, cases: list[Case], values: Floats, chosen: float, constant: str) -> None:
    """Draw a row for each case, divided where its boundary layer changes; the layer is written into each part."""
    for row, case in enumerate(cases):
        layers: Ints = np.array([case.layers(**{constant: value}) for value in values])
        starts = np.flatnonzero(np.diff(layers, prepend=-1))
        ends = np.append(starts[1:], values.size - 1)
        for start, end in zip(starts, ends, strict=True):
            left, right = values[start], values[end]
            same = layers[start] == case.layers()
            colour = FEED_FORWARD if same else NEUTRAL
            axes.barh(row, right - left, left=left, height=0.8, color=colour, alpha=0.75 if same else 0.3, linewidth=0)
            axes.vlines(right, row - 0.4, row + 0.4, color="white", linewidth=0.6)
            if right - left > 0.045 * values[-1]:
                text = str(layers[start]) if layers[start] else "none"
                colour = "white" if same else "black"
                axes.text((left + right) / 2, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    axes.axvline(chosen, color="black", linewidth=0.8, linestyle=(0, (4, 1.2)))
    axes.set_xlim(values[0], values[-1])
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)


def main() -> None:
    """Draw the figure and print the ranges."""
    paper, own = paper_shaped(), embedded()
    cases = [*paper, *own]
    constants = (
        ("threshold", THRESHOLDS, THRESHOLD, "About zero: below this share of the exploration level"),
        ("stderrs", ERRORS, STDERRS, "Standard errors that an exploration needs"),
    )
    with paper_style():
        figure = Figure(figsize=(TWO_COLUMNS, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (constant, values, chosen, label) in zip(panels, constants, strict=True):
            draw(axes, cases, values, chosen, constant)
            axes.set_xlabel(label)
        panels[0].set_yticks(range(len(cases)), [case.name for case in cases])
        figure.savefig(PAGE, dpi=200, metadata={"Software": None})
    for constant, values, chosen, _ in constants:
        print(constant, "all:", common_range(cases, values, chosen, constant))
        for case in cases:
            print(f"  {case.name}: {case.layers() or 'none'} in", common_range([case], values, chosen, constant))
    for threshold in (0.15, THRESHOLD, 0.25):
        print(threshold, "under noise:", ", ".join(f"{case.name} {case.hits(threshold):.3f}" for case in cases))


if __name__ == "__main__":
    main()
