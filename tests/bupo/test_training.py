"""What `train` does apart from the updates: labels, history, failures, refusals, columns and both evaluations."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from synthetic_analyses import make, progressive
from tiny import tiny_model, tiny_tokenizer
from tiny_training import PROMPTS, RATE, high_words, refused_here, train
from trainers import make_bupo_trainer, weights
from training_calls import MODEL, refused
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from internal_policy import UserError, bupo
from internal_policy.bupo.training import choose_layer
from internal_policy.data import arithmetic as tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("session")
    tiny_model("qwen3").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    return place


class Keep(TrainerCallback):
    """The weights before training and after each update, and which attention computed them."""

    def __init__(self):
        self.weights, self.attention = [], None

    def keep(self, args, state, control, model, **_):
        self.weights.append(weights(model))
        self.attention = model.config._attn_implementation

    on_train_begin = on_step_end = keep


class InterruptAfter(TrainerCallback):
    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.update:
            raise KeyboardInterrupt


def shaped(completions, **_):
    return [5.0 - len(c) % 9 for c in completions]


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, pytest.param({"learning_rate": 1e-30, "lora_rank": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_unchanged_weights_give_equal_evaluations(place, options):
    """Mixed precision applies to training only; a random model is unsure of every token and shows small differences."""
    sampled = {"benchmark": "testbed", "eval_problems": 32, "eval_samples": 8, "max_completion_length": 24}
    run = train(
        place, f"still-{len(options)}", **sampled, bf16=True, max_steps=1, method="grpo", ipa_steps=0, **options
    )
    start, trained = run.evaluation_start.samples["response"], run.evaluation.samples["response"]
    assert trained.tolist() == start.tolist()
    assert start.nunique() > 200


@pytest.mark.slow
def test_a_shaped_reward_trains_and_the_benchmarks_verifier_evaluates(tmp_path):
    run = bupo.train(
        MODEL,
        "testbed",
        benchmark="testbed",
        reward=[shaped, "exact"],
        output=tmp_path / "out",
        **{"method": "grpo", "max_steps": 1, "prompts_per_step": 2, "num_generations": 4, "mini_batches": 1},
        **{"eval_samples": 2, "eval_problems": 8, "dynamics_every": 0},
    )
    assert run.history["reward"].min() < 0 or run.history["reward"].max() > 1
    assert run.config["rewards"] == ["shaped", "exact_reward"]
    for evaluation in (run.evaluation_start, run.evaluation):
        answers = evaluation.problems.set_index("problem")["answer"]
        own = [float(tasks.check(r.response, answers[r.problem])) for r in evaluation.samples.itertuples()]
        assert evaluation.samples["score"].tolist() == own
        assert 0 < sum(own) < len(own)


@pytest.fixture(scope="module")
def seeds(place):
    """Runs of one call under two seeds, and of one that learns faster."""
    return [
        train(place, name, seed=seed, learning_rate=rate)
        for name, seed, rate in (("seed-0", 0, RATE), ("seed-1", 1, RATE), ("faster", 0, 2 * RATE))
    ]


def test_runs_that_differ_only_in_their_seed_share_a_setting(seeds):
    one, other, faster = seeds
    assert one.config["seed"] != other.config["seed"]
    assert one.setting == other.setting
    assert {key for key in one.setting if one.setting[key] != faster.setting[key]} == {"learning_rate"}
    assert bupo.Run.load(one.path).setting == one.setting
    assert {run.label for run in seeds} == {"BuPO, layer 2, 1 step"}


@pytest.mark.slow
def test_equal_adapter_configs_give_equal_settings(place):
    """Peft fills in the object that it is given, and keeps names in a set, whose order differs between processes."""
    whole = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    one, other = (train(place, f"own-{seed}", seed=seed, max_steps=1, peft_config=whole) for seed in (0, 1))
    assert one.setting == other.setting
    assert whole.target_modules == "all-linear"
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    named = train(place, "named", max_steps=1, peft_config=LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM"))
    assert named.config["peft"]["target_modules"] == sorted(names)


def test_a_label_names_the_settings_that_differ_from_the_defaults(seeds):
    def label(run=seeds[0], **changed):
        config = {**run.config, **changed}
        return replace(run, config=config, ipa_steps=config["ipa_steps"], layer=config["layer"]).label

    rates = {"ipa_learning_rate": 1e-4, "freeze_layers": 1, "upper_lr_scale": 0.5, "lora_rank": 2}
    first = "BuPO, layer 2, 1 step, logit-lens, first at 0.0001, layers 1-1 frozen, 0.5x above, token-mean, LoRA 2"
    assert label(lens="logit-lens", aggregation="token-mean", **rates) == first
    assert bupo.Run.load(seeds[0].path).label == label(aggregation="sequence-mean") == "BuPO, layer 2, 1 step"
    assert label(only_layer=1) == "BuPO, layer 2, 1 step, only layer 1 trained"
    assert label(site="ffn", ipa_steps=2) == "BuPO, FFN 2, 2 steps"


def test_without_a_first_phase_a_run_is_called_grpo(place):
    run = train(place, "none", ipa_steps=0, max_steps=1)
    assert (run.label, run.layer) == ("GRPO", None)


@pytest.mark.parametrize("ipa_steps", [2, "auto"])
def test_history_has_a_row_per_step_and_counts_alignment_steps(place, ipa_steps):
    measured = {"dynamics_every": 1, "dynamics_responses": 2}
    run = train(place, f"rows-{ipa_steps}", ipa_steps=ipa_steps, max_steps=5, mini_batches=2, **measured)
    assert run.history["step"].tolist() == [1, 2, 3, 4, 5]
    taken = run.history["phase"].eq("ipa").sum()
    assert run.history["phase"].tolist() == ["ipa"] * taken + ["grpo"] * (5 - taken)
    assert run.ipa_steps == taken
    if ipa_steps == "auto":
        assert 1 <= taken <= 2
        assert run.label == "BuPO, layer 2, auto"
    else:
        assert taken == 2
        assert run.label == "BuPO, layer 2, 2 steps"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("logging_steps", 2), ("logging_strategy", "epoch"), ("logging_first_step", True), ("shuffle_dataset", True)),
        *(("num_train_epochs", 2), ("eval_strategy", "steps"), ("model_init_kwargs", {}), ("disable_tqdm", False)),
    ],
)
def test_options_set_by_train_cannot_be_overridden(tmp_path, name, value):
    message = refused(tmp_path / "out", **{name: value})
    assert message.startswith(f"{name} cannot be chosen: ")


def test_a_zero_learning_rate_in_alignment_changes_no_weight(place):
    kept = Keep()
    run = train(place, "zero", ipa_learning_rate=0.0, weight_decay=0.1, callbacks=[kept])
    start, first, end = kept.weights
    assert all(torch.equal(first[name], start[name]) for name in start)
    assert not any(torch.equal(end[name], start[name]) for name in start)
    assert run.history["phase"].tolist() == ["ipa", "grpo"]
    assert run.history["learning_rate"].tolist() == [0.0, RATE]


def test_the_trainer_applies_the_alignment_learning_rate(tmp_path):
    found = {}
    for rate in (0.0, 1e-2, 2e-2):
        model = tiny_model("qwen3", layers=4)
        before = weights(model)["model.layers.0.mlp.down_proj.weight"]
        # Without momentum, the length of a step is its learning rate.
        make_bupo_trainer(tmp_path, model, ipa_learning_rate=rate, optim="sgd", max_grad_norm=0.0).train()
        found[rate] = weights(model)["model.layers.0.mlp.down_proj.weight"] - before
    assert not found[0.0].any()
    # Sums with weights of about 0.1, rounded to 2^-24 of them.
    torch.testing.assert_close(found[2e-2], 2 * found[1e-2], rtol=0, atol=1e-7)
    assert found[1e-2].abs().max() > 1e-5


TOLD = []


def fails_sometimes(completions, trainer_state, **_):
    """Raises on some responses of the second and third step of three updates each."""
    if trainer_state.global_step // 3 in (1, 2) and any(len(c) % 2 for c in completions):
        if len(completions) == 1:
            TOLD.append(trainer_state.global_step // 3 + 1)
        raise ValueError(completions)
    return high_words(completions)


FAILING = {"reward": fails_sometimes, "max_steps": 4, "mini_batches": 1, "num_iterations": 3, "save_steps": 1}


@pytest.fixture(scope="module")
def failing(place):
    TOLD.clear()
    run = train(place, "failing", **FAILING)
    return run, Counter(TOLD)


def test_reward_failures_are_counted_per_step(failing):
    run, failures = failing
    assert failures.keys() == {2, 3}
    assert max(failures.values()) < 8
    assert run.history["reward_failures"].tolist() == [failures[step] for step in (1, 2, 3, 4)]
    assert run.failures == {"crashes": failures.total(), "timeouts": 0}
    assert bupo.Run.load(run.path).failures == run.failures


@pytest.mark.slow
def test_failures_include_those_before_an_interruption(place, failing):
    # Between two updates of the third step, whose rollouts are then sampled and scored a second time.
    with pytest.raises(KeyboardInterrupt):
        train(place, "broken-off", callbacks=[InterruptAfter(8)], **FAILING)
    message = refused_here(place, "broken-off", **{**FAILING, "learning_rate": 2 * RATE})
    assert "holds an unfinished run with other settings (learning_rate 0.001 -> 0.002)" in message
    resumed, (uninterrupted, _) = train(place, "broken-off", **FAILING), failing
    assert resumed.failures == uninterrupted.failures
    assert resumed.history["reward_failures"].tolist() == uninterrupted.history["reward_failures"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipa_learning_rate": -1e-6}, "ipa_learning_rate is -1e-06; needed is at least 0"),
        ({"ipa_learning_rate": 1e-6, "learning_rate": 0.0}, "a learning_rate above 0"),
        ({"method": "rloo", "ipa_steps": 0, "scale_rewards": "batch"}, "scale_rewards='batch' with method='rloo'"),
        (
            {"method": "rloo", "ipa_steps": 0, "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation='normalize_then_sum' with method='rloo'",
        ),
        ({"freeze_layers": 2}, "freeze_layers is 2 and layer 2: the first phase would have nothing to train"),
        ({"freeze_layers": 3, "lora_rank": 2}, "freeze_layers is 3 and layer 2: the first phase would have nothing"),
        ({"freeze_layers": 8, "layer": "auto"}, "freeze_layers is 8 and layer"),
        ({"only_layer": 3}, "only_layer is 3 and layer 2: the first phase would have nothing to train; choose"),
        ({"only_layer": 1, "freeze_layers": 1}, "only_layer is 1, freeze_layers 1 and upper_lr_scale 1.0; give"),
        ({"only_layer": 1, "upper_lr_scale": 0.5}, "only_layer is 1, freeze_layers 0 and upper_lr_scale 0.5; give"),
        ({"method": "grpo", "ipa_steps": 0, "layer": None, "upper_lr_scale": 0.1}, "the layer above which it holds"),
        ({"sync_ref_model": True}, "sync_ref_model=True without a reference model"),
        ({"eval_samples": 2, "prompts": PROMPTS}, "eval_samples was given, and there is nothing to evaluate on"),
        ({"peft_config": {"r": 4}}, "peft_config is a dict; needed is one of peft, such as LoraConfig"),
        ({"reward": ["math", high_words], "prompts": PROMPTS}, "prompt 1 has no answer; the reward compares with one"),
        ({"reward": [high_words, ["math"]], "prompts": PROMPTS}, "prompt 1 has no answer"),
    ],
    # A function's address differs between the workers of a run in parallel.
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_invalid_settings_are_refused_before_anything_is_written(tmp_path, options, message):
    assert message in refused(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_object_keeps_its_attention_implementation(tmp_path):
    words = {"prompts": PROMPTS, "reward": high_words, "tokenizer": tiny_tokenizer()}
    error = refused(tmp_path / "out", model=tiny_model("qwen3"), attn_implementation="eager", **words)
    assert "attn_implementation was given with a model object" in error


def test_training_uses_the_requested_attention_implementation(place):
    kept = Keep(), Keep()
    train(place, "attention", max_steps=1, callbacks=[kept[0]])
    train(place, "eager", max_steps=1, callbacks=[kept[1]], attn_implementation="eager")
    assert [k.attention for k in kept] == ["sdpa", "eager"]


def test_prompt_columns_are_passed_to_the_reward(place):
    ordinary = {
        "number": lambda i: i,
        "share": lambda i: i / 4,
        "tags": lambda i: ["a"] * i,
        "more": lambda i: {"n": i},
    }
    # Values that arrow cannot store in one column.
    odd = {
        "level": [1, "hard", None, 2.5, [1], {"a": 1}],
        "parts": [[1, "a"], [2], [], ["b"], [None], [3]],
        "huge": [2**70, 1, 2, 3, 4, 5],
        "cut": ["half \ud83d", "b", "c", "d", "e", "f"],
    }
    trls = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra", "images")
    records = [
        {
            **record,
            **{name: make(i) for name, make in ordinary.items()},
            **{name: values[i] for name, values in odd.items()},
            **dict.fromkeys(trls, f"mine {i}"),
        }
        for i, record in enumerate(PROMPTS)
    ]
    seen = {}

    def looking(prompts, completions, completion_ids, trainer_state, **columns):
        assert isinstance(trainer_state, TrainerState)
        assert all(callable(columns.pop(name)) for name in ("log_metric", "log_extra"))
        assert {len(values) for values in columns.values()} == {len(completions)} == {len(completion_ids)}
        assert "images" not in columns
        assert not any(c.startswith("mine") for c in completions)
        for i, prompt in enumerate(prompts):
            seen[prompt] = {name: values[i] for name, values in columns.items()}
        return high_words(completions)

    train(place, "columns", records, reward=looking, max_steps=3, ipa_steps=1)
    assert len(seen) == len(PROMPTS)
    for i, record in enumerate(PROMPTS):
        found = seen[record["prompt"]]
        assert found.keys() == {"answer", *ordinary, *odd}
        assert {name: found[name] for name in ordinary} == {name: make(i) for name, make in ordinary.items()}
        assert {name: found[name] for name in ("level", "parts", "huge")} == {
            name: None if odd[name][i] is None else str(odd[name][i]) for name in ("level", "parts", "huge")
        }
        assert found["cut"] == odd["cut"][i].replace("\ud83d", "?")


def test_a_missing_boundary_layer_can_be_replaced_by_a_number(place):
    """An unknown layer does not conflict with frozen layers below it."""
    with pytest.raises(UserError, match="finds no boundary layer"):
        train(place, "mended", layer="auto", freeze_layers=1)
    assert (place / "mended" / "analysis").is_dir()
    run = train(place, "mended", layer=2, freeze_layers=1, learning_rate=2 * RATE)
    assert run.layer == 2
    assert run.history["step"].tolist() == [1, 2]
    assert not (place / "mended" / "analysis").exists()
    assert json.loads((place / "mended" / "run_settings.json").read_text())["layer"] == 2


@pytest.mark.slow
def test_an_unusable_reward_can_be_replaced_in_the_same_output(place):
    def short(completions, **_):
        return [1.0]

    with pytest.raises(UserError, match="'short' returned 1 numbers"):
        train(place, "reward", reward=short)
    fresh = train(place, "fresh", max_steps=3)
    run = train(place, "reward", max_steps=3)
    assert run.config["rewards"] == ["high_words"]
    one, other = (load_file(r.model_dir / "model.safetensors") for r in (run, fresh))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_reference_model_is_read_from_safetensors_of_the_same_revision(place, monkeypatch, caplog):
    loads = []
    real = PreTrainedModel.from_pretrained.__func__

    def spy(cls, *where, **options):
        loads.append((options["use_safetensors"], options["revision"]))
        return real(cls, *where, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(spy))
    train(place, "reference", max_steps=1, method="grpo", ipa_steps=0, layer=None, beta=0.1)
    assert loads == [(True, None)] * 2
    assert "model_init_kwargs" not in caplog.text


def test_a_missing_reference_model_is_refused(tmp_path):
    words = {"prompts": PROMPTS, "reward": high_words, "tokenizer": tiny_tokenizer(), "layer": None, "ipa_steps": 0}
    error = refused(tmp_path / "out", model=tiny_model("qwen3"), method="grpo", beta=0.1, **words)
    assert "beta needs the model as it was before training: save it, and give its directory" in error


@pytest.mark.parametrize("lens", ["policy", "unit-norm"])
def test_a_layer_of_an_analysis_says_under_which_lens_it_was_found(lens):
    analysis = make(progressive(6), lens=lens, prompts=8)
    analysis = replace(analysis, selection=replace(analysis.selection, boundary_layer=2))
    note = "; found under the lens unit-norm"
    assert choose_layer(analysis).reason.endswith(note) == (lens == "unit-norm")
