"""Effects of interventions in every family against whole reruns in float64 with hooks written here by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ragged_responses, slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.data.responses import read_responses
from internal_policy.interventions.changes import Change, Intervention, changed_writes, read_writes
from internal_policy.interventions.effects import aligned, choose_donors, measure_effects, sum_writes
from internal_policy.interventions.replay import CleanRun, prove_restarts
from internal_policy.models.families import FAMILIES as TABLE

# float32 states through three layers against float64: numbers of some nats are off by at most 9e-7 in all families.
# Were an intervention left out or made elsewhere, they would be off by more than 1e-4.
FLOAT32_NATS = 1e-5
# Where layers are and what adds to the stream; written down from the modelling code, not from the table.
GPT_LAYERS = {"gpt2": "transformer.h", "gptj": "transformer.h", "gpt_neox": "gpt_neox.layers"}
GPT_ATTENTION = {"gpt2": "attn", "gptj": "attn", "gpt_neox": "attention"}
POST_NORMS = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "olmo2", "olmo3"), ("post_attention_layernorm", "post_feedforward_layernorm")
    ),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


def layers_of(model, model_type):
    return model.get_submodule(GPT_LAYERS.get(model_type, "model.layers"))


def writer_of(model, model_type, layer, site):
    block = layers_of(model, model_type)[layer - 1]
    if site == "layer":
        return block
    if model_type in POST_NORMS:
        return block.get_submodule(POST_NORMS[model_type][site == "ffn"])
    return block.get_submodule(GPT_ATTENTION.get(model_type, "self_attn") if site == "attn" else "mlp")


def in_float64(model):
    exact = copy.deepcopy(model).double().eval()
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts does not support float64.
        exact.set_experts_implementation("eager")
    return exact


def states(value):
    return value if isinstance(value, torch.Tensor) else value[0]


class Hand:
    """Whole reruns of single unpadded sequences in float64."""

    def __init__(self, model, model_type, responses):
        self.exact, self.model_type, self.responses = in_float64(model), model_type, responses

    @torch.no_grad()
    def log_probs(self, response, hook=None, layer=1, site="layer"):
        """[n, V] at the positions that predict response tokens."""
        handle = None
        if hook is not None:
            handle = writer_of(self.exact, self.model_type, layer, site).register_forward_hook(hook, with_kwargs=True)
        try:
            logits = self.exact(torch.tensor([response.input_ids]), use_cache=False).logits[0]
        finally:
            if handle is not None:
                handle.remove()
        return torch.log_softmax(logits, dim=-1)[response.prompt_length - 1 : -1]

    def write(self, site, args, kwargs, output):
        out = states(output)
        if site != "layer":
            return out
        return out - (args[0] if args else kwargs["hidden_states"])

    def mean(self, layer, site):
        found = []
        for r in self.responses:
            seen = []

            def keep(m, args, kwargs, output, seen=seen):
                seen.append(self.write(site, args, kwargs, output).reshape(-1, states(output).shape[-1]))

            self.log_probs(r, keep, layer, site)
            found.append(seen[0][r.prompt_length - 1 : len(r.input_ids) - 1])
        return torch.cat(found).mean(dim=0)

    def effects(self, layer, site, how, alpha=1.0):
        """[R, 4]: KL, change of entropy, change of log-probability, flips."""
        mean = self.mean(layer, site) if how == "mean" else None

        def change(m, args, kwargs, output):
            write, out = self.write(site, args, kwargs, output), states(output)
            new = {"zero": 0 * write, "scale": alpha * write, "mean": mean}[how]
            changed = out - write + new
            return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

        rows = []
        for r in self.responses:
            p, q = self.log_probs(r), self.log_probs(r, change, layer, site)
            tokens = torch.tensor(r.input_ids[r.prompt_length :])[:, None]
            rows.append(
                [
                    (p.exp() * (p - q)).sum(-1).mean(),
                    ((p.exp() * p).sum(-1) - (q.exp() * q).sum(-1)).mean(),
                    (q.gather(1, tokens) - p.gather(1, tokens)).mean(),
                    (p.argmax(-1) != q.argmax(-1)).double().mean(),
                ]
            )
        return np.array(rows, dtype=float)


def wrapped(model):
    return models.wrap(model, tiny_tokenizer())


def responses_for(model, n=4):
    return read_responses(ragged_responses(n), model.tokenizer, "plain")


def single(*changes):
    return [Intervention((change,)) for change in changes]


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_zero_mean_and_scale_equal_whole_reruns(model_type):
    model = wrapped(tiny_model(model_type, tied=model_type == "gpt2"))
    responses = responses_for(model)
    prove_restarts(model)
    changes = [
        Change(layer, site, how, 0.4)
        for layer, site, how in (
            *((2, site, how) for site in ("attn", "ffn", "layer") for how in ("zero", "mean", "scale")),
            *((1, "attn", "zero"), (3, "ffn", "scale"), (3, "layer", "mean")),
        )
    ]
    points = {(change.layer, change.point) for change in changes if change.how == "mean"}
    n_tokens = sum(r.n_tokens for r in responses)
    means = {("mean", *point): total / n_tokens for point, total in sum_writes(model, points, responses).items()}
    found = measure_effects(model, single(*changes), responses, means, [])
    hand = Hand(model.model, model_type, responses)
    for place, change in enumerate(changes):
        wanted = hand.effects(change.layer, change.site, change.how, change.alpha)
        np.testing.assert_allclose(found.changed[:, place], wanted, rtol=0, atol=FLOAT32_NATS, err_msg=str(change))
        # The change is one that shows.
        assert wanted[:, 0].max() > 10 * FLOAT32_NATS


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_scaling_by_one_changes_nothing_bit_for_bit(model_type):
    model = wrapped(tiny_model(model_type, tied=model_type == "gpt2"))
    ids = torch.randint(2, 61, (2, 9))
    run = CleanRun(model, ids, torch.ones_like(ids), {1, 2, 3})
    changes = [Change(layer, site, "scale", 1.0) for layer in (1, 2, 3) for site in ("attn", "ffn", "layer")]
    changes.append(Change(2, "attn", "scale", 1.0, head=3))
    if model_type in MIXTURES:
        changes.append(Change(2, "ffn", "scale", 1.0, expert=2))
    with torch.no_grad():
        for change in changes:
            with changed_writes(model, [change]):
                assert torch.equal(run.restart(change.layer), run.final), change
    found = measure_effects(model, single(*changes), responses_for(model), {}, [])
    assert not found.changed.any()


def test_layers_below_an_intervention_run_once():
    model = wrapped(tiny_model("qwen3", layers=5))
    changes = [Change(layer, site, "zero") for layer in (2, 4, 5) for site in ("attn", "ffn", "layer")]
    calls = []
    handles = [
        block.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
        for layer, block in enumerate(model.layers, start=1)
    ]
    measure_effects(model, single(*changes), responses_for(model), {}, [])
    for handle in handles:
        handle.remove()
    assert len(calls) == 5 + sum(5 - change.layer + 1 for change in changes)
    assert calls.count(1) == 1


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2", "gpt_neox"])
def test_ablating_everything_above_a_layer_is_its_logit_lens(model_type):
    model = wrapped(tiny_model(model_type, layers=4))
    ids = torch.randint(2, 61, (2, 9))
    for layer in (1, 2, 3):
        run = CleanRun(model, ids, torch.ones_like(ids), {layer + 1})
        whole = [Change(above, "layer", "zero") for above in range(layer + 1, 5)]
        parts = [Change(above, site, "zero") for above in range(layer + 1, 5) for site in ("attn", "ffn")]
        for changes in (whole, parts):
            with torch.no_grad(), changed_writes(model, changes):
                assert torch.equal(run.restart(layer + 1), run.inputs[layer + 1])


def test_zeroing_a_head_equals_zeroing_its_slice_by_hand():
    model = models.load("testbed/qwen3", dtype="float32", device="cpu")
    exact = models.wrap(copy.deepcopy(model.model).double(), model.tokenizer)
    records = ragged_responses(3, vocab=exact.vocab_size)
    responses = read_responses(records, exact.tokenizer, "plain")
    found = measure_effects(exact, single(Change(3, "attn", "zero", head=2)), responses, {}, [])
    silent = copy.deepcopy(exact.model)
    projection = silent.model.layers[2].self_attn.o_proj
    width = projection.weight.shape[1] // silent.config.num_attention_heads
    with torch.no_grad():
        projection.weight[:, width : 2 * width] = 0
        for row, r in enumerate(responses):
            p, q = (
                torch.log_softmax(m(torch.tensor([r.input_ids])).logits[0], -1)[r.prompt_length - 1 : -1]
                for m in (exact.model, silent)
            )
            # float64, in which transformers computes norms in float32: the same in both.
            assert found.changed[row, 0, 0] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-12)
    assert found.changed[:, 0, 0].min() > 1e-6


@pytest.mark.parametrize("model_type", slow_unless_fast(MIXTURES))
def test_zeroing_an_expert_equals_one_that_writes_nothing(model_type):
    model = wrapped(tiny_model(model_type))
    silent = wrapped(copy.deepcopy(model.model))
    experts = silent.layers[1].mlp.experts
    with torch.no_grad():
        for name, parameter in experts.named_parameters():
            if "down" in name:
                parameter[2] = 0
    ids = torch.randint(2, 61, (2, 12))
    run = CleanRun(model, ids, torch.ones_like(ids), {2})
    with torch.no_grad():
        wanted = CleanRun(silent, ids, torch.ones_like(ids), ()).final
        with changed_writes(model, [Change(2, "ffn", "zero", expert=3)]):
            found = run.restart(2)
    # The products of float32 are summed in another order if a weight is 0.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, run.final, atol=1e-4)


def test_resampling_puts_in_the_aligned_write_of_another_response():
    model = wrapped(tiny_model("llama"))
    first, second = responses_for(model, 2)
    change = Change(2, "ffn", "resample")
    found = measure_effects(model, single(change), [first, second], {}, [second, first])
    exact = in_float64(model.model)
    block = exact.model.layers[1].mlp
    for row, (own, donor) in enumerate(((first, second), (second, first))):
        kept = []
        handle = block.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out[0]))
        with torch.no_grad():
            exact(torch.tensor([donor.input_ids]))
            handle.remove()
            before = donor.prompt_length - 1
            places = []
            for t in range(len(own.input_ids)):
                offset = t - (own.prompt_length - 1)
                places.append(
                    before + offset % donor.n_tokens
                    if offset >= 0
                    else max(0, before - 1 - (-offset - 1) % max(before, 1))
                )
            p = torch.log_softmax(exact(torch.tensor([own.input_ids])).logits[0], -1)
            handle = block.register_forward_hook(lambda m, a, out, k=kept, at=places: k[0][at][None])
            q = torch.log_softmax(exact(torch.tensor([own.input_ids])).logits[0], -1)
            handle.remove()
        kl = (p.exp() * (p - q)).sum(-1)[own.prompt_length - 1 : -1].mean()
        assert found.changed[row, 0, 0] == pytest.approx(float(kl), abs=FLOAT32_NATS)


def test_alignment_keeps_prompt_and_response_apart():
    (response, donor) = (
        read_responses([{"input_ids": list(range(2, 2 + t)), "prompt_length": p}], tiny_tokenizer(), "plain")[0]
        for t, p in ((9, 5), (6, 3))
    )
    # Positions 4..8 predict 5..9 of the response; the donor's that predict are 2, 3, 4.
    assert aligned(response, donor, 9).tolist() == [0, 1, 0, 1, 2, 3, 4, 2, 3]


def test_donors_have_another_prompt():
    model = wrapped(tiny_model("llama"))
    responses = responses_for(model, 5)
    prompts = [0, 0, 1, 1, 2]
    chosen = choose_donors(responses, prompts, seed=3)
    assert all(prompts[i] != prompts[donor] for i, donor in enumerate(chosen))
    assert chosen == choose_donors(responses, prompts, seed=3)
    assert any(choose_donors(responses, prompts, seed=s) != chosen for s in range(4))
    with pytest.raises(UserError, match="needs responses to at least two prompts"):
        choose_donors(responses, [0] * 5, seed=0)


def test_batches_and_padding_do_not_change_the_effects():
    model = wrapped(tiny_model("gpt_neox"))
    responses = responses_for(model, 4)
    interventions = single(Change(2, "attn", "zero"), Change(1, "layer", "resample"))
    donors = [responses[i] for i in (1, 2, 3, 0)]
    together = measure_effects(model, interventions, responses, {}, donors)
    alone = [measure_effects(model, interventions, [r], {}, [d]) for r, d in zip(responses, donors, strict=True)]
    np.testing.assert_allclose(together.changed, np.concatenate([a.changed for a in alone]), rtol=0, atol=FLOAT32_NATS)


def test_hooks_are_gone_on_any_exit():
    model = wrapped(tiny_model("llama"))

    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs)
            for m in model.model.modules()
        )

    changes = [Change(2, "layer", "zero"), Change(1, "attn", "zero", head=1), Change(3, "ffn", "scale", 2.0)]
    for changing in (True, False):
        context = (
            changed_writes(model, changes)
            if changing
            else read_writes(model, [(1, "heads"), (2, "layer"), (3, "ffn")], lambda *_: None)
        )
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert hooks() == 0
        with (
            changed_writes(model, changes)
            if changing
            else read_writes(model, [(1, "heads"), (2, "layer"), (3, "ffn")], lambda *_: None)
        ):
            assert hooks() > 0
        assert hooks() == 0
    broken = replace(model, family=replace(model.family, layers="model.layers"))
    model.layers[1].register_forward_pre_hook(lambda m, args: 1 / 0)
    before = hooks()
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ZeroDivisionError):
        CleanRun(broken, ids, ids, {1})
    assert hooks() == before


def test_a_layer_that_depends_on_more_than_the_stream_is_refused():
    model = wrapped(tiny_model("llama"))
    seen = []
    model.layers[1].register_forward_hook(lambda m, args, out: seen.append(1) or out * len(seen))
    with pytest.raises(UserError, match="layer 2 gives other states when it runs again"):
        prove_restarts(model)


def test_a_state_that_overflows_is_reported():
    model = wrapped(tiny_model("llama"))
    with pytest.raises(UserError, match="NaN or inf in the policy after --how scale at layer 2"):
        measure_effects(model, single(Change(2, "ffn", "scale", 1e300)), responses_for(model), {}, [])
