"""The experiments are resumable: what is missing is run, its record becomes tables, and it has what it is run for."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import pytest
import run
import store
import torch
from jobs import Job, jobs
from tiny import tiny_model, tiny_tokenizer

from internal_policy.bupo.run import read_table


def record(job, work, value):
    row = pd.DataFrame([{"run": job.name, "seed": job.seed, "avg": value}])
    store.write_record(job, {"runs": row, "curves": row.assign(step=1)}, work)


def test_names_are_unique_over_all_parts():
    names = [job.name for part in ("e1", "e2", "e4", "methods") for job in jobs(part)]
    assert len(names) == len(set(names))


def test_records_become_tables_that_keep_what_was_stored(tmp_path):
    data, work = tmp_path / "data", tmp_path / "work"
    first, second, third = jobs("e2")[:3]
    record(second, work, 2.0)
    store.collect("e2", data, work)
    # The record is another measurement of a run that is stored.
    record(second, work, 99.0)
    record(first, work, 1 / 3)
    found = store.collect("e2", data, work)
    # Tables have the order of the jobs, not that in which they ended.
    assert list(found["runs"]["run"]) == [first.name, second.name]
    assert list(read_table(data / "e2" / "runs.csv")["avg"]) == [0.333333, 2.0]
    assert list(read_table(data / "e2" / "curves.csv")["step"]) == [1, 1]
    assert store.finished("e2", data, work) == {first.name, second.name}
    # Without its last table, a record is that of a run that was cut off.
    record(third, work, 3.0)
    (store.record_of(third, work) / "runs.csv").unlink()
    assert third.name not in store.finished("e2", data, work)


def test_missing_runs_are_chosen_by_part_seed_and_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record(jobs("e1")[0], store.WORK, 1.0)
    assert run.missing(["e1"]) == jobs("e1")[1:]
    chosen = run.missing(["e1", "e2"], only="llama-grpo", seeds=[2])
    assert [(job.part, job.steps) for job in chosen] == [("e1", 60), ("e2", 120)]
    assert {(job.model, job.method, job.seed) for job in chosen} == {("testbed/llama", "grpo", 2)}


def test_only_runs_that_end_in_time_are_begun():
    todo = [Job("e2", "testbed/qwen3", steps=120), Job("e1", "testbed/qwen3", steps=60)]
    assert run.next_job(todo, seconds_left=100, step_seconds=1.5).steps == 60
    assert run.next_job(todo, seconds_left=100, step_seconds=1.5) is None
    assert run.next_job(todo, seconds_left=float("inf"), step_seconds=1.5).steps == 120
    assert todo == []


def test_the_start_is_measured_again_for_other_weights_and_other_constants(tmp_path, monkeypatch):
    import measures

    def evaluate(model, benchmark, samples, **options):
        measured.append(options["max_problems"])
        rates = pd.DataFrame({"k": [1, samples], "value": [0.25, 1 / 3]})
        drawn = pd.DataFrame({"n_tokens": [3], "truncated": [False]})
        return SimpleNamespace(pass_at_k=rates, avg={"mean": 0.1 * len(measured), "stderr": 0.01}, samples=drawn)

    def start():
        held_out = measures.HeldOut(0, {4}, tmp_path / "starts" / "testbed--qwen3")
        held_out.on_train_begin(None, None, None, model=model, processing_class=tokenizer)
        (row,) = held_out.rows
        # The columns are those of the stored curves.
        assert list(row) == ["step", "samples", "avg", "avg_stderr", "pass16", "length", "truncated"]
        return row["avg"]

    measured = []
    monkeypatch.setattr(measures, "evaluate", evaluate)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert start() == start() == 0.1
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert start() == start() == 0.2
    for place, (name, value) in enumerate((("PROBLEMS", 4), ("MAX_NEW_TOKENS", 5)), start=3):
        monkeypatch.setattr(measures, name, value)
        assert start() == start() == pytest.approx(place / 10)
    assert measured == [256, 256, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["e1", "e2"])
def test_a_run_is_measured_and_stored(part, tmp_path, monkeypatch):
    import measures

    monkeypatch.setattr(measures, "PROBLEMS", 4)
    monkeypatch.setattr(measures, "FULL_SAMPLES", 2)
    monkeypatch.setattr(run, "CURVE_EVERY", 2)
    aligned = Job(part, "testbed/qwen3", "bupo", 4, 3, 3e-4, 3)
    job = aligned if part == "e1" else Job(part, "testbed/qwen3", steps=3)
    assert job.name in run.run_job(job, tmp_path)
    tables = {name: read_table(store.record_of(job, tmp_path) / f"{name}.csv") for name in store.TABLES}
    assert all((table["run"] == job.name).all() for table in tables.values() if len(table))
    # Every step is in the history, those after which something was measured too.
    assert list(tables["histories"]["step"]) == [1, 2, 3]
    assert list(tables["histories"]["phase"].unique()) == ["ipa" if part == "e1" else "grpo"]
    assert list(tables["curves"]["step"]) == ([0, 3] if part == "e1" else [0, 2, 3])
    end = tables["runs"].iloc[0]
    assert end["avg"] == tables["curves"]["avg"].iloc[-1]
    assert end["alignment_steps"] == (3 if part == "e1" else 0)
    if part == "e1":
        assert list(tables["perplexities"]["step"]) == list(tables["dynamics"]["step"]) == [0, 3]
        # At temperature 1 the expected log-perplexity of own samples is the entropy.
        start = tables["perplexities"].iloc[0]
        assert start["log_perplexity_own"] == pytest.approx(start["policy_entropy_own"], abs=0.05)
        assert start["log_perplexity_solutions"] != start["log_perplexity_own"]
    assert not (tmp_path / part / job.name / "checkpoints").exists()
