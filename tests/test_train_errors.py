"""Every bad input to training, from Python and on the command line: one clear line, and nothing half-written."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from test_cli_errors import make_unloadable, run
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from transformers import TrainerCallback

from internal_policy import UserError, analyze, bupo, cli, select_layer
from internal_policy.bupo import plan as planning

MODEL = "testbed/qwen3"
LAYERS = 8
SMALL = {
    "layer": 2,
    "ipa_steps": 1,
    "max_steps": 2,
    "prompts_per_step": 2,
    "num_generations": 4,
    "mini_batches": 1,
    "eval_samples": 0,
    "dynamics_every": 0,
    "max_completion_length": 8,
}


def everything(directory):
    if not directory.is_dir():
        return directory.read_bytes() if directory.exists() else None
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def refused(output, model=MODEL, began=False, **options):
    """What a refused call says; what was in its output directory before is there, and nothing else."""
    before = everything(output)
    with pytest.raises(UserError) as info:
        bupo.train(model, output=output, **{**SMALL, **options})
    told = str(info.value)
    assert "\n" not in told
    assert began or everything(output) == before
    return told


def command(monkeypatch, capsys, *arguments):
    """The command line in this process: exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", ["internal-policy", *map(str, arguments)])
    logger = logging.getLogger("internal_policy")
    handlers = list(logger.handlers)
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        logger.handlers = handlers
    told = capsys.readouterr()
    return stop.value.code or 0, told.out, told.err


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (0, f"layer is 0; needed is a layer of this model, 1 to {LAYERS}"),
        (LAYERS + 1, "layer is 9; needed is a layer of this model"),
        (-1, "layer is -1; needed is a layer of this model"),
        ("-1", "layer is -1; needed is a layer of this model"),
        ("deep", "layer is 'deep'; needed is a number from 1, auto, or the directory of an analysis"),
        (2.5, "layer is a float"),
        (True, "layer is a bool"),
        ("./nowhere", "layer is './nowhere'; needed is a number from 1, auto"),
    ],
)
def test_layers_that_are_none(tmp_path, layer, message):
    assert message in refused(tmp_path / "out", layer=layer)


def analysis_of(curve, **model):
    """An analysis of a small model, with the answer that the rule gives for a curve."""
    made = analyze(tiny_model("qwen3", **model), tiny_tokenizer(), responses=ragged_responses(3))
    return replace(made, selection=select_layer(curve))


@pytest.mark.parametrize(
    ("model", "message"), [({"layers": 3}, "layers 3)"), ({"layers": LAYERS}, "vocabulary 61)")], ids=str
)
def test_an_analysis_of_another_model(tmp_path, model, message):
    found = analysis_of([0.9, 0.7, 0.4, 0.0, 0.1, -0.2, -0.6, -1.1], **model)
    told = refused(tmp_path / "out", layer=found)
    assert "the analysis is of another model" in told
    assert message in told


def test_an_analysis_without_a_boundary_layer_names_candidates(tmp_path):
    found = analysis_of([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.4], layers=3)
    assert found.boundary_layer is None
    told = refused(tmp_path / "out", layer=found)
    assert "finds no boundary layer" in told
    assert f"candidates: {', '.join(map(str, found.selection.candidates)) or 'none'}; give one of them" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipa_steps": 3}, "ipa_steps is 3 and the run has 2 steps; needed is 0 to 2, or auto"),
        ({"ipa_steps": -1}, "ipa_steps is -1"),
        ({"ipa_steps": "some"}, "ipa_steps is 'some'; needed is a number of steps or auto"),
        ({"ipa_steps": 1, "method": "grpo"}, "only bupo has a first phase"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"method": "ppo"}, "method is 'ppo'; needed is one of bupo, grpo, rloo, reinforce++"),
        ({"preset": "qwen9"}, "preset is 'qwen9'; needed is one of qwen, qwen3-8b, llama, testbed"),
        ({"site": "mlp"}, "site is 'mlp'; needed is one of layer, attn, ffn"),
        ({"lens": "wide"}, "lens is 'wide'; needed is one of policy, logit-lens"),
        ({"aggregation": "sum"}, "aggregation is 'sum'; needed is one of sequence-mean, token-mean"),
        ({"loss_type": "gspo"}, "loss_type is 'gspo'; needed is one of grpo"),
        ({"aggregation": "token-mean", "loss_type": "grpo"}, "both aggregation='token-mean' and loss_type='grpo'"),
        ({"template": "qwen9"}, "template is 'qwen9'"),
        ({"lerning_rate": 1e-4}, "unknown option 'lerning_rate'; did you mean learning_rate?"),
        ({"prompt_per_step": 4}, "unknown option 'prompt_per_step'; did you mean prompts_per_step?"),
        ({"zzz": 1}, "unknown option 'zzz'; known are those of `train`, BuPOConfig and GRPOConfig"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; needed is a number"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; needed is at least 0"),
        ({"epsilon": float("nan")}, "epsilon is nan; needed is a number"),
        ({"temperature": 0.0}, "temperature is 0.0; needed is a number above 0"),
        ({"bf16": "maybe"}, "bf16 is 'maybe'; needed is true or false"),
        ({"seed": 1.5}, "seed is 1.5; needed is a whole number"),
        ({"num_generations": 1}, "num_generations is 1; needed is at least 2"),
        ({"max_completion_length": 0}, "max_completion_length is 0; needed is at least 1"),
        (
            {"freeze_layers": 9, "method": "grpo", "ipa_steps": 0},
            f"freeze_layers is 9 and the model has {LAYERS} layers",
        ),
        ({"optim": "sgdd"}, "the trainer refuses its options: sgdd is not a valid"),
        ({"report_to": "paper"}, "the trainer refuses its options: paper is not supported"),
        ({"prompts_per_step": 3, "num_generations": 5, "mini_batches": 2}, "do not divide into 2 mini-batches"),
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size is 3, and 2 prompts x 4 generations give 8"),
        ({"steps_per_generation": 2}, "both prompts_per_step and steps_per_generation were given"),
        ({"max_completion_length": 100_000}, "max_completion_length is 100000, the longest prompt has"),
        ({"max_prompt_length": 1}, "max_prompt_length is 1 and the shortest prompt has"),
        ({"eval_samples": 1, "benchmark": "missing.jsonl"}, "missing.jsonl: no such file"),
    ],
    ids=str,
)
def test_bad_settings(tmp_path, options, message):
    assert message in refused(tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("package", "options", "message"),
    [
        ("wandb", {"report_to": "wandb"}, "report_to='wandb' needs a package of that name"),
        ("vllm", {"use_vllm": True}, "use_vllm=True needs the package vllm"),
    ],
)
def test_packages_that_are_not_installed(tmp_path, package, options, message):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    assert message in refused(tmp_path / "out", **options)


ONLY_FOR_THE_POLICY = [
    ({"beta": 0.1}, "log-probabilities of pi^l with those of the reference's final policy"),
    ({"top_entropy_quantile": 0.2}, "chosen by the entropy of pi^l"),
    ({"entropy_coef": 0.01}, "the bonus would raise the entropy of pi^l"),
    ({"off_policy_mask_threshold": 0.5}, "the mask would compare log-probabilities of pi^l"),
    ({"loss_type": "vespo"}, "its weights correct for the policy that sampled"),
    ({"use_vllm": True, "vllm_importance_sampling_correction": True}, "the correction would compare"),
]


@pytest.mark.parametrize(("options", "why"), ONLY_FOR_THE_POLICY, ids=lambda value: str(value)[:40])
def test_what_has_no_meaning_for_an_internal_policy(tmp_path, options, why):
    told = refused(tmp_path / "out", **options)
    assert why in told
    assert "set ipa_steps=0" in told


@pytest.mark.parametrize("options", [options for options, _ in ONLY_FOR_THE_POLICY], ids=str)
@pytest.mark.parametrize("first", [{"method": "grpo", "ipa_steps": None}, {"ipa_steps": 0}], ids=str)
def test_what_is_fine_without_one(tmp_path, options, first):
    words = {**SMALL, **first}
    chosen = {key: words.pop(key) for key in ("method", "ipa_steps", "max_steps") if key in words}
    plan, trainers = planning.split(MODEL, chosen, {**words, **options, "use_vllm": False})
    config = planning.configure(plan, trainers, str(tmp_path), 1, "cpu")
    assert not config.aligns
    assert all(getattr(config, name) == value for name, value in options.items() if name != "use_vllm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "given.jsonl: no such file"),
        ("", "is empty; needed is at least one record"),
        ('{"prompt": "1+1="}\n', "prompt 1 has no answer"),
        ('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2=", "answer": ""}\n', "prompt 2 has no answer"),
        ('{"text": "1+1="}\n', "has values for ['text']"),
    ],
)
def test_prompts_that_cannot_be_trained_on(tmp_path, content, message):
    path = tmp_path / "given.jsonl"
    if content is not None:
        path.write_text(content)
    assert message in refused(tmp_path / "out", prompts=path)
    assert message in refused(tmp_path / "out", prompts=path, reward="exact")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("maths", "reward 'maths' is unknown; use math, exact, module:function"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("json:no_such_function", "the module 'json' has no 'no_such_function'"),
        (lambda prompts, completions, **_: [1.0], "returned 1 numbers; needed is a list of 8 numbers"),
        (lambda prompts, completions, **_: [float("nan")] * len(completions), "returned nan; needed is a finite"),
        (lambda prompts, completions, **_: ["good"] * len(completions), "returned a str; needed is a finite number"),
        (lambda prompts, completions, **_: [1 / 0], "fails on every sample: ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "function",
)
def test_rewards_that_are_none(tmp_path, reward, message):
    # What a function returns is only known when the training has begun; mended, the same command goes on.
    assert message in refused(tmp_path / "out", reward=reward, began=callable(reward))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "no such model on the hub, or no network"),
        ("./nowhere", "./nowhere: no such directory"),
        ("testbed/gpt5", "there are testbed/qwen3 and testbed/llama"),
    ],
)
def test_models_that_are_not_there(tmp_path, name, message):
    assert message in refused(tmp_path / "out", model=name)


def test_an_encoder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    make_unloadable("encoder", tmp_path / "bad", tmp_path / "model")
    assert "BertForMaskedLM is not a causal LM" in refused(tmp_path / "out", model=tmp_path / "bad")


def test_output_that_is_something_else(tmp_path):
    (tmp_path / "file").write_text("a file")
    assert "is a file); choose another --output" in refused(tmp_path / "file")
    assert "is a file); choose another --output" in refused(tmp_path / "file" / "below")
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("years of work")
    assert "is in use for something else (it holds thesis.tex)" in refused(used)
    assert "is in use for something else" in refused(used, overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_that_may_not_be_written(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "may not be written to" in refused(tmp_path / "locked" / "out")


class Stop(TrainerCallback):
    """Breaks off when the first step is over."""

    def __init__(self, error):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise self.error


def test_a_directory_that_holds_another_run(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bupo.train(MODEL, output=out, callbacks=[Stop(KeyboardInterrupt())], **SMALL)
    told = refused(out, model="testbed/llama")
    assert "holds an unfinished run with other settings (model testbed/qwen3 -> testbed/llama" in told
    assert "add --overwrite to start over" in told
    assert "(learning_rate 0.0001 -> 0.001)" in refused(out, learning_rate=1e-3)
    assert "(layer 2 -> 3)" in refused(out, layer=3)

    bupo.train(MODEL, output=out, **SMALL)
    assert "already holds a run with other settings (layer 2 -> 3)" in refused(out, layer=3)
    assert "(model testbed/qwen3 -> testbed/llama" in refused(out, model="testbed/llama")

    (out / "notes.txt").write_text("mine")
    again = bupo.train(MODEL, output=out, overwrite=True, **{**SMALL, "layer": 3, "max_steps": 1})
    assert (again.layer, len(again.history)) == (3, 1)
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_out_of_memory_says_what_to_lower(tmp_path):
    stop = Stop(torch.OutOfMemoryError("out of memory"))
    told = refused(tmp_path / "out", callbacks=[stop], began=True)
    assert "out of memory in training; lower per_device_train_batch_size (now 8) or max_completion_length" in told


BAD_ARGUMENTS = [
    (["--method", "ppo"], "--method is 'ppo'; needed is one of bupo, grpo, rloo, reinforce++"),
    (["--preset", "qwen9"], "--preset is 'qwen9'"),
    (["--aggregation", "sum"], "--aggregation is 'sum'"),
    (["--template", "qwen9"], "--template is 'qwen9'"),
    (["--dtype", "int8"], "--dtype is 'int8'"),
    (["--site", "mlp"], "'mlp' is not one of"),
    (["--lens", "wide"], "'wide' is not one of"),
    (["--ipa-steps", "5", "--max-steps", "4"], "--ipa-steps is 5 and --max-steps 4"),
    (["--ipa-steps", "-1"], "--ipa-steps is -1; needed is a number of steps of at least 0, or auto"),
    (["--max-steps", "0"], "Invalid value for '--max-steps'"),
    (["--set", "beta"], "--set is 'beta'; needed is name=value"),
    (["--set", "=1"], "--set is '=1'; needed is name=value"),
    (["--set", "callbacks=[]"], "--set callbacks takes an object"),
    (["--max-steps", "4", "--set", "max_steps=5"], "max_steps was given twice"),
    (["--set", "epsilon=0.1", "--set", "epsilon=0.2"], "epsilon was given twice"),
    (["--set", "epsilonn=0.1"], "unknown option 'epsilonn'; did you mean epsilon?"),
    (["--set", "epsilon=low"], "epsilon is 'low'; needed is a number"),
    (["--layer", "9"], "layer is 9; needed is a layer of this model, 1 to 8"),
    (["--reward", "maths"], "reward 'maths' is unknown"),
    (["--prompts", "missing.jsonl"], "missing.jsonl: no such file"),
    (["--no-such-option"], "No such option: --no-such-option"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=str)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, "train", *arguments, "--output", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_in_a_process_of_its_own(tmp_path):
    done = run("train", "--ipa-steps", "9", "--max-steps", "4", "--output", "out", cwd=tmp_path)
    assert done.stdout == ""
    assert done.stderr == "error: --ipa-steps is 9 and --max-steps 4; needed is at most --max-steps, or auto\n"
    assert list(tmp_path.iterdir()) == []


def test_a_reward_that_breaks_the_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "breaking.py").write_text("def reward(prompts, completions, **_):\n    return [1.0]\n")
    arguments = ["--layer", "2", "--max-steps", "2", "--prompts-per-step", "2", "--eval-samples", "0"]
    code, out, err = command(monkeypatch, capsys, "train", *arguments, "--reward", "breaking:reward", "--output", "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: reward function 'reward' returned 1 numbers; needed is a list of 16")
    assert not (tmp_path / "out" / "run.json").exists()


def test_figures_of_what_has_none(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text(json.dumps({"name": "x"}))
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, message in (
        ("empty", "no finished analysis here, nor a training run or an evaluation"),
        ("nowhere", "no finished analysis here, nor a training run or an evaluation"),
        ("broken", "cannot be read ('schema_version')"),
        ("unfinished", "holds a run that has not ended"),
    ):
        code, out, err = command(monkeypatch, capsys, "figures", name)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert not (tmp_path / "figures").exists()


def test_the_directory_is_named_by_the_layer_also_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    named = tmp_path / "data" / "runs" / "testbed--qwen3--bupo-l2-s1-seed0"
    named.mkdir(parents=True)
    (named / "thesis.tex").write_text("years of work")
    code, _, err = command(monkeypatch, capsys, "train", "--layer", "2", "--ipa-steps", "1", "--max-steps", "2")
    assert code == 2
    assert f"{named.relative_to(tmp_path)}: is in use for something else (it holds thesis.tex)" in err
