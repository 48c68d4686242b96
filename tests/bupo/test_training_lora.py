"""Which weights are updated: LoRA adapters, frozen layers, and separate learning rates of layers and phases."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

from internal_policy import bupo
from internal_policy.models import load

LAYERS, LAYER = 4, 2
RATE = 1e-3
# A change of 1e-4 to a weight of about 1 is rounded to 2^-24 / 1e-4, about 1e-3 of it.
ROUNDING = 1e-2


class Keep(TrainerCallback):
    """The weights before training and after each update."""

    def __init__(self):
        self.weights = []

    def keep(self, args, state, control, model, **_):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})

    on_train_begin = on_step_end = keep


def high_words(completions, **_):
    return [sum(int(w[1:]) > 30 for w in c.split() if w[1:].isdigit()) / 8 for c in completions]


@pytest.fixture
def train(tmp_path):
    tiny_model("qwen3", layers=LAYERS).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")

    def run(output="run", model=None, **options):
        kept = Keep()
        done = bupo.train(
            str(model or tmp_path / "model"),
            [{"prompt": f"w{i} w{i + 7}"} for i in range(2, 10)],
            reward=high_words,
            output=tmp_path / output,
            callbacks=[kept],
            **{
                **{"prompts_per_step": 4, "num_generations": 4, "mini_batches": 1, "max_completion_length": 8},
                **{"learning_rate": RATE, "weight_decay": 0.0, "template": "plain", "dynamics_every": 0},
                **options,
            },
        )
        return done, kept.weights

    return run


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def layer_of(name):
    return int(name.split("layers.")[1].split(".")[0]) + 1 if "layers." in name else None


def test_lora_updates_only_adapters_and_in_alignment_only_those_up_to_layer_l(train, tmp_path):
    run, (start, first, switch, end) = train(lora_rank=4, layer=LAYER, ipa_steps=2, max_steps=3)
    adapters = {n for n in start if "lora_" in n}
    assert {layer_of(n) for n in adapters} == set(range(1, LAYERS + 1))
    # B starts at 0, so that A has no gradient before the second update.
    assert moved(start, first) == {n for n in adapters if layer_of(n) <= LAYER and "lora_B" in n}
    assert moved(start, switch) == {n for n in adapters if layer_of(n) <= LAYER}
    assert moved(switch, end) >= {n for n in adapters if "lora_B" in n or layer_of(n) <= LAYER}
    assert moved(start, end) <= adapters

    ids = torch.arange(2, 42).view(4, 10)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    merged = load(str(run.model_dir)).model
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        # After `before`: this puts the adapter into the base model.
        adapted = PeftModel.from_pretrained(base, run.path / "adapter").eval()(ids).logits
    # W x + B A x and (W + B A) x in float32, through four layers, on logits of about 5.
    torch.testing.assert_close(after, adapted, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_frozen_layers_are_bitwise_unchanged(train, tmp_path, tied):
    tiny_model("qwen3", layers=LAYERS, tied=tied).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    _, (start, *_, end) = train(model=tmp_path / "other", method="grpo", freeze_layers=2, max_steps=2)
    frozen = {n for n in start if layer_of(n) in (1, 2)}
    # A tied embedding is also the unembedding, which is trained.
    frozen |= set() if tied else {"model.embed_tokens.weight"}
    assert len(frozen) > 10
    assert moved(start, end) == start.keys() - frozen


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_everything_but_the_only_layer_is_bitwise_unchanged(train, tmp_path, tied):
    tiny_model("qwen3", layers=LAYERS, tied=tied).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    _, (start, *_, end) = train(model=tmp_path / "other", only_layer=2, method="grpo", max_steps=2)
    assert moved(start, end) == {n for n in start if layer_of(n) == 2}


@pytest.mark.slow
@pytest.mark.parametrize("only", [LAYER - 1, LAYER])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_that_layer_changes_in_both_phases(train, only, checkpointing):
    options = {"layer": LAYER, "ipa_steps": 1, "max_steps": 2, "gradient_checkpointing": checkpointing}
    _, (start, aligned, end) = train(only_layer=only, **options)
    wanted = {n for n in start if layer_of(n) == only}
    assert moved(start, aligned) == moved(aligned, end) == wanted


@pytest.mark.slow
def test_with_an_only_layer_no_adapter_of_another_one_changes(train):
    _, (start, *_, end) = train(only_layer=2, method="grpo", max_steps=2, lora_rank=2)
    changed = moved(start, end)
    assert changed
    assert {layer_of(n) for n in changed} == {2}


def ratios(start, one, other, names):
    """The ratio of weight changes of two runs; at Adam's first update it is the ratio of the learning rates."""
    a, b = (torch.cat([(end[n] - start[n]).flatten() for n in names]) for end in (one, other))
    # Where the gradient is near Adam's epsilon, the first step is not its sign.
    large = a.abs() > 0.9 * a.abs().max()
    assert large.float().mean() > 0.5
    return (b / a)[large]


def test_layers_above_use_their_own_learning_rate(train):
    options = {"method": "grpo", "layer": LAYER, "max_steps": 1}
    _, (start, full) = train("full", **options)
    _, (_, scaled) = train("scaled", upper_lr_scale=0.1, **options)
    above = [n for n in start if (layer_of(n) or 0) > LAYER]
    assert moved(full, scaled) == set(above)
    assert (ratios(start, full, scaled, above) / 0.1 - 1).abs().max() < ROUNDING


def test_the_alignment_phase_uses_its_own_learning_rate(train):
    options = {"layer": LAYER, "ipa_steps": 1, "max_steps": 2}
    _, (start, one, _) = train("one", **options)
    run, (_, other, end) = train("other", ipa_learning_rate=10 * RATE, **options)
    below = [n for n in start if (layer_of(n) or LAYERS) <= LAYER]
    assert (ratios(start, one, other, below) / 10 - 1).abs().max() < ROUNDING
    assert run.history["learning_rate"].tolist() == pytest.approx([10 * RATE, RATE])
    # Weights not trained before make their first step now, of the second phase's learning rate except near 0.
    above = torch.cat([(end[n] - other[n]).flatten() for n in start if (layer_of(n) or 0) > LAYER])
    assert above.abs().median() == pytest.approx(RATE, rel=ROUNDING)
