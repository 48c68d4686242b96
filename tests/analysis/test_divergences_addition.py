"""The addition ``--divergences``: its tables against per-token formulas, intervals, resumption, and what is said."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Analysis, UserError, analyze
from internal_policy.analysis import divergences
from internal_policy.analysis.figure_data import divergence_data, divergence_matrix_data
from internal_policy.analysis.remarks import divergence_remark, remarks
from internal_policy.analysis.results import ANALYSIS
from internal_policy.cli.main import run as run_command
from internal_policy.data.responses import Response
from internal_policy.statistics import clustered_mean, confidence_interval

# A mean over tokens of float32 numbers from logits of size 10.
FLOAT32_NATS = 1e-5
ENDS = ("_stderr", "_low", "_high")


def run(directory=None, model="llama", **options):
    records = ragged_responses(5)
    return analyze(
        tiny_model(model), tiny_tokenizer(), responses=records, output=directory, divergences=True, **options
    )


@torch.no_grad()
def by_token(lens):
    """KL(pi_theta || pi^l), KL(pi^l || next) and agreement of each token in float64: [n, L] for each response."""
    model = tiny_model("llama").double()
    for record in ragged_responses(5):
        ids = torch.tensor([record["input_ids"]])
        at = slice(record["prompt_length"] - 1, len(record["input_ids"]) - 1)
        raw = []
        handle = model.model.norm.register_forward_pre_hook(lambda m, args, raw=raw: raw.append(args[0][0]))
        out = model(ids, output_hidden_states=True, use_cache=False)
        handle.remove()
        states = [*(h[0] for h in out.hidden_states[1:-1]), raw[0]]
        if lens == "logit-lens":
            states = [model.model.norm(h) for h in states]
        logits = [*(h[at] @ model.lm_head.weight.T for h in states), out.logits[0, at]]
        log_p = torch.stack([torch.log_softmax(z, dim=-1) for z in logits], dim=1)
        p, final = log_p.exp(), log_p[:, -1:]
        yield {
            "kl_policy": (p[:, -1:] * (final - log_p[:, :-1])).sum(-1).numpy(),
            "kl_next": (p[:, :-1] * (log_p[:, :-1] - log_p[:, 1:])).sum(-1).numpy(),
            "top1": (log_p[:, :-1].argmax(-1) == final.argmax(-1)).double().numpy(),
        }


@pytest.mark.parametrize("lens", ["policy", "logit-lens"])
def test_tables_are_means_over_all_tokens_with_clustered_errors(lens):
    analysis = run(lens=lens, batch_size=2)
    table, responses = analysis.additions["divergences"], list(by_token(lens))
    counts = [len(each["top1"]) for each in responses]
    prompts = [analysis.responses.loc[analysis.responses["response"] == i, "prompt"].iloc[0] for i in range(5)]
    assert table["layer"].tolist() == [1, 2, 3]
    assert (table["n_tokens"] == sum(counts)).all()
    for name in ("kl_policy", "kl_next", "top1"):
        np.testing.assert_allclose(
            table[name], np.concatenate([each[name] for each in responses]).mean(axis=0), rtol=0, atol=FLOAT32_NATS
        )
        means = np.stack([each[name].mean(axis=0) for each in responses])
        ends = (clustered_mean(means, counts, prompts)[1], *confidence_interval(means, counts, prompts))
        for end, expected in zip(ENDS, ends, strict=True):
            clipped = np.clip(expected, 0, 1) if name == "top1" and end != "_stderr" else expected
            np.testing.assert_allclose(table[name + end], clipped, rtol=0, atol=2 * FLOAT32_NATS, err_msg=name + end)
    if lens == "logit-lens":
        last = table.iloc[-1]
        assert last["kl_policy"] == last["kl_policy_stderr"] == last["kl_next"] == 0
        assert last["top1"] == 1


def test_the_matrix_agrees_with_the_curves():
    found = run()
    table, matrix = found.additions["divergences"], found.additions["divergence_matrix"]
    assert len(matrix) == 9
    assert (matrix["n_tokens"] == found.n_tokens).all()
    pairs = matrix.set_index(["layer", "other"])
    for layer in (1, 2, 3):
        assert (pairs.loc[(layer, layer), ["kl", "kl_stderr", "kl_low", "kl_high"]] == 0).all()
    for layer in (1, 2):
        row, own = pairs.loc[(layer, layer + 1)], table.set_index("layer").loc[layer]
        for end in ("", *ENDS):
            assert row[f"kl{end}"] == own[f"kl_next{end}"]


def test_it_is_stored_and_added_later_without_changing_anything(tmp_path):
    records = ragged_responses(5)
    plain = analyze(tiny_model("llama"), tiny_tokenizer(), responses=records, output=tmp_path)
    assert plain.additions == {}
    with pytest.raises(UserError, match=r"divergences was not measured; repeat the analysis with --divergences"):
        divergence_data(plain)
    later = run(tmp_path)
    pd.testing.assert_frame_equal(later.layers, plain.layers, check_exact=True)
    at_once = run()
    loaded = Analysis.load(later.path)
    for name in ("divergences", "divergence_matrix"):
        pd.testing.assert_frame_equal(loaded.additions[name], at_once.additions[name], rtol=1e-12)
        assert (later.path / f"{name}.csv").is_file()


def test_an_interrupted_measurement_is_resumed(tmp_path, monkeypatch):
    measured, original = [], divergences.measure_divergences

    def stop_after(n, extractor, responses, lens):
        if len(measured) >= n:
            raise KeyboardInterrupt
        measured.extend(responses)
        return original(extractor, responses, lens)

    whole = run(batch_size=2)
    monkeypatch.setattr(divergences, "measure_divergences", partial(stop_after, 2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, batch_size=2)
    (directory,) = ANALYSIS.below(tmp_path)
    assert Analysis.load(directory).additions == {}
    monkeypatch.setattr(divergences, "measure_divergences", partial(stop_after, 9))
    resumed = run(tmp_path, batch_size=2)
    assert len(measured) == 5
    name = "divergences"
    pd.testing.assert_frame_equal(resumed.additions[name], whole.additions[name], rtol=1e-12)
    assert not (directory / "work").exists()


def test_too_little_memory_halves_the_batch(monkeypatch):
    sizes, original = [], divergences.measure_divergences

    def limited(extractor, responses, lens):
        sizes.append(len(responses))
        if len(responses) > 2:
            raise torch.OutOfMemoryError("no memory")
        return original(extractor, responses, lens)

    expected = run()
    monkeypatch.setattr(divergences, "measure_divergences", limited)
    found = run()
    assert sizes[0] == 5
    assert max(sizes[1:]) <= 3
    np.testing.assert_allclose(
        found.additions["divergence_matrix"]["kl"], expected.additions["divergence_matrix"]["kl"], atol=FLOAT32_NATS
    )


def test_portions_may_come_in_any_order():
    responses = [Response(f"p{i}", "r", [i] + [1] * (i + 1), 1, None) for i in range(3)]
    means = np.arange(3.0)[:, None] * np.ones((1, 2))

    def portion(index):
        matrix = np.tile(means[index][:, :, None], (1, 1, 2))
        return {"index": np.array(index), "kl_policy": means[index], "kl_next": means[index], "top1": means[index]} | {
            "matrix": matrix
        }

    table = divergences.tabulate([portion([2, 0]), portion([1])], responses)["divergences"]
    # Responses of 1, 2 and 3 tokens with means 0, 1 and 2: 8 / 6.
    assert table["kl_policy"].tolist() == pytest.approx([8 / 6] * 2)


@pytest.mark.parametrize("samples", [1, 2])
def test_95_percent_intervals_cover(samples):
    """Agreement is a share of a response's tokens, divergences are skewed, and responses to one prompt correlate."""
    generator, n_prompts, n_layers, hits = np.random.default_rng(samples), 60, 30, []
    for _ in range(40):
        prompts = np.repeat(np.arange(n_prompts), samples)
        counts = np.clip(np.round(60 * np.exp(0.5 * generator.standard_normal(len(prompts)))), 4, 400).astype(int)
        responses = [Response(f"p{p}", "r", [p] + [1] * n, 1, None) for p, n in zip(prompts, counts, strict=True)]
        level = generator.beta(3, 2, (n_prompts, n_layers))[prompts]
        skewed = np.exp(0.5 * generator.standard_normal((n_prompts, n_layers)))[prompts]
        arrays = {
            "index": np.arange(len(responses)),
            "top1": generator.binomial(counts[:, None], level) / counts[:, None],
            "kl_policy": skewed * generator.gamma(8, 1 / 8, skewed.shape),
            "kl_next": skewed,
            "matrix": np.zeros((len(responses), n_layers, n_layers)),
        }
        table = divergences.tabulate([arrays], responses)["divergences"]
        # The means of Beta(3, 2) and of the lognormal.
        for name, truth in (("top1", 0.6), ("kl_policy", np.exp(0.125)), ("kl_next", np.exp(0.125))):
            hits.append(((table[f"{name}_low"] <= truth) & (truth <= table[f"{name}_high"])).mean())
    shares = np.reshape(hits, (40, 3)).mean(axis=0)
    # The Monte Carlo error of a share of 1200 is 0.006.
    assert (shares >= 0.93).all()
    assert (shares <= 0.97).all()


def table_of(top1):
    return pd.DataFrame({"layer": range(1, len(top1) + 1), "top1": top1, "kl_policy": [2.0, 1.5, 0.25, 0.125]})


def test_what_is_said_of_the_agreement():
    assert divergence_remark(table_of([0.1, 0.6, 0.4, 0.9])) == (
        "from layer 4 on the top token is that of π_θ in at least half of the tokens (90% there, with KL(π_θ‖π^l) "
        "0.125 nats)"
    )
    assert divergence_remark(table_of([0.5, 0.6, 0.7, 0.9])).startswith("from the first layer on")
    assert divergence_remark(table_of([0.1, 0.6, 0.7, 0.4])).startswith("not even the last layer shares the top token")
    found = run()
    assert divergence_remark(found.additions["divergences"]) in remarks(found)
    assert len(remarks(analyze(tiny_model("llama"), tiny_tokenizer(), responses=ragged_responses(2)))) == 1


def test_figure_data_are_the_tables():
    found = run()
    frame = divergence_data([found, found])
    assert frame["panel"].value_counts().tolist() == [9, 9]
    own = frame[(frame["panel"] == 2) & (frame["quantity"] == "kl_next")]
    for column, name in (("value", "kl_next"), ("stderr", "kl_next_stderr"), ("high", "kl_next_high")):
        np.testing.assert_array_equal(own[column], found.additions["divergences"][name])
    np.testing.assert_array_equal(divergence_matrix_data(found)["kl"], found.additions["divergence_matrix"]["kl"])


@pytest.mark.slow
def test_figures_are_drawn_again_from_disk(tmp_path):
    analysis = run(tmp_path / "data")
    run_command(["figures", str(analysis.path), "--output", str(tmp_path / "figures")])
    drawn = {path.name for path in (tmp_path / "figures").glob("*/*")}
    assert {f"{stem}.{kind}" for stem in ("divergences", "divergence_matrix") for kind in ("png", "pdf")} <= drawn
