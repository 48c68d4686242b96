"""The streaming entropy against the definition: values, shapes, dtypes, blocks, memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internal_policy.entropy import policy_entropies, policy_entropy, reference
from internal_policy.entropy.streaming import block_sizes

# float32 logits of size ~10 are rounded at ~1e-6; sums over the vocabulary average that out.
FLOAT32_NATS = 1e-5


def random(n=37, d=24, vocab=501, scale=1.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(n, d, generator=g) * scale
    return states.to(dtype), (torch.randn(vocab, d, generator=g) / d**0.5).to(dtype)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 40),
    d=st.integers(1, 40),
    vocab=st.integers(1, 300),
    scale=st.floats(0.01, 10),
    budget=st.integers(2_000, 200_000),
)
def test_equals_the_definition_for_any_shape_and_budget(n, d, vocab, scale, budget):
    states, unembedding = random(n, d, vocab, scale)
    ours = policy_entropy(states, unembedding, memory_budget=budget)
    assert ours.shape == (n,)
    torch.testing.assert_close(ours.double(), reference.policy_entropy(states, unembedding), rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("options", [{"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 2.0}])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_scale_and_soft_cap_belong_to_the_projection(options, with_bias):
    states, unembedding = random(scale=4)
    bias = torch.randn(501) if with_bias else None
    ours = policy_entropy(states, unembedding, bias, memory_budget=50_000, **options)
    own = reference.policy_entropy(states, unembedding, bias, **options)
    torch.testing.assert_close(ours.double(), own, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_are_accumulated_in_float32(dtype):
    states, unembedding = random(vocab=4000, dtype=dtype)
    ours = policy_entropy(states, unembedding)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), reference.policy_entropy(states, unembedding), rtol=0, atol=FLOAT32_NATS)


def test_float64_operands_keep_float64():
    states, unembedding = random(dtype=torch.float64)
    ours = policy_entropy(states, unembedding, memory_budget=30_000)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference.policy_entropy(states, unembedding), rtol=0, atol=1e-12)


def test_extremes():
    unembedding = torch.eye(1000)
    uniform, certain = torch.zeros(1, 1000), 1e6 * torch.eye(1000)[:1]
    assert policy_entropy(uniform, unembedding).item() == pytest.approx(math.log(1000), abs=1e-5)
    assert policy_entropy(certain, unembedding).item() == 0.0
    # The largest logit is in the last block: the running maximum must carry over.
    late = torch.zeros(1, 1000)
    late[0, 999] = 50.0
    own = reference.policy_entropy(late, unembedding)
    assert policy_entropy(late, unembedding, memory_budget=30_000).item() == pytest.approx(own.item(), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 20),
    layers=st.integers(1, 5),
    options=st.sampled_from([{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 2.0}]),
    with_bias=st.booleans(),
    budget=st.sampled_from([5_000, 50_000, 10**8]),
)
def test_additive_logits_give_the_policies_of_summed_states(n, layers, options, with_bias, budget):
    states, unembedding = random((2 * layers + 1) * n, vocab=97, scale=2)
    bias = torch.randn(97) if with_bias else None
    parts = list(states.view(2 * layers + 1, n, 24))
    sums = [[0, 1, 2], *([2 * layer - 1, 2 * layer] for layer in range(2, layers + 1))]
    ours = policy_entropies(parts, unembedding, bias, sums=sums, memory_budget=budget, **options)
    stream = parts[0].double()
    wanted = [reference.policy_entropy(part, unembedding, bias, **options) for part in parts]
    for layer in range(1, layers + 1):
        stream = stream + parts[2 * layer - 1] + parts[2 * layer]
        wanted.append(reference.policy_entropy(stream, unembedding, bias, **options))
    torch.testing.assert_close(ours.double(), torch.stack(wanted), rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25, "softcap": 3.0}])
@pytest.mark.parametrize(("n", "budget"), [(7, 2**20), (50, 20_000)])
def test_one_product_serves_several_lengths(n, options, with_bias, budget):
    d, vocab = 8, 301
    generator = torch.Generator().manual_seed(n)
    parts = [torch.randn(n, d, generator=generator) for _ in range(4)]
    unembedding = torch.randn(vocab, d, generator=generator)
    bias = torch.randn(vocab, generator=generator) if with_bias else None
    factors = [torch.logspace(-2, 1.5, n), torch.zeros(n), torch.rand(n, generator=generator)]
    # The second state, the fourth, and the sum of all, whose row is the fifth.
    lengths = list(zip((1, 3, 4), factors, strict=True))
    ours = policy_entropies(
        parts, unembedding, bias, sums=[[0, 1, 2, 3]], lengths=lengths, memory_budget=budget, **options
    )
    plain = policy_entropies(parts, unembedding, bias, sums=[[0, 1, 2, 3]], memory_budget=budget, **options)
    states = [s.double() for s in (*parts, sum(parts))]
    for row, (index, factor) in zip(ours[5:], lengths, strict=True):
        rescaled = states[index] * factor.double()[:, None]
        exact = reference.policy_entropy(
            rescaled, unembedding.double(), None if bias is None else bias.double(), **options
        )
        torch.testing.assert_close(row.double(), exact, rtol=0, atol=FLOAT32_NATS)
    # Blocks of vocabulary may be smaller, where the budget is.
    torch.testing.assert_close(ours[:5], plain, rtol=0, atol=FLOAT32_NATS if budget < 2**20 else 0)


def test_factors_that_do_not_fit_are_refused():
    states, unembedding = [torch.ones(3, 2)], torch.ones(5, 2)
    for row, factors in ((0, torch.ones(2)), (1, torch.ones(3))):
        with pytest.raises(ValueError, match=f"for row {row} of 1"):
            policy_entropies(states, unembedding, lengths=[(row, factors)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_state_gives_nan_in_its_row_only(bad):
    states, unembedding = random()
    states[3, 1] = bad
    entropies = policy_entropy(states, unembedding)
    assert entropies.isnan().nonzero().flatten().tolist() == [3]


def test_mismatched_shapes_are_refused():
    with pytest.raises(ValueError, match=r"needed \[N, d\] and \[V, d\]"):
        policy_entropy(torch.zeros(3, 4), torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"needed \[5\]"):
        policy_entropy(torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="needed are equal shapes"):
        policy_entropies([torch.zeros(3, 4), torch.zeros(2, 4)], torch.zeros(5, 4))
    with pytest.raises(ValueError, match="needs at least"):
        policy_entropy(torch.zeros(3, 4), torch.zeros(5, 4), memory_budget=10)
    many = [torch.zeros(3, 64)] * 40
    with pytest.raises(ValueError, match=r"memory_budget is 600 bytes; it does not hold 40 states of d = 64"):
        policy_entropies(many, torch.zeros(5, 64), memory_budget=600)
    # 40 states, 40 maxima and sums, and one column of logits.
    policy_entropies(many, torch.zeros(5, 64), memory_budget=4 * (40 * (64 + 8) + 2 * 40 + 64))


@pytest.mark.parametrize("budget", [10**5, 10**6, 10**8])
@pytest.mark.parametrize("d", [64, 1024, 8192])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_respect_the_budget(budget, d, device):
    n, v = block_sizes(d, 151_936, budget, torch.device(device))
    assert 4 * (2 * n * v + (n + v) * d) <= budget
    assert n >= 1
    assert v >= 1


MEASURE = """
import resource, torch
from internal_policy.entropy import policy_entropy
torch.set_num_threads(1)
states, unembedding = torch.randn(6144, 64), torch.randn(20_000, 64)
policy_entropy(states[:512], unembedding)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
policy_entropy(states, unembedding)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_tokens():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    # [6144, 20000] float32 logits would be 470 MiB; the entropies themselves are 24 KiB.
    assert float(done.stdout) < 8


TF32 = """
import torch
from internal_policy.entropy.streaming import rounds_to_tf32
assert not rounds_to_tf32()
torch.set_float32_matmul_precision("high")
assert rounds_to_tf32()
torch.backends.fp32_precision = "ieee"
torch.backends.cuda.matmul.fp32_precision = "ieee"
assert not rounds_to_tf32()
torch.backends.cuda.matmul.fp32_precision = "tf32"
assert rounds_to_tf32()
"""


@pytest.mark.slow
def test_tf32_is_known_by_either_of_its_names():
    # In a process of its own: once it was set by the newer name, torch refuses to read the older one.
    subprocess.run([sys.executable, "-c", TF32], check=True)
