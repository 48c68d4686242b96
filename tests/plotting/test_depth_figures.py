"""The figure of accuracy over depth: drawn values, lines and panels, legibility, reproducible bytes, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from plotting_fixtures import assert_legible
from synthetic_evaluations import evaluation_of_counts

from internal_policy import UserError
from internal_policy.plotting import accuracy_over_depth, accuracy_over_depth_data, plot_accuracy_over_depth
from internal_policy.plotting.depth import save_depth_figures


def evaluated(layer=None, name="x/small", site="layer", lens="policy", benchmark="math500", n=8, problems=12):
    """An evaluation with accuracy and agreement that grow with the layer."""
    rng = np.random.default_rng(layer or 0)
    rate = 0.6 if layer is None else 0.6 * (layer / 8) ** 3
    found = evaluation_of_counts(rng.binomial(n, rate, problems), n=n, name=name, benchmark=benchmark)
    if layer is None:
        return found
    samples = pd.DataFrame(
        {
            **{"problem": np.repeat(np.arange(1, problems + 1), n), "sample": np.tile(np.arange(1, n + 1), problems)},
            **{"n_tokens": rng.integers(1, 20, problems * n), "agreement": rng.uniform(0, layer / 8, problems * n)},
            **{"kl": 1.0, "log_prob": -1.0, "policy_log_prob": -2.0},
        }
    )
    config = {**found.config, "layer": layer, "site": site, "lens": lens}
    return replace(found, name=f"{name}, {site} {layer}", config=config, samples=samples)


def curve(layers=range(1, 9), **options):
    return [evaluated(layer, **options) for layer in layers]


def test_lines_have_the_values_of_the_evaluations():
    given = [*curve(), evaluated()]
    frame = accuracy_over_depth_data(given)
    assert set(frame["line"]) == {"small"}
    top, bottom = accuracy_over_depth(given).axes
    for panel, quantity in ((top, "avg"), (bottom, "agreement")):
        rows = frame[(frame["quantity"] == quantity) & (frame["site"] == "layer")]
        line = next(line for line in panel.get_lines() if line.get_label() == "small")
        np.testing.assert_array_equal(line.get_xdata(), rows["layer"])
        np.testing.assert_array_equal(line.get_ydata(), rows["value"])
    assert [e.avg["mean"] for e in given[:8]] == list(
        frame.loc[(frame["quantity"] == "avg") & (frame["site"] == "layer"), "value"]
    )
    policy = [line for line in top.get_lines() if len(set(line.get_ydata())) == 1 and line.get_linestyle() != "-"]
    assert policy[-1].get_ydata()[0] == given[-1].avg["mean"]


@pytest.mark.slow
def test_models_sites_lenses_and_benchmarks_are_kept_apart():
    both = [*curve(), *curve(site="ffn"), *curve(name="x/large", lens="logit-lens")]
    lines = set(accuracy_over_depth_data(both)["line"])
    assert lines == {"small, layer", "small, FFN", "large, layer, logit lens"}
    figure = accuracy_over_depth([*curve(), *curve(benchmark="aime24")])
    assert [ax.get_title() for ax in figure.axes] == ["MATH500", "", "AIME24", ""]


@pytest.mark.parametrize(
    "models", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.slow)]
)
def test_the_figure_is_legible(models):
    given = [
        e for i in range(models) for e in (*curve(name=f"owner/Model-{i}-7B"), evaluated(name=f"owner/Model-{i}-7B"))
    ]
    assert_legible(accuracy_over_depth(given))


@pytest.mark.parametrize("layers", [[1], [3, 80], range(1, 41)])
@pytest.mark.slow
def test_deep_and_sparse_curves_are_legible(layers):
    own = [replace(evaluated(8), config={**evaluated(8).config, "layer": layer}) for layer in layers]
    assert_legible(accuracy_over_depth(own))


def test_a_panel_can_be_drawn_on_axes_of_the_user():
    ax = Figure().subplots()
    assert plot_accuracy_over_depth(curve(), ax, quantity="agreement", label="mine", color="black") is ax
    assert ax.get_lines()[0].get_color() == "black"
    assert ax.get_lines()[0].get_label() == "mine"
    assert accuracy_over_depth(curve(), ax=Figure().subplots(2, 1)).axes


@pytest.mark.slow
def test_the_files_have_the_same_bytes_each_time(tmp_path):
    one, other = (save_depth_figures(curve(), tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in one] == ["accuracy_over_depth.png", "accuracy_over_depth.pdf"]
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="no evaluation of an internal policy to draw; evaluate with --layer"):
        accuracy_over_depth(evaluated())
    with pytest.raises(UserError, match="layer 2 of small was given twice on math500"):
        accuracy_over_depth([*curve(), evaluated(2)])
    with pytest.raises(UserError, match="quantity is 'kl'; needed is one of avg, agreement"):
        plot_accuracy_over_depth(curve(), quantity="kl")
    with pytest.raises(UserError, match="no internal policy was evaluated on aime24; there are math500"):
        plot_accuracy_over_depth(curve(), benchmark="aime24")
