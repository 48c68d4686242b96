"""Families without a table row or unsupported by the trainer: inferred and verified, or refused."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from exact_policies import EXPERTS, FLOAT32_NATS, check_policies
from tiny import tiny_model, tiny_tokenizer
from tiny_training import PROMPTS, high_words
from trainers import LAYERS, dataset, make_bupo_trainer, make_trainer, options, reward
from training_calls import refused

from internal_policy import UserError, bupo, models
from internal_policy.bupo import checks
from internal_policy.bupo.config import ALIGNMENT
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.trainer_config import BuPOConfig
from internal_policy.data.responses import read_responses


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        # The likeliest guess takes what the attention returns for what it writes, before the norm that follows.
        ("exaone4", "attention_write", "post_attention_layernorm"),
        ("granitemoe", "write_multiplier", "residual_multiplier"),
    ],
)
def test_the_inferred_family_is_the_verified_one(tmp_path, model_type, field, value, caplog):
    own = {"residual_multiplier": 0.3} if model_type == "granitemoe" else {}
    model = tiny_model(model_type, layers=LAYERS, **own)
    found = checks.prove_family(model, None)
    assert getattr(found, field) == value
    assert getattr(models.family_of(model, ""), field) is None
    trainer = check_policies(tmp_path, model, "attn", "policy", found)
    assert trainer._family == found
    caplog.clear()
    given = BuPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=BuPOConfig(**options(output_dir=str(tmp_path / "given"), method="bupo", layer=2, ipa_steps=1, **EXPERTS)),
        train_dataset=dataset(),
        processing_class=tiny_tokenizer(),
        family=found,
    )
    assert given._family is found
    assert "found by structure" not in caplog.text


def test_a_model_of_unknown_structure_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"write one row in internal_policy/models/families\.py") as refusal:
        make_bupo_trainer(tmp_path, tiny_model("bloom", layers=LAYERS))
    assert "\n" not in str(refusal.value)


def test_verification_keeps_the_training_mode_of_modules(tmp_path):
    model = tiny_model("gpt2", layers=LAYERS).train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    checks.prove_family(model, None)
    checks.check_experts(BuPOConfig(output_dir=str(tmp_path)), model.config)
    assert checks.depends_on_absolute_positions(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_logits_that_trl_would_compute_differently_are_refused(tmp_path):
    model = tiny_model("llama", layers=LAYERS)
    # More than the weight: TRL multiplies by the weight and never calls the module.
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(UserError, match="TRL's log-probabilities are not those of this model's logits") as refusal:
        make_trainer(tmp_path, model, method="grpo")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_errors_of_logits_are_accepted(tmp_path, dtype):
    for model_type in ("gemma2", "gpt2"):
        trainer = make_bupo_trainer(tmp_path, tiny_model(model_type, layers=LAYERS).to(dtype), **EXPERTS)
        assert trainer._positions_from_mask or model_type != "gpt2"


def test_dropout_is_reported(tmp_path, caplog):
    make_bupo_trainer(tmp_path, tiny_model("gpt2", layers=LAYERS))
    assert "pass disable_dropout=True" in caplog.text
    caplog.clear()
    make_bupo_trainer(tmp_path, tiny_model("gpt2", layers=LAYERS), disable_dropout=True)
    make_bupo_trainer(tmp_path, tiny_model("qwen3", layers=LAYERS))
    assert "dropout" not in caplog.text


SMALL = {
    **{"ipa_steps": 1, "max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "mini_batches": 1},
    **{"max_completion_length": 6, "eval_samples": 0, "learning_rate": 1e-3, "template": "plain"},
    **{"reward": high_words, "prompts": PROMPTS},
}


def test_training_an_inferred_mixture_of_experts(tmp_path, monkeypatch):
    """Experts, a factor on the writes, and an inferred family that is verified once and then reused."""
    proofs = []
    prove = checks.prove

    def counting(model):
        proofs.append(model.name)
        return prove(model)

    monkeypatch.setattr(checks, "prove", counting)
    model = tiny_model("granitemoe", residual_multiplier=0.3)
    run = bupo.train(
        model, tokenizer=tiny_tokenizer(), layer=2, site="attn", dynamics_every=1, output=tmp_path / "run", **SMALL
    )
    assert len(proofs) == 1
    assert list(run.history["phase"]) == [ALIGNMENT, "grpo"]
    live = models.wrap(model, tiny_tokenizer(), family=checks.prove_family(model, None))
    # Their digest is the last line.
    rows = pd.read_json(tmp_path / "run" / "dynamics_responses.jsonl", lines=True).dropna(subset="input_ids")
    responses = read_responses(rows[["input_ids", "prompt_length"]].to_dict("records"), tiny_tokenizer(), "plain")
    again = Dynamics(live, responses, 2, site="attn").measure()
    assert run.dynamics["entropy"].iloc[-1] == pytest.approx(again.entropy, abs=FLOAT32_NATS)


def test_unsupported_options_of_mixtures_of_experts_are_refused_before_anything_is_written(tmp_path):
    model, words = tiny_model("mixtral"), {**SMALL, "tokenizer": tiny_tokenizer(), "layer": 2}
    message = refused(tmp_path / "loss", model=model, router_aux_loss_coef=0.001, **words)
    assert "in the first phase the loss would balance the experts of layers 1..l only; set it to 0" in message
    model.config.output_router_logits = True
    assert "set it to false in config.json" in refused(tmp_path / "logits", model=model, **words)


def test_trainer_refuses_a_load_balancing_loss(tmp_path):
    # TRL takes the coefficient from the model's own configuration where none is given.
    with pytest.raises(UserError, match=r"layers 1\.\.l only; pass router_aux_loss_coef=0"):
        make_bupo_trainer(tmp_path, tiny_model("mixtral", layers=LAYERS))
    assert make_trainer(tmp_path, tiny_model("mixtral", layers=LAYERS), method="grpo").aux_loss_enabled


def test_an_inferred_family_that_fails_verification_is_refused_in_every_process():
    model = tiny_model("starcoder2")
    next(model.parameters()).ds_id = 0
    with pytest.raises(UserError, match="cannot be proved where DeepSpeed spreads the weights"):
        checks.prove_model(models.wrap(model, tiny_tokenizer()))
    known = tiny_model("llama")
    next(known.parameters()).ds_id = 0
    described = models.wrap(known, tiny_tokenizer())
    assert checks.prove_model(described) is described


def test_sequences_across_the_longrope_switch_are_refused(tmp_path):
    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
        **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 5.0]},
    }
    model = tiny_model("phi3", rope_parameters=rope, pad_token_id=0, original_max_position_embeddings=16)
    words = {**SMALL, "tokenizer": tiny_tokenizer(), "layer": 2}
    message = refused(tmp_path / "long", model=model, **{**words, "max_completion_length": 15})
    assert "beyond 16 tokens LongRoPE computes every sequence of a batch with other positions" in message
    assert len(bupo.train(model, output=tmp_path / "short", dynamics_every=0, **words).history) == 2
