"""The whole analysis from Python: what it returns, what it writes and what it does not depend on."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ragged_responses, reference, tiny_model, tiny_tokenizer

from internal_policy import Analysis, UserError, analyze
from internal_policy.analysis import pipeline
from internal_policy.analysis.results import SCHEMA_VERSION
from internal_policy.extractors import reduce_responses

PROMPTS = ["w2 w3 w4", "w5 w6", "w7 w8 w9 w10", "w11"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def analysis(model, tokenizer):
    return analyze(model, tokenizer=tokenizer, responses=ragged_responses(6), keep_tokens=2)


def test_means_match_the_definition_over_all_tokens(analysis, model):
    oracle = copy.deepcopy(model)
    found = [reference(oracle, record) for record in ragged_responses(6)]
    sites = {"layer": "layer", "attn": "attn", "ffn": "ffn"}
    for site, prefix in sites.items():
        for layer in range(3):
            row = analysis.layers.query("site == @site and layer == @layer + 1").iloc[0]
            values = {k: np.concatenate([rows[layer][k] for rows, _ in found]) for k in found[0][0][0]}
            # float32 values, summed in float64: the mean is as exact as its terms.
            assert row["entropy_in"] == pytest.approx(values[f"{prefix}_in"].mean(), abs=1e-5)
            assert row["entropy_out"] == pytest.approx(values[f"{prefix}_out"].mean(), abs=1e-5)
            assert row["change"] == pytest.approx((values[f"{prefix}_out"] - values[f"{prefix}_in"]).mean(), abs=1e-5)
            direction = values[f"{prefix}_rescaled"] - values[f"{prefix}_in"]
            assert row["change_direction"] == pytest.approx(direction.mean(), abs=1e-5)
            scale = values[f"{prefix}_out"] - values[f"{prefix}_rescaled"]
            assert row["change_scale"] == pytest.approx(scale.mean(), abs=1e-5)
            for end in ("rms_in", "rms_out"):
                assert row[end] == pytest.approx(values[f"{prefix}_{end}"].mean(), rel=1e-5)
            if site != "layer":
                assert row["cosine"] == pytest.approx(values[f"{prefix}_cosine"].mean(), abs=1e-5)
    policy = np.concatenate([p for _, p in found])
    assert analysis.policy_entropy["final_state_mean"] == pytest.approx(policy[:, 0].mean(), abs=1e-5)
    assert analysis.policy_entropy["mean"] == pytest.approx(policy[:, 1].mean(), abs=1e-5)


def test_tables_have_the_shape_of_the_contract(analysis):
    assert list(analysis.layers.columns[:2]) == ["layer", "site"]
    assert set(analysis.layers["site"]) == {"layer", "attn", "ffn"}
    assert len(analysis.layers) == 3 * 3
    assert len(analysis.responses) == 6 * (3 * 3 + 1)
    lengths = [len(r["input_ids"]) - r["prompt_length"] for r in ragged_responses(6)]
    assert analysis.n_tokens == sum(lengths)
    assert len(analysis.tokens) == sum(lengths[:2]) * (3 * 3 + 1)
    assert analysis.tokens["entropy_out"].dtype == np.float32
    assert len(analysis.stages) == analysis.n_layers == 3
    assert analysis.curve("ffn").index.tolist() == [1, 2, 3]


def test_token_values_average_to_their_response(analysis):
    keys = ["response", "layer", "site"]
    means = analysis.tokens.groupby(keys)[["entropy_in", "entropy_out", "change"]].mean()
    whole = analysis.responses.set_index(keys).loc[means.index, means.columns]
    pd.testing.assert_frame_equal(means.astype(float), whole, check_exact=False, rtol=0, atol=1e-6)


def test_layer_change_is_the_difference_of_neighbouring_layers(analysis):
    out, into = analysis.curve("layer", "entropy_out"), analysis.curve("layer", "entropy_in")
    np.testing.assert_array_equal(into[1:], out[:-1])


def test_saving_and_loading_an_analysis(analysis, tmp_path):
    analysis.save(tmp_path / "a")
    loaded = Analysis.load(tmp_path)
    for name in ("layers", "responses", "tokens", "sequences"):
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(analysis, name), check_exact=True)
    assert loaded.selection == analysis.selection
    assert loaded.policy_entropy == analysis.policy_entropy
    manifest = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert manifest["schema_version"] == SCHEMA_VERSION
    wanted = {"model", "config", "n_responses", "n_tokens", "boundary_layer", "stages", "timings", "policy_entropy"}
    assert wanted <= manifest.keys()


def test_a_newer_or_broken_analysis_is_refused(analysis, tmp_path):
    target = analysis.save(tmp_path / "a")
    manifest = json.loads((target / "analysis.json").read_text())
    (target / "analysis.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99; this version reads 1"):
        Analysis.load(target)
    (target / "analysis.json").write_text("{")
    with pytest.raises(UserError, match="broken analysis"):
        Analysis.load(target)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sampled_analysis_does_not_depend_on_batch_size(model, tokenizer, batch_size):
    options = {"tokenizer": tokenizer, "prompts": PROMPTS, "samples_per_prompt": 2, "max_new_tokens": 10}
    one = analyze(model, batch_size=2, **options)
    other = analyze(model, batch_size=batch_size, **options)
    pd.testing.assert_frame_equal(one.sequences, other.sequences)
    # The same numbers up to float32 rounding of differently shaped products.
    pd.testing.assert_frame_equal(one.layers, other.layers, check_exact=False, rtol=0, atol=1e-5)
    assert sorted(one.responses["prompt"].unique()) == [0, 1, 2, 3]
    assert one.n_responses == 8


def test_the_seed_determines_the_responses(model, tokenizer):
    options = {"tokenizer": tokenizer, "prompts": PROMPTS, "max_new_tokens": 10}
    first, again, other = (analyze(model, seed=s, **options) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(first.layers, again.layers, check_exact=True)
    assert first.sequences["response"].tolist() != other.sequences["response"].tolist()


def test_token_and_response_limits_are_respected(model, tokenizer):
    given = analyze(model, tokenizer=tokenizer, responses=ragged_responses(6), max_responses=2)
    assert given.n_responses == 2
    sampled = analyze(
        model, tokenizer=tokenizer, prompts=PROMPTS, samples_per_prompt=3, max_responses=4, max_new_tokens=2
    )
    assert sampled.n_responses == 4
    assert all(len(row.input_ids) - row.prompt_length <= 2 for row in sampled.sequences.itertuples())


def test_bfloat16_states_are_reduced_in_float32(tokenizer):
    model = tiny_model("llama")
    full = analyze(model, tokenizer=tokenizer, responses=ragged_responses(6))
    half = analyze(model.to(torch.bfloat16), tokenizer=tokenizer, responses=ragged_responses(6))
    assert half.model["dtype"] == "bfloat16"
    # bfloat16 carries 8 bits: states are off by parts in a hundred, entropies of ~4 nats by hundredths.
    np.testing.assert_allclose(half.layers["entropy_out"], full.layers["entropy_out"], rtol=0, atol=0.1)


def test_output_is_written_and_reused(model, tokenizer, tmp_path):
    options = {"tokenizer": tokenizer, "prompts": PROMPTS, "max_new_tokens": 4, "output": tmp_path}
    first = analyze(model, **options)
    assert first.path is not None
    assert first.path.parent == tmp_path
    stamp = (first.path / "analysis.json").stat().st_mtime_ns
    assert analyze(model, **options).path == first.path
    assert (first.path / "analysis.json").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="max_new_tokens 4 -> 5"):
        analyze(model, **{**options, "max_new_tokens": 5})
    with pytest.raises(UserError, match="weights"):
        analyze(tiny_model("qwen3", seed=1), **options)


def test_truncated_responses_are_counted(model, tokenizer, tmp_path):
    analysis = analyze(model, tokenizer, prompts=PROMPTS * 5, max_new_tokens=30, output=tmp_path)
    ended = [ids[-1] == tokenizer.eos_token_id for ids in analysis.sequences["input_ids"]]
    assert 0 < sum(ended) < 20
    assert analysis.n_truncated == 20 - sum(ended)
    assert Analysis.load(tmp_path).n_truncated == analysis.n_truncated
    assert analyze(model, tokenizer, responses=analysis.sequences).n_truncated is None


def test_the_checkpoints_own_limit_of_tokens_is_the_default(tokenizer):
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 3
    analysis = analyze(model, tokenizer, prompts=PROMPTS)
    assert analysis.responses["n_tokens"].max() == 3
    assert analysis.config["token_limit"] == 3


def test_an_interrupted_run_resumes_with_another_batch_size(model, tokenizer, tmp_path, monkeypatch):
    options = {"tokenizer": tokenizer, "prompts": PROMPTS, "max_new_tokens": 8, "samples_per_prompt": 3}
    whole = analyze(model, **options)
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reduce_responses(*arguments)

    monkeypatch.setattr(pipeline, "reduce_responses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        analyze(model, output=tmp_path, batch_size=2, **options)
    assert not list(tmp_path.rglob("analysis.json"))
    resumed = analyze(model, output=tmp_path, batch_size=5, **options)
    # Two of the shards were already stored: 8 of the 12 responses were left, in two batches of at most five.
    assert sum(len(responses) for _, responses in calls[3:]) == 8
    pd.testing.assert_frame_equal(resumed.sequences, whole.sequences)
    pd.testing.assert_frame_equal(resumed.layers, whole.layers, check_exact=False, rtol=0, atol=1e-5)


def test_without_output_nothing_is_written(analysis, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    analyze(tiny_model("llama"), tokenizer=tiny_tokenizer(), responses=ragged_responses(2))
    assert analysis.path is None
    assert not list(tmp_path.iterdir())


def test_the_users_model_is_unchanged(tokenizer):
    model = tiny_model("mistral").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.generation_config
    analyze(model, tokenizer=tokenizer, prompts=PROMPTS, max_new_tokens=3)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.generation_config is config
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "source",
    [
        PROMPTS,
        (p for p in PROMPTS),
        np.array(PROMPTS),
        pd.Series(PROMPTS),
        pd.DataFrame({"prompt": PROMPTS, "answer": None}),
        [[{"role": "user", "content": p}] for p in PROMPTS],
    ],
    ids=["list", "generator", "array", "series", "frame", "chats"],
)
def test_prompts_in_any_container(model, tokenizer, source, tmp_path):
    analysis = analyze(model, tokenizer=tokenizer, prompts=source, max_new_tokens=np.int64(3), seed=np.int64(1))
    wanted = analyze(model, tokenizer=tokenizer, prompts=PROMPTS, max_new_tokens=3, seed=1)
    assert analysis.sequences["input_ids"].tolist() == wanted.sequences["input_ids"].tolist()


def test_paths_and_earlier_analyses_are_accepted_as_sources(model, tokenizer, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": p} for p in PROMPTS]))
    first = analyze(model, tokenizer=tokenizer, prompts=tmp_path / "p.json", max_new_tokens=3)
    first.save(tmp_path / "a")
    for source in (first.sequences, tmp_path / "a" / "responses.jsonl"):
        again = analyze(model, tokenizer=tokenizer, responses=source)
        pd.testing.assert_frame_equal(again.layers, first.layers, check_exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_responses": 2.5}, "--max-responses is 2.5; needed is a whole number"),
        ({"temperature": None}, "--temperature is None; needed is a number"),
        ({"dtype": "bfloat16"}, "dtype was given with a model object"),
        ({"revision": "main"}, "revision was given with a model object"),
        ({"prompts_split": "train"}, "--prompts-split train was given with a local file"),
    ],
)
def test_options_without_effect_are_refused(model, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        analyze(model, tokenizer=tokenizer, prompts=PROMPTS, **options)


def test_each_module_keeps_its_training_mode(tokenizer):
    model = tiny_model("mistral").train()
    model.model.layers[1].eval()
    analyze(model, tokenizer=tokenizer, prompts=PROMPTS, max_new_tokens=2)
    assert model.training
    assert not model.model.layers[1].training
    assert model.model.layers[0].mlp.training


def test_misspelt_options_and_missing_tokenizer_are_reported(model):
    with pytest.raises(UserError, match="unknown option 'max_tokens'"):
        analyze(model, tokenizer=tiny_tokenizer(), prompts=PROMPTS, max_tokens=3)
    with pytest.raises(UserError, match="without its tokenizer"):
        analyze(model, prompts=PROMPTS)
