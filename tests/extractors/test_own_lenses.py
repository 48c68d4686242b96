"""Every quantity under a trained lens and under functions: float64 formulas, named lenses, and every backend."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from capture_checks import FLOAT32_NATS, captured, check_quantities, wrapped
from own_lenses import exact_map, random_maps, save_as_tuned_lens, save_lens, translators
from test_divergences import assert_is_the_definition, measured
from test_families import residual_stream
from test_heads import Oracle, head_writes
from test_heads import measured as parts_measured
from tiny import ragged_responses, slow_unless_fast, tiny_model, tiny_tokenizer
from tiny import reference as policy_reference

from internal_policy import UserError, models
from internal_policy.data.responses import read_responses
from internal_policy.entropy import reference
from internal_policy.extractors import QUANTITIES, HookExtractor, Reducer, nnsight, reduce_responses, transformer_lens
from internal_policy.models import testbed
from internal_policy.models.lenses import open_lens


def maps_of(model, **options):
    return random_maps(model.n_layers, int(model.projection.weight.shape[1]), **options)


def exact_lens(model, maps):
    """The lens in float64: the map, and the model's norm in float64."""
    norm = copy.deepcopy(model.projection.final_norm).double()
    return lambda layer, states: norm(exact_map(maps, layer, states))


@pytest.mark.parametrize("model_type", slow_unless_fast(["llama", "qwen3", "gemma2", "gpt_neox", "qwen3_moe", "gpt2"]))
def test_every_quantity_under_a_trained_lens_in_float64(tmp_path, model_type):
    model = wrapped(tiny_model(model_type))
    maps = maps_of(model)
    lens = open_lens(save_lens(tmp_path / "mine", maps), model)
    check_quantities(model, ragged_responses(3), lens, exact_lens(model, maps))


@pytest.mark.parametrize("name", testbed.NAMES)
def test_every_quantity_of_an_embedded_model_under_a_trained_lens(tmp_path, name):
    model = models.load(name)
    maps = maps_of(model)
    lens = open_lens(save_lens(tmp_path / "mine", maps), model)
    check_quantities(model, ragged_responses(2, vocab=model.vocab_size), lens, exact_lens(model, maps))


@torch.no_grad()
def test_a_file_of_tuned_lens_gives_what_tuned_lens_computes(tmp_path):
    """hidden_states[i] + translator_i(hidden_states[i]), then the norm and the head, as TunedLens.forward has it."""
    network = tiny_model("llama")
    model = wrapped(network)
    maps = maps_of(model)
    lens = open_lens(save_as_tuned_lens(tmp_path / "theirs", maps), model)
    own, exact = translators(maps).double(), copy.deepcopy(network).double()
    for record in ragged_responses(3):
        (values,) = captured(model, [record], lens=lens)
        at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
        output = exact(torch.tensor([record["input_ids"]]), output_hidden_states=True, use_cache=False)
        for i, translator in enumerate(own):
            h = output.hidden_states[i][0, at]
            logits = exact.lm_head(exact.model.norm(h + translator(h)))
            expected = torch.distributions.Categorical(logits=logits).entropy()
            # H^i is what layer i + 1 receives, and what layer i returns.
            quantities = [values.layers[:, i, QUANTITIES.index("layer_in")]]
            quantities += [values.layers[:, i - 1, QUANTITIES.index("layer_out")]] if i else []
            for found in quantities:
                np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT32_NATS)
        final = torch.distributions.Categorical(logits=output.logits[0, at]).entropy()
        # H^L has no translator: its policy is the model's own.
        np.testing.assert_allclose(values.layers[:, -1, QUANTITIES.index("layer_out")], final, atol=FLOAT32_NATS)


@torch.no_grad()
def test_divergences_under_a_trained_lens_in_float64(tmp_path):
    network = tiny_model("llama")
    model = wrapped(network)
    maps = maps_of(model)
    lens = open_lens(save_lens(tmp_path / "mine", maps), model)
    exact = copy.deepcopy(network).double()
    records = ragged_responses(2)
    for record, found in zip(records, measured(model, records, lens), strict=True):
        at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
        ids = torch.tensor([record["input_ids"]])
        states = residual_stream(exact, ids)[1:, at]
        logits = [exact.lm_head(exact.model.norm(exact_map(maps, i, h))) for i, h in enumerate(states, start=1)]
        assert_is_the_definition(found, torch.stack([*logits, exact(ids, use_cache=False).logits[0, at]]))


def test_heads_under_a_trained_lens_in_float64(tmp_path):
    network, (record,) = tiny_model("llama"), ragged_responses(1)
    model = wrapped(network)
    maps = maps_of(model)
    lens = open_lens(save_lens(tmp_path / "mine", maps), model)
    (found,) = parts_measured(model, [record], lens)[2]
    oracle = Oracle(network, record)
    for layer in (1, 2, 3):
        writes = head_writes(oracle.model, "llama", oracle.ids, layer - 1)
        plain = oracle.quantities(writes, oracle.stream[layer - 1]).mean(1)
        mapped = torch.stack([exact_map(maps, layer, write) for write in writes])
        # Of the four quantities of a part only the entropy, the first, is that of what the lens makes of it.
        plain[:, 0] = oracle.quantities(mapped, oracle.stream[layer - 1], normed=True).mean(1)[:, 0]
        np.testing.assert_allclose(found.heads[layer - 1], plain, rtol=1e-5, atol=FLOAT32_NATS)


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        # The same states reach the same products, in other blocks.
        np.testing.assert_allclose(a.layers, b.layers, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(a.policy, b.policy, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("residual", [True, False])
def test_an_identity_is_the_logit_lens(tmp_path, residual):
    model = wrapped(tiny_model("llama"))
    zero = torch.zeros(32, 32) if residual else torch.eye(32)
    maps = {layer: (zero, torch.zeros(32)) for layer in range(1, 4)}
    lens = open_lens(save_lens(tmp_path / "identity", maps, residual=residual), model)
    records = ragged_responses(3)
    assert_same(captured(model, records, lens=lens), captured(model, records, lens="logit-lens"))


def unit(layer, states):
    return states / states.pow(2).mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize(("name", "imitation"), [("policy", None), ("logit-lens", "norm"), ("unit-norm", unit)])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_function_gives_what_the_lens_it_imitates_gives(model_type, name, imitation):
    network = tiny_model(model_type)
    model = wrapped(network)
    functions = {"policy": lambda _, states: states, "logit-lens": lambda _, states: network.model.norm(states)}
    lens = open_lens(functions.get(name, imitation), model)
    records = ragged_responses(3)
    assert_same(captured(model, records, lens=lens), captured(model, records, lens=name))


def test_a_function_gets_every_state_with_its_layer():
    model = wrapped(tiny_model("llama"))
    seen = []

    def watch(layer, states):
        seen.append((layer, tuple(states.shape)))
        return states

    (record,) = ragged_responses(1)
    captured(model, [record], lens=open_lens(watch, model))
    n = len(record["input_ids"]) - record["prompt_length"]
    assert {shape for _, shape in seen} == {(n, 32)}
    # H^0; of each layer two inputs, two writes and its output, and the latter three at another length.
    assert [[layer for layer, _ in seen].count(layer) for layer in range(4)] == [1, 8, 8, 8]


def test_a_function_that_differs_by_layer_changes_that_layer_only():
    model = wrapped(tiny_model("llama"))
    records = ragged_responses(2)
    lens = open_lens(lambda layer, states: states * (3 if layer == 2 else 1), model)
    out, below = QUANTITIES.index("layer_out"), QUANTITIES.index("layer_in")
    for own, plain in zip(captured(model, records, lens=lens), captured(model, records), strict=True):
        differs = np.abs(own.layers - plain.layers).max(axis=0) > 1e-3
        assert differs[:, out].tolist() == [False, True, False]
        assert differs[:, below].tolist() == [False, False, True]
        assert differs[:, QUANTITIES.index("ffn_out")].tolist() == [False, True, False]


def test_what_a_function_returns_is_named_with_its_layer():
    model = wrapped(tiny_model("llama"))
    lens = open_lens(lambda layer, states: states if layer < 3 else states.half(), model)
    with pytest.raises(UserError, match=r"lens lambda, layer 3: the function returned \[\d+, 32\] of float16; needed"):
        captured(model, ragged_responses(1), lens=lens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_trained_lens_of_a_model_in_another_precision(tmp_path, dtype):
    network = tiny_model("llama")
    place = save_lens(tmp_path / "mine", random_maps(3, 32))
    exact = captured(models.wrap(network, tiny_tokenizer()), ragged_responses(2), lens=opened(place, network))
    network = network.to(dtype)
    found = captured(models.wrap(network, tiny_tokenizer()), ragged_responses(2), lens=opened(place, network))
    # The states of a bfloat16 model have 8 bits, and its whole forward pass is rounded.
    atol = 0.2 if dtype == torch.bfloat16 else FLOAT32_NATS
    entropies = [q for q, name in enumerate(QUANTITIES) if "rms" not in name]
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one.layers[..., entropies], other.layers[..., entropies], rtol=0, atol=atol)


def opened(place, network):
    return open_lens(place, models.wrap(network, tiny_tokenizer()))


OPENERS = {"transformer-lens": transformer_lens.from_model, "nnsight": nnsight.from_model}


@pytest.mark.parametrize("backend", OPENERS)
def test_the_other_backends_take_every_lens(tmp_path, backend):
    pytest.importorskip(backend.replace("-", "_"))
    network = tiny_model("llama", attention="eager")
    model = models.wrap(network, tiny_tokenizer(), "tiny")
    responses = read_responses(ragged_responses(2), tiny_tokenizer(), "plain")
    extractor = OPENERS[backend](model)
    for choice in (save_lens(tmp_path / "mine", maps_of(model)), unit):
        ours, theirs = (
            reduce_responses(Reducer(each, open_lens(choice, each.model)), responses)
            for each in (HookExtractor(model), extractor)
        )
        assert_same(ours, theirs)
    wrong = open_lens(lambda layer, states: states[:1], extractor.model)
    with pytest.raises(UserError, match=r"lens lambda, layer 0: the function returned \[1, 32\]"):
        reduce_responses(Reducer(extractor, wrong), responses)


def test_the_definitions_that_need_no_lens_do_not_change_under_one():
    network = tiny_model("llama")
    records = ragged_responses(2)
    lens = open_lens(lambda layer, states: -states, wrapped(network))
    found = captured(network, records, lens=lens)
    for record, values in zip(records, found, strict=True):
        rows, policy = policy_reference(copy.deepcopy(network), record)
        for layer, row in enumerate(rows):
            for name in ("attn_cosine", "ffn_cosine", "layer_rms_in", "ffn_rms_out", "attn_rms_in"):
                column = values.layers[:, layer, QUANTITIES.index(name)]
                np.testing.assert_allclose(column, row[name], rtol=1e-5, atol=FLOAT32_NATS, err_msg=name)
        np.testing.assert_allclose(values.policy, policy, rtol=0, atol=FLOAT32_NATS)


def test_the_exact_formula_differs_between_layers_and_from_the_logit_lens():
    """The oracle of this file can fail: its maps are not close to the identity."""
    maps = random_maps(2, 8)
    states, weight = torch.randn(4, 8).double(), torch.randn(11, 8).double()
    entropies = [reference.policy_entropy(exact_map(maps, layer, states), weight) for layer in range(3)]
    assert min((entropies[i] - entropies[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 0.05
