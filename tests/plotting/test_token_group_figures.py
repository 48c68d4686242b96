"""The figure of groups of tokens: it draws its data, is legible, and is written for what was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import synthetic_analyses as synthetic
from matplotlib.figure import Figure
from plotting_fixtures import assert_legible, drawn, lay_out

from internal_policy import UserError, plotting
from internal_policy.analysis.token_labels import LABELS
from internal_policy.plotting import style
from internal_policy.plotting import token_groups as figures


def grouped(*groupings, name="Qwen/Qwen3-4B", n_layers=12):
    """An analysis with groups that differ from it by a constant each."""
    analysis = synthetic.make(synthetic.progressive(n_layers, rise=1.0, start=0.3), name, noise=0.2)
    rows = []
    for grouping in groupings:
        for i, group in enumerate(LABELS[grouping]):
            own = analysis.responses.assign(grouping=grouping, group=group)
            shift = 0.3 * i
            own["change"] += shift
            rows.append(own.assign(n_tokens=own["n_tokens"] // (i + 1)))
    return replace(analysis, additions={"groups": pd.concat(rows, ignore_index=True)} if rows else {})


def check_legible(figure):
    """Check a figure as it is drawn: labels find their place in the pass after the one that sets the ticks."""
    lay_out(figure)
    assert_legible(figure)


@pytest.mark.parametrize("grouping", LABELS)
def test_the_figure_draws_its_data(grouping):
    groups = grouped(grouping).by(grouping)
    frame = plotting.grouped_change_data(groups)
    figure = plotting.grouped_change(groups)
    check_legible(figure)
    for site, ax in zip(("attn", "ffn"), figure.axes, strict=True):
        bands = len(ax.collections)
        # Ten bands would hide one another.
        assert bands == (0 if grouping == "position" else len(groups.groups))
        for group in groups.groups:
            rows = frame[(frame["group"] == group) & (frame["site"] == site)]
            x, y = drawn(ax, group)
            np.testing.assert_array_equal(x, rows["layer"])
            np.testing.assert_array_equal(y, rows["change"])
    table = groups.layers[groups.layers["site"] == "ffn"]
    np.testing.assert_array_equal(frame.loc[frame["site"] == "ffn", "low"], table["change_low"])
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[: len(groups.groups)] == list(groups.groups)


@pytest.mark.slow
def test_models_stand_side_by_side_and_on_the_users_axes():
    given = [grouped("kind", name=name).by("kind") for name in ("a/one", "b/two")]
    figure = plotting.grouped_change(given)
    check_legible(figure)
    assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["one", "two"]
    assert sorted(plotting.grouped_change_data(given)["panel"].unique()) == [1, 2]
    own = Figure()
    axes = own.subplots(2, 2)
    assert plotting.grouped_change(given, ax=axes, label=["x", "y"]) is own
    assert axes[1, 1].get_title() == "y"
    ax = plotting.plot_grouped_change(given[0], "attn", color=["red", "green", "blue", "black"])
    assert [line.get_color() for line in ax.lines[:4]] == ["red", "green", "blue", "black"]
    check_legible(ax.figure)
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 4"):
        plotting.grouped_change(given, ax=axes[0, 0])
    with pytest.raises(UserError, match="got 2 colours for 4 groups"):
        plotting.plot_grouped_change(given[0], color=["red", "green"])


def test_many_groups_of_a_function_are_steps_of_a_scale():
    groups = grouped("position").by("position")
    colors = [look["color"] for look in figures._looks(replace(groups, grouping="length"))]
    assert len(set(colors)) == 10


def test_a_figure_is_written_for_each_grouping_that_was_measured(tmp_path, monkeypatch):
    with_groups, without = grouped("kind", "correct", n_layers=8), grouped(n_layers=8)
    assert list(figures.group_drawings([with_groups, without])) == ["groups_kind", "groups_correct"]
    assert figures.group_drawings([without]) == {}
    # Only the analysis that has the groups gets a column.
    assert len(figures.group_drawings([with_groups, without])["groups_kind"]().axes) == 2
    monkeypatch.setattr(style, "save_figures", lambda directory, drawings: list(drawings))
    drawn = plotting.save_analysis_figures(with_groups, tmp_path)
    assert drawn[-2:] == ["groups_kind", "groups_correct"]
