"""The figure of the two parts of every entropy change."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from plotting_fixtures import assert_legible, drawn, make_analyses, make_analysis

from internal_policy import UserError, plotting
from internal_policy.plotting import analysis as figures
from internal_policy.plotting import parts, style
from internal_policy.utils.palette import LOOKS


def signed(analysis, seed=0):
    """The analysis with parts of any signs, which still add up to its changes."""
    layers, size = analysis.layers.copy(), len(analysis.layers)
    direction = np.random.default_rng(seed).uniform(-1, 2, size) * layers["change"]
    for end in ("", "_low", "_high"):
        off = layers[f"change{end}"] - layers["change"]
        layers[f"change_direction{end}"] = direction + off
        layers[f"change_scale{end}"] = layers["change"] - direction + off
    return replace(analysis, layers=layers)


def without_parts(analysis):
    lacking = [column for column in analysis.layers if column.startswith(("change_direction", "change_scale"))]
    return replace(analysis, layers=analysis.layers.drop(columns=lacking))


def containers(ax, label):
    return next(c for c in ax.containers if c.get_label() == label)


@pytest.mark.parametrize("site", ["attn", "ffn"])
def test_bars_intervals_and_markers_are_those_of_the_table(site):
    analyses = [signed(make_analysis("m", 8, "qwen", boundary=3)), signed(make_analysis("n", 12, "llama"), 1)]
    frame = plotting.change_parts_data(analyses)
    figure = plotting.change_parts(analyses)
    assert len(figure.axes) == 4
    for panel, ax in enumerate(figure.axes[("attn", "ffn").index(site) :: 2], start=1):
        rows = frame[(frame["panel"] == panel) & (frame["site"] == site)].set_index("part")
        table = analyses[panel - 1].layers.query("site == @site")
        at, whole = drawn(ax, parts.WHOLE_LABEL)
        np.testing.assert_array_equal(at, table["layer"])
        np.testing.assert_array_equal(whole, table["change"])
        errors = [collection for container in ax.containers for collection in getattr(container, "lines", ((),) * 3)[2]]
        for part, column, error in zip(
            ("direction", "length"), ("change_direction", "change_scale"), errors, strict=True
        ):
            bars = containers(ax, f"{part} part")
            np.testing.assert_allclose([bar.get_height() for bar in bars], table[column])
            np.testing.assert_allclose([bar.get_y() for bar in bars], rows.loc[part, "base"])
            ends = np.array([segment[:, 1] for segment in error.get_segments()])
            shift = rows.loc[part, "base"].to_numpy()[:, None]
            np.testing.assert_allclose(ends - shift, table[[f"{column}_low", f"{column}_high"]])
        # Bars of a sign add up, and all of them to the whole change.
        direction, length = table["change_direction"].to_numpy(), table["change_scale"].to_numpy()
        tops = [bar.get_y() + bar.get_height() for bar in containers(ax, "length part")]
        np.testing.assert_allclose(tops, np.where(direction * length > 0, direction + length, length))
        np.testing.assert_allclose(direction + length, whole, atol=1e-12)


def test_the_parts_differ_in_colour_and_without_it():
    ax = plotting.plot_change_parts(make_analysis("m", 8, "qwen"))
    filled, hatched = (containers(ax, f"{part} part")[0] for part in ("direction", "length"))
    assert (filled.get_hatch(), bool(hatched.get_hatch())) == (None, True)
    assert mpl.colors.to_hex(filled.get_facecolor()) == LOOKS["direction"].light
    assert mpl.colors.to_hex(hatched.get_edgecolor()) == LOOKS["length"].light
    own = plotting.plot_change_parts(make_analysis("m", 8, "qwen"), color="red")
    assert mpl.colors.to_hex(containers(own, "length part")[0].get_edgecolor()) == "#ff0000"


@pytest.mark.parametrize(
    ("direction", "boundary", "text", "lines"),
    [
        ([1, 0, 0, 0, -1, -1], 4, "boundary layer 4; by direction 1", {"boundary layer": 4, "by direction": 1}),
        ([1, 1, 1, 1, -1, -1], 4, "boundary layer 4; by direction too", {"boundary layer": 4}),
        ([1, 1, 1, 1, -1, -1], 0, "no boundary layer; by direction 4", {"by direction": 4}),
        ([-1, -1, -1, -1, -1, -1], 4, "boundary layer 4; by direction none", {"boundary layer": 4}),
        ([-1, -1, -1, -1, -1, -1], 0, "no boundary layer, nor by direction", {}),
    ],
)
def test_both_boundary_layers_are_marked_and_named(direction, boundary, text, lines):
    analysis = make_analysis("m", 6, "llama", boundary=boundary, stderr=0.01)
    at = analysis.layers["site"] == "ffn"
    analysis.layers.loc[at, "change_direction"] = direction
    analysis.layers.loc[at, "change_scale"] = analysis.layers["change"] - analysis.layers["change_direction"]
    attn, ffn = plotting.change_parts(analysis).axes
    assert [t.get_text() for t in ffn.texts] == [text]
    known = {"boundary layer": "boundary layer", parts.BY_DIRECTION_LABEL: "by direction"}
    for ax, expected in ((attn, {k: v for k, v in lines.items() if k == "boundary layer"}), (ffn, lines)):
        marked = [line for line in ax.lines if line.get_label() in known]
        assert {known[line.get_label()]: line.get_xdata()[0] for line in marked} == expected
    assert len(attn.texts) == 0
    rows = plotting.change_parts_data(analysis).query("site == 'ffn' and part == 'whole'")
    assert rows.loc[rows["boundary_by_direction"], "layer"].tolist() == [
        i for i in [lines.get("by direction", boundary if "too" in text else None)] if i
    ]


CASES = [1, 2, pytest.param(4, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.slow)]


@pytest.mark.parametrize("n_models", CASES)
def test_no_text_overlaps(n_models):
    figure = plotting.change_parts([signed(analysis) for analysis in make_analyses(n_models)])
    assert len(figure.axes) == 2 * n_models
    assert_legible(figure)


def test_a_panel_draws_on_given_axes_or_its_own():
    analysis = make_analysis("m", 8, "qwen")
    ax = mpl.figure.Figure().subplots()
    assert plotting.plot_change_parts(analysis, "attn", ax, label="mine") is ax
    assert ax.get_title() == "mine"
    own = plotting.plot_change_parts(analysis)
    assert len(own.figure.legends) == 1
    assert_legible(own.figure)
    figure = mpl.figure.Figure()
    assert plotting.change_parts(analysis, ax=figure.subplots(2, 1)) is figure
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 2"):
        plotting.change_parts(analysis, ax=ax)


def test_one_prompt_draws_no_intervals():
    figure = plotting.change_parts(make_analysis("m", 8, "qwen", stderr=math.nan))
    assert_legible(figure)
    assert style.BAND_LABEL not in [text.get_text() for text in figure.legends[0].get_texts()]
    assert not any(ax.collections for ax in figure.axes)


def test_a_shuffled_table_gives_the_same_numbers():
    analysis = make_analysis("m", 8, "qwen")
    shuffled = replace(analysis, layers=analysis.layers.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(plotting.change_parts_data(analysis), plotting.change_parts_data(shuffled))


@pytest.mark.slow
def test_analyses_from_before_the_parts_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "save_figure", lambda figure, stem: [(stem.name, len(figure.axes))])
    old, new = without_parts(make_analysis("old", 8, "qwen")), make_analysis("new", 8, "qwen")
    assert "change_parts" not in dict(figures.save_analysis_figures([old], tmp_path))
    assert dict(figures.save_analysis_figures([old, new], tmp_path))["change_parts"] == 2
    with pytest.raises(ValueError, match="old was analysed before the parts of its changes were measured"):
        plotting.change_parts(old)
