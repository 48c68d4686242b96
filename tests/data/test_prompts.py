"""Reading prompts and responses: formats, templates, the place where a response begins."""

from __future__ import annotations

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from internal_policy import UserError, analyze, bupo, models, sweep
from internal_policy.analysis.inputs import as_source
from internal_policy.data.prompts import NAMED_TEMPLATES, Prompt, answer_text, read_prompts, render
from internal_policy.data.records import read_file
from internal_policy.data.responses import check_responses, prompt_indices, read_responses
from internal_policy.evaluation import evaluate
from internal_policy.models import testbed
from internal_policy.rewards.functions import ExactReward

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CHAT = "{% for m in messages %}{{ m.role }}-{{ m.content }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant-{% endif %}"


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "json"])
def test_the_three_formats_give_the_same_prompts(tmp_path, suffix):
    rows = [
        {"prompt": "one \u2028 two", "answer": "3"},
        {"prompt": [{"role": "user", "content": "hi"}], "answer": None},
    ]
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "parquet":
        pd.DataFrame(rows[:1]).to_parquet(path)
        rows = rows[:1]
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        path.write_text(text, encoding="utf-8")
    prompts = read_prompts(str(path))
    assert [p.content for p in prompts] == [r["prompt"] for r in rows]
    assert prompts[0].answer == "3"


@pytest.fixture
def hub(monkeypatch):
    """A hub on which every data set has two splits, whose records name theirs; it lists the splits that are read."""
    read = []

    def load(name, split):
        read.append(split)
        return Dataset.from_list([{"prompt": f"{split} {i}"} for i in range(4)])

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["all", "train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    return read


def test_the_split_that_is_read_by_default(hub):
    assert read_prompts("some/set")[0].content == "test 0"
    assert read_prompts("some/set", usual="train")[0].content == "train 0"
    assert read_prompts("some/set", usual="validation")[0].content == "all 0"
    assert read_prompts("some/set", split="all", usual="train")[0].content == "all 0"


def test_what_trains_does_not_read_the_split_that_evaluates(hub):
    model = models.load("testbed/qwen3")
    for refused in (
        lambda: bupo.transfer(model, "some/set", template="plain"),
        lambda: bupo.train("testbed/qwen3", "some/set", template="plain", eval_samples=0, layer=2),
    ):
        with pytest.raises(UserError, match="prompt 1 has no answer"):
            refused()
    assert hub == ["train", "train"]
    with pytest.raises(UserError, match="record 1 has no answer"):
        evaluate(model, "some/set")
    assert hub[2:] == ["test"]


@pytest.mark.parametrize("column", ["prompt", "problem", "question"])
def test_prompt_columns_by_their_usual_names(column):
    assert read_prompts([{column: "x", "other": 1}])[0].content == "x"


@pytest.mark.parametrize("row", [{"answer": "a"}, {"final_answer": "a"}, {"reward_model": {"ground_truth": "a"}}])
def test_answer_columns_by_their_usual_names(row):
    assert read_prompts([{"prompt": "x", **row}])[0].answer == "a"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real benchmark prompts in ../shared/data")
@pytest.mark.parametrize(
    ("name", "rows"), [("math500", 500), ("amc2023", 40), ("aime_2024", 30), ("aime_2025", 30), ("deepmath-5k", 5000)]
)
def test_real_benchmarks_are_read_completely(name, rows):
    prompts = read_prompts(str(SHARED / f"{name}.parquet"))
    assert len(prompts) == rows
    assert all(p.answer and p.problem and p.chat[-1]["role"] == "user" for p in prompts)
    assert all("put your final answer" not in p.problem for p in prompts)
    for template in NAMED_TEMPLATES.values():
        assert prompts[0].problem in template(prompts[0].problem)


def test_chat_template_is_applied_once_and_without_extra_special_tokens():
    tokenizer = tiny_tokenizer(chat_template=CHAT)
    ids = render(Prompt("w2 w3"), "chat", tokenizer)
    assert ids == tokenizer("user-w2 w3 assistant-", add_special_tokens=False)["input_ids"]


def test_without_a_chat_template_the_prompt_is_plain_text():
    tokenizer = tiny_tokenizer()
    chat = [{"role": "system", "content": "w2"}, {"role": "user", "content": "w3 w4"}]
    assert render(Prompt(chat), "chat", tokenizer) == [2, 3, 4]
    assert render(Prompt("w3 w4"), "plain", tokenizer) == [3, 4]


def test_paper_templates():
    text = {name: template("Q") for name, template in NAMED_TEMPLATES.items()}
    step = "Please reason step by step, and put your final answer within \\boxed{}."
    head = f"<|im_start|>system\n{step}<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert text["qwen-math"] == head
    assert text["qwen3"] == head + "<think>\n\n</think>\n\n"
    assert text["octothinker"].endswith("\nQ\nAssistant:")
    assert "\\boxed{}" in text["octothinker"]


def test_a_response_as_text_starts_exactly_after_its_prompt():
    tokenizer = tiny_tokenizer()
    (response,) = read_responses([{"prompt": "w2 w3", "response": "w4 w5 w6"}], tokenizer, "plain")
    assert response.input_ids == [2, 3, 4, 5, 6]
    assert (response.prompt_length, response.n_tokens) == (2, 3)


@pytest.mark.parametrize("kind", [np.array, tuple, torch.tensor, lambda ids: [np.int64(i) for i in ids]])
def test_ids_of_any_kind_of_integer(kind):
    row = {"input_ids": kind([3, 4, 5]), "prompt_length": np.int64(1)}
    (response,) = read_responses([row], tiny_tokenizer(), "plain")
    assert response.input_ids == [3, 4, 5]
    assert all(type(i) is int for i in [*response.input_ids, response.prompt_length])


def test_null_columns_do_not_determine_the_record_type():
    rows = [
        {"input_ids": None, "prompt_length": None, "prompt": "w2", "response": "w3"},
        {"input_ids": [2, 3], "prompt_length": 1.0, "prompt": None, "response": None},
    ]
    assert [r.input_ids for r in read_responses(rows, tiny_tokenizer(), "plain")] == [[2, 3], [2, 3]]


def test_a_prompt_without_tokens_is_refused():
    rows = [{"prompt": [{"role": "user", "content": ""}], "response": "w8 w9"}]
    responses = read_responses(rows, tiny_tokenizer(), "plain")
    with pytest.raises(UserError, match="response 1 has a prompt without tokens"):
        check_responses(responses, 61, None)


def test_samples_of_one_prompt_share_its_index():
    rows = [{"input_ids": ids, "prompt_length": 2} for ids in ([2, 3, 4], [2, 4, 4], [2, 3, 5], [2, 4, 6])]
    assert prompt_indices(read_responses(rows, tiny_tokenizer(), "plain")) == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "is empty"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": \n', "broken JSON at line 2"),
        ("a.json", b'[{"prompt": "x"},\n{]', "broken JSON at line 2"),
        ("a.json", b'{"prompt": "x"}', "needed is a list of objects"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', "line 2 holds a list"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', "not UTF-8 at line 2"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ' + b"[" * 100_000 + b"\n", "at line 2 .lists or objects nested too"),
        ("a.json", b"[" * 100_000, "cannot be read .lists or objects nested"),
        ("a.jsonl", b'{"prompt": "x", "id": ' + b"9" * 5000 + b"}\n", "at line 1 .a number that is too long"),
        ("a.parquet", b"PAR1 but not really", "not a readable parquet"),
        ("a.txt", b"x", "format '.txt' is unknown"),
    ],
)
def test_bad_files_are_reported_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)


def test_parquet_that_is_not_utf8_or_damaged_is_reported_in_one_line(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"prompt": column}), path)
    with pytest.raises(UserError, match=r"not a readable parquet file \('utf-8' codec can't decode"):
        read_file(path)
    pq.write_table(pa.table({"prompt": ["a question"] * 9}), path, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"a question", b"A question", 1))
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_file(path)


def test_only_the_needed_parquet_columns_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema({"prompt": pa.string()})) as writer:
        for _ in range(11):
            writer.write_table(pa.table({"prompt": ["x"] * 1_000_000}))
    assert len(read_prompts(str(path), limit=3)) == 3
    with pytest.raises(UserError, match="11000000 rows; needed are at most"):
        read_file(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"values for \['text'\]; needed is one of prompt, problem, question"),
        ({"prompt": " "}, "empty text"),
        ({"prompt": 3}, "neither a text nor a chat"),
        ({"prompt": [{"role": "user"}]}, "neither a text nor a chat"),
        ({"prompt": None, "answer": "x"}, r"values for \['answer'\]"),
        ({"prompt": "half \ud83d"}, "half a character at place 6"),
        ({"prompt": "x", "answer": "\ud83d"}, "its answer holds half a character at place 1"),
        (None, "holds a NoneType"),
        ({"prompt": "2+2=?", "answer": 10**5000}, "an answer of thousands of digits"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_prompts_are_reported_in_one_line(row, message):
    with pytest.raises(UserError, match=message):
        read_prompts([row])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w2", "answer": "w3"}, "needed are prompt and response, or input_ids and prompt_length"),
        ({"prompt": "w2", "response": " "}, "no response tokens"),
        ({"prompt": "w2", "response": 5}, "needed is text"),
        ({"input_ids": [1, 2], "prompt_length": 2}, "no response tokens"),
        ({"input_ids": [1, 2], "prompt_length": 3}, "needed is an integer from 1 to 1"),
        ({"input_ids": [1, 2], "prompt_length": 0}, "needed is an integer from 1 to 1"),
        ({"input_ids": [1, 2], "prompt_length": "1"}, "needed is an integer from 1 to 1"),
        ({"input_ids": [1, "2"], "prompt_length": 1}, "not a list of token ids"),
        ({"input_ids": [], "prompt_length": 1}, "no response tokens"),
        ({"input_ids": [1, 10**30], "prompt_length": 1}, "not a list of token ids"),
        ({"input_ids": [1, -2], "prompt_length": 1}, "not a list of token ids"),
        ({"input_ids": [1, 2], "prompt_length": 1, "reward": "good"}, "reward is 'good'; needed is a number"),
        ({"input_ids": [1, 2], "prompt_length": 1, "reward": float("nan")}, "reward is nan"),
        ({"prompt": "w2", "response": "w3 \ud83d"}, "half a character"),
        ("w2", "holds a str"),
    ],
)
def test_bad_responses_are_reported_in_one_line(row, message):
    with pytest.raises(UserError, match=message):
        read_responses([row], tiny_tokenizer(), "plain")


def test_a_model_trained_from_an_embedded_one_gets_its_tasks(tmp_path):
    loaded = models.load("testbed/llama")
    loaded.model.save_pretrained(tmp_path / "trained")
    loaded.tokenizer.save_pretrained(tmp_path / "trained")
    analysis = analyze(str(tmp_path / "trained"), max_responses=2)
    assert analysis.sequences["reward"].notna().all()


def test_text_that_the_tokenizer_does_not_know_is_reported(caplog):
    analyze("testbed/llama", prompts=["Where does the river begin ?"], max_responses=1)
    assert "of the tokens are <unk>: the tokenizer of testbed/llama does not know this text" in caplog.text
    caplog.clear()
    analyze("testbed/llama", max_responses=2)
    assert caplog.text == ""


def test_a_text_that_the_tokenizer_fails_on_is_reported_in_one_line():
    words = Tokenizer(WordLevel({"w2": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    for call in (
        lambda: render(Prompt("a riddle"), "plain", tokenizer),
        lambda: render(Prompt("a riddle"), "qwen3", tokenizer),
        lambda: read_responses([{"prompt": "w2", "response": "a riddle"}], tokenizer, "plain"),
    ):
        with pytest.raises(UserError, match=r"cannot tokenise the text .*: Exception: WordLevel error") as error:
            call()
        assert "\n" not in str(error.value)


def test_a_chat_template_that_fails_in_many_lines_is_reported_in_one():
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('one\\ntwo') }}")
    with pytest.raises(UserError, match=r"the chat template refuses .* \(one two\)"):
        render(Prompt("w2"), "chat", tokenizer)


def splits(n=3):
    return DatasetDict({"train": Dataset.from_list([{"prompt": f"w{i} w3", "response": "w4"} for i in range(n)])})


def endless():
    while True:
        yield {"prompt": "w2", "response": "w3"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (splits(), "is a DatasetDict with 'train'; needed is a list of records: choose one entry"),
        ({"prompt": ["w2"], "response": ["w3"]}, "is a dict with 'prompt', 'response'; needed is a list of records"),
        ({}, "is a dict with nothing in it"),
        ({"w2", "w3"}, "is a set, whose order is another in each process"),
        (b"w2", "is a bytes; needed is a list"),
        (3, "is a int; needed is a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_values_that_are_not_lists_of_records_are_refused_everywhere(source, message, tmp_path):
    calls = {
        "prompts": lambda: analyze("testbed/llama", prompts=source),
        "responses": lambda: analyze("testbed/llama", responses=source),
        "prompts ": lambda: sweep(checkpoints=testbed.path("testbed/llama"), prompts=source),
        "benchmark": lambda: evaluate("testbed/llama", source),
        "prompts  ": lambda: bupo.train("testbed/llama", source, output=tmp_path / "out"),
    }
    for name, call in calls.items():
        with pytest.raises(UserError) as error:
            call()
        assert f"{name.strip()} {message}" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_stream_is_read_only_as_far_as_needed():
    assert len(as_source(endless(), limit=4)) == 4
    assert len(as_source(splits()["train"].to_iterable_dataset(), limit=2)) == 2
    assert len(as_source(splits()["train"], limit=2)) == 3
    assert len(as_source(iter("abc"))) == 3
    found = [analyze("testbed/llama", max_responses=2, **{name: endless()}) for name in ("prompts", "responses")]
    assert [a.n_responses for a in found] == [2, 2]


@pytest.mark.parametrize("item", ["problems.jsonl", "./a/b.parquet", Path("problems.json")], ids=str)
def test_a_file_name_is_not_accepted_as_a_prompt(item):
    with pytest.raises(UserError, match="item 2 is the name of a file"):
        read_prompts(["w2", item])
    assert read_prompts(["What is in a.json ?"])


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        *(
            ("4", "4"),
            (4, "4"),
            (4.0, "4"),
            (-0.5, "-0.5"),
            (np.int64(4), "4"),
            (np.float32(4), "4"),
            (1e300, "1e+300"),
        ),
        *((Decimal("4.10"), "4.10"), (True, "True"), (Fraction(4, 2), "2"), (None, None)),
    ],
    ids=repr,
)
def test_numeric_answers_are_compared_as_text(answer, text):
    (prompt,) = read_prompts([{"prompt": "2+2=?", "answer": answer}])
    assert (prompt.answer, prompt.unusable) == (text, "")
    if text is not None:
        assert ExactReward()(["2+2=?"], [f"\\boxed{{{text}}}"], answer=[answer]) == [1.0]


@pytest.mark.parametrize("answer", [["4"], [4], {"value": 4}, float("nan")], ids=lambda a: type(a).__name__)
def test_invalid_answers_are_refused_before_sampling(answer, tmp_path):
    rows = [{"prompt": "2+2=?", "answer": answer}]
    for call in (
        lambda: evaluate("testbed/llama", rows, reward="exact"),
        lambda: bupo.train("testbed/llama", rows, reward="exact", output=tmp_path / "out", max_steps=1),
        lambda: ExactReward()(["2+2=?"], ["x"], answer=[answer]),
    ):
        with pytest.raises(UserError, match="an answer that is a") as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    # Nothing is compared with it here.
    assert read_prompts(rows)[0].problem == "2+2=?"


@pytest.mark.parametrize("value", [4, 4.0, Decimal("4.00"), Decimal("4"), np.int64(4)])
def test_numeric_answers_do_not_depend_on_their_storage_type(value):
    assert answer_text(value) == "4"
    assert answer_text(Decimal("1E+2")) == "100"
