"""Labels of tokens: the rule for kinds on edge cases and real tokenizers, deciles, rewards and forking tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from internal_policy import UserError
from internal_policy.analysis.config import GROUPINGS
from internal_policy.analysis.token_labels import (
    LABELS,
    ResponseTokens,
    correctness,
    deciles,
    forking,
    kinds,
    label_responses,
    require_grouping,
)
from internal_policy.data.token_text import from_visible, raw_texts_of, texts_of, visible
from internal_policy.models import testbed

D, O, W, F = "digit", "operator", "word", "format"  # noqa: E741


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        (["Step", " 1", ":", " x", "=", "12", "."], [W, D, F, W, O, D, F]),
        # The most telling character decides, and white space does not matter.
        ([" the", "(x", ")=", "\n\n", ",", "=5", " ", "'s"], [W, W, O, F, F, D, F, W]),
        # Letters of any script with their marks; other numbers.
        (["中", " слово", "कि", "\u0301", "α", "²", "½", "Ⅳ"], [W, W, W, W, W, D, D, D]),
        (["<", " ≤", "→", "×", "·", "^", "/", "−", "∑", ">="], [O] * 10),
        (["|", "~", "$", "{", "}", "_", "!", "😀", "€", "\u200d"], [F] * 10),
        # Repeated signs are rules, headings and bold type; a sign before an item opens it.
        (["**", "bold", "**", "\n", "---", "\n", "- ", "item", "\n", "##", " =="], [F, W, F, F, F, F, F, W, F, F, O]),
        (["a", "-", "b", " -", "3", "*", "4"], [W, O, W, O, D, O, D]),
        # LaTeX: by what a command writes, also in several tokens; a command ends where its letters end.
        (["\\", "boxed", "{", "7", "}"], [F, F, F, D, F]),
        ([" \\", "times", " x", "\\leq", "\\", "fr", "ac", "{x", "}"], [O, O, W, O, O, O, O, W, F]),
        (["\\alpha", "\\", "text", "{", "if", "}", "\\\\", "\n"], [W, F, F, F, W, F, F, F]),
        # Marks of templates, also as text; a comparison is none.
        (["<|im_end|>", "<think>", "</s>", "[PAD]", "a", "<", "b", ">"], [F, F, F, F, W, O, W, O]),
        # Bytes of one character, over two tokens and with a neighbour; without the rest of them.
        (["\udce4\udcb8", "\udcad", "\udce2\udc89", "\udca4", "x"], [W, W, O, O, W]),
        (["\udce2\udc89", "x", "\ud800", ""], [F, W, F, F]),
        ([], []),
    ],
)
def test_kinds_of_tokens(tokens, labels):
    assert list(zip(tokens, kinds(tokens), strict=True)) == list(zip(tokens, labels, strict=True))


def test_special_tokens_are_format_whatever_they_are_called_and_break_what_surrounds_them():
    assert kinds(["a", "end", "b"], special=[1]) == [W, F, W]
    # Without the mark these letters would belong to the command.
    assert kinds(["\\", "end", "boxed"], special=[1]) == [F, F, W]


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_kinds_of_the_embedded_tokenizers(name):
    tokenizer = AutoTokenizer.from_pretrained(testbed.path(f"testbed/{name}"))
    texts = list(raw_texts_of(tokenizer, range(len(tokenizer))).values())
    # One token at a time, since a response seldom has two numbers in a row.
    found = {text: kinds([text])[0] for text in texts}
    wanted = {str(n): D for n in range(23)} | dict.fromkeys("abcde", W) | dict.fromkeys("+-*=", O)
    assert found == wanted | dict.fromkeys(set(texts) - set(wanted), F)
    assert {"\\boxed{", "<eos>", ";"} <= set(texts) - set(wanted)


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE with so few merges that characters outside ASCII are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(["the sum of the two numbers is then the answer"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def test_kinds_of_a_byte_level_tokenizer_are_those_of_the_characters(byte_level):
    parts = [("the", W), (" sum", W), (" ", F), ("中", W), (" ", F), ("≤", O), (" ", F), ("7", D), ("😀", F), ("\n", F)]
    ids, wanted = [], []
    for text, label in parts:
        own = byte_level(text)["input_ids"]
        ids += own
        wanted += [label] * len(own)
    # The characters outside ASCII are three or four tokens each.
    assert len(ids) > len(parts) + 6
    texts = raw_texts_of(byte_level, ids)
    assert kinds([texts[i] for i in ids]) == wanted
    shown = texts_of(byte_level, ids)
    assert kinds([from_visible(shown[i]) for i in ids]) == wanted
    assert kinds([raw_texts_of(byte_level, [0])[0]]) == [F]


@pytest.mark.parametrize(
    "text",
    [
        " a",
        "\n\n",
        "     ",
        "\t\t",
        "\u0301",
        "\u200d",
        "\udce4\udcb8",
        "<|im_end|>",
        " ×3",
        "中",
        "\r\n",
        "a\x00b",
        "<5>",
    ],
)
def test_a_text_is_read_back_from_its_visible_form(text):
    assert from_visible(visible(text)) == text


def test_an_id_without_a_text_is_format():
    assert kinds([from_visible("#151700")]) == [F]


def test_deciles_have_equal_numbers_of_tokens_and_are_in_order():
    labels = deciles(np.arange(40), 40)
    assert labels == [f"decile {n}" for n in range(1, 11) for _ in range(4)]
    # A short response leaves deciles empty; its first token is in the first and none is beyond the tenth.
    assert deciles(np.arange(3), 3) == ["decile 1", "decile 4", "decile 7"]
    assert deciles(np.array([0]), 1) == ["decile 1"]
    assert deciles(np.array([24]), 25) == ["decile 10"]


def test_rewards_are_right_from_one_on_as_in_an_evaluation():
    rewards = [1.0, 2.5, 0.99, 0.0, -1.0, None, float("nan")]
    assert [correctness(r) for r in rewards] == ["right", "right", "wrong", "wrong", "wrong", None, None]


def test_forking_tokens_are_the_fifth_with_the_highest_entropy():
    values = np.random.default_rng(0).permutation(100) / 10
    assert set(values[forking(values)]) == set(np.arange(80, 100) / 10)
    # Ties at the threshold go to the earlier tokens.
    tied = np.array([0.0, 3.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    assert np.flatnonzero(forking(tied)).tolist() == [1, 2]
    assert forking(np.zeros(10)).sum() == 2
    assert forking(np.array([0.3])).tolist() == [True]
    assert forking(np.zeros(13)).sum() == 3


def test_the_threshold_is_that_of_all_responses():
    high, low = (ResponseTokens(["a"] * 5, entropies=np.full(5, v)) for v in (2.0, 1.0))
    assert label_responses("policy-entropy", [low, high]) == [["rest"] * 5, ["forking"] * 2 + ["rest"] * 3]


def test_unscored_responses_have_no_label_and_all_unscored_are_refused():
    scored, not_scored = ResponseTokens(["a", "b"], reward=1.0), ResponseTokens(["a"])
    assert label_responses("correct", [scored, not_scored]) == [["right", "right"], [None]]
    with pytest.raises(UserError, match=r"none of the 1 response has one; give --responses with a reward each"):
        label_responses("correct", [not_scored])


def test_groupings_of_the_command_line_are_those_that_have_labels():
    assert tuple(LABELS) == GROUPINGS
    assert [require_grouping(name) for name in GROUPINGS] == list(GROUPINGS)
    with pytest.raises(UserError, match=r"grouped by 'kinds'; needed is one of kind, .* \(did you mean kind\?\)"):
        require_grouping("kinds")
