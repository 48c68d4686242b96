"""The figures of a comparison: drawn values, legibility and reproducibility."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from synthetic_analyses import abrupt, make, progressive, training

from internal_policy import UserError, compare
from internal_policy.comparison.figure_data import depth_data, difference_data, row_names, step_data
from internal_policy.plotting import comparison as figures
from internal_policy.plotting import style

LONG = "an-organisation-with-a-long-name/" + "a-model-with-an-even-longer-name-" * 3 + "{}"
NAMES = ("Qwen3-4B", "Llama-3.2-3B-Instruct", "DeepSeek-R1-Distill-Qwen-7B", "_hidden$name$", LONG.format("1"))


@cache
def comparison(kind):
    """Synthetic comparisons, from the smallest to the largest that the figures are made for."""
    if kind == "five checkpoints":
        return compare(training(5, 28, prompts=4))
    if kind == "thirty checkpoints":
        return compare(training(30, 12, prompts=3))
    if kind == "two long names, 80 layers":
        return compare([make(progressive(80), LONG.format(i), prompts=4, noise=0.1, seed=i) for i in range(2)])
    if kind == "two unnumbered, 3 layers":
        return compare([make(progressive(3, power=p), f"m/{p}", prompts=4, noise=0.1) for p in (1, 2)])
    if kind == "one prompt":
        return compare(training(2, 12, prompts=1))
    curves = [
        progressive(n, power=1 + 0.1 * n / 10) if n % 4 or n < 9 else abrupt(n) for n in (36, 28, 8, 3, 40, 32, 80, 12)
    ]
    names = [*NAMES, "a/b", "a/c", "a/d"]
    return compare(
        [
            make(c, n, prompts=4, noise=0.2, seed=i, data_seed=i, vocab=1000 * (i + 1))
            for i, (c, n) in enumerate(zip(curves, names, strict=True))
        ]
    )


KINDS = (
    *("five checkpoints", "thirty checkpoints", "two long names, 80 layers", "two unnumbered, 3 layers"),
    *("one prompt", "eight models"),
)


EVERY = ("heat_maps", "layer_lines", "layer_differences", "depth_overlay", "entropy_fall", "depth_differences")


def drawings(found, only=EVERY):
    """The figures that `save_comparison_figures` would write by name; None for those that are not to be drawn."""
    caught = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in set(EVERY) - set(only):
            patch.setattr(figures, name, lambda found: None)
        patch.setattr(figures.style, "save_figure", lambda figure, stem: caught.update({stem.name: figure}) or [])
        figures.save_comparison_figures(found, style.Path("x"))
    return {name.removeprefix("compare_"): figure for name, figure in caught.items()}


def lay_out(figure):
    with style.paper_style():
        figure.set_dpi(mpl.rcParams["savefig.dpi"])
        renderer = FigureCanvasAgg(figure).get_renderer()
        # The layout engine warns if the layout collapses; drawing everything would take twice as long.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.get_layout_engine().execute(figure)
            # Colour bars, labels and legends are placed only when they are drawn.
            for ax in figure.axes:
                locator = ax.get_axes_locator()
                ax.apply_aspect(locator(ax, renderer) if locator else None)
            for artist in (*figure.legends, *(axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis))):
                artist.draw(renderer)
    return renderer


def boxes(texts, renderer):
    shown = [t for t in texts if t.get_text().strip() and t.get_visible()]
    return [(t.get_text(), t.get_window_extent(renderer)) for t in shown]


# The larger ones have the same parts.
FAST = (("two unnumbered, 3 layers", ("heat_maps", "entropy_fall")),)


@pytest.mark.parametrize(
    ("kind", "only"), [*FAST, *(pytest.param(kind, EVERY, marks=pytest.mark.slow) for kind in KINDS)]
)
def test_all_text_is_legible(kind, only):
    for name, figure in drawings(comparison(kind), only).items():
        if figure is None:
            continue
        renderer = lay_out(figure)
        whole = figure.bbox.padded(1)
        outside = []
        for ax in figure.axes:
            low, high = sorted(ax.get_xlim())
            x_ticks = [t.label1 for t in ax.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
            low, high = sorted(ax.get_ylim())
            y_ticks = [t.label1 for t in ax.yaxis.get_major_ticks() if low <= t.get_loc() <= high]
            outside += boxes([ax.title, ax.xaxis.label, ax.yaxis.label, *x_ticks, *y_ticks], renderer)
            for ticks in (x_ticks, y_ticks):
                for (one, a), (other, b) in combinations(boxes(ticks, renderer), 2):
                    assert not a.padded(-0.5).overlaps(b.padded(-0.5)), (kind, name, one, other)
            assert ax.bbox.width > 5, (kind, name)
            assert ax.bbox.height > 0.5 * figure.dpi, (kind, name)
        for text, box in outside:
            assert whole.x0 <= box.x0, (kind, name, text)
            assert box.x1 <= whole.x1, (kind, name, text)
            assert whole.y0 <= box.y0, (kind, name, text)
            assert box.y1 <= whole.y1, (kind, name, text)
        for legend in figure.legends:
            frame = legend.get_window_extent(renderer)
            assert frame.x0 >= whole.x0, (kind, name)
            assert frame.x1 <= whole.x1, (kind, name)
            for ax in figure.axes:
                assert not frame.overlaps(ax.get_window_extent(renderer).padded(-1)), (kind, name)


def test_written_files_depend_on_the_available_data():
    kinds = ("five checkpoints", "two unnumbered, 3 layers", "eight models")
    stems = {kind: set(drawings(comparison(kind), only=())) for kind in kinds}
    always = {"depth_overlay", "entropy_fall"}
    every = always | {"heat_maps", "layer_lines", "layer_differences"}
    assert stems["five checkpoints"] == every
    # A line from one model to another would mean nothing.
    assert stems["two unnumbered, 3 layers"] == every - {"layer_lines"}
    assert stems["eight models"] == always | {"depth_differences"}


def test_every_model_is_named_and_names_are_not_parsed_as_math():
    (legend,) = figures.depth_overlay(comparison("eight models")).legends
    shown = [text.get_text().replace("\\$", "$").strip() for text in legend.get_texts()]
    for name in ("Qwen3-4B", "_hidden$name$", ["a", "d"][-1], "boundary layer", "95% interval"):
        assert name in shown
    assert len(shown) == 8 + 2


def test_heat_maps_show_the_numbers_and_diverge_from_zero():
    found = comparison("five checkpoints")
    figure = figures.heat_maps(found)
    maps = [ax for ax in figure.axes if ax.get_xlabel() == "Layer" or ax.get_title()]
    frame = step_data(found)
    for ax, name in zip(maps, figures.TITLES, strict=True):
        (mesh,) = ax.collections
        rows = frame[frame["map"] == name]
        drawn = np.asarray(mesh.get_array()).reshape(5, 28)
        np.testing.assert_array_equal(drawn, rows["value"].to_numpy().reshape(5, 28))
        low, high = mesh.get_clim()
        assert (low == 0.0) if name == "entropy" else (low == -high)
    assert [t.get_text() for t in maps[0].get_yticklabels()] == [f"update {k}" for k in (0, 10, 20, 30, 40)]
    baseline = frame[(frame["map"] == "entropy_difference") & (frame["label"] == "checkpoint-0")]
    assert (baseline["value"] == 0).all()
    raw = frame[(frame["map"] == "ffn") & (frame["label"] == "checkpoint-40")]["value"].to_numpy()
    start = frame[(frame["map"] == "ffn") & (frame["label"] == "checkpoint-0")]["value"].to_numpy()
    shown = frame[(frame["map"] == "ffn_difference") & (frame["label"] == "checkpoint-40")]["value"]
    np.testing.assert_allclose(shown, raw - start, rtol=1e-9, atol=1e-12)


def test_lines_draw_the_numbers_of_their_tables():
    found = comparison("five checkpoints")
    differences = difference_data(found)
    ax = figures.layer_differences(found).axes[0]
    drawn = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 28]
    expected = differences[differences["map"] == "entropy"]["difference"].to_numpy().reshape(4, 28)
    np.testing.assert_array_equal(drawn, expected)
    assert len(ax.collections) == 4
    depth = depth_data(found)
    ax = figures.depth_overlay(found).axes[1]
    drawn = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 29]
    np.testing.assert_array_equal(drawn, depth[depth["unit"] == "share"]["value"].to_numpy().reshape(5, 29))
    np.testing.assert_allclose(
        depth[depth["unit"] == "share"]["value"] * np.log(151_936), depth[depth["unit"] == "nats"]["value"]
    )
    steps = figures.layer_lines(found).axes[2]
    assert len([line for line in steps.lines if len(line.get_xdata()) == 5]) == 28


def test_half_drop_markers_match_the_measure():
    found = comparison("eight models")
    ax = figures.entropy_fall(found).axes[0]
    marks = sorted(c.lines[0].get_xdata()[0] for c in ax.containers)
    np.testing.assert_allclose(marks, sorted(found.convergence["half_drop_depth"]))
    assert all(c.lines[0].get_ydata()[0] == 0.5 for c in ax.containers)


def test_bands_are_drawn_only_where_intervals_are_known():
    assert not figures.layer_differences(comparison("one prompt")).axes[0].collections
    labels = [t.get_text() for t in figures.depth_overlay(comparison("one prompt")).legends[0].get_texts()]
    assert "95% interval" not in labels


def test_the_uniform_drop_line_starts_at_layer_one():
    found = comparison("two unnumbered, 3 layers")
    grey = [line for line in figures.entropy_fall(found).axes[0].lines if line.get_color() == style.NEUTRAL]
    ends = [list(line.get_xdata()) for line in grey if list(line.get_ydata()) == [0, 1]]
    assert ends == [[1 / 3, 1]]


def test_figures_draw_on_the_users_axes():
    found = comparison("five checkpoints")
    for draw, n in (
        *((figures.heat_maps, 6), (figures.layer_lines, 3), (figures.layer_differences, 3)),
        *((figures.depth_overlay, 2), (figures.entropy_fall, 2), (figures.depth_differences, 2)),
    ):
        figure = Figure()
        axes = [figure.add_subplot(1, n, k + 1) for k in range(n)]
        assert draw(found, ax=axes) is figure
        assert all(ax.has_data() for ax in axes)
        assert not figure.legends


def test_analyses_are_compared_implicitly_with_the_users_labels_and_colours():
    analyses = [make(progressive(4), name, prompts=2) for name in "ab"]
    found = compare(analyses)
    for given in (found, analyses):
        figure = figures.depth_overlay(given, label=["start", "trained"], color=["red", "k"])
        assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["start", "trained"]
        assert [line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) == 5] == ["red", "k"]
    named = figures.heat_maps(found, label=["start", "trained"], color="magma")
    assert [tick.get_text() for tick in named.axes[0].get_yticklabels()] == ["start", "trained"]
    assert named.axes[0].collections[0].get_cmap().name == "magma"
    assert named.axes[3].get_ylabel() == "Less start"
    with pytest.raises(UserError, match="needed are 2 that differ, one for each analysis"):
        figures.entropy_fall(found, label=["start"])
    with pytest.raises(UserError, match="'red' is no colour map of matplotlib"):
        figures.heat_maps(found, color="red")
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 2"):
        figures.depth_overlay(found, ax=Figure().subplots())


def test_maps_of_models_of_different_depth_are_refused():
    with pytest.raises(UserError, match="different numbers of layers"):
        figures.heat_maps(comparison("eight models"))


@pytest.mark.slow
def test_the_same_comparison_gives_the_same_bytes(tmp_path):
    found = comparison("two unnumbered, 3 layers")
    one, two = (style.save_figure(figures.heat_maps(found), tmp_path / name / "maps") for name in "ab")
    assert {p.suffix for p in one} == {".png", ".pdf"}
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))


@cache
def fourteen():
    return compare([make(progressive(6), f"m/{k}", prompts=2, noise=0.1, seed=k) for k in range(14)])


def test_many_analyses_have_the_numbers_of_the_table_in_every_figure():
    found = fourteen()
    for draw, first in ((figures.layer_differences, 2), (figures.depth_overlay, 1)):
        bar = draw(found).axes[-1]
        assert bar.get_ylabel() == "Analysis (as in boundaries.csv)"
        assert int(bar.get_yticklabels()[0].get_text()) == first
    assert list(found.boundaries["analysis"]) == list(range(1, 15))


def test_steps_differ_in_shade_and_models_in_colour():
    trained = training(3, 6, prompts=2)
    models = [make(progressive(6), n, prompts=2) for n in "abc"]
    mixed = [make(progressive(6), f"checkpoint-{n}", prompts=2, hidden_size=n) for n in (1, 2, 3)]
    for analyses, shaded in ((trained, True), (models, False), (mixed, False)):
        colours = [mark["color"] for mark in figures.line_styles(compare(analyses)).values()]
        assert all(isinstance(colour, tuple) == shaded for colour in colours)


def test_user_labels_name_the_rows_and_are_truncated_at_the_front():
    found = compare(training(3, 6, prompts=2), labels=["x", "y", "z"])
    assert row_names(found) == ["x", "y", "z"]
    assert style.shorten_front("short", 100.0, 7.0) == "short"
    assert style.shorten_front("a-very-long-name-of-a-checkpoint-100", 60.0, 7.0).endswith("heckpoint-100")
    assert style.shorten_front("a-very-long-name-of-a-checkpoint-100", 60.0, 7.0).startswith("…")


def test_a_long_name_keeps_its_ends():
    assert style.shorten("short", 100.0, 7.0) == "short"
    found = style.shorten("a-very-long-name-of-a-checkpoint-100", 60.0, 7.0)
    assert "…" in found
    assert found.endswith("-100")
    assert found.startswith("a-very")
