"""Figures of interventions: what they draw, from disk too, and that they are legible."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from command_line import run
from matplotlib.figure import Figure
from plotting_fixtures import ODD, assert_legible, make_analysis, with_parts
from synthetic_interventions import make_ablation, make_patching, make_together

from internal_policy import Ablation, Patching, UserError
from internal_policy.cli.figures import FiguresCommand
from internal_policy.interventions.figure_data import SHOWN, describe_how
from internal_policy.plotting import scales
from internal_policy.plotting.heads import head_map
from internal_policy.plotting.interventions import (
    ablation_bars,
    ablation_data,
    ablation_map,
    patching_data,
    patching_map,
    save_ablation_figures,
    save_patching_figures,
)

SLOW = ("many layers", "heads", "samples", "several ways")
ABLATIONS = {
    "eight layers": {},
    "many layers": {"n_layers": 40, "sites": ("ffn",)},
    "one": {"n_layers": 1, "sites": ("layer",)},
    "several ways": {"sites": ("attn", "ffn", "layer"), "hows": ("zero", "scale", "resample")},
    "heads": {"heads": 16, "n_layers": 12},
    "samples": {"samples": True},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in ABLATIONS])
def test_ablation_figures_are_legible(case):
    ablation = make_ablation(**ABLATIONS[case], name="organisation/some-model-14B-Instruct-2507")
    assert_legible(ablation_map(ablation))
    for site in set(ablation.table["site"]):
        assert_legible(ablation_bars(ablation, site))


@pytest.mark.parametrize("words", [("a", "=", "22", ","), ODD], ids=["short", "odd"])
@pytest.mark.parametrize(("n_layers", "n_tokens"), [(8, 16), pytest.param(36, 40, marks=pytest.mark.slow), (2, 3)])
def test_patching_maps_are_legible(n_layers, n_tokens, words):
    assert_legible(patching_map(make_patching(n_layers, n_tokens, words)))


def test_the_map_shows_every_value():
    ablation = make_ablation(hows=("zero", "mean"), samples=True)
    figure = ablation_map(ablation)
    panels = [ax for ax in figure.axes if ax.get_xlabel() == "Layer"]
    assert len(panels) == 5
    for quantity, panel in zip(SHOWN, panels, strict=True):
        own = ablation.table.sort_values("layer", kind="stable")[quantity].to_numpy().reshape(8, 4)
        np.testing.assert_allclose(panel.collections[0].get_array().reshape(4, 8), own.T)
    names = ["ATTN, zero", "FFN, zero", "ATTN, mean", "FFN, mean"]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == names
    data = ablation_data(ablation, ["kl"])
    assert data["name"].tolist()[:4] == names
    assert data[["value", "low", "high"]].to_numpy() == pytest.approx(
        ablation.table[["kl", "kl_low", "kl_high"]].to_numpy()
    )


def test_the_maps_of_ablations_and_of_heads_have_the_same_axes():
    analysis = with_parts(make_analysis("m", 6, "llama"), 4)
    ours, theirs = ablation_map(make_ablation(n_layers=6, heads=4)).axes[0], head_map(analysis).axes[0]
    assert (ours.get_xlabel(), ours.get_ylabel()) == (theirs.get_xlabel(), theirs.get_ylabel()) == ("Layer", "Head")
    for ax in (ours, theirs):
        assert ax.get_xlim() == (0, 6)
        # The first head is at the top.
        assert ax.get_ylim() == (4, 0)
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["1", "2", "3", "4"]
    texts = [[tick.get_text() for tick in ax.get_xticklabels()] for ax in (ours, theirs)]
    assert texts[0] == texts[1] == ["1", "2", "3", "4", "5", "6"]
    chosen = make_ablation(n_layers=6)
    few = replace(chosen, table=chosen.table[chosen.table["layer"].isin([1, 5, 6])])
    assert [tick.get_text() for tick in ablation_map(few).axes[0].get_xticklabels()] == ["1", "5", "6"]


@pytest.mark.parametrize(
    ("options", "cell", "names", "title"),
    [
        (
            {"layers": (3, 4, 5, 6), "hows": ("zero", "scale")},
            *("3-6", ["ATTN+FFN, zero", "ATTN+FFN, scale"], "writes of layers 3-6 set to zero or times 0.5"),
        ),
        (
            {"layers": (2, 3, 8), "heads": (1, 2, 4)},
            *("2-3,8", ["heads 1-2,4"], "writes of heads 1-2,4 of layers 2-3,8 set to zero"),
        ),
        (
            {"layers": (3, 4, 5, 6), "hows": ("zero", "mean", "resample"), "sites": ("ffn",)},
            *("3-6", ["FFN, zero", "FFN, mean", "FFN, resample"], "writes of layers 3-6 set to zero or replaced by"),
        ),
        ({"layers": (5,), "heads": (1, 2)}, "5", ["heads 1-2"], "writes of heads 1-2 set to zero"),
        ({"layers": (5, 6), "heads": (3,)}, "5-6", ["3"], "writes of head 3 of layers 5-6 set to zero"),
    ],
)
def test_layers_and_heads_that_were_changed_together_are_all_named(options, cell, names, title):
    ablation = make_together(**options, name="organisation/some-model-14B-Instruct-2507")
    maps, bars = ablation_map(ablation), ablation_bars(ablation)
    for figure in (maps, bars):
        assert_legible(figure)
        panel = figure.axes[0]
        assert [tick.get_text() for tick in panel.get_xticklabels()] == [cell]
        assert panel.get_xlabel() == ("Layer" if cell == "5" else "Layers, changed together")
        assert f"effect on the final policy of {title}" in figure.get_suptitle()
    assert [tick.get_text() for tick in maps.axes[0].get_yticklabels()] == names


def bar_of(panel):
    """The colour bar of a map: the ends of its numbers, which have arrows, and its labels."""
    bar = panel.collections[0].colorbar
    return (bar.vmin, bar.vmax), bar.extend, [tick.get_text() for tick in bar.ax.get_yticklabels()]


def test_a_layer_with_a_large_effect_does_not_hide_the_others():
    ablation = make_ablation(sites=("ffn",), samples=True)
    effects = np.array([6.2, 0.4, 0.1, 0.03, 0.01, 0.004, 0.001, 0.0])
    changes = {"kl": effects, "entropy_change": -effects, "log_prob_change": effects, "flips": effects / 10}
    figure = ablation_map(replace(ablation, table=ablation.table.assign(**changes, accuracy_change=-effects / 10)))
    assert_legible(figure)
    for quantity, panel in zip(SHOWN, [ax for ax in figure.axes if ax.get_xlabel() == "Layer"], strict=True):
        mesh = panel.collections[0]
        places = mesh.norm(mesh.get_array().ravel())
        # Each effect that is at least a fiftieth of the largest has a colour that differs visibly from the next one's.
        assert (np.abs(np.diff(places))[:3] > 0.08).all()
        texts = [text.get_text() for text in panel.texts]
        assert texts[0].lstrip("\N{MINUS SIGN}") == ("6.20" if quantity in SHOWN[:3] else "0.62")
        assert texts[-1] == "0.000"
        (low, high), extend, labels = bar_of(panel)
        if quantity in ("kl", "flips"):
            assert (low, high) == pytest.approx((1e-4 if quantity == "kl" else 1e-3, max(changes[quantity])))
            assert extend == "min"
            assert {"0.1", "0.01"} <= set(labels)
        else:
            assert low == -high
            assert (places[-1], extend) == (0.5, "neither")
            assert {"0", "0.1", "\N{MINUS SIGN}0.1"} <= set(labels)


def test_scales_of_nothing_and_of_one_number():
    assert scales.logarithmic([0.0, np.nan], 1e-4).norm.vmin == 1e-4
    alone = scales.logarithmic([0.5], 1e-4)
    assert (alone.norm.vmin, alone.norm.vmax, alone.extend) == (0.05, 0.5, "neither")
    assert scales.symmetric_logarithmic([0.0, np.nan]).norm(0.0) == 0.5


@pytest.mark.parametrize(
    ("recovery", "extend"), [(0.9, "neither"), (1.0001, "neither"), (6.0, "max"), (-3.0, "min"), (None, "both")]
)
def test_an_outlier_of_a_patching_does_not_change_the_colours(recovery, extend):
    patching = make_patching()
    values = patching.values.assign(recovery=np.linspace(0, 0.5, len(patching.values)))
    values.loc[7, "recovery"] = 6.0 if recovery is None else recovery
    if recovery is None:
        values.loc[9, "recovery"] = -6.0
    figure = patching_map(replace(patching, values=values))
    assert_legible(figure)
    norm, bar = figure.axes[0].collections[0].norm, figure.axes[-1]
    assert [norm(-1.0), norm(0.0), norm(0.5), norm(1.0)] == [0.0, 0.5, 0.75, 1.0]
    labels = [tick.get_text() for tick in bar.get_yticklabels()]
    assert labels == ["\N{MINUS SIGN}1", "\N{MINUS SIGN}0.5", "0", "0.5", "1"]
    arrows = len([patch for patch in bar.patches if len(patch.get_path()) > 2])
    assert arrows == {"neither": 0, "both": 2}.get(extend, 1)


def test_bars_have_the_values_and_intervals():
    ablation = make_ablation(hows=("zero", "mean"))
    ax = Figure().add_subplot()
    ablation_bars(ablation, "ffn", "kl", ax=ax)
    for how, container in zip(("zero", "mean"), [c for c in ax.containers if hasattr(c, "patches")], strict=True):
        rows = ablation.table[(ablation.table["site"] == "ffn") & (ablation.table["how"] == how)]
        assert [bar.get_height() for bar in container.patches] == pytest.approx(rows["kl"].tolist())
        ends = np.array([segment[:, 1] for segment in container.errorbar[2][0].get_segments()])
        np.testing.assert_allclose(ends, rows[["kl_low", "kl_high"]].to_numpy())


def test_of_many_heads_those_with_the_largest_divergence_are_drawn():
    ablation = make_ablation(n_layers=6, heads=8)
    ax = Figure().add_subplot()
    ablation_bars(ablation, quantity="kl", ax=ax)
    best = ablation.table.nlargest(24, "kl")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == [
        f"{row['layer']}.{row['head']}" for row in best.to_dict("records")
    ]


def test_the_patching_map_shows_every_recovery():
    patching = make_patching()
    figure = patching_map(patching, ["attn", "layer"])
    for site, panel in zip(("attn", "layer"), figure.axes, strict=False):
        values = patching.values
        own = values[values["site"] == site].sort_values(["layer", "position"])["recovery"]
        np.testing.assert_allclose(panel.collections[0].get_array().ravel(), own)
    assert figure.axes[1].get_xticklabels()[2].get_text() == "22→21"
    assert patching_data(patching, ["ffn"])["token"].tolist()[2] == "22→21"


def test_what_was_done_is_said_in_words():
    assert describe_how(make_ablation()) == "set to zero"
    assert describe_how(make_ablation(hows=("mean", "scale"))) == "replaced by their mean or times 0.5"


def test_what_does_not_exist_is_refused():
    ablation, patching = make_ablation(), make_patching()
    with pytest.raises(UserError, match="quantity 'accuracy' is not in this ablation; needed is one of kl"):
        ablation_data(ablation, ["accuracy"])
    with pytest.raises(UserError, match="site 'layer' was not changed; needed is one of attn, ffn"):
        ablation_bars(ablation, "layer")
    with pytest.raises(UserError, match="got 1 axes in ax; needed are 4"):
        ablation_map(ablation, ax=Figure().add_subplot())
    with pytest.raises(UserError, match="site 'mlp' was not patched"):
        patching_map(patching, "mlp")


@pytest.mark.slow
def test_figures_are_drawn_from_disk(tmp_path):
    ablation, patching = make_ablation(samples=True), make_patching()
    ablation.save(tmp_path / "a" / "one")
    patching.save(tmp_path / "p" / "one")
    assert len(save_ablation_figures(Ablation.load(tmp_path / "a"), tmp_path / "first")) == 6
    assert len(save_patching_figures(Patching.load(tmp_path / "p"), tmp_path / "first")) == 2
    run("figures", "a", "p/one", "--output", "drawn", cwd=tmp_path, code=0)
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "drawn" / "one" / path.name).read_bytes() == path.read_bytes()


def test_results_in_directories_of_one_name_have_figures_of_their_own(tmp_path, monkeypatch):
    drawn = {}
    for module, name in (("ablate", "draw_ablation"), ("patch", "draw_patching")):
        monkeypatch.setattr(
            f"internal_policy.cli.{module}.{name}", lambda each, place: drawn.update({place: each.path})
        )
    places = [tmp_path / "out" / "first" / "one", tmp_path / "out" / "second" / "one", tmp_path / "patched" / "one"]
    for place in places[:2]:
        make_ablation(n_layers=2).save(place)
    make_patching(2, 3).save(places[2])
    # The first is named twice, and is one result.
    FiguresCommand(directories=(*places, places[0].parent), output=tmp_path / "drawn").run()
    assert drawn == {
        tmp_path / "drawn" / name: path for name, path in zip(("first--one", "second--one", "one"), places, strict=True)
    }


@pytest.mark.slow
def test_figures_and_results_need_no_torch():
    code = (
        "import sys, internal_policy.plotting.interventions, internal_policy.interventions.results;"
        "import internal_policy.interventions.patching_results; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded
