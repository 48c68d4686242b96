"""Global torch settings and other users of the model do not change the results."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pandas as pd
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from torch import nn
from training_calls import MODEL, SMALL

from internal_policy import analyze, bupo, inspect, models
from internal_policy.evaluation import evaluate
from internal_policy.extractors import Batch, HookExtractor


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AROUND = {
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "float64 by default": partial(default_dtype, torch.float64),
    "bfloat16 by default": partial(default_dtype, torch.bfloat16),
    "another device by default": partial(torch.device, "meta"),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
}


@pytest.fixture(scope="module")
def plain():
    return analysed(tiny_model("qwen3"), seed=1)


def analysed(model, seed):
    return analyze(model, tiny_tokenizer(), responses=ragged_responses(seed=seed), keep_tokens=0)


def assert_same(a, b):
    pd.testing.assert_frame_equal(a.responses, b.responses, check_exact=True)


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_an_analysis_does_not_depend_on_global_torch_state(around, plain):
    model = tiny_model("qwen3")
    with around():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")
        found = analysed(model, seed=1)
        assert before == (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
    assert found.model["dtype"] == "float32"
    assert_same(found, plain)


@pytest.mark.parametrize("around", [AROUND["autocast"], AROUND["another device by default"]])
def test_loading_and_sampling_do_not_depend_on_global_torch_state(around):
    def values():
        look = inspect("testbed/llama", prompt="3+4=?;", max_new_tokens=3, seed=2)
        table = look.values  # noqa: PD011 - no DataFrame
        rated = evaluate("testbed/llama", samples=2, max_problems=2, max_new_tokens=4)
        return list(table["entropy"]), rated.samples["response"].tolist()

    expected = values()
    with around():
        assert values() == expected


def test_extractors_disable_autocast():
    model = models.wrap(tiny_model("llama"), tiny_tokenizer(), "tiny")
    ids = torch.arange(2, 12)[None]
    batch = Batch(ids, torch.ones_like(ids), torch.arange(10))
    run = lambda: HookExtractor(model).run(batch, lambda group, _: group[0].residual_out)  # noqa: E731
    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, run(), expected))


@pytest.mark.slow
def test_training_does_not_depend_on_global_torch_state(tmp_path):
    plain = bupo.train(MODEL, output=tmp_path / "plain", **{**SMALL, "max_steps": 1})
    with AROUND["autocast"](), AROUND["another device by default"](), torch.inference_mode():
        found = bupo.train(MODEL, output=tmp_path / "around", **{**SMALL, "max_steps": 1})
    weights = [(run.model_dir / "model.safetensors").read_bytes() for run in (plain, found)]
    assert weights[0] == weights[1]


class Slow(nn.Module):
    """Gives other threads their turn in the middle of a forward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        torch.linalg.inv(torch.eye(64).repeat(8, 1, 1))
        return self.inner(x)


@pytest.mark.slow
def test_threads_may_share_a_model():
    model = tiny_model("qwen3").train()
    model.model.layers[1].mlp.up_proj = Slow(model.model.layers[1].mlp.up_proj)
    seeds = range(6)
    alone = [analysed(model, seed) for seed in seeds]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(partial(analysed, model), seeds))
    for a, b in zip(alone, together, strict=True):
        assert_same(a, b)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
