"""Policies compared with one in a single pass over the vocabulary, against the formulas in float64."""

from __future__ import annotations

import pytest
import torch

from internal_policy.entropy import policy_changes, reference

# Logits of size ~20 in float32 are off by ~2e-6, sums over the vocabulary by a few of these (observed: 5e-6), and a
# divergence of 30 nats also by its own rounding.
FLOAT32_NATS = {"atol": 1e-5, "rtol": 1e-6}
VOCAB, WIDTH, N = 1501, 16, 70

TRANSFORMS = {
    "plain": {},
    "bias": {"bias": True, "scale": 0.5},
    "capped": {"bias": True, "scale": 0.7, "softcap": 4.0},
}


def operands(bias=False, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    states = [scale * torch.randn(N, WIDTH, generator=generator) for scale in (1.0, 0.3, 1.4)]
    states.append(states[0] + 1e-3 * torch.randn(N, WIDTH, generator=generator))
    if bias:
        options["bias"] = torch.randn(VOCAB, generator=generator)
    return states, torch.randint(VOCAB, (N,), generator=generator), weight, options


@pytest.mark.parametrize("budget", [2**27, 60_000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_all_quantities_equal_the_formulas(transform, budget):
    states, targets, weight, options = operands(**TRANSFORMS[transform])
    found = policy_changes(states, targets, weight, memory_budget=budget, **options)
    for k, state in enumerate(states):
        wanted = {
            "divergence": reference.policy_divergence(states[0], state, weight, **options),
            "entropy": reference.policy_entropy(state, weight, **options),
            "log_prob": reference.token_log_probs(state, targets, weight, **options),
        }
        for name, values in wanted.items():
            torch.testing.assert_close(getattr(found, name)[k].double(), values, **FLOAT32_NATS)
        bias = options.get("bias", torch.zeros(VOCAB)).double()
        assert torch.equal(found.top[k], (state.double() @ weight.double().T + bias).argmax(dim=1))


def test_equal_states_differ_by_nothing_bit_for_bit():
    states, targets, weight, options = operands(bias=True)
    found = policy_changes([states[0], states[1], states[0].clone()], targets, weight, memory_budget=60_000, **options)
    assert torch.equal(found.divergence[2], torch.zeros(N))
    for values in found:
        assert torch.equal(values[2], values[0])


def test_float64_operands_are_compared_in_float64():
    states, targets, weight, options = operands()
    found = policy_changes([state.double() for state in states], targets, weight.double(), **options)
    wanted = reference.policy_divergence(states[0], states[3], weight)
    # 53 bits, and logits of size ~20.
    torch.testing.assert_close(found.divergence[3], wanted, atol=1e-12, rtol=0)


def test_operands_that_do_not_fit_are_refused():
    states, targets, weight, _ = operands()
    with pytest.raises(ValueError, match="needed are equal shapes"):
        policy_changes([states[0], states[1][:3]], targets, weight)
    with pytest.raises(ValueError, match="needed are 0 to 1500"):
        policy_changes(states, targets + VOCAB, weight)
