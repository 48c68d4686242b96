from __future__ import annotations

import copy
import operator

import pytest
import torch
from tiny import FAMILIES, tiny_model
from trainers import LAYERS, Recorder, _Gradients, by_hooks, left_padded, make_bupo_trainer, make_trainer, weights
from trl import GRPOTrainer

from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.extractors.truncated import internal_forward
from internal_policy.utils.errors import UserError


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("site", "lens"), [("layer", "policy"), ("attn", "policy"), ("ffn", "policy"), ("layer", "logit-lens")]
)
def test_log_probabilities_match_hooked_states(tmp_path, family, site, lens):
    model = tiny_model(family, layers=LAYERS, tied=family == "llama")
    untouched = copy.deepcopy(model)
    trainer = make_bupo_trainer(tmp_path, model, layer=3, temperature=0.7, site=site, lens=lens)
    ids, mask, keep = left_padded()
    with trainer._policy(True), torch.no_grad():
        log_p, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, keep, compute_entropy=True
        )
    expected, expected_entropy = by_hooks(untouched, ids, mask, keep, 3, site, lens, 0.7)
    # Float32 products of width 32 against float64: some 1e-6.
    torch.testing.assert_close(log_p.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=0)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("family", [f if f == "qwen3" else slow(f) for f in FAMILIES])
@pytest.mark.parametrize("tied", [False, True])
def test_an_alignment_step_updates_only_layers_up_to_l(tmp_path, family, tied):
    model = tiny_model(family, layers=LAYERS, tied=tied)
    before = weights(model)
    trainer = make_bupo_trainer(tmp_path, model, layer=2)
    gradients = {}
    trainer.add_callback(_Gradients(model, gradients))
    trainer.train()
    above = ("model.layers.2.", "model.layers.3.", "model.norm.")
    trained = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.", "lm_head.")
    for name, gradient in gradients.items():
        if name.startswith(above):
            assert gradient is None
        elif name.startswith(trained):
            # A key's bias shifts all scores of a query alike, so attention does not depend on it.
            assert name.endswith("k_proj.bias") or gradient > 0
    after = weights(model)
    for name in after:
        if name.startswith(above):
            assert torch.equal(after[name], before[name])
        elif not name.endswith("k_proj.bias"):
            assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("site", ["attn", "ffn"])
def test_a_modular_policy_trains_its_module_and_the_layers_below(tmp_path, site):
    model = tiny_model("qwen3", layers=LAYERS)
    gradients = {}
    trainer = make_bupo_trainer(tmp_path, model, layer=2, site=site)
    trainer.add_callback(_Gradients(model, gradients))
    trainer.train()
    assert gradients["model.layers.0.mlp.down_proj.weight"] > 0
    assert gradients["model.layers.1.self_attn.o_proj.weight"] > 0
    reached = gradients["model.layers.1.mlp.down_proj.weight"]
    assert reached > 0 if site == "ffn" else reached is None
    assert gradients["model.layers.2.mlp.down_proj.weight"] is None


@pytest.mark.parametrize("site", [slow("layer"), slow("attn"), "ffn"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, site):
    found = []
    for checkpointing in (False, True):
        gradients = {}
        model = tiny_model("qwen3", layers=LAYERS)
        trainer = make_bupo_trainer(tmp_path, model, layer=3, site=site, gradient_checkpointing=checkpointing)
        trainer.add_callback(_Gradients(model, gradients))
        trainer.train()
        found.append(gradients)
    # The same operations in the same order, recomputed.
    assert found[0] == found[1]


def test_the_logit_lens_trains_the_final_norm(tmp_path):
    gradients = {}
    model = tiny_model("qwen3", layers=LAYERS)
    trainer = make_bupo_trainer(tmp_path, model, layer=2, lens="logit-lens")
    trainer.add_callback(_Gradients(model, gradients))
    trainer.train()
    assert gradients["model.norm.weight"] > 0
    assert gradients["model.layers.2.mlp.down_proj.weight"] is None


def test_alignment_updates_skip_layers_above_l(tmp_path):
    model = tiny_model("qwen3", layers=LAYERS)
    trainer = make_bupo_trainer(tmp_path, model, layer=2, ipa_steps=1, max_steps=2, entropy_sequences=0)
    ran = []
    for number, layer in enumerate(model.model.layers, start=1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.model.norm.register_forward_hook(lambda *_: ran.append("norm"))
    counted = []
    compute = trainer._compute_loss

    def counting(*args):
        ran.clear()
        loss = compute(*args)
        counted.append(list(ran))
        return loss

    trainer._compute_loss = counting
    trainer.train()
    assert counted == [[1, 2], [1, 2, 3, 4, "norm"]]


def test_the_model_is_restored_on_any_exit():
    model = tiny_model("llama", layers=LAYERS)
    layers, norm = model.model.layers, model.model.norm

    def fail():
        assert len(model.model.layers) == 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), internal_forward(model, 2, site="ffn"):
        fail()
    assert model.model.layers is layers
    assert model.model.norm is norm
    assert not any(m._forward_hooks for m in model.modules())
    assert list(dict(model.named_modules()))[:2] == ["", "model"]


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_a_layer_out_of_range_is_refused(tmp_path, layer):
    with pytest.raises(UserError, match=f"layer is {layer}; needed is a layer of this model, 1 to 4"):
        make_bupo_trainer(tmp_path, layer=layer)


@pytest.mark.parametrize("mini_batches", [slow(1), 2])
def test_after_the_switch_updates_equal_trls_grpo_trainer_bitwise(tmp_path, mini_batches):
    changed = {
        "per_device_train_batch_size": 8 // mini_batches,
        "steps_per_generation": mini_batches,
        "max_steps": 3 * mini_batches,
        "save_strategy": "steps",
        "save_steps": mini_batches,
    }
    ours = make_bupo_trainer(tmp_path, tiny_model("qwen3", layers=LAYERS), ipa_steps=1, **changed)
    ours.train()
    switch = tmp_path / "out" / f"checkpoint-{mini_batches}"
    theirs = make_trainer(tmp_path, tiny_model("qwen3", layers=LAYERS), kind=GRPOTrainer, **changed)
    theirs.train(resume_from_checkpoint=str(switch))
    mine, other = weights(ours.model), weights(theirs.model)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    losses = [
        [h["loss"] for h in t.state.log_history if "loss" in h and h["step"] > mini_batches] for t in (ours, theirs)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2 * mini_batches


def test_grpo_equals_trls_grpo_trainer_bitwise(tmp_path):
    trained = []
    for kind, changed in ((BuPOTrainer, {"method": "grpo"}), (GRPOTrainer, {})):
        trainer = make_trainer(tmp_path, kind=kind, max_steps=2, **changed)
        trainer.train()
        trained.append(weights(trainer.model))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[1])


@pytest.mark.parametrize(
    ("iterations", "slices", "accumulation"),
    [slow(1, 2, 1), slow(2, 1, 1), (2, 2, 1), slow(2, 2, 2), slow(1, 4, 2), slow(3, 2, 2)],
)
def test_old_and_new_log_probabilities_are_of_the_same_policy(tmp_path, iterations, slices, accumulation):
    per_step = iterations * slices // accumulation
    trainer = make_trainer(
        tmp_path,
        kind=Recorder,
        method="bupo",
        layer=2,
        ipa_steps=2,
        max_steps=4 * per_step,
        num_iterations=iterations,
        steps_per_generation=slices,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=4,
    )
    trainer.train()
    assert all(old == new for old, new in trainer.updates)
    aligned = [new for _, new in trainer.updates]
    micro = iterations * slices
    assert aligned == [True] * 2 * micro + [False] * 2 * micro
    assert [h["aligns"] for h in trainer.state.log_history if "reward" in h][-1] == 0


def test_a_batch_keeps_its_phase_when_the_switch_falls_between_its_updates(tmp_path):
    trainer = make_trainer(tmp_path, kind=Recorder, method="bupo", layer=2, ipa_steps=1, max_steps=6, num_iterations=3)
    # With the phase counted in updates, the switch falls inside the first batch of rollouts.
    type(trainer).in_alignment = property(lambda self: self.state.global_step < 2)
    try:
        trainer.train()
    finally:
        del type(trainer).in_alignment
    assert trainer.updates == [(True, True)] * 3 + [(False, False)] * 3


def test_a_step_with_several_rollout_batches_is_one_update(tmp_path):
    trainer = make_bupo_trainer(tmp_path, ipa_steps=1, max_steps=2, gradient_accumulation_steps=2)
    assert trainer.args.updates_per_step == 1
    trainer.train()
    assert [h["aligns"] for h in trainer.state.log_history if "reward" in h] == [1.0, 0.0]


@pytest.mark.parametrize(("aggregation", "loss_type"), [("sequence-mean", "grpo"), ("token-mean", "dapo")])
def test_the_loss_is_the_clipped_surrogate_of_the_internal_ratio(tmp_path, aggregation, loss_type):
    trainer = make_bupo_trainer(tmp_path, aggregation=aggregation, epsilon=0.2)
    assert trainer.args.loss_type == loss_type
    generator = torch.Generator().manual_seed(1)
    ids, mask, keep = left_padded(rows=4)
    completion_mask = mask[:, -keep:].clone()
    completion_mask[0, -2:] = 0
    old, _ = by_hooks(
        trainer.model, ids, torch.cat([mask[:, :-keep], completion_mask], 1), keep, 2, "layer", "policy", 1.0
    )
    old = (old + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64)).float()
    advantages = torch.tensor([1.0, -1.0, 0.5, -2.0])
    batch = {
        "prompt_ids": ids[:, :-keep],
        "prompt_mask": mask[:, :-keep],
        "completion_ids": ids[:, -keep:],
        "completion_mask": completion_mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": completion_mask.sum(),
        "aligns": torch.tensor(True),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch)
    new, _ = by_hooks(
        trainer.model, ids, torch.cat([mask[:, :-keep], completion_mask], 1), keep, 2, "layer", "policy", 1.0
    )
    ratio = (new - old).exp()
    surrogate = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
    kept = completion_mask
    if aggregation == "sequence-mean":
        expected = -((surrogate * kept).sum(1) / kept.sum(1)).mean()
    else:
        expected = -(surrogate * kept).sum() / kept.sum()
    # Float32 log-probabilities.
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_rollouts_do_not_depend_on_the_phase(tmp_path):
    seen = []
    for changed in ({"method": "grpo"}, {"method": "bupo", "layer": 2, "ipa_steps": 1}):
        trainer = make_trainer(tmp_path, **changed)
        kept = trainer._compute_loss

        def keeping(model, inputs, kept=kept):
            seen.append({k: inputs[k] for k in ("completion_ids", "advantages", "prompt_ids")})
            return kept(model, inputs)

        trainer._compute_loss = keeping
        trainer.train()
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


def test_the_entropy_of_the_policy_is_logged_in_both_phases(tmp_path):
    trainer = make_bupo_trainer(tmp_path, ipa_steps=1, max_steps=2)
    trainer.train()
    first, second = (h for h in trainer.state.log_history if "reward" in h)
    # On the batch's first update TRL's entropy is of the same policy on the same tokens.
    assert second["policy_entropy"] == pytest.approx(second["entropy"], abs=1e-5)
    assert abs(first["policy_entropy"] - first["entropy"]) > 1e-3


def test_modules_of_the_embedded_families_can_be_replaced():
    for family in FAMILIES:
        model = tiny_model(family, layers=LAYERS)
        with internal_forward(model, 3):
            state = model.model(input_ids=torch.tensor([[2, 3, 4]]), use_cache=False).last_hidden_state
        full = model.model(input_ids=torch.tensor([[2, 3, 4]]), output_hidden_states=True, use_cache=False)
        assert torch.equal(state, full.hidden_states[3])
        assert len(operator.attrgetter("model.layers")(model)) == LAYERS
