"""How much of an exploration is length, on models made to be all length or all direction, and on tables of any sign."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from documents import ROOT
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Analysis, analyze
from internal_policy.analysis.change_parts import (
    boundary_texts,
    exploring_layers,
    has_parts,
    length_sentence,
    length_share,
    undoes_length,
)
from internal_policy.analysis.layer_selection import DIRECTION, select_layer
from internal_policy.cli.display import show_analysis
from internal_policy.report import analysis_report

FLOAT32_NATS = 1e-5


class Write(torch.nn.Module):
    """An FFN that writes a function of its input."""

    def __init__(self, write):
        super().__init__()
        self.write = write

    def forward(self, hidden):
        return self.write(hidden)


def analysed(*writes, network=None, **options):
    network = tiny_model("llama", layers=len(writes)) if network is None else network
    for layer, write in zip(network.model.layers, writes, strict=True):
        layer.mlp = Write(write)
    return analyze(network, tiny_tokenizer(), responses=ragged_responses(12), **options)


def shorter(hidden):
    return 0.3 * hidden


def longer(hidden):
    return 3 * hidden


@pytest.fixture(scope="module")
def all_length():
    """FFNs that repeat what they read, more softly and in the last layer more loudly."""
    return analysed(shorter, shorter, shorter, longer)


def test_writes_that_repeat_their_input_are_all_length(all_length):
    ffn = all_length.layers.query("site == 'ffn'")
    assert (ffn["change"].abs() > 0.1).all()
    assert (ffn["change_direction"].abs() < FLOAT32_NATS).all()
    assert all_length.boundary_layer == 3
    assert all_length.length_share == pytest.approx(1, abs=1e-4)
    sentence = length_sentence(all_length.layers, all_length.selection, "policy")
    assert sentence.startswith("all of the exploration of layers 1-3 is length and none of it direction; by direction ")


def test_writes_as_long_as_their_input_are_all_direction():
    network = tiny_model("llama", layers=4)
    # The directions that E_u tells apart least and most.
    _, _, directions = torch.linalg.svd(network.lm_head.weight.detach(), full_matrices=False)

    def towards(direction):
        return lambda hidden: hidden.norm(dim=-1, keepdim=True) * direction

    flat, sharp = towards(directions[-1]), towards(directions[0])
    found = analysed(flat, flat, sharp, sharp, network=network)
    ffn = found.layers.query("site == 'ffn'")
    assert (ffn["change"].abs() > 0.05).all()
    assert (ffn["change_scale"].abs() < FLOAT32_NATS).all()
    assert found.length_share == pytest.approx(0, abs=1e-4)
    assert length_sentence(found.layers, found.selection, "policy") == (
        "all of the exploration of layers 1-2 is direction and none of it length; "
        "by direction alone the boundary layer is 2 too"
    )


def test_a_longer_last_write_changes_length_alone():
    network = tiny_model("llama", layers=4)
    shares = []
    for factor in (1, 8):
        last = network.model.layers[-1].mlp.down_proj
        before = last.weight.detach().clone()
        last.weight.data = before * factor
        found = analyze(network, tiny_tokenizer(), responses=ragged_responses(12))
        last.weight.data = before
        shares.append((found, found.selection.sensitivity[DIRECTION]))
    (one, by_direction), (other, same) = shares
    assert by_direction == same
    # The whole difference of the changes is one of length.
    table = [a.layers.query("site == 'ffn' and layer == 4").iloc[0] for a in (one, other)]
    moved = table[0]["change"] - table[1]["change"]
    assert abs(moved) > 0.1
    assert table[0]["change_scale"] - table[1]["change_scale"] == pytest.approx(moved, abs=FLOAT32_NATS)


def table(direction, length):
    """The layers of an analysis with these parts of the FFN's changes."""
    ffn = pd.DataFrame({"layer": range(1, len(direction) + 1), "site": "ffn"})
    ffn["change_direction"], ffn["change_scale"] = direction, length
    ffn["change"] = ffn["change_direction"] + ffn["change_scale"]
    for name in ("change", "change_direction", "change_scale"):
        ffn[f"{name}_stderr"] = math.nan
    # Another site, whose parts count for nothing.
    return pd.concat([ffn.assign(site="attn", change_direction=9.0, change_scale=-5.0), ffn], ignore_index=True)


@pytest.mark.parametrize(
    ("direction", "length", "share", "sentence"),
    [
        (
            [1, 0.1, 0.1, 0.1, -1, -1],
            [0, 0.6, 0.6, 0.6, 0, 0],
            1.8 / 3.1,
            "58% of the exploration of layers 1-4 is length; by direction alone the boundary layer is 1",
        ),
        (
            [2, 2, 2, -1, -1],
            [-1, -1, -1, 0, 0],
            -1,
            "all of the exploration of layers 1-3 is direction: of the 2 nats per layer that direction adds, length "
            "takes away 1; by direction alone the boundary layer is 3 too",
        ),
        (
            [-0.25, -0.25, -1, -1],
            [1.25, 1.25, 0, 0],
            1.25,
            "all of the exploration of layers 1-2 is length: of the 1.25 nats per layer that length adds, direction "
            "takes away 0.25; by direction alone there is no boundary layer",
        ),
        # The model never turns: all of its layers explore, direction alone ends early.
        (
            [1, 1, 0, 0],
            [0, 0, 1, 1],
            0.5,
            "50% of the exploration of layers 1-4 is length; by direction alone the boundary layer is 2, while the "
            "changes as measured give none",
        ),
        (
            [0.25, 0.25, 0.25],
            [0.75, 0.75, 0.75],
            0.75,
            "75% of the exploration of layers 1-3 is length; by direction alone there is no boundary layer either",
        ),
        # The model never explores: length hides what direction adds.
        (
            [1, 1, -1, -1],
            [-2, -2, 0, 0],
            None,
            "by direction alone the boundary layer is 2, while the changes as measured give none",
        ),
        ([1, -1], [0.5, 0], 1 / 3, "33% of the exploration of layer 1 is length; by direction alone the boundary layer "
         "is 1 too"),
    ],
)  # fmt: skip
def test_the_sentence_is_right_for_parts_of_any_sign(direction, length, share, sentence):
    layers = table(direction, length)
    selection = select_layer(SimpleNamespace(layers=layers, responses=pd.DataFrame()))
    found = length_share(layers, selection)
    assert found == (None if share is None else pytest.approx(share))
    assert length_sentence(layers, selection, "policy") == sentence
    # A lens that undoes length leaves nothing to say.
    assert length_sentence(layers, selection, "unit-norm") is None
    assert length_sentence(layers, selection, "logit-lens") is None
    shuffled = layers.sample(frac=1, random_state=0)
    assert length_sentence(shuffled, selection, "policy") == sentence


def ends_in_a_norm(layer, states):
    """A norm with an epsilon and a gain, after a map that differs by layer."""
    return 3 * torch.nn.functional.rms_norm(states.roll(layer, dims=-1), states.shape[-1:], eps=1e-6)


def halves(layer, states):
    """A lens that keeps the length."""
    return states.roll(layer, dims=-1) / 2


def norms_one_layer(layer, states):
    """A lens that undoes the length in layer 1 only."""
    return ends_in_a_norm(layer, states) if layer == 1 else states


def nearly_norms(layer, states):
    """A norm whose epsilon is not small beside the states."""
    return torch.nn.functional.rms_norm(states, states.shape[-1:], eps=0.5)


@pytest.mark.parametrize(
    ("lens", "undone"), [(ends_in_a_norm, True), (halves, False), (norms_one_layer, False), (nearly_norms, False)]
)
def test_a_lens_of_ones_own_has_the_sentence_only_if_length_matters_under_it(lens, undone, capsys):
    network = tiny_model("llama", layers=3)
    found = analyze(network, tiny_tokenizer(), responses=ragged_responses(4), lens=lens)
    assert undoes_length(found.layers, lens.__name__) is undone
    # The definition: the policies of some states do not depend on their length.
    states = torch.randn(64, network.config.hidden_size, generator=torch.Generator().manual_seed(0))
    for layer in range(1, 4):
        one, two = (torch.distributions.Categorical(logits=network.lm_head(lens(layer, k * states))) for k in (1, 2))
        moved = float((one.entropy() - two.entropy()).abs().max().detach())
        assert (moved < 1e-4) is (undone or (lens is norms_one_layer and layer == 1))
    # What would be said of a lens that keeps the length.
    sentence = length_sentence(found.layers, found.selection, "policy")
    show_analysis(found)
    page = analysis_report(found)
    for text in (" ".join(capsys.readouterr().out.split()), found._repr_html_(), page):
        assert (sentence[1:] in text) is not undone
    assert ("undoes the length of a state, so next to nothing of a change is length" in page) is undone


def test_the_exploration_ends_with_the_boundary_layer():
    curve = [0.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    selection = select_layer(curve)
    assert (selection.boundary_layer, exploring_layers(selection)) == (3, (2, 3))
    assert exploring_layers(select_layer([-1.0, -1.0, -1.0])) is None
    assert exploring_layers(select_layer([1.0, 1.0, 1.0])) == (1, 3)


def test_a_figure_names_both_boundary_layers():
    assert boundary_texts(6, 1) == ("boundary layer 6; by direction 1", "layer 6; by direction 1")
    assert boundary_texts(6, 6)[0] == "boundary layer 6; by direction too"
    assert boundary_texts(6, None)[0] == "boundary layer 6; by direction none"
    assert boundary_texts(None, 3) == ("no boundary layer; by direction 3",) * 2
    assert boundary_texts(None, None)[0] == "no boundary layer, nor by direction"


def test_an_analysis_from_before_the_parts_says_nothing(tmp_path):
    analysis = Analysis.load(ROOT / "data" / "experiments" / "analyses" / "llama-start")
    assert has_parts(analysis.layers)
    names = ("change_direction", "change_scale", "rms_in", "rms_out")
    tables = {"layers": analysis.layers, "responses": analysis.responses}
    without = {name: t[[c for c in t.columns if not c.startswith(names)]] for name, t in tables.items()}
    readings = {name: layer for name, layer in analysis.selection.sensitivity.items() if name != DIRECTION}
    selection = replace(analysis.selection, sensitivity=readings)
    replace(analysis, **without, selection=selection).save(tmp_path / "old")
    analysis = Analysis.load(tmp_path / "old")
    assert not has_parts(analysis.layers)
    assert analysis.length_share is None
    assert length_sentence(analysis.layers, analysis.selection, analysis.lens) is None
    assert "by direction" not in analysis._repr_html_()


def test_the_sentence_is_on_the_terminal_and_in_notebooks(all_length, capsys):
    sentence = length_sentence(all_length.layers, all_length.selection, "policy")
    show_analysis(all_length)
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert sentence in all_length._repr_html_()
