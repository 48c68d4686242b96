"""Training dynamics: parity with transformers' states in float64, no side effects, and the stopping rule."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import FAMILIES, VOCAB, ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import UserError, models
from internal_policy.bupo.dynamics import Dynamics, alignment_end
from internal_policy.data import arithmetic as tasks
from internal_policy.data.responses import Response, read_responses

# float32 states and logits of size ~10 are rounded at ~1e-6, and a mean averages that out; 2e-5 leaves room for sums.
FLOAT32_NATS = 2e-5


def records_with_shared_prompts():
    """Two prompts sampled twice each and one once, of different lengths."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(2, VOCAB, size=k).tolist() for k in (1, 5, 9)]
    lengths = [(0, 7), (0, 1), (1, 12), (1, 3), (2, 5)]
    return [
        {"input_ids": prompts[p] + rng.integers(2, VOCAB, size=t).tolist(), "prompt_length": len(prompts[p])}
        for p, t in lengths
    ]


def dynamics(model, records, layer, **options):
    tokenizer = tiny_tokenizer()
    return Dynamics(models.wrap(model, tokenizer), read_responses(records, tokenizer, "plain"), layer, **options)


def keep_input(seen, name, module, args):
    seen[name] = args[0][0]


@torch.no_grad()
def expected(model, records, layer, site="layer", lens="policy"):
    """The same values from transformers' outputs for each unbatched sequence in float64, by torch's distributions.

    Nothing is shared with the package: writes are differences of the residual stream.
    """
    model = copy.deepcopy(model).double().eval()
    tokens: list[dict[str, torch.Tensor]] = []
    tables = []
    for record in records:
        at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
        norms = {"last": model.model.norm, "middle": model.model.layers[layer - 1].post_attention_layernorm}
        seen: dict[str, torch.Tensor] = {}
        handles = [norms[name].register_forward_pre_hook(partial(keep_input, seen, name)) for name in norms]
        out = model(torch.tensor([record["input_ids"]]), output_hidden_states=True, use_cache=False)
        for handle in handles:
            handle.remove()
        stream = [h[0] for h in out.hidden_states[:-1]] + [seen["last"]]
        before, middle, after = stream[layer - 1], seen["middle"], stream[layer]
        own = {"layer": after, "attn": middle - before, "ffn": after - middle}[site][at]

        def policy(states):
            states = model.model.norm(states) if lens == "logit-lens" else states
            return torch.distributions.Categorical(logits=model.lm_head(states))

        pi, theta = policy(own), torch.distributions.Categorical(logits=out.logits[0, at])
        tokens.append(
            {
                "change": policy(after[at]).entropy() - policy(before[at]).entropy(),
                "entropy": pi.entropy(),
                "policy_entropy": theta.entropy(),
                "log_perplexity": -theta.log_prob(torch.tensor(record["input_ids"][record["prompt_length"] :])),
                "policy_kl": torch.distributions.kl_divergence(pi, theta),
            }
        )
        rows = [
            torch.stack(
                [
                    torch.cosine_similarity(own, h[at], dim=-1),
                    torch.distributions.kl_divergence(pi, policy(h[at])),
                ]
            )
            for h in stream[layer + 1 :]
        ]
        tables.append(torch.stack(rows) if rows else torch.zeros(0, 2, len(own)))
    means = {name: torch.cat([t[name] for t in tokens]).mean().item() for name in tokens[0]}
    return means, torch.cat(tables, dim=-1).mean(-1).numpy(), [t["log_perplexity"].numpy() for t in tokens]


def assert_equal(measured, wanted, table):
    for name, value in wanted.items():
        assert getattr(measured, name) == pytest.approx(value, rel=0, abs=FLOAT32_NATS), name
    assert list(measured.layers.columns) == ["layer", "cosine", "kl"]
    assert list(measured.layers["layer"]) == list(range(measured.layer + 1, measured.layer + 1 + len(table)))
    np.testing.assert_allclose(measured.layers[["cosine", "kl"]].to_numpy(), table, rtol=0, atol=FLOAT32_NATS)
    kl = table[:, 1].mean() if len(table) else wanted["policy_kl"]
    assert measured.kl_mean == pytest.approx(kl, rel=0, abs=FLOAT32_NATS)
    assert measured.perplexity == pytest.approx(math.exp(wanted["log_perplexity"]), rel=2 * FLOAT32_NATS)


@pytest.mark.parametrize("lens", ["policy", "logit-lens"])
@pytest.mark.parametrize("site", ["layer", "attn", "ffn"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_parity_with_transformers_in_float64(model_type, site, lens):
    model, records = tiny_model(model_type, tied=model_type == "qwen2"), ragged_responses(7)
    for layer in (1, 2, 3):
        wanted, table, _ = expected(model, records, layer, site, lens)
        side, batch_size = ("left", 16) if layer == 2 else ("right", 3)
        measured = dynamics(model, records, layer, site=site, lens=lens, side=side, batch_size=batch_size).measure()
        assert_equal(measured, wanted, table)


def test_parity_on_an_embedded_model():
    model = models.load("testbed/qwen3", device="cpu")
    solved = [{"prompt": p.prompt, "response": p.solution} for p in tasks.problems(4, seed=0)]
    responses = read_responses(solved, model.tokenizer, "chat")
    records = [{"input_ids": r.input_ids, "prompt_length": r.prompt_length} for r in responses]
    for layer in (2, model.n_layers):
        wanted, table, _ = expected(model.model, records, layer)
        measured = Dynamics(model, responses, layer).measure()
        assert len(measured.layers) == model.n_layers - layer
        # Logits of a trained model are larger than those of the tiny ones: some 30 here, rounded at 2e-6 each.
        for name, value in wanted.items():
            assert getattr(measured, name) == pytest.approx(value, rel=1e-5, abs=1e-4), name
        np.testing.assert_allclose(measured.layers[["cosine", "kl"]].to_numpy(), table, rtol=1e-5, atol=1e-4)


def test_the_standard_error_is_clustered_by_prompt():
    model, records = tiny_model("qwen3"), records_with_shared_prompts()
    _, _, losses = expected(model, records, 2)
    clusters = [np.concatenate(losses[:2]), np.concatenate(losses[2:4]), losses[4]]
    mean = np.concatenate(losses).mean()
    scatter = sum(((c - mean).sum()) ** 2 for c in clusters)
    wanted = math.sqrt(3 / 2 * scatter) / sum(map(len, clusters))
    measured = dynamics(model, records, 2, batch_size=2).measure()
    assert measured.log_perplexity_stderr == pytest.approx(wanted, rel=1e-4)
    assert math.isnan(dynamics(model, records[:2], 2).measure().log_perplexity_stderr)


def test_rows_and_tables_match_the_stored_results():
    measured = dynamics(tiny_model("llama"), ragged_responses(), 2).measure()
    assert list(measured.row()) == [
        *("layer", "change", "entropy", "policy_entropy", "log_perplexity", "log_perplexity_stderr", "perplexity"),
        *("kl_mean", "policy_kl"),
    ]
    assert all(isinstance(value, (int, float)) for value in measured.row().values())
    assert (measured.layers["kl"] > 0).all()


def test_last_layer_under_the_logit_lens_is_the_policy():
    measured = dynamics(tiny_model("qwen3"), ragged_responses(), 3, lens="logit-lens").measure()
    # The same state on both sides: only the sums are rounded.
    assert measured.kl_mean == measured.policy_kl == pytest.approx(0, abs=1e-6)
    assert measured.entropy == pytest.approx(measured.policy_entropy, abs=1e-6)
    assert measured.layers.empty


def test_chunking_positions_does_not_change_the_measurement(monkeypatch):
    watch = dynamics(tiny_model("qwen3"), ragged_responses(), 2)
    whole = watch.measure()
    monkeypatch.setattr("internal_policy.bupo.dynamics._CHUNK_SIZE", 4)
    parts = watch.measure()
    # Products in blocks of other shapes round otherwise.
    np.testing.assert_allclose(list(parts.row().values()), list(whole.row().values()), rtol=0, atol=FLOAT32_NATS)
    pd.testing.assert_frame_equal(parts.layers, whole.layers, rtol=0, atol=FLOAT32_NATS)


def test_measuring_leaves_the_model_unchanged():
    model = tiny_model("llama", attention_dropout=0.5)
    watch = dynamics(model, ragged_responses(), 2)
    evaluated = watch.measure()
    model.train()
    model.model.layers[1].eval()
    loss = model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss
    loss.backward()
    modes = [m.training for m in model.modules()]
    weights = {n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    again = watch.measure()
    # Dropout was off: the same numbers as in evaluation mode, to the bit.
    assert again.row() == evaluated.row()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name][0])
        assert torch.equal(p.grad, weights[name][1])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failure_removes_hooks_and_restores_the_training_mode():
    model = tiny_model("qwen2")
    watch = dynamics(model, ragged_responses(), 2)
    model.train()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"NaN or inf at layer 3 .*diverged"):
        watch.measure()
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("tied", [False, True])
def test_updated_or_replaced_weights_are_used(tied):
    model, records = tiny_model("qwen3", tied=tied), ragged_responses()
    watch = dynamics(model, records, 2)
    before = watch.measure()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    in_place = watch.measure()
    assert_equal(in_place, *expected(model, records, 2)[:2])
    for p in model.parameters():
        p.data = p.data + 0.02 * torch.randn(p.shape, generator=generator)
    assert_equal(watch.measure(), *expected(model, records, 2)[:2])
    assert abs(in_place.kl_mean - before.kl_mean) > 100 * FLOAT32_NATS


def test_invalid_measurements_are_refused():
    model, records = tiny_model("qwen3"), ragged_responses()
    for layer in (0, 4):
        with pytest.raises(UserError, match="a layer of this model, 1 to 3"):
            dynamics(model, records, layer)
    with pytest.raises(UserError, match="no responses"):
        Dynamics(models.wrap(model, tiny_tokenizer()), [], 2)
    with pytest.raises(UserError, match="site is 'mlp'"):
        dynamics(model, records, 2, site="mlp")
    with pytest.raises(UserError, match="batch_size is 0"):
        dynamics(model, records, 2, batch_size=0)
    wrapped = models.wrap(model, tiny_tokenizer())
    with pytest.raises(UserError, match="beyond the vocabulary"):
        Dynamics(wrapped, [Response("", "", [2, 999], 1)], 2)
    with pytest.raises(UserError, match="response 2 has no response tokens"):
        Dynamics(wrapped, [Response("", "", [2, 3], 1), Response("", "", [2, 3], 2)], 2)


def curve(kl, log_perplexity=None):
    log_perplexity = [0.3] * len(kl) if log_perplexity is None else log_perplexity
    rows = zip(kl, log_perplexity, strict=True)
    return [{"step": 2 * i, "kl_mean": k, "log_perplexity": p, "phase": "ipa"} for i, (k, p) in enumerate(rows)]


def end(history):
    """Number of measurements when the rule first fires, and its reason."""
    for n in range(len(history) + 1):
        reason = alignment_end(history[:n])
        if reason:
            return n, reason
    return None, None


def test_a_rising_divergence_stops_alignment():
    n, reason = end(curve([1.0, 0.9, 0.8, 0.75, 0.71, 0.72, 0.75, 0.83, 0.95]))
    assert n == 8
    assert reason == "KL to later layers turned up at step 12: 0.83 at step 14 after a minimum of 0.71 at step 8"


@pytest.mark.parametrize(
    ("kl", "fires_at"),
    [
        ([1.0, 0.8, 0.6, 0.5, 0.45, 0.43, 0.42], None),
        ([1.0, 1.0, 1.0, 1.0], None),
        ([1.0], None),
        ([1.0, 1.5], None),
        ([1.0, 1.1, 1.2], 3),
        ([1.0, 0.5, 0.9, 0.48, 0.9, 0.47], None),
        ([1.0, 0.5, 0.51, 0.52, 0.524], None),
        ([1e-5, 1e-6, 5e-6, 9e-6, 8e-6], None),
        ([1.0, 0.5, 0.53, 0.53], 4),
    ],
    ids=["falling", "flat", "first", "second", "rising", "spikes", "within 5%", "about zero", "turning"],
)
def test_step_at_which_the_divergence_stops_alignment(kl, fires_at):
    assert end(curve(kl))[0] == fires_at


def test_a_worse_perplexity_stops_alignment_immediately():
    falling = np.linspace(1, 0.5, 6)
    n, reason = end(curve(falling, [0.30, 0.31, 0.28, 0.34, 0.36, 0.5]))
    assert n == 5
    assert reason.startswith("log-perplexity on the fixed responses rose by 0.060 nats per token to 0.360 at step 8")
    assert end(curve(falling, [0.30, 0.25, 0.2, 0.2, 0.2, 0.25]))[0] is None
    assert end(curve(falling[:3], [0.3, 0.3, math.nan]))[0] == 3
    assert end(curve(falling[:3], [0.3, math.inf, 0.3]))[0] == 2


def test_stopping_is_robust_to_one_percent_noise():
    steps = np.arange(30)
    valley = 0.7 + 0.3 * ((steps - 12) / 12) ** 2
    ends = []
    for seed in range(200):
        noise = 1 + 0.01 * np.random.default_rng(seed).standard_normal(30)
        # Two consecutive readings must be 5% above the minimum of up to 28, which is about two deviations low.
        assert end(curve((0.5 + 0.5 * np.exp(-steps / 10)) * noise))[0] is None
        ends.append(end(curve(valley * noise))[0])
    # Without noise, measurements 18 and 19 are the first two that exceed the floor by 5%.
    assert end(curve(valley))[0] == 19
    assert min(ends) >= 16
    assert max(ends) <= 21


def test_stopping_rule_accepts_the_stored_table():
    table = pd.DataFrame(curve([1.0, 0.5, 0.6, 0.7]))
    assert alignment_end(table.to_dict("records")) == alignment_end(curve([1.0, 0.5, 0.6, 0.7])) is not None
