"""Figures of training runs: drawn values, legibility and reproducible bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import plotting_fixtures
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plotting_fixtures import assert_legible, band, drawn, make_run

from internal_policy import UserError
from internal_policy.plotting import style
from internal_policy.plotting import training as training_figures
from internal_policy.plotting.training import (
    alignment_dynamics,
    policy_entropy_curves,
    save_training_figures,
    training_curves,
    training_curves_data,
)

BUPO, GRPO = "BuPO, layer 6, 10 steps", "GRPO"


def grpo(**options):
    return make_run(GRPO, layer=None, ipa_steps=0, **options)


def legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def panels(figure):
    """Panels (a) to (d), without their colour bars."""
    return sorted((ax for ax in figure.axes if ax.get_title()), key=lambda ax: ax.get_title())


def test_a_single_run_is_drawn_without_averaging():
    run = make_run()
    figure = training_curves(run, smooth=1)
    for ax, quantity in zip(figure.axes, ("reward", "policy_entropy", "length"), strict=True):
        x, y = drawn(ax, BUPO)
        np.testing.assert_array_equal(x, run.history["step"])
        np.testing.assert_array_equal(y, run.history[quantity])
        assert ax.get_ylabel() == training_figures.QUANTITIES[quantity]
        assert not ax.collections
        # The tenth step is the last of alignment: the line is drawn between it and the eleventh.
        assert [list(line.get_xdata()) for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[-1]] == [
            [10.5] * 2
        ]
    assert legend(figure) == [BUPO, "end of alignment"]


def test_seeds_are_drawn_as_mean_with_t_interval():
    from scipy import stats

    seeds = [make_run(seed=seed) for seed in range(4)]
    # One seed lacks its end, another one value.
    seeds[0] = replace(seeds[0], history=seeds[0].history[:50])
    seeds[1].history.loc[19, "reward"] = np.nan
    frame = training_curves_data([*seeds, grpo()], smooth=1)
    rows = frame[(frame["label"] == BUPO) & (frame["quantity"] == "reward")].set_index("step")
    for step, n in ((5, 4), (20, 3), (60, 3)):
        values = [run.history.set_index("step")["reward"].get(step, np.nan) for run in seeds]
        values = np.array(values)[~np.isnan(values)]
        low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        assert rows.loc[step, "seeds"] == n
        np.testing.assert_allclose(rows.loc[step, ["mean", "low", "high"]].astype(float), [values.mean(), low, high])
    assert frame.loc[frame["label"] == GRPO, ["low", "high"]].isna().all(axis=None)
    figure = training_curves([*seeds, grpo()], smooth=1)
    np.testing.assert_array_equal(drawn(figure.axes[0], BUPO)[1], rows["mean"])
    np.testing.assert_allclose(band(figure.axes[0])[0], (rows["low"], rows["high"]))
    assert len(figure.axes[0].collections) == 1
    assert legend(figure) == [BUPO, GRPO, "95% interval", "end of alignment"]


def test_two_seeds_are_drawn_individually():
    seeds = [grpo(seed=seed) for seed in range(2)]
    figure = training_curves(seeds, smooth=1)
    ax = figure.axes[0]
    assert not ax.collections
    assert legend(figure) == [GRPO, "each seed"]
    lines = [line.get_ydata() for line in ax.lines]
    np.testing.assert_allclose(lines, [np.mean(lines[1:], axis=0), *(run.history["reward"] for run in seeds)])


def test_the_running_mean_is_trailing_and_skips_step_1_and_gaps():
    run = make_run(steps=9)
    run.history.loc[4, "reward"] = np.nan
    rewards = dict(zip(run.history["step"], run.history["reward"], strict=True))
    frame = training_curves_data(run, ["reward"], smooth=3).set_index("step")
    assert 5 not in frame.index
    wanted = {s: np.nanmean([rewards[k] for k in range(max(2, s - 2), s + 1)]) for s in range(2, 10) if s != 5}
    np.testing.assert_allclose(frame["mean"], [rewards[1], *wanted.values()])
    np.testing.assert_allclose(frame["raw"], [rewards[s] for s in frame.index])
    # What comes after a step does not change it.
    later = replace(run, history=run.history.assign(reward=run.history["reward"].where(run.history["step"] < 8, 99.0)))
    other = training_curves_data(later, ["reward"], smooth=3).set_index("step")
    pd.testing.assert_series_equal(other["mean"].loc[:7], frame["mean"].loc[:7])


def test_steps_and_running_mean_have_own_line_widths_and_labels():
    runs = [make_run(), grpo(seed=3)]
    figure = training_curves(runs)
    frame = training_curves_data(runs, ["reward"])
    ax = figure.axes[0]
    for label in (BUPO, GRPO):
        rows = frame[frame["label"] == label]
        x, y = drawn(ax, label)
        np.testing.assert_array_equal((x, y), rows[rows["step"] > 1][["step", "mean"]].to_numpy().T)
        raw = next(line for line in ax.lines if np.array_equal(line.get_ydata(), rows["raw"]))
        assert raw.get_linewidth() < 0.5
    points = [line.get_xydata().tolist() for line in ax.lines if list(line.get_xdata()) == [1]]
    assert points == [[[1, frame.query("step == 1 and label == @label")["raw"].item()]] for label in (BUPO, GRPO)]
    grey = ["mean of the last 5 steps", "each step", "before any update", "end of alignment"]
    assert legend(figure) == [BUPO, GRPO, *grey]
    assert "each seed" in legend(training_curves([grpo(seed=seed) for seed in range(2)]))
    # Six steps have one mean of five after the first: it would be a point.
    assert legend(training_curves(grpo(steps=6))) == [GRPO]
    assert len(legend(training_curves(grpo(steps=7)))) == 4


def test_custom_labels_and_colours():
    runs = [make_run(seed=0), make_run(seed=1), grpo()]
    figure = policy_entropy_curves(runs, label=["ours", "ours", "theirs"], color=["red", "k"])
    assert legend(figure)[:2] == ["ours", "theirs"]
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert (colours["ours"], colours["theirs"]) == ("red", "k")
    with pytest.raises(UserError, match="got 2 labels for 3 runs"):
        training_curves(runs, label=["a", "b"])
    figure = alignment_dynamics(runs[0], label="ours", color="red")
    assert figure.legends[0].get_title().get_text() == "ours"
    assert panels(figure)[1].lines[0].get_color() == "red"


def test_a_shuffled_history_draws_the_same():
    run = make_run()
    shuffled = replace(run, history=run.history.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(training_curves_data([run]), training_curves_data([shuffled]))


def test_missing_measurements_are_noted():
    run = make_run()
    figure = training_curves([replace(run, history=run.history.drop(columns="length").assign(policy_entropy=np.nan))])
    assert [[text.get_text() for text in ax.texts] for ax in figure.axes] == [[], ["not measured"], ["not measured"]]
    assert_legible(figure)


def test_each_model_has_its_own_panel():
    runs = [grpo(name=name) for name in ("Qwen/Qwen3-4B", "meta-llama/Llama-3.2-3B")]
    assert [ax.get_title() for ax in policy_entropy_curves(runs).axes] == ["Qwen3-4B", "Llama-3.2-3B"]
    # Axes are made column by column; the middle one has the row's name.
    titles = [ax.get_title() for ax in training_curves(runs).axes]
    assert sorted(title for title in titles if title) == ["Llama-3.2-3B", "Qwen3-4B"]
    same = [grpo(name=name) for name in ("ours/qwen3", "theirs/qwen3")]
    assert [ax.get_title() for ax in policy_entropy_curves(same).axes] == ["ours/qwen3", "theirs/qwen3"]


def test_alignment_dynamics_draw_the_measurements():
    run = make_run(n_layers=10)
    figure = alignment_dynamics(run)
    similarity, change, perplexity, divergence = panels(figure)
    table, layers = run.dynamics, run.dynamics_layers
    steps = [0, 2, 4, 6, 8, 10]
    first = layers.pivot_table(index="step", columns="layer", values="cosine")
    lines = [line.get_ydata() for line in similarity.lines]
    np.testing.assert_array_equal(lines[: len(steps)], first.loc[steps])
    np.testing.assert_array_equal(lines[-1], first.loc[60])
    assert len(lines) <= training_figures.MAX_MEASUREMENTS
    for ax, column in ((change, "change"), (perplexity, "perplexity")):
        np.testing.assert_array_equal(ax.lines[0].get_xydata(), table[["step", column]])
    np.testing.assert_array_equal(drawn(divergence, "mean of later layers")[1], table["kl_mean"])
    wide = layers.pivot_table(index="layer", columns="step", values="kl")
    np.testing.assert_array_equal([line.get_ydata() for line in divergence.lines[:4]], wide)
    for ax in (change, perplexity, divergence):
        # A measurement at step 10 is taken after it, by the model at the end of alignment.
        assert list(drawn(ax, "end of alignment")[0]) == [10, 10]
    assert figure.legends[0].get_title().get_text() == "testbed/qwen3: BuPO, layer 6, 10 steps"


def test_one_later_layer_is_drawn_over_the_steps():
    run = make_run(layer=7)
    figure = alignment_dynamics(run)
    similarity, change, _, divergence = panels(figure)
    np.testing.assert_array_equal(similarity.lines[0].get_xydata(), run.dynamics_layers[["step", "cosine"]])
    np.testing.assert_array_equal(divergence.lines[0].get_xydata(), run.dynamics_layers[["step", "kl"]])
    assert similarity.get_ylabel() == "Cosine of $H^{7}$ and $H^{8}$"
    assert len(figure.axes) == 4, "there is nothing to tell by a colour bar"
    assert legend(figure) == ["end of alignment"]
    assert all(list(drawn(ax, "end of alignment")[0]) == [10, 10] for ax in (similarity, change, divergence))


def test_the_last_layer_has_no_later_layers(tmp_path, monkeypatch, caplog):
    run = make_run("BuPO, layer 8", layer=8)
    with pytest.raises(UserError, match="it compares a layer with the layers above it, and layer 8"):
        alignment_dynamics(run)
    monkeypatch.setattr(style, "save_figure", lambda figure, stem: [stem])
    assert [path.name for path in save_training_figures([run], tmp_path)] == ["fig4_training", "fig7_policy_entropy"]
    assert "testbed/qwen3, BuPO, layer 8: there is no figure 5 of this run" in caplog.text


def test_a_collapse_is_drawn_on_a_logarithmic_axis():
    run = make_run()
    steep = run.dynamics.assign(perplexity=np.exp(run.dynamics["step"] / 5.0))
    steep.loc[len(steep) - 1, "perplexity"] = np.inf
    scales = [panels(alignment_dynamics(r))[2].get_yscale() for r in (run, replace(run, dynamics=steep))]
    assert scales == ["linear", "log"]


def test_a_run_that_never_left_alignment_marks_no_end():
    run = make_run(steps=10, ipa_steps=10)
    assert legend(training_curves([run], smooth=1)) == [BUPO]
    assert "end of alignment" not in legend(alignment_dynamics(run))


LONG = "BuPO, attention 26, 30 steps"


@pytest.mark.parametrize(
    "runs",
    [
        [make_run()],
        [make_run(seed=seed) for seed in range(3)] + [grpo(seed=seed) for seed in range(3)],
        pytest.param(
            [make_run(label, 300, 6, 36, 30) for label in (LONG, LONG.replace("26", "27"), "REINFORCE++", GRPO)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [grpo(name=name) for name in ("Qwen/Qwen3-4B-Instruct-2507", "OctoThinker/OctoThinker-3B-Long-Base")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one", "seeds", "four long ones", "two models"],
)
def test_no_text_overlaps_in_the_curves(runs):
    assert_legible(training_curves(runs))
    assert_legible(policy_entropy_curves(runs))


@pytest.mark.parametrize(
    "run",
    [
        make_run(),
        pytest.param(make_run(LONG, 300, 6, 36, 30, name="Qwen/Qwen3-4B-Instruct-2507"), marks=pytest.mark.slow),
        make_run(layer=7, steps=12),
    ],
    ids=["8 layers", "36 layers", "one later layer"],
)
def test_no_text_overlaps_in_the_dynamics(run, monkeypatch):
    def draw(figure):
        with style.paper_style():
            figure.set_dpi(mpl.rcParams["savefig.dpi"])
            FigureCanvasAgg(figure).draw()

    # A colour bar is placed only when it is drawn.
    monkeypatch.setattr(plotting_fixtures, "lay_out", draw)
    assert_legible(alignment_dynamics(run))


def test_figures_draw_on_given_axes_and_leave_rc_params_alone():
    figure = mpl.figure.Figure()
    grid = figure.subplots(2, 4)
    with mpl.rc_context({"font.size": 17.0}):
        before = dict(mpl.rcParams)
        assert training_curves([grpo()], ax=grid[0, :3]) is figure
        assert policy_entropy_curves([grpo()], ax=[grid[0, 3]]) is figure
        assert alignment_dynamics(make_run(), ax=list(grid[1])) is figure
        assert dict(mpl.rcParams) == before
    assert not figure.legends
    with pytest.raises(UserError, match="got 2 axes in ax; needed are 3: 3 for each model"):
        training_curves([grpo()], ax=grid[0, :2])


def test_invalid_runs_are_refused(tmp_path):
    for draw in (training_curves, policy_entropy_curves, training_curves_data):
        with pytest.raises(UserError, match="no run"):
            draw([])
    with pytest.raises(UserError, match="smooth is 0"):
        training_curves(grpo(), smooth=0)
    with pytest.raises(UserError, match="no figure 5 of this run: no dynamics were measured"):
        alignment_dynamics(grpo())


@pytest.mark.slow
def test_files_are_the_same_bytes_in_another_process_without_torch(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import internal_policy.plotting.training\n"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)\n"
        "from plotting_fixtures import make_run, style\n"
        "from internal_policy.plotting import alignment_dynamics\n"
        "style.save_figure(alignment_dynamics(make_run()), style.Path(sys.argv[2]) / 'there')\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1]), str(tmp_path)]
    other = subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": "7"})
    paths = style.save_figure(alignment_dynamics(make_run()), tmp_path / "here")
    assert other.wait(timeout=120) == 0
    for path in paths:
        assert path.read_bytes() == (tmp_path / f"there{path.suffix}").read_bytes()


def test_figures_are_named_by_their_runs_and_seeds_overwrite_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "save_figure", lambda figure, stem: [stem])
    dynamics = "fig5_alignment_qwen3-bupo-layer-6-10-steps"
    names = ("fig4_training", "fig7_policy_entropy", dynamics, f"{dynamics}_2")
    assert save_training_figures([make_run(), make_run(seed=1), grpo()], tmp_path) == [
        tmp_path / name for name in names
    ]


def test_only_runs_that_differ_only_in_their_seed_are_averaged():
    alike = [replace(make_run(seed=seed), setting={"learning_rate": 1e-6}) for seed in range(2)]
    other = replace(make_run(seed=2), setting={"learning_rate": 1e-5})
    frame = training_curves_data([*alike, other])
    counts = frame.groupby("label")["seeds"].max()
    assert counts.to_dict() == {f"{BUPO}, learning_rate 1e-06": 2, f"{BUPO}, learning_rate 1e-05": 1}
    assert set(training_curves_data(alike)["label"]) == {BUPO}
