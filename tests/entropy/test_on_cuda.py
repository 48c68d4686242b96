"""What only a GPU can show: the fused kernel launched on it, and results that do not depend on the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from capture_checks import FLOAT32_NATS, captured, check_quantities, wrapped
from tiny import VOCAB, ragged_responses, tiny_model

from internal_policy.entropy import policy_entropies, policy_entropy, reference, streaming, token_log_probs
from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.entropy.tiles import Blocks
from internal_policy.extractors import HookExtractor, verify
from internal_policy.extractors.truncated import internal_forward

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TILE = Blocks(64, 128, 64, warps=4, stages=3)
# Factors of logits that are rounded to TF32, which carries 11 bits, of sizes up to 4: an entropy errs by less.
TF32_NATS = 4 * 2.0**-11


def random(n=70, d=200, vocab=1001, dtype=torch.bfloat16):
    """Operands of which no size is a multiple of a block, on the CPU."""
    g = torch.Generator().manual_seed(0)
    states = (3 * torch.randn(n, d, generator=g)).to(dtype)
    unembedding = (torch.randn(vocab, d, generator=g) / d**0.5).to(dtype)
    return states, unembedding, torch.randint(vocab, (n,), generator=g), torch.randn(vocab, generator=g)


def on_gpu(*tensors):
    return [t.cuda() for t in tensors]


@pytest.fixture
def untried(monkeypatch):
    """No failure of the kernel in another test hides it here."""
    monkeypatch.setattr(streaming, "_failures", set())


# A tensor core cuts off what it adds below the 24 bits of the sum: 13 steps of 16 widths, on sums of size 10.
KERNEL_NATS = 3e-5


def close(found, exact, atol=FLOAT32_NATS):
    torch.testing.assert_close(found.double().cpu(), exact.double().cpu(), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"scale": 1.5, "softcap": 4.0}], ids=["plain", "bias-scale-cap"])
def test_the_kernel_equals_the_definition(dtype, options):
    from internal_policy.entropy import triton_kernel

    states, unembedding, targets, bias = random(dtype=dtype)
    bias = bias if options else None
    x, e, y = on_gpu(states, unembedding, targets)
    sums = triton_kernel.online_sums(x, e, None if bias is None else bias.cuda(), y, blocks=TILE, **options)
    close(sums.entropy(), reference.policy_entropy(states, unembedding, bias, **options), KERNEL_NATS)
    close(sums.log_probs(), reference.token_log_probs(states, targets, unembedding, bias, **options), KERNEL_NATS)


@pytest.mark.parametrize("options", [{}, {"scale": 1.5, "softcap": 4.0}], ids=["plain", "bias-scale-cap"])
def test_the_kernel_of_two_lengths_equals_the_definition(options):
    from internal_policy.entropy import triton_kernel

    states, unembedding, _, bias = random()
    bias = bias if options else None
    lengths = torch.logspace(-1, 1, len(states))
    x, e, factors = on_gpu(states, unembedding, lengths)
    bias_there = None if bias is None else bias.cuda()
    found = triton_kernel.policy_entropies_at_lengths(x, factors, e, bias_there, blocks=TILE, **options)
    for row, factor in zip(found, (torch.ones_like(lengths), lengths), strict=True):
        exact = reference.policy_entropy(states.double() * factor[:, None], unembedding, bias, **options)
        # At ten times the length the logits are ten times as large.
        close(row, exact, 10 * KERNEL_NATS)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_public_functions_use_the_kernel_and_agree_with_the_blocks(untried, monkeypatch):
    states, unembedding, targets, _ = random(n=40, d=256, vocab=4096)
    x, e, y = on_gpu(states, unembedding, targets)
    lengths = [(0, torch.linspace(0.5, 2, len(x), device="cuda"))]
    assert streaming.kernel_is_faster(x, e, None)
    fused = [policy_entropies([x, 2 * x], e, lengths=lengths), token_log_probs(x, y, e)]
    assert not streaming._failures
    monkeypatch.setattr(streaming, "kernel_is_faster", lambda *_: False)
    for found, by_blocks in zip(
        fused, [policy_entropies([x, 2 * x], e, lengths=lengths), token_log_probs(x, y, e)], strict=True
    ):
        close(found, by_blocks, KERNEL_NATS)
    close(policy_entropy(x, e), reference.policy_entropy(states, unembedding))


def test_the_kernel_in_tf32_is_off_by_its_rounding():
    from internal_policy.entropy import triton_kernel

    states, unembedding, _, _ = random(d=256, dtype=torch.float32)
    states = states / 3
    torch.set_float32_matmul_precision("high")
    try:
        blocks = Blocks(64, 128, 32, warps=4, stages=3)
        found = triton_kernel.policy_entropy(*on_gpu(states, unembedding), blocks=blocks)
    finally:
        torch.set_float32_matmul_precision("highest")
    close(found, reference.policy_entropy(states, unembedding), TF32_NATS)


def test_gradients_of_log_probs_match_float64_on_the_cpu():
    states, unembedding, targets, _ = random(dtype=torch.float32)
    weights = torch.linspace(-1, 1, len(states))
    gradients = []
    for operands in (on_gpu(states, unembedding, targets, weights), (states.double(), unembedding.double(), targets)):
        x, e = (t.requires_grad_() for t in operands[:2])
        log_probs, entropies = differentiable_log_probs(x, operands[2], e, entropy=True)
        (weights.to(log_probs) * (log_probs + 0.1 * entropies)).sum().backward()
        gradients.append((log_probs.detach(), x.grad, e.grad))
    for found, exact in zip(*gradients, strict=True):
        # A gradient of E_u is a sum of 70 products of size ~3.
        close(found, exact, 2 * FLOAT32_NATS)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_an_analysis_does_not_depend_on_the_device(model_type):
    here = wrapped(tiny_model(model_type, tied=True))
    expected = captured(here, ragged_responses(4))
    there = wrapped(tiny_model(model_type, tied=True).cuda())
    verify(HookExtractor(there))
    for one, other in zip(expected, captured(there, ragged_responses(4)), strict=True):
        # Another device adds in another order, and three layers carry that on.
        np.testing.assert_allclose(one.layers, other.layers, rtol=0, atol=20 * FLOAT32_NATS)
        np.testing.assert_allclose(one.policy, other.policy, rtol=0, atol=20 * FLOAT32_NATS)


def test_every_quantity_of_a_bfloat16_analysis_equals_its_definition(untried):
    there = wrapped(tiny_model("qwen3", tied=True).cuda().bfloat16())
    verify(HookExtractor(there))
    check_quantities(there, ragged_responses(2))
    # The kernel ran, and did not fail over to the blocks.
    assert streaming.kernel_is_faster(there.projection.weight, there.projection.weight, None)
    assert not streaming._failures


@pytest.mark.parametrize("layer", [1, 3])
def test_an_internal_forward_pass_and_its_gradients_do_not_depend_on_the_device(layer):
    ids = torch.randint(2, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model = tiny_model("qwen3", tied=True).to(device)
        with internal_forward(model, layer):
            states = model.model(input_ids=ids.to(device)).last_hidden_state[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten().to(device)
            log_probs, _ = differentiable_log_probs(states, targets, model.lm_head.weight)
            log_probs.mean().backward()
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad
        found.append((log_probs.detach().cpu(), gradient.cpu(), model.lm_head.weight.grad.cpu()))
        assert (model.model.layers[2].mlp.up_proj.weight.grad is None) == (layer < 3)
    for here, there in zip(*found, strict=True):
        close(there, here, 20 * FLOAT32_NATS)
