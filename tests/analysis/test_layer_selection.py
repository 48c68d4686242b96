"""The boundary layer of published and synthetic curves, under noise, in other units and for other inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internal_policy.analysis.layer_selection import Selection, classify, select_layer
from internal_policy.statistics import QUANTITIES, layer_table
from internal_policy.utils.console import few_prompts
from internal_policy.utils.errors import UserError

SEEDS = 20


def stages_curve(exploration, plateau: float, convergence, integrating: int = 20) -> np.ndarray:
    return np.concatenate(
        [np.atleast_1d(exploration), np.full(integrating, float(plateau)), np.atleast_1d(convergence)]
    )


def llama(n_layers: int, level: float, *ending: float, first: float | None = None) -> np.ndarray:
    curve = np.concatenate([np.full(n_layers - len(ending), level), ending])
    if first is not None:
        curve[0] = first
    return curve


WEAK, STRONG, RAMP = np.full(10, -0.3), np.full(10, -1.0), -np.linspace(0.3, 3.0, 10)
EXPLORATIONS = {
    "linear": np.linspace(3.0, 0.5, 6),
    "constant": np.full(6, 2.0),
    "one": np.full(6, 1.0),
    "geometric": 3.0 * 0.7 ** np.arange(6),
    "hump": np.array([0.5, 1.5, 3.0, 2.5, 1.5, 0.8]),
}
# name -> curve, boundary layer, greatest noise (one standard deviation, nats)
QWEN = {
    f"{name}, plateau {plateau}, end {end[-1]:.1f}": (stages_curve(shape, plateau, end), 6, 0.06)
    for name, shape in EXPLORATIONS.items()
    for plateau in (0.0, 0.1, -0.1)
    for end in (WEAK, STRONG, RAMP)
    if (name, plateau) != ("one", 0.1)
} | {f"{name}, flat": (stages_curve(shape, 0.0, STRONG), 6, 0.1) for name, shape in EXPLORATIONS.items()}
LLAMA = {
    "Llama-3.2-3B": (llama(28, 0.1, -5.0), 27, 0.04),
    "Llama, gentle end": (llama(28, 0.1, -2.0), 27, 0.04),
    "Llama, steep end": (llama(28, 0.1, -20.0), 27, 0.04),
    "Llama, first layer high": (llama(28, 0.08, -5.0, first=0.3), 27, 0.02),
    "Llama, first layer negative": (llama(28, 0.1, -5.0, first=-0.5), 27, 0.03),
    "OctoThinker-3B, 27 about zero": (llama(28, 0.1, 0.0, -5.0), 26, 0.01),
    "OctoThinker-3B, 27 slightly negative": (llama(28, 0.1, -0.1, -5.0), 26, 0.03),
    "OctoThinker-3B, 27 negative": (llama(28, 0.1, -0.5, -20.0), 26, 0.03),
    "OctoThinker-8B": (llama(32, 0.1, -0.2, -10.0), 30, 0.03),
}
OTHERS = {
    "negative first layer": (stages_curve([-1.0, *[2.0] * 5], 0.0, WEAK), 6, 0.1),
    "late exploration": (stages_curve([0.0] * 6 + [2.0] * 6, 0.0, STRONG), 12, 0.1),
    "no integration": (np.repeat([1.0, -1.0], 10), 10, 0.1),
    "no convergence": (stages_curve([2.0] * 6, 0.0, []), 6, 0.1),
    "a bump in integration": (stages_curve([2.0] * 6, 0.0, [0.5, *[0.0] * 11, *STRONG], 8), 6, 0.1),
    "a rise at the top": (stages_curve([2.0] * 6, 0.0, [*[-1.0] * 8, 1.6, 1.6]), 6, 0.1),
    "three levels of 10": (np.repeat([1.0, 0.0, -1.0], 10), 10, 0.1),
    "8 layers": (stages_curve([1.0] * 3, 0.0, [-1.0] * 2, 3), 3, 0.1),
    "8 layers, one explores": (stages_curve([2.0], 0.0, [-1.0] * 2, 5), 1, 0.1),
    "8 layers, the second explores": (stages_curve([-0.1, 2.0], 0.0, [-1.0] * 2, 4), 2, 0.1),
    "12 layers": (stages_curve(np.linspace(3.0, 0.5, 4), 0.0, [-0.5] * 3, 5), 4, 0.06),
    "8 layers of a Llama": (llama(8, 0.1, -3.0), 7, 0.02),
}
NONE = {
    "DeepSeek-Math, nothing at first": (np.concatenate([np.zeros(15), np.full(15, -2.0)]), None, 0.1),
    "negative throughout": (-np.linspace(0.1, 3.0, 30), None, 0.1),
    "never turns": (np.full(28, 0.1), None, 0.03),
    "rises throughout": (np.linspace(0.5, 2.0, 36), None, 0.1),
}
# 0.03 nats explore if they are exact, like the 0.1 of a Llama in another unit, but not with an error of 0.1.
DEEPSEEK = np.concatenate([np.full(15, 0.03), -np.linspace(1.0, 4.0, 15)])
CURVES = QWEN | LLAMA | OTHERS | NONE


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("name", CURVES)
def test_boundary_layer_without_noise(name: str, scale: float):
    curve, boundary, _ = CURVES[name]
    assert select_layer(curve * scale).boundary_layer == boundary


@pytest.mark.parametrize(
    ("family", "with_stderr", "threshold"),
    [
        *((family, errors, rate) for family, rate in ((QWEN, 0.96), (LLAMA, 0.95)) for errors in (False, True)),
        *((OTHERS, errors, 0.95) for errors in (False, True)),
        # A curve without errors is taken as exact, so that its noise may be an exploration.
        (NONE | {"DeepSeek-Math": (DEEPSEEK, None, 0.1)}, True, 0.95),
    ],
)
@pytest.mark.slow
def test_boundary_layer_hit_rate_under_noise(family: dict, with_stderr: bool, threshold: float):
    """The rates of 1000 seeds are 0.975, 0.985, 0.98 and 0.98; two Monte Carlo errors of 20 seeds are one to three."""
    hits = []
    for index, (curve, boundary, noise) in enumerate(family.values()):
        generator = np.random.default_rng(index)
        for _ in range(SEEDS):
            noisy = curve + noise * generator.standard_normal(curve.size)
            stderr = np.full(curve.size, noise) if with_stderr else None
            hits.append(select_layer(noisy, stderr=stderr, resamples=1).boundary_layer == boundary)
    assert np.mean(hits) >= threshold


@pytest.mark.parametrize("threshold", [0.07, 0.13, 0.22])
def test_the_boundary_layers_do_not_depend_on_the_exact_threshold(threshold: float):
    """The range that docs/method.md states."""
    for name, (curve, boundary, _) in CURVES.items():
        found = classify(curve[None], np.zeros(curve.size), threshold=threshold)[1][0]
        assert (int(found) or None) == boundary, name


@pytest.mark.parametrize("deepest", [0.5, 2.0, 8.0, 30.0])
def test_a_deep_convergence_does_not_hide_the_exploration(deepest: float):
    """+0.02 after +0.6 is about zero, whatever follows. The rate of 1000 seeds is 0.965: layer 5 exceeds 0.12 in 3%."""
    curve = np.concatenate([np.full(4, 0.6), np.full(5, 0.02), -np.linspace(0.5, deepest, 21)])
    errors = np.full(curve.size, 0.05)
    assert select_layer(curve).boundary_layer == 4
    assert select_layer(curve).sensitivity == {"literal": 9}
    noise = 0.05 * np.random.default_rng(0).standard_normal((200, curve.size))
    assert np.mean(classify(curve + noise, errors)[1] == 4) > 0.93
    answers = [classify(np.where(curve > 0, curve, depth * curve) + noise, errors)[1] for depth in (1.0, 100.0)]
    np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(
    ("curve", "boundary"),
    [
        # Means over the response tokens of the embedded models, and the part of them that is direction.
        ([1.15, 0.79, 0.76, 0.72, 0.49, 0.43, -0.07, -0.60], 6),
        ([2.23, 0.19, 0.14, 0.16, 0.15, 0.34, 0.14, -0.27], 1),
        ([0.88, 0.75, 0.72, 0.72, 1.01, 0.71, 0.73, -1.47], 7),
        ([1.47, 0.39, 0.18, 0.29, 0.49, 0.19, 0.32, -1.25], 7),
        # Two public models that were trained on stories.
        ([0.33, 0.22, 0.25, 0.33, 0.42, 0.74], None),
        ([0.43, 0.74, 0.85, 0.97, 1.01, 1.21, 1.41, 1.66], None),
    ],
)
def test_curves_of_real_models(curve: list[float], boundary: int | None):
    assert select_layer(curve, stderr=[0.02] * len(curve)).boundary_layer == boundary


def best_stretch(curve: np.ndarray, threshold: float) -> tuple[int, int]:
    """The stretch of layers with the highest score, by trying all: its first layer and its last."""
    positive = curve[curve > 0]
    level = (positive**2).sum() / positive.sum()
    stretches = [(a, b) for a in range(1, curve.size + 1) for b in range(a, curve.size + 1)]
    return max(stretches, key=lambda ends: (curve[ends[0] - 1 : ends[1]] - threshold * level).sum())


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 25), drift=st.floats(-0.1, 0.5))
def test_the_stage_is_the_stretch_with_the_highest_score(seed: int, size: int, drift: float):
    curve = np.random.default_rng(seed).standard_normal(size) + drift
    selection = select_layer(curve)
    if not (curve > 0).any():
        assert selection.boundary_layer is None
        return
    first, last = best_stretch(curve, 0.2)
    assert selection.boundary_layer == (None if last == size else last)
    assert set(selection.stages[first - 1 : last]) == {"exploration"}
    literal = best_stretch(curve, 0.0)[1]
    assert selection.sensitivity["literal"] == (None if literal == size else literal)


def test_the_errors_of_the_stage_are_not_averaged_out():
    curve = llama(28, 0.1, -5.0)
    assert select_layer(curve, stderr=np.full(28, 0.049)).boundary_layer == 27
    unsure = select_layer(curve, stderr=np.full(28, 0.051))
    assert unsure.boundary_layer is None
    assert unsure.reason == (
        "no stretch of layers explores: layers 1-27 average +0.1 nats, which is not beyond 2 standard errors of 0.051"
    )
    assert "exploration" not in unsure.stages
    assert unsure.sensitivity["literal"] == 27


def test_stages_of_qwen3_4b():
    selection = select_layer(stages_curve(np.linspace(3.0, 0.5, 6), 0.05, -np.linspace(0.3, 2.0, 10)))
    assert selection.stages == ("exploration",) * 6 + ("integration",) * 20 + ("convergence",) * 10
    assert "layers 1-6" in selection.reason
    assert "+1.75" in selection.reason


def test_one_dipping_layer_does_not_end_exploration_but_three_do():
    curve = llama(28, 0.1, -5.0)
    curve[12] = -0.1
    assert select_layer(curve).boundary_layer == 27
    curve = stages_curve([2.0] * 6, 0.0, STRONG)
    curve[2] = -0.2
    assert select_layer(curve).boundary_layer == 6
    curve[2:5] = -0.2
    assert select_layer(curve).boundary_layer == 2
    assert "exploration" not in select_layer(curve).stages[2:5]


@pytest.mark.parametrize("curve", [[0.0] * 12, [0.0], [-1.0], [1.0]])
def test_curves_without_exploration(curve: list[float]):
    selection = select_layer(curve)
    assert selection.boundary_layer is None
    assert len(selection.stages) == len(curve)


def test_a_layer_within_the_noise_is_not_the_boundary():
    # At 0.02 nats layer 4 is far below a fifth of the exploration level.
    curve = [0.6, 0.6, 0.6, 0.02, -2.0, -2.2, -2.1, -2.0]
    selection = select_layer(curve)
    assert selection.boundary_layer == 3
    assert selection.stages[3] == "integration"


def test_two_layers_are_enough():
    assert select_layer([2.0, -1.0]).boundary_layer == 1


def test_noise_around_zero_has_no_exploration():
    generator = np.random.default_rng(0)
    answers = [select_layer(generator.standard_normal(30), stderr=np.ones(30), resamples=1) for _ in range(100)]
    # Two standard errors, but of the highest of many stretches: some 5 in 100 get through.
    assert np.mean([a.boundary_layer is None for a in answers]) >= 0.88


def test_curves_that_never_turn_name_the_steepest_drops():
    curve = np.linspace(1.0, 1.1, 12)
    curve[8:] -= 0.5
    selection = select_layer(curve)
    assert selection.boundary_layer is None
    assert selection.candidates[0] == 8
    assert "never turns" in selection.reason


def test_without_exploration_the_nearest_candidates_are_named():
    selection = select_layer(DEEPSEEK, stderr=np.full(30, 0.1), resamples=10)
    assert selection.boundary_layer is None
    assert selection.candidates == (15,)
    assert "no stretch of layers explores" in selection.reason
    assert "exploration" not in selection.stages
    negative = select_layer([-3.0, -1.0, -2.0, -4.0])
    assert negative.candidates == (2, 3, 1)
    assert "no layer has a positive dH_FFN, the highest being layer 2 with -1" in negative.reason
    assert negative.stages == ("convergence",) * 4


@settings(deadline=None)
@given(
    curve=st.lists(st.floats(-20, 20, allow_subnormal=False).map(lambda v: round(v, 6)), min_size=1, max_size=40),
    scale=st.floats(1e-6, 1e6),
)
def test_the_unit_does_not_matter(curve: list[float], scale: float):
    expected = select_layer(curve, stderr=np.full(len(curve), 0.1), resamples=20)
    scaled = select_layer(np.array(curve) * scale, stderr=np.full(len(curve), 0.1 * scale), resamples=20)
    for field in ("boundary_layer", "stages", "confidence", "runner_up", "runner_up_share", "sensitivity", "shares"):
        assert getattr(scaled, field) == getattr(expected, field)


@settings(deadline=None)
@given(curve=st.lists(st.floats(-20, 20), min_size=1, max_size=40))
def test_the_boundary_is_the_last_layer_of_the_exploration_stage(curve: list[float]):
    selection = select_layer(curve)
    assert len(selection.stages) == len(curve)
    if selection.boundary_layer is not None:
        assert selection.stages[selection.boundary_layer - 1] == "exploration"
        assert selection.stages[selection.boundary_layer] != "exploration"
        assert 1 <= selection.boundary_layer < len(curve)


def test_confidence_follows_the_noise():
    curve = stages_curve(np.linspace(3.0, 0.5, 6), -0.1, STRONG)
    sure = select_layer(curve, stderr=np.full(36, 0.01))
    unsure = select_layer(curve, stderr=np.full(36, 0.4))
    assert sure.confidence == 1.0
    assert sure.runner_up is None
    assert unsure.confidence is not None
    assert unsure.confidence < 0.9
    assert unsure.runner_up not in (None, unsure.boundary_layer)
    assert unsure.runner_up_share is not None
    assert 0 < unsure.runner_up_share <= 1 - unsure.shares["measured"]
    assert unsure.share_of(unsure.runner_up) == unsure.runner_up_share
    assert (unsure.share_of(unsure.boundary_layer), unsure.share_of(30)) == (unsure.shares["measured"], 0.0)
    assert unsure.runner_up in unsure.candidates


def test_a_curve_without_errors_has_no_confidence():
    selection = select_layer(stages_curve([2.0] * 6, 0.0, STRONG))
    assert (selection.confidence, selection.runner_up, selection.runner_up_share) == (None, None, None)
    assert (selection.shares, selection.agreement) == ({}, "by the paper's literal words it is layer 6 too")
    assert "no standard errors" in selection.reason


def test_the_seed_determines_the_resamples():
    curve, stderr = stages_curve(np.linspace(3.0, 0.5, 6), 0.0, STRONG), np.full(36, 0.3)
    assert select_layer(curve, stderr=stderr, seed=5) == select_layer(curve, stderr=stderr, seed=5)
    assert select_layer(curve, stderr=stderr, seed=5) != select_layer(curve, stderr=stderr, seed=6)


def test_any_sequence_type_gives_the_same_result():
    curve = [2.0, 2.0, 2.0, 0.0, 0.0, 0.0, -1.0, -1.0]
    expected = select_layer(curve)
    for given_as in (
        tuple(curve),
        np.array(curve),
        np.array(curve, dtype=np.float32),
        pd.Series(curve, index=range(1, 9)),
    ):
        assert select_layer(given_as) == expected
    assert type(expected.boundary_layer) is int


def test_selection_round_trips_through_json():
    selection = select_layer([2.0, 2.0, 2.0, 0.0, 0.0, 0.0, -1.0, -1.0], stderr=[0.8] * 8)
    assert Selection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


def analysis(
    n_prompts: int, spread: float = 0.1, samples: int = 2, direction: list[float] | None = None, plateau: float = -0.2
) -> SimpleNamespace:
    """Layers and responses of Qwen3-4B's shape; the direction part is the whole of it by default."""
    generator = np.random.default_rng(0)
    curve = stages_curve(np.linspace(3.0, 0.5, 6), plateau, STRONG)
    part = curve if direction is None else np.asarray(direction)
    rows = []
    for response in range(n_prompts * samples):
        n_tokens = int(generator.integers(20, 200))
        noise = spread * generator.standard_normal(36)
        for layer, (change, directed) in enumerate(zip(curve + noise, part + noise, strict=True), start=1):
            for site in ("layer", "attn", "ffn"):
                value, turned = (change, directed) if site == "ffn" else (-change, -directed)
                numbers = (1.0, 1.0 + value, value, turned, value - turned, 0.0, 1.0, 1.0)
                rows.append((response, response // samples, layer, site, n_tokens, *numbers))
    columns = ["response", "prompt", "layer", "site", "n_tokens", *QUANTITIES]
    responses = pd.DataFrame(rows, columns=columns)
    return SimpleNamespace(layers=layer_table(responses), responses=responses)


def test_an_analysis_is_resampled_by_prompt():
    selection = select_layer(analysis(20), resamples=200)
    assert selection.boundary_layer == 6
    assert selection.sensitivity == {"direction": 6, "literal": 6}
    assert selection.shares == {"measured": 1.0, "direction": 1.0, "literal": 1.0}
    assert selection.confidence == 1.0
    assert not selection.disputed
    assert selection.agreement == (
        "all 200 resamples of the 20 prompts give layer 6; by direction alone and by the paper's literal words it is "
        "layer 6 too"
    )
    assert select_layer(analysis(20), resamples=200) == selection


def test_confidence_is_the_mean_over_readings():
    whole = analysis(20, direction=llama(36, -0.2, first=2.0).tolist())
    selection = select_layer(whole, resamples=200)
    assert selection.sensitivity == {"direction": 1, "literal": 6}
    assert selection.shares == {"measured": 1.0, "direction": 0.0, "literal": 1.0}
    assert selection.confidence == pytest.approx(2 / 3)
    assert selection.disputed
    assert selection.agreement == (
        "all 200 resamples of the 20 prompts give layer 6; by direction alone it is layer 1; by the paper's literal "
        "words it is layer 6 too"
    )
    assert selection.readings().to_dict("list") == {
        "reading": ["measured", "direction", "literal"],
        "layer": [6, 1, 6],
        "share": [1.0, 0.0, 1.0],
    }
    shown = selection._repr_html_()
    assert "by direction alone it is layer 1" in shown
    assert "<td>by direction alone</td>" in shown
    # Each reading is resampled with its own curve, by the same prompts.
    only = SimpleNamespace(layers=whole.layers.copy(), responses=whole.responses.copy())
    for frame in (only.layers, only.responses):
        for column in [name for name in frame if name.startswith("change_direction")]:
            frame[column.replace("change_direction", "change")] = frame[column]
    directed = select_layer(only, resamples=200)
    assert directed.boundary_layer == 1
    assert directed.shares["measured"] == directed.shares["direction"] == 1.0


def test_a_plateau_within_the_errors_lowers_the_share_of_the_literal_reading():
    selection = select_layer(analysis(20, plateau=0.0), resamples=200)
    assert selection.boundary_layer == 6
    assert selection.shares["measured"] == 1.0
    # Without a threshold noise around zero explores as well.
    assert 0.0 < selection.shares["literal"] < 1.0
    assert selection.confidence == pytest.approx((2 + selection.shares["literal"]) / 3)
    same = replace(selection, sensitivity={"direction": 6, "literal": 6})
    count = round(200 * selection.shares["literal"])
    assert same.agreement.endswith(f"by the paper's literal words (in {count} of 200) it is layer 6 too")


def test_an_analysis_without_the_direction_part_lacks_that_reading():
    whole = analysis(20)
    parts = [name for name in whole.layers if name.startswith("change_direction")]
    assert len(parts) == 4
    without = SimpleNamespace(
        layers=whole.layers.drop(columns=parts), responses=whole.responses.drop(columns="change_direction")
    )
    assert select_layer(without, resamples=20).sensitivity == {"literal": 6}


def test_other_lenses_count_but_are_not_stored():
    selection = select_layer(analysis(20), resamples=200)
    merged = selection.with_lenses({"logit-lens": (1, 0.0), "mine": (None, 0.0)})
    assert merged.sensitivity == selection.sensitivity | {"logit-lens": 1, "mine": None}
    assert merged.confidence == pytest.approx(3 / 5)
    assert merged.agreement.endswith("under the logit lens it is layer 1; under the lens mine there is none")
    assert Selection.from_dict(merged.to_dict()) == selection
    assert merged.to_dict()["confidence"] == 1.0
    unsure = select_layer(analysis(1), resamples=200).with_lenses({"logit-lens": (1, None)})
    assert unsure.confidence is None
    assert unsure.agreement.endswith("under the logit lens it is layer 1")


def test_shares_of_resamples_are_reported_as_counts():
    selection = select_layer(analysis(20), resamples=200)
    for share, counted in ((0.87, "174 of 200"), (0.0, "none of 200")):
        other = replace(selection, shares={"measured": share}, boundary_layer=None, sensitivity={"literal": None})
        given = f"{counted} resamples of the 20 prompts give no boundary layer"
        assert other.agreement == f"{given}; by the paper's literal words there is none either"
    shown = selection._repr_html_()
    assert "%</td>" not in shown
    assert "20 prompts only: intervals and shares of resamples can be relied on from about 40 prompts on" in shown


@pytest.mark.parametrize(("prompts", "message"), [(1, "1 prompt only: "), (39, "39 prompts only: "), (40, None)])
def test_fewer_than_40_prompts_are_reported_as_few(prompts, message):
    assert (few_prompts(prompts) or "").startswith(message or "")
    assert (few_prompts(prompts) is None) == (message is None)


def test_a_single_prompt_gives_no_confidence():
    selection = select_layer(analysis(1, spread=0.02))
    assert selection.boundary_layer == 6
    assert selection.confidence is None
    assert "fewer than two prompts" in selection.reason


def test_an_analysis_without_ffn_is_refused():
    whole = analysis(2)
    with pytest.raises(UserError, match="ffn"):
        select_layer(SimpleNamespace(layers=whole.layers[whole.layers["site"] != "ffn"], responses=whole.responses))
    with pytest.raises(UserError, match="Analysis"):
        select_layer(whole, stderr=[0.1] * 36)


@pytest.mark.parametrize(
    ("curve", "stderr", "named"),
    [
        ([], None, "shape"),
        ([[1.0, 2.0]], None, "shape"),
        (1.0, None, "shape"),
        ([1.0, np.nan], None, "layer 2"),
        ([np.inf, 1.0], None, "layer 1"),
        (["a", "b"], None, "numbers"),
        ([1.0, 2.0], [0.1], "one per layer"),
        ([1.0, 2.0], [0.1, -0.1], "negative at layer 2"),
        ([1.0, 2.0], [0.1, np.nan], "stderr"),
    ],
)
def test_wrong_input_is_refused_in_one_line(curve, stderr, named):
    for kind in (UserError, ValueError):
        with pytest.raises(kind, match=named) as caught:
            select_layer(curve, stderr=stderr)
        assert "\n" not in str(caught.value)


def test_resamples_must_be_positive():
    with pytest.raises(UserError, match="resamples"):
        select_layer([1.0, -1.0], resamples=0)
