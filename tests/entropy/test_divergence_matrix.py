"""All divergences of S policies at once against the float64 definition of each pair."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internal_policy.entropy import policy_divergence, policy_divergences, reference

# float32 logits of size ~10 are rounded at ~1e-6; a mean of their differences is off by a few of these. Seen: 7e-6.
FLOAT32_NATS = 1e-5


def random(n=23, d=24, vocab=501, scale=1.0, count=4, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    states = [(torch.randn(n, d, generator=g) * scale).to(dtype) for _ in range(count)]
    return states, (torch.randn(vocab, d, generator=g) / d**0.5).to(dtype)


def assert_equals_the_definition(states, unembedding, bias=None, *, atol=FLOAT32_NATS, rtol=0.0, **options):
    budget = {"memory_budget": options.pop("memory_budget")} if "memory_budget" in options else {}
    found, top = policy_divergences(states, unembedding, bias, **options, **budget)
    pairs = itertools.product(states, repeat=2)
    own = [reference.policy_divergence(p, q, unembedding, bias, **options) for p, q in pairs]
    own = torch.stack(own, dim=1).unflatten(1, (len(states), len(states)))
    torch.testing.assert_close(found.double(), own, rtol=rtol, atol=atol)
    assert (torch.diagonal(found, dim1=1, dim2=2) == 0).all()
    tokens = torch.stack([reference.top_tokens(x, unembedding, bias) for x in states], dim=1)
    assert torch.equal(top, tokens)
    return found


def test_the_reference_of_the_most_probable_token():
    assert reference.top_tokens(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)).tolist() == [0, 1]
    assert reference.top_tokens(torch.ones(1, 2), torch.eye(2), torch.tensor([0.0, 1.0])).tolist() == [1]


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 30),
    d=st.integers(1, 30),
    vocab=st.integers(1, 200),
    count=st.integers(1, 6),
    scale=st.floats(0.01, 6),
    budget=st.integers(6_000, 200_000),
)
def test_equals_the_definition_for_any_shape_and_budget(n, d, vocab, count, scale, budget):
    states, unembedding = random(n, d, vocab, scale, count)
    found = assert_equals_the_definition(states, unembedding, memory_budget=budget, atol=2e-5)
    assert found.shape == (n, count, count)


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 2.0}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_scale_and_soft_cap_belong_to_the_projection(options, with_bias):
    states, unembedding = random(scale=4)
    bias = torch.randn(501, generator=torch.Generator().manual_seed(1)) if with_bias else None
    # Logits of size 16 times a scale of 3.
    atol = FLOAT32_NATS * max(1.0, options.get("scale", 1.0)) * 2
    assert_equals_the_definition(states, unembedding, bias, memory_budget=60_000, atol=atol, **options)


def test_the_token_is_chosen_where_the_cap_makes_logits_equal():
    # Even in float64 both logits are exactly 2 after the cap; the order is that from before it.
    states = [torch.tensor([[900.0, 1000.0]])]
    _, top = policy_divergences(states, torch.eye(2), softcap=2.0)
    assert top.tolist() == [[1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_are_accumulated_in_float32(dtype):
    states, unembedding = random(n=8, vocab=4000, dtype=dtype)
    found, _ = policy_divergences(states, unembedding)
    assert found.dtype == torch.float32
    own = reference.policy_divergence(states[0], states[2], unembedding)
    torch.testing.assert_close(found[:, 0, 2].double(), own, rtol=0, atol=FLOAT32_NATS)


def test_float64_operands_keep_float64():
    states, unembedding = random(dtype=torch.float64)
    assert assert_equals_the_definition(states, unembedding, memory_budget=40_000, atol=1e-12).dtype == torch.float64
    mixed, other = random()
    assert policy_divergences([mixed[0], states[1]], other)[0].dtype == torch.float64


@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
def test_large_logits_neither_overflow_nor_cancel(size):
    states, unembedding = random(scale=size)
    # Products are rounded to 2^-24 of their size, some 4 sizes here, and 24 terms are summed; no more is lost.
    assert_equals_the_definition(states, unembedding, memory_budget=60_000, atol=1e-5 * size, rtol=1e-5)


def test_extremes():
    unembedding = torch.eye(1000)
    uniform, certain = torch.zeros(1, 1000), 1e6 * torch.eye(1000)[-1:]
    # A small block makes the certain token come last: the running maxima must carry over.
    found, top = policy_divergences([uniform, certain], unembedding, memory_budget=60_000)
    assert found[0, 1, 0].item() == pytest.approx(math.log(1000), abs=1e-5)
    # 999 of 1000 tokens are 1e6 nats less likely; what is left of it is rounded at 2^-24 of that.
    assert found[0, 0, 1].item() == pytest.approx(999_000 - math.log(1000), abs=0.5)
    assert top[0, 1].item() == 999


def test_small_divergences_are_not_lost_to_cancellation():
    (p, *_), unembedding = random(scale=3)
    q = p + 1e-2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    own = reference.policy_divergence(p, q, unembedding)
    assert own.max() < 1e-3
    # Sums of order 1 to 10 in float32 are subtracted: an absolute error of their rounding is left.
    torch.testing.assert_close(policy_divergences([p, q], unembedding)[0][:, 0, 1].double(), own, rtol=0, atol=5e-6)


def test_agrees_with_the_divergence_of_two_policies():
    (p, q, *_), unembedding = random(scale=3)
    both = policy_divergences([p, q], unembedding)[0]
    torch.testing.assert_close(both[:, 1, 0], policy_divergence(q, p, unembedding), rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_state_gives_nan_in_its_own_divergences_only(bad):
    states, unembedding = random()
    states[2][3, 1] = bad
    found, _ = policy_divergences(states, unembedding, memory_budget=60_000)
    broken = torch.zeros_like(found, dtype=torch.bool)
    broken[3, 2, :] = broken[3, :, 2] = True
    assert torch.equal(found.isnan(), broken)


def test_arguments_are_not_modified():
    states, unembedding = random()
    copies = [x.clone() for x in (*states, unembedding)]
    policy_divergences(states, unembedding, softcap=3.0, scale=2.0)
    assert all(torch.equal(x, y) for x, y in zip((*states, unembedding), copies, strict=True))


def test_mismatched_arguments_are_refused():
    zeros = torch.zeros
    with pytest.raises(ValueError, match="equal shapes"):
        policy_divergences([zeros(3, 4), zeros(2, 4)], zeros(5, 4))
    with pytest.raises(ValueError, match=r"needed \[N, d\] and \[V, d\]"):
        policy_divergences([zeros(3, 4)], zeros(5, 6))
    with pytest.raises(ValueError, match=r"needed \[5\]"):
        policy_divergences([zeros(3, 4)], zeros(5, 4), zeros(4))
    with pytest.raises(ValueError, match=r"memory_budget is 10 bytes; .* needs at least"):
        policy_divergences([zeros(3, 4)], zeros(5, 4), memory_budget=10)
    with pytest.raises(ValueError, match="does not hold 100 states of d = 4"):
        policy_divergences([zeros(3, 4)] * 100, zeros(5, 4), memory_budget=10_000)
