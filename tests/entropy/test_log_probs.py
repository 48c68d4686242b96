"""Blockwise log-probabilities and entropies: gradients, operations and memory of an update."""

from __future__ import annotations

import pytest
import torch
from analysis.test_operation_counts import Operations
from tiny import VOCAB as VOCAB_OF_TINY
from tiny import tiny_model, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from trainers import LAYERS, make_bupo_trainer
from trl.trainer.utils import add_fused_lm_head

from internal_policy import models
from internal_policy.bupo import forward
from internal_policy.bupo import trainer as trainer_module
from internal_policy.bupo.config import TrainConfig
from internal_policy.bupo.dynamics import Dynamics, eval_interval
from internal_policy.data.responses import read_responses
from internal_policy.entropy import log_probs as trained
from internal_policy.entropy.log_probs import differentiable_log_probs
from internal_policy.models import family_of

N, WIDTH, VOCAB = 37, 16, 101
# torch's counter has no entry for this fused product.
IN_PLACE = {torch.ops.aten.addmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * b[1]}
TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"scale": 0.25},
    "soft cap": {"softcap": 2.0},
    "all": {"temperature": 1.3, "scale": 3.0, "softcap": 4.0},
}


def operands(bias, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, factor=1.0):
        return (factor * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    states, weight = draw(N, WIDTH), draw(VOCAB, WIDTH, factor=0.5)
    targets = torch.randint(VOCAB, (N,), generator=generator)
    return states, weight, draw(VOCAB) if bias else None, targets


def plain(states, weight, bias, targets, *, temperature=1.0, scale=1.0, softcap=None):
    """The definition with full logits, differentiated by autograd."""
    z = states @ weight.T
    z = (z if bias is None else z + bias) * scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_p = z.log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def gradients(pair, wants, *leaves):
    """Gradients of a loss that weights the two values of each token by separate factors."""
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(2, N, generator=generator, dtype=torch.float64)
    loss = sum((f * value).sum() for f, value, wanted in zip((a, b), pair, wants, strict=True) if wanted)
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


@pytest.fixture
def small_blocks(monkeypatch):
    """Ragged blocks in both directions: 37 states by 8, 101 of the vocabulary by 10."""
    monkeypatch.setattr(trained, "block_sizes", lambda *_: (8, 10))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)])
def test_values_and_gradients_match_the_definition(transform, bias, wants):
    *tensors, targets = operands(bias)
    expected = plain(*tensors, targets, **transform)
    found = differentiable_log_probs(tensors[0], targets, *tensors[1:], entropy=True, **transform)
    # Float64 sums of 101 terms in another order.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(found, wants, *tensors), gradients(expected, wants, *tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_autocast_rounds_only_the_operands():
    *tensors, targets = operands(bias=False, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = differentiable_log_probs(tensors[0], targets, *tensors[1:], entropy=True)
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in tensors[:2]]
    expected = plain(*rounded, None, targets)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        # Float32 sums of 101 terms of size 10.
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(found, (True, True), *tensors[:2]), gradients(expected, (True, True), *rounded)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_states_without_gradient_are_skipped_in_backward():
    *tensors, targets = operands(bias=True)
    a = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a[::3] = 0.0
    with FlopCounterMode(display=False) as forward:
        log_probs, entropies = differentiable_log_probs(tensors[0], targets, *tensors[1:])
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as backward:
        found = torch.autograd.grad(log_probs, tensors, a)
    product = 2 * WIDTH * VOCAB
    assert entropies is None
    assert forward.get_total_flops() == N * product
    assert backward.get_total_flops() == 3 * int((a != 0).sum()) * product
    expected = torch.autograd.grad(plain(*tensors, targets)[0], tensors, a)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    still = torch.autograd.grad(differentiable_log_probs(tensors[0], targets, *tensors[1:])[0], tensors, 0 * a)
    assert not any(g.any() for g in still)


def test_nan_in_a_loss_is_not_hidden():
    *tensors, targets = operands(bias=False)
    log_probs, _ = differentiable_log_probs(tensors[0], targets, tensors[1])
    grad = torch.zeros(N, dtype=torch.float64)
    grad[4] = torch.nan
    to_states, to_weight = torch.autograd.grad(log_probs, tensors[:2], grad)
    assert to_states[4].isnan().all()
    assert to_weight.isnan().all()


@pytest.mark.parametrize("targets", [torch.full((N,), VOCAB), torch.full((N,), -1), torch.zeros(N - 1).long()])
def test_invalid_targets_are_refused(targets):
    states, weight, _, _ = operands(bias=False)
    with pytest.raises(ValueError, match="needed"):
        differentiable_log_probs(states, targets, weight)


def rollouts(vocab, rows=6, prompt=30, completion=40):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, completion, dtype=torch.long)
    for row in range(rows):
        mask[row, completion - 3 * row :] = 0
    return {
        "prompt_ids": torch.randint(vocab, (rows, prompt), generator=generator),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": torch.randint(vocab, (rows, completion), generator=generator),
        "completion_mask": mask,
        "advantages": torch.linspace(-1.5, 1.0, rows),
        "num_items_in_batch": mask.sum(),
        "aligns": torch.tensor(True),
    }


def ready(tmp_path, model, **changed):
    trainer = make_bupo_trainer(tmp_path, model, **changed)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def test_memory_of_an_update_does_not_include_logits(tmp_path):
    small, large = 20_011, 40_009
    peaks = []
    for vocab in (small, large):
        trainer = ready(tmp_path, tiny_model("qwen3", layers=LAYERS, vocab=vocab, context=128))
        with Operations() as counted:
            trainer._compute_loss(trainer.model, rollouts(vocab)).backward()
        peaks.append(counted.peak)
    width = trainer.policy_module.config.hidden_size
    # A gradient of E_u, and one of the untied embedding, of width float32 numbers for each new entry.
    assert peaks[1] - peaks[0] <= 2.01 * (large - small) * width * 4
    # The logits of the scored tokens alone are more.
    assert peaks[1] < 6 * 40 * large * 4 / 2


@pytest.mark.parametrize("family", ["qwen3", "cohere", "gemma2", "granite", "phi", "gpt2"])
def test_updates_match_trls_head_and_score_only_responses(tmp_path, monkeypatch, family):
    scored, found = [], []
    score = forward.differentiable_log_probs
    monkeypatch.setattr(
        forward, "differentiable_log_probs", lambda *args, **kw: scored.append(len(args[0])) or score(*args, **kw)
    )
    batch = rollouts(VOCAB_OF_TINY, prompt=5, completion=20)
    for streamed in (True, False):
        monkeypatch.setattr(trainer_module, "needs_streamed_head", lambda _, streamed=streamed: streamed)
        model = tiny_model(family, layers=LAYERS, tied=family == "cohere")
        trainer = ready(tmp_path, model, temperature=0.7)
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert scored == [int(batch["completion_mask"].sum())]
    assert found[0].keys() == found[1].keys()
    for name, theirs in found[1].items():
        # Float32 sums in another order, through three layers.
        torch.testing.assert_close(found[0][name], theirs, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("patched", [True, False])
def test_the_replaced_head_is_removed_on_any_exit(patched):
    model = tiny_model("llama")
    if patched:
        add_fused_lm_head(model)
    before = model.__dict__.get("forward")
    ids = torch.tensor([[3, 4, 5]])
    logits = model(ids).logits

    def look_and_fail():
        labels = torch.tensor([[-100, 4, -100]])
        found = model(input_ids=ids, labels=labels, fused_lm_head=True)
        assert found.entropy is None
        assert found.label_mask.tolist() == [[True, False]]
        # Float32 products of width 32.
        assert found.log_probs[0].tolist() == pytest.approx([logits[0, 0].log_softmax(-1)[4].item(), 0.0], abs=1e-5)
        assert torch.equal(model(ids).logits, logits)
        empty = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True).log_probs
        empty.sum().backward()
        assert not model.lm_head.weight.grad.any()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), forward.streamed_head(model, family_of(model, "tiny"), 1.0, entropy=False):
        look_and_fail()
    assert model.__dict__.get("forward") is before


def test_policy_entropy_reuses_the_pass_of_the_old_log_probabilities(tmp_path):
    logged, passes = [], []
    for drops_out in (False, True):
        trainer = make_bupo_trainer(
            tmp_path, layer=2, max_steps=4, steps_per_generation=2, per_device_train_batch_size=4
        )
        # With dropout, the entropy is measured in a separate pass without it.
        trainer._has_dropout = drops_out
        ran = []
        trainer.policy_module.model.norm.register_forward_hook(lambda *_, ran=ran: ran.append(torch.is_grad_enabled()))
        generate = trainer._generate
        trainer._generate = lambda *args, generate=generate, ran=ran: (generate(*args), ran.clear())[0]
        trainer.train()
        logged.append([h["policy_entropy"] for h in trainer.state.log_history if "policy_entropy" in h])
        passes.append(ran.count(False))
    # Of 8 rollouts, 4 at a time: the old log-probabilities, and the measurement.
    assert passes == [2, 4]
    # Float32 sums in another order: during alignment both use a separate pass.
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)


def flops(work):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counted:
        work()
    return counted.get_total_flops()


@pytest.mark.parametrize("named", ["testbed", pytest.param("qwen", marks=pytest.mark.slow)])
def test_metrics_cost_less_than_5_percent_of_a_run(tmp_path, named):
    """Operations at the default interval against those of updates and old log-probabilities, sampling left out."""
    layers, layer, vocab = (8, 7, 42) if named == "testbed" else (36, 6, 924)
    # The ratio of 924 entries to a layer of this width is that of Qwen3-4B's vocabulary to its layers.
    model = tiny_model("qwen3", layers=layers, vocab=vocab, context=80)
    trainer = ready(tmp_path, model, layer=layer)
    batch = rollouts(vocab, rows=4, prompt=20, completion=20)
    batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    records = [{"input_ids": row.tolist(), "prompt_length": 20} for row in ids]
    tokenizer = tiny_tokenizer(vocab)
    watch = Dynamics(models.wrap(model, tokenizer), read_responses(records, tokenizer, "plain"), layer)

    def update(aligns):
        inputs = {**batch, "aligns": torch.tensor(aligns)}
        trainer._compute_loss(trainer.model, inputs).backward()
        with trainer._policy(aligns), torch.no_grad():
            trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 20)

    config = TrainConfig(preset=named).with_preset()
    steps, ipa = config.max_steps, config.ipa_steps
    rollouts_a_step = config.prompts_per_step * config.num_generations
    trained = rollouts_a_step * (ipa * flops(lambda: update(True)) + (steps - ipa) * flops(lambda: update(False)))
    assert [eval_interval(TrainConfig(max_steps=n), 1) for n in (1, 10, 12, 60, 300)] == [1, 1, 2, 6, 30]
    # Before the first step, at the interval, and at the change of phase.
    measurements = steps // eval_interval(config, 1) + 2
    measured = measurements * config.dynamics_responses * flops(watch.measure)
    entropy = flops(lambda: trainer._measure_policy_entropy(batch, None))
    measured += ipa * trainer.args.entropy_sequences * entropy
    assert 0 < measured < 0.05 * trained
