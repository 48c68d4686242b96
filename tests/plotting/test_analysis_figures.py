from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from plotting_fixtures import FakeAnalysis, assert_legible, band, drawn, lay_out, make_analyses, make_analysis

from internal_policy import UserError
from internal_policy.plotting import analysis as figures
from internal_policy.plotting import marks, style

DRAWINGS = (figures.entropy_flow, figures.entropy_change, figures.residual_cosine)


def test_entropy_flow_draws_its_data():
    analyses = make_analyses(2)
    frame = figures.entropy_flow_data(analyses)
    for panel, ax in enumerate(figures.entropy_flow(analyses).axes, start=1):
        rows = frame[frame["panel"] == panel]
        for point in ("input", "ATTN", "FFN", "output"):
            expected = rows[rows["point"] == point]
            x, y = drawn(ax, point)
            np.testing.assert_array_equal(x, expected["position"])
            np.testing.assert_array_equal(y, expected["entropy"])
        assert drawn(ax, figures.UNIFORM_LABEL)[1][0] == rows.set_index("point").loc["uniform", "entropy"]
        (star,) = [c for c in ax.containers if c.get_label() == figures.POLICY_LABEL]
        policy = rows.set_index("point").loc["policy"]
        np.testing.assert_array_equal(star.lines[0].get_xydata(), [[policy["position"], policy["entropy"]]])
        expected = rows[rows["point"] == "FFN"]
        np.testing.assert_allclose(band(ax)[2], (expected["low"], expected["high"]))


def test_stage_sketch_draws_its_data():
    analyses = [*make_analyses(2), make_analysis("x", 1, "llama", boundary=0)]
    frame = figures.stage_sketch_data(analyses)
    ax = figures.stage_sketch(analyses)
    assert_legible(ax.figure)
    for panel, analysis in enumerate(analyses, start=1):
        rows = frame[frame["panel"] == panel]
        assert rows["stage"].tolist() == list(analysis.stages)
        assert rows.loc[rows["boundary"], "layer"].tolist() == [b for b in [analysis.boundary_layer] if b]
        strip = [bars for bars in ax.containers if bars[0].get_y() + bars[0].get_height() / 2 == pytest.approx(panel)]
        runs = rows.groupby("stage", sort=False).agg(start=("start", "min"), end=("end", "max"))
        assert [bars.get_label() for bars in strip] == list(runs.index)
        np.testing.assert_allclose([bars[0].get_x() for bars in strip], runs["start"])
        np.testing.assert_allclose([bars[0].get_x() + bars[0].get_width() for bars in strip], runs["end"])
    marks = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "boundary layer"]
    np.testing.assert_allclose(marks, [6 / 36, 27 / 28])
    own = Figure().subplots()
    assert figures.stage_sketch(analyses[:1], ax=own) is own
    assert [text.get_text() for text in own.texts] == ["Qwen3-4B", "1–6", "7–26", "27–36"]


def test_entropy_flow_data_matches_the_analysis():
    analysis = make_analysis("testbed/qwen3", 8, "qwen", vocab_size=46)
    frame = figures.entropy_flow_data([analysis])
    flow = frame[frame["layer"].notna()]
    assert flow["position"].is_monotonic_increasing
    assert list(flow["point"][:5]) == ["input", "ATTN", "FFN", "output", "input"]
    assert list(flow["layer"]) == [layer for layer in range(1, 9) for _ in range(4)]
    table = analysis.layers.set_index(["site", "layer"])
    for point, site, column in (("input", "layer", "entropy_in"), ("FFN", "ffn", "entropy_out")):
        np.testing.assert_array_equal(flow.loc[flow["point"] == point, "entropy"], table.loc[site, column])
        np.testing.assert_array_equal(flow.loc[flow["point"] == point, "stderr"], table.loc[site, f"{column}_stderr"])
    ends = frame.set_index("point")["entropy"]
    assert ends["uniform"] == pytest.approx(math.log(46))
    assert ends["policy"] == 0.31


@pytest.mark.parametrize("site", ["attn", "ffn"])
def test_entropy_change_draws_its_data(site):
    analyses = make_analyses(3)
    frame = figures.entropy_change_data(analyses)
    figure = figures.entropy_change(analyses)
    for panel, ax in enumerate(figure.axes[("attn", "ffn").index(site) :: 2], start=1):
        rows = frame[(frame["panel"] == panel) & (frame["site"] == site)]
        x, y = drawn(ax, figures.SITE_LABELS[site])
        np.testing.assert_array_equal(x, rows["layer"])
        np.testing.assert_array_equal(y, rows["change"])
        np.testing.assert_allclose(band(ax)[0], (rows["low"], rows["high"]))
        boundary = analyses[panel - 1].boundary_layer
        assert list(drawn(ax, "boundary layer")[0]) == [boundary, boundary]
        assert rows.loc[rows["boundary"], "layer"].tolist() == [boundary]
        shaded = {
            stage: (patch.get_x() + 0.5, patch.get_x() + patch.get_width() - 0.5)
            for patch in ax.patches
            if (stage := patch.get_label())
        }
        stages = rows.groupby("stage")["layer"].agg(["min", "max"])
        assert shaded == ({} if site == "attn" else {row.Index: (row.min, row.max) for row in stages.itertuples()})


def test_residual_cosine_draws_its_data():
    analyses = make_analyses(2)
    frame = figures.residual_cosine_data(analyses)
    for panel, ax in enumerate(figures.residual_cosine(analyses).axes, start=1):
        for site, label in figures.SITE_LABELS.items():
            rows = frame[(frame["panel"] == panel) & (frame["site"] == site)]
            x, y = drawn(ax, label)
            np.testing.assert_array_equal(x, rows["layer"])
            np.testing.assert_array_equal(y, rows["cosine"])


def test_a_shuffled_table_draws_the_same():
    analysis = make_analysis("m", 8, "qwen")
    shuffled = FakeAnalysis(**{**vars(analysis), "layers": analysis.layers.sample(frac=1, random_state=0)})
    for data in (figures.entropy_flow_data, figures.entropy_change_data, figures.residual_cosine_data):
        pd.testing.assert_frame_equal(data([analysis]), data([shuffled]))


def test_single_panels_draw_on_given_axes_or_their_own():
    analysis = make_analyses(1)[0]
    figure = mpl.figure.Figure()
    axes = figure.subplots(2, 2)
    assert figures.plot_entropy_flow(analysis, axes[0, 0]) is axes[0, 0]
    assert figures.plot_entropy_change(analysis, "attn", axes[0, 1]) is axes[0, 1]
    assert figures.plot_residual_cosine(analysis, axes[1, 0]) is axes[1, 0]
    for plot in (figures.plot_entropy_flow, figures.plot_entropy_change, figures.plot_residual_cosine):
        ax = plot(analysis)
        assert ax.get_title() == "Qwen3-4B"
        assert len(ax.figure.legends) == 1
        assert_legible(ax.figure)


def test_figures_draw_on_given_axes():
    analyses = make_analyses(2)
    figure = mpl.figure.Figure()
    axes = figure.subplots(2, 2)
    assert figures.entropy_change(analyses, ax=axes) is figure
    assert [ax.get_title() for ax in axes[0]] == ["Qwen3-4B", "Llama-3.2-3B-Instruct"]
    assert figures.entropy_flow(analyses, ax=figure.subplots(1, 2)) is figure
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 2: one for each analysis"):
        figures.residual_cosine(analyses, ax=[axes[0, 0]])


@pytest.mark.slow
def test_files_are_byte_for_byte_the_same_in_another_process_without_torch_and_pyplot(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import internal_policy.plotting.analysis as f\n"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "from plotting_fixtures import make_analysis\n"
        "f.style.save_figure(f.entropy_change(make_analysis('testbed/qwen3', 8, 'qwen', 46)), Path(sys.argv[2]))\n"
    )
    here, there = tmp_path / "new" / "fig3", tmp_path / "there" / "fig3"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(there)]
    other = subprocess.Popen(command, env=environment)
    with mpl.rc_context({"font.size": 20, "axes.grid": True, "pdf.fonttype": 3, "savefig.bbox": "tight"}):
        figure = figures.entropy_change(make_analysis("testbed/qwen3", 8, "qwen", 46))
        paths = style.save_figure(figure, here)
    assert other.wait(timeout=120) == 0
    assert paths == [here.with_suffix(kind) for kind in (".png", ".pdf")]
    for path in paths:
        assert path.read_bytes() == there.with_suffix(path.suffix).read_bytes()
    pdf = here.with_suffix(".pdf").read_bytes()
    assert b"CreationDate" not in pdf
    assert b"/Type3" not in pdf
    assert b"/FontFile2" in pdf


@pytest.mark.slow
def test_redrawing_in_one_process_gives_the_same_bytes(tmp_path, monkeypatch):
    first, second = (
        style.save_figure(figures.residual_cosine(make_analyses(1)), tmp_path / name) for name in ("first", "second")
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    monkeypatch.setattr(style, "save_figure", lambda figure, stem: [stem])
    stems = ("fig2_entropy_flow", "fig3_entropy_change", "fig12_residual_cosine", "change_parts")
    assert figures.save_analysis_figures(make_analyses(1), tmp_path) == [tmp_path / stem for stem in stems]


def test_a_failed_save_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    figure = figures.residual_cosine(make_analyses(1))
    (tmp_path / "f.png").write_text("old")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        style.save_figure(figure, tmp_path / "f")
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]
    assert (tmp_path / "f.png").read_text() == "old"


def test_user_rc_params_are_unchanged():
    with mpl.rc_context({"font.size": 17.0, "axes.spines.top": True}):
        before = dict(mpl.rcParams)
        figures.residual_cosine(make_analyses(1)).draw_without_rendering()
        with pytest.raises(RuntimeError), style.paper_style():
            raise RuntimeError
        assert dict(mpl.rcParams) == before


def test_grids_have_a_panel_for_every_model():
    shapes = {n: style.grid_shape(n) for n in range(1, 13)}
    assert all(rows * columns >= n and columns <= 4 for n, (rows, columns) in shapes.items())
    assert (shapes[1], shapes[3], shapes[5], shapes[6], shapes[8], shapes[12]) == (
        (1, 1),
        (1, 3),
        (2, 3),
        (2, 3),
        (2, 4),
        (3, 4),
    )


FEW = [(figures.entropy_change, 1), (figures.entropy_change, 2), (figures.entropy_flow, 2)]
MANY = [*((figures.entropy_change, n) for n in (3, 5, 12)), (figures.entropy_flow, 12), (figures.residual_cosine, 4)]


@pytest.mark.parametrize(("draw", "n_models"), [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in MANY)])
def test_no_text_overlaps(draw, n_models):
    figure = draw(make_analyses(n_models))
    assert len(figure.axes) == n_models * (2 if draw is figures.entropy_change else 1)
    assert_legible(figure)


LAYERS = (1, 2, 8, 28, 36, 126)


@pytest.mark.parametrize(
    "n_layers", [*LAYERS, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 12, 30, 32, 40, 48, 61, 80))]
)
@pytest.mark.parametrize("width", [1.2, 6.0])
def test_layer_ticks(n_layers, width):
    figure = mpl.figure.Figure(figsize=(width, 1.0))
    ax = figure.add_axes((0, 0.3, 1, 0.7))
    with style.paper_style():
        style.set_layer_axis(ax, n_layers)
        figure.draw_without_rendering()
        ticks = ax.get_xticks()
        boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert ticks[0] == 1
    assert ticks[-1] == n_layers
    assert (np.diff(ticks) > 0).all()
    assert len(set(np.diff(ticks[1:-1]))) <= 1
    assert all(left.x1 + 1 < right.x0 for left, right in pairwise(boxes))


def test_boundary_label_stays_in_its_panel_and_above_the_data():
    boundaries = (1, 7, 14, 28)
    figure = figures.entropy_change([make_analysis("m", 28, "llama", boundary=boundary) for boundary in boundaries])
    lay_out(figure)
    for boundary, ax in zip(boundaries, figure.axes[1::2], strict=True):
        (text,) = ax.texts
        # There is room for the whole of it on neither side of the middle.
        assert text.get_text() == (f"layer {boundary}" if boundary == 14 else f"boundary layer {boundary}")
        box = text.get_window_extent()
        assert ax.bbox.x0 <= box.x0
        assert box.x1 <= ax.bbox.x1
        assert box.y0 >= ax.transData.transform((0, ax.dataLim.y1))[1]


def test_one_response_draws_no_band_and_no_legend_entry():
    analysis = make_analysis("m", 8, "qwen", stderr=math.nan)
    for draw in DRAWINGS:
        figure = draw([analysis])
        assert_legible(figure)
        assert not any(ax.collections for ax in figure.axes)
        assert not any("1.96" in text.get_text() for text in figure.legends[0].get_texts())
    missing = FakeAnalysis(**{**vars(analysis), "policy_entropy": {"mean": 0.5}})
    assert figures.entropy_flow_data([missing])["stderr"].isna().all()


@pytest.mark.parametrize("sites", [["layer"], ["layer", "ffn"]])
def test_a_site_that_was_not_measured_is_left_out(sites):
    analysis = make_analysis("m", 8, "qwen")
    partial = FakeAnalysis(**{**vars(analysis), "layers": analysis.layers[analysis.layers["site"].isin(sites)]})
    for draw in DRAWINGS:
        figure = draw([partial])
        labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        assert "ATTN" not in labels
        assert ("FFN" in labels) == ("ffn" in sites)


def test_a_missing_boundary_layer_is_noted():
    analysis = FakeAnalysis(**{**vars(make_analysis("m", 8, "qwen")), "boundary_layer": None})
    figure = figures.entropy_change([analysis])
    assert [text.get_text() for text in figure.axes[1].texts] == ["no boundary layer"]
    assert not any(line.get_label() == "boundary layer" for ax in figure.axes for line in ax.lines)
    assert not figures.entropy_change_data([analysis])["boundary"].any()


@pytest.mark.parametrize(
    ("n_parameters", "size"),
    [(668_928, "0.67 M"), (4_022_468_096, "4.0 B"), (14_768_307_200, "15 B"), (124_439_808, "124 M"), (3_000, "3.0 k")],
)
def test_a_size_is_rounded_and_has_its_unit(n_parameters, size):
    assert marks.size_of(replace(make_analysis("testbed/qwen3", 8, "qwen"), n_parameters=n_parameters)) == (
        f"{size} parameters"
    )


def test_titles_give_the_model_size_if_the_name_does_not():
    analysis, size = replace(make_analysis("testbed/qwen3", 8, "qwen"), n_parameters=668_928), "0.67 M"
    assert figures.plot_residual_cosine(analysis).get_title() == f"testbed/qwen3 ({size} parameters)"
    # With four panels in a row, the size is on a separate line.
    panels = figures.entropy_change([replace(analysis, name=f"testbed/{k}") for k in ("qwen3", "llama", "a", "b")]).axes
    assert panels[0].get_title() == f"testbed/qwen3\n({size} parameters)"
    named = replace(analysis, name="Qwen/Qwen3-4B-Base")
    assert figures.plot_residual_cosine(named).get_title() == "Qwen3-4B-Base"
    assert figures.plot_residual_cosine(replace(analysis, n_parameters=None)).get_title() == "testbed/qwen3"


def test_a_single_analysis_equals_a_list_of_one():
    analysis = make_analyses(1)[0]
    for draw in (*DRAWINGS, figures.stage_sketch):
        one, other = draw(analysis), draw([analysis])
        axes = [getattr(panel, "axes", panel) for panel in (one, other)]
        lines = [[line.get_xydata() for ax in np.ravel(panels) for line in ax.lines] for panels in axes]
        for a, b in zip(*lines, strict=True):
            np.testing.assert_array_equal(a, b)
    pd.testing.assert_frame_equal(figures.entropy_change_data(analysis), figures.entropy_change_data([analysis]))


def test_analyses_share_a_panel_under_their_own_labels_and_colours():
    low, high = (make_analysis("m", 8, "qwen", boundary=boundary, seed=boundary) for boundary in (2, 3))
    high.layers["change"] += 30
    ax = Figure().subplots()
    figures.plot_entropy_change(low, ax=ax, label="start", color="tab:blue")
    stages = len(ax.patches)
    figures.plot_entropy_change(high, ax=ax, label="trained", color="red")
    np.testing.assert_array_equal(
        drawn(ax, "trained")[1], figures.entropy_change_data(high).query("site == 'ffn'")["change"]
    )
    assert [line.get_color() for line in ax.lines if line.get_label() in ("start", "trained")] == ["tab:blue", "red"]
    # The stages are those of the first analysis, and the limits include both.
    assert len(ax.patches) == stages
    assert ax.get_title() == "start"
    assert ax.get_ylim()[1] > drawn(ax, "trained")[1].max()
    for plot in (figures.plot_entropy_flow, figures.plot_residual_cosine):
        ax = Figure().subplots()
        for analysis, name in ((low, "start"), (high, "trained")):
            plot(analysis, ax, label=name, color="k")
        assert {"start, FFN", "trained, FFN"} <= set(ax.get_legend_handles_labels()[1])


def test_labels_and_colours_are_scalars_or_one_per_analysis():
    analyses = make_analyses(2)
    figure = figures.entropy_change(analyses, label=["a", "b"], color=["red", (0.0, 0.0, 1.0)])
    assert [ax.get_title() for ax in figure.axes[::2]] == ["a", "b"]
    colours = [next(line.get_color() for line in ax.lines if line.get_label() == "FFN") for ax in figure.axes[1::2]]
    assert colours == ["red", (0.0, 0.0, 1.0)]
    with pytest.raises(UserError, match="got 3 labels for 2 analyses; give one for all, or one for each"):
        figures.entropy_flow(analyses, label=["a", "b", "c"])
    with pytest.raises(UserError, match="got 1 colours for 2 analyses"):
        figures.residual_cosine(analyses, color=["red"])
    with pytest.raises(UserError, match="color: 'reddish' is no colour of matplotlib"):
        figures.stage_sketch(analyses, color="reddish")


def test_titles_name_the_lens_and_distinguish_models():
    row = ("Qwen/Qwen3-4B", 8, "qwen")
    figure = figures.residual_cosine([make_analysis(*row), make_analysis(*row, lens="logit-lens")])
    assert [ax.get_title() for ax in figure.axes] == ["Qwen3-4B", "Qwen3-4B\nlogit lens"]
    runs = [make_analysis(f"runs/{run}/step-30", 8, "qwen") for run in ("grpo", "bupo")]
    assert [ax.get_title() for ax in figures.entropy_change(runs).axes[::2]] == ["grpo/step-30", "bupo/step-30"]
    awkward = [make_analysis(name, 8, "qwen") for name in ("a_$x$_%", "x" * 90, "Llama-" + "very-long-" * 12, "z" * 50)]
    assert_legible(figures.entropy_flow(awkward))


def test_no_analysis_is_refused():
    for function in (*DRAWINGS, figures.entropy_flow_data):
        with pytest.raises(ValueError, match="no analysis"):
            function([])


def test_a_notebook_shows_a_figure_without_pyplot():
    assert figures.residual_cosine(make_analyses(1))._repr_png_().startswith(b"\x89PNG")
