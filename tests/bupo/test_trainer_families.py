"""Training on every family: pi^l in float64 and the weights that an update reaches."""

from __future__ import annotations

import copy
from itertools import cycle, product

import pytest
import torch
from exact_policies import EXPERTS, FLOAT32, FLOAT32_NATS, alone, check_policies, in_float64
from extractors.test_families import NORMS
from peft import LoraConfig
from tiny import FAMILIES as FIRST
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from trainers import LAYERS, _Gradients, dataset, left_padded, make_bupo_trainer, make_trainer, options, reward, weights
from trl import GRPOTrainer

from internal_policy import models
from internal_policy.bupo.dynamics import Dynamics
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.trainer_config import BuPOConfig
from internal_policy.data.responses import read_responses
from internal_policy.models.families import FAMILIES as TABLE

CELLS = list(product(("layer", "attn", "ffn"), ("policy", "logit-lens")))
# Every new family once, cycling through the six cells; Granite's factor on its writes affects module policies only.
SOME = [(f, *cell) for f, cell in zip([f for f in TABLE if f not in FIRST], cycle(CELLS), strict=False)]
SOME += [("granite", "attn", "policy"), ("granite", "ffn", "policy"), ("gpt2", "layer", "policy")]
FIVE = ("mixtral", "phi", "gemma2", "gpt2", "granite")
"""They differ by experts, a parallel block, norms after the modules, learned positions, and a multiplier."""


def five_fast(cases):
    """The cases of five families; those of the others are slow."""
    families = [case if isinstance(case, str) else case[0] for case in cases]
    return [
        case if family in FIVE else pytest.param(*([case] if isinstance(case, str) else case), marks=pytest.mark.slow)
        for family, case in zip(families, cases, strict=True)
    ]


@pytest.mark.parametrize(("model_type", "site", "lens"), five_fast(SOME))
def test_both_policies_match_unbatched_sequences_in_float64(tmp_path, model_type, site, lens):
    trainer = check_policies(tmp_path, tiny_model(model_type, layers=LAYERS), site, lens)
    assert trainer._positions_from_mask == (model_type == "gpt2")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TABLE)
def test_every_site_and_lens_matches_unbatched_sequences_in_float64(tmp_path, model_type, tied):
    # A tied unembedding is the same for each site, and the lens decides what it reads.
    for site, lens in CELLS[:2] if tied else CELLS:
        check_policies(tmp_path, tiny_model(model_type, layers=LAYERS, tied=tied), site, lens)


def test_plain_trl_counts_padding_in_learned_positions(tmp_path):
    """Documents why positions are counted: once this fails, `positions_from_mask` can be removed."""
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
    trainer = make_bupo_trainer(tmp_path, model, layer=layer, site=site, weight_decay=0.1, **length, **EXPERTS)
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
    # Includes buffers, such as the counts of some routers.
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith(unreached))
    assert any(name.startswith(unreached) for name in after)


@pytest.mark.parametrize("model_type", five_fast([*FIVE, "deepseek_v3", "gpt_oss", "gptj"]))
def test_updates_of_the_first_phase_reach_embedding_layers_up_to_l_and_the_unembedding(tmp_path, model_type):
    check_reach(tmp_path, model_type)


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "site"), [(False, "layer"), (False, "attn"), (False, "ffn"), (True, "layer")])
@pytest.mark.parametrize("model_type", TABLE)
def test_every_family_updates_the_weights_of_eqs_14_and_15(tmp_path, model_type, tied, site):
    check_reach(tmp_path, model_type, site, steps=3, tied=tied)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "site"), [("gptj", "ffn"), *((family, "attn") for family in TABLE)])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, model_type, site):
    found = []
    for checkpointing in (False, True):
        model, gradients = tiny_model(model_type, layers=LAYERS), {}
        trainer = make_bupo_trainer(
            tmp_path, model, site=site, gradient_checkpointing=checkpointing, disable_dropout=True, **EXPERTS
        )
        trainer.add_callback(_Gradients(model, gradients))
        trainer.train()
        found.append(gradients)
    # The same operations in the same order, recomputed.
    assert found[0] == found[1]


def test_frozen_layers_of_gpt2_include_the_position_embedding(tmp_path):
    model = tiny_model("gpt2", layers=LAYERS)
    make_trainer(tmp_path, model, method="grpo", freeze_layers=1)
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert {n.rsplit(".", 1)[0] for n in still if ".h." not in n} == {"transformer.wte", "transformer.wpe"}
    assert {n.split(".")[2] for n in still if ".h." in n} == {"0"}


def mean_of(parts):
    return torch.cat(parts).mean().item()


@pytest.mark.parametrize(
    ("model_type", "site", "lens"),
    five_fast(
        [
            ("granite", "attn", "policy"),
            ("gemma2", "ffn", "logit-lens"),
            ("cohere2", "layer", "policy"),
            ("phi", "ffn", "policy"),
            ("gpt2", "layer", "logit-lens"),
            ("mixtral", "ffn", "policy"),
        ]
    ),
)
def test_dynamics_match_unbatched_sequences_in_float64(model_type, site, lens):
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


@pytest.mark.parametrize("model_type", ["gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_all_linear_adapters_are_trained_up_to_layer_l(tmp_path, model_type):
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
