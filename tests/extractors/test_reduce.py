"""Captured quantities against the float64 definitions; padding, batches, hooks and the verification of eq. 4."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from capture_checks import FLOAT32_NATS, captured, check_quantities, wrapped
from tiny import FAMILIES, VOCAB, ragged_responses, reference, slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.extractors import (
    QUANTITIES,
    HookExtractor,
    reduce,
    residual_hooks,
    verify,
)
from internal_policy.models.families import FAMILIES as TABLE
from internal_policy.models.families import Family

EVERY = list(itertools.product(FAMILIES, (False, True), (1, 2, 4), ("left", "right")))
FEW = (
    ("llama", False, 2, "left"),
    ("mistral", True, 4, "right"),
    ("qwen2", False, 1, "right"),
    ("qwen3", True, 2, "left"),
)


@pytest.mark.parametrize(
    ("model_type", "tied", "kv_heads", "side"),
    [case if case in FEW else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
)
def test_parity_with_the_definition_in_float64(model_type, tied, kv_heads, side):
    model = tiny_model(model_type, tied=tied, kv_heads=kv_heads)
    records = ragged_responses()
    ours = captured(model, records, side)
    oracle = copy.deepcopy(model)
    for record, values in zip(records, ours, strict=True):
        rows, policy = reference(oracle, record)
        assert values.layers.shape == (len(record["input_ids"]) - record["prompt_length"], 3, len(QUANTITIES))
        for layer, row in enumerate(rows):
            for q, name in enumerate(QUANTITIES):
                np.testing.assert_allclose(
                    values.layers[:, layer, q], row[name], rtol=0, atol=FLOAT32_NATS, err_msg=name
                )
        np.testing.assert_allclose(values.policy, policy, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_policy_entropy_matches_the_models_logits(model_type):
    model = tiny_model(model_type)
    records = ragged_responses()
    for record, values in zip(records, captured(model, records), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([record["input_ids"]]), use_cache=False).logits[0]
        own = torch.distributions.Categorical(logits=logits.double()).entropy()[record["prompt_length"] - 1 : -1]
        np.testing.assert_allclose(values.policy[:, 1], own.numpy(), rtol=0, atol=FLOAT32_NATS)


def test_logit_lens_applies_the_final_norm_and_ends_in_the_policy():
    model = tiny_model("qwen3")
    records = ragged_responses()
    plain, lens = captured(model, records), captured(model, records, lens="logit-lens")
    out = QUANTITIES.index("layer_out")
    for a, b in zip(plain, lens, strict=True):
        # Entropies of one and the same state differ only by the products' block shapes.
        np.testing.assert_allclose(b.layers[:, -1, out], a.policy[:, 1], rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(b.policy, a.policy, rtol=0, atol=FLOAT32_NATS)
        assert np.abs(a.layers[:, 0, out] - b.layers[:, 0, out]).max() > 0.01


@pytest.mark.parametrize("lens", ["policy", "logit-lens", "unit-norm"])
@pytest.mark.parametrize("model_type", slow_unless_fast(["llama", "qwen3", "gemma2", "gpt_neox", "gpt2", "cohere"]))
def test_every_quantity_is_that_of_its_definition_under_each_lens(model_type, lens):
    check_quantities(wrapped(tiny_model(model_type)), ragged_responses(3), lens)


@pytest.mark.parametrize("lens", ["policy", "logit-lens", "unit-norm"])
def test_a_write_of_nothing_is_uniform_at_every_length(lens):
    network = tiny_model("llama")
    torch.nn.init.zeros_(network.model.layers[1].mlp.down_proj.weight)
    for values in captured(wrapped(network), ragged_responses(3), lens=lens):
        layer = dict(zip(QUANTITIES, values.layers[:, 1].T, strict=True))
        np.testing.assert_allclose(layer["ffn_out"], np.log(VOCAB), rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(layer["ffn_rescaled"], np.log(VOCAB), rtol=0, atol=FLOAT32_NATS)
        assert (layer["ffn_rms_out"] == 0).all()


def test_the_length_of_a_write_changes_its_scale_part_only():
    network = tiny_model("llama")
    (before,) = captured(wrapped(network), ragged_responses(1))
    # The last layer has no layer above it that would read the longer write.
    network.model.layers[-1].mlp.down_proj.weight.data *= 8
    (after,) = captured(wrapped(network), ragged_responses(1))
    one, other = (dict(zip(QUANTITIES, values.layers[:, -1].T, strict=True)) for values in (before, after))
    np.testing.assert_allclose(other["ffn_rms_out"], 8 * one["ffn_rms_out"], rtol=1e-5)
    np.testing.assert_allclose(other["ffn_rescaled"], one["ffn_rescaled"], rtol=0, atol=FLOAT32_NATS)
    assert np.abs(other["ffn_out"] - one["ffn_out"]).min() > 1e-3


def test_hooks_are_removed_on_any_exit():
    model = models.wrap(tiny_model("llama"), tiny_tokenizer())

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())

    def fail(states):
        assert hooks() > 0
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"), residual_hooks(model, torch.arange(3), fail):
        model.backbone(input_ids=torch.tensor([[2, 3, 4]]))
    assert hooks() == 0


POST_NORMS = {"attention_write": "post_attention_layernorm", "ffn_write": "post_feedforward_layernorm"}


def test_a_wrong_family_is_refused_by_eq_4(monkeypatch):
    # Gemma 2 norms what its modules write: the raw outputs are not the writes.
    monkeypatch.setitem(TABLE, "gemma2", Family("Gemma 2", logit_softcap="final_logit_softcapping"))
    with pytest.raises(UserError, match=r"eq\. 4 fails in layer 1"):
        verify(HookExtractor(models.wrap(tiny_model("gemma2"), tiny_tokenizer())))


def test_a_wrong_projection_is_refused_by_the_models_logits(monkeypatch):
    monkeypatch.setitem(TABLE, "gemma2", Family("Gemma 2", **POST_NORMS))
    with pytest.raises(UserError, match="does not give the model's own logits"):
        verify(HookExtractor(models.wrap(tiny_model("gemma2"), tiny_tokenizer())))


def test_a_residual_stream_that_changes_between_layers_is_refused():
    model = tiny_model("llama")

    def double(_, args, kwargs):
        # Within each layer eq. 4 still holds.
        return tuple(2 * a for a in args), {k: 2 * v if k == "hidden_states" else v for k, v in kwargs.items()}

    model.model.layers[2].register_forward_pre_hook(double, with_kwargs=True)
    with pytest.raises(UserError, match="layer 3 does not start from the output of layer 2"):
        verify(HookExtractor(models.wrap(model, tiny_tokenizer())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e3, 1e4])
def test_cancelling_massive_activations_pass_verification(dtype, size):
    model = tiny_model("llama", mlp_bias=True)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.bias[5] = size
        model.model.layers[2].mlp.down_proj.bias[5] = -size
    verify(HookExtractor(models.wrap(model.to(dtype), tiny_tokenizer())))


def test_logits_that_overflow_in_the_last_step_only_are_reported():
    model = tiny_model("qwen3")
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(UserError, match="NaN or inf in the final policy's logits"):
        captured(model, ragged_responses())


@pytest.mark.parametrize("model_type", ["qwen3", "gpt_neox"])
def test_grouping_layers_does_not_change_results(model_type, monkeypatch):
    model = tiny_model(model_type, layers=6)
    together = captured(model, ragged_responses())
    monkeypatch.setattr(reduce, "_STATES_BUDGET", 1)
    for least in (1, 4):
        monkeypatch.setattr(reduce, "_LEAST_LAYERS", least)
        for one, other in zip(captured(model, ragged_responses()), together, strict=True):
            # The running sum begins elsewhere, so that its last bits differ.
            np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=FLOAT32_NATS)


def test_positions_are_reduced_in_chunks(monkeypatch):
    whole = captured(tiny_model("qwen3"), ragged_responses(5))
    monkeypatch.setattr(reduce, "_POSITIONS", 7)
    parts = captured(tiny_model("qwen3"), ragged_responses(5))
    for one, other in zip(whole, parts, strict=True):
        # The same numbers up to float32 rounding of differently shaped products.
        np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(one.policy, other.policy, rtol=0, atol=FLOAT32_NATS)


def test_a_model_without_its_head_is_refused():
    with pytest.raises(UserError, match="this LlamaModel has no model; needed is a causal LM with its head"):
        models.wrap(tiny_model("llama").model, tiny_tokenizer())
    with pytest.raises(UserError, match="got a int"):
        models.wrap(42, tiny_tokenizer())


def test_non_finite_weights_are_refused_with_the_layer():
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"layer 2 \(ffn_write\)"):
        verify(HookExtractor(models.wrap(model, tiny_tokenizer())))


def test_states_that_overflow_on_some_token_are_refused_with_the_layer():
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.embed_tokens.weight[60] = float("inf")
    with pytest.raises(UserError, match="in the states of layer 1"):
        captured(model, [{"input_ids": [2, 3, 60, 4], "prompt_length": 2}])
