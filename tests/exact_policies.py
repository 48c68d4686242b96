"""Both policies of a trainer against unbatched float64 references written down from the modelling code."""

from __future__ import annotations

import copy
import operator

import torch
from trainers import left_padded, make_bupo_trainer

from internal_policy import models
from internal_policy.extractors import residual_hooks

# Float32 products of width 32 against float64: some 1e-6.
FLOAT32 = 1e-5
# A mean over tokens of sums over the vocabulary, from float32 states.
FLOAT32_NATS = 2e-5
TEMPERATURE = 0.7
EXPERTS = {"router_aux_loss_coef": 0.0}


def in_float64(model):
    exact = copy.deepcopy(model).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts does not support float64.
        exact.set_experts_implementation("eager")
    return exact


def logits_of(model, states):
    """Logits of states, written down from the modelling code and not from the table."""
    config, head = model.config, model.get_output_embeddings()
    z = states @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return z if cap is None else cap * torch.tanh(z / cap)


@torch.no_grad()
def alone(model, row, layer, site, lens, family=None):
    """Logits of pi^l and the model's own [T, V], of one unpadded row in float64; states are captured by hooks."""
    described = models.wrap(model, None, "tiny", family=family)
    seen = {}
    with residual_hooks(described, torch.arange(len(row)), lambda s: seen.setdefault(s.layer, s)):
        own = model(row[None], use_cache=False).logits[0]
    state = getattr(seen[layer], {"layer": "residual_out", "attn": "attention_write", "ffn": "ffn_write"}[site])
    if lens == "logit-lens":
        state = operator.attrgetter(described.family.final_norm)(model)(state)
    return logits_of(model, state), own


def assert_policies(trainer, untouched, layer, site, lens, family=None):
    """Assert that both policies on left-padded rows equal those of each unpadded row."""
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
    trainer = make_bupo_trainer(tmp_path, model, layer=3, temperature=TEMPERATURE, site=site, lens=lens, **EXPERTS)
    assert_policies(trainer, untouched, 3, site, lens, family)
    return trainer
