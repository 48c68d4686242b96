"""The figures of the divergences: what they draw, how they look with one, two and twelve models, and their files."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from plotting_fixtures import NAMES, FakeAnalysis, assert_legible, band, drawn, make_analysis

from internal_policy import UserError, plotting
from internal_policy.plotting import divergences as figures


def with_divergences(name, n_layers, kind="qwen", lens="policy", seed=0):
    """An analysis whose policies approach the final one, with intervals that are longer on one side."""
    rng, layers = np.random.default_rng(seed), np.arange(1, n_layers + 1)
    depth = layers / n_layers
    table = pd.DataFrame({"layer": layers})
    for quantity, values in (
        ("kl_policy", 9 * (1 - depth) ** 1.3 + (0.02 if lens == "policy" else 0.0)),
        ("kl_next", 0.05 + 12 * depth**9 * (depth < 1) + 0.02 * (depth == 1)),
        ("top1", 1 / (1 + np.exp(-12 * (depth - 0.75)))),
    ):
        error = 0.05 * values * (0.5 + rng.random(n_layers))
        table[quantity], table[f"{quantity}_stderr"] = values, error
        table[f"{quantity}_low"], table[f"{quantity}_high"] = values - 1.8 * error, values + 2.2 * error
    table[["top1_low", "top1_high"]] = table[["top1_low", "top1_high"]].clip(0, 1)
    one, other = (side.ravel() for side in np.meshgrid(layers, layers, indexing="ij"))
    kl = 0.02 * np.abs(one - other) ** 1.5 * np.where(other > one, 3, 1)
    matrix = pd.DataFrame({"layer": one, "other": other, "kl": kl})
    analysis = make_analysis(name, n_layers, kind, lens=lens)
    tables = {"divergences": table, "divergence_matrix": matrix}
    return FakeAnalysis(**{**vars(analysis), "additions": tables})


def several(n):
    return [with_divergences(*row, seed=seed) for seed, row in enumerate(NAMES[:n])]


def test_the_panels_draw_their_data():
    analyses = several(2)
    frame = plotting.divergence_data(analyses)
    axes = plotting.layer_divergences(analyses).axes
    # A column for each model, of two panels.
    for panel, kl in enumerate(axes[::2], start=1):
        rows = frame[frame["panel"] == panel]
        for place, (quantity, label) in enumerate(figures.LABELS.items()):
            own = rows[rows["quantity"] == quantity]
            x, y = drawn(kl, label)
            np.testing.assert_array_equal(x, own["layer"])
            np.testing.assert_array_equal(y, own["value"])
            np.testing.assert_allclose(band(kl)[place], (own["low"], own["high"]))


def test_the_agreement_draws_its_data():
    (analysis,) = several(1)
    ax = plotting.plot_top1_agreement(analysis, label="mine")
    table = analysis.additions["divergences"]
    np.testing.assert_array_equal(drawn(ax, "mine")[1], table["top1"])
    np.testing.assert_allclose(band(ax)[0], (table["top1_low"], table["top1_high"]))
    assert ax.get_ylim() == pytest.approx((-0.03, 1.03))


def test_the_heat_map_draws_its_data():
    (analysis,) = several(1)
    ax = plotting.plot_divergence_matrix(analysis)
    n = analysis.n_layers
    shown = ax.collections[0].get_array().reshape(n, n)
    # The diagonal is left out.
    assert np.array_equal(np.ma.getmaskarray(shown), np.eye(n, dtype=bool))
    expected = analysis.additions["divergence_matrix"]["kl"].to_numpy().reshape(n, n)
    off = ~np.eye(n, dtype=bool)
    np.testing.assert_array_equal(shown[off], expected[off])
    # Layer 1 is at the bottom.
    assert ax.get_ylim() == (0, n)
    assert next(tick.get_text() for tick in ax.get_yticklabels()) == "1"


def test_what_is_zero_is_not_drawn_on_a_logarithmic_axis():
    analysis = with_divergences("m", 8, lens="logit-lens")
    ax = plotting.plot_layer_divergences(analysis)
    _, y = drawn(ax, figures.LABELS["kl_policy"])
    assert np.isnan(y[-1])
    assert np.isfinite(y[:-1]).all()
    # An axis that reached to zero would flatten everything else.
    assert ax.get_ylim()[0] > 1e-3
    assert_legible(ax.figure)


@pytest.mark.parametrize("n", [1, 2, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("draw", [figures.layer_divergences, figures.divergence_matrix])
def test_figures_are_legible(draw, n):
    figure = draw(several(n))
    assert_legible(figure)
    assert figure.get_figwidth() <= 6.75


def test_less_than_two_decades_are_labelled_in_between():
    analysis = with_divergences("m", 4, lens="unit-norm")
    table = analysis.additions["divergence_matrix"]
    table["kl"] = (table["kl"] > 0) * (0.3 + 2 * table["kl"])
    figure = figures.divergence_matrix(analysis)
    assert_legible(figure)
    low, high = figure.axes[1].get_ylim()
    places = {text.get_position()[1]: text.get_text() for text in figure.axes[1].get_yticklabels()}
    shown = [text for place, text in places.items() if low <= place <= high]
    assert len(shown) > 1
    assert "0.5" in shown


def test_own_axes_labels_and_colours():
    analyses = several(2)
    axes = Figure(figsize=(6, 6)).subplots(2, 2)
    figure = figures.layer_divergences(analyses, ax=axes, label=["a", "b"], color=["tab:red", "tab:blue"])
    assert figure is axes[0, 0].figure
    assert [ax.get_title() for ax in axes[0]] == ["a", "b"]
    assert [ax.lines[0].get_color() for ax in axes[1]] == ["tab:red", "tab:blue"]
    own = Figure().subplots()
    assert figures.plot_divergence_matrix(analyses[0], own, color="magma") is own
    assert own.collections[0].get_cmap().name == "magma"
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 4"):
        figures.layer_divergences(analyses, ax=own)
    with pytest.raises(UserError, match="no colour map"):
        figures.divergence_matrix(analyses, color="tab:red!")


@pytest.mark.slow
def test_files_are_written_for_the_analyses_that_have_divergences(tmp_path):
    one, plain = with_divergences("measured", 4), make_analysis("plain", 4, "qwen")
    with pytest.raises(UserError, match="plain: divergences was not measured; repeat the analysis with --divergences"):
        figures.layer_divergences([one, plain])
    assert figures.save_divergence_figures([plain], tmp_path) == []
    paths = figures.save_divergence_figures([plain, one], tmp_path)
    names = [f"{stem}.{kind}" for stem in ("divergences", "divergence_matrix") for kind in ("png", "pdf")]
    assert [path.name for path in paths] == names
    assert all(path.stat().st_size > 1000 for path in paths)
