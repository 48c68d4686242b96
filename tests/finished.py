"""A finished training run as `train` leaves one on disk, with a model of a few bytes."""

from __future__ import annotations

import pandas as pd
from rated import rated

from internal_policy.bupo import Run

HELD = {
    *(
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    ),
}
KEPT_HERE = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "notes.txt")


def make(path, name="some/model", **changed):
    """A finished run as `train` leaves one, with a model of a few bytes."""
    history = pd.DataFrame({"step": range(1, 31), "phase": ["ipa"] * 3 + ["grpo"] * 27})
    history["reward"] = [0.25 + i / 100 for i in range(30)]
    history["policy_entropy"], history["length"] = 0.125, 20.0
    config = {
        **{"model": name, "weights": "w0", "prompts": "d1", "rewards": ["exact_reward"], "peft": None},
        "plan": {"max_steps": 30, "mini_batches": 2, "template": "chat", "lora_rank": 0, "revision": None},
        "trainer": {"site": "layer", "lens": "policy", "ipa_steps": 3, "learning_rate": 1e-6, "seed": 0},
    }
    run = Run(
        name=name,
        method="bupo",
        layer=6,
        layer_reason="the boundary layer of its analysis",
        ipa_steps=3,
        ipa_reason="as it was asked for",
        config=config,
        history=history,
        dynamics=pd.DataFrame(),
        dynamics_layers=pd.DataFrame(),
        path=path,
        evaluation_paths={"start": "evaluations/start", "trained": "evaluations/trained"},
        failures={"crashes": 2, "timeouts": 0},
        versions={"internal-policy": "0.1.0", "torch": "2.13.0"},
        **changed,
    )
    for which, correct in (("start", [3, 9, 16, 1]), ("trained", [5, 9, 16, 2])):
        rated(correct, benchmark="testbed").save(path / "evaluations" / which)
    (path / "model").mkdir(parents=True)
    for file in (HELD - {"README.md"}) | set(KEPT_HERE):
        (path / "model" / file).write_text("{}")
    (path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    run.save()
    return run
