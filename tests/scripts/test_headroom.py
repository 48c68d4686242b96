"""The search for a start with headroom: its data, its training, its gate and its command."""

import csv
import dataclasses
import hashlib
import json
import math
import random
import re
import tarfile

import headroom
import headroom_data
import headroom_gate
import numpy as np
import pytest
import torch
from headroom_data import CANDIDATES, IGNORED, Block, Candidate, draw_batch, start_recipe
from headroom_gate import Gate, Measured, Measurement, judge, policy_entropy
from headroom_training import MAX_NEW_TOKENS, Training
from recipe import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from internal_policy.data.arithmetic import LETTERS, check, make_problem, problems

TINY = Candidate("tiny", {1: 1.0, 2: 1.0}, recipe=start_recipe(layers=2, batch=4, clean_steps=4, warmup=2))
TOKENIZER = make_tokenizer(LETTERS)


def work_out(prompt):
    """Work a problem out by Python's own arithmetic: its derived variables in order, and the one asked for."""
    statements, asked = re.fullmatch(r"(.*);([a-i])\?", prompt).groups()
    values, steps = {}, []
    for statement in statements.split(","):
        name, expression = statement.split("=")
        values[name] = eval(expression, {"__builtins__": {}}, values) % 23
        if source := re.match(r"[a-i]", expression):
            steps.append(f"{name}={values[source[0]]}{expression[1:]}={values[name]};")
    return "".join(steps) + rf"\boxed{{{values[asked]}}}", values[asked]


# --- the task ---


def test_problems_of_every_level_are_worked_out_right():
    drawn = problems(400, seed=11, levels=range(1, 9))
    for problem in drawn:
        solution, answer = work_out(problem.prompt)
        assert (problem.solution, problem.answer) == (solution, str(answer))
        assert problem.prompt.count(",") == problem.level
    assert {problem.level for problem in drawn} == set(range(1, 9))
    assert {problem.prompt[-2] for problem in drawn} == set(LETTERS[1:])


def test_problems_of_the_embedded_models_are_those_of_the_first_release():
    digest = hashlib.sha256()
    for seed in range(5):
        rng = random.Random(seed)
        drawn = problems(200, seed=seed, levels=(1, 2, 3, 4)) + problems(200, seed=seed)
        for problem in drawn + [make_problem(rng, 4, 0.4) for _ in range(50)]:
            digest.update(repr(dataclasses.astuple(problem)).encode())
    assert digest.hexdigest() == "a1248a8af8aa9427eca1fb9c04cce6ffc75cabc74f9e08350f5609f4643bffca"


def test_the_longest_solution_fits():
    longest = max(problems(200, seed=12, levels=(8,)), key=lambda problem: len(problem.solution))
    ids = TOKENIZER(longest.solution)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert len(ids) + 1 == 68 < MAX_NEW_TOKENS


# --- the training problems ---


@pytest.mark.parametrize("name", ["constants", "windows", "all-levels", "mixed-20"])
def test_drawn_solutions_are_right(name):
    candidate = CANDIDATES[name]
    levels, letters, lengths = set(), set(), set()
    for step in (1, 2, 51):
        ids_bt, labels_bt = draw_batch(candidate, step)
        for ids, labels in zip(ids_bt, labels_bt, strict=True):
            text = TOKENIZER.decode(ids[ids != TOKENIZER.pad_token_id])
            prompt, response = re.fullmatch(r"<user>(.*)<assistant>(.*)<eos>", text).groups()
            solution, answer = work_out(prompt)
            assert response == solution
            assert check(response, str(answer))
            levels.add(response.count(";"))
            letters |= set(re.findall("[a-i]", prompt))
            lengths.add(prompt.count(",") + 1)
            # Exactly the response is learnt, each token from the position before it.
            wanted = labels != IGNORED
            assert TOKENIZER.decode(labels[wanted]) == response + "<eos>"
            assert torch.equal(labels[wanted], ids[wanted.nonzero()[:, 0] + 1])
    assert levels == set(candidate.levels)
    assert letters == set(LETTERS)
    if candidate.constants:
        assert lengths == set(range(2, 10))
    else:
        assert lengths == {level + 1 for level in candidate.levels}


def test_problems_without_constants_are_those_of_the_task():
    plain = Candidate("plain", {8: 1.0}, constants=False)
    ids_bt, _ = draw_batch(plain, 1)
    drawn = [TOKENIZER.decode(ids[1:]).split("<assistant>")[0] for ids in ids_bt]
    pattern = "a=N" + "".join(f",{LETTERS[i]}=[{LETTERS[:i]}][-+*]N" for i in range(1, 9)) + r";i\?"
    assert all(re.fullmatch(pattern.replace("N", r"\d+"), prompt) for prompt in drawn)
    sources = [set(re.findall(r"(?<=i=)[a-h]", prompt)) for prompt in drawn]
    assert set().union(*sources) == set(LETTERS[:8])


def test_shares_of_levels():
    weights = headroom_data.with_long(0.2)
    assert sum(weight for level, weight in weights.items() if level > 3) / sum(weights.values()) == pytest.approx(0.2)
    counts = np.bincount(
        [int((labels == TOKENIZER.convert_tokens_to_ids(";")).sum()) for labels in _labels("mixed-20")]
    )
    # 3200 problems: a share of 0.2 has a standard error of 0.007, and 4 of them either side are allowed.
    assert counts[4:].sum() / counts.sum() == pytest.approx(0.2, abs=0.028)
    assert counts[3] / counts.sum() == pytest.approx(0.4, abs=0.035)


def test_prompts_are_learnt_as_they_are_asked():
    ids_bt, labels_bt = draw_batch(CANDIDATES["mixed-20"], 1)
    for ids, labels in zip(ids_bt.tolist(), labels_bt.tolist(), strict=True):
        prompt = ids[: next(i for i, label in enumerate(labels) if label != IGNORED) + 1]
        text = TOKENIZER.decode(prompt).removeprefix("<user>").removesuffix("<assistant>")
        asked = TOKENIZER.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        assert asked["input_ids"] == prompt


def _labels(name):
    block = Block(CANDIDATES[name], 0)
    return [labels for step in range(1, 51) for labels in block.batch(step)[1]]


def test_steps_are_drawn_by_the_seed():
    first, second = draw_batch(TINY, 3), draw_batch(TINY, 3)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert not torch.equal(draw_batch(TINY, 4)[0][:, :12], first[0][:, :12])


# --- training ---


def test_training_goes_on_where_it_was_stopped(tmp_path):
    whole = Training(TINY, tmp_path / "whole", "cpu")
    assert [kept.step for kept in whole.run(every=2)] == [2, 4]
    part = Training(TINY, tmp_path / "part", "cpu")
    kept = next(part.run(every=2))
    assert kept.step == 2
    assert math.isfinite(kept.loss)
    resumed = Training(TINY, tmp_path / "part", "cpu")
    assert [kept.step for kept in resumed.run(every=2)] == [2, 4]
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)
    other = dataclasses.replace(TINY, recipe=start_recipe(layers=2, batch=4, clean_steps=4, warmup=3))
    assert Training(other, tmp_path / "part", "cpu").step == 0


def test_a_kept_step_can_be_loaded(tmp_path):
    training = Training(TINY, tmp_path, "cpu")
    path = next(training.run(every=1)).path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert len(tokenizer) == model.config.vocab_size == 46
    assert model.generation_config.max_new_tokens == MAX_NEW_TOKENS
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a=1,i=a*2;i?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<user>a=1,i=a*2;i?<assistant>"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, training.model.state_dict()[name], msg=name)


@pytest.mark.slow
def test_the_loss_is_that_of_the_response_and_falls(tmp_path):
    recipe = start_recipe(layers=2, batch=16, clean_steps=25, warmup=5)
    training = Training(Candidate("falls", {1: 1.0}, constants=False, recipe=recipe), tmp_path, "cpu")
    ids_bt, labels_bt = draw_batch(training.candidate, 1)
    log_p_btv = training.model(input_ids=ids_bt).logits.log_softmax(-1)
    learnt = labels_bt != IGNORED
    expected = -log_p_btv[learnt].gather(1, labels_bt[learnt][:, None]).mean().item()
    losses = [kept.loss for kept in training.run(every=1)]
    # float32, a sum over another order of positions.
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


# --- the gate ---

PASSING = Measured(
    pass_at_1=0.1,
    worked_at_1=0.06,
    k=64,
    pass_at_k=0.97,
    worked_at_k=0.7,
    greedy=0.25,
    entropy=0.3,
    boundary_layer=10,
    n_layers=16,
)


def test_a_start_that_passes():
    assert Gate().failed(PASSING) == []


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({"pass_at_1": 0.04}, ["pass_at_1"]),
        ({"pass_at_1": 0.16}, ["pass_at_1"]),
        ({"pass_at_k": 0.5}, ["pass_at_k"]),
        ({"worked_at_k": 0.1}, ["worked_at_k"]),
        ({"greedy": 0.3}, ["greedy"]),
        ({"entropy": 0.24}, ["entropy"]),
        ({"boundary_layer": 11}, ["boundary_layer"]),
        ({"boundary_layer": None}, ["boundary_layer"]),
        ({"greedy": 0.4, "entropy": 0.1}, ["greedy", "entropy"]),
    ],
)
def test_each_condition_can_fail(changed, failed):
    assert Gate().failed(dataclasses.replace(PASSING, **changed)) == failed


def test_what_was_not_measured_fails():
    assert Gate().failed(Measured(pass_at_1=0.1, worked_at_1=0.1)) == [
        "pass_at_k",
        "worked_at_k",
        "greedy",
        "entropy",
        "boundary_layer",
    ]


def test_guessing_would_pass_but_for_the_solutions():
    # One number of 23 at random: the expected numbers of a model that writes the form and guesses.
    guessing = dataclasses.replace(
        PASSING, pass_at_1=0.0501, pass_at_k=1 - (22 / 23) ** 64, greedy=1 / 23, worked_at_1=0.0, worked_at_k=0.0
    )
    assert Gate().failed(guessing) == ["worked_at_k"]


def test_answers_and_solutions_are_judged_apart():
    asked = problems(3, seed=13, levels=(5,))
    texts = [
        asked[0].solution + "<eos>",
        rf"\boxed{{{asked[1].answer}}}<eos>",
        asked[2].solution.replace("\\boxed{", "\\boxed{1"),
    ]
    sampled = [([], TOKENIZER(text)["input_ids"]) for text in texts]
    assert judge(TOKENIZER, asked, sampled) == ([True, True, False], [True, False, False])
    assert judge(TOKENIZER, asked, [([], TOKENIZER(asked[0].solution)["input_ids"])] * 3)[1] == [False] * 3


def test_policy_entropy_is_the_mean_over_response_tokens(tmp_path):
    model = Training(TINY, tmp_path, "cpu").model.eval()
    sampled = [([2, 30, 40], [31, 41, 4]), ([2, 30], [5]), ([2, 7, 8, 9], [10, 11])]
    entropies = []
    for prompt, ids in sampled:
        p = model(input_ids=torch.tensor([prompt + ids])).logits[0].double().softmax(-1)
        entropies += [-(q * q.log()).sum().item() for q in p[len(prompt) - 1 : -1]]
    assert len(entropies) == 6
    # float32 logits of size 1 leave entropies of size 4 within some 1e-6.
    assert policy_entropy(model, sampled, rows=2) == pytest.approx(np.mean(entropies), abs=1e-5)


def test_a_model_is_measured(tmp_path, monkeypatch):
    training = Training(TINY, tmp_path, "cpu")
    monkeypatch.setattr(headroom_gate, "MAX_NEW_TOKENS", 20)
    measured = Measurement(problems_per_level=1, k=2, analysed=2).measure(training.model, training.tokenizer)
    assert (measured.k, measured.n_layers, len(measured.ffn_change)) == (2, 2, 2)
    assert 0 <= measured.worked_at_1 <= measured.pass_at_1 <= measured.pass_at_k <= 1
    assert 0 < measured.entropy <= math.log(46)
    assert len(measured.worked_by_level) == 4
    assert 0 <= measured.ended <= 1
    assert measured.boundary_layer is None or 1 <= measured.boundary_layer <= 2


@pytest.mark.parametrize(
    ("share", "worked", "loss", "k"),
    [
        (0.1, True, 0.2, 2),
        (0.1, True, math.nan, 2),
        (0.0, True, 0.2, None),
        (0.9, True, 0.2, None),
        (0.1, False, 0.2, None),
        (0.1, True, 0.7, None),
    ],
)
def test_only_what_is_near_the_gate_is_measured_in_full(share, worked, loss, k, monkeypatch):
    measurement = Measurement(screening_samples=1)
    right = np.arange(10)[:, None] < 10 * share
    monkeypatch.setattr(Measurement, "_sample", lambda *_: ([], right, right & worked))
    monkeypatch.setattr(Measurement, "measure", lambda *_: Measured(0.1, 0.1, k=2))
    measured = measurement.look(None, None, loss)
    assert measured.k == k
    assert measured.pass_at_1 == (None if loss > 0.6 else share)


# --- the command ---


def test_the_command_writes_a_table_and_the_best_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "tiny", TINY)
    looks, numbers = [], iter((PASSING, dataclasses.replace(PASSING, greedy=0.5)))

    class Numbers(Measurement):
        def look(self, *_):
            return next(numbers)

    search = headroom.Search(tmp_path / "work", "cpu", 2, math.inf, Numbers(), {"other": {2}})
    queue = type("Queue", (), {"put": lambda _, look: looks.append(look)})()
    headroom.train_candidate("tiny", search, queue)
    rows = [{key: str(value) for key, value in look.row(Gate()).items()} for look in looks]
    assert [(row["step"], row["passes"], row["failed"]) for row in rows] == [("2", "1", ""), ("4", "0", "greedy")]
    (tmp_path / "work" / "other" / "step-00002").mkdir(parents=True)
    rows += [{**rows[0], "step": "99"}, {**rows[0], "candidate": "other", "failed": "greedy entropy"}]
    best = headroom.best_rows(rows[::-1], tmp_path / "work")
    assert [(row["candidate"], row["step"]) for row in best] == [("tiny", "2"), ("other", "2")]
    first, _ = headroom.pack(best, tmp_path / "work", tmp_path)
    assert first.name == "start-1.tar.gz"
    with tarfile.open(first) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked" / "tiny-2").config.num_hidden_layers == 2


def test_a_candidate_beyond_the_gate_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setitem(CANDIDATES, "tiny", TINY)

    class Beyond(Measurement):
        def look(self, *_):
            return Measured(0.9, 0.9)

    looks = []
    queue = type("Queue", (), {"put": lambda _, look: looks.append(look)})()
    headroom.train_candidate("tiny", headroom.Search(tmp_path, "cpu", 1, math.inf, Beyond(), {}), queue)
    assert [look.step for look in looks] == [1, 2]


def test_unknown_candidates_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        headroom.main(["--candidates", "mixed-5,other"])
    assert error.value.code == 2
    assert "no candidate is called 'other'; there are mixed-5, constants" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_stops_by_itself_and_goes_on(tmp_path):
    arguments = ["--candidates", "windows", "--device", "cpu", "--every", "1", "--problems", "1", "--samples", "2"]
    arguments += ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert headroom.main([*arguments, "--minutes", "0.5"]) == 0
    before = headroom.read_rows(tmp_path / "gate.csv")
    assert headroom.main([*arguments, "--minutes", "0.5"]) == 0
    with (tmp_path / "gate.csv").open(newline="") as file:
        after = list(csv.DictReader(file))
    assert after[: len(before)] == before
    steps = [int(row["step"]) for row in after]
    assert steps == list(range(1, len(after) + 1))
    assert len(after) > len(before)
    kept = tmp_path / "work" / "windows" / "step-00001" / "candidate.json"
    assert json.loads(kept.read_text())["levels"] == {"1": 1.0, "2": 2.0, "3": 3.0}
