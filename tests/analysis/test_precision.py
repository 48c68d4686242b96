"""Other precisions: results still match the definitions."""

from __future__ import annotations

import copy

import pytest
import torch
from capture_checks import captured, check_quantities, states_of, wrapped
from tiny import ragged_responses, tiny_model

from internal_policy import UserError
from internal_policy.extractors import HookExtractor, verify
from internal_policy.models.families import FAMILIES as TABLE

HALVES = [torch.bfloat16, torch.float16]


QUICK = ("llama", "gemma2", "granite", "cohere")
REST = [pytest.param(name, marks=pytest.mark.slow) for name in TABLE if name not in QUICK]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model_type", [*QUICK, *REST])
def test_numbers_of_16_bit_states_are_exact_to_float32(model_type, dtype):
    model = wrapped(tiny_model(model_type).to(dtype))
    assert model.dtype == dtype
    verify(HookExtractor(model))
    records = ragged_responses(3)
    assert {t.dtype for s in states_of(model, records[0]) for t in (s.residual_out, s.ffn_write)} == {dtype}
    check_quantities(model, records)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_lens_normalises_16_bit_states_like_the_model(dtype):
    check_quantities(wrapped(tiny_model("qwen3").to(dtype)), ragged_responses(3), "logit-lens")


@pytest.mark.parametrize("dtype", HALVES)
def test_states_match_the_models_forward_pass(dtype):
    model = wrapped(tiny_model("qwen3").to(dtype))
    record = ragged_responses(1)[0]
    with torch.no_grad():
        out = model.model(torch.tensor([record["input_ids"]]), output_hidden_states=True, use_cache=False)
    at = slice(record["prompt_length"] - 1, -1)
    for states, hidden in zip(states_of(model, record), out.hidden_states, strict=False):
        assert torch.equal(states.residual_in, hidden[0, at])


def test_a_stream_that_overflows_float16_is_refused_but_fits_bfloat16():
    model = tiny_model("llama", mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            # Two of them fit below the 65504 of float16, three do not.
            layer.mlp.down_proj.bias[5] = 3e4
    captured(copy.deepcopy(model).bfloat16(), ragged_responses(1))
    with pytest.raises(UserError, match=r"layer 3 .*overflow in this dtype"):
        verify(HookExtractor(wrapped(model.half())))
