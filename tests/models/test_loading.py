"""Allowed contents and locations of checkpoint files: anything else is refused before it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from command_line import save
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from internal_policy import UserError, models
from internal_policy.models import testbed

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A small model in two files with their index."""
    directory = save(tiny_model("llama"), tmp_path_factory.mktemp("sharded") / "model")
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    halves = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for file, keys in halves.items():
        save_file({key: weights[key] for key in keys}, directory / file, {"format": "pt"})
    names = {key: file for file, keys in halves.items() for key in keys}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache in the layout of the hub's client, without network: ``hub(directory)`` returns the id of its content."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(directory):
        place = tmp_path / "cache" / "models--me--mine"
        snapshot = place / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)
        (place / "blobs").mkdir()
        for number, file in enumerate(sorted(directory.iterdir())):
            shutil.copy(file, place / "blobs" / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        return "me/mine"

    return put


def here(directory):
    return str(directory)


@pytest.fixture(params=["directory", "hub"])
def placed(request):
    return here if request.param == "directory" else request.getfixturevalue("hub")


def test_shards_and_links_of_the_hub_cache_load(sharded, placed):
    found = models.load(placed(sharded)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in tiny_model("llama").state_dict().items())


def in_pickle(directory):
    torch.save(load_file(directory / "b.safetensors"), directory / "b.bin")
    point_at("b.bin", directory)


def point_at(file, directory):
    index = directory / "model.safetensors.index.json"
    index_content = json.loads(index.read_text())
    index_content["weight_map"] = {
        k: file if v == "b.safetensors" else v for k, v in index_content["weight_map"].items()
    }
    index.write_text(json.dumps(index_content))


def outside(directory):
    shutil.copy(directory / "b.safetensors", directory.parent / "x.safetensors")
    point_at("../x.safetensors", directory)


def chosen_pickle(directory):
    torch.save({}, directory / "adapter_model.bin")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "transformers_weights": "adapter_model.bin"}))


def adapters(directory):
    adapter_config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(directory),
        "target_modules": ["q_proj"],
        "r": 2,
    }
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config))
    torch.save({}, directory / "adapter_model.bin")


UNSAFE = {
    "a pickle": (in_pickle, "model.safetensors.index.json names 'b.bin'; weights in another format may be pickles"),
    "a pickle outside": (lambda d: point_at("../x.bin", d), "names '../x.bin'; weights in another format may be"),
    "outside": (outside, "names '../x.safetensors', which lies outside the model"),
    "an absolute path": (lambda d: point_at("/tmp/x.safetensors", d), "names '/tmp/x.safetensors', which lies outside"),
    "no name": (lambda d: point_at(3, d), "names '3'; weights in another format may be pickles"),
    "no index": (
        lambda d: (d / "model.safetensors.index.json").write_text("[" * 100_000),
        "model.safetensors.index.json is not an index of shards",
    ),
    "a pickle by the configuration": (chosen_pickle, "config.json (transformers_weights) names 'adapter_model.bin'"),
    "adapters": (adapters, "holds LoRA adapters next to the model (adapter_config.json)"),
}


@pytest.mark.parametrize(("spoil", "message"), UNSAFE.values(), ids=UNSAFE)
def test_pickles_and_files_from_elsewhere_are_never_read(sharded, placed, spoil, message, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    directory = shutil.copytree(sharded, tmp_path / "bad" / "model")
    spoil(directory)
    with pytest.raises(UserError) as error:
        models.load(placed(directory))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("whole") / "model")


def altered(source, target, weights=lambda found: found, **config):
    """A copy of a checkpoint with other weights or another configuration."""
    shutil.copytree(source, target)
    save_file(weights(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    base_config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**base_config, **config}))
    return str(target)


def of_the_decoder_alone(found):
    return {key.removeprefix("model."): value for key, value in found.items() if key != "lm_head.weight"}


def with_biases(found):
    names = [key for key in found if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    return found | {name.replace("weight", "bias"): torch.ones(len(found[name])) for name in names}


def quantised(dtype):
    def change(found):
        scales = {}
        for key, value in found.items():
            if "proj" in key:
                scales[key + "_scale"] = value.abs().amax(dim=1, keepdim=True) / 100
                found[key] = (value / scales[key + "_scale"]).round().to(dtype)
        return found | scales

    return change


MISREAD = {
    "biases": (with_biases, {}, "leaves no room for: model.layers.0.self_attn.k_proj.bias and 8 more"),
    "biases of the decoder alone": (
        lambda found: of_the_decoder_alone(with_biases(found)),
        {"tie_word_embeddings": True},
        "self_attn.k_proj.bias and 8 more",
    ),
    "a bias of the head": (lambda f: f | {"lm_head.bias": torch.ones(61)}, {}, "leaves no room for: lm_head.bias;"),
    "a bias of the norm": (lambda f: f | {"model.norm.bias": torch.ones(32)}, {}, "no room for: model.norm.bias;"),
    "int8": (quantised(torch.int8), {}, "is stored as I8 and config.json has no quantization_config"),
    "fp8": (quantised(torch.float8_e4m3fn), {}, "is stored as F8_E4M3 and config.json has no quantization_config"),
    "int64": (lambda f: f | {"model.norm.weight": torch.ones(32).long()}, {}, "model.norm.weight is stored as I64"),
    "an unknown quantiser": (
        quantised(torch.int8),
        {"quantization_config": {"quant_method": "magic", "bits": 4}},
        "the checkpoint is quantised by 'magic', which this version of transformers does not know",
    ),
    "a quantiser that is no object": (lambda f: f, {"quantization_config": "int8"}, "cannot load its config.json"),
}


@pytest.mark.parametrize(("weights", "config", "message"), MISREAD.values(), ids=MISREAD)
def test_tensors_that_would_be_dropped_or_misread_are_refused(whole, tmp_path, weights, config, message):
    with pytest.raises(UserError) as error:
        models.load(altered(whole, tmp_path / "model", weights, **config))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


FURTHER = "model.layers.3.mlp.up_proj.weight"
HARMLESS = {
    "buffers that are computed anew": (
        {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.layers.1.self_attn.masked_bias": torch.ones(1),
        },
        {},
        "",
    ),
    "scales of a cache": ({"model.layers.0.self_attn.k_scale": torch.ones(1)}, {}, ""),
    "a layer that predicts further": ({FURTHER: torch.ones(48, 32)}, {"num_nextn_predict_layers": 1}, FURTHER),
    "a part for pictures": (
        {"model.vision_tower.weight": torch.ones(2), "v.x": torch.ones(1)},
        {},
        "weight and 1 more",
    ),
    "a mask of bytes": ({"score.bias": torch.ones(1, 1, 8, 8).byte()}, {}, "score.bias"),
}


@pytest.mark.parametrize(("more", "config", "notice"), HARMLESS.values(), ids=HARMLESS)
def test_unused_tensors_in_a_checkpoint_are_accepted(whole, tmp_path, more, config, notice, caplog):
    loaded = models.load(altered(whole, tmp_path / "model", lambda found: found | more, **config))
    assert loaded.fingerprint()
    messages = [record.message for record in caplog.records if record.name.startswith("internal_policy")]
    assert bool(messages) == bool(notice)
    assert notice in "".join(messages)


@pytest.mark.parametrize("method", [{"quant_method": "bitsandbytes"}, {"quant_method": "mxfp4"}])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unquantised_integer_weights_are_refused(tmp_path, method, dtype):
    directory = Path(shutil.copytree(testbed.path("testbed/llama"), tmp_path / "m"))
    weights = load_file(directory / "model.safetensors")
    weights |= {k: (100 * v).to(dtype) for k, v in weights.items() if "proj" in k}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**settings, "quantization_config": method}))
    with pytest.raises(UserError) as error:
        models.load(str(directory))
    assert "\n" not in str(error.value)
