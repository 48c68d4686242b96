"""Quantised weights: results match the definitions applied to the dequantised weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from capture_checks import FLOAT32_NATS, captured, check_quantities, entropies_of_logits, wrapped
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.extractors import HookExtractor, verify
from internal_policy.models import testbed


def save_tiny(directory, model_type="llama", **config):
    tiny_model(model_type, **config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


# Whole blocks of the 64 weights that share a scale in every row: bitsandbytes is wrong with others on some CPUs.
WHOLE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
BITS = ["4bit", "8bit"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint") / "m", "qwen3", **WHOLE)


@pytest.fixture(scope="module", params=BITS)
def quantised(request, checkpoint):
    pytest.importorskip("bitsandbytes")
    return models.load(checkpoint, quantization=request.param)


def test_quantised_weights_give_the_states_of_the_model(quantised, checkpoint):
    model, plain = quantised, models.load(checkpoint)
    four = "4-bit" in model.quantization
    assert model.quantization == f"bitsandbytes {'4-bit (nf4)' if four else '8-bit'}"
    assert plain.quantization is None
    assert model.dtype == model.projection.weight.dtype == torch.float32
    before, records = model.fingerprint(), ragged_responses(3)
    verify(HookExtractor(model))
    check_quantities(model, records)
    assert model.fingerprint() == before != plain.fingerprint()
    for record, values, dense in zip(records, captured(model, records), captured(plain, records), strict=True):
        if four:  # which quantises only weights, so batching has no effect
            own = entropies_of_logits(model.model, record)
            np.testing.assert_allclose(values.policy[:, 1], own, rtol=0, atol=FLOAT32_NATS)
        assert np.abs(values.layers - dense.layers).max() > 1e-4


@pytest.mark.parametrize("bits", BITS)
def test_quantised_bfloat16_passes_verification(bits, checkpoint):
    pytest.importorskip("bitsandbytes")
    model = models.load(checkpoint, quantization=bits, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    verify(HookExtractor(model))
    check_quantities(model, ragged_responses(3))


def test_a_quantised_checkpoint_is_loaded_as_it_is(quantised, tmp_path):
    saved = tmp_path / "model"
    quantised.model.save_pretrained(saved)
    quantised.tokenizer.save_pretrained(saved)
    again = models.load(str(saved))
    assert (again.quantization, again.fingerprint()) == (quantised.quantization, quantised.fingerprint())
    records = ragged_responses(3)
    for one, other in zip(captured(quantised, records), captured(again, records), strict=True):
        np.testing.assert_array_equal(one.layers, other.layers)
    with pytest.raises(UserError, match=r"--quantization 4bit was given with .*[48]-bit.*leave it out"):
        models.load(str(saved), quantization="4bit")
    with pytest.raises(UserError, match=r"--dtype bfloat16 .*computes in float32; leave --dtype out"):
        models.load(str(saved), dtype="bfloat16")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_unembedding_is_read_or_refused(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # A head that is left out by another name is not left out.
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["none"])
    model = AutoModelForCausalLM.from_pretrained(
        save_tiny(tmp_path / "m", **WHOLE), quantization_config=quantization, device_map={"": "cpu"}, dtype="float32"
    )
    if bits == 8:
        # LLM.int8 rounds the states themselves to 8 bits.
        with pytest.raises(UserError, match="lm_head also quantises the states that it receives"):
            wrapped(model)
        return
    found = wrapped(model)
    assert model.lm_head.weight.dtype == torch.uint8
    assert tuple(found.projection.weight.shape) == (61, 64)
    verify(HookExtractor(found))
    record = ragged_responses(1)[0]
    np.testing.assert_allclose(
        captured(found, [record])[0].policy[:, 1], entropies_of_logits(model, record), rtol=0, atol=FLOAT32_NATS
    )


@pytest.fixture
def repacking(monkeypatch):
    """bitsandbytes as it is on a CPU with AVX512-BF16: its 4-bit layers repack their weights."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    return modules


def test_4_bit_weights_are_not_repacked_in_bfloat16(repacking, checkpoint):
    model, record = models.load(checkpoint, quantization="4bit"), ragged_responses(1)[0]
    before, first = model.fingerprint(), captured(model, [record])[0]
    # A fingerprint reads the state dict, and that is what scrambles weights that were repacked.
    assert model.fingerprint() == before
    np.testing.assert_array_equal(captured(model, [record])[0].layers, first.layers)
    plain = models.load(checkpoint)
    codes = {n: dequantised(w) for n, w in model.model.named_parameters() if hasattr(w, "quant_state")}
    plain.model.load_state_dict(codes, strict=False)
    # Only the weights are rounded.
    np.testing.assert_allclose(captured(plain, [record])[0].layers, first.layers, rtol=0, atol=FLOAT32_NATS)


def dequantised(weight):
    """Codes of 4 bits, two in a byte, times the scale of the 64 that they are among."""
    state, pairs = weight.quant_state, weight.data.reshape(-1)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1, 64)
    return (state.code[codes.long()] * state.absmax.reshape(-1, 1)).reshape(state.shape)


def test_a_model_whose_4_bit_weights_were_repacked_is_refused(repacking):
    model = tiny_model("llama")
    model.model.layers[0].self_attn.o_proj = linear = repacking.Linear4bit(32, 32, bias=False)
    linear.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(UserError, match=r"repacked these 4-bit weights .* hand it over before it runs"):
        wrapped(model)


WRONG = r"testbed/qwen3: bitsandbytes dequantises 4-bit weights with 96 columns wrongly on this CPU .*use 8bit or a GPU"


def test_4_bit_weights_that_are_dequantised_wrongly_are_refused(monkeypatch):
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "dequantize_4bit", lambda codes, state: torch.full(state.shape, state.shape[0]))
    with pytest.raises(UserError, match=WRONG) as caught:
        models.load("testbed/qwen3", quantization="4bit")
    assert len(str(caught.value).splitlines()) == 1


def test_a_4_bit_embedded_model_matches_its_dequantised_codes():
    pytest.importorskip("bitsandbytes")
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        with pytest.raises(UserError, match=WRONG):
            models.load("testbed/qwen3", quantization="4bit")
        pytest.skip("bitsandbytes dequantises its weights wrongly with AVX512; a CPU without it runs the rest")
    model, plain = models.load("testbed/qwen3", quantization="4bit"), models.load("testbed/qwen3")
    for name, weight in model.model.named_parameters():
        if hasattr(weight, "quant_state"):
            dense = plain.model.get_parameter(name)
            # Half of the widest gap between two codes, times the largest weight.
            assert (dequantised(weight) - dense).abs().max() <= 0.16 * dense.abs().max()
    verify(HookExtractor(model))
    check_quantities(model, [{"input_ids": [*range(3, 12)], "prompt_length": 4}])


def test_8_bit_input_cast_warnings_are_silenced(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    model = models.load(save_tiny(tmp_path / "m"), quantization="8bit")
    captured(model, ragged_responses(1))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("bitsandbytes")] == []


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="transformers makes it bfloat16 where there is no GPU")
def test_an_fp8_checkpoint_matches_transformers(tmp_path):
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
    check_quantities(model, ragged_responses(2))


@pytest.mark.parametrize(
    ("package", "settings", "message"),
    [
        ("optimum", {"quant_method": "gptq", "bits": 4, "group_size": 32}, r"optimum.*pip install optimum"),
        ("gptqmodel", {"quant_method": "awq", "bits": 4, "group_size": 32}, r"gptqmodel.*pip install gptqmodel"),
        ("compressed_tensors", {"quant_method": "compressed-tensors"}, r"pip install compressed-tensors"),
    ],
)
def test_a_missing_package_is_reported_with_its_pip_command(package, settings, message, tmp_path):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    directory = tmp_path / "model"
    shutil.copytree(testbed.path("testbed/qwen3"), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    with pytest.raises(UserError, match=message) as caught:
        models.load(str(directory))
    assert len(str(caught.value).splitlines()) == 1


def test_without_bitsandbytes_its_pip_command_is_reported(monkeypatch):
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install -U bitsandbytes.*install what is missing"):
        models.load("testbed/qwen3", quantization="4bit")
