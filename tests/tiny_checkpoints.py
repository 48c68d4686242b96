"""Checkpoints of tiny models, as trainings leave them."""

from __future__ import annotations

import json

from tiny import tiny_model, tiny_tokenizer

PROMPTS = ["w2 w3 w4", "w5 w6", "w7 w8 w9 w10", "w11"]
STEPS = (5, 10, 100)


def save(directory, seed, vocab=61):
    tiny_model("qwen3", layers=2, seed=seed, vocab=vocab).save_pretrained(directory)
    tiny_tokenizer(vocab).save_pretrained(directory)
    return directory


def steps_of(paths):
    return [int(str(path).rsplit("-", 1)[1]) for path in paths]


def bupo_layout(run, root):
    """The same checkpoints in the layout of a BuPO run."""
    (root / "checkpoints").mkdir(parents=True)
    for checkpoint in run.iterdir():
        (root / "checkpoints" / checkpoint.name).mkdir()
        (root / "checkpoints" / checkpoint.name / "config.json").write_text("{}")
    (root / "checkpoints" / "README.md").write_text("about")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    return root


def save_run(root):
    """A run whose names sort as 10, 100, 5 in a shell, with five updates a step."""
    for seed, step in enumerate(STEPS):
        state = {"global_step": step, "stateful_callbacks": {"StepCallback": {"args": {"updates_per_step": 5}}}}
        (save(root / f"checkpoint-{step}", seed) / "trainer_state.json").write_text(json.dumps(state))
    return root
