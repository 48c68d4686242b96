"""Training on every family: pi^l in float64, what an update reaches, rows found by structure, and what is refused."""

from __future__ import annotations

import copy
import operator
from itertools import cycle, product

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from test_bupo_trainer import (
    LAYERS,
    _Gradients,
    aligning,
    dataset,
    left_padded,
    make_trainer,
    options,
    reward,
    weights,
)
from test_families import NORMS
from test_train_errors import refused
from test_training_session import PROMPTS, high_words
from tiny import FAMILIES as FIRST
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from trl import GRPOTrainer

from internal_policy import UserError, bupo, models
from internal_policy.bupo import proof
from internal_policy.bupo.config import BuPOConfig
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.words import ALIGNMENT
from internal_policy.capture import residual_hooks
from internal_policy.models.families import FAMILIES as TABLE
from internal_policy.responses import read_responses

# Float32 products of width 32 against float64: some 1e-6.
FLOAT32 = 1e-5
# A mean over tokens of sums over the vocabulary, from float32 states.
FLOAT32_NATS = 2e-5
TEMPERATURE = 0.7
EXPERTS = {"router_aux_loss_coef": 0.0}
CELLS = list(product(("layer", "attn", "ffn"), ("policy", "logit-lens")))
# Every new family once, the six cells in turn; Granite's factor on its writes shows in the policies of modules only.
SOME = [(f, *cell) for f, cell in zip([f for f in TABLE if f not in FIRST], cycle(CELLS), strict=False)]
SOME += [("granite", "attn", "policy"), ("granite", "ffn", "policy"), ("gpt2", "layer", "policy")]
PARTS = ("mixtral", "phi", "gemma2", "deepseek_v3", "gpt_oss", "gpt2", "gptj")
"""Families that differ in what an update meets: experts, parallel blocks, post-norms, names, tuples, biases."""


def in_float64(model):
    exact = copy.deepcopy(model).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts knows no float64.
        exact.set_experts_implementation("eager")
    return exact


def logits_of(model, states):
    """What the model makes of states, written down from the modelling code and not from the table."""
    config, head = model.config, model.get_output_embeddings()
    z = states @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return z if cap is None else cap * torch.tanh(z / cap)


@torch.no_grad()
def alone(model, row, layer, site, lens, family=None):
    """Logits of pi^l and the model's own [T, V], of one unpadded row in float64; states are those that hooks see."""
    described = models.wrap(model, None, "tiny", family=family)
    seen = {}
    with residual_hooks(described, torch.arange(len(row)), lambda s: seen.setdefault(s.layer, s)):
        own = model(row[None], use_cache=False).logits[0]
    state = getattr(seen[layer], {"layer": "residual_out", "attn": "attention_write", "ffn": "ffn_write"}[site])
    if lens == "logit-lens":
        state = operator.attrgetter(described.family.final_norm)(model)(state)
    return logits_of(model, state), own


def assert_policies(trainer, untouched, layer, site, lens, family=None):
    """Both policies on left-padded rows are those of each row alone."""
    exact = in_float64(untouched)
    ids, mask, keep = left_padded()
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    wanted = [alone(exact, row, layer, site, lens, family) for row in rows]
    trainer.model.eval()
    for which, aligning_now in enumerate((True, False)):
        with trainer._policy(aligning_now), torch.no_grad():
            log_p, entropy, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, keep, compute_entropy=True
            )
        for n, row in enumerate(rows):
            policy = torch.distributions.Categorical(logits=wanted[n][which][-keep - 1 : -1] / TEMPERATURE)
            torch.testing.assert_close(log_p[n].double(), policy.log_prob(row[-keep:]), atol=FLOAT32, rtol=0)
            torch.testing.assert_close(entropy[n].double(), policy.entropy(), atol=FLOAT32, rtol=0)


def check_policies(tmp_path, model, site, lens, family=None):
    untouched = copy.deepcopy(model)
    trainer = aligning(tmp_path, model, layer=3, temperature=TEMPERATURE, site=site, lens=lens, **EXPERTS)
    assert_policies(trainer, untouched, 3, site, lens, family)
    return trainer


@pytest.mark.parametrize(("model_type", "site", "lens"), SOME)
def test_both_policies_are_those_of_each_sequence_alone_in_float64(tmp_path, model_type, site, lens):
    trainer = check_policies(tmp_path, tiny_model(model_type, layers=LAYERS), site, lens)
    assert trainer._counts_positions == (model_type == "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TABLE)
def test_every_cell_is_that_of_each_sequence_alone_in_float64(tmp_path, model_type, tied):
    for site, lens in CELLS:
        check_policies(tmp_path, tiny_model(model_type, layers=LAYERS, tied=tied), site, lens)


def test_trl_by_itself_gives_learned_positions_to_padding(tmp_path):
    """Why positions are counted here: with the day this fails, `counted_positions` can go."""
    model = tiny_model("gpt2", layers=LAYERS)
    theirs = make_trainer(tmp_path, copy.deepcopy(model), kind=GRPOTrainer)
    ours = make_trainer(tmp_path, model, method="grpo")
    ids, mask, keep = left_padded()
    found = []
    for trainer in (theirs, ours):
        trainer.model.eval()
        with torch.no_grad():
            found.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)[0])
    # The first row has no padding.
    assert torch.equal(found[0][0], found[1][0])
    assert float((found[0][1:] - found[1][1:]).abs().max()) > 0.1


def outside(model_type, layer, site, model):
    """Names of weights that an update of pi^l cannot reach, from eqs. 14-15 and the block's own graph."""
    family, (ln_in, ln_mid, _) = TABLE[model_type], NORMS[model_type]
    above = [f"{family.layers}.{n}." for n in range(layer, LAYERS)] + [f"{family.final_norm}."]
    parts = []
    if site == "attn":
        parts = [family.ffn, family.ffn_write, ln_mid if ln_mid != ln_in else None]
    elif site == "ffn" and family.is_parallel(model.config):
        parts = [family.attention, ln_in if ln_mid != ln_in else None]
    return tuple(above + [f"{family.layers}.{layer - 1}.{part}." for part in parts if part])


def check_reach(tmp_path, model_type, site="layer", layer=2, steps=1, **changed):
    model = tiny_model(model_type, layers=LAYERS, **changed)
    before, gradients = weights(model), {}
    length = {"max_steps": steps, "ipa_steps": steps, "entropy_sequences": 0, "max_completion_length": 4}
    trainer = aligning(tmp_path, model, layer=layer, site=site, weight_decay=0.1, **length, **EXPERTS)
    trainer.add_callback(_Gradients(model, gradients))
    trainer.train()
    after, unreached = weights(model), outside(model_type, layer, site, model)
    for name, gradient in gradients.items():
        if name.startswith(unreached):
            assert gradient is None, name
        elif not name.endswith("k_proj.bias"):
            # A key's bias shifts all scores of a query alike, so attention does not depend on it.
            assert gradient is not None, name
            assert gradient > 0, name
            assert not torch.equal(after[name], before[name]), name
    # Buffers are in it too, such as the counts that some routers keep.
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(unreached))
    assert any(name.startswith(unreached) for name in after)


@pytest.mark.parametrize("model_type", PARTS)
def test_updates_of_the_first_phase_reach_embedding_layers_up_to_l_and_the_unembedding(tmp_path, model_type):
    check_reach(tmp_path, model_type)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["layer", "attn", "ffn"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TABLE)
def test_every_family_is_trained_where_eqs_14_and_15_say(tmp_path, model_type, tied, site):
    check_reach(tmp_path, model_type, site, steps=3, tied=tied)


@pytest.mark.parametrize(
    ("model_type", "site"), [("gptj", "ffn"), *(pytest.param(f, "attn", marks=pytest.mark.slow) for f in TABLE)]
)
def test_gradient_checkpointing_changes_no_gradient(tmp_path, model_type, site):
    found = []
    for checkpointing in (False, True):
        model, gradients = tiny_model(model_type, layers=LAYERS), {}
        trainer = aligning(
            tmp_path, model, site=site, gradient_checkpointing=checkpointing, disable_dropout=True, **EXPERTS
        )
        trainer.add_callback(_Gradients(model, gradients))
        trainer.train()
        found.append(gradients)
    # The same operations in the same order, recomputed.
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        # The likeliest guess takes what the attention returns for what it writes, before the norm that follows.
        ("exaone4", "attention_write", "post_attention_layernorm"),
        ("granitemoe", "write_multiplier", "residual_multiplier"),
    ],
)
def test_a_row_found_by_structure_is_the_one_that_was_proved(tmp_path, model_type, field, value, caplog):
    own = {"residual_multiplier": 0.3} if model_type == "granitemoe" else {}
    model = tiny_model(model_type, layers=LAYERS, **own)
    found = proof.prove_family(model, None)
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


def test_a_model_that_no_structure_fits_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"write one row in internal_policy/models/families\.py") as refusal:
        aligning(tmp_path, tiny_model("bloom", layers=LAYERS))
    assert "\n" not in str(refusal.value)


def test_proving_leaves_the_modes_of_modules(tmp_path):
    model = tiny_model("gpt2", layers=LAYERS).train()
    model.transformer.h[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    proof.prove_family(model, None)
    proof.check_experts(BuPOConfig(output_dir=str(tmp_path)), model.config)
    assert proof.shift_matters(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_logits_that_trl_does_not_know_are_refused(tmp_path):
    model = tiny_model("llama", layers=LAYERS)
    # Beyond the weight itself: TRL multiplies by it and never calls the module.
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(UserError, match="TRL's log-probabilities are not those of this model's logits") as refusal:
        make_trainer(tmp_path, model, method="grpo")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_other_logits(tmp_path, dtype):
    for model_type in ("gemma2", "gpt2"):
        trainer = aligning(tmp_path, tiny_model(model_type, layers=LAYERS).to(dtype), **EXPERTS)
        assert trainer._counts_positions or model_type != "gpt2"


def test_dropout_is_told_of(tmp_path, caplog):
    aligning(tmp_path, tiny_model("gpt2", layers=LAYERS))
    assert "pass disable_dropout=True" in caplog.text
    caplog.clear()
    aligning(tmp_path, tiny_model("gpt2", layers=LAYERS), disable_dropout=True)
    aligning(tmp_path, tiny_model("qwen3", layers=LAYERS))
    assert "dropout" not in caplog.text


def test_frozen_layers_of_gpt2_include_its_positions(tmp_path):
    model = tiny_model("gpt2", layers=LAYERS)
    make_trainer(tmp_path, model, method="grpo", freeze_layers=1)
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.rsplit(".", 1)[0] for n in still if ".h." not in n} == {"transformer.wte", "transformer.wpe"}
    assert {n.split(".")[2] for n in still if ".h." in n} == {"0"}


def mean_of(parts):
    return torch.cat(parts).mean().item()


@pytest.mark.parametrize(
    ("model_type", "site", "lens"),
    [
        ("granite", "attn", "policy"),
        ("gemma2", "ffn", "logit-lens"),
        ("cohere2", "layer", "policy"),
        ("phi", "ffn", "policy"),
        ("gpt2", "layer", "logit-lens"),
        ("mixtral", "ffn", "policy"),
    ],
)
def test_dynamics_are_those_of_each_sequence_alone_in_float64(model_type, site, lens):
    model, records, tokenizer = tiny_model(model_type, layers=LAYERS), ragged_responses(5), tiny_tokenizer()
    exact, responses = in_float64(model), read_responses(records, tokenizer, "plain")
    found = {name: [] for name in ("change", "entropy", "policy_entropy", "log_perplexity", "policy_kl", "kl_mean")}
    for record in records:
        ids, start = torch.tensor(record["input_ids"]), record["prompt_length"]

        def policy(layer, site, ids=ids, start=start):
            logits = alone(exact, ids, layer, site, lens)
            return [torch.distributions.Categorical(logits=z[start - 1 : -1]) for z in logits]

        pi, theta = policy(2, site)
        found["change"].append(policy(2, "layer")[0].entropy() - policy(1, "layer")[0].entropy())
        found["entropy"].append(pi.entropy())
        found["policy_entropy"].append(theta.entropy())
        found["log_perplexity"].append(-theta.log_prob(ids[start:]))
        found["policy_kl"].append(torch.distributions.kl_divergence(pi, theta))
        later = [torch.distributions.kl_divergence(pi, policy(m, "layer")[0]) for m in range(3, LAYERS + 1)]
        found["kl_mean"].append(torch.stack(later).mean(0))
    measured = Dynamics(models.wrap(model, tokenizer), responses, 2, site=site, lens=lens, side="left").measure()
    for name, parts in found.items():
        assert getattr(measured, name) == pytest.approx(mean_of(parts), rel=0, abs=FLOAT32_NATS), name


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_adapters_on_all_linear_modules_are_trained_up_to_l(tmp_path, model_type):
    """GPT-2's linear modules are Conv1D; Mixtral's experts are tensors of three dimensions."""
    trainer = BuPOTrainer(
        model=tiny_model(model_type, layers=LAYERS),
        reward_funcs=[reward],
        args=BuPOConfig(
            **options(output_dir=str(tmp_path), method="bupo", layer=2, ipa_steps=1, disable_dropout=True),
            **EXPERTS,
        ),
        train_dataset=dataset(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    layers = TABLE[model_type].layers
    moved = {n.split(f"{layers}.")[1].split(".lora_")[0] for n in after if not torch.equal(after[n], before[n])}
    assert {name.split(".")[0] for name in moved} == {"0", "1"}
    wanted = "attn.c_attn" if model_type == "gpt2" else "mlp.experts"
    assert {f"{n}.{wanted}" for n in (0, 1)} <= moved
    ids, mask, keep = left_padded()
    trainer.model.eval()
    log_p = []
    for merged in (False, True):
        if merged:
            trainer.model.merge_adapter()
        with trainer._policy(True), torch.no_grad():
            log_p.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, keep)[0])
    torch.testing.assert_close(*log_p, atol=FLOAT32, rtol=0)


SMALL = {
    **{"ipa_steps": 1, "max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "mini_batches": 1},
    **{"max_completion_length": 6, "eval_samples": 0, "learning_rate": 1e-3, "template": "plain"},
    **{"reward": high_words, "prompts": PROMPTS},
}


def test_a_run_on_a_mixture_of_experts_found_by_structure(tmp_path, monkeypatch):
    """Experts, a factor on the writes, and a row that is proved once and used by everything after that."""
    proofs = []
    prove = proof.prove

    def counting(model):
        proofs.append(model.name)
        return prove(model)

    monkeypatch.setattr(proof, "prove", counting)
    model = tiny_model("granitemoe", residual_multiplier=0.3)
    run = bupo.train(
        model, tokenizer=tiny_tokenizer(), layer=2, site="attn", dynamics_every=1, output=tmp_path / "run", **SMALL
    )
    assert len(proofs) == 1
    assert list(run.history["phase"]) == [ALIGNMENT, "grpo"]
    live = models.wrap(model, tiny_tokenizer(), family=proof.prove_family(model, None))
    rows = pd.read_json(tmp_path / "run" / "dynamics_responses.jsonl", lines=True)
    responses = read_responses(rows[["input_ids", "prompt_length"]].to_dict("records"), tiny_tokenizer(), "plain")
    again = Dynamics(live, responses, 2, site="attn").measure()
    assert run.dynamics["entropy"].iloc[-1] == pytest.approx(again.entropy, abs=FLOAT32_NATS)


def test_what_a_mixture_of_experts_cannot_do_is_refused_before_anything_is_written(tmp_path):
    model, words = tiny_model("mixtral"), {**SMALL, "tokenizer": tiny_tokenizer(), "layer": 2}
    told = refused(tmp_path / "loss", model=model, router_aux_loss_coef=0.001, **words)
    assert "in the first phase the loss would balance the experts of layers 1..l only; set it to 0" in told
    model.config.output_router_logits = True
    assert "set it to false in config.json" in refused(tmp_path / "logits", model=model, **words)


def test_the_trainer_by_itself_has_no_load_balancing_loss_to_choose(tmp_path):
    # TRL takes the coefficient from the model's own configuration where none is given.
    with pytest.raises(UserError, match=r"layers 1\.\.l only; pass router_aux_loss_coef=0"):
        aligning(tmp_path, tiny_model("mixtral", layers=LAYERS))
    assert make_trainer(tmp_path, tiny_model("mixtral", layers=LAYERS), method="grpo").aux_loss_enabled


def test_a_guess_that_no_process_can_prove_is_refused():
    model = tiny_model("starcoder2")
    next(model.parameters()).ds_id = 0
    with pytest.raises(UserError, match="cannot be proved where DeepSpeed spreads the weights"):
        proof.proved(models.wrap(model, tiny_tokenizer()))
    known = tiny_model("llama")
    next(known.parameters()).ds_id = 0
    described = models.wrap(known, tiny_tokenizer())
    assert proof.proved(described) is described


def test_sequences_on_either_side_of_longropes_switch_are_refused(tmp_path):
    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
        **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 5.0]},
    }
    model = tiny_model("phi3", rope_parameters=rope, pad_token_id=0, original_max_position_embeddings=16)
    words = {**SMALL, "tokenizer": tiny_tokenizer(), "layer": 2}
    told = refused(tmp_path / "long", model=model, **{**words, "max_completion_length": 15})
    assert "beyond 16 tokens LongRoPE computes every sequence of a batch with other positions" in told
    assert len(bupo.train(model, output=tmp_path / "short", dynamics_every=0, **words).history) == 2
