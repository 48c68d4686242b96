"""Evaluation of real models: numbers, resuming, what is on disk, what is refused, the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_evaluations import evaluation_of_counts, exact

from internal_policy import UserError, models
from internal_policy.cli.display_runs import show_evaluations
from internal_policy.cli.main import run as run_command
from internal_policy.data import arithmetic as tasks
from internal_policy.data import benchmarks
from internal_policy.data.prompts import TESTBED_SEED
from internal_policy.evaluation import Evaluation, compare, evaluate, pipeline

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
FEW = {"samples": 4, "max_problems": 8, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def qwen3():
    return evaluate("testbed/qwen3", **FEW)


@pytest.fixture(scope="module")
def llama():
    return evaluate("testbed/llama", **FEW)


def test_a_comparison_with_itself_finds_no_difference(qwen3):
    c = compare(qwen3, qwen3)
    assert (c.difference, c.p_value, c.p_permutation, c.n_equal) == (0.0, 1.0, 1.0, qwen3.n_problems)
    assert c.low < 0 < c.high
    assert c.differing == {}


def test_a_comparison_reports_other_settings_and_refuses_other_problems(qwen3, llama):
    assert "samples" in compare(evaluation_of_counts([1, 2], n=16), evaluation_of_counts([1, 2], n=32)).differing
    assert compare(qwen3, llama).n_problems == 8
    with pytest.raises(UserError, match=r"8 problems .* on 2 "):
        compare(qwen3, evaluation_of_counts([1, 2]))
    other = replace(qwen3, problems=qwen3.problems.assign(answer="5"))
    with pytest.raises(UserError, match="differ in problem 1"):
        compare(qwen3, other)


def test_evaluation_statistics_match_its_samples(qwen3):
    answers = dict(zip(qwen3.problems["problem"], qwen3.problems["answer"], strict=True))
    scores = [float(tasks.check(s["response"], answers[s["problem"]])) for s in qwen3.samples.to_dict("records")]
    assert scores == list(qwen3.samples["score"])
    correct = pd.Series(scores).groupby(qwen3.samples["problem"].to_numpy()).sum()
    assert list(correct) == list(qwen3.problems["correct"])
    assert 0 < correct.sum() < 32
    assert qwen3.avg["mean"] == pytest.approx(np.mean(scores))
    assert list(qwen3.pass_at_k["k"]) == [1, 4]
    assert list(qwen3.pass_at_k["value"]) == pytest.approx(
        [np.mean([exact(4, int(c), k) for c in correct]) for k in (1, 4)]
    )
    assert len(set(qwen3.samples.loc[qwen3.samples["problem"] == 1, "response"])) > 1, (
        "samples have streams of their own"
    )


def test_testbed_evaluation_problems_differ_from_those_of_an_analysis():
    analysed = {p.prompt for p in tasks.problems(256, seed=TESTBED_SEED)}
    assert len([p for p in benchmarks.read_benchmark("testbed") if p.problem in analysed]) <= 8


@pytest.mark.slow
def test_batch_size_and_out_of_memory_retries_do_not_change_results(qwen3, monkeypatch):
    def small_memory(model, requests, **options):
        if len(requests) > 8:
            raise MemoryError
        return real(model, requests, **options)

    real = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", small_memory)
    again = evaluate("testbed/qwen3", batch_size=11, **FEW)
    pd.testing.assert_frame_equal(again.samples, qwen3.samples, check_exact=True)


def test_a_loaded_model_is_used_as_is_and_keeps_its_training_mode(qwen3):
    model = models.load("testbed/qwen3")
    model.model.train()
    model.layers[0].eval()
    problems = [{"question": p.problem, "final_answer": p.answer} for p in benchmarks.read_benchmark("testbed", 8)]
    again = evaluate(model, pd.DataFrame(problems), **FEW, reward="exact")
    pd.testing.assert_frame_equal(again.problems, qwen3.problems, check_exact=True)
    assert model.model.training
    assert not model.layers[0].training
    with pytest.raises(UserError, match="taken as it is"):
        evaluate(model, "testbed", dtype="bfloat16")
    with pytest.raises(UserError, match=r"models\.wrap"):
        evaluate(model.model, "testbed")


@pytest.mark.slow
def test_the_mathematical_verifier_agrees_on_plain_numbers(qwen3, tmp_path):
    rows = qwen3.problems[["prompt", "answer"]].to_dict("records")
    rows[0]["answer"] = f"\\frac{{{2 * int(rows[0]['answer'])}}}{{2}}"
    path = tmp_path / "some.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    again = evaluate("testbed/qwen3", str(path), **FEW)
    assert (again.benchmark, again.config["reward"]) == ("some", "math")
    assert list(again.problems["correct"]) == list(qwen3.problems["correct"])


def test_crashes_of_a_reward_are_counted_and_bad_scores_refused():
    def fragile(prompts, completions, answer, **_):
        if any(len(c) > 30 for c in completions):
            raise ValueError("too long")
        return [0.5] * len(completions)

    got = evaluate("testbed/qwen3", reward=fragile, **FEW)
    long = sum(len(r) > 30 for r in got.samples["response"])
    assert 0 < long < 32
    assert got.failures == {"crashes": long}
    assert got.mean_score == pytest.approx(0.5 * (32 - long) / 32)
    assert got.avg["mean"] == 0.0, "half a point is not correct"
    with pytest.raises(UserError, match=r"gave 2\.0; needed"):
        evaluate("testbed/qwen3", reward=lambda completions, **_: [2.0] * len(completions), **FEW)
    with pytest.raises(UserError, match="2 rewards"):
        evaluate("testbed/qwen3", reward=["math", "exact"], **FEW)


def test_saving_and_loading_round_trip(tmp_path):
    evaluation = evaluation_of_counts([3, 0, 16], name="é")
    nasty = pd.DataFrame(
        {"prompt": ['a "quoted",\r\nline\rand\n\n', " NA", "\u2028x,y"], "answer": ["007", "NA", "1e3"]}
    )
    evaluation = replace(evaluation, problems=evaluation.problems.assign(**nasty))
    again = Evaluation.load(evaluation.save(tmp_path / "one"))
    pd.testing.assert_frame_equal(again.problems, evaluation.problems, check_exact=True)
    pd.testing.assert_frame_equal(again.pass_at_k, evaluation.pass_at_k, check_exact=True)
    pd.testing.assert_frame_equal(again.samples, evaluation.samples, check_exact=True)
    assert again.avg == evaluation.avg
    assert again.digest() == evaluation.digest()
    assert np.isnan(Evaluation.load(evaluation_of_counts([3]).save(tmp_path / "single")).avg["stderr"])


def test_invalid_evaluations_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no finished evaluation"):
        Evaluation.load(tmp_path)
    target = evaluation_of_counts([1, 2]).save(tmp_path / "m" / "b")
    assert Evaluation.load(tmp_path).path == target
    evaluation_of_counts([1, 2]).save(tmp_path / "m" / "c")
    with pytest.raises(UserError, match="holds 2 evaluations"):
        Evaluation.load(tmp_path)
    (target / "samples.jsonl").write_text('{"problem"')
    with pytest.raises(UserError, match=r"samples\.jsonl is not what was written there"):
        Evaluation.load(target)
    manifest = json.loads((target / "evaluation.json").read_text())
    (target / "evaluation.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        Evaluation.load(target)


def test_a_finished_evaluation_is_reused_only_with_equal_settings(qwen3, tmp_path, monkeypatch):
    first = evaluate("testbed/qwen3", output=tmp_path, **FEW)
    assert first.path == tmp_path / "testbed--qwen3" / "testbed"
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path).samples, qwen3.samples, check_exact=True)
    monkeypatch.setattr(pipeline, "sample", None)
    again = evaluate("testbed/qwen3", output=tmp_path, k=[1, 3], batch_size=5, **FEW)
    assert list(Evaluation.load(tmp_path).pass_at_k["k"]) == list(again.pass_at_k["k"]) == [1, 3]
    for other, difference in (
        ({"seed": 1}, "seed 0 -> 1"),
        ({"max_problems": 7}, "problems"),
        ({"samples": 5}, "samples 4 -> 5"),
    ):
        with pytest.raises(UserError, match=f"already holds an evaluation .*{difference}"):
            evaluate("testbed/qwen3", output=tmp_path, **(FEW | other))


RESUMED = {"samples": 6, "max_problems": 12, "max_new_tokens": 16}


def test_interrupted_and_resumed_gives_the_same_results(tmp_path, monkeypatch):
    options = {**RESUMED, "samples": 2, "max_problems": 6}
    calls = []

    def interrupted(*arguments, **more):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    real = pipeline.sample
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate("testbed/llama", output=tmp_path, batch_size=4, **options)
    assert len(list(tmp_path.glob("*/*/work/*.npz"))) == 2
    resumed = evaluate("testbed/llama", output=tmp_path, batch_size=20, **options)
    uninterrupted = evaluate("testbed/llama", **options)
    pd.testing.assert_frame_equal(resumed.samples, uninterrupted.samples, check_exact=True)
    pd.testing.assert_frame_equal(resumed.problems, uninterrupted.problems, check_exact=True)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_results(tmp_path):
    options = RESUMED
    code = (
        "import sys; from internal_policy.evaluation import evaluate; "
        f"evaluate('testbed/llama', output=sys.argv[1], batch_size=6, **{options!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.PIPE, text=True)
    begun = time.perf_counter()
    while len(list(tmp_path.glob("*/*/work/*.npz"))) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.perf_counter() - begun < 120
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(UserError, match="no finished evaluation"):
        Evaluation.load(tmp_path)
    assert 3 <= len(list(tmp_path.glob("*/*/work/*.npz"))) < 12
    with pytest.raises(UserError, match=r"unfinished evaluation with other settings \(seed 0 -> 1"):
        evaluate("testbed/llama", output=tmp_path, seed=1, **options)
    resumed = evaluate("testbed/llama", output=tmp_path, batch_size=20, **options)
    uninterrupted = evaluate("testbed/llama", **options)
    pd.testing.assert_frame_equal(resumed.samples, uninterrupted.samples, check_exact=True)
    pd.testing.assert_frame_equal(resumed.problems, uninterrupted.problems, check_exact=True)
    assert resumed.avg == uninterrupted.avg
    assert sorted(p.name for p in resumed.path.iterdir()) == sorted(
        ["evaluation.json", "problems.csv", "pass_at_k.csv", "samples.jsonl"]
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, which is not part of the project")
@pytest.mark.parametrize(
    ("file", "n"), [("math500", 500), ("amc2023", 40), ("aime_2024", 30), ("aime_2025", 30), ("deepmath-5k", 5000)]
)
def test_data_files_of_trainers_are_read(file, n):
    problems = benchmarks.read_benchmark(str(DATA / f"{file}.parquet"))
    assert len(problems) == n
    assert all(p.answer and "put your final answer" not in p.problem for p in problems)


def test_a_problem_without_an_answer_is_named(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": " "}]))
    with pytest.raises(UserError, match=r"p\.json: record 2 has no answer"):
        benchmarks.read_benchmark(str(path))
    with pytest.raises(UserError, match="item 1 has no answer"):
        evaluate("testbed/qwen3", ["1+1?"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples is 0"),
        ({"samples": 2.5}, "--samples is 2.5"),
        ({"samples": 4, "k": [1, 8]}, "--k holds 8 and there are 4"),
        ({"k": []}, "--k is empty"),
        ({"samples": 4, "temperature": 0}, "all of them are equal"),
        ({"max_problems": -1}, "--max-problems is -1"),
        ({"template": "x"}, "--template is 'x'"),
        ({"reward": "x"}, "reward 'x' is unknown"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        evaluate("testbed/qwen3", **options)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def evaluated(*arguments):
        run_command(["evaluate", *map(str, arguments)])
        return capsys.readouterr().out

    return evaluated


@pytest.mark.slow
def test_the_command_evaluates_compares_and_draws(run, tmp_path):
    few = ("--samples", 4, "--max-problems", 8, "--max-new-tokens", 40)
    done = run("--model", "testbed/qwen3", "--model", "testbed/llama", *few)
    assert "testbed/qwen3 less testbed/llama on testbed" in done
    assert len(list(tmp_path.glob("data/evaluations/*/testbed/evaluation.json"))) == 2
    assert sorted(p.name for p in tmp_path.glob("figures/testbed--qwen3--testbed--llama--testbed/*.png")) == [
        "fig15_pass_at_k_by_benchmark.png",
        "fig6_pass_at_k.png",
    ]
    done = run(
        "--model", "testbed/qwen3", *few, "--against", "data/evaluations/testbed--llama", "--k", 2, "--output", "o"
    )
    assert "testbed/qwen3 less testbed/llama on testbed" in done
    assert list(Evaluation.load("o").pass_at_k["k"]) == [2]
    assert len(list(tmp_path.glob("o/figures/*/*.pdf"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--samples", "0"), "--samples is 0"),
        (("--reward", "nothing"), "reward 'nothing' is unknown"),
        (("--against", "nowhere"), "no finished evaluation here"),
        (("--model", "nowhere/at/all"), "no such directory"),
        (("--benchmark", "nowhere.jsonl"), "no such file"),
        (("--benchmark", "a/x.jsonl", "--benchmark", "b/x.jsonl"), "would both be written"),
    ],
)
def test_the_command_refuses_in_one_line(run, arguments, message):
    with pytest.raises(UserError) as caught:
        run("--model", "testbed/qwen3", *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stored_evaluation_of_other_problems_is_refused_before_the_work(run, tmp_path):
    evaluation_of_counts([1, 2]).save(tmp_path / "stored")
    with pytest.raises(UserError, match="2 problems of b, but this command uses the 8 of testbed"):
        run("--model", "testbed/qwen3", "--max-problems", 8, "--against", "stored")
    assert not (tmp_path / "data").exists()


def stored_on(problems, name, path):
    """An evaluation of the given problems in which half of the samples are correct."""
    evaluation = evaluation_of_counts([8] * len(problems), name=name, benchmark=path.name)
    texts = {"prompt": [p.problem for p in problems], "answer": [p.answer for p in problems]}
    return replace(evaluation, problems=evaluation.problems.assign(**texts)).save(path)


def test_two_stored_evaluations_of_one_name_are_refused_before_the_work(run, tmp_path):
    problems = benchmarks.read_benchmark("testbed", 8)
    one, other = (stored_on(problems, "some/model", tmp_path / place / "testbed") for place in "ab")
    few = ("--model", "testbed/qwen3", "--max-problems", 8, "--samples", 1, "--max-new-tokens", 1)
    with pytest.raises(UserError, match="--against names two evaluations of some/model on testbed") as caught:
        run(*few, "--against", one, "--against", other)
    assert all(str(path) in str(caught.value) for path in (one, other))
    assert not (tmp_path / "data").exists()


def test_a_stored_evaluation_of_one_of_several_benchmarks_is_shown_where_it_was_made(run, tmp_path):
    for name, start in (("first", 0), ("second", 2)):
        rows = [{"prompt": p.problem, "answer": p.answer} for p in benchmarks.read_benchmark("testbed", 4)[start:][:2]]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stored = stored_on(benchmarks.read_benchmark("first.jsonl"), "some/model", tmp_path / "stored" / "first")
    few = ("--samples", 1, "--max-new-tokens", 1, "--reward", "exact")
    both = ("--benchmark", "first.jsonl", "--benchmark", "second.jsonl")
    # The same evaluation named in two ways is one.
    done = run("--model", "testbed/qwen3", *both, *few, "--against", stored, "--against", stored.parent)
    (row,) = [line.split() for line in done.splitlines() if line.split()[:1] == ["some/model"]]
    assert row[1].startswith("50.00")
    assert row[2:] == ["-"]
    assert "average" not in done
    # Of benchmarks that the models do not share there is no average to draw.
    assert {p.stem for p in tmp_path.glob("figures/*/*.png")} == {"fig15_pass_at_k_by_benchmark"}


def test_the_average_is_over_the_benchmarks_that_all_models_have(capsys):
    counts = {"one": {"a": 16, "b": 8, "c": 0}, "other": {"a": 8, "b": 0}}
    show_evaluations(
        [evaluation_of_counts([k] * 3, name=n, benchmark=b) for n, own in counts.items() for b, k in own.items()]
    )
    out = capsys.readouterr().out
    rows = {words[0]: words[1:] for line in out.splitlines() if (words := line.split())}
    assert [cell.split("±")[0] for cell in rows["one"]] == ["100.00", "50.00", "0.00", "75.00"]
    assert [cell.split("±")[0] for cell in rows["other"]] == ["50.00", "0.00", "-", "25.00"]
    assert "average: of a, b, on which all models were evaluated" in " ".join(out.split())
