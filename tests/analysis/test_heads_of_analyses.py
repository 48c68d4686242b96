"""``--heads`` of an analysis: its tables, their errors, resuming, and what cannot be measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Analysis, UserError, analyze, models, statistics
from internal_policy.analysis import heads, remarks
from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.data.responses import Response, prompt_indices, read_responses
from internal_policy.extractors.experts import find_experts
from internal_policy.extractors.heads import find_heads
from internal_policy.extractors.part_means import EXPERT_QUANTITIES, PartReducer
from internal_policy.extractors.parts import PART_QUANTITIES
from internal_policy.models import testbed
from internal_policy.report import analysis_report

RECORDS = ragged_responses(9)


def run(model, directory=None, **options):
    options = {"responses": RECORDS, "batch_size": 2, "keep_tokens": 0, **options}
    return analyze(model, tiny_tokenizer(), output=directory, **options)


def test_the_tables_are_token_means_with_clustered_errors(tmp_path):
    model = tiny_model("qwen2_moe")
    analysis = run(model, tmp_path, heads=True)
    wrapped = models.wrap(model, tiny_tokenizer())
    responses = read_responses(RECORDS, tiny_tokenizer(), "plain")
    found = find_experts(wrapped, (None,) * 3)
    means = PartReducer(find_heads(wrapped), found, "policy")(responses)
    n_tokens, prompts = np.array([r.n_tokens for r in responses]), prompt_indices(responses)
    stored = Analysis.load(analysis.path).additions
    table = stored["heads"].set_index(["layer", "head"])
    assert list(table.index) == [(layer, head) for layer in (1, 2, 3) for head in (1, 2, 3, 4)]
    assert (table["n_tokens"] == n_tokens.sum()).all()
    for (layer, head), row in table.iterrows():
        values = np.stack([m.heads[layer - 1, head - 1] for m in means])
        for i, quantity in enumerate(PART_QUANTITIES):
            # Batches of two and of nine sum in another order.
            assert row[quantity] == pytest.approx(np.average(values[:, i], weights=n_tokens), abs=1e-5)
            _, stderr = statistics.clustered_mean(values[:, i : i + 1], n_tokens, prompts)
            low, high = statistics.confidence_interval(values[:, i : i + 1], n_tokens, prompts)
            ends = row[[f"{quantity}_stderr", f"{quantity}_low", f"{quantity}_high"]]
            np.testing.assert_allclose(ends, [stderr[0], low[0], high[0]], atol=1e-5)
    table = stored["experts"].set_index(["layer", "expert"])
    assert list(table.index) == [(layer, expert) for layer in (1, 2, 3) for expert in range(5)]
    for (layer, expert), row in table.iterrows():
        values = np.stack([m.experts[layer - 1, expert - 1] for m in means])
        routed = values[:, 0] * n_tokens
        assert row["n_tokens"] == round(routed.sum())
        assert row["load"] == pytest.approx(routed.sum() / n_tokens.sum())
        for i, quantity in enumerate(EXPERT_QUANTITIES[1:], start=1):
            chosen = routed > 0
            if quantity == "weight" and expert == 0:
                assert np.isnan(row[quantity])
                continue
            assert row[quantity] == pytest.approx(np.average(values[chosen, i], weights=routed[chosen]), abs=1e-5)
    # Two experts of four for every token, besides the shared ones.
    np.testing.assert_allclose(table["load"].groupby("layer").sum(), 2 + 1)


def test_an_interrupted_measurement_is_resumed(tmp_path, monkeypatch):
    model = tiny_model("gpt_oss")
    whole = run(model, tmp_path / "whole", heads=True)
    reduced = []
    reduce = PartReducer.__call__

    def stop(self, batch):
        if len(reduced) == 2:
            raise KeyboardInterrupt
        reduced.append(len(batch))
        return reduce(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PartReducer, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "stopped", heads=True)
    reduced = [0, 0]
    with monkeypatch.context() as patch:
        patch.setattr(PartReducer, "__call__", lambda self, batch: reduced.append(len(batch)) or reduce(self, batch))
        resumed = run(model, tmp_path / "stopped", heads=True)
    assert sum(reduced) == 9 - 4
    for name in ("heads", "experts"):
        pd.testing.assert_frame_equal(resumed.additions[name], whole.additions[name], check_exact=True)
    assert (resumed.path / "heads.csv").read_bytes() == (whole.path / "heads.csv").read_bytes()
    # gpt_oss has a bias in its output projection.
    assert set(resumed.additions["heads"]["head"]) == {0, 1, 2, 3, 4}


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    model = tiny_model("llama")
    whole = run(model, heads=True)
    reduce, sizes = PartReducer.__call__, []

    def fits_one(self, batch):
        sizes.append(len(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return reduce(self, batch)

    monkeypatch.setattr(PartReducer, "__call__", fits_one)
    halved = run(model, heads=True)
    assert sorted(set(sizes)) == [1, 2]
    np.testing.assert_allclose(halved.additions["heads"], whole.additions["heads"], rtol=1e-4, atol=1e-5)


def test_a_dense_model_has_no_table_of_experts():
    assert set(run(tiny_model("llama"), heads=True).additions) == {"heads"}


def test_heads_are_measured_where_experts_cannot_be(monkeypatch, caplog):
    def refuse(model, norms):
        raise UserError("m: the experts cannot be measured: they are packed")

    monkeypatch.setattr(heads, "find_experts", refuse)
    analysis = run(tiny_model("qwen3_moe"), heads=True)
    assert set(analysis.additions) == {"heads"}
    assert "m: the experts cannot be measured: they are packed; experts.csv is not written" in caplog.text


def test_a_model_whose_heads_cannot_be_measured_is_refused_before_it_is_analysed(tmp_path):
    model = tiny_model("llama")
    model.config.num_attention_heads = 2
    with pytest.raises(UserError, match=r"--heads cannot be measured: .* leave it out"):
        run(model, tmp_path, heads=True)
    assert not list(tmp_path.rglob("analysis.json"))


@pytest.mark.parametrize(
    "options", [{"backend": "transformer-lens"}, {"backend": "nnsight"}, {"backend": "nnsight", "remote": True}]
)
def test_other_backends_are_refused(options):
    with pytest.raises(UserError, match=rf"--heads was given with --backend {options['backend']}; heads are measured"):
        AnalyzeConfig(heads=True, **options)


@pytest.mark.slow
def test_the_terminal_and_the_report_name_the_heads():
    analysis = run(tiny_model("qwen3_moe"), heads=True)
    table = analysis.additions["heads"].sort_values("attribution", key=abs, ascending=False)
    first = table.iloc[0]
    line = next(line for line in remarks.remarks(analysis) if "heads that change" in line)
    start = f"layer {first['layer']:.0f} head {first['head']:.0f} ({first['attribution']:+.3f}), layer"
    assert line.startswith(f"the 3 heads that change the logit of the sampled token most: {start}")
    experts = analysis.additions["experts"]
    busiest = experts.loc[experts["load"].idxmax()]
    line = next(line for line in remarks.remarks(analysis) if "busiest" in line)
    assert f"{busiest['load']:.1%} of the tokens; an even share is 50.0%" in line
    page = analysis_report(analysis)
    assert "Heads and experts</h2>" in page
    for chart in ("heads-entropy", "heads-attribution", "experts-load", "experts-entropy"):
        assert f'id="a1-{chart}"' in page
    plain = analysis_report(run(tiny_model("llama")))
    assert "heads-entropy" not in plain
    assert "Attention heads</h2>" in analysis_report(run(tiny_model("llama"), heads=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", testbed.NAMES)
def test_intervals_of_heads_cover_the_population(name):
    """Prompts are drawn from a population, whose means are known exactly: the analysed ones, without their outliers."""
    sequences = analyze(name, keep_tokens=0).sequences
    responses = [Response(**row) for row in sequences.to_dict("records")]
    means = PartReducer(find_heads(models.load(name)), None, "policy")
    values = np.concatenate([[m.heads.ravel() for m in means(responses[i : i + 32])] for i in range(0, 256, 32)])
    tokens = np.array([r.n_tokens for r in responses], dtype=float)
    # No interval covers a mean that one response in 256 decides, which most draws of 64 miss.
    values = np.clip(values, *np.quantile(values, [0.01, 0.99], axis=0))
    population = (values * tokens[:, None]).sum(axis=0) / tokens.sum()
    draw, covered = np.random.default_rng(0), []
    for _ in range(500):
        chosen = draw.integers(0, len(values), 64)
        low, high = statistics.confidence_interval(values[chosen], tokens[chosen], np.arange(64))
        covered.append((low <= population) & (population <= high))
    # 8 x 4 x 4 intervals of 500 samples each: their mean coverage is known to about 1%, since heads go together.
    assert 0.93 <= np.mean(covered) <= 0.97
