"""Several devices, weights that wait elsewhere, and quantised weights: the numbers stay those of the definitions."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from captures import FLOAT32_NATS, captured, check_against_the_same_states, own_entropies, wrapped
from simulated import DEVICE, Devices, OnDevice
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import AnalyzeConfig, UserError, analyze, models, testbed
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.capture import HookExtractor, verify
from internal_policy.models import unembedding
from internal_policy.responses import read_responses


def device_map(n_layers, where):
    """The first layer and the embedding on the first device, the rest on the second; the head beside the embedding."""
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
def test_weights_that_wait_on_the_disk_give_the_same_numbers(where, embedded, arithmetic):
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


@pytest.mark.parametrize(("tied", "lens"), [(True, "policy"), (False, "logit-lens")])
def test_layers_on_two_devices(tied, lens, monkeypatch):
    from accelerate import dispatch_model

    monkeypatch.setattr(unembedding, "_DENSE", (*unembedding._DENSE, OnDevice))
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
        found = Dynamics(split, responses, 1, lens=lens).measure()
        assert found.row() == pytest.approx(watched.row(), abs=FLOAT32_NATS, nan_ok=True)
        # Both devices worked, and nothing met a tensor of the other.
        assert all(devices.operations[f"{DEVICE}:{i}"] > 100 for i in (0, 1))
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(2, device=first) + torch.ones(2, device=second)


def test_layers_and_the_unembedding_that_wait_on_the_cpu(monkeypatch):
    from accelerate import dispatch_model

    monkeypatch.setattr(unembedding, "_DENSE", (*unembedding._DENSE, OnDevice))
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
def test_layers_on_a_real_gpu_and_elsewhere(second, embedded, arithmetic):
    if second == 1 and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    placed = models.load("testbed/qwen3", device_map=device_map(embedded.n_layers, (0, second)), dtype="float32")
    verify(HookExtractor(placed))
    assert placed.fingerprint() == embedded.fingerprint()
    for one, other in zip(captured(embedded, arithmetic), captured(placed, arithmetic), strict=True):
        # Another device adds in another order; eight layers carry that on.
        np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=20 * FLOAT32_NATS)


@pytest.mark.slow
def test_an_analysis_samples_and_measures_the_same_wherever_the_weights_are(embedded):
    placed = models.load("testbed/qwen3", device_map=device_map(embedded.n_layers, ("disk", "cpu")))
    one, other = (analyze(m.model, m.tokenizer, prompts=["1+2="], max_responses=2) for m in (embedded, placed))
    assert one.sequences["input_ids"].tolist() == other.sequences["input_ids"].tolist()
    np.testing.assert_array_equal(one.layers["entropy_out"], other.layers["entropy_out"])


BITS = ["4bit", pytest.param("8bit", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=BITS)
def quantised(request):
    pytest.importorskip("bitsandbytes")
    return models.load("testbed/qwen3", quantization=request.param)


def test_quantised_weights_give_the_states_that_the_model_computes(quantised, embedded, arithmetic):
    model = quantised
    four = "4-bit" in model.quantization
    assert model.quantization == f"bitsandbytes {'4-bit (nf4)' if four else '8-bit'}"
    assert embedded.quantization is None
    assert model.dtype == model.projection.weight.dtype == torch.float32
    before = model.fingerprint()
    verify(HookExtractor(model))
    check_against_the_same_states(model, arithmetic)
    assert model.fingerprint() == before != embedded.fingerprint()
    for record, values, plain in zip(
        arithmetic, captured(model, arithmetic), captured(embedded, arithmetic), strict=True
    ):
        if four:  # which quantises nothing but weights: a batch changes nothing
            own = own_entropies(model.model, record)
            np.testing.assert_allclose(values.policy[:, 1], own, rtol=0, atol=FLOAT32_NATS)
        assert np.abs(values.layers - plain.layers).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantised_bfloat16_passes_the_proof(bits, arithmetic):
    pytest.importorskip("bitsandbytes")
    model = models.load("testbed/llama", quantization=bits, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    verify(HookExtractor(model))
    check_against_the_same_states(model, arithmetic)


def test_a_quantised_checkpoint_is_loaded_as_it_is(quantised, arithmetic, tmp_path):
    saved = tmp_path / "model"
    quantised.model.save_pretrained(saved)
    quantised.tokenizer.save_pretrained(saved)
    again = models.load(str(saved))
    assert (again.quantization, again.fingerprint()) == (quantised.quantization, quantised.fingerprint())
    for one, other in zip(captured(quantised, arithmetic), captured(again, arithmetic), strict=True):
        np.testing.assert_array_equal(one.layers, other.layers)
    with pytest.raises(UserError, match=r"--quantization 4bit was given with .*[48]-bit.*leave it out"):
        models.load(str(saved), quantization="4bit")
    with pytest.raises(UserError, match=r"--dtype bfloat16 .*computes in float32; leave --dtype out"):
        models.load(str(saved), dtype="bfloat16")


def save_tiny(directory, model_type="llama", **config):
    tiny_model(model_type, **config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_unembedding_is_read_or_refused(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # A head that is left out by another name is not left out.
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["none"])
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "m"), quantization_config=quantization, device_map={"": "cpu"}, dtype="float32"
    )
    if bits == 8:
        # LLM.int8 rounds the states themselves to 8 bits.
        with pytest.raises(UserError, match="lm_head also quantises the states that it receives"):
            wrapped(model)
        return
    found = wrapped(model)
    assert model.lm_head.weight.dtype == torch.uint8
    assert tuple(found.projection.weight.shape) == (61, 32)
    verify(HookExtractor(found))
    record = ragged_responses(1)[0]
    np.testing.assert_allclose(
        captured(found, [record])[0].policy[:, 1], own_entropies(model, record), rtol=0, atol=FLOAT32_NATS
    )


def test_what_8_bit_products_do_to_their_input_is_not_told_at_each(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    model = models.load(save_tiny(tmp_path / "m"), quantization="8bit")
    captured(model, ragged_responses(1))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bitsandbytes")] == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers makes it bfloat16 where there is no GPU")
def test_an_fp8_checkpoint_is_what_transformers_makes_of_it(tmp_path):
    from safetensors.torch import save_file

    directory = tmp_path / "model"
    save_tiny(directory)
    state = {}
    for name, weight in tiny_model("llama").bfloat16().state_dict().items():
        state[name] = weight.contiguous()
        if weight.ndim == 2 and "layers" in name:
            state[f"{name}_scale_inv"] = scale = (weight.abs().max() / 448).float().reshape(1, 1)
            state[name] = (weight / scale).to(torch.float8_e4m3fn)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    own = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": own, "dtype": "bfloat16"}))
    model = models.load(str(directory))
    assert (model.dtype, model.quantization) == (torch.bfloat16, None)
    verify(HookExtractor(model))
    check_against_the_same_states(model, ragged_responses(2))


@pytest.mark.parametrize(
    ("package", "settings", "said"),
    [
        ("optimum", {"quant_method": "gptq", "bits": 4, "group_size": 32}, r"optimum.*pip install optimum"),
        ("gptqmodel", {"quant_method": "awq", "bits": 4, "group_size": 32}, r"gptqmodel.*pip install gptqmodel"),
        ("compressed_tensors", {"quant_method": "compressed-tensors"}, r"pip install compressed-tensors"),
    ],
)
def test_a_missing_package_is_told_with_its_pip_command(package, settings, said, tmp_path):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    directory = tmp_path / "model"
    shutil.copytree(testbed.path("testbed/qwen3"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(UserError, match=said) as caught:
        models.load(str(directory))
    assert len(str(caught.value).splitlines()) == 1


def test_without_bitsandbytes_its_pip_command_is_told(monkeypatch):
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install -U bitsandbytes.*install what is missing"):
        models.load("testbed/qwen3", quantization="4bit")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "auto", "device": "cpu"}, "--device cpu was given with --device-map"),
        ({"device_map": "cuda"}, "--device-map is 'cuda'; needed is one of auto, balanced"),
        ({"quantization": "2bit"}, "--quantization is '2bit'; needed is one of 8bit, 4bit"),
        ({"device_map": 3}, "device_map is a int"),
        ({"device_map": {"model.layers.0": "cpu", "model": "disk"}}, "lm_head.weight; change how it is loaded"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        models.load("testbed/qwen3", **options)
    if isinstance(next(iter(options.values())), str):
        with pytest.raises(UserError, match=said):
            AnalyzeConfig(**options)


def test_the_settings_that_decide_the_numbers_hold_the_quantisation_and_not_the_placement():
    assert "device_map" not in AnalyzeConfig(device_map="auto").decisive()
    assert AnalyzeConfig(quantization="4bit").decisive()["quantization"] == "4bit"
    with pytest.raises(UserError, match="--quantization was given with --backend transformer-lens"):
        AnalyzeConfig(quantization="8bit", backend="transformer-lens")
