"""The embedded models in depth: parity with the definition on real weights, and the demo from the command line."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys

import measure
import numpy as np
import pytest
import torch
from tiny import reference

from internal_policy import Analysis, analyze
from internal_policy.data.prompts import read_prompts, render
from internal_policy.extractors import QUANTITIES, HookExtractor, Reducer, reduce_responses
from internal_policy.generation import Request, sample
from internal_policy.models import load, testbed
from internal_policy.statistics import confidence_interval

# Trained weights give states some hundred times larger than random ones, and float32 logits as much coarser.
EMBEDDED_NATS = 1e-4


@pytest.fixture(scope="module", params=testbed.NAMES)
def model(request):
    return load(request.param)


@pytest.fixture(scope="module")
def responses(model):
    prompts = read_prompts("testbed", limit=6)
    requests = [Request(p, render(p, "chat", model.tokenizer), i, 0) for i, p in enumerate(prompts)]
    return sample(model, requests, max_new_tokens=64, temperature=1.0, seed=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_parity_with_the_definition_in_float64(model, responses, side):
    oracle = copy.deepcopy(model.model)
    for response, values in zip(
        responses, reduce_responses(Reducer(HookExtractor(model), "policy"), responses, side), strict=True
    ):
        record = {"input_ids": response.input_ids, "prompt_length": response.prompt_length}
        rows, policy = reference(oracle, record)
        for layer, row in enumerate(rows):
            for q, name in enumerate(QUANTITIES):
                np.testing.assert_allclose(
                    values.layers[:, layer, q],
                    row[name],
                    rtol=0,
                    atol=EMBEDDED_NATS,
                    err_msg=f"layer {layer + 1} {name}",
                )
        np.testing.assert_allclose(values.policy, policy, rtol=0, atol=EMBEDDED_NATS)


def test_policy_entropy_matches_the_models_logits(model, responses):
    values = reduce_responses(Reducer(HookExtractor(model), "policy"), responses)
    for response, mine in zip(responses, values, strict=True):
        with torch.no_grad():
            logits = model.model(torch.tensor([response.input_ids]), use_cache=False).logits[0]
        own = torch.distributions.Categorical(logits=logits.double()).entropy()[response.prompt_length - 1 : -1]
        np.testing.assert_allclose(mine.policy[:, 1], own.numpy(), rtol=0, atol=EMBEDDED_NATS)


def test_the_model_cards_own_measurement_agrees(model, responses):
    # measure.py is a second implementation, one response at a time in float32, that shares no code with the capture.
    pairs = [(r.input_ids[: r.prompt_length], r.input_ids[r.prompt_length :]) for r in responses]
    card = measure.curves(model.model, pairs)
    records = [{"input_ids": r.input_ids, "prompt_length": r.prompt_length} for r in responses]
    analysis = analyze(model.model, tokenizer=model.tokenizer, responses=records)
    for name, site, column in (
        ("H_layer", "layer", "entropy_out"),
        ("H_attn", "attn", "entropy_out"),
        ("H_ffn", "ffn", "entropy_out"),
        ("dH_attn", "attn", "change"),
        ("dH_ffn", "ffn", "change"),
    ):
        # The card's numbers are rounded to four decimals.
        np.testing.assert_allclose(analysis.curve(site, column), card[name], rtol=0, atol=EMBEDDED_NATS + 5e-5)


def test_analysis_of_an_embedded_model_is_plausible(model):
    analysis = analyze(model.name, max_responses=24)
    assert analysis.n_layers == len(model.layers)
    assert analysis.layers["entropy_out"].between(0, math.log(analysis.vocab_size) + 1e-5).all()
    assert analysis.sequences["reward"].isin([0.0, 1.0]).all()
    assert analysis.layers["change_stderr"].gt(0).all()
    assert 0 < analysis.policy_entropy["mean"] < 1


@pytest.mark.slow
def test_the_demo_writes_everything_and_figures_redraw_to_the_same_bytes(tmp_path):
    names = [f"--model={name}" for name in testbed.NAMES]
    command = [sys.executable, "-m", "internal_policy.cli"]
    shown = subprocess.run(
        [*command, "analyze", *names], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=600
    ).stdout
    for name in testbed.NAMES:
        directory = tmp_path / "data" / "analyses" / name.replace("/", "--")
        analysis = Analysis.load(directory)
        assert f"{name}: 256 responses" in shown
        assert {p.name for p in directory.iterdir()} == {
            *("analysis.json", "layers.csv", "responses.parquet", "tokens.parquet", "responses.jsonl", "report.html")
        }
        assert json.loads((directory / "analysis.json").read_text())["boundary_layer"] == analysis.boundary_layer
    drawn = sorted((tmp_path / "figures").rglob("fig*.*"))
    assert [p.suffix for p in drawn].count(".png") == [p.suffix for p in drawn].count(".pdf") == 3
    before = [p.read_bytes() for p in drawn]
    analyses = [str(tmp_path / "data" / "analyses" / name.replace("/", "--")) for name in testbed.NAMES]
    subprocess.run([*command, "figures", *analyses], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert [p.read_bytes() for p in drawn] == before


@pytest.mark.slow
def test_intervals_of_the_parts_of_a_change_cover_the_population(model):
    """Prompts are drawn from a population, whose means are known exactly: the analysed ones, without their outliers."""
    responses = analyze(model.name).responses
    responses = responses[responses["site"] != "policy"]
    quantities = ("change_direction", "change_scale", "rms_out")
    wide = responses.pivot_table(index="response", columns=["site", "layer"], values=list(quantities))
    tokens = responses.drop_duplicates("response").set_index("response")["n_tokens"].to_numpy(dtype=float)
    values = wide.to_numpy()
    # No interval covers a mean that one response in 256 decides, which most draws of 64 miss: there is one in qwen3.
    values = np.clip(values, *np.quantile(values, [0.01, 0.99], axis=0))
    population = (values * tokens[:, None]).sum(axis=0) / tokens.sum()
    draw, covered = np.random.default_rng(0), []
    for _ in range(500):
        chosen = draw.integers(0, len(values), 64)
        low, high = confidence_interval(values[chosen], tokens[chosen], np.arange(64))
        covered.append((low <= population) & (population <= high))
    # 3 x 3 x 8 intervals of 500 samples each: their mean coverage is known to about 1%, since layers go together.
    assert 0.93 <= np.mean(covered) <= 0.97
