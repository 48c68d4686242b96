"""Additions to an analysis: asked at once or later, resumed, stored, and never part of what identifies an analysis."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from tiny import ragged_responses, tiny_model, tiny_tokenizer

from internal_policy import UserError, analyze
from internal_policy.analysis import pipeline
from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.results import ANALYSIS, Analysis


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for the measurements, which count their calls and keep portions."""
    made = []

    def measure(option, table):
        def run(addition):
            made.append((option, getattr(addition.config, option)))
            lengths = {i: r.n_tokens for i, r in enumerate(addition.responses)}

            def count(batch):
                return {"tokens": np.array([lengths[i] for i in batch])}

            portions = addition.workspace.run_stage(option, lengths, 2, count, description=option)
            return {table: pd.DataFrame({"tokens": np.concatenate([p["tokens"] for p in portions])})}

        return run

    tables = {"heads": "heads", "divergences": "divergences", "by": "groups"}
    monkeypatch.setattr(pipeline, "ADDITION_MEASURES", {option: measure(option, t) for option, t in tables.items()})
    return made


def run(directory, **options):
    records = ragged_responses(5)
    return analyze(tiny_model("llama"), tiny_tokenizer(), responses=records, output=directory, **options)


def test_an_addition_is_stored_beside_the_analysis_and_changes_nothing_in_it(tmp_path, calls):
    plain = run(tmp_path / "plain")
    with_heads = run(tmp_path / "heads", heads=True, by=("kind", "kind"))
    assert calls == [("heads", True), ("by", ("kind",))]
    pd.testing.assert_frame_equal(with_heads.layers, plain.layers, check_exact=True)
    loaded = Analysis.load(with_heads.path)
    assert set(loaded.additions) == {"heads", "groups"}
    assert loaded.additions["heads"]["tokens"].sum() == plain.n_tokens
    assert loaded.config["by"] == ["kind"]
    assert loaded.config["divergences"] is False
    assert not (with_heads.path / "work").exists()
    # The digest of the new file is in the manifest.
    (with_heads.path / "heads.csv").write_text("tokens\n1\n")
    with pytest.raises(UserError, match=r"heads\.csv is not what was written"):
        Analysis.load(with_heads.path)


def test_additions_are_added_to_a_finished_analysis_once(tmp_path, calls):
    first = run(tmp_path)
    assert calls == []
    assert set(run(tmp_path, heads=True).additions) == {"heads"}
    assert set(run(tmp_path, by="kind").additions) == {"heads", "groups"}
    again = run(tmp_path, heads=True, by=("kind", "position"))
    assert calls == [("heads", True), ("by", ("kind",)), ("by", ("kind", "position"))]
    run(tmp_path, heads=True, by=("position",))
    assert len(calls) == 3
    assert set(again.additions) == {"heads", "groups"}
    pd.testing.assert_frame_equal(again.layers, first.layers, check_exact=True)
    # A new analysis in the same place has none of them.
    assert run(tmp_path, overwrite=True, temperature=1.0).additions == {}
    assert not (again.path / "heads.csv").exists()


def test_an_interrupted_addition_is_resumed(tmp_path, calls, monkeypatch):
    measured = []

    def stopped(addition):
        lengths = {i: r.n_tokens for i, r in enumerate(addition.responses)}

        def count(batch):
            if measured:
                raise KeyboardInterrupt
            measured.extend(batch)
            return {"tokens": np.array([lengths[i] for i in batch])}

        return addition.workspace.run_stage("heads", lengths, 2, count, description="heads")

    with monkeypatch.context() as patch:
        patch.setitem(pipeline.ADDITION_MEASURES, "heads", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, heads=True)
    (directory,) = ANALYSIS.below(tmp_path)
    # The analysis itself is finished, and does not claim what it lacks.
    assert Analysis.load(directory).config["heads"] is False
    assert len(list((directory / "work").glob("heads-*.npz"))) == 1
    resumed = run(tmp_path, heads=True)
    assert resumed.additions["heads"]["tokens"].sum() == resumed.n_tokens


def test_a_grouping_that_is_added_leaves_a_whole_analysis_at_every_moment(tmp_path, monkeypatch):
    first = run(tmp_path, by=("position",), heads=True)
    writes = []

    def stopped(directory, tables):
        # The table is replaced, and the process is killed before the manifest says so.
        write(first, directory, tables)
        writes.append(set(tables))
        raise KeyboardInterrupt

    write = Analysis._write_additions
    with monkeypatch.context() as patch:
        patch.setattr(Analysis, "_write_additions", lambda self, directory, tables: stopped(directory, tables))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, by=("position", "policy-entropy"), heads=True)
    # Heads are not written again.
    assert writes == [{"groups"}]
    assert set(Analysis.load(first.path).additions) == {"heads"}
    again = run(tmp_path, by=("position", "policy-entropy"), heads=True)
    assert set(Analysis.load(first.path).additions) == {"heads", "groups"}
    kept = again.additions["groups"].query("grouping == 'position'").reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, first.additions["groups"], check_exact=True)


def test_additions_do_not_identify_an_analysis():
    plain = AnalyzeConfig().cache_key()
    assert AnalyzeConfig(heads=True, divergences=True, by=("kind",)).cache_key() == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": ("kinds",)}, "--by is 'kinds'; needed is one of kind, position, correct, policy-entropy"),
        ({"by": None}, "--by is None; needed is a value or a list of values"),
        ({"heads": True, "tolerance": 0.1}, "--heads was given with --tolerance"),
        ({"by": ("kind",), "tolerance": 0.1}, "--by was given with --tolerance"),
    ],
)
def test_additions_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AnalyzeConfig(**options)
