"""Several devices and offloaded weights: results still match the definitions."""

from __future__ import annotations

import copy
from dataclasses import astuple

import numpy as np
import pytest
import simulated_devices
import torch
from capture_checks import FLOAT32_NATS, captured, wrapped
from simulated_devices import DEVICE, Devices, OnDevice
from tiny import ragged_responses, tiny_model

from internal_policy import AnalyzeConfig, UserError, analyze, models
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.data.responses import read_responses
from internal_policy.extractors import HookExtractor, verify
from internal_policy.generation.internal import InternalPolicy, compare_with_final
from internal_policy.models import devices as devices_module
from internal_policy.models import projection


def device_map(n_layers, where):
    """The first layer and the embedding on the first device, the rest on the second; the head with the embedding."""
    first, second = where
    rest = {f"model.layers.{i}": first if i == 0 else second for i in range(n_layers)}
    return {"model.embed_tokens": first, "lm_head": first, "model.rotary_emb": first, **rest, "model.norm": second}


@pytest.fixture(scope="module")
def embedded():
    return models.load("testbed/qwen3")


@pytest.fixture(scope="module")
def arithmetic(embedded):
    rng = np.random.default_rng(0)
    draw = [rng.integers(3, embedded.vocab_size, size=n).tolist() for n in (9, 14, 11)]
    return [{"input_ids": ids, "prompt_length": 4} for ids in draw]


@pytest.mark.parametrize("where", [("cpu", "cpu"), ("cpu", "disk"), ("disk", "cpu"), ("disk", "disk")])
def test_weights_offloaded_to_disk_give_the_same_results(where, embedded, arithmetic):
    placed = models.load("testbed/qwen3", device_map=device_map(embedded.n_layers, where))
    assert placed.placement == ", ".join(dict.fromkeys(where))
    assert placed.device == torch.device("cpu")
    assert placed.fingerprint() == embedded.fingerprint()
    assert placed.projection.weight.device == torch.device("cpu")
    verify(HookExtractor(placed))
    for one, other in zip(captured(embedded, arithmetic), captured(placed, arithmetic), strict=True):
        # The same products of the same numbers.
        np.testing.assert_array_equal(one.layers, other.layers)
        np.testing.assert_array_equal(one.policy, other.policy)


@pytest.mark.parametrize(
    ("tied", "lens", "float64"), [(True, "policy", True), (False, "logit-lens", True), (True, "policy", False)]
)
def test_layers_on_two_devices(tied, lens, float64, monkeypatch):
    from accelerate import dispatch_model

    monkeypatch.setattr(simulated_devices, "FLOAT64", float64)
    if not float64:
        monkeypatch.setattr(devices_module, "_WITHOUT_FLOAT64", ("mps", DEVICE))
    monkeypatch.setattr(projection, "_DENSE", (*projection._DENSE, OnDevice))
    whole = wrapped(tiny_model("qwen3", tied=tied, attention="eager"))
    records = ragged_responses(3)
    responses = read_responses(records, whole.tokenizer, "plain")
    expected, watched = captured(whole, records, lens=lens), Dynamics(whole, responses, 1, lens=lens).measure()
    first, second = torch.device(DEVICE, 0), torch.device(DEVICE, 1)
    plan = device_map(3, (first, second)) | ({} if tied else {"lm_head": second})
    with Devices() as devices:
        split = wrapped(dispatch_model(copy.deepcopy(whole.model), plan))
        assert (split.device, split.placement) == (first, f"{DEVICE}:0, {DEVICE}:1")
        assert split.projection.weight.device == (first if tied else second)
        assert split.fingerprint() == whole.fingerprint()
        verify(HookExtractor(split))
        for one, other in zip(expected, captured(split, records, lens=lens), strict=True):
            np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=FLOAT32_NATS)
            np.testing.assert_allclose(one.policy, other.policy, rtol=0, atol=FLOAT32_NATS)
        own, alone = (compare_with_final(each, responses, InternalPolicy(2))[0] for each in (split, whole))
        assert astuple(own) == pytest.approx(astuple(alone), abs=FLOAT32_NATS)
        found = Dynamics(split, responses, 1, lens=lens).measure()
        assert found.row() == pytest.approx(watched.row(), abs=FLOAT32_NATS, nan_ok=True)
        # Both devices were used, and no operation mixed them.
        assert all(devices.operations[f"{DEVICE}:{i}"] > 100 for i in (0, 1))
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, device=first) + torch.ones(2, device=second)


def test_layers_and_unembedding_offloaded_to_the_cpu(monkeypatch):
    from accelerate import dispatch_model

    monkeypatch.setattr(projection, "_DENSE", (*projection._DENSE, OnDevice))
    whole = wrapped(tiny_model("cohere", attention="eager"))
    expected = captured(whole, ragged_responses(3))
    first = torch.device(DEVICE, 0)
    with Devices():
        split = wrapped(dispatch_model(copy.deepcopy(whole.model), device_map(3, (first, "cpu")) | {"lm_head": "cpu"}))
        assert (split.device, split.placement) == (first, f"{DEVICE}:0, cpu")
        assert split.model.lm_head.weight.is_meta
        # What every layer needs is fetched once.
        assert split.projection.weight.device == first
        assert split.fingerprint() == whole.fingerprint()
        verify(HookExtractor(split))
        for one, other in zip(expected, captured(split, ragged_responses(3)), strict=True):
            np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("second", ["cpu", "disk", 1])
def test_layers_on_a_real_gpu_and_on_the_cpu(second, embedded, arithmetic):
    if second == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    placed = models.load("testbed/qwen3", device_map=device_map(embedded.n_layers, (0, second)), dtype="float32")
    verify(HookExtractor(placed))
    assert placed.fingerprint() == embedded.fingerprint()
    for one, other in zip(captured(embedded, arithmetic), captured(placed, arithmetic), strict=True):
        # Another device adds in another order; eight layers carry that on.
        np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=20 * FLOAT32_NATS)


@pytest.mark.slow
def test_an_analysis_does_not_depend_on_weight_placement(embedded):
    placed = models.load("testbed/qwen3", device_map=device_map(embedded.n_layers, ("disk", "cpu")))
    one, other = (analyze(m.model, m.tokenizer, prompts=["1+2="], max_responses=2) for m in (embedded, placed))
    assert one.sequences["input_ids"].tolist() == other.sequences["input_ids"].tolist()
    np.testing.assert_array_equal(one.layers["entropy_out"], other.layers["entropy_out"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "auto", "device": "cpu"}, "--device cpu was given with --device-map"),
        ({"device_map": "cuda"}, "--device-map is 'cuda'; needed is one of auto, balanced"),
        ({"quantization": "2bit"}, "--quantization is '2bit'; needed is one of 8bit, 4bit"),
        ({"device_map": 3}, "device_map is a int"),
        ({"device_map": {"model.layers.0": "cpu", "model": "disk"}}, "lm_head.weight; change how it is loaded"),
    ],
)
def test_contradictory_device_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        models.load("testbed/qwen3", **options)
    if isinstance(next(iter(options.values())), str):
        with pytest.raises(UserError, match=message):
            AnalyzeConfig(**options)


def test_the_cache_key_includes_quantisation_but_not_placement():
    assert "device_map" not in AnalyzeConfig(device_map="auto").cache_key()
    assert AnalyzeConfig(quantization="4bit").cache_key()["quantization"] == "4bit"
    with pytest.raises(UserError, match="--quantization was given with --backend transformer-lens"):
        AnalyzeConfig(quantization="8bit", backend="transformer-lens")


def test_a_device_that_torch_knows_only_by_name_is_refused():
    with pytest.raises(UserError, match=r"device 'hpu' cannot be used here \(.*\); use auto or cpu"):
        models.load("testbed/qwen3", device="hpu")
