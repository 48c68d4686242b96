"""The maps of heads and experts show the numbers of the tables, legibly for small and large models."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from plotting_fixtures import assert_legible, make_analysis, with_parts

from internal_policy import UserError, plotting
from internal_policy.plotting.analysis import save_analysis_figures
from internal_policy.plotting.heads import map_drawings

SMALL = with_parts(make_analysis("openai/gpt2", 12, "llama"), 12, bias=True)
LARGE = with_parts(
    make_analysis("deepseek-ai/DeepSeek-V3-with-a-rather-long-name", 24, "qwen", lens="logit-lens"),
    64,
    n_experts=64,
    shared=True,
    first_expert_layer=4,
)
TINY = with_parts(make_analysis("m", 1, "llama", boundary=0), 1)


def maps(figure):
    """The panels of a figure without the colour bars."""
    return [ax for ax in figure.axes if ax.get_xlabel()]


def colours(ax):
    """The values [rows, layers] that a panel shows; NaN where it is blank."""
    mesh = ax.collections[0]
    return np.ma.filled(mesh.get_array().astype(float), np.nan)


@pytest.mark.parametrize("analysis", [SMALL, LARGE, TINY], ids=["small", "large", "one head"])
def test_a_map_of_heads_shows_the_table(analysis):
    figure = plotting.head_map(analysis, ["entropy", "attribution"])
    assert_legible(figure)
    table = analysis.additions["heads"].set_index(["head", "layer"])
    heads = sorted(table.index.unique("head"), key=lambda head: (head == 0, head))
    for ax, quantity in zip(maps(figure), ("entropy", "attribution"), strict=True):
        expected = [[table.loc[(head, layer), quantity] for layer in range(1, analysis.n_layers + 1)] for head in heads]
        np.testing.assert_array_equal(colours(ax), expected)
        low, high = ax.collections[0].get_clim()
        assert quantity == "entropy" or low == -high
        assert low <= np.min(expected) <= np.max(expected) <= high
        assert ax.get_yticklabels()[0].get_text() == "1"
        assert ax.get_yticklabels()[-1].get_text() == ("bias" if 0 in heads else str(heads[-1]))
        # The first head is at the top.
        assert ax.yaxis_inverted()


def test_a_map_of_experts_shows_the_table_and_leaves_dense_layers_blank():
    figure = plotting.expert_map(LARGE, ["load", "entropy"])
    assert_legible(figure)
    load, entropy = maps(figure)
    table = LARGE.additions["experts"].set_index(["expert", "layer"])
    for ax, quantity, last in ((load, "load", "64"), (entropy, "entropy", "shared")):
        values = colours(ax)
        assert np.isnan(values[:, :3]).all()
        np.testing.assert_array_equal(values[:64, 5], table.xs(6, level="layer")[quantity].drop(0))
        assert ax.get_yticklabels()[-1].get_text() == last
    # All tokens go to the shared experts, which would hide the others.
    assert load.collections[0].get_clim()[1] < 1


@pytest.mark.slow
def test_several_analyses_and_own_axes():
    figure = plotting.head_map([LARGE, SMALL, TINY])
    assert_legible(figure)
    assert len(maps(figure)) == 6
    axes = Figure(figsize=(8, 4)).subplots(1, 2)
    drawn = plotting.head_map(SMALL, ax=axes, label="mine", color="magma")
    assert drawn is axes[0].figure
    assert axes[0].get_title() == "mine\nEntropy (nats)"
    assert axes[0].collections[0].get_cmap().name == "magma"
    alone = plotting.plot_expert_map(LARGE, "entropy")
    assert_legible(alone.figure)
    assert alone.get_title().endswith("Entropy (nats), logit lens")
    assert plotting.plot_head_map(SMALL, "rms", axes[1]) is axes[1]


def test_what_was_not_measured_is_refused():
    plain = make_analysis("a/b", 4, "llama")
    with pytest.raises(UserError, match=r"a/b: this analysis has no heads; analyse it with --heads"):
        plotting.head_map(plain)
    with pytest.raises(UserError, match=r"gpt2: this analysis has no experts; only --heads of a mixture of experts"):
        plotting.expert_map(SMALL)
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 2"):
        plotting.head_map(SMALL, ax=Figure().subplots())
    assert plotting.head_map_data(plain).empty


@pytest.mark.slow
def test_maps_are_saved_beside_the_other_figures(tmp_path):
    mixture = with_parts(make_analysis("c/d", 2, "llama"), 2, n_experts=2)
    analyses = [make_analysis("a/b", 2, "llama"), mixture]
    paths = save_analysis_figures(analyses, tmp_path)
    assert [path.name for path in paths[-4:]] == ["heads.png", "heads.pdf", "experts.png", "experts.pdf"]
    assert map_drawings([*analyses[:1], SMALL]).keys() == {"heads"}
    assert map_drawings(analyses[:1]) == {}
    frame = plotting.head_map_data(analyses)
    assert frame["panel"].unique().tolist() == [2]
    assert len(frame) == 2 * 2
