"""The same interventions written in TransformerLens and in nnsight give the same final policies."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import ablate, models, patch

nnsight = pytest.importorskip("nnsight")

# The products are the same, in float32, where the libraries order some sums differently: observed 2e-6 nats.
FLOAT32_NATS = 1e-5
LAYER, HEAD = 2, 3


def wrapped(model_type):
    return models.wrap(tiny_model(model_type, attention="eager", kv_heads=4), tiny_tokenizer(), model_type)


def bridge_of(model):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    twin = copy.deepcopy(model)
    return build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config, model_name="mine")


def effects(clean, changed, record):
    """KL, change of entropy and of log-probability on the response tokens from logits [T, V]; means over tokens."""
    rows = slice(record["prompt_length"] - 1, -1)
    p, q = (torch.log_softmax(z.double(), -1)[rows] for z in (clean, changed))
    tokens = torch.tensor(record["input_ids"][record["prompt_length"] :])[:, None]
    values = (
        (p.exp() * (p - q)).sum(-1),
        (p.exp() * p).sum(-1) - (q.exp() * q).sum(-1),
        (q.gather(1, tokens) - p.gather(1, tokens))[:, 0],
    )
    return [float(value.mean()) for value in values]


COLUMNS = ["kl", "entropy_change", "log_prob_change"]


def ours(model, record, **options):
    found = ablate(model.model, model.tokenizer, responses=[record], layers=LAYER, **options)
    return found.table[COLUMNS].to_numpy()


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_ablations_in_transformer_lens(model_type):
    model = wrapped(model_type)
    (record,) = ragged_responses(1, seed=3)
    bridge = bridge_of(model.model)
    ids = torch.tensor([record["input_ids"]])

    def scaled(factor):
        return lambda states, hook: factor * states

    def without_head(results, hook):
        # [B, T, heads, width], or the heads side by side.
        width = 32 // 4
        flat = results.reshape(*results.shape[:2], -1).clone()
        flat[..., (HEAD - 1) * width : HEAD * width] = 0
        return flat.reshape(results.shape)

    with torch.no_grad():
        clean = bridge(ids)[0]

        def run(name, hook):
            return effects(clean, bridge.run_with_hooks(ids, fwd_hooks=[(name, hook)])[0], record)

        wanted = {
            ("attn", "zero"): run(f"blocks.{LAYER - 1}.attn.hook_out", scaled(0.0)),
            ("ffn", "zero"): run(f"blocks.{LAYER - 1}.mlp.hook_out", scaled(0.0)),
            ("attn", "scale"): run(f"blocks.{LAYER - 1}.attn.hook_out", scaled(1.7)),
            ("ffn", "scale"): run(f"blocks.{LAYER - 1}.mlp.hook_out", scaled(1.7)),
        }
        head = run(f"blocks.{LAYER - 1}.attn.o.hook_in", without_head)
    found = ours(model, record, how="zero,scale", alpha=1.7)
    np.testing.assert_allclose(found, list(wanted.values()), rtol=0, atol=FLOAT32_NATS)
    np.testing.assert_allclose(ours(model, record, head=HEAD), [head], rtol=0, atol=FLOAT32_NATS)
    assert np.abs(found).min() > 10 * FLOAT32_NATS


def test_ablations_in_nnsight():
    model = wrapped("qwen3")
    (record,) = ragged_responses(1, seed=3)
    ids = torch.tensor([record["input_ids"]])
    root = nnsight.NNsight(copy.deepcopy(model.model))
    block = root.model.layers[LAYER - 1]

    def run(edit):
        with torch.no_grad(), root.trace(ids, use_cache=False):
            edit()
            logits = root.lm_head.output.save()
        return logits[0]

    def nothing():
        pass

    def zero_attention():
        block.self_attn.output = (torch.zeros_like(block.self_attn.output[0]), *block.self_attn.output[1:])

    def zero_ffn():
        block.mlp.output = torch.zeros_like(block.mlp.output)

    clean = run(nothing)
    wanted = [effects(clean, run(edit), record) for edit in (zero_attention, zero_ffn)]
    np.testing.assert_allclose(ours(model, record), wanted, rtol=0, atol=FLOAT32_NATS)


def test_patching_in_transformer_lens():
    model = wrapped("llama")
    clean, corrupted = [5, 9, 14, 3, 8], [5, 9, 33, 3, 8]
    found = patch(model.model, clean, corrupted, model.tokenizer)
    bridge = bridge_of(model.model)
    names = {"layer": "hook_out", "attn": "attn.hook_out", "ffn": "mlp.hook_out"}
    answer, wrong = found.metric["answer_id"], found.metric["wrong_id"]

    def difference(logits):
        return float(logits[0, -1, answer] - logits[0, -1, wrong])

    with torch.no_grad():
        logits, cache = bridge.run_with_cache(torch.tensor([clean]))
        assert found.metric["clean"] == pytest.approx(difference(logits), abs=FLOAT32_NATS)
        for row in found.values[found.values["layer"] < 3].to_dict("records"):
            name = f"blocks.{row['layer'] - 1}.{names[row['site']]}"

            def put_in(states, hook, name=name, at=row["position"] - 1):
                states = states.clone()
                states[:, at] = cache[name][:, at]
                return states

            patched = bridge.run_with_hooks(torch.tensor([corrupted]), fwd_hooks=[(name, put_in)])
            assert row["value"] == pytest.approx(difference(patched), abs=FLOAT32_NATS)
