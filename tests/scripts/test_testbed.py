"""The embedded default: its task, its tokenizer, its two models and the command that makes them."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import make as make_module
import pytest
import torch
import train as train_module
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import accuracy, respond
from recipe import Recipe, build_model, make_tokenizer, words
from train import Muon, draw_batch, lr_scale, orthogonalise, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from internal_policy.data.arithmetic import check, make_problem, problems
from internal_policy.models import testbed
from internal_policy.utils.errors import UserError

TINY = Recipe(layers=2, batch=4, clean_steps=2, restart_steps=1, slip_steps=2, warmup=1)


def solve(prompt: str) -> int:
    """Work a problem out by Python's own arithmetic, from its text alone."""
    statements, variable = re.fullmatch(r"(.*);([a-e])\?", prompt).groups()
    values = {}
    for statement in statements.split(","):
        name, expression = statement.split("=")
        values[name] = eval(expression, {"__builtins__": {}}, values) % 23
    return values[variable]


@pytest.fixture(scope="module", params=testbed.NAMES)
def loaded(request):
    directory = testbed.path(request.param)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return request.param, model, AutoTokenizer.from_pretrained(directory)


# --- the task ---


def test_answers_solve_their_prompts():
    drawn = problems(400, seed=5, levels=(1, 2, 3, 4))
    for problem in drawn:
        assert problem.answer == str(solve(problem.prompt))
        assert problem.prompt.count("=") == problem.level + 1
        assert problem.solution.endswith(rf"\boxed{{{problem.answer}}}")
        assert check(problem.solution, problem.answer)
    assert {problem.level for problem in drawn} == {1, 2, 3, 4}


def test_every_written_step_is_true():
    for problem in problems(100, seed=6):
        for step in problem.solution.split(";")[:-1]:
            _, expression, result = step.split("=")
            assert eval(expression) % 23 == int(result)


def test_problems_are_seeded():
    assert problems(20, seed=1) == problems(20, seed=1)
    assert problems(20, seed=1) != problems(20, seed=2)
    assert {problem.level for problem in problems(50, seed=3)} == {2, 3, 4}


def test_slips_change_the_solution_but_not_the_answer():
    rng = random.Random(0)
    slipped = [make_problem(rng, 4, slip=0.5) for _ in range(100)]
    assert all(problem.answer == str(solve(problem.prompt)) for problem in slipped)
    assert 10 < sum(check(problem.solution, problem.answer) for problem in slipped) < 60


def test_a_level_out_of_range_is_refused():
    with pytest.raises(ValueError, match="level 9: must be from 1 to 8"):
        problems(1, seed=0, levels=(9,))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"b=1;\boxed{7}", True),
        (r"\boxed{3}\boxed{7}", True),
        (r"\boxed{7}\boxed{3}", False),
        (r"\boxed{ 7 }", True),
        (r"\boxed{07}", False),
        (r"\boxed{7", False),
        (r"\boxed{}", False),
        ("7", False),
        ("", False),
    ],
)
def test_check_reads_the_last_box(text, right):
    assert check(text, "7") is right


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="\\boxed{}07 \n;") | st.text(), st.integers(0, 22))
def test_check_never_raises_and_uses_the_last_box(text, answer):
    assert isinstance(check(text, str(answer)), bool)
    assert check(text + rf" \boxed{{{answer}}}", str(answer))


# --- the tokenizer ---


def test_tokenizer_round_trip():
    tokenizer = make_tokenizer()
    for problem in problems(50, seed=7):
        for text in (problem.prompt, problem.solution):
            ids = tokenizer(text)["input_ids"]
            assert [words()[i] for i in ids] == re.findall(r"\\boxed\{|\d+|.", text)
            assert tokenizer.decode(ids) == text


def test_chat_template():
    tokenizer = make_tokenizer()
    messages = [{"role": "user", "content": "a=1;a?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<user>a=1;a?<assistant>"
    )
    messages.append({"role": "assistant", "content": r"\boxed{1}"})
    assert tokenizer.apply_chat_template(messages, tokenize=False) == r"<user>a=1;a?<assistant>\boxed{1}<eos>"


def test_decoding_skips_specials_for_check():
    tokenizer = make_tokenizer()
    ids = tokenizer(r"<pad><pad>b=3;\boxed{3}<eos><pad>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == r"b=3;\boxed{3}"


# --- the models ---


def test_architecture(loaded):
    name, model, _ = loaded
    assert f"testbed/{model.config.model_type}" == name
    assert model.dtype == torch.float32
    # Only Qwen3 has query and key norms, and everything else is shared.
    assert hasattr(model.model.layers[0].self_attn, "q_norm") == (name == "testbed/qwen3")


def test_both_models_have_the_same_size():
    sizes = [AutoModelForCausalLM.from_pretrained(testbed.path(name)).num_parameters() for name in testbed.NAMES]
    assert max(sizes) / min(sizes) < 1.01


def test_auto_tokenizer_loads_the_saved_tokenizer(loaded):
    name, _, auto = loaded
    plain = PreTrainedTokenizerFast.from_pretrained(testbed.path(name))
    problem = problems(1, seed=8)[0]
    for tokenizer in (auto, plain):
        assert tokenizer.get_vocab() == {word: i for i, word in enumerate(words())}
        assert tokenizer.decode(tokenizer(problem.solution)["input_ids"]) == problem.solution
        assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<pad>", "<eos>", "left")


@pytest.mark.slow
def test_accuracy_leaves_room(loaded):
    _, model, tokenizer = loaded
    held_out = problems(200, seed=9)
    table = accuracy(tokenizer, held_out, respond(model, tokenizer, held_out, seed=1))
    # The claim is 40-60%; 200 problems have a standard error of 3.5 points, so 3 of them either side.
    assert 0.40 - 0.105 < table["all"]["mean"] < 0.60 + 0.105


@pytest.mark.parametrize("name", testbed.NAMES)
def test_measured_accuracy_leaves_room(name):
    card = json.loads((testbed.path(name) / "measurements.json").read_text())["pass@1"]["all"]
    assert 0.40 <= card["mean"] <= 0.60
    assert card["n"] >= 500


def test_responses_end(loaded):
    _, model, tokenizer = loaded
    responses = respond(model, tokenizer, problems(20, seed=10), greedy=True)
    ended = sum(response[-1] == tokenizer.eos_token_id for _, response in responses)
    assert ended >= 19


def test_size_on_disk():
    files = [file for name in testbed.NAMES for file in testbed.path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12e6


# --- finding them ---


def test_unknown_name_is_a_user_error():
    with pytest.raises(UserError, match=r"'testbed/gpt2'; there are testbed/qwen3 and testbed/llama"):
        testbed.path("testbed/gpt2")


def test_missing_weights_say_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr(testbed, "__file__", str(tmp_path / "internal_policy" / "testbed" / "__init__.py"))
    with pytest.raises(UserError, match="make testbed"):
        testbed.path("testbed/llama")


def test_import_is_light():
    code = "import sys, internal_policy.models.testbed, internal_policy.data.arithmetic\n"
    code += "sys.exit(' '.join({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == ""


# --- making them ---


@pytest.mark.slow
def test_make_writes_a_loadable_model(tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "stale").write_text("from an earlier run")
    arguments = ["--out", str(tmp_path), "--models", "llama", "--eval", "4"]
    arguments += ["--steps", "2", "--restart-steps", "0", "--slip-steps", "1"]
    make_module.main(arguments)
    assert [entry.name for entry in tmp_path.iterdir()] == ["llama"]
    assert not (tmp_path / "llama" / "stale").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert model.config.model_type == "llama"
    measured = json.loads((tmp_path / "llama" / "measurements.json").read_text())
    assert len(measured["curves"]["dH_ffn"]) == model.config.num_hidden_layers
    assert measured["pass@1"]["all"]["n"] == 4


def test_a_failed_write_leaves_the_old_model(tmp_path, monkeypatch):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "old").write_text("kept")
    tokenizer = make_tokenizer()
    model = build_model("llama", TINY, tokenizer)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_module._write(tmp_path / "llama", model, tokenizer, {})
    assert [entry.name for entry in tmp_path.rglob("*")] == ["llama", "old"]


def test_interrupted_training_resumes(tmp_path: Path, monkeypatch):
    tokenizer = make_tokenizer()
    whole = build_model("qwen3", TINY, tokenizer)
    train(whole, tokenizer, TINY)

    monkeypatch.setattr(train_module, "SAVE_EVERY", 2)

    def stop(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(build_model("qwen3", TINY, tokenizer), tokenizer, TINY, checkpoint, stop)
    resumed, steps = build_model("qwen3", TINY, tokenizer), []
    train(resumed, tokenizer, TINY, checkpoint, lambda step, _: steps.append(step))
    assert steps == [3, 4, 5]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_training_lowers_the_loss():
    tokenizer, losses = make_tokenizer(), []
    recipe = Recipe(layers=2, batch=8, clean_steps=30, restart_steps=0, slip_steps=0, warmup=5)
    train(build_model("llama", recipe, tokenizer), tokenizer, recipe, on_step=lambda _, loss: losses.append(loss))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_learning_rate_warms_up_and_falls_in_each_stage():
    recipe = Recipe(clean_steps=100, restart_steps=60, slip_steps=50, warmup=10)
    scale = [lr_scale(recipe, step) for step in range(1, 211)]
    assert max(scale[:100]) == pytest.approx(1, abs=0.05)
    assert scale[0] < 0.2
    assert scale[99] == pytest.approx(recipe.final_lr_scale)
    assert max(scale[100:160]) == pytest.approx(recipe.restart_lr_scale, abs=0.05)
    assert max(scale[160:]) == pytest.approx(recipe.slip_lr_scale, abs=0.05)
    with pytest.raises(ValueError, match="step 211: the recipe has 210"):
        lr_scale(recipe, 211)


def test_only_the_last_stage_has_slips():
    recipe = Recipe(clean_steps=1, restart_steps=1, slip_steps=1, slip=1.0)
    right = [all(check(p.solution, p.answer) for p in draw_batch(recipe, step)) for step in (1, 2, 3)]
    assert right == [True, True, False]
    assert draw_batch(recipe, 1) == draw_batch(recipe, 1) != draw_batch(recipe, 2)


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 8, 8)])
def test_muon_makes_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.4
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 96), (192, 96), (96, 96)])
def test_muon_steps_match_torch(shape):
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(shape)), torch.nn.Parameter(torch.empty(shape))
    theirs.data.copy_(ours.data)
    start = ours.detach().clone()
    options = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.1}
    pair = (Muon([ours], **options), torch.optim.Muon([theirs], **options))
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, wanted = (ours - start).flatten(), (theirs - start).flatten()
    # torch's works in bfloat16, whose 8 bits leave its steps parts in a hundred off.
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.999
    assert float(moved.detach().norm() / wanted.detach().norm()) == pytest.approx(1, abs=0.02)
