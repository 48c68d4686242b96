"""What identifies a model: the digest of weights, configuration and code, and attached code that no digest covers."""

from __future__ import annotations

import copy
import functools
import json
import sys

import pytest
import torch
from simulated_devices import DEVICE, Devices
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from internal_policy import Analysis, AnalyzeConfig, UserError, analyze, models
from internal_policy.evaluation import evaluate
from internal_policy.extractors import HookExtractor, prove, transformer_lens
from internal_policy.extractors import nnsight as nnsight_backend
from internal_policy.models.fingerprint import _CHUNK, _jsonable, attached_code, digest


def changed(change, model_type="gemma2", **options):
    model = tiny_model(model_type, **options)
    before = digest(model)
    with torch.no_grad():
        change(model)
    return digest(model) != before


def swap(weight):
    weight[[2, 5]] = weight[[5, 2]]


CHANGES = {
    "the last bit of one weight": lambda m: m.model.layers[1].mlp.down_proj.weight.view(torch.int32)[3, 5].add_(1),
    "an embedding": lambda m: m.model.embed_tokens.weight[60, 31].mul_(1.5),
    "a norm": lambda m: m.model.norm.weight[-1].add_(1e-6),
    "two rows swapped": lambda m: swap(m.model.layers[0].self_attn.q_proj.weight),
    "two layers swapped": lambda m: m.model.layers.insert(0, m.model.layers.pop(1)),
    "the sign of zero": lambda m: m.model.layers[0].mlp.up_proj.weight.zero_().neg_(),
    "position frequencies": lambda m: m.model.rotary_emb.inv_freq[3].mul_(1.02),
    "a scale of embeddings": lambda m: m.model.embed_tokens.embed_scale.mul_(1.02),
    "an epsilon": lambda m: setattr(m.model.norm, "eps", 1e-5),
    "a scale of attention": lambda m: setattr(m.model.layers[0].self_attn, "scaling", 0.3),
    "an activation": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.GELU()),
    "softcap": lambda m: setattr(m.config, "final_logit_softcapping", 3.0),
    "sliding window": lambda m: setattr(m.config, "sliding_window", 9),
    "layer types": lambda m: setattr(m.config, "layer_types", ["full_attention"] * 3),
    "rope theta": lambda m: m.config.rope_parameters.update(rope_theta=5e4),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_anywhere_changes_the_digest(change):
    assert changed(change)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: None,
        lambda m: setattr(m.config, "use_cache", False),
        lambda m: setattr(m.config, "_name_or_path", "elsewhere"),
        lambda m: setattr(m.config, "pad_token_id", 1),
        lambda m: m.set_attn_implementation("eager"),
        lambda m: m.train(),
        lambda m: m(torch.arange(2, 60)[None], output_hidden_states=True),
        lambda m: m.generate(torch.arange(2, 9)[None], max_new_tokens=3),
        lambda m: [setattr(p, "data", p.data.t().contiguous().t()) for p in m.parameters() if p.ndim == 2],
    ],
)
def test_what_does_not_affect_the_numbers_keeps_the_digest(change):
    assert not changed(change)


@pytest.mark.parametrize("rope_type", ["dynamic", "linear"])
def test_position_frequencies_that_follow_the_length_keep_the_digest(rope_type):
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4}
    run = lambda m: m(torch.arange(2, 60).repeat(3)[None])  # noqa: E731
    assert not changed(run, "llama", context=32, rope_parameters=rope)
    theta = lambda m: m.config.rope_parameters.update(factor=3.0)  # noqa: E731
    assert changed(theta, "llama", context=32, rope_parameters=rope)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_and_loaded_model_has_the_same_digest(model_type, tied, tmp_path):
    model = tiny_model(model_type, tied=tied)
    for place in ("one", "two"):
        model.save_pretrained(tmp_path / place)
    found = {digest(AutoModelForCausalLM.from_pretrained(tmp_path / place)) for place in ("one", "two")}
    assert found == {digest(model)}
    assert digest(copy.deepcopy(model)) == digest(model)
    assert digest(tiny_model(model_type, tied=tied, seed=1)) != digest(model)


def test_a_tied_weight_on_two_devices_has_the_same_digest():
    from accelerate import dispatch_model

    whole = tiny_model("qwen3", tied=True)
    expected = digest(whole)
    with Devices():
        plan = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.rotary_emb": torch.device(DEVICE, 0)}
        plan |= {f"model.layers.{i}": torch.device(DEVICE, 0) for i in range(3)} | {"model.norm": "cpu"}
        split = dispatch_model(copy.deepcopy(whole), plan, main_device=torch.device(DEVICE, 0))
        assert digest(split) == expected
        assert attached_code(split) == []


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool]
)
def test_every_dtype_is_read_bit_by_bit(dtype):
    model = tiny_model("llama")
    norm = model.model.norm
    found = set()
    for values in ([0, 1, 1], [0, 1, 0], [1, 1, 0], [], [[0, 1, 1]]):
        norm.register_buffer("extra", torch.tensor(values, dtype=torch.float32).to(dtype))
        found.add(digest(model))
    norm.extra = torch.tensor(1.0).to(dtype)
    found.add(digest(model))
    assert len(found) == 6


def test_every_chunk_of_a_large_tensor_is_read():
    model = tiny_model("llama")
    model.register_buffer("large", torch.zeros(2 * _CHUNK + 3, dtype=torch.int8))
    found = {digest(model)}
    for place in (_CHUNK - 1, _CHUNK, -1):
        model.large[place] = 1
        found.add(digest(model))
    assert len(found) == 4


def test_settings_are_the_same_in_every_process():
    class Odd:
        pass

    settings = [_jsonable({"b": {"x", "y"}, 1: Odd(), "torch_dtype": "float32", "_private": 3}) for _ in range(2)]
    assert settings[0] == settings[1]
    assert settings[0].keys() == {"b", "1"}
    assert _jsonable({"scale": torch.tensor([1.0, 2.0]), "kind": torch.float32}) == {
        "scale": [1.0, 2.0],
        "kind": "torch.float32",
    }


OWN = """
from transformers import LlamaForCausalLM
from .helper import scale

class Own(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        out = super().forward(*arguments, **options)
        out.logits = scale(out.logits)
        return out
"""


def test_the_code_of_a_checkpoint_is_in_the_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    found = []
    for place, factor in (("one", 1), ("two", 1), ("one", 2)):
        directory = tmp_path / place
        model = tiny_model("llama")
        model.config.auto_map = {"AutoModelForCausalLM": "modeling_own.Own"}
        model.save_pretrained(directory)
        (directory / "modeling_own.py").write_text(OWN)
        (directory / "helper.py").write_text(f"def scale(x):\n    return {factor} * x\n")
        found.append(digest(AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)))
    assert found[0] == found[1] != found[2]
    assert found[0] != digest(tiny_model("llama"))


BACKENDS = {
    "hooks": HookExtractor,
    "transformer-lens": transformer_lens.from_model,
    "nnsight": nnsight_backend.from_model,
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loaded_model_has_no_attached_code(backend):
    model = models.wrap(tiny_model("qwen3"), tiny_tokenizer())
    before = model.fingerprint()
    extractor = prove(model, BACKENDS[backend])
    around = getattr(extractor, "bridge", getattr(extractor, "_root", None))
    assert attached_code(extractor.model.model, around) == []
    assert extractor.model.fingerprint() == before
    model.model(torch.arange(2, 9)[None], output_hidden_states=True)
    assert attached_code(model.model) == []


def test_nnsight_attaches_only_its_edits():
    nnsight = pytest.importorskip("nnsight")
    model = tiny_model("qwen3")
    before = digest(model)
    root = nnsight.NNsight(model)
    with root.trace(torch.arange(2, 9)[None]):
        root.model.layers[1].output.save()
    assert attached_code(model, root) == []
    assert digest(model) == before
    with root.edit(inplace=True):
        root.model.layers[1].mlp.output[:] = 0
    assert attached_code(model, root) == ["nnsight edit"]


def test_a_bridge_attaches_only_the_users_hooks():
    extractor = transformer_lens.from_model(models.wrap(tiny_model("qwen3"), tiny_tokenizer()))
    bridge = extractor.bridge
    assert attached_code(bridge.original_model, bridge) == []
    bridge.blocks[1].mlp.register_forward_hook(double)
    found = attached_code(transformer_lens.from_bridge(bridge, tiny_tokenizer()).model.model, bridge)
    assert found == ["model.layers.1.mlp: forward hook"]


def double(module, args, output):
    return 2 * output


def watch(module, args):
    return None


@functools.wraps(nn.Linear.forward)
def disguised(self, x):
    return 2 * nn.Linear.forward.__wrapped__(self, x)


ATTACHED = {
    "mlp: forward hook": lambda m: m.register_forward_hook(double),
    "mlp: forward pre-hook": lambda m: m.register_forward_pre_hook(watch),
    "mlp.act_fn: forward hook": lambda m: m.act_fn.register_forward_hook(functools.partial(double)),
    "mlp: replaced forward": lambda m: setattr(m, "forward", lambda x: x),
    "mlp.up_proj: replaced forward": lambda m: setattr(m.up_proj, "forward", m.gate_proj.forward),
    "mlp.gate_proj: replaced forward": lambda m: setattr(m.gate_proj, "forward", disguised.__get__(m.gate_proj)),
}


@pytest.mark.parametrize(("place", "attach"), ATTACHED.items(), ids=ATTACHED)
def test_attached_code_is_listed(place, attach):
    model = tiny_model("qwen3")
    attach(model.model.layers[2].mlp)
    assert attached_code(model) == [f"model.layers.2.{place}"]
    attach(model.model.layers[0].mlp)
    assert attached_code(model) == [f"model.layers.{i}.{place}" for i in (0, 2)]


def test_attached_code_is_listed_below_the_wrappers_of_libraries():
    from accelerate import dispatch_model

    nnsight = pytest.importorskip("nnsight")
    model = tiny_model("qwen3")
    model.model.layers[2].mlp.forward = lambda x: x
    wrapped = copy.deepcopy(model)
    root = nnsight.NNsight(wrapped)
    assert attached_code(wrapped, root) == ["model.layers.2.mlp: replaced forward"]
    placed = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "_hf_hook" in vars(placed)
    assert attached_code(placed) == ["model.layers.2.mlp: replaced forward"]


def test_global_hooks_and_replaced_class_methods_are_listed(monkeypatch):
    model = tiny_model("qwen3")
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        assert attached_code(model) == ["every module: forward hook"]
    finally:
        handle.remove()
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: x)
    assert attached_code(model) == [f"model.layers.{i}.mlp: replaced forward of Qwen3MLP" for i in range(3)]


def test_a_class_without_a_source_is_listed():
    names = {"nn": nn, "__name__": "__main__"}
    exec("class Typed(nn.Identity):\n    def forward(self, x):\n        return x", names)
    model = tiny_model("qwen3")
    model.model.layers[1].mlp.act_fn = names["Typed"]()
    assert attached_code(model) == ["class Typed without a source"]


def disable(model):
    model.disable_adapters()


def scale(model):
    model.model.layers[1].self_attn.o_proj.scaling["default"] *= 8


def another(model):
    model.set_adapter("other")


@pytest.fixture
def adapted():
    """A model with two adapters, of which one is active."""
    peft = pytest.importorskip("peft")
    model = tiny_model("qwen3")
    for name in ("other", "default"):
        options = {"target_modules": ["o_proj", "down_proj"], "init_lora_weights": False}
        model.add_adapter(peft.LoraConfig(r=2, **options), name)
    return model


@pytest.mark.parametrize("change", [disable, scale, another])
def test_the_active_adapters_are_in_the_digest(change, adapted):
    before = digest(adapted)
    adapted(torch.arange(2, 9)[None])
    assert digest(copy.deepcopy(adapted)) == digest(adapted) == before
    assert attached_code(adapted) == []
    change(adapted)
    assert digest(adapted) != before


def test_a_reactivated_adapter_has_the_same_digest(adapted):
    before = digest(adapted)
    adapted.disable_adapters()
    adapted.enable_adapters()
    adapted.set_adapter("other")
    adapted.set_adapter("default")
    assert digest(adapted) == before


class Ablated(nn.Module):
    def __init__(self, units, mode):
        super().__init__()
        self.units, self.mode = units, mode
        self.seen = None

    def forward(self, x):
        self.seen = x.clone()
        self.seen[..., list(self.units)] *= self.mode == "keep"
        return self.seen


def test_the_settings_of_custom_modules_are_in_the_digest():
    model = tiny_model("qwen3")
    found = set()
    for units, mode in (([1, 3], "drop"), ([1, 4], "drop"), ({1, 4}, "keep"), ([1, 4], "keep")):
        model.model.layers[1].mlp.act_fn = Ablated(units, mode)
        found.add(other := digest(model))
        model(torch.arange(2, 9)[None])
        assert digest(model) == other
    assert len(found) == 3


def one_head_less(module, query, key, value, mask, **options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output * (torch.arange(output.shape[2]) != 1)[:, None], weights


@pytest.fixture
def registered(monkeypatch):
    """Register custom attention, mask and expert functions, and return the names of the libraries' own."""
    from transformers.integrations import moe
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    attention, masks, experts = (
        interface._global_mapping for interface in (AttentionInterface, AttentionMaskInterface, moe.ExpertsInterface)
    )
    for names, name, function in (
        (attention, "ablated", one_head_less),
        (masks, "ablated", sdpa_mask),
        (attention, "masked", attention["sdpa"]),
        (masks, "masked", lambda *given, **options: sdpa_mask(*given, **options)),
        (attention, "scaled", functools.partial(attention["sdpa"], scaling=0.1)),
        (attention, "kernels-community/some", one_head_less),
        (attention, "somebody/some", attention["flash_attention_2"]),
        (experts, "routed", lambda self, states, *given: states),
    ):
        monkeypatch.setitem(names, name, function)
    return {"attn": {"eager", *attention} - {"ablated", "masked", "scaled", "somebody/some"}, "experts": set(experts)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ablated", ["attention function 'ablated'"]),
        ("masked", ["mask function 'masked'"]),
        ("scaled", ["attention function 'scaled'"]),
        ("somebody/some", ["attention function 'somebody/some'"]),
    ],
)
def test_custom_attention_functions_are_listed(name, expected, registered):
    model = tiny_model("qwen3")
    model.config._attn_implementation_internal = name
    assert attached_code(model) == expected
    for library in registered["attn"]:
        model.config._attn_implementation_internal = library
        assert attached_code(model) == [], library


def test_custom_expert_functions_are_listed(registered):
    model = tiny_model("qwen3_moe")
    for name in ("eager", *registered["experts"]):
        model.config._experts_implementation = name
        assert attached_code(model) == (["experts function 'routed'"] if name == "routed" else []), name


def test_the_fused_head_of_trl_is_not_listed():
    trl = pytest.importorskip("trl.trainer.utils")
    model, ids = tiny_model("qwen3"), torch.arange(2, 9)[None]
    logits = model(ids).logits
    trl.add_fused_lm_head(model)
    assert "forward" in vars(model)
    assert torch.equal(model(ids).logits, logits)
    assert attached_code(model) == []


def test_a_replaced_eager_attention_is_listed(monkeypatch):
    model = tiny_model("qwen3", attention="eager")
    monkeypatch.setattr("transformers.models.qwen3.modeling_qwen3.eager_attention_forward", one_head_less)
    assert attached_code(model) == ["attention function 'eager'"]
    model.set_attn_implementation("sdpa")
    assert attached_code(model) == []


ATTENDS = """
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

def attend(*arguments, **options):
    return sdpa_attention_forward(*arguments, **options)

def scaled_attend(factor):
    return lambda *arguments, **options: factor * attend(*arguments, **options)

class Attends(LlamaForCausalLM):
    pass
"""


def test_the_attention_of_a_checkpoint_is_not_listed_unless_it_is_a_closure(registered, tmp_path, monkeypatch):
    from transformers.modeling_utils import AttentionInterface

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    model = tiny_model("llama")
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_attends.Attends"}
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "modeling_attends.py").write_text(ATTENDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    code = vars(sys.modules[type(model).__module__])
    model.config._attn_implementation_internal = "own"
    for function, expected in ((code["attend"], []), (code["scaled_attend"](2), ["attention function 'own'"])):
        monkeypatch.setitem(AttentionInterface._global_mapping, "own", function)
        assert attached_code(model) == expected


@pytest.fixture
def subject():
    return tiny_model("gemma2"), {"tokenizer": tiny_tokenizer(), "responses": ragged_responses(3)}


@pytest.mark.parametrize("what", ["the last bit of one weight", "softcap"])
def test_a_changed_model_does_not_reuse_an_analysis(what, subject, tmp_path):
    model, options = subject
    done = analyze(model, **options, output=tmp_path)
    with torch.no_grad():
        CHANGES[what](model)
    with pytest.raises(UserError, match=r"already holds an analysis with other settings \(weights \w+ -> \w+\)"):
        analyze(model, **options, output=tmp_path)
    assert Analysis.load(done.path).config["weights"] == done.config["weights"]


def test_a_hooked_model_does_not_reuse_an_analysis(subject, tmp_path):
    model, options = subject
    plain = analyze(model, **options, output=tmp_path)
    handles = [model.model.layers[i].mlp.register_forward_hook(double) for i in (0, 2)]
    message = (
        r"holds an analysis.*\(model.layers.0.mlp: forward hook and 1 more\).*which no digest covers.*overwrite=True"
    )
    with pytest.raises(UserError, match=message):
        analyze(model, **options, output=tmp_path)
    hooked = analyze(model, **options, output=tmp_path, overwrite=True)
    assert hooked.config["hooked"] == [f"model.layers.{i}.mlp: forward hook" for i in (0, 2)]
    assert hooked.layers["entropy_out"].tolist() != plain.layers["entropy_out"].tolist()
    with pytest.raises(UserError, match=message):
        analyze(model, **options, output=tmp_path)
    for handle in handles:
        handle.remove()
    with pytest.raises(UserError, match=r"already holds an analysis with other settings \(hooked \["):
        analyze(model, **options, output=tmp_path)
    assert analyze(model, **options, output=tmp_path / "new").config["hooked"] is None


def test_a_hooked_model_does_not_resume_an_analysis(subject, tmp_path, monkeypatch):
    from internal_policy.analysis import pipeline

    model, options = subject
    model.model.layers[1].register_forward_pre_hook(watch)
    monkeypatch.setattr(pipeline, "_capture", lambda *a: (_ for _ in ()).throw(RuntimeError))
    for expected in (RuntimeError, UserError):
        with pytest.raises(expected):
            analyze(model, **options, output=tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"model.layers.1: forward pre-hook"):
        analyze(model, **options, output=tmp_path)
    assert analyze(model, **options, output=tmp_path, overwrite=True).config["hooked"]


def test_the_end_tokens_matter_for_sampled_responses(tmp_path):
    model, options = tiny_model("qwen3"), {"tokenizer": tiny_tokenizer(), "max_new_tokens": 3, "output": tmp_path}
    analyze(model, prompts=["w2 w3"], **options)
    model.generation_config.eos_token_id = [1, 7]
    with pytest.raises(UserError, match=r"other settings \(ends \[1\] -> \[1, 7\]\)"):
        analyze(model, prompts=["w2 w3"], **options)


@pytest.fixture
def problems():
    return {"benchmark": [{"prompt": "w2 w3", "answer": "w4"}], "samples": 2, "max_new_tokens": 3, "template": "plain"}


def test_a_hooked_model_does_not_reuse_an_evaluation(problems, tmp_path, monkeypatch):
    from internal_policy.evaluation import pipeline as run

    model = models.wrap(tiny_model("qwen3"), tiny_tokenizer(), "tiny")
    options = {**problems, "output": tmp_path}
    assert evaluate(model, **options).config["hooked"] is None
    handle = model.model.model.layers[1].mlp.register_forward_hook(double)
    message = r"holds an evaluation.*\(model.layers.1.mlp: forward hook\).*overwrite=True"
    with pytest.raises(UserError, match=message):
        evaluate(model, **options)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_sample_and_score", lambda *a: (_ for _ in ()).throw(RuntimeError))
        with pytest.raises(RuntimeError):
            evaluate(model, **options, overwrite=True)
    with pytest.raises(UserError, match=message):
        evaluate(model, **options)
    assert evaluate(model, **options, overwrite=True).config["hooked"] == ["model.layers.1.mlp: forward hook"]
    handle.remove()
    with pytest.raises(UserError, match=r"already holds an evaluation with other settings \(hooked \["):
        evaluate(model, **options)


def test_the_end_tokens_matter_for_an_evaluation(problems, tmp_path):
    model = models.wrap(tiny_model("qwen3"), tiny_tokenizer(), "tiny")
    evaluate(model, **problems, output=tmp_path)
    model.model.generation_config.eos_token_id = [1, 7]
    with pytest.raises(UserError, match=r"other settings \(ends \[1\] -> \[1, 7\]\)"):
        evaluate(model, **problems, output=tmp_path)


def test_a_hooked_model_does_not_resume_a_training_run(tmp_path, monkeypatch):
    from internal_policy import bupo
    from internal_policy.bupo import training

    model = tiny_model("qwen3")
    model.model.layers[1].mlp.register_forward_hook(double)
    monkeypatch.setattr(training, "BuPOTrainer", lambda **_: (_ for _ in ()).throw(KeyError))
    options = {"layer": 2, "ipa_steps": 1, "max_steps": 2, "prompts_per_step": 2, "num_generations": 4}
    options |= {"mini_batches": 1, "dynamics_every": 0, "max_completion_length": 8, "template": "plain"}
    prompts = [{"prompt": f"w{i} w{i + 7}", "answer": "w4"} for i in range(2, 6)]

    def train(**more):
        other = models.wrap(model, tiny_tokenizer(), "tiny")
        bupo.train(other.model, prompts, tokenizer=other.tokenizer, output=tmp_path / "run", **options, **more)

    for expected, more in ((KeyError, {}), (UserError, {}), (KeyError, {"overwrite": True})):
        other = r"holds a run.*\(model.layers.1.mlp: forward hook\)" if expected is UserError else None
        with pytest.raises(expected, match=other):
            train(**more)
    settings = json.loads((tmp_path / "run" / "run_settings.json").read_text())
    assert settings["hooked"] == ["model.layers.1.mlp: forward hook"]


@pytest.mark.parametrize("change", [{"reward": 0.0}, {"response": "w9"}])
def test_every_field_of_given_responses_matters(change, tmp_path):
    given = [{**each, "reward": 1.0, "prompt": "w2", "response": "w3"} for each in ragged_responses(3)]
    model, options = tiny_model("qwen3"), {"tokenizer": tiny_tokenizer(), "output": tmp_path}
    done = analyze(model, responses=given, **options)
    assert analyze(model, responses=given, **options).path == done.path
    with pytest.raises(UserError, match=r"other settings \(inputs \w+ -> \w+\)"):
        analyze(model, responses=[*given[:2], {**given[2], **change}], **options)


def test_the_batch_size_matters_for_8_bit_weights(subject, problems, tmp_path):
    assert AnalyzeConfig(quantization="8bit", batch_size=3).cache_key()["batch_size"] == 3
    assert "batch_size" not in AnalyzeConfig(quantization="4bit").cache_key()
    model, options = subject
    for settings in ({"load_in_4bit": True}, {"load_in_8bit": True}):
        # Only what the configuration says: quantised weights need a package that is not everywhere.
        model.config.quantization_config = settings
        output = tmp_path / str(settings)
        wrapped = models.wrap(model, tiny_tokenizer(), "tiny")
        analyze(model, **options, output=output)
        evaluate(wrapped, **problems, output=output)
        if settings == {"load_in_8bit": True}:
            with pytest.raises(UserError, match=r"an analysis with other settings \(batch_size 16 -> 2\)"):
                analyze(model, **options, output=output, batch_size=2)
            with pytest.raises(UserError, match=r"an evaluation with other settings \(batch_size 64 -> 2\)"):
                evaluate(wrapped, **problems, output=output, batch_size=2)
        else:
            analyze(model, **options, output=output, batch_size=2)
            evaluate(wrapped, **problems, output=output, batch_size=2)
