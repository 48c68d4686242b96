"""The nnsight backend against the hooks, locally and through NDIF: only numbers are sent, and models are unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer

import internal_policy
from internal_policy import UserError, analyze, models
from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import read_responses
from internal_policy.extractors import QUANTITIES, Batch, HookExtractor, Reducer, reduce_responses, verify
from internal_policy.extractors import nnsight as backend
from internal_policy.extractors.nnsight import as_nnsight_error
from internal_policy.generation import Request, sample
from internal_policy.generation.samplers import sample_remotely
from internal_policy.models.projection import weight_by_calls

nnsight = pytest.importorskip("nnsight")

# The same modules run on the same inputs; what is left is the order of float32 sums on another thread count.
FLOAT32_NATS = 1e-5
# What torch.save writes around a tensor, and a pickled list of a few of them.
_ENVELOPE = 6000


def wrapped(model_type, **config):
    return models.wrap(tiny_model(model_type, attention="eager", **config), tiny_tokenizer(), model_type)


def captured(extractor, lens="policy", side="right"):
    responses = read_responses(ragged_responses(), tiny_tokenizer(), "plain")
    return reduce_responses(Reducer(extractor, lens), responses, side)


def assert_agreement(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(one.policy, other.policy, rtol=0, atol=FLOAT32_NATS)


def requests():
    rng = np.random.default_rng(0)
    return [Request(Prompt("x"), rng.integers(2, 61, size=n).tolist(), i, 0) for i, n in enumerate([3, 7, 1])]


def batch():
    ids = torch.arange(2, 14).reshape(2, 6)
    return Batch(ids, torch.ones_like(ids), torch.arange(ids.numel()))


def one_line(error):
    return "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("remote", [False, "local"])
@pytest.mark.parametrize(
    "model_type", ["gemma2", "gpt2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("llama", "gpt_neox"))]
)
def test_agreement_with_the_hooks(model_type, remote):
    model = wrapped(model_type, tied=model_type == "gpt2")
    extractor = backend.from_model(model, remote)
    verify(extractor)
    for lens, side in (("policy", "right"), ("logit-lens", "left")):
        assert_agreement(captured(extractor, lens, side), captured(HookExtractor(model), lens, side))


@pytest.mark.parametrize("remote", [False, "local"])
def test_modules_in_unexpected_order_are_reported_in_one_line(remote):
    model = wrapped("llama")
    model = replace(model, family=replace(model.family, attention="mlp", ffn="self_attn"))
    with pytest.raises(UserError, match="use --backend hooks") as error:
        captured(backend.from_model(model, remote))
    assert one_line(error)


def test_states_are_freed_layer_by_layer():
    alive = []

    def reduce(group, projection):
        assert not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(group[0].residual_out))
        return group[0].residual_out.mean(dim=-1)

    assert len(backend.from_model(wrapped("llama")).run(batch(), reduce)) == len(alive) == 3


@pytest.mark.parametrize("remote", [False, "local"])
def test_the_model_object_is_unchanged(remote):
    model = wrapped("qwen3")
    module, ids = model.model, batch().input_ids

    def described():
        return [
            (name, type(part), {k: id(v) for k, v in vars(part).items()}, list(part._modules))
            for name, part in module.named_modules()
        ]

    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before, config, logits = described(), module.config.to_dict(), module(ids).logits
    padding = model.tokenizer.padding_side, model.tokenizer.pad_token
    captured(backend.from_model(model, remote))
    with pytest.raises(ZeroDivisionError):
        backend.from_model(model, remote).run(batch(), lambda states, projection: 1 / 0)
    assert described() == before
    assert module.config.to_dict() == config
    assert (model.tokenizer.padding_side, model.tokenizer.pad_token) == padding
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(module(ids).logits, logits)


@pytest.mark.parametrize("remote", [False, "local"])
def test_edits_of_an_nnsight_model_are_analysed(remote):
    module = tiny_model("llama", attention="eager")
    plain = captured(HookExtractor(models.wrap(module, tiny_tokenizer())))
    root = nnsight.TransformersModel(module, tokenizer=tiny_tokenizer(), task="text-generation")
    assert backend.is_nnsight(root)
    assert_agreement(captured(backend.from_nnsight(root, remote=remote)), plain)
    with root.edit(inplace=True):
        root.model.layers[1].mlp.output = torch.zeros_like(root.model.layers[1].mlp.output)
    edited = captured(backend.from_nnsight(root, remote=remote))
    assert np.array_equal(edited[0].layers[:, 0], plain[0].layers[:, 0])
    assert not np.allclose(edited[0].layers[:, 1], plain[0].layers[:, 1])
    # A write of nothing is uniform at every length.
    assert np.allclose(edited[0].layers[:, 1, QUANTITIES.index("ffn_out")], np.log(61))
    assert np.allclose(edited[0].layers[:, 1, QUANTITIES.index("ffn_rescaled")], np.log(61))


def test_analyze_accepts_an_nnsight_model():
    module, records = tiny_model("llama", attention="eager"), ragged_responses()
    hooks = analyze(module, tiny_tokenizer(), responses=records)
    ours = analyze(nnsight.NNsight(module), tiny_tokenizer(), responses=records, backend="nnsight")
    numbers = hooks.layers.select_dtypes("number").columns
    np.testing.assert_allclose(ours.layers[numbers], hooks.layers[numbers], rtol=0, atol=FLOAT32_NATS)


def test_analyze_runs_the_ndif_path_locally():
    rng = np.random.default_rng(0)
    records = [{"input_ids": rng.integers(2, 42, size=n).tolist(), "prompt_length": 4} for n in (9, 14)]
    hooks, ours = (
        analyze("testbed/qwen3", responses=records, **options)
        for options in ({}, {"backend": "nnsight", "remote": "local"})
    )
    numbers = hooks.layers.select_dtypes("number").columns
    np.testing.assert_allclose(ours.layers[numbers], hooks.layers[numbers], rtol=0, atol=FLOAT32_NATS)


def test_other_objects_are_recognized_without_importing_nnsight(monkeypatch):
    monkeypatch.delitem(sys.modules, "nnsight")
    assert not backend.is_nnsight(torch.nn.Linear(1, 1))
    assert "nnsight" not in sys.modules


def test_a_missing_library_is_reported_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[backends\]'") as error:
        backend.from_model(wrapped("llama"))
    assert one_line(error)


def test_a_missing_key_is_reported_in_one_line_and_before_anything_is_loaded(monkeypatch):
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    monkeypatch.setattr(nnsight.schema.config.CONFIG.API, "APIKEY", None)
    with pytest.raises(UserError, match="export NDIF_API_KEY=") as error:
        backend.from_hub("nobody/no-such-model")
    assert one_line(error)


def test_a_model_on_this_machine_is_not_on_ndif(monkeypatch):
    monkeypatch.setenv("NDIF_API_KEY", "secret")
    monkeypatch.delenv("NDIF_HOST", raising=False)
    with pytest.raises(UserError, match="models of the hub only"):
        backend.from_hub("testbed/qwen3")
    with pytest.raises(UserError, match="does not travel to NDIF"):
        backend.from_model(wrapped("llama"), remote=True)
    with pytest.raises(UserError, match="cannot run remotely"):
        backend.from_nnsight(nnsight.NNsight(tiny_model("llama")), tiny_tokenizer(), remote="local")


def test_out_of_memory_on_the_server_retries_with_a_smaller_batch():
    from nnsight.intervention.backends.remote import RemoteError

    with pytest.raises(torch.OutOfMemoryError), as_nnsight_error("m"):
        raise RemoteError("Traceback ...\ntorch.OutOfMemoryError: CUDA out of memory.")


@pytest.mark.parametrize("bias", [False, True])
def test_the_unembedding_is_recovered_by_calling_it(bias):
    head = torch.nn.Linear(1500, 40, bias=bias)
    weight, read = weight_by_calls(head, 1500, torch.float32, "cpu")
    # Adding a bias and taking it away again rounds once each.
    torch.testing.assert_close(weight, head.weight, rtol=0, atol=4e-9 if bias else 0)
    assert torch.equal(read, head.bias) if bias else read is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_remote_sampling_gives_the_same_responses(temperature):
    model = wrapped("gemma2")
    # Extra modules of a checkpoint are not part of the policy.
    model.model.generation_config.repetition_penalty = 3.0
    model.model.generation_config.min_new_tokens = 5
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3}
    assert sample_remotely(backend.from_model(model, "local"), requests(), **options) == sample(
        model, requests(), **options
    )
    model.model.generation_config.suppress_tokens = [7]
    with pytest.raises(UserError, match="suppress_tokens"):
        sample_remotely(backend.from_model(model, "local"), requests(), **options)


class Server:
    """A process with NDIF's protocol that cannot import this package."""

    def __init__(self, directory):
        model = tiny_model("qwen3", attention="eager")
        model.save_pretrained(directory)
        tiny_tokenizer().save_pretrained(directory)
        self.model = models.wrap(model, tiny_tokenizer(), "tiny")
        self.directory = str(directory)
        script = Path(__file__).parents[1] / "ndif_server.py"
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.process = subprocess.Popen(
            [sys.executable, str(script), self.directory],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=directory,
        )
        self.host = ""

    def ready(self):
        if not self.host:
            self.host = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        return self.host

    def account(self):
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("ndif"))
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def remote(server, monkeypatch):
    import cloudpickle
    import nnsight.modeling.huggingface

    # nnsight sends code of a checkout by value, and of an installed package by name.
    monkeypatch.setattr(nnsight.ndif, "_PULLED_ENV", True)
    if "internal_policy" in cloudpickle.list_registry_pickle_by_value():
        cloudpickle.unregister_pickle_by_value(internal_policy)
    # nnsight asks the hub for the spelling of a model's name, and this model has none.
    monkeypatch.setitem(nnsight.modeling.huggingface._ID_CACHE, server.directory, server.directory)
    monkeypatch.setenv("NDIF_API_KEY", "secret")
    monkeypatch.setenv("NDIF_HOST", server.ready())
    return backend.from_hub(server.directory, attn_implementation="eager")


@pytest.mark.slow
def test_a_server_without_this_package_gives_the_same_results_and_sends_only_numbers(server, remote):
    assert all(parameter.is_meta for parameter in remote.model.model.parameters())
    ours, n_layers, width = captured(remote), remote.model.n_layers, 32
    assert_agreement(ours, captured(HookExtractor(server.model)))
    account, tokens = server.account(), sum(len(values.layers) for values in ours)
    assert account["result"] <= tokens * n_layers * 8 * 4 + _ENVELOPE
    # The states of one batch would be larger, tiny as this model is.
    assert account["result"] < tokens * n_layers * 6 * width * 4 / 4
    # Code went as source: nothing that depends on the version of Python.
    assert not [name for name in account["classes"] if "CodeType" in name or name.endswith(":_make_function")]
    assert not [name for name in account["classes"] if name.startswith(("internal_policy", "dataclasses"))]
    verify(remote)
    assert [server.account()["result"] < _ENVELOPE for _ in range(2)]


@pytest.mark.slow
def test_a_server_samples_the_same_responses_and_sends_only_token_ids(server, remote):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert sample_remotely(remote, requests(), **options) == sample(server.model, requests(), **options)
    assert server.account()["result"] < _ENVELOPE


@pytest.mark.slow
def test_server_errors_are_reported_in_one_line(server, remote, monkeypatch):
    with pytest.raises(UserError, match="ZeroDivisionError: division by zero") as error:
        remote.run(batch(), lambda states, projection: 1 / 0)
    assert one_line(error)
    monkeypatch.setenv("NDIF_API_KEY", "wrong")
    with pytest.raises(UserError, match=r"Invalid API key.*check NDIF_API_KEY") as error:
        captured(backend.from_hub(server.directory))
    assert one_line(error)
    monkeypatch.setenv("NDIF_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="no connection to NDIF") as error:
        captured(remote)
    assert one_line(error)


@pytest.mark.slow
def test_a_server_with_weights_in_another_process_gives_the_same_results(server, remote):
    urllib.request.urlopen(f"{server.host}/hide-weights").close()
    assert_agreement(captured(remote, "logit-lens"), captured(HookExtractor(server.model), "logit-lens"))
    server.account()
