"""Inputs of a comparison: which analyses, their order and steps, what is refused and what is saved."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from synthetic_analyses import make, progressive, training

from internal_policy import UserError, compare
from internal_policy.analysis.sources import collect_analyses, natural_key, training_steps, unique_labels
from internal_policy.cli.display import show_comparison
from internal_policy.comparison.figure_data import shown_names
from internal_policy.comparison.results import TABLES, AnalysisComparison
from internal_policy.plotting import comparison as figures
from internal_policy.report import comparison_report


@cache
def _small():
    return make(progressive(2), prompts=2)


def named(name):
    """An analysis of which only the name matters."""
    return replace(_small(), name=name)


@pytest.mark.parametrize("place", [0, 2, 3])
def test_the_start_of_a_training_comes_first(place):
    series = training(4, 5)[1:]
    series.insert(place, make(progressive(5), "testbed/qwen3", noise=0.05))
    comparison = compare(series)
    assert (comparison.labels[0], comparison.baseline) == ("qwen3", "qwen3")
    assert (comparison.steps, comparison.steps_from) == ((0.0, 10.0, 20.0, 30.0), "name")
    assert comparison.sources[0]["model"] == "testbed/qwen3"
    assert list(comparison.boundaries["analysis"]) == [1, 2, 3, 4]
    assert list(comparison.boundaries["label"]) == list(comparison.labels)
    assert not comparison.trends.empty
    # Labels stay with their analyses; steps that are given leave the order as it is.
    labels = ["a", "b", "c", "d"]
    assert compare(series, labels=labels).labels[0] == labels[place]
    assert compare(series, labels=labels, steps=[1, 2, 3, 4]).labels == tuple(labels)


def test_a_directory_with_the_start_is_ordered_by_step(tmp_path):
    for name in ("a-run/checkpoint-10", "a-run/checkpoint-5", "testbed/qwen3"):
        make(progressive(4), name, prompts=4, noise=0.1).save(tmp_path / name.replace("/", "--"))
    assert [a.name for a in collect_analyses([tmp_path])] == [
        "testbed/qwen3",
        "a-run/checkpoint-5",
        "a-run/checkpoint-10",
    ]
    # The checkpoints of two runs are not interleaved.
    make(progressive(4), "b-run/checkpoint-5", prompts=4, noise=0.1).save(tmp_path / "b-run--checkpoint-5")
    names = [a.name for a in collect_analyses([tmp_path])]
    assert names == ["a-run/checkpoint-5", "a-run/checkpoint-10", "b-run/checkpoint-5", "testbed/qwen3"]


def test_missing_steps_are_named_and_give_no_trends():
    comparison = compare([*training(3, 5)[1:], *(make(progressive(5), name) for name in ("some", "other"))])
    assert comparison.trends.empty
    assert list(comparison.trends.columns) == list(compare(training(3, 5)).trends.columns)
    expected = "no steps, so no trends: some, other have none in the name; give steps"
    assert expected in comparison.notes
    assert expected in repr(comparison)
    given = compare([make(progressive(5), name) for name in "abc"], steps=[3, 1, 2])
    assert not given.trends.empty
    assert given.no_trends is None


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"family": "Llama"}, "model families Qwen3, Llama"),
        ({"hidden_size": 128}, "hidden sizes 96, 128"),
        ({"vocab": 1000}, "vocabularies 151936, 1000"),
    ],
)
def test_several_architectures_give_no_trends(model, expected):
    same = {"family": "Qwen3", "hidden_size": 96}
    series = [make(progressive(4), f"run/checkpoint-{k}", seed=k, **same) for k in (1, 2)]
    other = make(progressive(4), "run/checkpoint-3", seed=3, **{**same, **model})
    comparison = compare(series, other)
    assert comparison.trends.empty
    assert comparison.no_trends == f"no trends: not of one architecture ({expected})"
    assert comparison.no_trends in repr(comparison)
    # A model of another architecture cannot be the start model either.
    assert compare(series, make(progressive(4), "other", **{**same, **model})).steps_from == "order"


def test_a_duplicated_analysis_is_reported_once(tmp_path):
    one, two = make(progressive(4), "one", noise=0.1), make(progressive(4), "two", noise=0.1, seed=1)
    path = one.save(tmp_path / "one")
    expected = [n for n in compare(path, two, one, labels="abc").notes if "same analysis" in n]
    assert expected == ["a and c are the same analysis"]
    # A training that did not change the model still saved another checkpoint.
    assert not any("same analysis" in n for n in compare(one, replace(one, name="checkpoint-1")).notes)


def test_a_quantized_model_has_other_settings():
    full, small = (make(progressive(4), name, quantization=q) for name, q in (("full", None), ("small", "4bit")))
    assert compare(full, small).differing == {"small": {"quantization": ("4bit", None)}}


def test_differing_settings_are_reported():
    base = make(progressive(4), noise=0.1)
    other = replace(make(progressive(4), noise=0.1, seed=1, dtype="bfloat16"), name="half")
    comparison = compare(base, other)
    assert comparison.differing == {"half": {"dtype": ("bfloat16", "float32")}}
    assert comparison.paired["half"]


def test_another_lens_is_refused():
    with pytest.raises(UserError, match=r"lens policy and other with logit-lens.*same --lens"):
        compare(named("base"), make(progressive(2), "other", prompts=2, lens="logit-lens", seed=5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["a"]}, "got 1 labels for 2 analyses"),
        ({"labels": ["a", "a"]}, "'a' was given twice"),
        ({"steps": [1, 2, 3]}, "got 3 steps for 2 analyses"),
        ({"steps": [1, float("nan")]}, "finite"),
        ({"baseline": "c"}, "no analysis is called 'c'; the baseline is one of base, other"),
        ({"baseline": 2}, "baseline is 2; there are 2 analyses"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        compare(named("base"), named("other"), **options)


def test_too_few_or_no_analyses_are_refused(tmp_path):
    with pytest.raises(UserError, match="got 1 analysis to compare; needed are at least two"):
        compare(named("base"))
    with pytest.raises(UserError, match="got a int to compare"):
        compare(named("base"), 3)
    with pytest.raises(UserError, match="no finished analysis here"):
        compare(tmp_path, tmp_path)


def test_a_directory_expands_to_its_analyses_in_natural_order(tmp_path):
    for step in (10, 5, 100):
        make(progressive(4), f"run/checkpoint-{step}", prompts=4, noise=0.1, seed=step).save(
            tmp_path / "runs" / f"checkpoint-{step}"
        )
    found = collect_analyses([tmp_path / "runs"])
    assert [a.name for a in found] == ["run/checkpoint-5", "run/checkpoint-10", "run/checkpoint-100"]
    assert [a.name for a in collect_analyses([tmp_path])] == [a.name for a in found]
    comparison = compare(tmp_path)
    assert (comparison.steps, comparison.steps_from) == ((5.0, 10.0, 100.0), "name")
    assert comparison.sources[0]["path"] == str(tmp_path / "runs" / "checkpoint-5")
    assert sorted(["a-10", "a-9", "a", "b1"], key=natural_key) == ["a", "a-9", "a-10", "b1"]


@pytest.mark.parametrize(
    ("names", "steps", "unit"),
    [
        (["a/checkpoint-5", "a/step_40"], [5, 40], "update"),
        (["m@step40", "m@global_step_50"], [40, 50], "step"),
        (["testbed/qwen3", "x/checkpoint-20"], [0, 20], "update"),
        (["x/checkpoint-20", "testbed/qwen3"], [20, 0], "update"),
        (["x/checkpoint-20", "testbed/qwen3", "x/checkpoint-40"], [20, 0, 40], "update"),
        (["x/checkpoint-0", "testbed/qwen3"], [0, 1], None),
        (["x/checkpoint-20", "x/checkpoint-40", "a", "b"], [0, 1, 2, 3], None),
        (["Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "x/footstep-3"], [0, 1, 2], None),
    ],
)
def test_steps_are_read_from_the_names(names, steps, unit):
    analyses = [named(name) for name in names]
    assert training_steps(analyses) == (steps, "name" if unit else "order", unit or "step")
    assert training_steps(analyses, [7] * len(names))[1] == "given"


def recorded(name, updates, per_step):
    record = {"updates": updates, "updates_per_step": per_step}
    return replace(named(name), model={**_small().model, "training": record})


def test_recorded_updates_per_step_convert_updates_to_steps():
    run = [recorded(f"x/checkpoint-{n}", n, 4) for n in (20, 40)]
    assert training_steps(run) == ([5, 10], "name", "step")
    assert training_steps([named("testbed/qwen3"), *run]) == ([0, 5, 10], "name", "step")
    # If steps are not known for all, all stay in updates; a record of another directory does not count.
    assert training_steps([*run, named("x/checkpoint-60")]) == ([20, 40, 60], "name", "update")
    assert training_steps([*run, recorded("x/checkpoint-60", 61, 4)]) == ([20, 40, 60], "name", "update")


def test_a_comparison_names_the_unit_of_its_steps(tmp_path, capsys):
    records = [{"updates": 10 * k, "updates_per_step": 2} for k in range(3)]
    ours = [replace(a, model={**a.model, "training": r}) for a, r in zip(training(3, 5), records, strict=True)]
    by_step, by_update = compare(ours), compare(training(3, 5))
    for comparison, unit, last in ((by_step, "step", 10.0), (by_update, "update", 20.0)):
        assert (comparison.unit, comparison.steps[-1]) == (unit, last)
        assert (comparison.trends["unit"] == unit).all()
        assert any("count the trainer's updates" in note for note in comparison.notes) == (unit == "update")
        assert AnalysisComparison.load(comparison.save(tmp_path / unit)).unit == unit
        assert list(shown_names(comparison).values())[-1] == f"{unit} {last:g}"
        show_comparison(comparison)
        assert f"per 100 {unit}s" in " ".join(capsys.readouterr().out.split())
    assert figures.layer_lines(by_update).axes[0].get_xlabel() == "Update"
    assert ">Update</th>" in comparison_report(by_update)
    np.testing.assert_allclose(by_step.trends["slope"], 2 * by_update.trends["slope"], rtol=1e-9, atol=1e-15)


def test_labels_are_the_shortest_unique_names():
    names = [["a/x", "a/y"], ["a/x", "b/x"], ["x", "x"]]
    labels = [unique_labels([named(n) for n in pair]) for pair in names]
    assert labels == [["x", "y"], ["a/x", "b/x"], ["x (1)", "x (2)"]]


def test_a_comparison_is_saved_completely(tmp_path):
    comparison = compare(training(3, 5))
    assert "3" not in repr(comparison)[:30]
    target = comparison.save(tmp_path / "out")
    assert {p.name for p in target.iterdir()} == {"comparison.json", *(f"{name}.csv" for name in TABLES)}
    manifest = json.loads((target / "comparison.json").read_text())
    assert manifest["baseline"] == "checkpoint-0"
    assert [a["step"] for a in manifest["analyses"]] == [0.0, 10.0, 20.0]
    for name in TABLES:
        table = getattr(comparison, name)
        back = pd.read_csv(target / f"{name}.csv")
        assert list(back.columns) == list(table.columns)
        numbers = table.select_dtypes("float").columns
        np.testing.assert_allclose(back[numbers], table[numbers], rtol=1e-12)
    assert repr(comparison).startswith("AnalysisComparison(checkpoint-0, checkpoint-10, checkpoint-20; baseline")
