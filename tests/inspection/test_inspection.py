"""Inspection of one prompt: parity with the definitions, families, token texts, stored files and invalid input."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import reference, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

from internal_policy import Inspection, UserError, inspect, models
from internal_policy.cli import main as cli
from internal_policy.data.prompts import Prompt
from internal_policy.data.token_text import texts_of, visible
from internal_policy.entropy import reference as definition
from internal_policy.generation import Request, sample
from internal_policy.inspection.config import slug
from internal_policy.inspection.policies import look
from internal_policy.models import Projection
from internal_policy.models.families import FAMILIES
from internal_policy.plotting import inspection as figure

# float32 carries 24 bits: logits of size ~10 are off by ~1e-6, an entropy by about as much; 1e-5 leaves room for sums.
FLOAT32_NATS = 1e-5


def tiny(family="llama", **options):
    return tiny_model(family, **options), tiny_tokenizer()


def table(inspection, site, layer=None):
    rows = inspection.values  # noqa: PD011
    rows = rows[rows["site"] == site]
    return rows if layer is None else rows[rows["layer"] == layer]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [{}, {"bias": True, "scale": 0.25}, {"softcap": 3.0}, {"scale": 2.0, "softcap": 5.0}])
@pytest.mark.parametrize("budget", [2**12, 2**27])
def test_blockwise_results_match_the_full_softmax(dtype, own, budget):
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 16, generator=generator).to(dtype) for n in (13, 301))
    bias = torch.randn(301, generator=generator).to(dtype) if own.get("bias") else None
    scale, softcap = own.get("scale", 1.0), own.get("softcap")
    next_ids = torch.randint(0, 301, (13,), generator=generator)
    found = look(states, Projection(weight, bias, scale, softcap, memory_budget=budget), next_ids, 7)
    logits = states.double() @ weight.double().T + (0 if bias is None else bias.double())
    logits = logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)
    p = logits.softmax(-1)
    best = p.sort(dim=-1, descending=True)
    entropy = definition.policy_entropy(
        *(states.double(), weight.double(), None if bias is None else bias.double()), scale=scale, softcap=softcap
    )
    torch.testing.assert_close(found[:, 0].double(), entropy, atol=FLOAT32_NATS, rtol=0)
    torch.testing.assert_close(found[:, 10:].double(), best.values[:, :7], atol=FLOAT32_NATS, rtol=0)  # noqa: PD011
    assert torch.equal(found[:, 3:10].long(), best.indices[:, :7])
    of_next = p.gather(1, next_ids[:, None])
    torch.testing.assert_close(found[:, 2:3].double(), of_next, atol=FLOAT32_NATS, rtol=0)
    assert torch.equal(found[:, 1].long(), 1 + (p > of_next).sum(1))


def test_the_rank_of_a_top_token_is_its_place_in_the_list():
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    state = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    order = (state @ weight.T)[0].argsort(descending=True)
    found = look(state.expand(50, -1), Projection(weight, memory_budget=2**10), order, 50)
    assert found[:, 1].tolist() == list(range(1, 51))
    torch.testing.assert_close(found[:, 2], found[0, 53:], rtol=0, atol=0)


def test_ties_rank_by_token_id_and_single_token_blocks_work():
    found = look(torch.zeros(1, 4), Projection(torch.ones(9, 4)), torch.tensor([3]), 9)
    assert sorted(found[0, 3:12].tolist()) == list(range(9))
    assert found[0, 1] == found[0, 3:12].tolist().index(3) + 1
    assert found[0, 0] == pytest.approx(np.log(9))


def test_entropies_match_the_reference():
    model, tokenizer = tiny()
    it = inspect(model, tokenizer, prompt="w3 w4 w5 w6", response="w9 w8 w7 w11 w3", template="plain")
    ids = it.tokens["id"].tolist()
    rows, policy = reference(model, {"input_ids": ids, "prompt_length": 4})
    at = range(4, 9)
    for layer, row in enumerate(rows, start=1):
        for site in ("layer", "attn", "ffn"):
            ours = table(it, site, layer).set_index("position").loc[at, "entropy"]
            np.testing.assert_allclose(ours, row[f"{site}_out"], atol=FLOAT32_NATS)
    embedding = table(it, "layer", 0).set_index("position").loc[at, "entropy"]
    np.testing.assert_allclose(embedding, rows[0]["layer_in"], atol=FLOAT32_NATS)
    np.testing.assert_allclose(table(it, "policy").set_index("position").loc[at, "entropy"], policy[:, 1], atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_final_policy_of_every_family_is_the_models_output(family):
    model, tokenizer = tiny(family, layers=2)
    it = inspect(model, tokenizer, prompt="w3 w4 w5 w6 w7", max_new_tokens=0, template="plain", top_k=3)
    with torch.no_grad():
        log_p = model(torch.tensor([it.tokens["id"].tolist()])).logits[0].double().log_softmax(-1)
    policy = table(it, "policy")
    assert len(it.values) == 5 * (2 * 3 + 2)
    assert policy["top1_id"].tolist() == log_p.argmax(-1).tolist()
    np.testing.assert_allclose(policy["entropy"], -(log_p.exp() * log_p).sum(-1), atol=FLOAT32_NATS)
    true = torch.tensor(it.tokens["id"].tolist()[1:])[:, None]
    np.testing.assert_allclose(policy["next_probability"][:-1], log_p[:-1].gather(1, true)[:, 0].exp(), atol=1e-6)
    assert policy["next_rank"].tolist()[:-1] == (1 + (log_p[:-1] > log_p[:-1].gather(1, true)).sum(1)).tolist()
    assert policy[["next_id", "next_rank", "next_probability"]].iloc[-1].isna().all()


def test_under_the_logit_lens_the_last_layer_is_the_final_policy():
    model, tokenizer = tiny()
    plain, lens = (
        inspect(model, tokenizer, prompt="w3 w4 w5", max_new_tokens=0, lens=name) for name in ("policy", "logit-lens")
    )
    columns = ["position", "entropy", "next_rank", "top1_id", "top2_id", "top5_probability"]
    last, final = (table(lens, site, 3)[columns].reset_index(drop=True) for site in ("layer", "policy"))
    pd.testing.assert_frame_equal(last, final)
    pd.testing.assert_frame_equal(table(plain, "policy")[columns], table(lens, "policy")[columns])
    assert not np.allclose(table(plain, "layer", 3)["entropy"], last["entropy"], atol=1e-3)


def test_a_sampled_response_matches_generation_and_keeps_the_training_mode():
    model, tokenizer = tiny("qwen3")
    model.train()
    options = {"prompt": "w3 w4", "max_new_tokens": 6, "seed": 3}
    it = inspect(model, tokenizer, **options)
    assert model.training
    wrapped = models.wrap(model, tokenizer)
    (sampled,) = sample(wrapped, [Request(Prompt("w3 w4"), [3, 4], 0, 0)], max_new_tokens=6, temperature=1.0, seed=3)
    assert it.tokens["id"].tolist() == sampled.input_ids
    assert (it.prompt_length, it.n_tokens) == (2, len(sampled.input_ids))
    assert it.tokens["part"].tolist() == ["prompt"] * 2 + ["response"] * (it.n_tokens - 2)
    given = inspect(model, tokenizer, prompt="w3 w4", response=" ".join(it.tokens["token"][2:]))
    pd.testing.assert_frame_equal(given.values, it.values)
    assert inspect(model, tokenizer, **{**options, "seed": 4}).tokens["id"].tolist() != it.tokens["id"].tolist()


def test_saving_and_loading_an_inspection(tmp_path):
    model, tokenizer = tiny()
    it = inspect(model, tokenizer, prompt="w3 w4", max_new_tokens=3, top_k=99)
    assert it.top_k == 61
    it.save(tmp_path / "one")
    again = Inspection.load(tmp_path)
    pd.testing.assert_frame_equal(again.values, it.values)
    pd.testing.assert_frame_equal(again.tokens, it.tokens)
    assert (again.name, again.model, again.config) == (it.name, it.model, it.config)
    assert "3 layers" in repr(again)
    it.save(tmp_path / "two")
    with pytest.raises(UserError, match=r"2 inspections \(one, two\)"):
        Inspection.load(tmp_path)
    manifest = tmp_path / "one" / "inspection.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        Inspection.load(tmp_path / "one")
    manifest.unlink()
    with pytest.raises(UserError, match=r"no inspection\.json"):
        Inspection.load(tmp_path / "one")


def test_columns_are_selected_from_the_end_or_by_position():
    model, tokenizer = tiny()
    it = inspect(model, tokenizer, prompt=" ".join(["w5"] * 30), max_new_tokens=0)
    assert it.positions() == range(7, 31)
    assert it.positions(last=99) == it.positions(":") == range(1, 31)
    assert it.positions("5:9") == it.positions((5, 9)) == range(5, 10)
    assert it.positions("28:") == it.positions("28:40") == range(28, 31)
    for tokens, last, message in (
        ("31:", None, "31:30 of 30"),
        ("9:5", None, "is '9:5'; needed are places from 1"),
        ("0:5", None, "is '0:5'; needed are places from 1"),
        ("five", None, "FIRST:LAST"),
        ("1:2", 3, "both --tokens and --last"),
        (None, 0, "--last is 0"),
    ):
        with pytest.raises(UserError, match=message):
            it.positions(tokens, last)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate([*alphabet, "Ġthe", "ĊĊ", "ä¸Ń", "<|end|>", "ä¸"])}
    backend = Tokenizer(token_models.BPE(words, []))
    backend.decoder = decoders.ByteLevel()
    return words, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def sentence_piece():
    pieces = ["<unk>", "▁hello", "hello", "▁", "▁▁▁▁▁▁", "<0x0A>", "<0xE4>", "</s>"]
    words = {word: i for i, word in enumerate(pieces)}
    backend = Tokenizer(token_models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return words, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("make", "piece", "text"),
    [
        (byte_level, "Ġthe", "·the"),
        (byte_level, "ĊĊ", "⏎⏎"),
        (byte_level, "ä¸Ń", "中"),
        (byte_level, "ä¸", "<E4B8>"),
        (byte_level, "Ń", "<AD>"),
        (byte_level, "Ā", "<U+0000>"),
        (byte_level, "<|end|>", "<|end|>"),
        (sentence_piece, "▁hello", "·hello"),
        (sentence_piece, "hello", "hello"),
        (sentence_piece, "▁", "·"),
        (sentence_piece, "▁▁▁▁▁▁", "·×6"),
        (sentence_piece, "<0x0A>", "⏎"),
        (sentence_piece, "<0xE4>", "<E4>"),
        (sentence_piece, "</s>", "</s>"),
    ],
)
def test_byte_level_and_sentencepiece_tokens_are_readable(make, piece, text):
    words, tokenizer = make()
    assert texts_of(tokenizer, [words[piece], 5000]) == {words[piece]: text, 5000: "#5000"}


def test_invisible_characters_are_escaped():
    assert visible("a\tb\r\n") == "a⇥b␍⏎"
    assert visible("\u202e\u200d\u00a0") == "<U+202E><U+200D><U+00A0>"
    assert visible("\u0301") == "◌\u0301"
    assert visible(" " * 3 + "\n" * 4) == "···⏎×4"
    assert visible("中😀$_^שלום") == "中😀$_^שלום"
    assert visible("") == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " "}, "--prompt is an empty text"),
        ({"prompt": "w3", "response": ""}, "--response is an empty text"),
        ({"prompt": "w3", "response": "w4", "max_new_tokens": 4}, "both --response and --max-new-tokens"),
        ({"prompt": "w3", "response": "w4", "temperature": 0.5}, "both --response and --temperature"),
        ({"prompt": "w3", "max_new_tokens": -1}, "--max-new-tokens is -1"),
        ({"prompt": "w3", "top_k": 0}, "--top-k is 0"),
        ({"prompt": "w3", "lens": "other"}, "--lens is 'other'"),
        ({"prompt": "w3", "device": "cpu"}, "device was given with a model object"),
        ({"prompt": "w3 " * 65, "max_new_tokens": 0}, "the prompt: 65 tokens, and the model's context is 64; shorten"),
        ({"prompt": "w3 " * 64}, "64 tokens, and the model's context is 64; shorten it, or give --max-new-tokens 0"),
        ({"prompt": "w3 " * 60, "response": "w3 " * 5}, "prompt and response together: 65 tokens"),
        ({"prompt": "w3", "response": " "}, "the response ' ' has no tokens"),
        ({"prompt": "w99"}, "id 99 is beyond the vocabulary of 61"),
    ],
)
def test_bad_input_is_reported_in_one_line(options, message):
    with pytest.raises(UserError) as caught:
        inspect(tiny_model("llama", layers=1), tiny_tokenizer(vocab=100), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_states_that_overflow_are_refused():
    model, tokenizer = tiny(layers=2)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or inf"):
        inspect(model, tokenizer, prompt="w3", max_new_tokens=0)


def run(*arguments, monkeypatch, cwd, code=0):
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["internal-policy", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code or 0) == code


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "some" / "model"
    tiny_model("llama", layers=2).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("given", [{"backend": "transformer-lens"}, {"backend": "nnsight", "remote": "local"}])
def test_every_backend_gives_the_same_inspection(given):
    model = tiny_model("qwen3", attention="eager")
    hooks, other = (inspect(model, tiny_tokenizer(), prompt="w3 w4 w5", max_new_tokens=4, **k) for k in ({}, given))
    one, two = hooks.values, other.values  # noqa: PD011
    numbers = ["entropy", "next_probability", "top1_probability"]
    # Float32: the same products in another order.
    np.testing.assert_allclose(two[numbers], one[numbers], rtol=0, atol=1e-5)
    assert other.tokens.equals(hooks.tokens)
    assert two["top1_id"].equals(one["top1_id"])


@pytest.mark.slow
def test_inspect_command_and_redrawn_figures(saved, tmp_path, monkeypatch, capsys):
    command = ("inspect", "--model", saved, "-p", "w3 w4 w5", "--response", "w6 w7", "--site", "ffn", "--last", 2)
    run(*command, monkeypatch=monkeypatch, cwd=tmp_path)
    printed = capsys.readouterr().out
    it = Inspection.load(tmp_path / "data" / "inspections" / "some--model--w3-w4-w5")
    assert it.tokens["token"].tolist() == ["w3", "w4", "w5", "w6", "w7"]
    assert "FFN policies" in printed
    for row in table(it, "ffn", 2).tail(2).itertuples():
        assert row.top1_token in printed
        assert f"{row.entropy:.2f}" in printed
    assert "data/inspections/some--model--w3-w4-w5/ (values.parquet, tokens.csv, inspection.json)" in printed
    figures = tmp_path / "figures" / "some--model--w3-w4-w5"
    names = [f"inspect_{site}.{kind}" for site in ("attn", "ffn", "layer") for kind in ("pdf", "png")]
    assert sorted(p.name for p in figures.iterdir()) == names
    drawn = []

    def save_all(it, directory, **options):
        drawn.append((it, directory))
        return [directory / "inspect_layer.png"]

    monkeypatch.setattr(figure, "save_inspection_figures", save_all)
    run("figures", "data/inspections", "-o", "again", monkeypatch=monkeypatch, cwd=tmp_path)
    ((again, where),) = drawn
    pd.testing.assert_frame_equal(again.values, it.values)
    assert where.as_posix() == "again/some--model--w3-w4-w5"


def test_inspections_of_several_prompts_coexist_and_a_repeated_one_is_replaced(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(
        figure, "save_inspection_figures", lambda look, directory, **_: [directory / "inspect_layer.png"]
    )
    for prompt, answer in (("w3 w4", "w6"), ("w3, w4", "w6"), ("w3 w4", "w7"), ("w3 w4", "w6"), ("w5 " * 30, "w6")):
        command = ("inspect", "--model", saved, "-p", prompt, "--response", answer)
        run(*command, "--quiet", monkeypatch=monkeypatch, cwd=tmp_path)
    root = tmp_path / "data" / "inspections"
    names = ["some--model--w3-w4", "some--model--w3-w4-2", "some--model--w3-w4-3"]
    long = "some--model--" + "w5-" * 13 + "w"
    assert sorted(path.name for path in root.iterdir()) == [*names, long]
    configs = [Inspection.load(root / name).config for name in names]
    assert [(c["prompt"], c["response"]) for c in configs] == [("w3 w4", "w6"), ("w3, w4", "w6"), ("w3 w4", "w7")]
    assert (slug("?! =;"), slug("é 中文_")) == ("prompt", "é-中文")


@pytest.mark.parametrize(
    ("texts", "warnings"),
    [
        ({"prompt": "w3 what w4", "response": "w6"}, ["its tokenizer does not know 'what' of the prompt and"]),
        ({"prompt": "w3", "response": "w6 oh w7 oh"}, ["its tokenizer does not know 'oh' of the response and"]),
        ({"prompt": "a b c d e f g h i j b"}, ["'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h' and 2 more of"]),
        ({"prompt": [{"role": "user", "content": "w3 it"}]}, ["not know 'it' of the prompt"]),
        ({"prompt": "w3 <eos> w4", "response": "w6 w7"}, []),
    ],
)
def test_unknown_text_is_named(texts, warnings, caplog):
    own = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, **own)
    inspect(tiny_model("llama", layers=1), tokenizer, max_new_tokens=None if "response" in texts else 0, **texts)
    assert len(caplog.messages) == len(warnings)
    assert all(part in message for part, message in zip(warnings, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing: --prompt"),
        (["-p", " "], "--prompt is an empty text"),
        (["-p", "w3", "--response", "w4", "--max-new-tokens", 3], "both --response and --max-new-tokens were given"),
        (["-p", "w3", "--tokens", "3-4"], "--tokens is '3-4'; needed is FIRST:LAST"),
        # Refused before the model is looked up.
        (["-p", "w3", "--tokens", "9:3", "-m", "./nowhere"], "--tokens is '9:3'; needed are places from 1, the lower"),
        (["-p", "w3", "--tokens", ":0", "-m", "./nowhere"], "--tokens is ':0'; needed are places from 1"),
        (["-p", "w3", "--tokens", "2:", "--max-new-tokens", 0], "--tokens is 2:1 of 1 tokens"),
        (["-p", "w3", "--last", 0], "--last is 0"),
        (["-p", "w3", "--site", "mlp"], "--site is 'mlp'; needed is one of"),
        (["-p", "w3", "--template", "none"], "--template is 'none'"),
        (["-p", "w3 " * 64], "the model's context is 64"),
        (["-p", "w3", "--model", "nowhere/at-all"], "no such model on the hub, or no network"),
        (["-p", "w3", "--model", "testbed/mistral"], "no testbed model is called"),
        (["-p", "w3", "-o", "taken"], "taken/some--model--w3: is in use for something else (it holds mine.txt)"),
    ],
)
def test_bad_input_on_the_command_line(arguments, message, saved, tmp_path, monkeypatch, capsys):
    taken = tmp_path / "taken" / "some--model--w3"
    taken.mkdir(parents=True)
    (taken / "mine.txt").write_text("mine")
    run("inspect", "--model", saved, *arguments, monkeypatch=monkeypatch, cwd=tmp_path, code=2)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert printed.out == ""
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [taken / "mine.txt"]
