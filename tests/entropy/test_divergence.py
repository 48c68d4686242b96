"""The streaming divergence and log-probability against their definitions: values, blocks, dtypes, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internal_policy.entropy import policy_divergence, reference, token_log_probs

# float32 logits of size ~10 are rounded at ~1e-6; a mean of their differences is off by a few of these.
FLOAT32_NATS = 2e-5


def random(n=37, d=24, vocab=501, scale=1.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(n, d, generator=g) * scale for _ in range(2))
    targets = torch.randint(vocab, (n,), generator=g)
    return p.to(dtype), q.to(dtype), (torch.randn(vocab, d, generator=g) / d**0.5).to(dtype), targets


def assert_both_equal_the_definition(p, q, unembedding, targets, bias=None, *, atol=FLOAT32_NATS, rtol=0.0, **options):
    budget = {"memory_budget": options.pop("memory_budget")} if "memory_budget" in options else {}
    kl = policy_divergence(p, q, unembedding, bias, **options, **budget)
    own = reference.policy_divergence(p, q, unembedding, bias, **options)
    torch.testing.assert_close(kl.double(), own, rtol=rtol, atol=atol)
    log_p = token_log_probs(p, targets, unembedding, bias, **options, **budget)
    own = reference.token_log_probs(p, targets, unembedding, bias, **options)
    torch.testing.assert_close(log_p.double(), own, rtol=rtol, atol=atol)
    assert (kl >= -atol).all()
    assert (log_p <= 0).all()
    return kl, log_p


def test_references_match_torch_distributions():
    p, q, unembedding, targets = random(dtype=torch.float64)
    left, right = (torch.distributions.Categorical(logits=x @ unembedding.T) for x in (p, q))
    own = torch.distributions.kl_divergence(left, right)
    torch.testing.assert_close(reference.policy_divergence(p, q, unembedding), own)
    torch.testing.assert_close(reference.token_log_probs(p, targets, unembedding), left.log_prob(targets))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 40),
    vocab=st.integers(1, 300),
    scale=st.floats(0.01, 6),
    budget=st.integers(3_000, 200_000),
)
def test_equals_the_definition_for_any_shape_and_budget(n, d, vocab, scale, budget):
    p, q, unembedding, targets = random(n, d, vocab, scale)
    kl, log_p = assert_both_equal_the_definition(p, q, unembedding, targets, memory_budget=budget)
    assert kl.shape == log_p.shape == (n,)


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 2.0}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_scale_and_soft_cap_belong_to_the_projection(options, with_bias):
    p, q, unembedding, targets = random(scale=4)
    bias = torch.randn(501, generator=torch.Generator().manual_seed(1)) if with_bias else None
    assert_both_equal_the_definition(p, q, unembedding, targets, bias, memory_budget=60_000, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_are_accumulated_in_float32(dtype):
    kl, log_p = assert_both_equal_the_definition(*random(vocab=4000, dtype=dtype))
    assert kl.dtype == log_p.dtype == torch.float32


def test_float64_operands_keep_float64():
    kl, log_p = assert_both_equal_the_definition(*random(dtype=torch.float64), memory_budget=40_000, atol=1e-12)
    assert kl.dtype == log_p.dtype == torch.float64
    p, q, unembedding, _ = random()
    assert policy_divergence(p, q.double(), unembedding).dtype == torch.float64


@pytest.mark.parametrize("size", [30.0, 1e3, 1e5])
def test_large_logits_neither_overflow_nor_cancel(size):
    p, q, unembedding, targets = random(scale=size)
    # Products are rounded to 2^-24 of their size, some 4 sizes here, and 24 terms are summed; no more is lost.
    assert_both_equal_the_definition(p, q, unembedding, targets, memory_budget=60_000, atol=1e-5 * size, rtol=1e-5)


def test_extremes():
    unembedding = torch.eye(1000)
    uniform, certain = torch.zeros(1, 1000), 1e6 * torch.eye(1000)[-1:]
    # A small block makes the certain token come last: the running maxima must carry over.
    budget = {"memory_budget": 60_000}
    assert policy_divergence(uniform, uniform, unembedding, **budget).item() == 0.0
    assert policy_divergence(certain, certain, unembedding, **budget).item() == 0.0
    assert policy_divergence(certain, uniform, unembedding, **budget).item() == pytest.approx(math.log(1000), abs=1e-5)
    # 999 of 1000 tokens are 1e6 nats less likely; what is left of it is rounded at 2^-24 of that.
    other = policy_divergence(uniform, certain, unembedding, **budget).item()
    assert other == pytest.approx(999_000 - math.log(1000), abs=0.2)
    last, first = torch.tensor([999]), torch.tensor([0])
    assert token_log_probs(certain, last, unembedding, **budget).item() == 0.0
    assert token_log_probs(certain, first, unembedding, **budget).item() == -1e6
    assert token_log_probs(uniform, first, unembedding, **budget).item() == pytest.approx(-math.log(1000), abs=1e-5)


def test_small_divergences_are_not_lost_to_cancellation():
    p, _, unembedding, _ = random(scale=3)
    q = p + 1e-2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    own = reference.policy_divergence(p, q, unembedding)
    assert own.max() < 1e-3
    # Three float32 sums of order 1 to 10 are subtracted: an absolute error of their rounding is left.
    torch.testing.assert_close(policy_divergence(p, q, unembedding).double(), own, rtol=0, atol=5e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_state_gives_nan_in_its_row_only(bad):
    p, q, unembedding, targets = random()
    broken = p.clone()
    broken[3, 1] = bad
    for values in (
        policy_divergence(broken, q, unembedding),
        policy_divergence(q, broken, unembedding),
        token_log_probs(broken, targets, unembedding),
    ):
        assert values.isnan().nonzero().flatten().tolist() == [3]


def test_arguments_are_not_modified():
    arguments = random()
    copies = [x.clone() for x in arguments]
    p, q, unembedding, targets = arguments
    policy_divergence(p, q, unembedding, softcap=3.0)
    token_log_probs(p, targets, unembedding, scale=2.0)
    assert all(torch.equal(x, y) for x, y in zip(arguments, copies, strict=True))


def test_mismatched_arguments_are_refused():
    zeros = torch.zeros
    with pytest.raises(ValueError, match="equal shapes"):
        policy_divergence(zeros(3, 4), zeros(2, 4), zeros(5, 4))
    with pytest.raises(ValueError, match=r"needed \[N, d\] and \[V, d\]"):
        policy_divergence(zeros(3, 4), zeros(3, 4), zeros(5, 6))
    with pytest.raises(ValueError, match=r"needed \[5\]"):
        token_log_probs(zeros(3, 4), zeros(3).long(), zeros(5, 4), zeros(4))
    with pytest.raises(ValueError, match="one id a state"):
        token_log_probs(zeros(3, 4), zeros(2).long(), zeros(5, 4))
    for bad in (-100, 5):
        with pytest.raises(ValueError, match="needed are 0 to 4"):
            token_log_probs(zeros(3, 4), torch.tensor([0, bad, 1]), zeros(5, 4))
    for budget in (10, 100):
        with pytest.raises(ValueError, match=f"memory_budget is {budget} bytes; .* needs at least"):
            policy_divergence(zeros(3, 4), zeros(3, 4), zeros(5, 4), memory_budget=budget)
