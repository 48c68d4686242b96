"""Activation patching against whole reruns by hand, its storage and its refusals."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from command_line import refused
from test_ablation_effects import states, writer_of
from tiny import slow_unless_fast, tiny_model, tiny_tokenizer

from internal_policy import Patching, UserError, patch
from internal_policy.models.families import FAMILIES as TABLE

# Logits of size ~10 in float32 are off by ~1e-6, and a difference of two by twice that; the reruns are in float32 too.
FLOAT32_NATS = 1e-5
CLEAN, CORRUPTED = [5, 9, 14, 3, 8, 21], [5, 9, 33, 3, 8, 21]


@pytest.fixture(scope="module")
def example():
    return patch("testbed/qwen3", "a=22,b=a-3;b?", "a=21,b=a-3;b?", prefix="b=")


@pytest.mark.parametrize("model_type", slow_unless_fast(TABLE))
def test_every_patch_equals_a_whole_rerun(model_type):
    model = tiny_model(model_type, tied=model_type == "gpt2")
    found = patch(model, CLEAN, CORRUPTED, tiny_tokenizer(), positions="2-4,6", batch_size=3, answer=7, wrong=11)
    clean, corrupted = (torch.tensor([ids]) for ids in (CLEAN, CORRUPTED))

    @torch.no_grad()
    def difference(ids):
        logits = model(ids, use_cache=False).logits[0, -1].double()
        return float(logits[7] - logits[11])

    ends = difference(clean), difference(corrupted)
    assert (found.metric["clean"], found.metric["corrupted"]) == pytest.approx(ends, abs=FLOAT32_NATS)
    assert len(found.values) == 3 * 3 * 4
    with torch.no_grad():
        for row in found.values.to_dict("records"):  # noqa: PD011
            module, at, kept = writer_of(model, model_type, row["layer"], row["site"]), row["position"] - 1, []
            handle = module.register_forward_hook(lambda m, a, out, kept=kept: kept.append(states(out).clone()))
            model(clean, use_cache=False)
            handle.remove()

            def put_in(m, args, out, kept=kept, at=at):
                changed = states(out).clone().reshape(len(CLEAN), -1)
                changed[at] = kept[0].reshape(len(CLEAN), -1)[at]
                changed = changed.reshape(states(out).shape)
                return changed if isinstance(out, torch.Tensor) else (changed, *out[1:])

            handle = module.register_forward_hook(put_in)
            wanted = difference(corrupted)
            handle.remove()
            assert row["value"] == pytest.approx(wanted, abs=FLOAT32_NATS), row
            recovery = (wanted - ends[1]) / (ends[0] - ends[1])
            assert row["recovery"] == pytest.approx(recovery, abs=3 * FLOAT32_NATS / abs(ends[0] - ends[1]))


def test_the_last_state_recovers_all_and_the_prompt_before_the_difference_nothing(example):
    values = example.values.set_index(["site", "layer", "position"])["recovery"]  # noqa: PD011
    assert values["layer", 8, 16] == pytest.approx(1.0, abs=1e-6)
    # The tokens before the one that differs have the same states in both runs.
    before = example.values.query("position < 4")["recovery"]  # noqa: PD011
    assert len(before) == 3 * 8 * 3
    assert before.abs().max() < 1e-6
    # The number that differs carries all of the difference up to layer 6, from where layers 7 and 8 read it.
    assert values["layer", 1, 4] == pytest.approx(1.0, abs=0.01)
    assert values["layer", 8, 4] == pytest.approx(0.0, abs=1e-6)
    assert example.metric["answer_token"] == "22"
    assert example.metric["wrong_token"] == "21"
    assert example.labels()[4] == "22→21"
    assert example.labels()[2] == "a"


def test_the_log_probability_of_the_answer():
    model = tiny_model("llama")
    found = patch(
        model, torch.tensor(CLEAN), CORRUPTED, tiny_tokenizer(), metric="log-prob", answer="w7", layers=3, sites="layer"
    )
    with torch.no_grad():
        wanted = [
            float(torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1)[7])
            for ids in (CLEAN, CORRUPTED)
        ]
    assert (found.metric["clean"], found.metric["corrupted"]) == pytest.approx(wanted, abs=FLOAT32_NATS)
    assert found.metric["wrong_id"] is None
    assert found.values["recovery"].iloc[-1] == pytest.approx(1.0, abs=1e-5)  # noqa: PD011


def test_a_stored_result_is_read_as_it_was_written(tmp_path, example):
    loaded = Patching.load(example.save(tmp_path / "one"))
    for name in ("tokens", "values"):
        pd.testing.assert_frame_equal(getattr(example, name), getattr(loaded, name), check_exact=True)
    assert loaded.metric == example.metric
    assert "recovery" in example._repr_html_()
    assert "16 tokens" in repr(example)


def test_hooks_are_gone_and_the_model_is_unchanged():
    model = tiny_model("gemma2")
    weights = copy.deepcopy(model.state_dict())
    model.train()
    patch(model, CLEAN, CORRUPTED, tiny_tokenizer(), layers=2)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


REFUSED = {
    "lengths": (("a=2;a?", "a=2,b=3;a?"), (), "--clean has 8 tokens and --corrupted 12; both need the same number"),
    "the same": (("a=2;a?", "a=2;a?"), (), "are the same tokens; nothing differs"),
    "the same answer": (("a=2;a?", "a=3;a?"), (), "the answer and the wrong token are both id"),
    "a long answer": (("a=2;a?", "a=3;a?"), ("--answer", "a=2"), "--answer 'a=2' has 3 tokens; needed is a text of"),
    "a layer": (("a=2;a?", "a=3;a?"), ("--layers", "9"), "--layers asks for 9 of 8 layers"),
    "a position": (("a=2;a?", "a=3;a?"), ("--positions", "1-99"), "--positions asks for 99 of 8 tokens"),
    "a site": (("a=2;a?", "a=3;a?"), ("--sites", "mlp"), "--sites is 'mlp'"),
    "a wrong token for nothing": (
        ("a=2;a?", "a=3;a?"),
        ("--metric", "log-prob", "--wrong", "3"),
        "--wrong 3 was given",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line(case, tmp_path):
    (clean, corrupted), words, message = REFUSED[case]
    assert message in refused("patch", "--clean", clean, "--corrupted", corrupted, *words, cwd=tmp_path)


def test_bad_ids_are_refused():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(UserError, match="--corrupted: id 99 is beyond the vocabulary of 61"):
        patch(model, [2, 3], [2, 99], tokenizer)
    with pytest.raises(UserError, match="--answer is 61; needed is a text of one token, or an id below 61"):
        patch(model, [2, 3], [2, 4], tokenizer, answer=61)
    with pytest.raises(UserError, match="--clean: 65 tokens, and the model's context is 64"):
        patch(model, [2] * 65, [3] * 65, tokenizer)
