"""Sampling: the right distribution, independent of the batch and of the checkpoint's sampling defaults."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation import utils

from internal_policy import UserError, models
from internal_policy.data.benchmarks import read_benchmark
from internal_policy.data.prompts import Prompt, render
from internal_policy.generation import Request, check_prompt_lengths, sample, sampling
from internal_policy.models.families import FAMILIES


def requests(n, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, 61, size=int(rng.integers(1, longest))).tolist() for _ in range(n)]
    return [Request(Prompt("x"), row, i, 0) for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def model():
    return models.wrap(tiny_model("llama"), tiny_tokenizer())


def test_samples_do_not_depend_on_the_batch(model):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    together = sample(model, requests(6), **options)
    alone = [sample(model, [r], **options)[0] for r in requests(6)]
    assert together == alone
    assert together != sample(model, requests(6), **{**options, "seed": 4})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_policy(model, temperature):
    n = 4000
    many = [Request(Prompt("x"), [2, 3, 4], 0, i) for i in range(n)]
    draws = [r.input_ids[3] for r in sample(model, many, max_new_tokens=1, temperature=temperature, seed=0)]
    with torch.no_grad():
        logits = model.model(torch.tensor([[2, 3, 4]])).logits[0, -1].double()
    p = torch.softmax(logits / temperature, -1).numpy()
    counts = np.bincount(draws, minlength=61)
    chi2 = float(((counts - n * p) ** 2 / (n * p))[n * p > 5].sum())
    # A chi-square of k degrees of freedom exceeds k + 5 sqrt(2k) once in some 10^5 seeds.
    k = int((n * p > 5).sum())
    assert chi2 < k + 5 * np.sqrt(2 * k)


def test_temperature_zero_is_greedy(model):
    (response,) = sample(model, requests(1), max_new_tokens=5, temperature=0, seed=0)
    ids = list(response.input_ids[: response.prompt_length])
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 1:
            break
    assert response.input_ids == ids


def test_the_checkpoints_sampling_defaults_are_ignored(model):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    plain = sample(model, requests(4), **options)
    own = GenerationConfig(top_k=1, temperature=0.1, repetition_penalty=5.0, no_repeat_ngram_size=1, eos_token_id=1)
    before, model.model.generation_config = model.model.generation_config, own
    try:
        assert sample(model, requests(4), **options) == plain
        assert model.model.generation_config is own
    finally:
        model.model.generation_config = before


def test_a_response_ends_with_the_end_token_and_within_the_context(model):
    responses = sample(model, requests(16), max_new_tokens=500, temperature=3.0, seed=0)
    assert any(r.input_ids[-1] == 1 for r in responses)
    for r in responses:
        assert 1 not in r.input_ids[r.prompt_length : -1]
        assert len(r.input_ids) <= model.max_length
        assert r.input_ids[-1] == 1 or len(r.input_ids) == model.max_length


def test_prompts_that_fill_the_context_are_refused(model):
    with pytest.raises(UserError, match="prompt 1 has 64 tokens and the model's context is 64"):
        check_prompt_lengths([Request(Prompt("x"), [2] * 64, 0, 0)], model)
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        check_prompt_lengths([Request(Prompt("x"), [], 0, 0)], model)


class InOneGo:
    """A model with its own generate: it is called once per batch, and each prompt is prefilled again."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)


def in_one_go(model):
    return replace(model, model=InOneGo(model.model))


@contextmanager
def tokens_run(model):
    """Tokens that go through the decoder: [B, T] of each of its calls."""
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


def several(prompts, samples):
    return [Request(Prompt("x"), ids, i, s) for i, ids in enumerate(prompts) for s in range(samples)]


def test_each_prompt_is_prefilled_once_and_finished_responses_leave_the_batch(model):
    prompts, options = [[2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5, 4]], {"max_new_tokens": 30, "temperature": 3.0, "seed": 0}
    with tokens_run(model) as shapes:
        responses = sample(model, several(prompts, 8), **options)
    lengths = [r.n_tokens for r in responses]
    assert min(lengths) < 30 == max(lengths), "some end early"
    assert shapes[0] == (2, 6), "of sixteen prompts two are distinct"
    # The last token of a response is sampled and not run.
    assert sum(rows for rows, _ in shapes[1:]) == sum(lengths) - 16
    assert {width for _, width in shapes[1:]} == {1}
    with tokens_run(model) as shapes:
        assert sample(in_one_go(model), several(prompts, 8), **options) == responses
    assert shapes == [(16, 6)] + [(16, 1)] * 29


def test_finished_responses_leave_the_batch_in_groups(model):
    with tokens_run(model) as shapes:
        responses = sample(model, several([[2, 3, 4]], 64), max_new_tokens=40, temperature=3.0, seed=0)
    run = sum(rows for rows, _ in shapes[1:])
    needed = sum(r.n_tokens - 1 for r in responses)
    # At most one row in sixteen has ended and is still there; without leaving all would run to the last one's end.
    assert needed < run < needed * (1 + 1 / 15)
    assert needed < 0.8 * 64 * 39


@pytest.mark.slow
def test_sharing_prompts_halves_the_tokens_of_an_evaluation():
    model = models.load("testbed/qwen3")
    prompts = [render(p, "chat", model.tokenizer) for p in read_benchmark("testbed", 4)]
    options = {"max_new_tokens": 48, "temperature": 1.0, "seed": 0}
    with tokens_run(model) as shapes:
        together = sample(model, several(prompts, 16), **options)
    ours = sum(rows * width for rows, width in shapes)
    with tokens_run(model) as shapes:
        assert sample(in_one_go(model), several(prompts, 16), **options) == together
    assert sum(rows * width for rows, width in shapes) / ours > 1.9


def test_unsupported_cache_types_give_the_same_samples(model, monkeypatch):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    shared = sample(model, several([[2, 3, 4], [5, 6]], 3), **options)
    monkeypatch.setattr(sampling, "_supports_reordering", lambda cache: False)
    assert sample(model, several([[2, 3, 4], [5, 6]], 3), **options) == shared


def test_supported_cache_types():
    assert sampling._supports_reordering(DynamicCache(config=tiny_model("gemma2").config))
    assert not sampling._supports_reordering(
        DynamicCache(config=tiny_model("llama", layer_types=["hybrid"] * 3).config)
    )
    assert not sampling._supports_reordering(StaticCache(config=tiny_model("llama").config, max_cache_len=8))
    assert not sampling._supports_reordering(None)


@pytest.mark.parametrize("repeated", [True, False])
def test_no_response_exceeds_the_context_length(repeated, monkeypatch):
    # Learned positions: an index beyond them is an error, not only a number that nobody reads.
    model = models.wrap(tiny_model("gpt2"), tiny_tokenizer())
    monkeypatch.setattr(sampling, "_supports_reordering", lambda cache: repeated)
    requests = several([[3] * 60, [4] * 5], 2)
    responses = sample(model, requests, max_new_tokens=200, temperature=1.0, seed=0)
    assert max(len(r.input_ids) for r in responses) == model.max_length
    assert responses == [sample(model, [r], max_new_tokens=200, temperature=1.0, seed=0)[0] for r in requests]


def test_random_streams_are_rolled_back_with_a_step():
    scores = torch.zeros(3, 50)
    straight, other = (sampling.RowSampler([5, 6, 7], 1.0, torch.device("cpu")) for _ in range(2))
    expected = [straight(None, scores) for _ in range(4)]
    for _ in range(3):
        other(None, scores)
    other.keep([0, 2], steps=2, width=50)
    assert torch.equal(other(None, scores[:2]), expected[2][[0, 2]])
    other.keep([1], steps=3, width=50)
    assert torch.equal(other(None, scores[:1]), expected[3][[2]])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_discarded_step_of_transformers_leaves_the_random_streams_unchanged(family, monkeypatch):
    class Event:
        def __init__(self, **_): ...
        def record(self): ...
        def synchronize(self): ...

    taken_back = []

    def finish(self, real=utils.DeferredStopCheck.finish):
        taken_back.append(real(self))
        return taken_back[-1]

    model = models.wrap(tiny_model(family), tiny_tokenizer())
    requests = several([[3] * 9, [4] * 5], 8)
    straight = sample(model, requests, max_new_tokens=30, temperature=3.0, seed=0)
    # As on mps, where the host checks for end tokens one step late.
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", lambda *_, **__: True)
    monkeypatch.setattr(utils.DeferredStopCheck, "finish", finish)
    assert sample(model, requests, max_new_tokens=30, temperature=3.0, seed=0) == straight
    assert sum(taken_back) > 1


SLIDING_LEARNED_AND_LATENT = ("gemma3_text", "gpt2", "deepseek_v3")


@pytest.mark.parametrize(
    "family",
    [f if f in SLIDING_LEARNED_AND_LATENT else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_prompt_sharing_and_early_removal_change_no_sampled_token(family):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 61, size=n).tolist() for n in (3, 30, 17)]
    options = {"max_new_tokens": 24, "temperature": 1.0, "seed": 1}
    model = models.wrap(tiny_model(family, attention="eager"), tiny_tokenizer())
    with tokens_run(model) as shapes:
        shared = sample(model, several(prompts, 4), **options)
    assert shapes[0] == (3, 30), "this family's cache can be repeated"
    with tokens_run(model) as shapes:
        assert sample(in_one_go(model), several(prompts, 4), **options) == shared
    assert shapes[0] == (12, 30)
    assert sample(model, several(prompts, 4)[5:6], **options) == shared[5:6]
