"""Checks of captured quantities against the float64 definitions on the same states and against the model's logits."""

from __future__ import annotations

import numpy as np
import torch
from tiny import tiny_tokenizer

from internal_policy import models
from internal_policy.data.responses import read_responses
from internal_policy.entropy import reference
from internal_policy.extractors import QUANTITIES, HookExtractor, Reducer, reduce_responses, residual_hooks

# float32 carries 24 bits: logits of size ~10 are off by ~1e-6, an entropy by about as much; 1e-5 leaves room for sums.
# bfloat16 carries 8: were anything summed in it, the entropies would be off by 1e-2.
FLOAT32_NATS = 1e-5


def wrapped(model):
    return models.wrap(model, tiny_tokenizer())


def captured(model, records, side="right", lens="policy"):
    model = model if isinstance(model, models.LanguageModel) else wrapped(model)
    return reduce_responses(
        Reducer(HookExtractor(model), lens), read_responses(records, model.tokenizer, "plain"), side
    )


def states_of(model, record):
    """States of each layer at the positions that predict the response tokens of one sequence."""
    ids = torch.tensor([record["input_ids"]])
    positions = torch.arange(record["prompt_length"] - 1, ids.shape[1] - 1)
    found = []
    with torch.no_grad(), residual_hooks(model, positions, found.append):
        model.backbone(**model.forward_arguments(ids, torch.ones_like(ids)))
    return found


def reference_quantities(model, states, lens, exact=None):
    """Every quantity of a layer in float64 from states in the model's dtype; [n, len(QUANTITIES)].

    ``exact`` is what a lens of the user's own does: (layer, states in float64) -> what E_u projects.
    """
    head = model.projection

    @torch.no_grad()
    def entropy(x, lens, layer=states.layer):
        if exact is not None and lens != "logit-lens":
            x = exact(layer, x.double())
        elif lens == "unit-norm":
            x = x / x.double().pow(2).mean(-1, keepdim=True).sqrt()
        x = head.final_norm(x) if lens == "logit-lens" else x
        bias = None if head.bias is None else head.bias.double()
        return reference.policy_entropy(x.double(), head.weight.double(), bias, scale=head.scale, softcap=head.softcap)

    def cosine(a, b):
        return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))

    before, attn = states.residual_in.double(), states.attention_write.double()
    sites = (
        (states.residual_in, states.residual_out, None),
        (states.attention_in, states.attention_write, before),
        (states.ffn_in, states.ffn_write, before if model.parallel else before + attn),
    )
    values = []
    for x_in, x_out, stream in sites:
        length_in, length_out = x_in.double().norm(dim=-1), x_out.double().norm(dim=-1)
        # In float64 the norm of the model rounds nothing that the rescaling left; a linear lens needs no norm.
        rescaled = x_out.double() * (length_in / length_out)[:, None]
        below = states.layer - (x_in is states.residual_in)
        values += [entropy(x_in, lens, below), entropy(x_out, lens)]
        values.append(entropy(rescaled if lens != "logit-lens" else rescaled.to(x_out.dtype), lens))
        values += [length / x_in.shape[-1] ** 0.5 for length in (length_in, length_out)]
        if stream is not None:
            values.append(cosine(x_out.double(), stream))
    return torch.stack(values, dim=-1).cpu().numpy(), entropy(states.residual_out, "logit-lens").cpu().numpy()


def check_quantities(model, records, lens="policy", exact=None):
    for record in records:
        (ours,) = captured(model, [record], lens=lens)
        for layer, states in enumerate(states_of(model, record)):
            values, policy = reference_quantities(model, states, lens, exact)
            for q, name in enumerate(QUANTITIES):
                # The norm of a 16-bit model rounds the rescaled state anew, where ours keeps the rounding of its own.
                rounded_twice = lens == "logit-lens" and name.endswith("rescaled") and model.dtype.itemsize == 2
                np.testing.assert_allclose(
                    ours.layers[:, layer, q],
                    values[:, q],
                    rtol=0,
                    atol=torch.finfo(model.dtype).eps if rounded_twice else FLOAT32_NATS,
                    err_msg=f"{name} {layer + 1}",
                )
        np.testing.assert_allclose(ours.policy[:, 1], policy, rtol=0, atol=FLOAT32_NATS)


def entropies_of_logits(model, record):
    """Entropy of the model's own logits for one sequence alone, without a mask or a position from this package."""
    with torch.no_grad():
        logits = model(torch.tensor([record["input_ids"]]), use_cache=False).logits[0]
    return torch.distributions.Categorical(logits=logits.double()).entropy()[record["prompt_length"] - 1 : -1].numpy()
