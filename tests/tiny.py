"""Tiny models built in code, and a reference analysis written straight from the definitions."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from internal_policy.entropy import definition

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
VOCAB = 61


def tiny_model(model_type, *, tied=False, layers=3, kv_heads=2, seed=0, vocab=VOCAB, context=64, **config):
    """A randomly initialised model of a real architecture, with weights large enough to make the policies differ."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            model_type,
            **{
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": kv_heads,
                "head_dim": 8,
                "vocab_size": vocab,
                "max_position_embeddings": context,
                "tie_word_embeddings": tied,
                "initializer_range": 0.15,
                "pad_token_id": None,
                "bos_token_id": 0,
                "eos_token_id": 1,
                **config,
            },
        )
    ).eval()


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
        rows.append(
            {
                "layer_in": entropy(before),
                "layer_out": entropy(after),
                "attn_in": entropy(norm(before, layer.input_layernorm.weight, eps)),
                "attn_out": entropy(mid - before),
                "attn_cosine": cosine(mid - before, before),
                "ffn_in": entropy(norm(mid, layer.post_attention_layernorm.weight, eps)),
                "ffn_out": entropy(after - mid),
                "ffn_cosine": cosine(after - mid, mid),
            }
        )
    log_p = torch.log_softmax(out.logits[0, at].double(), -1)
    policy = np.stack([entropy(stream[-1]), -(log_p.exp() * log_p).sum(-1).numpy()], axis=-1)
    return rows, policy
