"""Divergences between the policies of all layers: parity with float64, sums per response, passes, backends, memory."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from capture_checks import FLOAT32_NATS, states_of, wrapped
from test_backends import OPENERS
from test_families import residual_stream
from test_operation_counts import Operations
from tiny import ragged_responses, slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.data.responses import read_responses
from internal_policy.entropy import reference
from internal_policy.extractors import HookExtractor, divergences, prove
from internal_policy.extractors.divergences import measure_divergences
from internal_policy.models import LanguageModel
from internal_policy.models.families import FAMILIES

LENSES = ("policy", "logit-lens", "unit-norm")


def measured(model, records, lens="policy", opener=HookExtractor):
    model = model if isinstance(model, LanguageModel) else wrapped(model)
    return measure_divergences(opener(model), read_responses(records, model.tokenizer, "plain"), lens)


@torch.no_grad()
def logits_by_layer(model, record, lens):
    """Logits of pi^1..pi^L and of the model itself at the response tokens, in float64 without hooks: [L + 1, n, V]."""
    model = copy.deepcopy(model).double()
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts does not support float64.
        model.set_experts_implementation("eager")
    ids = torch.tensor([record["input_ids"]])
    at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
    states = residual_stream(model, ids)[1:, at]
    if lens == "logit-lens":
        base = getattr(model, model.base_model_prefix)
        states = [m for n, m in base.named_children() if "norm" in n or n == "ln_f"][-1](states)
    if lens == "unit-norm":
        states = states / states.pow(2).mean(dim=-1, keepdim=True).sqrt()
    head, config = model.get_output_embeddings(), model.config
    z = states @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    z = z if cap is None else cap * torch.tanh(z / cap)
    return torch.cat([z, model(ids, use_cache=False).logits[:, at]])


def assert_is_the_definition(found, logits, rel=0.0):
    """Compare with torch's own distributions, which share no code with the package."""
    policies = [torch.distributions.Categorical(logits=z) for z in logits]
    *internal, final = policies
    n_layers = len(internal)

    def kl(p, q):
        return torch.distributions.kl_divergence(p, q).mean().item()

    tops = logits.argmax(dim=-1)
    for row, policy in enumerate(internal):
        assert found.kl_policy[row] == pytest.approx(kl(final, policy), abs=FLOAT32_NATS, rel=rel)
        assert found.kl_next[row] == pytest.approx(kl(policy, policies[row + 1]), abs=FLOAT32_NATS, rel=rel)
        assert found.top1[row] == pytest.approx((tops[row] == tops[-1]).double().mean().item(), abs=1e-12)
        for column, other in enumerate(internal):
            assert found.matrix[row, column] == pytest.approx(kl(policy, other), abs=FLOAT32_NATS, rel=rel)
    assert found.matrix.shape == (n_layers, n_layers)


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("model_type", slow_unless_fast(FAMILIES))
def test_parity_with_the_definition_in_float64(model_type, lens):
    model, records = tiny_model(model_type), ragged_responses(3)
    for record, found in zip(records, measured(model, records, lens), strict=True):
        assert_is_the_definition(found, logits_by_layer(model, record, lens))


@pytest.mark.parametrize("name", ["testbed/qwen3", "testbed/llama"])
def test_parity_on_the_embedded_models(name):
    model = models.load(name)
    records = ragged_responses(2, vocab=model.vocab_size)
    exact = models.load(name).model
    for record, found in zip(records, measured(model, records), strict=True):
        # Random tokens give divergences of up to 44 nats between layers, of which float32 states carry 24 bits through
        # eight layers. Seen: 2e-5 of 44 nats.
        assert_is_the_definition(found, logits_by_layer(exact, record, "policy"), rel=1e-6)


def test_under_the_logit_lens_the_last_policy_is_pi_theta():
    for found in measured(tiny_model("qwen3"), ragged_responses(3), "logit-lens"):
        assert found.kl_policy[-1] == found.kl_next[-1] == 0
        assert found.top1[-1] == 1


@pytest.mark.parametrize("lens", LENSES)
def test_the_matrix_agrees_with_the_divergence_of_neighbours(lens):
    for found in measured(tiny_model("qwen3", layers=5), ragged_responses(3), lens):
        assert (np.diag(found.matrix) == 0).all()
        np.testing.assert_array_equal(np.diag(found.matrix, 1), found.kl_next[:-1])
        off = found.matrix[~np.eye(5, dtype=bool)]
        assert (off > 0.01).all()


def test_responses_do_not_depend_on_their_batch():
    model, records = tiny_model("qwen3"), ragged_responses(5)
    together = measured(model, records)
    for one, record in zip(together, records, strict=True):
        (alone,) = measured(model, [record])
        # The same numbers up to float32 rounding of differently shaped products.
        np.testing.assert_allclose(one.matrix, alone.matrix, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_array_equal(one.top1, alone.top1)


@pytest.mark.parametrize("capacity", [1, 7])
def test_several_passes_and_portions_give_the_same_means(monkeypatch, capacity):
    model, records = tiny_model("qwen3"), ragged_responses(4)
    whole = measured(model, records)
    monkeypatch.setattr(divergences, "_STATES_BUDGET", capacity * 3 * 32 * 4)
    monkeypatch.setattr(divergences, "_POSITIONS", 5)
    for one, other in zip(measured(model, records), whole, strict=True):
        np.testing.assert_allclose(one.matrix, other.matrix, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_allclose(one.kl_policy, other.kl_policy, rtol=0, atol=FLOAT32_NATS)
        np.testing.assert_array_equal(one.top1, other.top1)


def test_passes_hold_as_many_tokens_as_fit_and_divide_only_what_does_not():
    passes = divergences._passes([(4, 3), (7, 4), (1, 2), (2, 12), (3, 1)], capacity=5)
    found = [[(i, tokens.tolist()) for i, tokens in pieces] for pieces in passes]
    assert found == [
        [(4, [0, 1, 2])],
        [(7, [0, 1, 2, 3])],
        [(1, [0, 1])],
        [(2, [0, 1, 2, 3, 4])],
        [(2, [5, 6, 7, 8, 9])],
        [(2, [10, 11]), (3, [0])],
    ]


@pytest.mark.parametrize("lens", LENSES)
@pytest.mark.parametrize("backend", OPENERS)
@pytest.mark.parametrize(
    "model_type", ["gemma2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("llama", "gpt2"))]
)
def test_backends_agree(model_type, backend, lens):
    model = models.wrap(tiny_model(model_type, attention="eager"), tiny_tokenizer())
    records = ragged_responses(3)
    other = measured(prove(model, OPENERS[backend]).model, records, lens, OPENERS[backend])
    for one, two in zip(measured(model, records, lens), other, strict=True):
        for name, value in vars(one).items():
            np.testing.assert_allclose(value, getattr(two, name), rtol=0, atol=FLOAT32_NATS, err_msg=name)


def test_half_precision_states_are_compared_in_float32():
    model, records = tiny_model("llama").to(torch.bfloat16), ragged_responses(2)
    wrap = wrapped(model)
    head = wrap.projection
    for record, found in zip(records, measured(wrap, records), strict=True):
        outs = [s.residual_out for s in states_of(wrap, record)]
        with torch.no_grad():
            outs.append(head.final_norm(outs[-1]))
        for kl, out in zip(found.kl_policy, outs[:-1], strict=True):
            own = reference.policy_divergence(outs[-1], out, head.weight).mean().item()
            assert kl == pytest.approx(own, abs=FLOAT32_NATS)


def test_memory_depends_on_the_states_and_not_on_the_vocabulary():
    n, peaks = 300, []
    for vocab in (10_007, 20_011):
        model = wrapped(tiny_model("qwen3", vocab=vocab, context=n + 5))
        with Operations() as counted:
            measured(model, [{"input_ids": [3] * 5 + [5] * n, "prompt_length": 5}])
        peaks.append(counted.peak)
    # A single [n, V] float32 array is more.
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    assert peaks[1] < n * 20_011 * 4


def test_each_state_is_projected_once():
    model = wrapped(tiny_model("qwen3", layers=6, vocab=4_099))
    with Operations() as counted:
        measured(model, [{"input_ids": [3] * 5 + [5] * 40, "prompt_length": 5}])
    # H^1..H^6 and pi_theta, for 36 divergences and more.
    assert counted.logits == 40 * 4_099 * 7


def test_overflow_is_reported_with_the_layer():
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or inf in the states of layer 2"):
        measured(model, ragged_responses(2))
    model = tiny_model("qwen2")
    model.model.norm.weight.data[0] = torch.inf
    with pytest.raises(UserError, match="NaN or inf in the final policy's logits"):
        measured(model, ragged_responses(2))
