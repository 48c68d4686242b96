"""The model card: what it reports about a run, what it does not claim, and what it keeps private."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import pandas as pd
import pytest
from huggingface_hub import ModelCard
from synthetic_evaluations import evaluation_of_counts
from synthetic_run import call, make

from internal_policy import UserError
from internal_policy.bupo import BuPOConfig, Run, TrainConfig, attach_evaluations
from internal_policy.bupo.hub import BEGIN, END, PUBLISHED_SETTINGS, body, code, prose, write_card
from internal_policy.bupo.run import is_on_the_hub

HOSTILE = "ab<script>alert(1)<script>|`x`\n---\nlicense: mit\n---\n# Title [c](d)"


def test_card_reports_the_training_and_its_measurements(tmp_path):
    prompts = "zwhe99/DeepMath-103K"
    run = make(tmp_path / "run", call=call(model="some/model", prompts=prompts))
    card = ModelCard.load(write_card(run))
    assert card.data.to_dict() == {
        "license": "unknown",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some/model",
        "datasets": ["zwhe99/DeepMath-103K"],
        "tags": ["internal_policy", "bupo", "reinforcement-learning", "arxiv:2512.19673"],
    }
    text = card.text
    avg = run.evaluation.avg
    for expected in (
        *(
            "policy of layer 6",
            "the boundary layer of its analysis",
            "30 steps, which are 60 updates",
            "as it was asked",
        ),
        f"| trained | Avg@16 | {100 * avg['mean']:.2f} | {100 * avg['low']:.2f} to {100 * avg['high']:.2f} |",
        *("| difference | Avg@K | +4.69 |", "| 1 | alignment | 0.250 | 0.125 | 20.0 |", "| 30 | grpo | 0.540 |"),
        *("| `learning_rate` | `1e-06` |", "one run with one seed", "2 crashes", "| `torch` | `2.13.0` |"),
        *("@article{tan2025bottomup", "@software{internal_policy", "## Limits", "licence of the start"),
    ):
        assert expected in text, expected
    assert "timeouts" not in text
    assert "from_pretrained" not in text


@pytest.mark.parametrize(
    ("aligned", "present", "absent"),
    [
        (3, "For 3 steps the policy of layer 6, counted from 1, was optimised first, then the model's", "not optim"),
        (30, "For 30 steps the policy of layer 6, counted from 1, was optimised first; the", ", then"),
        (0, "A step is one batch", "optimised first"),
    ],
)
def test_card_describes_the_phases_of_the_run(tmp_path, aligned, present, absent):
    run = make(tmp_path / "run")
    history = run.history.assign(phase=["ipa"] * aligned + ["grpo"] * (30 - aligned))
    method = body(replace(run, history=history)).partition("## Method")[2].partition("## ")[0]
    assert present in method
    assert absent not in method


def test_card_claims_nothing_that_was_not_measured(tmp_path):
    run = replace(make(tmp_path / "run", name="testbed/qwen3"), evaluation_paths={}, history=pd.DataFrame())
    card = ModelCard.load(write_card(run))
    assert card.data.base_model is None
    assert card.data.license == "mit"
    assert "The training evaluated neither its start nor its result; evaluations that were made apart" in card.text
    assert "No steps were recorded." in card.text


def test_a_separate_evaluation_is_added_to_the_card_and_to_the_run(tmp_path):
    run = replace(make(tmp_path / "run"), evaluation_paths={})
    start, trained = (evaluation_of_counts(correct, benchmark="held-out") for correct in ([3, 9, 16, 1], [5, 9, 16, 2]))
    evaluated = attach_evaluations(run, start, trained)
    text = (run.model_dir / "README.md").read_text()
    assert "`held-out`: 4 problems" in text
    assert "| difference | Avg@K | +4.69 |" in text
    again = Run.load(run.path)
    assert again.evaluation_paths == evaluated.evaluation_paths
    assert again.evaluation.avg == trained.avg


def test_a_local_directory_is_never_given_as_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    run = make(tmp_path / "run", name="runs/model", call=call(model="runs/model", prompts="data/x.jsonl"))
    run = Run.load(run.path)
    # On another machine both names would look like hub ids.
    monkeypatch.chdir("/")
    card = ModelCard.load(write_card(run, "me/it"))
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "runs/" not in card.text
    assert "Prompts: `x.jsonl`" in card.text


def test_objects_are_not_linked_to_the_hub(tmp_path):
    given = {"options": {}, "objects": ["model", "prompts"], "from_hub": [], "digest": None}
    card = ModelCard.load(write_card(make(tmp_path / "run", call=given)))
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert "# `model` after" in card.text
    assert "Prompts: `given in memory`" in card.text


def test_hub_models_and_data_sets_are_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    in_memory = SimpleNamespace(name_or_path="some/model", config=SimpleNamespace(_commit_hash="c0"))
    saved = SimpleNamespace(name_or_path="runs/model", config=SimpleNamespace(_commit_hash=None))
    for model, expected in (
        *(("some/model", True), ("a/b", False), ("/a/b", False), ("testbed/qwen3", False), ("a/b/c", False)),
        *((in_memory, True), (saved, False)),
    ):
        assert is_on_the_hub(model) is expected, model
    assert not is_on_the_hub(["zwhe99/DeepMath-103K"])


def test_card_contains_no_paths_or_memory_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, prompts = "/home/me/client-x/model", "/mnt/client-x/questions.jsonl"
    run = make(tmp_path / "run", name=name, call=call(model=name, prompts=prompts))
    (tmp_path / "client-x").mkdir()
    run.config.update(
        {
            **{"vllm_server_base_url": "http://10.0.0.1:8000", "vllm_server_host": "gpu7.client-x"},
            **{"logging_dir": "client-x", "deepspeed": "client-x", "accelerator_config": "conf/client-x.json"},
            **{"fsdp_config": {"a": "/mnt/client-x/b"}, "lr_scheduler_kwargs": {"table": "~/client-x"}},
            **{"run_name": "client-x", "optim": "adamw_torch"},
        }
    )
    run.config["benchmark"] = "./client-x/test.parquet"
    run.config["peft"] = {"r": 8, "base_model_name_or_path": "client-x/model", "lora_alpha": 16}
    text = write_card(run).read_text()
    assert not [line for line in text.splitlines() if any(s in line for s in ("client-x", "/home", "/mnt", "10.0.0.1"))]
    for expected in (
        "# `model` after",
        "Prompts: `questions.jsonl`",
        "| `optim` | `adamw_torch` |",
        "| `peft: r` | `8` |",
    ):
        assert expected in text, expected


def test_every_published_setting_exists_in_a_run():
    known = {f.name for kind in (TrainConfig, BuPOConfig) for f in fields(kind)}
    assert not set(PUBLISHED_SETTINGS) - known


def test_user_edits_of_the_card_are_kept(tmp_path):
    run = make(tmp_path / "run")
    path = write_card(run)
    path.write_text(path.read_text().replace("license: unknown", "license: apache-2.0") + "\nMine below.\n")
    text = write_card(run, "me/it").read_text()
    assert "license: apache-2.0" in text
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.endswith("Mine below.\n")
    assert "from_pretrained" in text
    path.write_text("All by hand.\n")
    assert write_card(run).read_text().endswith("---\n\nAll by hand.\n")
    path.write_text("---\nlicense: [broken\n---\n")
    with pytest.raises(UserError, match="metadata cannot be read"):
        write_card(run)


def test_names_are_escaped_in_yaml_and_markdown(tmp_path):
    run = make(tmp_path / "run", name=HOSTILE, call=call(prompts=HOSTILE))
    run = replace(run, layer_reason=HOSTILE, versions={HOSTILE: HOSTILE})
    card = ModelCard.load(write_card(run))
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert "\n# Title" not in card.text
    assert "\n---\nlicense" not in card.text
    for line in card.text.splitlines():
        outside = "".join(part for k, part in enumerate(line.split("``")) if k % 2 == 0)
        assert "<script" not in outside.replace("\\<", "")
        assert "[c](" not in outside
    assert code("a`b|c\n d") == "``a`b¦c d``"
    assert prose("<b> *x* [y](z)\n_w_") == r"\<b\> \*x\* \[y\](z) \_w\_"
