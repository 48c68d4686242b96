"""A finished analysis is reused only if all files that it depends on are unchanged."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from internal_policy import AnalyzeConfig, UserError, analyze
from internal_policy.analysis.finished import config_digest, find_finished, is_up_to_date
from internal_policy.data.prompts import read_prompts
from internal_policy.models import testbed
from internal_policy.utils import result_format

OPTIONS = {"max_responses": 2, "max_new_tokens": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def finished_analysis(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(testbed.path("testbed/qwen3"), place / "model")
    (place / "prompts.jsonl").write_text('{"prompt": "a=2,b=a+1;b?"}\n{"prompt": "a=5;a?"}\n')
    analyze(place / "model", prompts=place / "prompts.jsonl", output=place / "out", **OPTIONS)
    return place


@pytest.fixture
def place(finished_analysis, tmp_path):
    """A copy; of the directory of the analysis too, which is named by the model's."""
    return shutil.copytree(finished_analysis, tmp_path / finished_analysis.name)


def config_for(place, **other):
    options = {"prompts": str(place / "prompts.jsonl"), **OPTIONS, **other}
    return AnalyzeConfig(model=str(place / "model"), **options)


def complete(place, **other):
    found = find_finished([config_for(place, **other)], place / "out")
    return None if found is None else found[0]


def add_template(place):
    (place / "model" / "additional_chat_templates").mkdir()
    (place / "model" / "additional_chat_templates" / "x.jinja").write_text("")


def change_a_byte(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_the_same_files_give_the_same_analysis(place):
    found = complete(place)
    assert found.n_responses == 2
    # Neither file is read when a model is loaded.
    (place / "model" / "optimizer.pt").write_bytes(b"x")
    (place / "model" / "checkpoint-1").mkdir()
    assert complete(place) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_changed_byte_is_detected(name, place):
    change_a_byte(place / "model" / name)
    assert complete(place) is None


CHANGES = {
    "prompts": lambda place: change_a_byte(place / "prompts.jsonl", at=14),
    "no prompts": lambda place: (place / "prompts.jsonl").unlink(),
    "a file more": lambda place: (place / "model" / "chat_template.jinja").write_text("{{ messages }}"),
    "a template more": add_template,
    "an adapter": lambda place: (place / "model" / "adapter_config.json").write_text("{}"),
    "a template": lambda place: (
        shutil.copytree(place / "out", place / "model" / "additional_chat_templates")
        and (place / "model" / "additional_chat_templates" / "x.jinja").write_text("")
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_files_are_detected(change, place):
    change(place)
    assert complete(place) is None


def test_changed_code_and_libraries_are_detected(place, monkeypatch, tmp_path):
    analysis = complete(place)
    other = dataclasses.replace(analysis, versions={**analysis.versions, "torch": "1.0"})
    assert not is_up_to_date(config_for(place), other)
    for unknown in ({"files": None}, {"hooked": ["a hook"]}):
        assert not is_up_to_date(
            config_for(place), dataclasses.replace(analysis, config={**analysis.config, **unknown})
        )
    (tmp_path / "code.py").write_text("")
    monkeypatch.setattr(result_format, "_PACKAGE", tmp_path)
    assert complete(place) is None


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": None},
        {"prompts": "owner/name"},
        {"device": "cuda"},
        {"device_map": "auto", "device": "auto"},
        {"quantization": "4bit"},
        {"backend": "nnsight"},
        {"trust_remote_code": True},
        {"model": "owner/name"},
    ],
)
def test_results_that_depend_on_more_than_files_are_not_reused(other, place):
    assert config_digest(config_for(place)) is not None
    assert config_digest(dataclasses.replace(config_for(place), **other)) is None


def test_auto_device_may_be_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(result_format, "Path", lambda name: tmp_path)
    assert result_format._is_cpu("auto") == (result_format.sys.platform == "linux")
    (tmp_path / "nvidia0").touch()
    assert not result_format._is_cpu("auto")
    assert result_format._is_cpu("cpu")


def test_prompts_that_are_not_scored_are_not_those_that_are(tmp_path):
    questions = [prompt.content for prompt in read_prompts("testbed", limit=2)]
    options = {"max_responses": 2, "max_new_tokens": 4, "output": tmp_path}
    assert analyze("testbed/qwen3", prompts=questions, **options).sequences["reward"].isna().all()
    with pytest.raises(UserError, match=r"other settings \(scored None -> True\)"):
        analyze("testbed/qwen3", **options)
