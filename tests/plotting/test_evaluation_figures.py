"""Figures 6 and 15: drawn values, legibility and reproducible bytes."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_evaluations import evaluation_of_counts, exact

from internal_policy import UserError
from internal_policy.plotting import evaluation as drawing
from internal_policy.plotting import style

BENCHMARKS = ("amc23", "math500", "aime24", "aime25")
KS = (1, 4, 16, 64, 256)


def model(name, benchmark="math500", ability=0.0, ks=KS, n=300, problems=12):
    rng = np.random.default_rng(len(benchmark))
    rates = 1 / (1 + np.exp(-(rng.normal(-1, 2, problems) + ability)))
    return evaluation_of_counts(np.random.default_rng(0).binomial(n, rates), n=n, name=name, benchmark=benchmark, ks=ks)


def lines_of(ax):
    return {line.get_label(): line for line in ax.get_lines()}


def test_the_numbers_are_those_of_the_evaluations():
    one, other = model("x/one"), model("x/other", ability=1)
    frame = drawing.pass_at_k_data([one, other])
    assert list(dict.fromkeys(frame["model"])) == ["one", "other"]
    for e, name in ((one, "one"), (other, "other")):
        rows = frame[frame["model"] == name]
        counts = e.problems["correct"]
        assert list(rows["value"]) == pytest.approx([np.mean([exact(300, int(c), k) for c in counts]) for k in KS])
        assert (rows["low"] < rows["value"]).all()
        assert (rows["value"] <= rows["high"]).all()


def test_the_average_uses_shared_benchmarks_and_k():
    short = (1, 4, 16)
    both = [
        model(m, b, a, short if b == "amc23" else KS) for m, a in (("a", 0), ("b", 1)) for b in ("amc23", "math500")
    ]
    alone = model("a", "aime24")
    frame = drawing.pass_at_k_data([*both, alone])
    average = frame[(frame["benchmark"] == "Average") & (frame["model"] == "a")]
    assert list(average["k"]) == list(short)
    parts = [e.pass_at_k.set_index("k").loc[list(short)] for e in both[:2]]
    np.testing.assert_allclose(average["value"], (parts[0]["value"] + parts[1]["value"]) / 2)
    half = np.hypot(*(p["high"] - p["value"] for p in parts)) / 2
    np.testing.assert_allclose(average["high"] - average["value"], half)


@pytest.mark.parametrize(("n", "least"), [(30, 27), pytest.param(150, 137, marks=pytest.mark.slow)])
def test_the_averages_interval_covers_the_truth(n, least):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(n):
        pair = [
            evaluation_of_counts(rng.binomial(16, rng.beta(*s, size=40)), name="a", benchmark=b, ks=(1,))
            for b, s in (("x", (1, 3)), ("y", (2, 1)))
        ]
        row = drawing.pass_at_k_data(pair).query("benchmark == 'Average' and k == 1").iloc[0]
        inside += row["low"] <= (1 / 4 + 2 / 3) / 2 <= row["high"]
    assert inside >= least


def test_lines_have_the_values_on_a_log2_axis():
    two = [model("a"), model("b", ability=1)]
    figure = drawing.pass_at_k(two)
    (ax,) = figure.axes
    frame = drawing.pass_at_k_data(two)
    for name in ("a", "b"):
        line = lines_of(ax)[name]
        rows = frame[frame["model"] == name]
        np.testing.assert_array_equal(line.get_xdata(), rows["k"])
        np.testing.assert_array_equal(line.get_ydata(), rows["value"])
    assert ax.get_xscale() == "log"
    figure.draw_without_rendering()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "4", "16", "64", "256"]
    assert len({(line.get_color(), line.get_marker()) for line in lines_of(ax).values()}) == 2


def test_a_single_evaluation_with_custom_labels_and_colours():
    one, other = model("x/a"), model("x/b", ability=1)
    assert list(lines_of(drawing.pass_at_k(one).axes[0])) == ["a"]
    lines = lines_of(drawing.pass_at_k([one, other], label=["start", "trained"], color=["red", "k"]).axes[0])
    assert {name: line.get_color() for name, line in lines.items()} == {"start": "red", "trained": "k"}
    with pytest.raises(UserError, match="got 1 labels for 2 evaluations"):
        drawing.pass_at_k_by_benchmark([one, other], label=["start"])


def test_figures_draw_on_given_evaluation_axes():
    figure = Figure()
    axes = figure.subplots(1, 3)
    both = [model(m, b) for m in "ab" for b in ("amc23", "math500")]
    assert drawing.plot_pass_at_k(both, axes[0], benchmark="amc23") is axes[0]
    assert drawing.pass_at_k_by_benchmark(both, ax=axes[1:]) is figure
    assert [ax.get_title() for ax in axes] == ["AMC23", "AMC23", "MATH500"]
    assert drawing.pass_at_k(both, ax=[axes[0]]) is figure
    assert axes[0].get_title() == "Average"


LONG = [
    f"/home/someone/experiments/qwen3-4b-instruct-2507-deepmath-5k-layer{i}-ipa30-seed0/checkpoint-300" for i in (6, 26)
]


NAMES = (["m"], ["a", "b"], [*LONG, "Qwen/Qwen3-4B-Instruct-2507", "deepseek-ai/R1-Distill"])
FIGURES = (drawing.pass_at_k, drawing.pass_at_k_by_benchmark)
FAST = (("m", 1, 0), ("a", 4, 1), (LONG[0], 1, 0))


@pytest.mark.parametrize(
    ("names", "benchmarks", "draw"),
    [
        pytest.param(n, BENCHMARKS[:b], draw, marks=() if (n[0], b, i) in FAST else pytest.mark.slow)
        for n in NAMES
        for b in (1, len(BENCHMARKS))
        for i, draw in enumerate(FIGURES)
    ],
)
def test_no_text_is_clipped_or_hidden(names, benchmarks, draw):
    figure = draw([model(m, b, i / 2) for i, m in enumerate(names) for b in benchmarks])
    figure.draw_without_rendering()
    page = figure.bbox
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    shown = []
    for text in texts:
        box = text.get_window_extent()
        # matplotlib keeps tick labels beyond the axis' ends, unseen.
        if text.axes is not None and text in text.axes.get_xticklabels() + text.axes.get_yticklabels():
            ends = text.axes.bbox.padded(1)
            inside = ends.x0 <= (box.x0 + box.x1) / 2 <= ends.x1 or ends.y0 <= (box.y0 + box.y1) / 2 <= ends.y1
            if not inside:
                continue
        assert page.x0 <= box.x0, text
        assert box.x1 <= page.x1, text
        assert page.y0 <= box.y0, text
        assert box.y1 <= page.y1, text
        shown.append((text, box.padded(-0.5)))
    for i, (text, box) in enumerate(shown):
        for other, its in shown[i + 1 :]:
            assert not box.overlaps(its), (text, other)
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(set(legend)) == len(names) + 1, "each model is told from the others"


def test_a_single_k_and_a_single_problem_can_be_drawn():
    drawing.pass_at_k_by_benchmark(evaluation_of_counts([3], n=4)).draw_without_rendering()
    (ax,) = drawing.pass_at_k([evaluation_of_counts([1, 0, 1], n=1)]).axes
    assert ax.collections, "a single K has an error bar in place of a band"


@pytest.mark.slow
def test_the_same_evaluations_give_the_same_bytes(tmp_path):
    both = [model("a", b) for b in ("amc23", "math500")]
    one, other = (drawing.save_evaluation_figures(both, tmp_path / name) for name in "xy")
    assert [p.name for p in one] == [
        f"{stem}.{kind}" for stem in ("fig6_pass_at_k", "fig15_pass_at_k_by_benchmark") for kind in ("png", "pdf")
    ]
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in other]


def test_incompatible_evaluations_are_refused():
    with pytest.raises(UserError, match="no evaluation"):
        drawing.pass_at_k([])
    with pytest.raises(UserError, match="other problems called math500"):
        drawing.pass_at_k([model("a"), model("b", problems=11)])
    with pytest.raises(UserError, match="given twice on math500"):
        drawing.pass_at_k([model("a"), model("a")])
    with pytest.raises(UserError, match="no average"):
        drawing.pass_at_k([model("a", "amc23"), model("b", "math500")])
    with pytest.raises(UserError, match="no model was evaluated on AIME24"):
        drawing.plot_pass_at_k([model("a")], benchmark="aime24")
    assert len(drawing.pass_at_k_by_benchmark([model("a", b) for b in BENCHMARKS]).axes) == style.MAX_COLUMNS
