"""The writes of single heads and experts against float64 formulas, from models in which all others are silent."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from test_families import layers_of, residual_stream, without_ffn
from tiny import ragged_responses, slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.data.responses import read_responses
from internal_policy.entropy import reference
from internal_policy.extractors import HookExtractor, heads, residual_hooks, verify
from internal_policy.extractors.experts import find_experts
from internal_policy.extractors.heads import find_heads, head_hooks
from internal_policy.extractors.part_means import EXPERT_QUANTITIES, PartReducer
from internal_policy.extractors.parts import PART_QUANTITIES, norms_after
from internal_policy.models.families import FAMILIES as TABLE

# float32 carries 24 bits: logits of size ~10 are off by ~1e-6, an entropy by about as much; 1e-5 leaves room for sums.
FLOAT32_NATS = 1e-5
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")
# The attention's output projection and the norm after it; from the modelling code, not from the table.
PROJECTION = {"phi": "self_attn.dense", "gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "gptj": "attn.out_proj"}
POST_NORM = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), "post_attention_layernorm"),
    "glm4": "post_self_attn_layernorm",
}
PARALLEL = ("phi", "cohere", "cohere2", "gptj", "gpt_neox")


def wrapped(model):
    return models.wrap(model, tiny_tokenizer())


def in_float64(model):
    model = copy.deepcopy(model).double()
    if hasattr(model.config, "num_experts_per_tok"):
        # The grouped product of experts does not support float64.
        model.set_experts_implementation("eager")
    return model


def gain_and_centring(norm):
    """g of a norm, and whether it subtracts the mean, by its class."""
    name = type(norm).__name__
    weight = getattr(norm, "weight", None)
    gain = 1.0 if weight is None else weight
    return (1.0 + gain if name.startswith("Gemma") else gain), name.endswith("LayerNorm")


def norm_scale(norm, states):
    """s of g (x - mean x) / s + b."""
    _, centred = gain_and_centring(norm)
    eps = next((getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n)), 1e-5)
    if centred:
        states = states - states.mean(-1, keepdim=True)
    return (states.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def numerator(norm, states):
    gain, centred = gain_and_centring(norm)
    return gain * (states - states.mean(-1, keepdim=True) if centred else states)


def silence(tensors, keep=slice(0, 0)):
    with torch.no_grad():
        for tensor in tensors:
            kept = tensor[keep].clone()
            tensor.zero_()
            tensor[keep] = kept


@torch.no_grad()
def head_writes(model, model_type, ids, layer):
    """The write of each head [H, T, d] and of the bias: what the stream gains when all others are silent."""
    n_heads = model.config.num_attention_heads
    stream = residual_stream(model, ids)
    writes = []
    post = POST_NORM.get(model_type)
    for head in range(n_heads + 1):
        alone = without_ffn(model, layer)
        block = layers_of(alone)[layer]
        if post is not None:
            setattr(block, post, torch.nn.Identity())
        projection = block.get_submodule(PROJECTION.get(model_type, "self_attn.o_proj"))
        weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
        width = len(weight) // n_heads
        silence([weight], slice(head * width, (head + 1) * width))
        bias = projection.bias
        if bias is not None and head < n_heads:
            silence([bias])
        if bias is not None or head < n_heads:
            writes.append(residual_stream(alone, ids)[layer + 1] - stream[layer])
    writes = torch.stack(writes)
    if post is not None:
        norm = getattr(layers_of(model)[layer], post)
        writes = numerator(norm, writes) / norm_scale(norm, writes.sum(0))
    return writes


@torch.no_grad()
def expert_writes(model, ids, layer):
    """The write of each routed expert [E, T, d], and that of the shared ones: zero where it is not chosen."""
    mid = residual_stream(without_ffn(model, layer), ids)[layer + 1]
    experts = layers_of(model)[layer].mlp.experts
    writes = []
    for expert in range(experts.num_experts + 1):
        alone = copy.deepcopy(model)
        ffn = layers_of(alone)[layer].mlp
        down = [p for n, p in ffn.experts.named_parameters() if n.startswith("down_proj")]
        silence(down, slice(expert, expert + 1))
        if expert < experts.num_experts:
            silence(p for n, p in ffn.named_parameters() if n.startswith(("shared_expert.", "shared_experts.")))
        writes.append(residual_stream(alone, ids)[layer + 1] - mid)
    return torch.stack(writes), mid


class Oracle:
    """The numbers of parts of a write for one sequence, in float64 and without the package's hooks."""

    def __init__(self, model, record):
        self.model, self.record = in_float64(model), record
        self.ids = torch.tensor([record["input_ids"]])
        self.at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
        self.stream = residual_stream(self.model, self.ids)
        base = getattr(self.model, self.model.base_model_prefix)
        self.norm = [m for n, m in base.named_children() if "norm" in n or n == "ln_f"][-1]

    @torch.no_grad()
    def quantities(self, writes, stream, normed=False):
        """[k, n, 4] of writes [k, T, d] that are added to a stream [T, d]."""
        head, config = self.model.get_output_embeddings(), self.model.config
        scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        followers = head.weight[self.ids[0, 1:]][self.at]
        last = self.stream[-1][self.at]
        rows = []
        for write in writes:
            own, before = write[self.at], stream[self.at]
            entropy = reference.policy_entropy(
                self.norm(own) if normed else own, head.weight, head.bias, scale=scale, softcap=cap
            )
            cosine = (own * before).sum(-1) / (own.norm(dim=-1) * before.norm(dim=-1))
            seen = numerator(self.norm, own) / norm_scale(self.norm, last)
            rows.append([entropy, own.pow(2).mean(-1).sqrt(), cosine, (seen * followers).sum(-1) * scale])
        return torch.stack([torch.stack(row, -1) for row in rows]).numpy()


def measured(model, records, lens="policy"):
    model = model if isinstance(model, models.LanguageModel) else wrapped(model)
    own, found = find_heads(model), find_experts(model, norms_after(model, model.family.ffn_write))
    responses = read_responses(records, model.tokenizer, "plain")
    return own, found, PartReducer(own, found, lens)(responses)


def assert_close(ours, theirs, err_msg=""):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=FLOAT32_NATS, err_msg=err_msg)


def test_the_projections_of_the_table_are_those_of_the_modelling_code():
    for model_type, family in TABLE.items():
        assert f"{family.attention}.{family.output_projection}" == PROJECTION.get(model_type, "self_attn.o_proj")


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_heads_are_those_of_the_definition_in_float64(model_type):
    model, records = tiny_model(model_type), ragged_responses(3)
    found, _, means = measured(model, records)
    assert found.n_heads == 4
    for record, own in zip(records[1:2], means[1:2], strict=True):
        oracle = Oracle(model, record)
        for layer in range(3):
            writes = head_writes(oracle.model, model_type, oracle.ids, layer)
            assert len(writes) == len(found.numbers)
            # The oracle's parts add up to what the attention writes.
            mid = residual_stream(without_ffn(oracle.model, layer), oracle.ids)[layer + 1]
            torch.testing.assert_close(writes.sum(0), mid - oracle.stream[layer], rtol=1e-6, atol=1e-6)
            theirs = oracle.quantities(writes, oracle.stream[layer]).mean(1)
            assert_close(own.heads[layer], theirs, f"layer {layer + 1}")


@pytest.mark.parametrize("model_type", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_heads_under_the_logit_lens(model_type):
    model, (record,) = tiny_model(model_type), ragged_responses(1)
    oracle = Oracle(model, record)
    own = measured(model, [record], "logit-lens")[2][0]
    writes = head_writes(oracle.model, model_type, oracle.ids, 1)
    assert_close(own.heads[1], oracle.quantities(writes, oracle.stream[1], normed=True).mean(1))


@pytest.mark.parametrize(
    "model_type", [m if m == "qwen3_moe" else pytest.param(m, marks=pytest.mark.slow) for m in MIXTURES]
)
def test_experts_are_those_of_the_definition_in_float64(model_type):
    model, records = tiny_model(model_type), ragged_responses(3)
    _, found, means = measured(model, records)
    assert found.n_experts == 4
    assert found.has_shared == (model_type in ("qwen2_moe", "deepseek_v3"))
    assert found.layers == ((2, 3) if model_type == "deepseek_v3" else (1, 2, 3))
    record, own = records[1], means[1]
    oracle = Oracle(model, record)
    for place, layer in enumerate(number - 1 for number in found.layers):
        writes, mid = expert_writes(oracle.model, oracle.ids, layer)
        chosen = (writes[:, oracle.at] != 0).any(-1).numpy()
        quantities = oracle.quantities(writes, mid)
        router_weights = weights_of_the_router(oracle, layer)
        for expert in range(len(found.numbers)):
            ours = dict(zip(EXPERT_QUANTITIES, own.experts[place, expert], strict=True))
            here = chosen[expert]
            assert ours["load"] == pytest.approx(here.mean(), abs=1e-12)
            if not here.any():
                assert np.isnan([ours[name] for name in EXPERT_QUANTITIES[1:]]).all()
                continue
            weight = router_weights[here, expert].mean() if expert < 4 else np.nan
            assert_close(ours["weight"], weight)
            assert_close([ours[name] for name in PART_QUANTITIES], quantities[expert][here].mean(0), f"layer {layer}")


@torch.no_grad()
def weights_of_the_router(oracle, layer):
    """[n, E] by a hook on the router, whose choice is the definition."""
    ffn = layers_of(oracle.model)[layer].mlp
    router = ffn.router if hasattr(ffn, "router") else ffn.gate
    seen = []
    handle = router.register_forward_hook(lambda m, args, output: seen.append(output))
    oracle.model(oracle.ids, use_cache=False)
    handle.remove()
    _, weights, chosen = seen[0]
    return torch.zeros(len(chosen), 4, dtype=torch.float64).scatter(1, chosen, weights.double())[oracle.at].numpy()


def test_attributions_of_everything_add_up_to_the_logit():
    """In a model without biases: those of H^0, of all heads and of all FFNs."""
    model, (record,) = in_float64(tiny_model("llama")), ragged_responses(1)
    own = measured(model, [record])[2][0]
    oracle = Oracle(model, record)
    mids = [residual_stream(without_ffn(oracle.model, i), oracle.ids)[i + 1] for i in range(3)]
    others = torch.stack([oracle.stream[0], *(oracle.stream[i + 1] - mids[i] for i in range(3))])
    rest = oracle.quantities(others, oracle.stream[0])[..., 3].mean(1).sum()
    logits = oracle.model(oracle.ids, use_cache=False).logits[0]
    followers = oracle.ids[0, 1:]
    logit = logits[:-1].gather(1, followers[:, None])[oracle.at].mean().item()
    # The norm's rounding in float32 is what differs.
    assert own.heads[..., 3].sum() + rest == pytest.approx(logit, abs=1e-5)


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_every_family_is_proved_in_every_dtype(model_type):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        model = tiny_model(model_type)
        model = wrapped(in_float64(model).to(dtype))
        assert find_heads(model).n_heads == 4
        found = find_experts(model, norms_after(model, model.family.ffn_write))
        assert (found is not None) == (model_type in MIXTURES)


def test_numbers_in_bfloat16_are_those_of_the_same_states():
    model = wrapped(tiny_model("qwen3").to(torch.bfloat16))
    own, _, (means,) = measured(model, ragged_responses(1))
    (record,) = ragged_responses(1)
    ids = torch.tensor([record["input_ids"]])
    positions = torch.arange(record["prompt_length"] - 1, ids.shape[1] - 1)
    held, values = {}, []

    def collect(states):
        weight = model.layers[states.layer - 1].self_attn.o_proj.weight.double()
        z = held.pop(states.layer).double().unflatten(1, (4, 8))
        writes = torch.stack([z[:, h] @ weight[:, 8 * h : 8 * h + 8].T for h in range(4)])
        values.append(writes.pow(2).mean(-1).sqrt().mean(1).numpy())

    with torch.no_grad(), head_hooks(model, positions, held), residual_hooks(model, positions, collect):
        model.backbone(**model.forward_arguments(ids, torch.ones_like(ids)))
    # Sums are in float32: a sum in bfloat16 would be off by 1e-3.
    np.testing.assert_allclose(means.heads[..., PART_QUANTITIES.index("rms")], np.stack(values), rtol=1e-6)
    assert own.numbers == [1, 2, 3, 4]


@pytest.mark.parametrize("n", [1, 5])
def test_batches_and_portions_do_not_change_the_numbers(n, monkeypatch):
    from internal_policy.extractors import parts

    model, records = tiny_model("gpt_oss"), ragged_responses(5)
    whole = measured(model, records)[2]
    # A few positions at a time.
    monkeypatch.setattr(parts, "_BUDGET", 4 * 32 * 5 * 3)
    own, found, _ = measured(model, records[:1])
    reducer = PartReducer(own, found, "policy")
    responses = read_responses(records, tiny_tokenizer(), "plain")
    by_parts = [m for i in range(0, 5, n) for m in reducer(responses[i : i + n])]
    for one, other in zip(whole, by_parts, strict=True):
        assert_close(one.heads, other.heads)
        assert_close(one.experts, other.experts)


@pytest.mark.parametrize("name", ["testbed/qwen3", "testbed/llama"])
def test_per_head_results_of_transformer_lens(name):
    from transformer_lens.model_bridge import TransformerBridge

    model = models.load(name, dtype="float32", device="cpu", attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(
        name, hf_model=copy.deepcopy(model.model), tokenizer=model.tokenizer, device="cpu"
    )
    record = ragged_responses(1, vocab=model.vocab_size)[0]
    ids, at = torch.tensor([record["input_ids"]]), slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
    _, cache = bridge.run_with_cache(ids)
    _, _, (means,) = measured(model, [record])
    norm, unembedding = model.projection.final_norm, model.projection.weight
    for layer in range(model.n_layers):
        results = torch.einsum("thw,hwd->htd", cache[f"blocks.{layer}.attn.hook_z"][0], bridge.W_O[layer])[:, at]
        stream = cache[f"blocks.{layer}.hook_in"][0, at]
        scaled = results / cache["ln_final.hook_scale"][0, at] * norm.weight
        theirs = torch.stack(
            [
                torch.stack([model.projection.entropy(result) for result in results]),
                results.pow(2).mean(-1).sqrt(),
                torch.cosine_similarity(results, stream, dim=-1),
                (scaled * unembedding[ids[0, 1:]][at]).sum(-1),
            ],
            dim=-1,
        )
        assert_close(means.heads[layer], theirs.mean(1).detach().numpy(), f"layer {layer + 1}")


def test_offloaded_weights_give_the_same_numbers(tmp_path):
    from accelerate import disk_offload

    records = ragged_responses(2)
    plain = measured(tiny_model("qwen3_moe"), records)[2]
    offloaded = tiny_model("qwen3_moe")
    disk_offload(offloaded, tmp_path / "offload", execution_device=torch.device("cpu"))
    for one, other in zip(plain, measured(offloaded, records)[2], strict=True):
        np.testing.assert_array_equal(one.heads, other.heads)
        np.testing.assert_array_equal(one.experts, other.experts)


@pytest.mark.slow
def test_quantised_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    # Whole blocks of the 64 weights that share a scale in every row.
    tiny_model("qwen3", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    four = models.load(str(tmp_path), quantization="4bit")
    _, _, (means,) = measured(four, ragged_responses(1))
    assert np.isfinite(means.heads).all()
    with pytest.raises(UserError, match=r"o_proj also quantises what it receives .*; use --quantization 4bit"):
        find_heads(models.load(str(tmp_path), quantization="8bit"))


def test_other_modules_than_the_output_projection_are_refused():
    model = wrapped(tiny_model("llama"))
    other = partial(dataclasses.replace, model.family)
    for row, message in (
        (other(output_projection="dense"), r"layer 1 has no model\.layers\.0\.self_attn\.dense; name the module in"),
        # It has the same shape.
        (other(output_projection="q_proj"), r"in layer 1 the writes of the heads do not add up .* times what rounding"),
    ):
        with pytest.raises(UserError, match=message):
            find_heads(dataclasses.replace(model, family=row))


def test_a_norm_that_is_left_out_of_the_row_is_refused():
    model = wrapped(tiny_model("gemma2"))
    # The parts of the attention's output do not add up to what the norm makes of it.
    plain = dataclasses.replace(find_heads(model), norms=(None,) * 3)
    with torch.no_grad(), pytest.raises(UserError, match=r"in layer 1 the writes of the heads do not add up"):
        heads._prove_sum(plain, 0)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "deepseek_v3", "gpt_oss", "gpt2"])
def test_a_wrong_number_of_heads_is_refused(model_type, monkeypatch):
    model = wrapped(tiny_model(model_type))
    right = find_heads(model)
    model.config.num_attention_heads = 2
    with pytest.raises(UserError, match=r"layer 1 gives 32 channels to its output projection, .* 2 heads of 8; leave"):
        find_heads(model)
    # Channels of two heads in one slice are noticed also where the attention does not say how wide a head is.
    monkeypatch.setattr(heads, "_WIDTHS", ())
    with pytest.raises(UserError, match=r"slice [12] of 2 .* is not one head's: its channels mix two tokens' values"):
        find_heads(model)
    model.config.num_attention_heads = 5
    with pytest.raises(UserError, match=r"32 channels to its output projection, which are not those of 5 heads;"):
        find_heads(model)
    assert right.n_heads == 4


def test_channels_in_another_order_are_refused(monkeypatch):
    model = wrapped(tiny_model("llama"))
    # Head and channel exchanged: the parts add up all the same.
    o_proj = [layer.self_attn.o_proj for layer in model.layers]
    order = torch.arange(32).view(4, 8).T.reshape(-1)
    with torch.no_grad():
        for module in o_proj:
            module.weight.copy_(module.weight[:, order])
            module.register_forward_pre_hook(lambda m, args: (args[0][..., order],))
    verify(HookExtractor(model))
    with pytest.raises(UserError, match="is not one head's"):
        find_heads(model)


def test_experts_under_another_name_are_refused_and_dense_models_have_none():
    model = wrapped(tiny_model("qwen3_moe"))
    for layer in model.layers:
        layer.mlp = tiny_model("llama").model.layers[0].mlp
    with pytest.raises(UserError, match="no FFN of this mixture holds them in a module named experts"):
        find_experts(model, (None,) * 3)
    assert find_experts(wrapped(tiny_model("llama")), (None,) * 3) is None


def test_experts_that_do_not_run_by_themselves_are_refused():
    model = wrapped(tiny_model("qwen3_moe"))
    ffn = model.layers[1].mlp
    ffn.forward = lambda states: states
    with pytest.raises(UserError, match=r"the experts cannot be measured: those of layer 2 did not run as a module"):
        find_experts(model, (None,) * 3)


def test_experts_that_do_not_add_up_are_refused():
    model = wrapped(tiny_model("qwen2_moe"))
    ffn = model.layers[0].mlp
    ffn.experts.register_forward_hook(lambda m, args, output: 1.01 * output)
    with pytest.raises(
        UserError, match=r"in layer 1 the writes of the chosen experts do not add up to that of the FFN"
    ):
        find_experts(model, (None,) * 3)


def test_hooks_are_removed_on_any_exit():
    model = wrapped(tiny_model("qwen3_moe"))

    def n_hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())

    own, found, _ = measured(model, ragged_responses(1))
    assert n_hooks() == 0
    reducer = PartReducer(own, found, "policy")
    broken = model.layers[2].self_attn.o_proj
    broken.forward = None
    with pytest.raises(TypeError):
        reducer(read_responses(ragged_responses(2), model.tokenizer, "plain"))
    del broken.forward
    assert n_hooks() == 0
