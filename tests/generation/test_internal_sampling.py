"""Sampling from internal policies: whose policy is sampled, what runs, and that all else is as in ordinary sampling."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from exact_policies import FLOAT32_NATS, alone, in_float64
from tiny import slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import Response
from internal_policy.extractors.truncated import internal_forward
from internal_policy.generation import InternalPolicy, Request, compare_with_final, sample, sample_internal
from internal_policy.models.families import FAMILIES
from internal_policy.models.lenses import open_lens

OPTIONS = {"max_new_tokens": 16, "temperature": 1.0, "seed": 1}
CASES = [
    InternalPolicy(layer, site, lens)
    for layer, site, lens in (
        (1, "layer", "policy"),
        (2, "attn", "policy"),
        (2, "ffn", "logit-lens"),
        (1, "ffn", "unit-norm"),
        (3, "layer", "policy"),
    )
]


def wrapped(family, **options):
    return models.wrap(tiny_model(family, attention="eager", **options), tiny_tokenizer())


def requests(samples=2, lengths=(3, 20, 11)):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 61, size=n).tolist() for n in lengths]
    return [Request(Prompt("x"), ids, i, s) for i, ids in enumerate(prompts) for s in range(samples)]


@pytest.fixture(scope="module")
def model():
    return wrapped("llama")


def layer_calls(model):
    """Count how many tokens each layer runs on; returns the counter and the hooks."""
    counts = Counter()

    def count(layer):
        return lambda module, args, output: counts.update({layer: args[0].shape[0] * args[0].shape[1]})

    return counts, [m.register_forward_hook(count(n)) for n, m in enumerate(model.layers, start=1)]


@pytest.mark.parametrize("family", slow_unless_fast(FAMILIES))
def test_the_last_layer_under_the_logit_lens_samples_the_final_policys_tokens(family):
    model = wrapped(family)
    last = InternalPolicy(model.n_layers, "layer", "logit-lens")
    assert sample_internal(model, requests(), last, **OPTIONS) == sample(model, requests(), **OPTIONS)


@pytest.mark.parametrize("family", slow_unless_fast(FAMILIES))
def test_the_most_probable_tokens_are_those_of_the_policy_in_float64_without_a_cache(family):
    model = wrapped(family)
    exact = in_float64(model.model)
    for policy in CASES[1:3]:
        (response,) = sample_internal(model, requests(1)[2:], policy, max_new_tokens=10, temperature=0, seed=0)
        ids = torch.tensor(response.input_ids)
        logits, _ = alone(exact, ids, policy.layer, policy.site, policy.lens)
        assert (
            logits[response.prompt_length - 1 : -1].argmax(-1).tolist() == response.input_ids[response.prompt_length :]
        )


@pytest.mark.parametrize("policy", CASES)
def test_samples_do_not_depend_on_the_batch_and_its_padding(model, policy):
    together = sample_internal(model, requests(), policy, **OPTIONS)
    assert together == [sample_internal(model, [r], policy, **OPTIONS)[0] for r in requests()]
    assert together != sample_internal(model, requests(), policy, **{**OPTIONS, "seed": 2})
    assert together != sample(model, requests(), **OPTIONS)


def test_samples_follow_the_tempered_internal_policy(model):
    n, policy = 4000, InternalPolicy(2, "ffn", "policy")
    many = [Request(Prompt("x"), [2, 3, 4], 0, i) for i in range(n)]
    options = {"max_new_tokens": 1, "temperature": 2.0, "seed": 0}
    draws = [r.input_ids[3] for r in sample_internal(model, many, policy, **options)]
    logits, _ = alone(in_float64(model.model), torch.tensor([2, 3, 4]), 2, "ffn", "policy")
    p = torch.softmax(logits[-1] / 2.0, -1).numpy()
    counts = np.bincount(draws, minlength=61)
    chi2 = float(((counts - n * p) ** 2 / (n * p))[n * p > 5].sum())
    # A chi-square of k degrees of freedom exceeds k + 5 sqrt(2k) once in some 10^5 seeds.
    k = int((n * p > 5).sum())
    assert chi2 < k + 5 * np.sqrt(2 * k)


@pytest.mark.parametrize("site", ["layer", "attn", "ffn"])
def test_no_layer_above_runs_and_each_token_runs_once(model, site):
    counts, hooks = layer_calls(model)
    responses = sample_internal(model, requests(1), InternalPolicy(2, site), **{**OPTIONS, "temperature": 0.5})
    for hook in hooks:
        hook.remove()
    # The three prompts, padded, and then one token of each row that is left: with a cache nothing runs twice.
    generated = sum(r.n_tokens - 1 for r in responses)
    assert set(counts) == {1, 2}
    assert counts[1] == counts[2]
    # A row leaves when it ends, and the last token of a response is sampled and not run.
    assert counts[1] == 3 * 20 + generated


def test_a_response_ends_with_the_end_token_and_within_the_context(model):
    responses = sample_internal(model, requests(8), InternalPolicy(2), max_new_tokens=500, temperature=3.0, seed=0)
    assert any(r.input_ids[-1] == 1 for r in responses)
    for r in responses:
        assert 1 not in r.input_ids[r.prompt_length : -1]
        assert r.input_ids[-1] == 1 or len(r.input_ids) == model.max_length


def test_the_model_is_restored_on_any_exit(model):
    before = sample(model, requests(), **OPTIONS)
    layers, norm = model.layers, model.model.model.norm
    with pytest.raises(ZeroDivisionError), internal_forward(model.model, 1, site="attn", lens="unit-norm"):
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match="layer is 4; needed is a layer of this model, 1 to 3"):
        sample_internal(model, requests(), InternalPolicy(4), **OPTIONS)
    with pytest.raises(UserError, match="layer is 4; needed is a layer of this model, 1 to 3"):
        compare_with_final(model, before, InternalPolicy(4))
    assert model.layers is layers
    assert model.model.model.norm is norm
    assert not any(m._forward_hooks for m in model.model.modules())
    assert sample(model, requests(), **OPTIONS) == before


@pytest.mark.parametrize("family", slow_unless_fast(FAMILIES))
def test_the_comparison_equals_that_of_each_response_alone_in_float64(family):
    model = wrapped(family)
    responses = sample(model, requests(1), **OPTIONS)
    exact = in_float64(model.model)
    for policy in CASES[1:3]:
        found = compare_with_final(model, responses, policy, batch_size=2)
        for got, response in zip(found, responses, strict=True):
            ids, start = torch.tensor(response.input_ids), response.prompt_length
            both = [z[start - 1 : -1] for z in alone(exact, ids, policy.layer, policy.site, policy.lens)]
            log_probs = [torch.log_softmax(z, -1).gather(1, ids[start:, None]).mean() for z in both]
            assert got.agreement == float((both[0].argmax(-1) == both[1].argmax(-1)).double().mean())
            policies = [torch.distributions.Categorical(logits=z) for z in both]
            kl = float(torch.distributions.kl_divergence(*policies).mean())
            wanted = [kl, *(float(x) for x in log_probs)]
            assert [got.kl, got.log_prob, got.policy_log_prob] == pytest.approx(wanted, abs=FLOAT32_NATS)


def test_the_last_layer_under_the_logit_lens_agrees_with_the_final_policy_entirely(model):
    responses = sample(model, requests(), **OPTIONS)
    for one in compare_with_final(model, responses, InternalPolicy(3, "layer", "logit-lens")):
        assert (one.agreement, one.kl, one.log_prob) == (1.0, 0.0, one.policy_log_prob)


def test_the_comparison_does_not_depend_on_the_batch(model):
    responses = [
        Response("x", "", r.prompt_ids + [5, 6, 7][: 1 + i % 3], len(r.prompt_ids)) for i, r in enumerate(requests())
    ]
    one, all_ = (compare_with_final(model, responses, CASES[0], batch_size=n) for n in (1, 16))
    for a, b in zip(one, all_, strict=True):
        assert a.agreement == b.agreement
        assert (a.log_prob, a.policy_log_prob) == pytest.approx((b.log_prob, b.policy_log_prob), abs=FLOAT32_NATS)


def test_a_lens_of_the_users_own_is_called_with_its_layer(model):
    called = []

    def doubled(layer, states):
        called.append(layer)
        return 2 * states

    policy = InternalPolicy(2, "layer", open_lens(doubled, model))
    found = sample_internal(model, requests(), policy, **OPTIONS)
    # Twice the state is the policy at half the temperature.
    assert found == sample_internal(model, requests(), InternalPolicy(2), **{**OPTIONS, "temperature": 0.5})
    assert all(one.kl > 0 for one in compare_with_final(model, found, policy))
    assert set(called) == {2}
