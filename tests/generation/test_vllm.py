"""Sampling by vLLM: requests and results, with a mock that has vLLM's signatures.

The engine needs a GPU and is not run: the mock takes the parameters of vLLM 0.33.0 and samples with the
project's own streams, so that a wrong prompt, order, seed, limit or end gives other responses.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pandas as pd
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from internal_policy import AnalyzeConfig, UserError, analyze, models
from internal_policy.data.prompts import Prompt
from internal_policy.evaluation import evaluate
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.generation import Request, VllmSampler, refuse_generator, sample, sampling
from internal_policy.generation import vllm as vllm_engine
from internal_policy.models import testbed

OF_LLM = {
    *("runner", "convert", "tokenizer", "tokenizer_mode", "skip_tokenizer_init", "trust_remote_code", "dtype"),
    *("tensor_parallel_size", "quantization", "revision", "tokenizer_revision", "chat_template", "seed"),
    *("gpu_memory_utilization", "cpu_offload_gb", "enforce_eager", "hf_token", "hf_overrides"),
    *("kv_cache_memory_bytes", "max_model_len", "generation_config", "load_format"),
}
"""Keywords of vllm.LLM, the last three of vllm.EngineArgs, to which it hands the rest."""
DTYPES = {"auto", "half", "float16", "bfloat16", "float", "float32"}
FEW = {"max_responses": 3, "samples_per_prompt": 2, "max_new_tokens": 6}


@dataclass
class SamplingParams:
    """Those fields of vllm.SamplingParams that concern sampling, with its defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list | None = None
    stop_token_ids: list | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    detokenize: bool = True


class LLM:
    made: ClassVar[list] = []

    def __init__(self, model, **kwargs):
        assert kwargs.keys() <= OF_LLM
        assert kwargs["dtype"] in DTYPES
        self.model, self.kwargs, self.closed, self.calls = model, kwargs, False, []
        self.loaded = models.load(model) if model != "hub/id" else None
        LLM.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        assert not self.closed
        assert len(prompts) == len(sampling_params)
        self.calls.append((prompts, sampling_params))
        p = sampling_params[0]
        assert p.ignore_eos, "else vLLM has ends of its own"
        seeds = [q.seed for q in sampling_params]
        sampler = sampling.RowSampler(seeds, p.temperature, torch.device("cpu")) if p.temperature else None
        room = [q.max_tokens for q in sampling_params]
        ids = [q["prompt_token_ids"] for q in prompts]
        rows = sampling._decode_in_rounds(self.loaded, ids, room, p.stop_token_ids, sampler)
        outputs = []
        for row, limit in zip(rows, room, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in p.stop_token_ids), limit)
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(row[:end]), text="")]))
        return outputs


@pytest.fixture
def vllm(monkeypatch):
    def cleanup(shutdown_ray=False):
        LLM.made[-1].closed = True

    LLM.made.clear()
    module, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, dict
    distributed.cleanup_dist_env_and_memory = cleanup
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setattr(vllm_engine, "require_first_gpu", lambda device: None)
    monkeypatch.setattr(vllm_engine, "free_share", lambda device: 0.5)
    return LLM


@pytest.mark.slow
def test_analysis_responses_do_not_depend_on_the_sampler(vllm, tmp_path, monkeypatch):
    from internal_policy.analysis import pipeline

    real = pipeline.Reducer

    def given_up_before(*arguments):
        assert [engine.closed for engine in vllm.made] == [True]
        return real(*arguments)

    monkeypatch.setattr(pipeline, "Reducer", given_up_before)
    theirs = analyze("testbed/qwen3", generator="vllm", batch_size=2, output=tmp_path, **FEW)
    (engine,) = vllm.made
    assert len(engine.calls) == 1, "vLLM makes batches by itself"
    monkeypatch.setattr(pipeline, "Reducer", real)
    ours = analyze("testbed/qwen3", **FEW)
    pd.testing.assert_frame_equal(theirs.sequences, ours.sequences, check_exact=True)
    assert json.loads((theirs.path / "analysis.json").read_text())["config"]["generator"] == "vllm"
    with pytest.raises(UserError, match="generator vllm -> transformers"):
        analyze("testbed/qwen3", output=tmp_path, **FEW)


def test_evaluation_samples_do_not_depend_on_the_sampler(vllm):
    few = {"samples": 3, "max_problems": 4, "max_new_tokens": 30}
    theirs = evaluate("testbed/qwen3", generator="vllm", **few)
    pd.testing.assert_frame_equal(theirs.samples, evaluate("testbed/qwen3", **few).samples, check_exact=True)
    assert theirs.config["generator"] == "vllm"
    assert [engine.closed for engine in vllm.made] == [True]


def test_engine_and_sampling_parameters(vllm, monkeypatch):
    directory = str(testbed.path("testbed/llama"))
    model = models.load("testbed/llama")
    requests = [Request(Prompt("x"), [3] * n, i, i) for i, n in enumerate((5, 9))]
    with VllmSampler(model, requests, 7, trust_remote_code=False) as draw:
        drawn = draw(requests, max_new_tokens=7, temperature=0.0, seed=4)
        draw(requests[:1], max_new_tokens=7, temperature=0.5, seed=4)
    assert drawn == sample(model, requests, max_new_tokens=7, temperature=0.0, seed=4)
    (engine,) = vllm.made
    assert engine.model == directory
    assert engine.kwargs == {
        "revision": None,
        "tokenizer_revision": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "load_format": "safetensors",
        "max_model_len": 9 + 7,
        "gpu_memory_utilization": 0.5,
        "generation_config": "vllm",
    }
    prompts, params = engine.calls[1]
    assert prompts == [{"prompt_token_ids": [3] * 5}]
    ends = [model.tokenizer.eos_token_id]
    assert params == [
        SamplingParams(
            temperature=0.5,
            seed=requests[0].stream_seed(4),
            stop_token_ids=ends,
            ignore_eos=True,
            max_tokens=7,
            detokenize=False,
        )
    ]
    monkeypatch.setattr(vllm_engine, "check", lambda name, **_: (name, None))
    named = replace(model, name="hub/id", revision="5f0b", model=model.model.to(torch.bfloat16))
    assert VllmSampler(named, requests, 7, trust_remote_code=True)._start_engine() is vllm.made[-1]
    started = vllm.made[-1]
    assert (started.model, started.kwargs["revision"], started.kwargs["tokenizer_revision"]) == ("hub/id",) + (
        "5f0b",
    ) * 2
    assert (started.kwargs["dtype"], started.kwargs["trust_remote_code"]) == ("bfloat16", True)


def test_response_length_is_limited_by_the_remaining_context(vllm):
    model = models.wrap(tiny_model("llama"), tiny_tokenizer())
    requests = [Request(Prompt("x"), [3] * n, i, 0) for i, n in enumerate((60, 5))]
    sampler = VllmSampler(model, requests, 50, trust_remote_code=False)
    sampler._engine = LLM("hub/id", dtype="float32", max_model_len=sampler._longest)
    sampler._engine.loaded = model
    assert sampler._longest == 64
    drawn = sampler(requests, max_new_tokens=50, temperature=1.0, seed=0)
    assert [p.max_tokens for p in sampler._engine.calls[0][1]] == [4, 50]
    assert drawn == sample(model, requests, max_new_tokens=50, temperature=1.0, seed=0)


def test_a_complete_run_starts_no_engine(vllm):
    with VllmSampler(models.load("testbed/llama"), [], 7, trust_remote_code=False):
        pass
    assert vllm.made == []


def test_a_model_that_vllm_fails_to_load_is_reported_in_one_line(vllm, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Qwen9 is not supported\nby this version")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", refuse)
    with pytest.raises(UserError, match=r"testbed/qwen3: vLLM cannot load it \(Qwen9 is not supported\)"):
        analyze("testbed/qwen3", generator="vllm", **FEW)


def test_missing_vllm_or_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    for run in (analyze, evaluate):
        with pytest.raises(UserError, match="pip install vllm"):
            run("testbed/qwen3", generator="vllm")
    with pytest.raises(UserError, match="needs a GPU and the model is on cpu"):
        vllm_engine.require_first_gpu(torch.device("cpu"))
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES"):
        vllm_engine.require_first_gpu(torch.device("cuda:1"))
    vllm_engine.require_first_gpu(torch.device("cuda:0"))


def test_models_that_vllm_cannot_load_are_refused(vllm):
    model = models.load("testbed/llama")
    with pytest.raises(UserError, match="model object"):
        analyze(model.model, model.tokenizer, generator="vllm")
    with pytest.raises(UserError, match="model object"):
        evaluate(model, generator="vllm")
    with pytest.raises(UserError, match="2 processes"):
        refuse_generator("vllm", in_memory=False, processes=2)
    for message, options in {
        "--quantization was given": {"quantization": "8bit"},
        "--device-map was given": {"device_map": "auto"},
        "--remote was given": {"remote": True, "backend": "nnsight"},
        "--generator was given with --responses": {"responses": "r.jsonl"},
    }.items():
        with pytest.raises(UserError, match=message):
            AnalyzeConfig(generator="vllm", **options)
    for config in (AnalyzeConfig, lambda **o: EvaluateConfig("m", "b", **o)):
        with pytest.raises(UserError, match="--generator is 'x'; needed is one of transformers, vllm"):
            config(generator="x")
    assert vllm.made == []
