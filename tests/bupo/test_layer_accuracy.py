"""Internal policies of a trainer: what is sampled has the log-probabilities that it optimises, and can be watched."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from exact_policies import EXPERTS, FLOAT32
from tiny import slow_unless_fast, tiny_model, tiny_tokenizer
from trainers import LAYERS, left_padded, make_bupo_trainer
from training_calls import refused

from internal_policy import bupo, models
from internal_policy.bupo.layer_accuracy import accuracy_interval
from internal_policy.data.prompts import Prompt
from internal_policy.data.responses import Response
from internal_policy.evaluation import evaluate
from internal_policy.generation import InternalPolicy, Request, compare_with_final, sample_internal
from internal_policy.models.families import FAMILIES
from internal_policy.plotting import layer_accuracy, layer_accuracy_data

SHORT = {"layer": 6, "ipa_steps": 1, "max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "mini_batches": 1}


def spread(completions, **_):
    """A reward that differs within a group, so that the weights change."""
    return [(sum(map(ord, chat[0]["content"])) % 7) / 6 for chat in completions]


QUIET = {
    "reward": spread,
    "learning_rate": 1e-3,
    "dynamics_every": 0,
    "max_completion_length": 12,
    "eval_problems": 4,
    "eval_samples": 2,
    "entropy_sequences": 0,
}


@pytest.mark.parametrize("family", slow_unless_fast(FAMILIES))
@pytest.mark.parametrize(("site", "lens"), [("layer", "policy"), ("ffn", "logit-lens")])
def test_sampled_tokens_have_the_log_probabilities_of_the_trainers_forward_pass(tmp_path, family, site, lens):
    trainer = make_bupo_trainer(
        tmp_path, tiny_model(family, layers=LAYERS), layer=2, site=site, lens=lens, temperature=1.0, **EXPERTS
    )
    model = models.wrap(trainer.policy_module, tiny_tokenizer())
    ids, mask, _ = left_padded()
    prompts = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
    requests = [Request(Prompt("x"), prompt, i, 0) for i, prompt in enumerate(prompts)]
    policy = InternalPolicy(2, site, lens)
    sampled = sample_internal(model, requests, policy, max_new_tokens=5, temperature=1.0, seed=0)
    # The same left padding as in sampling; a response that ended early is continued by any token.
    answers = torch.tensor([(r.input_ids[r.prompt_length :] + [2] * 5)[:5] for r in sampled])
    whole, kept = torch.cat([ids, answers], dim=1), torch.cat([mask, torch.ones_like(answers)], dim=1)
    with trainer._policy(True), torch.no_grad():
        log_probs = trainer._get_per_token_logps_and_entropies(trainer.model, whole, kept, 5)[0]
    for row, response, one in zip(log_probs, sampled, compare_with_final(model, sampled, policy), strict=True):
        assert one.log_prob == pytest.approx(float(row[: response.n_tokens].mean()), abs=FLOAT32)


def test_the_comparison_takes_any_response(tmp_path):
    model = models.wrap(tiny_model("llama"), tiny_tokenizer())
    (one,) = compare_with_final(model, [Response("x", "", [3, 4, 5], 1)], InternalPolicy(1))
    assert one.kl > 0


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    place = tmp_path_factory.mktemp("watched")
    return bupo.train("testbed/qwen3", output=place / "run", eval_layer=6, **SHORT, **QUIET)


@pytest.mark.slow
def test_the_accuracy_of_a_layer_is_measured_before_during_and_after_alignment(watched):
    table = watched.layer_accuracy
    assert list(table["step"]) == [0, 1, 2]
    assert list(table["phase"]) == ["ipa", "ipa", "grpo"]
    options = {"samples": 2, "max_problems": 4, "max_new_tokens": 12, "layer": 6}
    ends = [evaluate(name, "testbed", reward="exact", **options) for name in ("testbed/qwen3", watched.model_dir)]
    for row, wanted in zip(table.iloc[[0, 2]].to_dict("records"), ends, strict=True):
        assert row["avg"] == wanted.avg["mean"]
        assert row["length"] == wanted.mean_length
        assert row["agreement"] == pytest.approx(
            (wanted.samples["agreement"] * wanted.samples["n_tokens"]).sum() / wanted.samples["n_tokens"].sum()
        )
    assert table["kl"].nunique() == 3, "the model changes"
    pd.testing.assert_frame_equal(bupo.Run.load(watched.path).layer_accuracy, table)


@pytest.mark.slow
def test_watching_changes_no_number_of_the_training(watched, tmp_path):
    plain = bupo.train("testbed/qwen3", output=tmp_path / "run", **SHORT, **QUIET)
    assert plain.layer_accuracy.empty
    assert "eval_layer" not in plain.config
    assert not (plain.path / "layer_accuracy.csv").exists()
    pd.testing.assert_frame_equal(
        plain.history.drop(columns="seconds"), watched.history.drop(columns="seconds"), check_exact=True
    )


@pytest.mark.slow
def test_a_layer_is_watched_through_adapters(tmp_path):
    run = bupo.train("testbed/qwen3", output=tmp_path / "run", eval_layer=6, lora_rank=2, **SHORT, **QUIET)
    last = evaluate(run.model_dir, "testbed", reward="exact", samples=2, max_problems=4, max_new_tokens=12, layer=6)
    # Adapters are merged into the stored weights, which rounds sums differently.
    assert run.layer_accuracy["kl"].iloc[-1] == pytest.approx(
        (last.samples["kl"] * last.samples["n_tokens"]).sum() / last.samples["n_tokens"].sum(), abs=1e-4
    )
    assert run.layer_accuracy["kl"].nunique() == 3


@pytest.mark.slow
def test_measurements_are_resumed_from_a_checkpoint(watched, tmp_path):
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                raise KeyboardInterrupt

    options = {"output": tmp_path / "run", "eval_layer": 6, "save_steps": 1, **SHORT, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        bupo.train("testbed/qwen3", callbacks=[Interrupt()], **options)
    resumed = bupo.train("testbed/qwen3", **options)
    pd.testing.assert_frame_equal(resumed.layer_accuracy, watched.layer_accuracy)


@pytest.mark.slow
def test_the_figure_shows_each_measurement(watched):
    frame = layer_accuracy_data(watched)
    assert list(frame["value"]) == list(watched.layer_accuracy["avg"])
    figure = layer_accuracy(watched)
    (panel,) = figure.axes
    assert panel.get_ylabel() == "Avg@K of layer 6 (%)"
    assert list(panel.get_lines()[0].get_ydata()) == list(frame["value"])


def test_the_interval_is_that_of_the_dynamics_or_a_tenth_of_the_run():
    for given, every in (({"dynamics_every": 3}, 3), ({}, 6), ({"dynamics_every": 0}, 6)):
        assert accuracy_interval(bupo.TrainConfig(max_steps=60, **given)) == every


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_layer": 9, "eval_samples": 1}, "eval_layer is 9; testbed/qwen3 has 8 layers"),
        ({"eval_layer": 0}, "eval_layer is 0; needed is at least 1"),
        ({"eval_layer": 2, "eval_samples": 0}, "eval_layer was given, and there is nothing to evaluate on"),
    ],
)
def test_a_layer_that_cannot_be_watched_is_refused(tmp_path, options, message):
    assert message in refused(tmp_path / "run", **options)
