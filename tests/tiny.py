"""Tiny models built in code, and a reference analysis written straight from the definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from internal_policy.entropy import reference as definition

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAST = ("llama", "qwen3", "gemma2", "gpt_neox", "qwen3_moe")
"""Families of the fast tier: plain, query norms, soft caps with post-norms, parallel blocks, a mixture of experts."""
VOCAB = 61


def slow_unless_fast(model_types):
    """Parameters of a test over families, of which only those of ``FAST`` run in the fast tier."""
    return [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in model_types]


_MOE = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
_GPT = {"n_embd": 32, "n_inner": 48, "n_head": 4}
FAMILY_OPTIONS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**_MOE, "num_experts": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"final_logit_softcapping": 2.0, "sliding_window": 8},
    "olmo3": {"sliding_window": 8},
    "granite": {"residual_multiplier": 0.3, "logits_scaling": 4.0, "embedding_multiplier": 6.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "deepseek_v3": {
        **_MOE,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "gpt2": _GPT,
    "gptj": {**_GPT, "rotary_dim": 4},
}
"""Options of each family in addition to the common sizes, chosen so that its special parts have an effect."""


def tiny_model(
    model_type, *, tied=False, layers=3, kv_heads=2, seed=0, vocab=VOCAB, context=64, attention=None, **config
):
    """A randomly initialised model of a real architecture, with weights large enough to make the policies differ."""
    own = FAMILY_OPTIONS.get(model_type, {})
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": 8,
        "max_position_embeddings": context,
    }
    if "n_embd" in own:
        sizes = {"n_layer": layers, "n_positions": context}
    if model_type in ("deepseek_v3", "gpt_neox"):
        del sizes["head_dim"]
    if model_type == "gpt_neox":
        # The real configuration has no such field, and transformer-lens would use it.
        del sizes["num_key_value_heads"]
    if model_type == "deepseek_v3":
        sizes["num_key_value_heads"] = 4
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            model_type,
            **{
                **sizes,
                "vocab_size": vocab,
                "tie_word_embeddings": tied,
                "initializer_range": 0.15,
                "pad_token_id": None,
                "bos_token_id": 0,
                "eos_token_id": 1,
                **own,
                **config,
            },
        ),
        **({"attn_implementation": attention} if attention else {}),
    )
    return _perturb_vectors(model).eval()


def _perturb_vectors(model):
    """Perturb biases and norm weights, so that leaving one out changes the result."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tiny_tokenizer(vocab=VOCAB, chat_template=None):
    words = ["<bos>", "<eos>", *(f"w{i}" for i in range(2, vocab))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=chat_template
    )


def ragged_responses(n=5, seed=0, vocab=VOCAB, longest=24):
    """Sequences of different lengths with the prompt's end at different places, as plain records."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, longest, size=n)
    return [
        {"input_ids": rng.integers(2, vocab, size=int(t)).tolist(), "prompt_length": int(rng.integers(1, t))}
        for t in lengths
    ]


def norm(states, weight, eps):
    """Root mean square norm, written out."""
    return weight.double() * states / torch.sqrt(states.pow(2).mean(-1, keepdim=True) + eps)


def site_quantities(site, state_in, state_out, entropy, at):
    """The entropies and root mean squares of a site from its input and output in float64."""
    rescaled = state_out * state_in.norm(dim=-1, keepdim=True) / state_out.norm(dim=-1, keepdim=True)
    values = {
        "in": entropy(state_in),
        "out": entropy(state_out),
        "rescaled": entropy(rescaled),
        "rms_in": state_in[at].pow(2).mean(-1).sqrt().numpy(),
        "rms_out": state_out[at].pow(2).mean(-1).sqrt().numpy(),
    }
    return {f"{site}_{name}": value for name, value in values.items()}


@torch.no_grad()
def reference(model, record):
    """Per-token values of one sequence, alone and unpadded, in float64 from transformers' own outputs.

    It shares nothing with the package but ``definition.policy_entropy``: residual states come from output_hidden_states
    of a float64 copy, writes from differences of the stream, module inputs from the norms written out.
    """
    model = model.double()
    base, n_layers = model.model, model.config.num_hidden_layers
    ids = torch.tensor([record["input_ids"]])
    at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
    mids = {}
    handles = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda m, args, i=i: mids.__setitem__(i, args[0][0]))
        for i, layer in enumerate(base.layers)
    ]
    raw = {}
    handles.append(base.norm.register_forward_pre_hook(lambda m, args: raw.__setitem__("last", args[0][0])))
    out = model(ids, output_hidden_states=True, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = [h[0] for h in out.hidden_states[:n_layers]] + [raw["last"]]
    head, bias = model.lm_head.weight, model.lm_head.bias
    eps = model.config.rms_norm_eps

    def entropy(states):
        return definition.policy_entropy(states[at], head, bias).numpy()

    def cosine(a, b):
        return ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)))[at].numpy()

    rows = []
    for i, layer in enumerate(base.layers):
        before, mid, after = stream[i], mids[i], stream[i + 1]
        attn_in = norm(before, layer.input_layernorm.weight, eps)
        ffn_in = norm(mid, layer.post_attention_layernorm.weight, eps)
        rows.append(
            {
                **site_quantities("layer", before, after, entropy, at),
                **site_quantities("attn", attn_in, mid - before, entropy, at),
                "attn_cosine": cosine(mid - before, before),
                **site_quantities("ffn", ffn_in, after - mid, entropy, at),
                "ffn_cosine": cosine(after - mid, mid),
            }
        )
    log_p = torch.log_softmax(out.logits[0, at].double(), -1)
    policy = np.stack([entropy(stream[-1]), -(log_p.exp() * log_p).sum(-1).numpy()], axis=-1)
    return rows, policy
