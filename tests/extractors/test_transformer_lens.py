"""The transformer-lens backend against the hooks: the same results, and the user's objects are unchanged."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import read_responses
from internal_policy.extractors import Batch, HookExtractor, Reducer, reduce_responses, verify
from internal_policy.extractors.transformer_lens import TransformerLensExtractor, from_bridge, from_model, is_bridge
from internal_policy.generation import Request, sample
from internal_policy.models import testbed

# Both sum float32 products of the same weights; where transformer-lens orders them differently, logits of size ~10 are
# off by ~1e-6.
FLOAT32_NATS = 1e-5


def wrapped(model_type, **config):
    # transformer-lens takes a number of key-value heads from any configuration, even if the model has none.
    kv_heads = 4 if model_type == "gpt_neox" else 2
    return models.wrap(
        tiny_model(model_type, attention="eager", kv_heads=kv_heads, **config), tiny_tokenizer(), model_type
    )


def bridge_of(model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    twin = copy.deepcopy(model)
    return build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config, model_name="mine")


def captured(extractor, lens="policy", side="right"):
    records = ragged_responses(vocab=extractor.model.vocab_size)
    responses = read_responses(records, extractor.model.tokenizer, "plain")
    return reduce_responses(Reducer(extractor, lens), responses, side)


def assert_agreement(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(one.policy, other.policy, rtol=0, atol=FLOAT32_NATS)


def batch():
    ids = torch.arange(2, 14).reshape(2, 6)
    return Batch(ids, torch.ones_like(ids), torch.arange(ids.numel()))


def hooks_on(bridge):
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in bridge.hook_points())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox"])
def test_agreement_with_the_hooks(model_type, side):
    model = wrapped(model_type, tied=model_type == "gpt2")
    extractor = from_model(model)
    verify(extractor)
    for lens in ("policy", "logit-lens"):
        assert_agreement(captured(extractor, lens, side), captured(HookExtractor(model), lens, side))


def test_states_come_from_the_bridge():
    model = wrapped("llama")
    extractor = from_model(model)
    plain = extractor.run(batch(), lambda group, projection: group[0].residual_out)
    with extractor.bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda states, hook: torch.zeros_like(states))]):
        ablated = extractor.run(batch(), lambda group, projection: group[0].residual_out)
    assert torch.equal(ablated[0], plain[0])
    assert not torch.allclose(ablated[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["qwen3", "olmo2", "gpt2"])
def test_half_precision_passes_verification(model_type, dtype):
    # OLMo 2 rotates in float32 and casts back, which transformer-lens leaves out.
    model = tiny_model(model_type, tied=model_type == "gpt2").to(dtype)
    verify(from_model(models.wrap(model, tiny_tokenizer())))


def described(model):
    return [
        (name, module, type(module), list(vars(module)), len(module._forward_hooks) + len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def storages(model):
    parameters = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    return {p.untyped_storage().data_ptr() for p in parameters}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_model_object_is_unchanged(model_type):
    model = tiny_model(model_type)
    assert model.config._attn_implementation != "eager"
    # A model made in code names no architecture, and the bridge must have one.
    assert model.config.architectures is None
    ids = batch().input_ids
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, config, logits = described(model), copy.deepcopy(model.config.to_dict()), model(ids).logits
    extractor = from_model(models.wrap(model, tiny_tokenizer()))
    verify(extractor)
    captured(extractor)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert described(model) == modules
    assert model.config.to_dict() == config
    assert model.config._attn_implementation != "eager"
    assert torch.equal(model(ids).logits, logits)
    # The bridge has no second copy of the weights.
    assert storages(extractor.bridge.original_model) == storages(model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_bridge_in_memory_gives_the_same_analysis(model_type):
    model = wrapped(model_type, tied=model_type == "gpt2")
    bridge = bridge_of(model.model)
    assert is_bridge(bridge)
    before = {name: tensor.clone() for name, tensor in bridge.state_dict().items()}
    bridge.train()
    extractor = from_bridge(bridge, model.tokenizer)
    assert not any(module.training for module in bridge.original_model.modules())
    verify(extractor)
    assert extractor.bridge is bridge
    assert extractor.model.name == "mine"
    assert extractor.model.fingerprint() == model.fingerprint()
    assert_agreement(captured(extractor), captured(HookExtractor(model)))
    requests = [Request(Prompt(content="w3 w4"), [3, 4, 5], 0, i) for i in range(3)]
    ours, theirs = (sample(m, requests, max_new_tokens=8, temperature=1.0, seed=0) for m in (extractor.model, model))
    assert [r.input_ids for r in ours] == [r.input_ids for r in theirs]
    assert bridge.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bridge.state_dict().items())


def test_a_bridge_that_the_user_booted_from_a_directory():
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(testbed.path("testbed/qwen3")), device="cpu")
    bridge.enable_compatibility_mode(no_processing=True)
    extractor = from_bridge(bridge)
    verify(extractor)
    model = models.load("testbed/qwen3", dtype="float32", device="cpu", attn_implementation="eager")
    assert extractor.model.fingerprint() == model.fingerprint()
    assert_agreement(captured(extractor), captured(HookExtractor(model)))


def test_a_bridge_with_other_outputs_is_refused():
    model = wrapped("llama")
    bridge = bridge_of(model.model)
    with pytest.raises(UserError, match="this bridge has no tokenizer; pass tokenizer="):
        from_bridge(bridge)
    bridge.add_hook("blocks.1.attn.hook_out", lambda states, hook: 0 * states)
    with pytest.raises(UserError, match=r"this bridge has a hook at blocks\.1\.attn\.hook_out"):
        from_bridge(bridge, model.tokenizer)
    bridge.reset_hooks()
    bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(UserError, match="this bridge's weights are processed"):
        from_bridge(bridge, model.tokenizer)


def test_hooks_and_cached_patterns_are_removed_on_any_exit():
    extractor = from_model(wrapped("gpt2"))

    def fail(states, projection):
        assert hooks_on(extractor.bridge) > 0
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        extractor.run(batch(), fail)
    assert hooks_on(extractor.bridge) == 0
    extractor.run(batch(), lambda group, projection: group[0].residual_out)
    extractor.logits(batch(), lambda own, last, projection: own)
    assert hooks_on(extractor.bridge) == 0
    assert all(block.attn._pattern is None for block in extractor.bridge.blocks)


def test_each_layer_is_reduced_before_the_next_one_runs():
    extractor = from_model(wrapped("qwen3"))
    order = []
    hooks = [(f"blocks.{i}.hook_in", lambda states, hook: order.append(hook.name)) for i in range(3)]
    with extractor.bridge.hooks(fwd_hooks=hooks):
        extractor.run(batch(), lambda group, projection: order.append(group[0].layer))
    assert order == ["blocks.0.hook_in", 1, "blocks.1.hook_in", 2, "blocks.2.hook_in", 3]


def test_models_unknown_to_transformer_lens_are_refused_in_one_line():
    model = models.wrap(tiny_model("helium"), tiny_tokenizer(), "mine")
    with pytest.raises(UserError, match=r"^mine: transformer-lens cannot bridge HeliumForCausalLM \(.*\); use"):
        from_model(model)


def test_missing_transformer_lens_is_reported(monkeypatch):
    for name in ("transformer_lens", "transformer_lens.model_bridge"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[backends\]'"):
        from_model(wrapped("llama"))
    monkeypatch.delitem(sys.modules, "transformer_lens.model_bridge")
    assert not is_bridge(TransformerLensExtractor)
