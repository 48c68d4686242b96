"""Lenses of the user's own: both formats on disk, what is refused in one line, and names."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from own_lenses import exact_map, random_maps, save_as_tuned_lens, save_lens
from safetensors.torch import save_file
from tiny import tiny_model, tiny_tokenizer

from internal_policy import AnalyzeConfig, UserError, models
from internal_policy.analysis.layer_selection import _OWN_READINGS
from internal_policy.inspection.config import InspectConfig
from internal_policy.models.lenses import AffineLens, FunctionLens, open_lens, read_lens
from internal_policy.models.options import LENSES, TAKEN_NAMES, check_lens, lens_digest, lens_name

LAYERS, WIDTH = 3, 32
# A product of width 32 in float32, of values of size 1, against float64: some 1e-6.
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def model():
    return models.wrap(tiny_model("llama"), tiny_tokenizer(), "tiny")


@pytest.fixture
def maps():
    return random_maps(LAYERS, WIDTH)


@pytest.fixture
def states():
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def mapped(lens, layer, states, model):
    """What a lens makes of states before LN_final."""
    bare = models.Projection(model.projection.weight)
    return lens.apply(layer, states, bare)


@pytest.mark.parametrize("residual", [True, False])
def test_the_affine_map_of_each_layer_in_float64(tmp_path, model, maps, states, residual):
    lens = open_lens(save_lens(tmp_path / "mine", maps, residual=residual), model)
    for layer in range(LAYERS + 1):
        found = mapped(lens, layer, states, model)
        assert found.dtype == states.dtype
        torch.testing.assert_close(found.double(), exact_map(maps, layer, states, residual), atol=FLOAT32, rtol=0)
    half = mapped(lens, 1, states.bfloat16(), model)
    # The sum is in float32: only the input and the result are rounded to 8 bits.
    exact = exact_map(maps, 1, states.bfloat16(), residual).bfloat16()
    assert half.dtype == torch.bfloat16
    assert (half == exact).float().mean() > 0.99


def test_final_norm_follows_the_map(tmp_path, model, maps, states):
    lens = open_lens(save_lens(tmp_path / "mine", maps), model)
    found = model.projection.apply_lens(lens, states, 2)
    with torch.no_grad():
        expected = model.model.model.norm(exact_map(maps, 2, states).float())
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)
    with pytest.raises(ValueError, match="the lens mine differs by layer"):
        model.projection.apply_lens(lens, states)
    with pytest.raises(ValueError, match="is not the name of a lens; open_lens prepares a directory"):
        model.projection.apply_lens(str(tmp_path / "mine"), states, 2)


def test_a_file_of_tuned_lens_is_the_same_lens(tmp_path, model, maps, states):
    theirs = open_lens(save_as_tuned_lens(tmp_path / "theirs", maps), model)
    ours = open_lens(save_lens(tmp_path / "ours", maps, d_model=WIDTH, num_hidden_layers=LAYERS), model)
    for layer in range(LAYERS + 1):
        assert torch.equal(mapped(theirs, layer, states, model), mapped(ours, layer, states, model))


def test_parts_that_are_absent_change_nothing(tmp_path, model, states):
    place = save_lens(tmp_path / "mine", random_maps(LAYERS, WIDTH, layers=(2,)))
    bias = torch.ones(WIDTH)
    save_file({"layer.1.bias": bias}, place / "lens.safetensors")
    lens = open_lens(place, model)
    assert torch.equal(mapped(lens, 0, states, model), states)
    assert torch.equal(mapped(lens, 1, states, model), states + bias)
    assert torch.equal(mapped(lens, 2, states, model), states)


class Malicious:
    """Unpickling it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, maps):
    place = save_as_tuned_lens(tmp_path / "bad", maps)
    state = torch.load(place / "params.pt", weights_only=True)
    torch.save({**state, "0.more": Malicious(tmp_path / "ran")}, place / "params.pt")
    with pytest.raises(UserError, match=r"weights_only=True\) refuses it \(UnpicklingError\).*could run code") as error:
        read_lens(place)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def change(config=None, tensors=None, pickled=None, drop=(), text=None):
    """A change of a lens on disk."""

    def apply(place):
        for name in drop:
            (place / name).unlink()
        if config is not None:
            known = json.loads((place / "config.json").read_text())
            (place / "config.json").write_text(json.dumps({**known, **config}))
        if text is not None:
            name, content = text
            (place / name).write_bytes(content)
        if tensors is not None:
            save_file(tensors, place / "lens.safetensors")
        if pickled is not None:
            torch.save(pickled, place / "params.pt")

    return apply


WEIGHT, BIAS = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH)


@pytest.mark.parametrize(
    ("save", "damage", "message"),
    [
        (save_lens, change(tensors={"model.norm.weight": BIAS}), r"has 'model.norm.weight'; the keys of a lens are"),
        (save_lens, change(tensors={"layer.1.weight": BIAS}), r"layer.1.weight has the shape \[32\]; needed is \[d, d"),
        (
            save_lens,
            change(tensors={"layer.1.bias": WEIGHT}),
            r"layer.1.bias has the shape \[32, 32\]; needed is",
        ),
        (save_lens, change(tensors={"layer.1.weight": WEIGHT[1:]}), r"has the shape \[31, 32\]"),
        (save_lens, change(tensors={"layer.1.bias": BIAS.long()}), r"is a torch.int64; needed is a tensor of floating"),
        (save_lens, change(tensors={"layer.1.bias": BIAS * torch.nan}), "layer.1.bias holds NaN or inf"),
        (
            save_lens,
            change(tensors={"layer.4.bias": BIAS}),
            "it has a map of layer 4, and tiny has 3 layers of width",
        ),
        (save_lens, change(tensors={"layer.1.bias": BIAS[:9]}), "its map of layer 1 has the width 9, and tiny has"),
        (save_lens, change(text=("lens.safetensors", b"x" * 99)), "is no safetensors file"),
        (save_lens, change(text=("config.json", b"{")), "config.json: is no JSON"),
        (save_lens, change(text=("config.json", b"[]")), "needed is a JSON object"),
        (save_lens, change({"residual": 1}), 'in which "residual", if given, is true or false'),
        (save_lens, change({"d_model": 64}), "its config.json says d_model 64, and tiny has 3 layers of width 32"),
        (save_lens, change({"num_hidden_layers": 4}), "its config.json says num_hidden_layers 4"),
        (save_as_tuned_lens, change({"num_hidden_layers": 4}), "has 3 translators, and its config.json says"),
        (
            save_as_tuned_lens,
            change(pickled={"layer.0.weight": WEIGHT}),
            "has 'layer.0.weight'; the keys of a lens",
        ),
        (save_as_tuned_lens, change(pickled=[WEIGHT]), "holds a list; needed is a state dict"),
        (save_as_tuned_lens, change(pickled={"0.weight": 1.0}), "0.weight is a float; needed is a tensor"),
        (save_as_tuned_lens, change(text=("params.pt", b"x" * 99)), "it is damaged, or holds more than tensors"),
        (save_as_tuned_lens, change(text=("params.pt", b"")), "it is damaged, or holds more than tensors"),
    ],
)
def test_lenses_that_are_refused_when_they_are_opened(tmp_path, model, maps, save, damage, message):
    place = save(tmp_path / "bad", maps)
    damage(place)
    with pytest.raises(UserError, match=message) as error:
        open_lens(place, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(drop=["config.json"]), "one file of weights, .* found: lens.safetensors"),
        (change(drop=["lens.safetensors"]), "one file of weights, .* found: config.json"),
        (change(drop=["config.json", "lens.safetensors"]), "found: neither"),
        (change(text=("other.safetensors", b"")), "found: config.json, lens.safetensors, other.safetensors"),
    ],
)
def test_directories_without_the_files_of_a_lens_are_refused_before_a_model_is_loaded(tmp_path, maps, damage, message):
    place = save_lens(tmp_path / "bad", maps)
    damage(place)
    for config in (AnalyzeConfig, functools.partial(InspectConfig, prompt="x")):
        with pytest.raises(UserError, match=message):
            config(lens=place)


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        (
            "wide",
            "--lens is 'wide'; needed is one of policy, logit-lens, unit-norm, or the directory of a trained lens",
        ),
        ("logit_lens", r"--lens is 'logit_lens'; .* \(did you mean logit-lens\?\)"),
        ("", "--lens is ''"),
        (Path("no/such"), "--lens is 'no/such'"),
        (7, r"lens is a int; needed is one of .* or a function \(layer, states\) -> states"),
        (None, "lens is a NoneType"),
    ],
)
def test_what_is_no_lens_is_refused(lens, message):
    with pytest.raises(UserError, match=message):
        AnalyzeConfig(lens=lens)


def policy(layer, states):
    """A function with the name of a lens."""
    return states


def test_names_of_other_lenses_are_refused(tmp_path, maps):
    with pytest.raises(UserError, match="lens of class function would be called 'policy'"):
        check_lens(policy)
    save_lens(tmp_path / "unit-norm", maps)
    with pytest.raises(UserError, match=r"/unit-norm' would be called 'unit-norm'.*rename it"):
        check_lens(tmp_path / "unit-norm")
    assert {*LENSES, *_OWN_READINGS} <= {*TAKEN_NAMES}


class Tuned(torch.nn.Module):
    """A lens that is a module."""

    def forward(self, layer, states):
        return states


def test_names_are_those_of_directories_and_functions_and_safe_in_a_path(tmp_path, maps, monkeypatch):
    assert [lens_name(name) for name in ("policy", "logit-lens", "unit-norm")] == ["policy", "logit-lens", "unit-norm"]
    assert lens_name("lenses/tuned-v2/") == lens_name(Path("lenses/tuned-v2")) == "tuned-v2"
    assert lens_name("lenses/of mine (2)") == "of-mine-2"
    monkeypatch.chdir(save_lens(tmp_path / "here", maps))
    assert lens_name(".") == "here"
    assert AnalyzeConfig(lens=".").slug == "testbed--qwen3--here"
    assert lens_name(exact_map) == lens_name(functools.partial(exact_map, maps)) == "exact_map"
    assert lens_name(lambda layer, states: states) == "lambda"
    assert lens_name(Tuned()) == "Tuned"
    assert AnalyzeConfig("m", lens=Tuned()).slug == "m--Tuned"
    assert InspectConfig(prompt="hi", lens=Tuned()).slug == "testbed--qwen3--Tuned--hi"


def test_lenses_of_ones_own_are_not_sent_to_a_server(tmp_path, maps):
    place = save_lens(tmp_path / "mine", maps)
    for lens in (place, exact_map):
        for remote in (True, "local"):
            with pytest.raises(UserError, match=r"--remote was given with the lens .*, which is on this machine only"):
                AnalyzeConfig("m", lens=lens, remote=remote, backend="nnsight")
            with pytest.raises(UserError, match="--remote was given with the lens"):
                InspectConfig(prompt="x", lens=lens, remote=remote, backend="nnsight")


def test_the_digest_is_of_the_files_wherever_they_are(tmp_path, maps):
    place = save_lens(tmp_path / "mine", maps)
    digest = lens_digest(place)
    assert lens_digest(shutil.copytree(place, tmp_path / "copy")) == digest
    change({"residual": False})(place)
    assert lens_digest(place) != digest
    save_lens(place, random_maps(LAYERS, WIDTH, seed=1))
    assert lens_digest(place) != digest


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda layer, states: states.tolist(),
            r"lens lambda, layer 2: the function returned a list; needed are",
        ),
        (
            lambda layer, states: states[:, :3],
            r"layer 2: the function returned \[5, 3\] of float32; needed .* \[5, 3",
        ),
        (lambda layer, states: states.double(), r"layer 2: the function returned \[5, 32\] of float64"),
        (lambda layer, states: states / 0, "layer 2: the function returned NaN or inf"),
    ],
)
def test_a_function_has_to_return_states_like_those_it_got(model, states, function, message):
    lens = open_lens(function, model)
    assert isinstance(lens, FunctionLens)
    with pytest.raises(UserError, match=message):
        model.projection.apply_lens(lens, states, 2)


def test_a_function_may_change_its_copy_and_is_not_blamed_for_broken_states(model, states):
    before = states.clone()
    lens = open_lens(lambda layer, x: x.mul_(layer), model)
    assert torch.equal(model.projection.apply_lens(lens, states, 3), 3 * before)
    assert torch.equal(states, before)
    states[0, 0] = torch.inf
    assert model.projection.apply_lens(lens, states, 3)[0, 0] == torch.inf


def test_a_named_lens_is_opened_as_its_name(model, tmp_path, maps):
    assert open_lens("unit-norm", model) == "unit-norm"
    assert isinstance(open_lens(str(save_lens(tmp_path / "mine", maps)), model), AffineLens)
