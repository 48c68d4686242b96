"""The fused kernel against the definition in triton's interpreter, and when it is used.

The interpreter is chosen when the kernel's module is imported, so a separate process runs it on the tensors it gets.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from internal_policy.entropy import policy_entropy, reference, streaming, token_log_probs
from internal_policy.entropy.tiles import Blocks, choices

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is for Linux only")

# float32 logits of size ~10 are rounded at ~1e-6; sums over the vocabulary average that out, a single one does not.
FLOAT32_NATS = 1e-5
SMALL = Blocks(16, 32, 16)


@pytest.fixture(scope="module")
def interpreter():
    # Spawned, so that it inherits nothing; the variable is read when the child imports triton.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            # Importing the package does not import triton.
            assert pool.submit(starts_with).result(timeout=300) == (False, True)
            del os.environ["TRITON_INTERPRET"]
            yield pool
    finally:
        os.environ.pop("TRITON_INTERPRET", None)


def starts_with():
    imported = "triton" in sys.modules
    from internal_policy.entropy import triton_kernel

    return imported, triton_kernel.INTERPRETED


def run(quantity, *operands, **options):
    """The kernel's results; runs in the interpreter's process."""
    from internal_policy.entropy import triton_kernel

    return getattr(triton_kernel, quantity)(*operands, **options)


def run_both(*operands, **options):
    """The kernel's entropies and log-probabilities; runs in the interpreter's process."""
    from internal_policy.entropy import triton_kernel

    sums = triton_kernel.online_sums(*operands, **options)
    return sums.entropy(), sums.log_probs()


def run_through_dispatch(*operands, **options):
    """Results of the public functions when they use the kernel; runs in the interpreter's process."""
    from internal_policy.entropy import streaming, triton_kernel

    calls = []
    serves, sums = streaming.kernel_is_faster, triton_kernel.online_sums
    streaming.kernel_is_faster = lambda *_: True
    triton_kernel.online_sums = lambda *args, **kwargs: calls.append(1) or sums(*args, **kwargs)
    try:
        states, targets, unembedding, bias = operands
        entropy = policy_entropy(states, unembedding, bias, **options)
        return entropy, token_log_probs(states, targets, unembedding, bias, **options), len(calls)
    finally:
        streaming.kernel_is_faster, triton_kernel.online_sums = serves, sums


def run_at_lengths(*operands, **options):
    """Entropies of the public function and whether the kernel failed; runs in the interpreter's process."""
    from internal_policy.entropy import policy_entropies, streaming, triton_kernel

    calls = []
    serves, sums = streaming.kernel_is_faster, triton_kernel.online_sums
    streaming.kernel_is_faster = lambda *_: True
    triton_kernel.online_sums = lambda *args, **kwargs: calls.append(kwargs.get("lengths")) or sums(*args, **kwargs)
    try:
        return policy_entropies(*operands, **options), [lengths is not None for lengths in calls]
    finally:
        streaming.kernel_is_faster, triton_kernel.online_sums = serves, sums


def run_counting(*operands, **options):
    """The slices of each length and the bytes of their sums; runs in the interpreter's process."""
    from internal_policy.entropy import triton_kernel

    merged, parts = triton_kernel._merged, []
    triton_kernel._merged = lambda sums: parts.append(sums) or merged(sums)
    try:
        triton_kernel.online_sums(*operands, **options)
    finally:
        triton_kernel._merged = merged
    return [part.shape[1] for part in parts], sum(part.nbytes for part in parts)


def run_tuned(*operands):
    """Results of the fastest block sizes and the number of timed launches; runs in the interpreter's process."""
    from internal_policy.entropy import tiles, triton_kernel

    timed = []

    def milliseconds(launch, quantiles):
        launch()
        timed.append(1)
        return [float(len(timed))] * len(quantiles)

    # As on a GPU, but for the clock and the size of blocks.
    kept = triton_kernel._milliseconds, triton_kernel.INTERPRETED, tiles.choices
    triton_kernel._milliseconds, triton_kernel.INTERPRETED = milliseconds, False
    tiles.choices = lambda *_, **__: (Blocks(16, 64, 16), SMALL)
    try:
        twice = [triton_kernel.policy_entropy(*operands) for _ in range(2)]
        few = triton_kernel.policy_entropy(operands[0][:5], operands[1])
        once = len(timed)
        states, unembedding = operands
        lengths = torch.ones(len(states))
        at_lengths = [triton_kernel.policy_entropies_at_lengths(states, lengths, unembedding) for _ in range(2)]
        return twice, few, once, at_lengths, len(timed) - once
    finally:
        triton_kernel._milliseconds, triton_kernel.INTERPRETED, tiles.choices = kept


def random(n=37, d=24, vocab=101, size=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(n, d, generator=g) * size
    targets = torch.randint(vocab, (n,), generator=g)
    return states.to(dtype), targets, (torch.randn(vocab, d, generator=g) / d**0.5).to(dtype)


def check(interpreter, states, targets, unembedding, bias=None, *, cut=None, atol=FLOAT32_NATS, **options):
    kernel = {"blocks": SMALL} | (cut or {})
    operands = (states, unembedding, bias, targets)
    entropy, log_probs = interpreter.submit(run_both, *operands, **options, **kernel).result(300)
    assert entropy.dtype == log_probs.dtype == torch.float32
    own = reference.policy_entropy(states, unembedding, bias, **options)
    torch.testing.assert_close(entropy.double(), own, rtol=0, atol=atol, equal_nan=True)
    own = reference.token_log_probs(states, targets, unembedding, bias, **options)
    torch.testing.assert_close(log_probs.double(), own, rtol=0, atol=atol, equal_nan=True)
    return entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_definition_where_nothing_is_a_multiple_of_a_block(interpreter, dtype):
    check(interpreter, *random(dtype=dtype))


def test_operands_of_two_dtypes_are_multiplied_in_float32(interpreter):
    states, targets, unembedding = random()
    check(interpreter, states, targets, unembedding.bfloat16())
    check(interpreter, states.half(), targets, unembedding)


@pytest.mark.parametrize("options", [{"scale": 0.25}, {"softcap": 5.0}, {"scale": 3.0, "softcap": 2.0}])
def test_bias_scale_and_soft_cap_belong_to_the_projection(interpreter, options):
    states, targets, unembedding = random(size=4)
    check(interpreter, states, targets, unembedding, torch.randn(101), **options)


def test_a_soft_cap_far_above_the_logits_changes_them_by_rounding_only(interpreter):
    # tanh(x) from exponentials alone would err by 1e-7 of the cap: 1e-3 here.
    states, targets, unembedding = random()
    check(interpreter, states, targets, unembedding, softcap=1e4)


@pytest.mark.parametrize("slices", [1, 3, 7])
@pytest.mark.parametrize("place", [0, 100])
def test_the_maximum_may_be_in_any_slice(interpreter, slices, place):
    # Two more likely tokens, at this index and next to it, so that more than one token contributes to the entropy.
    states, targets, unembedding = random(n=3)
    unembedding[place] = states[0] / states[0].norm() * 4
    unembedding[place - 1] = states[0] / states[0].norm() * 3.9
    # 101 entries are four tiles of 32, so that the last of seven slices have none.
    check(interpreter, states, targets, unembedding, cut={"slices": slices})


@pytest.mark.parametrize(("n", "d", "vocab"), [(1, 1, 1), (1, 40, 3), (16, 32, 64), (17, 5, 65)])
def test_any_shape(interpreter, n, d, vocab):
    check(interpreter, *random(n, d, vocab))


def test_zero_states_give_empty_results(interpreter):
    assert interpreter.submit(run, "policy_entropy", torch.empty(0, 8), torch.empty(5, 8)).result(300).shape == (0,)


def test_states_of_any_stride(interpreter):
    states, targets, unembedding = random(n=20)
    wide = torch.zeros(20, 3, 24)
    wide[:, 1] = states
    check(interpreter, wide[:, 1], targets, unembedding.T.contiguous().T)


def test_extremes(interpreter):
    def entropy(states, unembedding):
        return interpreter.submit(run, "policy_entropy", states, unembedding, blocks=SMALL).result(300)

    unembedding = torch.eye(70)
    assert entropy(torch.zeros(1, 70), unembedding).item() == pytest.approx(math.log(70), abs=1e-5)
    assert entropy(1e6 * torch.eye(70)[:1], unembedding).item() == 0.0


def test_logits_of_size_1e4(interpreter):
    # float32 holds logits near 1e4 to 1e-3, and an entropy is as uncertain as the logits of the likely tokens.
    states, targets, unembedding = random(n=8, d=64, size=1e4)
    states[::2] = states[::2].round()
    check(interpreter, states, targets, unembedding, atol=1e-2)
    # The gaps of these logits are exact, and so are their entropies.
    unembedding = (torch.arange(101)[:, None] % 3).float()
    check(interpreter, torch.full((2, 1), 1.0), torch.tensor([0, 99]), unembedding, torch.full((101,), 1e4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_state_gives_nan_in_its_row_only(interpreter, bad):
    states, targets, unembedding = random(n=5)
    states[2, 1] = bad
    entropy = check(interpreter, states, targets, unembedding)
    assert entropy.isnan().tolist() == [False, False, True, False, False]


def test_log_probabilities_with_impossible_tokens(interpreter):
    # A whole tile of padding entries, first: an exponential taken from a maximum of -inf would be NaN.
    states, _, unembedding = random(n=3)
    bias = torch.zeros(101)
    bias[:40] = -torch.inf
    check(interpreter, states, torch.tensor([40, 100, 3]), unembedding, bias)


def test_a_certain_token_has_log_probability_zero(interpreter):
    states = torch.randn(40, 24) * 30
    targets = (states @ torch.eye(24)).argmax(1)
    ours = interpreter.submit(run, "token_log_probs", states, targets, torch.eye(24), blocks=SMALL).result(300)
    assert ours.max() <= 0


def test_public_functions_return_the_kernel_results(interpreter):
    states, targets, unembedding = random(size=2)
    bias = torch.randn(101)
    options = {"scale": 0.5, "softcap": 3.0, "memory_budget": 2**20}
    operands = (states, targets, unembedding, bias)
    entropy, log_probs, calls = interpreter.submit(run_through_dispatch, *operands, **options).result(300)
    assert calls == 2
    torch.testing.assert_close(entropy, policy_entropy(states, unembedding, bias, **options), rtol=0, atol=FLOAT32_NATS)
    own = token_log_probs(states, targets, unembedding, bias, **options)
    torch.testing.assert_close(log_probs, own, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "d", "vocab"), [(130, 96, 2001), (64, 80, 4096), (3, 257, 1023)])
def test_larger_shapes_in_the_blocks_of_a_gpu(interpreter, n, d, vocab, dtype):
    operands = random(n, d, vocab, dtype=dtype)
    for blocks in choices(n, half=dtype != torch.float32, tf32=False):
        check(interpreter, *operands, cut={"blocks": blocks})
    states, _, unembedding = operands
    for blocks in choices(n, half=dtype != torch.float32, tf32=False, lengths=True):
        check_lengths(interpreter, states, factors(n), unembedding, cut={"blocks": blocks})


def test_block_sizes_are_tuned_once_per_width_and_vocabulary(interpreter):
    states, _, unembedding = random()
    twice, few, timed, at_lengths, timed_again = interpreter.submit(run_tuned, states, unembedding).result(300)
    own = reference.policy_entropy(states, unembedding)
    for ours in (*twice, few, *at_lengths[0], *at_lengths[1]):
        torch.testing.assert_close(ours.double(), own[: len(ours)], rtol=0, atol=FLOAT32_NATS)
    # The fastest blocks for one length need not be those for two.
    assert timed == timed_again == 2


# Two lengths of a state from one product.


def check_lengths(interpreter, states, lengths, unembedding, bias=None, *, cut=None, atol=FLOAT32_NATS, **options):
    kernel = {"blocks": SMALL} | (cut or {})
    operands = (states, lengths, unembedding, bias)
    both = interpreter.submit(run, "policy_entropies_at_lengths", *operands, **options, **kernel).result(300)
    assert both.dtype == torch.float32
    alone = interpreter.submit(run, "policy_entropy", states, unembedding, bias, **options, **kernel).result(300)
    torch.testing.assert_close(both[0], alone, rtol=0, atol=0, equal_nan=True)
    scaled = states.double() * lengths.double()[:, None]
    own = [reference.policy_entropy(x, unembedding, bias, **options) for x in (states, scaled)]
    torch.testing.assert_close(both.double(), torch.stack(own), rtol=0, atol=atol, equal_nan=True)
    return both


def factors(n=37, most=30.0):
    """Factors from 0.1 to ``most``, evenly by their logarithm, in an order unrelated to the states'."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return torch.logspace(-1, math.log10(most), n)[order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_lengths_equal_the_definition(interpreter, dtype):
    # A 16-bit state times its factor would be rounded to 16 bits; the product of the state is not.
    states, _, unembedding = random(dtype=dtype)
    strided = factors().repeat_interleave(2)[::2]
    both = check_lengths(interpreter, states, strided, unembedding)
    assert (both[1] - both[0]).abs().max() > 1


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": -3.0, "softcap": 2.0}])
def test_the_factor_is_on_the_state_and_not_on_bias_or_cap(interpreter, options):
    states, _, unembedding = random(size=4)
    bias = torch.randn(101)
    check_lengths(interpreter, states, factors(most=3.0), unembedding, bias, **options)


@pytest.mark.parametrize("slices", [1, 3, 7])
def test_both_lengths_are_merged_over_slices(interpreter, slices):
    # The most likely token is in another slice at each length: the bias is for one, the product for the other.
    states, _, unembedding = random(n=3)
    unembedding[100] = unembedding[99] = states[0] / states[0].norm()
    bias = torch.zeros(101)
    bias[:2] = 12.0
    lengths = torch.tensor([30.0, 0.1, 1.0])
    check_lengths(interpreter, states, lengths, unembedding, bias, cut={"slices": slices})


def test_a_state_of_length_zero_leaves_the_bias(interpreter):
    states, _, unembedding = random(n=5)
    both = check_lengths(interpreter, states, torch.zeros(5), unembedding)
    torch.testing.assert_close(both[1], torch.full((5,), math.log(101)), rtol=0, atol=FLOAT32_NATS)
    check_lengths(interpreter, states, torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]), unembedding, torch.randn(101) * 3)


def test_a_non_finite_state_gives_nan_at_both_lengths_in_its_row_only(interpreter):
    states, _, unembedding = random(n=5)
    states[2, 1] = float("inf")
    both = check_lengths(interpreter, states, factors(5), unembedding)
    assert both.isnan().tolist() == [[False, False, True, False, False]] * 2


def test_targets_keep_their_log_probabilities_beside_a_second_length(interpreter):
    states, targets, unembedding = random()
    operands = (states, unembedding, None, targets)
    alone = interpreter.submit(run_both, *operands, blocks=SMALL).result(300)
    beside = interpreter.submit(run_both, *operands, lengths=factors(), blocks=SMALL).result(300)
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_states_with_another_length_cost_no_further_launch(interpreter):
    first, _, unembedding = random(size=2)
    states, bias, lengths = [first, first.flip(0)], torch.randn(101), factors(most=3.0).double()
    options = {"scale": 0.5, "softcap": 3.0}
    operands, at = (states, unembedding, bias), [(1, lengths)]
    ours, launches = interpreter.submit(run_at_lengths, *operands, lengths=at, **options).result(300)
    assert launches == [False, True]
    scaled = states[1].double() * lengths[:, None]
    own = torch.stack([reference.policy_entropy(x, unembedding, bias, **options) for x in (*states, scaled)])
    torch.testing.assert_close(ours.double(), own, rtol=0, atol=FLOAT32_NATS)


def test_lengths_are_one_a_state(interpreter):
    states, _, unembedding = random(n=5)
    for wrong in (torch.ones(4), torch.ones(5, 1)):
        with pytest.raises(ValueError, match=r"for 5 states; needed is one factor a state"):
            interpreter.submit(run, "policy_entropies_at_lengths", states, wrong, unembedding).result(300)
    none = interpreter.submit(run, "policy_entropies_at_lengths", states[:0], torch.ones(0), unembedding).result(300)
    assert none.shape == (2, 0)


def test_two_lengths_share_the_memory_budget(interpreter):
    states, _, unembedding = random(n=16, vocab=500)
    budget = 24 * 16 * 4
    for lengths, slices in ((None, [4]), (factors(16), [2, 2])):
        options = {"lengths": lengths, "blocks": SMALL, "memory_budget": budget}
        cut, size = interpreter.submit(run_counting, states, unembedding, **options).result(300)
        assert cut == slices
        # As much again while they are merged.
        assert size == budget / 2


# When the kernel is used, and the fallback otherwise.


@pytest.fixture
def untried(monkeypatch):
    monkeypatch.setattr(streaming, "_failures", set())
    monkeypatch.setattr(streaming, "kernel_is_faster", lambda *_: True)


def twice(caplog):
    states, targets, unembedding = random()
    with caplog.at_level(logging.WARNING, "internal_policy"):
        for _ in range(2):
            own = reference.policy_entropy(states, unembedding)
            torch.testing.assert_close(policy_entropy(states, unembedding).double(), own, rtol=0, atol=FLOAT32_NATS)
            own = reference.token_log_probs(states, targets, unembedding)
            ours = token_log_probs(states, targets, unembedding).double()
            torch.testing.assert_close(ours, own, rtol=0, atol=FLOAT32_NATS)
    (record,) = caplog.records
    return record.getMessage()


def test_missing_triton_falls_back_to_blocks_with_one_notice(untried, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "internal_policy.entropy.triton_kernel", None)
    monkeypatch.delattr("internal_policy.entropy.triton_kernel", raising=False)
    assert "triton is not installed" in twice(caplog)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel would run")
def test_a_kernel_that_cannot_be_launched_is_reported_once(untried, caplog):
    # Triton's own error: there is no driver here.
    assert "driver" in twice(caplog)


def test_out_of_memory_is_raised_to_the_caller(untried, monkeypatch):
    from internal_policy.entropy import triton_kernel

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(triton_kernel, "policy_entropy", fail)
    states, _, unembedding = random()
    with pytest.raises(torch.OutOfMemoryError):
        policy_entropy(states, unembedding)


def operand(*shape, dtype=torch.bfloat16, device="cuda:0"):
    return SimpleNamespace(shape=shape, ndim=len(shape), dtype=dtype, device=torch.device(device))


@pytest.mark.parametrize(
    ("states", "unembedding", "serves"),
    [
        (operand(4, 8), operand(9, 8), True),
        (operand(4, 8, dtype=torch.float16), operand(9, 8, dtype=torch.float16), True),
        (operand(4, 8, dtype=torch.float32), operand(9, 8, dtype=torch.float32), False),
        (operand(4, 8, dtype=torch.float64), operand(9, 8, dtype=torch.float64), False),
        (operand(4, 8, dtype=torch.float32), operand(9, 8), False),
        (operand(4, 8, device="cpu"), operand(9, 8, device="cpu"), False),
        (operand(4, 8), operand(9, 8, device="cuda:1"), False),
        (operand(4, 8), operand(9, 7), False),
        (operand(8), operand(9, 8), False),
    ],
)
def test_kernel_is_used_for_dtypes_with_tensor_cores(monkeypatch, states, unembedding, serves):
    monkeypatch.setattr(streaming, "_has_matrix_units", lambda _: True)
    assert streaming.kernel_is_faster(states, unembedding, None) is serves


def test_kernel_is_used_for_float32_if_tf32_is_allowed(monkeypatch):
    monkeypatch.setattr(streaming, "_has_matrix_units", lambda _: True)
    states, unembedding = operand(4, 8, dtype=torch.float32), operand(9, 8, dtype=torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        assert streaming.kernel_is_faster(states, unembedding, None)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not streaming.kernel_is_faster(states, unembedding, None)
