"""Every row of the family table against the float64 definitions, without hooks on the modules that it names."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from capture_checks import FLOAT32_NATS, captured
from tiny import FAMILIES, ragged_responses, site_quantities, slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import UserError, analyze, models
from internal_policy.data.responses import read_responses
from internal_policy.entropy import reference
from internal_policy.extractors import (
    QUANTITIES,
    HookExtractor,
    Reducer,
    prove,
    reduce_responses,
    residual_hooks,
    verify,
)
from internal_policy.models.families import FAMILIES as TABLE
from internal_policy.models.families import guess_families

LLAMA = ("input_layernorm", "post_attention_layernorm", "mid")
GEMMA = ("input_layernorm", "pre_feedforward_layernorm", "mid")
NO_NORM = (None, None, "mid")
# LN_in, the norm before the FFN, and what that norm is of; written down from the modelling code, not from the table.
NORMS = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), LLAMA),
    **dict.fromkeys(("phi3", "gemma", "olmo", "glm", "glm4", "granite", "smollm3", "deepseek_v3", "gpt_oss"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    **dict.fromkeys(("olmo2", "olmo3"), NO_NORM),
    **dict.fromkeys(("phi", "cohere", "cohere2"), ("input_layernorm", "input_layernorm", "in")),
    "gpt2": ("ln_1", "ln_2", "mid"),
    "gptj": ("ln_1", "ln_1", "in"),
    "gpt_neox": ("input_layernorm", "post_attention_layernorm", "in"),
}


def layers_of(model):
    return next(m for n, m in model.named_modules() if n.split(".")[-1] in ("layers", "h") and "." in n)


def residual_stream(model, ids):
    """H^0..H^L of one sequence, [L + 1, T, d]; the last one from what the final norm receives."""
    base = getattr(model, model.base_model_prefix)
    norm = [m for n, m in base.named_children() if "norm" in n or n == "ln_f"][-1]
    last = []
    handle = norm.register_forward_pre_hook(lambda m, args: last.append(args[0][0]))
    hidden = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    return torch.stack([*(h[0] for h in hidden[:-1]), last[0]])


def without_ffn(model, layer):
    """A copy whose FFN in one layer writes nothing: after that layer its stream is H^{l-1} + A^l."""
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in layers_of(silent)[layer].mlp.parameters():
            parameter.zero_()
    return silent


@torch.no_grad()
def oracle(model, model_type, record):
    """Values of one sequence in float64: writes from the stream of models with an FFN taken out."""
    model = copy.deepcopy(model).double()
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts does not support float64.
        model.set_experts_implementation("eager")
    ids = torch.tensor([record["input_ids"]])
    at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
    stream = residual_stream(model, ids)
    logits = model(ids, use_cache=False).logits[0, at]
    head = model.get_output_embeddings()
    config = model.config
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def entropy(states):
        z = (states[at] @ head.weight.T + (0 if head.bias is None else head.bias)) * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        return reference.policy_entropy(z, torch.eye(z.shape[-1], dtype=z.dtype)).numpy()

    def cosine(a, b):
        return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))[at].numpy()

    ln_in, ln_mid, of = NORMS[model_type]
    rows = []
    for i, layer in enumerate(layers_of(model)):
        before, after = stream[i], stream[i + 1]
        mid = residual_stream(without_ffn(model, i), ids)[i + 1]
        base = mid if of == "mid" else before
        attn_in = before if ln_in is None else getattr(layer, ln_in)(before)
        ffn_in = base if ln_mid is None else getattr(layer, ln_mid)(base)
        rows.append(
            {
                **site_quantities("layer", before, after, entropy, at),
                **site_quantities("attn", attn_in, mid - before, entropy, at),
                "attn_cosine": cosine(mid - before, before),
                **site_quantities("ffn", ffn_in, after - mid, entropy, at),
                "ffn_cosine": cosine(after - mid, base),
            }
        )
    own = torch.distributions.Categorical(logits=logits).entropy().numpy()
    return rows, np.stack([entropy(stream[-1]), own], axis=-1)


def assert_is(values, rows, policy):
    for layer, row in enumerate(rows):
        for q, name in enumerate(QUANTITIES):
            np.testing.assert_allclose(values.layers[:, layer, q], row[name], rtol=0, atol=FLOAT32_NATS, err_msg=name)
    np.testing.assert_allclose(values.policy, policy, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize(
    ("model_type", "classes"),
    [
        ("llama", ("LlamaAttention", "LlamaAttention", "LlamaMLP", "LlamaMLP")),
        ("gemma2", ("Gemma2Attention", "Gemma2RMSNorm", "Gemma2MLP", "Gemma2RMSNorm")),
    ],
)
def test_a_write_is_the_module_output_unless_a_norm_follows(model_type, classes):
    model, family = tiny_model(model_type), TABLE[model_type]
    layer = model.get_submodule(family.layers)[0]
    assert tuple(type(layer.get_submodule(path)).__name__ for path in family.capture_paths()) == classes


def test_the_reference_covers_every_family():
    assert NORMS.keys() == TABLE.keys()


@pytest.mark.parametrize("model_type", slow_unless_fast(m for m in TABLE if m not in FAMILIES))
def test_parity_with_the_definitions_in_float64(model_type):
    model = tiny_model(model_type)
    records = ragged_responses(3)
    for record, values in zip(records, captured(model, records), strict=True):
        assert_is(values, *oracle(model, model_type, record))


def test_sequential_gpt_neox_has_an_intermediate_residual(monkeypatch):
    monkeypatch.setitem(NORMS, "gpt_neox", ("input_layernorm", "post_attention_layernorm", "mid"))
    model = tiny_model("gpt_neox", use_parallel_residual=False)
    (record,) = ragged_responses(1)
    assert_is(captured(model, [record])[0], *oracle(model, "gpt_neox", record))


def beside_a_large_stream(model_type, dtype, *, times, tied=False):
    """A model with scaled embeddings, so that the writes of its layers are small compared with the residual stream."""
    model = tiny_model(model_type, tied=tied)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(times)
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts does not support float64.
        model.set_experts_implementation("eager")
    return models.wrap(model.to(dtype), tiny_tokenizer())


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_every_family_passes_verification_in_every_dtype(model_type, tied):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for times in (1, 50):
            # Right writes leave less than the rounding bound, of which the root mean square over elements is a third.
            assert verify(HookExtractor(beside_a_large_stream(model_type, dtype, times=times, tied=tied))) < 0.4


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        ("gemma2", {"attention_write": None, "ffn_write": None}),
        ("gemma2", {"attention_write": None}),
        ("gemma3_text", {"ffn_write": None}),
        ("glm4", {"attention_write": None}),
        ("granite", {"write_multiplier": None}),
    ],
)
def test_a_small_wrong_write_is_refused_in_16_bits(model_type, wrong, dtype):
    right = beside_a_large_stream(model_type, dtype, times=300)
    verify(HookExtractor(right))
    ids = torch.arange(2, 26)[None]
    seen = []
    with torch.no_grad(), residual_hooks(right, torch.arange(24), seen.append):
        right.backbone(**right.forward_arguments(ids, torch.ones_like(ids)))
    for states in seen:
        for write in (states.attention_write, states.ffn_write):
            assert write.double().norm() < 0.05 * states.residual_in.double().norm()
    with pytest.raises(UserError, match=r"eq\. 4 fails in layer 1: .* times what rounding explains"):
        verify(HookExtractor(dataclasses.replace(right, family=dataclasses.replace(right.family, **wrong))))


@pytest.mark.parametrize(("times", "off"), [(1, 1.02), (20, 1.02), (300, 1.1)])
def test_a_slightly_wrong_factor_is_refused_in_bfloat16(times, off):
    described = beside_a_large_stream("granite", torch.bfloat16, times=times)
    # The layers store the factor with which they were built.
    described.config.residual_multiplier *= off
    with pytest.raises(UserError, match=r"eq\. 4 fails in layer"):
        verify(HookExtractor(described))


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_padding_side_does_not_change_results(model_type):
    model, records = tiny_model(model_type), ragged_responses(4)
    tokenizer = tiny_tokenizer()
    reducer = Reducer(HookExtractor(models.wrap(model, tokenizer)), "policy")
    responses = read_responses(records, tokenizer, "plain")
    alone = [reduce_responses(reducer, [r])[0] for r in responses]
    for side in ("left", "right"):
        for one, together in zip(alone, reduce_responses(reducer, responses, side), strict=True):
            np.testing.assert_allclose(together.layers, one.layers, rtol=0, atol=FLOAT32_NATS)


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_inference_by_structure_agrees_with_the_table(model_type, monkeypatch):
    """The written rows are the answers that the search for structure is tested on."""
    model = tiny_model(model_type)
    monkeypatch.delitem(TABLE, model_type)
    found = prove(models.wrap(model, tiny_tokenizer())).model
    monkeypatch.undo()
    written = models.wrap(model, tiny_tokenizer())
    assert found.family.guessed
    assert found.parallel == written.parallel
    assert found.write_multiplier == written.write_multiplier
    (record,) = ragged_responses(1)
    at = torch.arange(len(record["input_ids"]))
    seen = {}
    for key, described in (("found", found), ("written", written)):
        with torch.no_grad(), residual_hooks(described, at, lambda s, key=key: seen.setdefault(key, []).append(s)):
            ids = torch.tensor([record["input_ids"]])
            described.backbone(**described.forward_arguments(ids, torch.ones_like(ids)))
    for one, other in zip(seen["found"], seen["written"], strict=True):
        for name in ("residual_in", "attention_in", "attention_write", "ffn_in", "ffn_write", "residual_out"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.parametrize(
    "model_type",
    ["stablelm", *(pytest.param(m, marks=pytest.mark.slow) for m in ("starcoder2", "granitemoe", "exaone4"))],
)
def test_an_unlisted_family_is_used_with_a_notice(model_type, caplog):
    analysis = analyze(tiny_model(model_type), tiny_tokenizer(), responses=ragged_responses(3), keep_tokens=0)
    assert "not in the table; its parts were found by structure" in caplog.text
    assert analysis.model["family"] == model_type
    assert np.isfinite(analysis.layers["entropy_out"]).all()


@pytest.mark.parametrize(
    ("model_type", "why"),
    [("bloom", r"no structure that was tried fits \(eq\. 4 fails in layer 1"), ("bert", "has no parts of a decoder")],
)
def test_a_family_of_unknown_structure_is_refused_with_instructions(model_type, why):
    model = tiny_model(model_type, **({"is_decoder": True} if model_type == "bert" else {}))
    with pytest.raises(UserError, match=why) as refusal:
        analyze(model, tiny_tokenizer(), responses=ragged_responses(3))
    assert "write one row in internal_policy/models/families.py" in str(refusal.value)
    assert str(refusal.value).count("\n") == 0


def test_every_candidate_names_existing_modules():
    model = tiny_model("gemma2")
    for family in guess_families(model):
        models.wrap(model, tiny_tokenizer(), family=family)


def test_the_table_is_printed():
    done = subprocess.run(
        [sys.executable, "-m", "internal_policy.cli", "models"], capture_output=True, text=True, check=True
    )
    for model_type, family in TABLE.items():
        assert model_type in done.stdout
        assert family.name in done.stdout
