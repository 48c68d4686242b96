"""``bupo.transfer``: gradients and cosines against autograd of the formulas in float64, and what it leaves behind."""

from __future__ import annotations

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from exact_policies import in_float64
from tiny import ragged_responses, slow_unless_fast, tiny_model, tiny_tokenizer
from trainers import make_trainer
from training_calls import command

from internal_policy import UserError, bupo
from internal_policy.bupo import gradient_transfer, gradients
from internal_policy.bupo.gradients import SKETCH, Gradients, Rollout, backward, bootstrap_error
from internal_policy.bupo.trainer import BuPOTrainer
from internal_policy.bupo.transfer_config import TransferConfig
from internal_policy.bupo.transfer_results import COLUMNS, TRANSFER, Transfer
from internal_policy.data.responses import Response
from internal_policy.models import wrap
from internal_policy.utils.workspace import Workspace

FLOAT64 = 1e-10
"""Relative to the largest entry: float64 sums of some thousand terms lose a few digits of 16."""
ROUNDED = 2e-5
"""Relative to the largest entry, of a float32 gradient: observed is at most 3e-6."""
PROMPTS = [{"prompt": f"w{i} w{i + 7}", "answer": ""} for i in range(2, 14)]
OPTIONS = {"max_new_tokens": 6, "num_generations": 4, "template": "plain"}


def parity(completions, **_):
    return [float(sum(map(len, text.split())) % 3 == 0) for text in completions]


def make_rollouts(n=10, groups=5, seed=0):
    draw = np.random.default_rng(seed)
    return [
        Rollout(Response("", "", record["input_ids"], record["prompt_length"]), i % groups, float(draw.normal()))
        for i, record in enumerate(ragged_responses(n, seed))
    ]


def tiny(model_type="qwen3", **options):
    return wrap(tiny_model(model_type, **options), tiny_tokenizer(), "tiny")


def exact(model):
    return wrap(in_float64(model.model), None, "exact")


def policy_logits(model, ids, layer):
    """Logits of pi_theta, or of pi^l from the output of a layer of the whole model, written out."""
    network, states = model.model, []
    if layer is None:
        return network(ids, use_cache=False).logits[0]
    keep = model.layers[layer - 1].register_forward_hook(
        lambda m, args, out: states.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    network(ids, use_cache=False)
    keep.remove()
    head, config = network.get_output_embeddings(), network.config
    z = states[0][0] @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return z if cap is None else cap * torch.tanh(z / cap)


def written_out(model, rollouts, layer=None, temperature=1.0):
    """The gradient by name: each response alone, unpadded, with its whole log_softmax."""
    model.model.zero_grad()
    for rollout in rollouts:
        r = rollout.response
        log_p = (policy_logits(model, torch.tensor([r.input_ids]), layer) / temperature).log_softmax(-1)
        at = torch.arange(r.prompt_length - 1, len(r.input_ids) - 1)
        chosen = log_p[at, torch.tensor(r.input_ids[r.prompt_length :])]
        (rollout.advantage * chosen.mean()).backward()
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.model.named_parameters()}
    model.model.zero_grad()
    return found


def measured(model, rollouts, layer=None, batch_size=4, temperature=1.0, lens="policy"):
    with Gradients(model) as held:
        if layer is None:
            backward(model, rollouts, held, batch_size=batch_size, temperature=temperature)
        else:
            with bupo.internal_forward(model.model, layer, lens=lens, family=model.family):
                backward(model, rollouts, held, batch_size=batch_size, temperature=temperature)
        by_id = {
            id(p): g
            for block, own in zip(held._blocks, held.take(), strict=True)
            for p, g in zip(block, own, strict=True)
        }
        return {name: by_id[id(p)] for name, p in model.model.named_parameters()}


def assert_gradients(found, wanted, tolerance):
    assert found.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values() if g is not None)
    for name, gradient in wanted.items():
        if gradient is None or not gradient.any():
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(
                found[name].double(), gradient.double(), rtol=0, atol=tolerance * scale, msg=name
            )


@pytest.mark.parametrize("layer", [1, 2, None])
@pytest.mark.parametrize(
    "model_type", slow_unless_fast(["llama", "qwen3", "gemma2", "gpt_neox", "qwen3_moe", "granite", "cohere", "gpt2"])
)
def test_the_gradient_is_that_of_the_formula(model_type, layer):
    model = wrap(tiny_model(model_type), None, "tiny")
    rollouts = make_rollouts()
    found = measured(model, rollouts, layer)
    assert_gradients(found, written_out(exact(model), rollouts, layer), ROUNDED)
    if layer is not None:
        norm = {id(p) for p in model.projection.final_norm.parameters()}
        above = {id(p) for each in model.layers[layer:] for p in each.parameters()} | norm
        assert all(found[name] is None for name, p in model.model.named_parameters() if id(p) in above)
        own = {id(p) for p in model.layers[layer - 1].parameters()}
        assert any(found[name] is not None for name, p in model.model.named_parameters() if id(p) in own)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_a_tied_embedding_has_both_parts_of_its_gradient(model_type):
    model = wrap(tiny_model(model_type, tied=True), None, "tiny")
    rollouts = make_rollouts()
    for layer in (2, None):
        assert_gradients(measured(model, rollouts, layer), written_out(exact(model), rollouts, layer), ROUNDED)


def test_the_temperature_divides_the_logits():
    model, rollouts = tiny("gemma2"), make_rollouts()
    found = measured(model, rollouts, 2, temperature=0.7)
    assert_gradients(found, written_out(exact(model), rollouts, 2, temperature=0.7), ROUNDED)


def test_under_the_logit_lens_the_last_layer_has_the_gradient_of_grpo():
    model, rollouts = tiny("gemma2"), make_rollouts()
    whole, last = measured(model, rollouts), measured(model, rollouts, model.n_layers, lens="logit-lens")
    for name, gradient in whole.items():
        torch.testing.assert_close(last[name], gradient, rtol=0, atol=0)


def test_batches_and_padding_change_nothing():
    model, rollouts = wrap(tiny_model("llama").double(), None, "tiny"), make_rollouts(12, groups=2)
    one = measured(model, rollouts, 2, batch_size=1)
    assert_gradients(measured(model, rollouts, 2, batch_size=64), one, FLOAT64)


@pytest.mark.slow
def test_a_bfloat16_model_accumulates_in_float32():
    model, rollouts = tiny("llama"), make_rollouts(40, groups=2)
    model = wrap(model.model.bfloat16(), None, "tiny")
    found = measured(model, rollouts, 2, batch_size=1)
    assert {g.dtype for g in found.values() if g is not None} == {torch.float32}
    # The terms are rounded to 8 bits each, but their sum is not.
    terms = [measured(model, [r], 2, batch_size=1) for r in rollouts]
    name = "model.embed_tokens.weight"
    total = torch.stack([t[name].double() for t in terms]).sum(0)
    torch.testing.assert_close(found[name].double(), total, rtol=1e-5, atol=1e-6 * float(total.abs().max()))


class Recording(BuPOTrainer):
    def _compute_loss(self, model, inputs):
        self.__dict__.setdefault("batches", []).append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("aligns", [True, False], ids=["alignment", "grpo"])
def test_the_gradient_is_that_of_the_trainers_first_update(tmp_path, aligns):
    from transformers import TrainerCallback

    own = tiny_model("qwen3", layers=4)
    before, found = copy.deepcopy(own), {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **_):
            found.update({n: None if p.grad is None else p.grad.clone() for n, p in own.named_parameters()})

    phase = {"layer": 2, "ipa_steps": 1} if aligns else {"layer": 2, "ipa_steps": 0}
    trainer = make_trainer(tmp_path, own, kind=Recording, method="bupo", max_grad_norm=0.0, **phase)
    trainer.add_callback(Keep())
    trainer.train()
    (batch,) = trainer.batches
    rows = zip(*(batch[k] for k in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True)
    rollouts = []
    for (prompt, prompt_mask, completion, mask), advantage in zip(rows, batch["advantages"].tolist(), strict=True):
        ids = prompt[prompt_mask.bool()].tolist()
        whole = [*ids, *completion[mask.bool()].tolist()]
        rollouts.append(Rollout(Response("", "", whole, len(ids)), 0, advantage))
    assert len({r.advantage for r in rollouts}) > 2
    model = wrap(before, None, "tiny")
    wanted = measured(model, [r for r in rollouts if r.advantage], 2 if aligns else None)
    # The trainer descends the mean over all responses. float32: some thousand terms of up to the largest gradient.
    wanted = {n: None if g is None else -g / len(rollouts) for n, g in wanted.items()}
    assert_gradients(found, wanted, 1e-5)


def half_gradients(model, rollouts, layer, upto):
    """[halves, groups] of gradients flattened over what both objectives reach."""
    inside = {id(p) for each in model.layers[upto:] for p in each.parameters()}
    inside |= {id(p) for p in model.projection.final_norm.parameters()}
    names = [n for n, p in model.model.named_parameters() if id(p) not in inside]
    groups = []
    for group in sorted({r.group for r in rollouts}):
        own = written_out(model, [r for r in rollouts if r.group == group], layer)
        flat = [
            torch.zeros_like(p).flatten() if own[n] is None else own[n].flatten()
            for n, p in model.model.named_parameters()
            if n in names
        ]
        groups.append(torch.cat(flat).numpy())
    return np.array(groups)


def angle(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_columns_are_those_of_flattened_gradients(tmp_path):
    model, rollouts = wrap(tiny_model("qwen3").double(), None, "tiny"), make_rollouts(24, groups=6)
    workspace = Workspace(tmp_path / "run", TRANSFER)
    workspace.open({}, False)
    found = gradient_transfer._measure(TransferConfig(batch_size=4), model, rollouts, [1, 3], workspace)
    for portion in found:
        row = {name: value.item() for name, value in portion.items() if name in COLUMNS}
        layer = row["layer"]
        own, other = (half_gradients(model, rollouts, each, layer) for each in (layer, None))
        (a, b), (c, d) = ((g[:3].sum(0), g[3:].sum(0)) for g in (own, other))
        wanted = {
            "cosine": angle(a + b, c + d),
            "across": (angle(a, d) + angle(b, c)) / 2,
            "ceiling": angle(c, d),
            "own_ceiling": angle(a, b),
        }
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, abs=1e-9), name
        exact = bootstrap_error(own, other)
        # A projection of 4093 numbers errs by some percent in each of the products.
        assert row["stderr"] == pytest.approx(exact, rel=0.2)
        assert (row["low"], row["high"]) == pytest.approx(
            (max(-1, row["cosine"] - 1.96 * row["stderr"]), min(1, row["cosine"] + 1.96 * row["stderr"]))
        )


def test_a_projection_keeps_inner_products_on_average():
    torch.manual_seed(0)
    errors = []
    for _ in range(30):
        a = [torch.randn(200, 150), torch.randn(70)]
        # Also of low rank, as the gradient of a weight is.
        b = [0.5 * a[0] + torch.randn(200, 1) @ torch.randn(1, 150), a[1] + torch.randn(70)]
        exact = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
        size = float(np.prod([np.sqrt(sum(float((x**2).sum()) for x in each)) for each in (a, b)]))
        one, other = (gradients.sketch([each])[0] for each in (a, b))
        errors.append((one @ other - exact) / size)
    # Of k numbers, the error of a product is about 1 / sqrt(k) of the lengths.
    assert np.std(errors) < 2 / np.sqrt(SKETCH)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(len(errors))


def test_a_projection_is_linear_and_that_of_what_is_there():
    a, b = torch.randn(3, 5000), torch.randn(3, 5000)
    np.testing.assert_allclose(
        gradients.sketch([[a + b, None]]), gradients.sketch([[a, None]]) + gradients.sketch([[b, None]]), atol=1e-4
    )
    # Whether another parameter has a gradient does not move it.
    np.testing.assert_array_equal(
        gradients.sketch([[None, b]]) + gradients.sketch([[a, None]]), gradients.sketch([[a, b]])
    )


def test_blocks_have_signs_of_their_own():
    torch.manual_seed(0)
    a = torch.randn(400 * SKETCH)
    rows = gradients.sketch([[a, None], [a, None], [None, a], [None, a]])
    sizes = np.linalg.norm(rows, axis=1)
    cosines = rows @ rows.T / np.outer(sizes, sizes)
    # Of 400 random signs each, two blocks agree to about 1 / sqrt(400).
    assert abs(cosines[np.triu_indices(4, 1)]).max() < 5 / np.sqrt(400)


def test_the_error_of_the_bootstrap_is_that_of_repeated_samples():
    draw = np.random.default_rng(1)
    truth = draw.normal(size=(2, 40))

    def groups():
        return truth[:, None] + 3 * draw.normal(size=(2, 30, 40))

    samples = [angle(*g.sum(1)) for g in (groups() for _ in range(400))]
    errors = [bootstrap_error(*groups()) for _ in range(40)]
    assert np.mean(errors) == pytest.approx(np.std(samples), rel=0.35)
    assert np.isnan(bootstrap_error(np.ones((1, 3)), np.ones((1, 3))))


def test_equal_rewards_have_no_gradient():
    responses = [Response("", "", [1, 2, 3], 1)] * 12
    rewards = np.array([[0.1] * 4, [0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0]])
    rollouts = gradient_transfer.make_rollouts(responses, rewards)
    assert [r.group for r in rollouts] == [0] * 4 + [1] * 2
    # The advantage of TRL's GRPO: reward less the mean, by the standard deviation of the group.
    np.testing.assert_allclose([r.advantage for r in rollouts[:2]], -0.5 / (np.sqrt(1 / 3) + 1e-4))


def state_of(model):
    return [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]


def assert_as_before(model, before, weights):
    for p, (required, gradient), weight in zip(model.parameters(), before, weights, strict=True):
        assert p.requires_grad == required
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)
        assert torch.equal(p, weight)
        assert not p._post_accumulate_grad_hooks


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(fails):
    network = tiny_model("qwen3").train()
    first, second, *_ = network.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    model = wrap(network, tiny_tokenizer(), "tiny")
    network.train()
    model.layers[1].eval()
    modes = [m.training for m in network.modules()]
    before, weights = state_of(network), [p.detach().clone() for p in network.parameters()]
    layers, random = list(model.layers), torch.random.get_rng_state()
    calls = []

    def stop(module, args):
        calls.append(torch.is_grad_enabled())
        if fails and sum(calls) > 20:
            raise RuntimeError("stop")

    hook = model.layers[0].register_forward_pre_hook(stop)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            bupo.transfer(model, PROMPTS, reward=parity, **OPTIONS)
    else:
        result = bupo.transfer(model, PROMPTS, reward=parity, **OPTIONS)
        assert list(result.table["layer"]) == [1, 2, 3]
        assert not result.table.isna().any().any()
        assert result.path is None
    hook.remove()
    assert_as_before(network, before, weights)
    assert modes == [m.training for m in network.modules()]
    assert layers == list(model.layers)
    assert torch.equal(random, torch.random.get_rng_state())


@pytest.mark.slow
def test_it_resumes_bit_for_bit_and_adds_layers(tmp_path, monkeypatch, caplog):
    def run(place, **options):
        return bupo.transfer(tiny(), PROMPTS, output=tmp_path / place, **{"reward": parity, **OPTIONS, **options}).table

    whole, row, calls = run("whole"), gradient_transfer._row, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return row(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gradient_transfer, "_row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("again")
    assert list((tmp_path / "again" / "tiny" / "work").glob("gradients-*"))
    pd.testing.assert_frame_equal(run("again"), whole, check_exact=True)
    assert "resuming an unfinished measurement" in caplog.text

    assert list(run("parts", layers=[2])["layer"]) == [2]
    pd.testing.assert_frame_equal(run("parts", batch_size=16), whole, check_exact=True)
    caplog.clear()
    pd.testing.assert_frame_equal(run("parts", layers="1-2"), whole, check_exact=True)
    assert "already complete" in caplog.text
    with pytest.raises(UserError, match=r"other settings .seed 0 -> 1"):
        run("parts", seed=1)
    with pytest.raises(UserError, match=r"other settings \(reward .*parity -> .*, reward_code "):
        run("parts", reward=lambda completions, **_: [-value for value in parity(completions)])
    found = Transfer.load(tmp_path / "parts" / "tiny")
    assert found.config["layers"] == "1,2,3"
    last = Transfer.load(tmp_path / "whole" / "tiny")
    assert last.config["layers"] == "all"
    assert found.timings.keys() == last.timings.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": lambda completions, **_: [1.0] * len(completions)}, "differ in reward for 0 of the 12 prompts"),
        ({"layers": "2-4"}, "--layers asks for 4 of 3 layers; needed are numbers from 1 to 3"),
        ({"layers": "2-1"}, "--layers is '2-1'; needed is all, or numbers from 1"),
        ({"layers": [0]}, "--layers is [0]; needed is all, or numbers from 1"),
        ({"temperature": 0.0}, "--temperature is 0.0; needed is a number above 0"),
        ({"num_generations": 1}, "--num-generations is 1; needed is a number of at least 2"),
        ({"max_prompts": 1}, "--max-prompts is 1; needed is a number of at least 2"),
        ({"dtype": "bfloat16"}, "a loaded model is taken as it is"),
        ({"reward": lambda completions, **_: [None] * len(completions)}, "the reward gave no score"),
        ({"layer": 2}, "layer"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, message):
    with pytest.raises(UserError) as info:
        bupo.transfer(tiny(), PROMPTS, **{"reward": parity, **OPTIONS, **options})
    assert message in str(info.value)
    assert "\n" not in str(info.value)


def test_a_verifier_among_several_rewards_needs_answers():
    with pytest.raises(UserError, match="prompt 1 has no answer"):
        bupo.transfer(tiny(), PROMPTS, reward=["exact", parity], **OPTIONS)


def test_quantised_and_missing_weights_are_refused():
    quantised = tiny()
    quantised.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UserError, match=r"its weights are quantised .* and have no gradient"):
        bupo.transfer(quantised, PROMPTS, reward=parity, **OPTIONS)


def test_layers_are_read():
    assert TransferConfig(layers="all").layers == "all"
    assert TransferConfig(layers="3, 1-2,2").layers == "1,2,3"
    assert TransferConfig(layers=3).layers == "3"
    for bad in ("", "a", "1-", "-1", "1--2", "²", "9" * 5000):
        with pytest.raises(UserError, match="needed is"):
            TransferConfig(layers=bad)


@pytest.mark.slow
def test_several_rewards_are_added(tmp_path):
    def twice(completions, **_):
        return [2 * value for value in parity(completions)]

    one = bupo.transfer(tiny(), PROMPTS, reward=parity, **OPTIONS)
    three = bupo.transfer(tiny(), PROMPTS, reward=[parity, twice], **OPTIONS)
    assert three.mean_reward == pytest.approx(3 * one.mean_reward)
    # Advantages do not depend on the scale of the reward, up to what is added to the standard deviation.
    np.testing.assert_allclose(three.table["cosine"], one.table["cosine"], atol=1e-3)


def make_result(name="tiny", n_layers=4, seed=0):
    draw = np.random.default_rng(seed)
    values = {column: draw.uniform(0.1, 0.9, n_layers) for column in COLUMNS[1:]}
    table = pd.DataFrame({"layer": np.arange(1, n_layers + 1), **values})
    table["low"], table["high"] = table["cosine"] - 0.1, table["cosine"] + 0.05
    return Transfer(name, {"id": name, "layers": n_layers}, {}, table, 8, 5, 0.4)


def test_a_result_is_the_same_from_disk(tmp_path):
    result = make_result()
    found = Transfer.load(result.save(tmp_path / "x"))
    pd.testing.assert_frame_equal(found.table, result.table, check_exact=True)
    assert found.manifest() == json.loads(json.dumps(result.manifest()))
    # The last layer agrees by construction.
    below = result.table[result.table["layer"] < result.n_layers]
    best = int(below.loc[below["cosine"].idxmax(), "layer"])
    assert f"most with GRPO at layer {best}: " in result.summary
    assert "own ceiling" in result._repr_html_()
    (tmp_path / "x" / "transfer.csv").write_text("layer\n1\n")
    with pytest.raises(UserError, match=r"transfer\.csv is not what was written"):
        Transfer.load(tmp_path / "x")


@pytest.mark.slow
def test_the_command_measures_draws_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("transfer", "--model", "testbed/qwen3", "--max-prompts", "8", "--num-generations", "4")
    code, out, err = command(monkeypatch, capsys, *words, "--layers", "8")
    assert code == 0, err
    assert "alignment agrees most with GRPO at layer 8: cosine 0.9" in out  # the only one that was asked for
    place = tmp_path / "data" / "transfers" / "testbed--qwen3"
    assert {p.name for p in place.iterdir()} == {"transfer.json", "transfer.csv"}
    drawn = tmp_path / "figures" / "testbed--qwen3" / "transfer.png"
    picture = drawn.read_bytes()
    code, out, err = command(monkeypatch, capsys, *words, "--layers", "8", "--json")
    document = json.loads(out)["transfer"]
    assert (code, [row["layer"] for row in document["layers"]]) == (0, [8])
    drawn.unlink()
    assert command(monkeypatch, capsys, "figures", "data/transfers")[0] == 0
    assert drawn.read_bytes() == picture
    code, _, err = command(monkeypatch, capsys, *words, "--layers", "9")
    assert code == 2
    assert "--layers asks for 9 of 8 layers; needed are numbers from 1 to 8" in err
    code, _, err = command(monkeypatch, capsys, *words, "--temperature", "0")
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["testbed/qwen3", "testbed/llama"])
def test_agreement_rises_with_depth(name):
    table = bupo.transfer(name, max_prompts=96).table
    cosine, across = table["cosine"].to_numpy(), table["across"].to_numpy()
    assert np.corrcoef(np.arange(8), cosine)[0, 1] > 0.8
    assert cosine[-1] > 0.9 > cosine[-2] > cosine[0] + 0.3
    assert across[-1] > across[-2] > across[:4].mean() + 0.03
    assert (np.abs(across[:2]) < 0.15).all()
    # Those of 96 prompts; 256 gave .57 and more.
    assert table["ceiling"].between(0.1, 0.85).all()
    assert (table["across"] < np.sqrt(np.maximum(table["ceiling"], 0.2)) + 0.1).all()
    assert set(COLUMNS) == set(table.columns)
