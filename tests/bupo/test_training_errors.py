"""Every invalid input to training, from Python and the command line: a one-line error and no partial output."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from command_line import make_unloadable
from tiny import ragged_responses, tiny_model, tiny_tokenizer
from training_calls import LAYERS, MODEL, SMALL, refused
from transformers import TrainerCallback

from internal_policy import analyze, bupo, select_layer
from internal_policy.bupo.config import TrainConfig
from internal_policy.bupo.trainer_config import make_trainer_config


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (0, f"layer is 0; needed is a layer of this model, 1 to {LAYERS}"),
        (LAYERS + 1, "layer is 9; needed is a layer of this model"),
        (-1, "layer is -1; needed is a layer of this model"),
        ("-1", "layer is -1; needed is a layer of this model"),
        ("deep", "layer is 'deep'; needed is a number from 1, auto, or the directory of an analysis"),
        (2.5, "layer is a float"),
        ("\u00b2", "layer is '\u00b2'; needed is a number from 1, auto, or"),
        (True, "layer is a bool"),
        ("./nowhere", "layer is './nowhere'; needed is a number from 1, auto"),
    ],
)
def test_invalid_layers(tmp_path, layer, message):
    assert message in refused(tmp_path / "out", layer=layer)


def analysis_of(curve, **model):
    """An analysis of a small model with the layer selected for a given curve."""
    analysis = analyze(tiny_model("qwen3", **model), tiny_tokenizer(), responses=ragged_responses(3))
    return replace(analysis, selection=select_layer(curve))


@pytest.mark.parametrize(
    ("model", "message"), [({"layers": 3}, "layers 3)"), ({"layers": LAYERS}, "vocabulary 61)")], ids=str
)
def test_an_analysis_of_another_model(tmp_path, model, message):
    found = analysis_of([0.9, 0.7, 0.4, 0.0, 0.1, -0.2, -0.6, -1.1], **model)
    error = refused(tmp_path / "out", layer=found)
    assert "the analysis is of another model" in error
    assert message in error


def test_an_analysis_without_a_boundary_layer_names_candidates(tmp_path):
    found = analysis_of([0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.4], layers=3)
    assert found.boundary_layer is None
    message = refused(tmp_path / "out", layer=found)
    assert "finds no boundary layer" in message
    assert f"candidates: {', '.join(map(str, found.selection.candidates)) or 'none'}; give one of them" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipa_steps": 3}, "ipa_steps is 3 and the run has 2 steps; needed is 0 to 2, or auto"),
        ({"ipa_steps": -1}, "ipa_steps is -1"),
        ({"ipa_steps": "some"}, "ipa_steps is 'some'; needed is a number of steps or auto"),
        ({"ipa_steps": [3]}, "ipa_steps is [3]; needed is a number of steps or auto"),
        ({"ipa_steps": {}}, "ipa_steps is {}; needed is a number of steps or auto"),
        ({"trl_options": 5}, "trl_options is of type int; needed is a dict of options of TRL"),
        ({"callbacks": 5}, "callbacks is of type int; needed is a list of transformers callbacks"),
        ({"ipa_steps": 1, "method": "grpo"}, "only bupo has a first phase"),
        ({"ipa_steps": "\u00b2"}, "ipa_steps is '\u00b2'; needed is a number of steps or auto"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"method": "dpo"}, "method is 'dpo'; needed is one of bupo, grpo, rloo, reinforce++, ppo"),
        ({"preset": "qwen9"}, "preset is 'qwen9'; needed is one of qwen, qwen3-8b, llama, testbed"),
        ({"site": "mlp"}, "site is 'mlp'; needed is one of layer, attn, ffn"),
        ({"lens": "wide"}, "lens is 'wide'; needed is one of policy, logit-lens"),
        ({"aggregation": "sum"}, "aggregation is 'sum'; needed is one of sequence-mean, token-mean"),
        ({"loss_type": "gspo"}, "loss_type is 'gspo'; needed is one of grpo"),
        ({"aggregation": "token-mean", "loss_type": "grpo"}, "both aggregation='token-mean' and loss_type='grpo'"),
        ({"template": "qwen9"}, "template is 'qwen9'"),
        ({"lerning_rate": 1e-4}, "unknown option 'lerning_rate'; did you mean learning_rate?"),
        ({"prompt_per_step": 4}, "unknown option 'prompt_per_step'; did you mean prompts_per_step?"),
        ({"zzz": 1}, "unknown option 'zzz'; known are the fields of TrainConfig and of GRPOConfig"),
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
        ({"only_layer": 0}, "only_layer is 0; needed is at least 1"),
        ({"only_layer": 9, "method": "grpo", "ipa_steps": 0}, f"only_layer is 9 and the model has {LAYERS} layers"),
        ({"optim": "sgdd"}, "the trainer refuses its options: sgdd is not a valid"),
        ({"report_to": "paper"}, "the trainer refuses its options: paper is not supported"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "the trainer refuses its options: One of min_lr or min_lr_rate"),
        ({"optim": "lomo"}, "the trainer refuses its options: You need to install"),
        ({"optim_args": "bogus"}, "the trainer refuses its options: not enough values"),
        ({"adam_beta1": 2.0}, "the trainer refuses its options: Invalid beta parameter"),
        ({"cache_implementation": "bogus"}, "the trainer refuses its options: Invalid `cache_implementation`"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; needed is a number above 0"),
        ({"top_k": -5}, "top_k is -5; needed is a number of at least 0"),
        ({"min_p": 2.0}, "min_p is 2.0; needed is a share from 0 to 1"),
        ({"seed": 2**70}, "needed is a number of at most 4294967295"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards; give one for each"),
        ({"reward_weights": ["a"]}, "the trainer refuses its options"),
        (
            {"importance_sampling_level": "bogus"},
            "importance_sampling_level is 'bogus'; needed is one of token, sequence",
        ),
        ({"scale_rewards": "bogus"}, "scale_rewards is 'bogus'; needed is one of group, batch, none"),
        ({"multi_objective_aggregation": "bogus"}, "needed is one of sum_then_normalize, normalize_then_sum"),
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
def test_missing_packages(tmp_path, package, options, message):
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
def test_options_unsupported_for_internal_policies(tmp_path, options, why):
    message = refused(tmp_path / "out", **options)
    assert why in message
    assert "set ipa_steps=0" in message


def trainer_config(tmp_path, **options):
    config = TrainConfig.from_keywords(model=MODEL, **options).with_preset()
    return make_trainer_config(config, options["layer"], tmp_path, 1, "cpu")


@pytest.mark.parametrize("options", [options for options, _ in ONLY_FOR_THE_POLICY], ids=str)
@pytest.mark.parametrize("first", [{"method": "grpo", "ipa_steps": None}, {"ipa_steps": 0}], ids=str)
def test_options_supported_without_an_alignment_phase(tmp_path, options, first):
    config = trainer_config(tmp_path, **{**SMALL, **first, **options, "use_vllm": False})
    assert not config.aligns
    assert all(getattr(config, name) == value for name, value in options.items() if name != "use_vllm")


def test_enough_checkpoints_are_kept_for_a_trend(tmp_path):
    for steps in (1, 2, 5, 9, 10, 11, 19, 60, 300):
        config = trainer_config(tmp_path, **{**SMALL, "max_steps": steps})
        every, rest = divmod(config.save_steps, config.updates_per_step)
        assert rest == 0
        kept = {*range(every, steps + 1, every), steps}
        assert min(steps, 6) <= len(kept) <= 10, steps
        assert config.save_total_limit is None


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
def test_unusable_prompts(tmp_path, content, message):
    path = tmp_path / "given.jsonl"
    if content is not None:
        path.write_text(content)
    assert message in refused(tmp_path / "out", prompts=path)
    assert message in refused(tmp_path / "out", prompts=path, reward="exact")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("maths", "reward 'maths' is unknown; use math, exact, module:function"),
        ("no_such_module:f", "there is no module 'no_such_module'"),
        ("json:no_such_function", "the module 'json' has no 'no_such_function'"),
        (lambda prompts, completions, **_: [1.0], "returned 1 numbers; needed is a list of 8 numbers"),
        slow(lambda prompts, completions, **_: [float("nan")] * len(completions), "returned nan; needed is a finite"),
        slow(lambda prompts, completions, **_: ["good"] * len(completions), "returned a str; needed is a finite"),
        slow(lambda prompts, completions, **_: [1 / 0], "fails on every sample: ZeroDivisionError: division by zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "function",
)
def test_invalid_rewards(tmp_path, reward, message):
    # The return value of a function is only known once training has begun; after a fix, the same command resumes.
    assert message in refused(tmp_path / "out", reward=reward, began=callable(reward))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "no such model on the hub, or no network"),
        ("./nowhere", "./nowhere: no such directory"),
        ("testbed/gpt5", "there are testbed/qwen3 and testbed/llama"),
    ],
)
def test_missing_models(tmp_path, name, message):
    assert message in refused(tmp_path / "out", model=name)


def test_encoder_models(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    make_unloadable("encoder", tmp_path / "bad", tmp_path / "model")
    assert "BertForMaskedLM is not a causal LM" in refused(tmp_path / "out", model=tmp_path / "bad")


def test_output_directory_with_other_content(tmp_path):
    (tmp_path / "file").write_text("a file")
    assert "is a file); choose another --output" in refused(tmp_path / "file")
    assert "is a file); choose another --output" in refused(tmp_path / "file" / "below")
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("years of work")
    assert "is in use for something else (it holds thesis.tex)" in refused(used)
    assert "is in use for something else" in refused(used, overwrite=True)


@pytest.mark.slow
def test_a_training_goes_on_although_it_is_to_be_evaluated_in_another_way(tmp_path, caplog):
    out = tmp_path / "out"
    options = {**SMALL, "max_steps": 3, "save_steps": 1, "eval_problems": 3}
    with pytest.raises(KeyboardInterrupt):
        bupo.train(MODEL, output=out, callbacks=[Stop(KeyboardInterrupt())], **{**options, "eval_samples": 2})
    run = bupo.train(MODEL, output=out, **{**options, "eval_samples": 1})
    assert "resuming after step 1" in caplog.text
    assert "is now evaluated in another way" in caplog.text
    assert [e.n_samples for e in (run.evaluation_start, run.evaluation)] == [1, 1]
    whole = bupo.train(MODEL, output=tmp_path / "whole", **{**options, "eval_samples": 1})
    assert run.history["reward"].tolist() == whole.history["reward"].tolist()
    # Who asks for no evaluation, or for the one that there is, gets the run.
    for samples in (0, 1):
        assert bupo.train(MODEL, output=out, **{**options, "eval_samples": samples}).evaluation.n_samples == 1
    # On the embedded tasks four samples are usual.
    assert "(eval_samples 1 -> 4)" in refused(out, **{**options, "eval_samples": None})


@pytest.mark.slow
def test_a_run_with_another_reward_is_not_this_one(tmp_path):
    def scaled(factor):
        return lambda completions, **_: [factor * len(text) for text in completions]

    out = tmp_path / "out"
    first = bupo.train(MODEL, output=out, reward=scaled(1), **SMALL)
    assert "other settings (reward_code " in refused(out, reward=scaled(-1))
    assert "other settings (reward_code None" not in refused(out, reward=scaled(-1))
    again = bupo.train(MODEL, output=out, reward=scaled(1), **SMALL)
    assert again.history["reward"].tolist() == first.history["reward"].tolist()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_directory_without_write_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "may not be written to" in refused(tmp_path / "locked" / "out")


class Stop(TrainerCallback):
    """Stops after the first step."""

    def __init__(self, error):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise self.error


@pytest.mark.slow
def test_output_directory_of_another_run(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bupo.train(MODEL, output=out, callbacks=[Stop(KeyboardInterrupt())], **SMALL)
    message = refused(out, model="testbed/llama")
    assert "holds an unfinished run with other settings (model testbed/qwen3 -> testbed/llama" in message
    assert "add --overwrite to start over" in message
    assert "(learning_rate 0.0001 -> 0.001)" in refused(out, learning_rate=1e-3)
    assert "(layer 2 -> 3)" in refused(out, layer=3)

    bupo.train(MODEL, output=out, **SMALL)
    assert "already holds a training run with other settings (layer 2 -> 3)" in refused(out, layer=3)
    assert "(model testbed/qwen3 -> testbed/llama" in refused(out, model="testbed/llama")
    message = refused(out, eval_samples=2, eval_problems=3)
    assert "is finished, and was not evaluated in this way (eval_problems None -> 3, eval_samples None -> 2)" in message
    assert f"internal-policy evaluate --model {out}/model" in message
    assert "already holds a training run with other settings (layer 2 -> 3)" in refused(out, eval_samples=2, layer=3)

    (out / "notes.txt").write_text("mine")
    again = bupo.train(MODEL, output=out, overwrite=True, **{**SMALL, "layer": 3, "max_steps": 1})
    assert (again.layer, len(again.history)) == (3, 1)
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]


def test_out_of_memory_names_the_options_to_lower(tmp_path):
    stop = Stop(torch.OutOfMemoryError("out of memory"))
    message = refused(tmp_path / "out", callbacks=[stop], began=True)
    assert "out of memory in training; lower per_device_train_batch_size (now 8) or max_completion_length" in message
