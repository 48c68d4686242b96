"""A finished training run as `train` leaves one on disk, with a model of a few bytes."""

from __future__ import annotations

from dataclasses import asdict

import pandas as pd
from synthetic_evaluations import evaluation_of_counts

from internal_policy.bupo import Run, TrainConfig
from internal_policy.bupo.run import is_on_the_hub

UPLOADED = {
    *(
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    ),
}
NOT_UPLOADED = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "notes.txt")


def call(**options):
    """What a run stores of its call."""
    plain = {name: str(value) for name, value in options.items()}
    return {
        **{"options": plain, "objects": [], "digest": None},
        "from_hub": [name for name in ("model", "prompts") if is_on_the_hub(options.get(name))],
    }


def make(path, name="some/model", **changed):
    """A finished run as `train` leaves one, with a model of a few bytes."""
    history = pd.DataFrame({"step": range(1, 31), "phase": ["ipa"] * 3 + ["grpo"] * 27})
    history["reward"] = [0.25 + i / 100 for i in range(30)]
    history["policy_entropy"], history["length"] = 0.125, 20.0
    train_config = TrainConfig(model=name, layer=6, ipa_steps=3, max_steps=30, mini_batches=2)
    settings = asdict(train_config.with_preset())
    config = {
        **{field: value for field, value in settings.items() if field != "trl_options"},
        **{"weights": "w0", "prompts": "d1", "layer": 6, "rewards": ["exact_reward"], "peft": None, "hooked": None},
    }
    changed.setdefault("call", call(model=name))
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
        evaluation_of_counts(correct, benchmark="testbed").save(path / "evaluations" / which)
    (path / "model").mkdir(parents=True)
    for file in (UPLOADED - {"README.md"}) | set(NOT_UPLOADED):
        (path / "model" / file).write_text("{}")
    (path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    run.save()
    return run
