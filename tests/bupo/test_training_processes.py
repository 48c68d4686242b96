"""Two CPU processes (gloo) give the same updates as one with the same batch, and only one of them writes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from internal_policy import bupo

SWITCH, STEPS, UPDATES = 2, 4, 2


def in_a_process(rank, port, out, kinds):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    for kind in kinds:
        updates(out, rank, 2, kind)


def both(out, kinds):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As torchrun does it, with one import for both.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["internal_policy.bupo.training"])
    ranks = [context.Process(target=in_a_process, args=(rank, port, out, kinds)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=240)
    assert [process.exitcode for process in ranks] == [0, 0]


def rollouts(prompts, trainer):
    """Completions that depend only on the prompt and the index in its group."""
    tokenizer = trainer.processing_class
    seen, completions = {}, []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        rng = torch.Generator().manual_seed(hash_of(prompt) + seen[prompt])
        length = int(torch.randint(3, 9, (), generator=rng))
        completions.append(torch.randint(2, 61, (length,), generator=rng).tolist())
    return {
        "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
        "completion_ids": completions,
        "logprobs": None,
    }


def hash_of(prompt):
    return sum(1000 * (i + 1) * int(w[1:]) for i, w in enumerate(prompt.split()))


def high_words(completions, **_):
    return [sum(int(w[1:]) > 30 for w in c.split()) / 8 for c in completions]


class Recorder(bupo.BuPOTrainer):
    """Keeps the advantages of every batch of rollouts, in the order of the rollouts."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        self.__dict__.setdefault("advantages", []).append(batch["advantages"].clone())
        return batch


# Two passes over all rollouts, by either mean; mini-batches as `train` makes them; and the other advantages.
KINDS = {
    "sequence-mean": {"aggregation": "sequence-mean"},
    "token-mean": {"aggregation": "token-mean"},
    "mini-batches": {},
    "rloo": {"method": "rloo", "ipa_steps": 0, "layer": None},
    "reinforce++": {"method": "reinforce++", "ipa_steps": 0, "layer": None},
}


def updates(out, rank, processes, kind):
    """The trainer on 16 rollouts a step; with two processes each takes eight of them in two parts."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer import grpo_trainer

    options = KINDS[kind]
    dealt = kind == "mini-batches"
    batches = {"steps_per_generation": processes, "num_iterations": UPDATES, "gradient_accumulation_steps": processes}
    # One process takes 16 rollouts at once, each of two takes its eight in two parts of four.
    size = 16 if processes == 1 else 4
    if dealt:
        # Of 16 rollouts each update sees eight, four of them in either process.
        batches = {"steps_per_generation": UPDATES, "num_iterations": 1, "gradient_accumulation_steps": 1}
        size = 8 // processes
    prompts = list(range(2, 2 + 4 * STEPS))
    if dealt and processes == 1:
        # Two processes have two prompts of a step each, and the first of either is in the first mini-batch.
        prompts = [p for start in prompts[::4] for p in (start, start + 2, start + 1, start + 3)]
    # TRL assigns rollouts differently to one process than to two.
    shuffle = grpo_trainer.shuffle_sequence_dict
    grpo_trainer.shuffle_sequence_dict = (lambda batch: batch) if dealt else shuffle

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step in (SWITCH * UPDATES, STEPS * UPDATES):
                torch.save(model.state_dict(), Path(out) / f"{kind}-{processes}-{rank}-{state.global_step}.pt")

    trainer = Recorder(
        model=tiny_model("qwen3", layers=4),
        reward_funcs=high_words,
        args=bupo.BuPOConfig(
            output_dir=str(out),
            **{"max_steps": STEPS * UPDATES, "num_generations": 4, "per_device_train_batch_size": size},
            **{"layer": 2, "ipa_steps": SWITCH, **batches, **options},
            # Adam's first steps are the signs of gradients, and rounding flips those near zero.
            **{"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "linear", "shuffle_dataset": False},
            **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True},
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w{i + 7}"} for i in prompts]),
        processing_class=tiny_tokenizer(),
        callbacks=[Keep()],
        rollout_func=rollouts,
    )
    assert trainer.accelerator.num_processes == processes
    try:
        trainer.train()
    finally:
        grpo_trainer.shuffle_sequence_dict = shuffle
    torch.save(torch.stack(trainer.advantages), Path(out) / f"{kind}-{processes}-{rank}-advantages.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Final results of one process and of two; two processes are started once for all kinds."""
    outputs = {}

    def get(kind):
        if kind not in outputs:
            out = tmp_path_factory.mktemp("processes")
            both(out, KINDS)
            for other in KINDS:
                updates(out, 0, 1, other)
                outputs[other] = out
        return outputs[kind]

    return get


RANKS = ((1, 0), (2, 0), (2, 1))
"""The number of processes and the rank."""


@pytest.mark.parametrize("kind", ["sequence-mean", "token-mean", "mini-batches"])
@pytest.mark.slow
def test_two_processes_make_the_same_updates_as_one(trained, kind):
    start = tiny_model("qwen3", layers=4).state_dict()
    before = start
    for update in (SWITCH * UPDATES, STEPS * UPDATES):
        one, two, other = (
            torch.load(trained(kind) / f"{kind}-{n}-{r}-{update}.pt") for n, r in ((1, 0), (2, 0), (2, 1))
        )
        for name in one:
            assert torch.equal(two[name], other[name])
            # The same sums of float32 in another order: a few times 2^-24 of weights up to 1.
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        above = [n for n in one if n.startswith(("model.layers.2", "model.layers.3", "model.norm"))]
        assert all(torch.equal(two[n], start[n]) == (update == SWITCH * UPDATES) for n in above)
        assert max(float((two[n] - before[n]).abs().max()) for n in one) > 1e-3
        before = one
    assert max(float((two[n] - start[n]).abs().max()) for n in above) > 1e-3


@pytest.mark.parametrize("kind", ["rloo", "reinforce++"])
@pytest.mark.slow
def test_two_processes_compute_the_same_advantages_as_one(trained, kind):
    one, first, second = (
        torch.load(trained(kind) / f"{kind}-{n}-{r}-advantages.pt") for n, r in ((1, 0), (2, 0), (2, 1))
    )
    two = torch.cat([first, second], dim=1)
    assert one.shape == two.shape == (STEPS, 16)
    # Rewards are exact eighths; the sums over 16 of them are taken in another order.
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
    assert one.abs().amax(dim=1).min() > 0.1


TRAIN_SCRIPT = """
import json, os, signal, sys
out, rank = os.path.abspath(sys.argv[1]), os.environ["RANK"]
written = []

def watch(event, args):
    path = os.path.abspath(os.fsdecode(args[0])) if args and isinstance(args[0], (str, bytes, os.PathLike)) else ""
    if path.startswith(out):
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            written.append(path)
        elif event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
            written.append(path)

sys.addaudithook(watch)
import torch
from transformers import TrainerCallback
from internal_policy import bupo

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3 and rank == "0":
            os.kill(os.getpid(), signal.SIGKILL)

save = torch.save

def seen(thing, path, *args, **kwargs):
    written.append(os.path.abspath(path))
    save(thing, path, *args, **kwargs)

# It opens its files out of Python's sight.
torch.save = seen

run = bupo.train(
    "testbed/qwen3", layer="auto", ipa_steps=1, max_steps=2, prompts_per_step=8, num_generations=4, mini_batches=2,
    max_completion_length=44, save_steps=1, eval_problems=4, eval_samples=2, dynamics_responses=4, output=out,
    callbacks=[Die()] if len(sys.argv) > 2 else [],
)
with open(f"rank-{rank}.json", "w") as handle:
    json.dump({"layer": run.layer, "written": written, "phases": list(run.history["phase"])}, handle)
"""


@pytest.mark.slow
def test_train_with_two_processes(tmp_path):
    (tmp_path / "script.py").write_text(TRAIN_SCRIPT)

    def launch(*args):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"]
        return subprocess.run([*command, *args], cwd=tmp_path, capture_output=True, text=True, timeout=400)

    done = launch("out")
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["layer"] == second["layer"]
    assert first["written"]
    # Each process stores the state of its random generators, and either may be the first to create the folder.
    assert {p.name for p in map(Path, first["written"])} >= {"run.json", "optimizer.pt", "rng_state_0.pth"}
    assert {p.name for p in map(Path, second["written"]) if p.suffix} == {"rng_state_1.pth"}
    run = bupo.Run.load(tmp_path / "out")
    assert list(run.history["phase"]) == ["ipa", "grpo"]
    assert list(run.dynamics["step"]) == [0, 1, 2]
    assert run.evaluation is not None

    # Each process continues with its own random numbers.
    assert "SIGKILL" in launch("killed", "die").stderr
    assert not (tmp_path / "killed" / "run.json").exists()
    done = launch("killed")
    assert done.returncode == 0, done.stderr[-4000:]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
