"""Ablations from the model to the table: statistics, sampling, storage, resumption and refusals."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import refused, save
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import Ablation, UserError, ablate, analyze, models
from internal_policy.cli.display_interventions import show_ablation
from internal_policy.interventions import ablation as pipeline
from internal_policy.interventions import tables
from internal_policy.interventions.config import AblateConfig

# An analysis computes entropies in other blocks of the vocabulary; float32.
FLOAT32_NATS = 1e-5


@pytest.fixture(scope="module")
def sampled():
    return ablate("testbed/qwen3", max_responses=8, samples_per_prompt=2, layers="2,8")


@pytest.fixture(scope="module")
def sequences(sampled):
    return sampled.sequences.head(4)


def tiny(**options):
    return tiny_model("llama"), tiny_tokenizer(), options


@pytest.mark.slow
def test_ablating_everything_above_a_layer_gives_the_entropy_of_its_logit_lens(sequences):
    lens = analyze("testbed/qwen3", responses=sequences, lens="logit-lens").responses
    for layer in (4, 7):
        found = ablate("testbed/qwen3", responses=sequences, layers=range(layer + 1, 9), sites="layer", together=True)
        wanted = lens[(lens["layer"] == layer) & (lens["site"] == "layer")].sort_values("response")["entropy_out"]
        own = found.responses["entropy"] + found.responses["entropy_change"]
        np.testing.assert_allclose(own, wanted, rtol=0, atol=FLOAT32_NATS)
        if layer == 4:
            assert found.table[found.keys].to_dict("records") == [
                {"layer": 5, "last_layer": 8, "site": "layer", "how": "zero"}
            ]
    # All layers but none above: the clean policy is that of the last layer.
    policy = lens[lens["site"] == "policy"].sort_values("response")["entropy_out"]
    np.testing.assert_allclose(found.responses["entropy"], policy, rtol=0, atol=FLOAT32_NATS)


def test_scaling_by_one_leaves_a_table_of_zeros(sequences):
    found = ablate("testbed/qwen3", responses=sequences, sites="attn,ffn,layer", how="scale", alpha=1)
    assert len(found.table) == 24
    assert not found.responses[list(tables.QUANTITIES)].to_numpy().any()
    assert not found.table[list(tables.QUANTITIES)].to_numpy().any()


def test_the_table_has_token_means_clustered_by_prompt(sampled):
    assert sampled.table[["layer", "site"]].to_numpy().tolist() == [
        [layer, site] for layer in (2, 8) for site in ("attn", "ffn")
    ]
    for row in sampled.table.to_dict("records"):
        own = sampled.responses.query("layer == @row['layer'] and site == @row['site']")
        tokens, values = own["n_tokens"].to_numpy(), own["kl"].to_numpy()
        mean = (tokens * values).sum() / tokens.sum()
        totals = pd.DataFrame({"s": tokens * values, "n": tokens}).groupby(own["prompt"].to_numpy()).sum()
        count = len(totals)
        scatter = ((totals["s"] - mean * totals["n"]) ** 2).sum() * count / (count - 1) / tokens.sum() ** 2
        assert count == 4
        assert row["kl"] == pytest.approx(mean, rel=1e-12)
        assert row["kl_stderr"] == pytest.approx(scatter**0.5, rel=1e-9)
        assert row["kl_low"] < row["kl"] < row["kl_high"]
        assert row["n_tokens"] == tokens.sum() == sampled.n_tokens
    clean = sampled.responses.drop_duplicates("response")
    mean = (clean["n_tokens"] * clean["entropy"]).sum() / clean["n_tokens"].sum()
    assert sampled.clean["entropy"] == pytest.approx(mean)


@pytest.mark.slow
def test_heads_add_rows_and_the_bias_is_no_head(sequences):
    found = ablate("testbed/qwen3", responses=sequences.head(2), head="2-3", layers=[1, 8], how="zero,mean")
    assert found.keys == ["layer", "site", "head", "how"]
    assert found.table[["layer", "head", "how"]].to_numpy().tolist() == [
        [layer, head, how] for layer in (1, 8) for how in ("zero", "mean") for head in (2, 3)
    ]
    together = ablate("testbed/qwen3", responses=sequences.head(2), head="all", layers=8, together=True)
    whole = ablate("testbed/qwen3", responses=sequences.head(2), sites="attn", layers=8)
    # Without a bias the heads are all of the attention.
    np.testing.assert_allclose(together.table["kl"], whole.table["kl"], rtol=0, atol=FLOAT32_NATS)


def test_experts_of_layers_that_have_some():
    model = tiny_model("deepseek_v3")
    found = ablate(model, tiny_tokenizer(), responses=ragged_responses(2), expert="all")
    # The first layer is dense.
    assert found.table[["layer", "expert"]].to_numpy().tolist() == [[n, e] for n in (2, 3) for e in (1, 2, 3, 4)]
    assert (found.table["kl"] >= 0).all()
    assert found.table["kl"].max() > 1e-3


def test_parts_that_are_changed_together_are_kept_in_the_table(tmp_path):
    model, records = tiny_model("deepseek_v3"), ragged_responses(2)
    experts = ablate(model, tiny_tokenizer(), responses=records, expert="1-2,4", layers=2, together=True)
    assert experts.table[experts.keys].to_dict("records") == [
        {"layer": 2, "site": "ffn", "expert": "1-2,4", "how": "zero"}
    ]
    options = {"head": "1-2", "how": "zero,mean", "together": True}
    heads = ablate(tiny_model("llama"), tiny_tokenizer(), responses=records, layers="1,3", output=tmp_path, **options)
    assert heads.keys == ["layer", "last_layer", "site", "head", "how"]
    assert heads.table["head"].tolist() == ["1-2", "1-2"]
    pd.testing.assert_frame_equal(Ablation.load(tmp_path).table, heads.table, check_exact=True)


def test_samples_are_generated_under_the_intervention():
    # At temperature 0, so that the same tokens follow from the model with a hook written here.
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = [{"prompt": f"w{3 + i} w{9 + i} w5", "answer": str(i)} for i in range(5)]
    settings = {"prompts": prompts, "template": "plain", "max_new_tokens": 6, "temperature": 0, "samples": 1}
    found = ablate(model, tokenizer, layers=2, sites="ffn", reward=starts_even, **settings)
    wrapped = models.wrap(model, tokenizer)
    handle = wrapped.layers[1].mlp.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
    for number in (1, 0):
        rows = found.samples[found.samples["intervention"] == number]
        for row, prompt in zip(rows.to_dict("records"), prompts, strict=True):
            ids = torch.tensor([tokenizer(prompt["prompt"], add_special_tokens=False)["input_ids"]])
            out = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=1)[0, ids.shape[1] :]
            assert row["response"] == tokenizer.decode(out, skip_special_tokens=True)
        handle.remove()
    shares = found.samples.assign(right=found.samples["score"] >= 1).groupby("intervention")["right"].mean()
    assert found.table["accuracy"].tolist() == [shares[1]]
    assert found.table["accuracy_change"].tolist() == pytest.approx([shares[1] - shares[0]])
    assert found.clean["accuracy"] == shares[0]
    same = ablate(model, tokenizer, layers=2, how="scale", alpha=1, reward=starts_even, **settings)
    assert same.config["reward_code"] == found.config["reward_code"] is not None
    assert (same.table["accuracy_change"] == 0).all()


def starts_even(completions, **_):
    return [float(sum(map(ord, text)) % 2 == 0) for text in completions]


def fragile(completions, **_):
    if any("w7" in text for text in completions):
        raise ValueError("w7")
    return [1.0] * len(completions)


def test_failures_of_the_reward_are_counted_by_intervention_and_shown(tmp_path, monkeypatch, capsys):
    prompts = [{"prompt": f"w{3 + i} w5", "answer": "1"} for i in range(6)]
    options = {"prompts": prompts, "template": "plain", "max_new_tokens": 8, "samples": 4, "reward": fragile}
    found = ablate(tiny_model("llama"), tiny_tokenizer(), output=tmp_path, layers=1, batch_size=5, **options)
    wrong = found.samples[found.samples["response"].str.contains("w7")].groupby("intervention").size()
    assert len(wrong) > 1
    assert found.failures == {number: {"crashes": n} for number, n in wrong.items()}
    assert found.clean["accuracy"] == pytest.approx(1 - wrong.get(0, 0) / 24)
    assert Ablation.load(tmp_path).failures == found.failures
    monkeypatch.setenv("COLUMNS", "500")
    show_ablation(replace(found, failures={0: {"crashes": 2}, 2: {"crashes": 1, "timeouts": 3}}))
    assert (
        "the verifier failed on some responses, which count as wrong: without a change: 2 crashes; layer 1, FFN: "
        "1 crashes, 3 timeouts"
    ) in capsys.readouterr().out
    show_ablation(replace(found, failures={}))
    assert "verifier" not in capsys.readouterr().out


def test_a_stored_ablation_is_read_as_it_was_written(tmp_path, sampled):
    model, tokenizer, _ = tiny()
    prompts = [{"prompt": f"w{3 + i} w5", "answer": "1"} for i in range(4)]
    options = {"prompts": prompts, "template": "plain", "max_new_tokens": 5, "samples": 2, "reward": "exact"}
    found = ablate(model, tokenizer, output=tmp_path, layers=1, **options)
    for each in (found, sampled):
        loaded = Ablation.load(each.save(tmp_path / "again"))
        for name in ("table", "responses", "sequences", "samples"):
            one, other = getattr(each, name), getattr(loaded, name)
            assert (one is None) == (other is None)
            if one is not None:
                pd.testing.assert_frame_equal(one, other, check_exact=True, check_dtype=name != "sequences")
        assert loaded.clean == pytest.approx(each.clean, nan_ok=True)
    assert "Ablation" in sampled._repr_html_()
    assert "8 responses" in repr(sampled)


def test_an_interrupted_ablation_is_resumed(tmp_path, monkeypatch):
    model, tokenizer, _ = tiny()
    options = {"responses": ragged_responses(10), "batch_size": 2, "how": "zero,mean,resample"}
    wanted = ablate(model, tokenizer, **options)
    measured, own = [], pipeline.measure_effects

    def interrupted(model, interventions, responses, means, donors):
        measured.append(len(responses))
        if len(measured) == 4:
            raise KeyboardInterrupt
        return own(model, interventions, responses, means, donors)

    monkeypatch.setattr(pipeline, "measure_effects", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablate(model, tokenizer, output=tmp_path, **options)
    assert not list(tmp_path.rglob("ablation.json"))
    with pytest.raises(UserError, match="holds an unfinished ablation with other settings"):
        ablate(model, tokenizer, output=tmp_path, layers=1, **options)
    found = ablate(model, tokenizer, output=tmp_path, **options)
    # Three batches were done, and two are left.
    assert len(measured) == 4 + 2
    pd.testing.assert_frame_equal(found.table, wanted.table, check_exact=True)
    pd.testing.assert_frame_equal(found.responses, wanted.responses, check_exact=True)
    again = ablate(model, tokenizer, output=tmp_path, **options)
    assert len(measured) == 6
    pd.testing.assert_frame_equal(again.table, wanted.table, check_exact=True)
    with pytest.raises(UserError, match="already holds an ablation with other settings"):
        ablate(model, tokenizer, output=tmp_path, layers=1, **options)


@pytest.mark.slow
def test_a_killed_command_is_resumed(tmp_path):
    command = [sys.executable, "-m", "internal_policy.cli", "ablate", "--max-responses", "96", "--batch-size", "4"]

    def start(output):
        words = [*command, "--output", str(output)]
        return subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    process = start("killed")
    while len(list(tmp_path.glob("killed/*/work/effects-*.npz"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(tmp_path.rglob("ablation.json"))
    for output in ("killed", "whole"):
        last = start(output)
        _, stderr = last.communicate(timeout=300)
        assert last.returncode == 0, stderr
        assert ("resuming an unfinished ablation" in stderr) == (output == "killed")
    one, other = Ablation.load(tmp_path / "killed"), Ablation.load(tmp_path / "whole")
    pd.testing.assert_frame_equal(one.table, other.table, check_exact=True)
    assert not list(tmp_path.rglob("work"))


@pytest.mark.slow
def test_all_layers_of_an_embedded_model_take_less_than_a_minute():
    # Processor time, which does not depend on what else runs here; two threads at most double it.
    started = time.process_time()
    assert len(ablate("testbed/qwen3", layers="all").table) == 16
    assert time.process_time() - started < 60


REFUSED = {
    "a layer that does not exist": (("--layers", "9"), "--layers asks for 9 of 8 layers; needed are numbers from 1"),
    "no layer": (("--layers", "0"), "--layers is '0'; needed is all, or numbers from 1 and ranges"),
    "a head that does not exist": (("--head", "5"), "--head asks for 5 of 4 heads"),
    "no experts": (("--expert", "1"), "this model has no routed experts"),
    "a site that does not exist": (("--sites", "mlp"), "--sites is 'mlp'; needed is one of attn, ffn, layer"),
    "a way that does not exist": (("--how", "noise"), "--how is 'noise'; needed is one of zero, mean"),
    "no factor": (("--how", "scale"), "--how scale needs the factor; give --alpha"),
    "a factor for nothing": (("--alpha", "2"), "--alpha 2 was given with --how zero"),
    "heads of the FFN": (("--head", "1", "--sites", "ffn"), "which is a part of attn; leave it out"),
    "heads and experts": (("--head", "1", "--expert", "1"), "both --head and --expert were given"),
    "an expert's mean": (("--expert", "1", "--how", "mean"), "an expert writes only where the router chose it"),
    "samples that are resampled": (("--samples", "1", "--how", "resample"), "use zero, mean or scale"),
    "a reward for nothing": (("--reward", "exact"), "--reward exact was given without --samples"),
    "equal samples": (("--samples", "2", "--temperature", "0"), "where all of them are equal"),
    "a write changed twice": (("--together", "--sites", "ffn,layer"), "would change a write twice"),
    "no other prompt": (("--max-responses", "1", "--how", "resample"), "needs responses to at least two prompts"),
    "another backend": (("--backend", "nnsight"), "no such option: --backend"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case, tmp_path):
    words, message = REFUSED[case]
    assert message in refused("ablate", *words, cwd=tmp_path, began=case == "no other prompt")


def test_bad_inputs_of_other_models(tmp_path):
    mixture = tiny_model("deepseek_v3"), tiny_tokenizer()
    records = ragged_responses(2)
    with pytest.raises(UserError, match=r"layer 1 has no routed experts; they are in layers 2 to 3"):
        ablate(*mixture, responses=records, expert=1, layers=1)
    with pytest.raises(UserError, match="--expert asks for 5 of 4 experts"):
        ablate(*mixture, responses=records, expert=5)
    with pytest.raises(UserError, match="--samples was given with --responses, which have no reference answers"):
        ablate(*mixture, responses=records, samples=1)
    with pytest.raises(UserError, match="--samples needs reference answers, and 1 of 2 prompts have none"):
        ablate(*mixture, prompts=[{"prompt": "w3", "answer": "1"}, {"prompt": "w4"}], samples=1, template="plain")
    with pytest.raises(UserError, match="--sites is 3; needed is a value or a list of values"):
        ablate(*mixture, responses=records, sites=3)
    with pytest.raises(UserError, match="unknown option 'layer'"):
        ablate(*mixture, responses=records, layer=1)
    directory = save(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "one.jsonl").write_text('{"input_ids": [2, 3, 4], "prompt_length": 1}\n')
    words = ("ablate", "--model", directory, "--responses", "one.jsonl", "--how", "resample")
    assert "needs responses to at least two prompts, and there is 1" in refused(*words, cwd=tmp_path, began=True)


def test_models_of_other_libraries_are_refused():
    transformer_lens = pytest.importorskip("transformer_lens.model_bridge.sources")
    model = tiny_model("llama", attention="eager")
    bridge = transformer_lens.build_bridge_from_module(
        model, type(model).__name__, hf_config=model.config, model_name="mine"
    )
    with pytest.raises(UserError, match="a model of transformer-lens was given, and interventions are made by PyTorch"):
        ablate(bridge, tiny_tokenizer(), responses=ragged_responses(2))


def test_settings_are_compared_in_one_form():
    one, other = (AblateConfig(layers=layers, sites=sites) for layers, sites in (("2-4", "ffn"), ([4, 2, 3], ("ffn",))))
    assert one.cache_key() == other.cache_key()
    assert one.slug == "testbed--qwen3--zero"
    assert AblateConfig(how="scale", alpha=0.5, head="all").slug == "testbed--qwen3--scale-0.5--heads"
