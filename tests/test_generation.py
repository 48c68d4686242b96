"""Sampling: the right distribution, the same draws whatever the batch, the checkpoint's own defaults set aside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from transformers import GenerationConfig

from internal_policy import UserError, models
from internal_policy.generation import Request, check_prompt_lengths, sample
from internal_policy.prompts import Prompt


def requests(n, seed=0, longest=9):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(2, 61, size=int(rng.integers(1, longest))).tolist() for _ in range(n)]
    return [Request(Prompt("x"), row, i, 0) for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def model():
    return models.wrap(tiny_model("llama"), tiny_tokenizer())


def test_draws_do_not_depend_on_the_batch(model):
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    together = sample(model, requests(6), **options)
    alone = [sample(model, [r], **options)[0] for r in requests(6)]
    assert together == alone
    assert together != sample(model, requests(6), **{**options, "seed": 4})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_policy(model, temperature):
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


def test_the_checkpoints_sampling_defaults_do_not_bend_the_policy(model):
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
    responses = sample(model, requests(40), max_new_tokens=500, temperature=3.0, seed=0)
    assert any(r.input_ids[-1] == 1 for r in responses)
    for r in responses:
        assert 1 not in r.input_ids[r.prompt_length : -1]
        assert len(r.input_ids) <= model.max_length
        assert r.input_ids[-1] == 1 or len(r.input_ids) == model.max_length


def test_prompts_that_leave_no_room_are_told(model):
    with pytest.raises(UserError, match="prompt 1 has 64 tokens and the model's context is 64"):
        check_prompt_lengths([Request(Prompt("x"), [2] * 64, 0, 0)], model)
    with pytest.raises(UserError, match="prompt 1 has no tokens"):
        check_prompt_lengths([Request(Prompt("x"), [], 0, 0)], model)
