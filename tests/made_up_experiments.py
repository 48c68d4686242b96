"""Made-up tables of the experiments on BuPO, whose values are known functions of setting, seed and step."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pandas as pd
from jobs import LAYERS, jobs

STARTS = {"testbed/qwen3": 0.46, "testbed/llama": 0.44}
NOISE = (0.0, 0.012, -0.008, 0.005, -0.011)
"""What each seed adds to an accuracy, before the factor of its method."""
FACTORS = {"bupo": 1.5, "ppo": 2.5}
"""How often a method's accuracies have the noise of a seed; those of the others have it once."""


def is_control(job):
    """Whether a run of E1 changes no weight."""
    return job.part == "e1" and job.rate == 0


def lift(job):
    """The gain in accuracy that a run has without its seed's noise."""
    if job.part == "e1" and job.method == "grpo":
        return 0.3
    if job.part == "e1":
        return {2: -0.2, 4: -0.05, 6: 0.05, 7: 0.2}[job.layer] * job.rate / 3e-4
    aligned = 14 if job.ipa_steps == "auto" else int(job.ipa_steps)
    at_layer = 0.0 if job.part != "e4" else 0.01 * (job.layer - 7)
    # A step of alignment is worth half a step of GRPO, of which 120 lift by half.
    return (job.steps - aligned / 2) * 0.5 / 120 + at_layer


def tables(part, seeds=range(5), steps=None):
    """The raw tables of a part, of the jobs with these seeds."""
    found = {name: [] for name in ("runs", "histories", "curves", "dynamics", "dynamics_layers", "perplexities")}
    for job in jobs(part):
        if job.seed in seeds:
            for name, rows in _run(job).items():
                found[name] += [{"run": job.name, **row} for row in rows]
    return {name: pd.DataFrame(rows) for name, rows in found.items()}


def write(directory, part, seeds=range(5)):
    """Write them as ``run.py`` does."""
    (directory / part).mkdir(parents=True, exist_ok=True)
    for name, table in tables(part, seeds).items():
        if len(table):
            table.to_csv(directory / part / f"{name}.csv", index=False)


def evidence():
    """Measurements of every layer: the entropy change falls with the layer, its direction part has a peak."""
    rows = [
        {
            **{"model": model, "layer": layer, "change": 1 - 0.1 * layer, "change_direction": -((layer - 4.2) ** 2)},
            **{"accuracy": layer**2 / 64, "across": layer / 10, "boundary": layer == 6, "stage": "exploration"},
        }
        for model in STARTS
        for layer in range(1, LAYERS + 1)
    ]
    return pd.DataFrame(rows)


def _run(job):
    start, noise = STARTS[job.model], NOISE[job.seed] * FACTORS.get(job.method, 1.0)
    end = start + lift(job) + noise
    stopped = 14 + job.seed if job.ipa_steps == "auto" else job.ipa_steps
    runs = {
        **asdict(job),
        **{"alignment_steps": stopped, "alignment_end": "as chosen", "avg_start": start, "pass16_start": 0.93},
        **{"avg": end, "avg_stderr": 0.018, "pass16": 0.95 + noise / 10, "length": 27.0, "truncated": 0.01},
        **{"entropy_end": 0.08 + 0.01 * job.seed, "seconds": 180.0, "torch": "2"},
    }
    steps = np.arange(1, job.steps + 1)
    # The reward of a lower layer and a higher rate falls sooner.
    reward = 0.45 + 0.004 * steps
    longer, luck = 0.1, noise
    if job.part == "e1":
        reward = 0.45 + 0.01 * np.minimum(steps, 30) - 0.015 * np.maximum(steps - 30, 0)
    if is_control(job):
        # Later prompts are easier, and their solutions longer.
        reward, longer, luck = 0.45 + 0.002 * steps, 0.06, 0.0
    histories = [
        {
            "step": s,
            "phase": "ipa",
            "reward": r + luck,
            "policy_entropy": 0.13,
            "length": 27 + longer * s,
            "truncated": 0.0,
        }
        for s, r in zip(steps.tolist(), reward.tolist(), strict=True)
    ]
    full = {0, job.steps} | ({72, 96, 108, 116} if job.method == "grpo" else set())
    measured = sorted(full | (set() if job.part == "e1" else set(range(0, job.steps, 12))))
    curves = [
        {
            **{"step": s, "samples": 16 if s in full else 2, "avg": start + (end - start) * s / job.steps},
            **{"pass16": 0.93 + 0.02 * s / job.steps + noise / 10 if s in full else np.nan, "truncated": 0.01},
        }
        for s in measured
    ]
    found = {"runs": [runs], "histories": histories, "curves": curves}
    if job.part != "e1" or job.method == "grpo":
        return found
    found["dynamics"], found["dynamics_layers"], found["perplexities"] = [], [], []
    for s in range(0, job.steps + 1, 3):
        # Falls to step 30 and rises again; the seeds differ in how far.
        kl = 10 - 0.1 * min(s, 30) + (0.05 + noise) * max(s - 30, 0)
        perplexity = 0.15 + (0.002 + 0.01 * noise) * s
        found["dynamics"].append(
            {"step": s, "phase": "ipa", "kl_mean": kl, "log_perplexity": perplexity, "change": 0.1}
        )
        found["dynamics_layers"] += [
            {"step": s, "layer": layer_, "cosine": 0.3 + 0.05 * layer_ + (0.002 + 0.01 * noise) * s, "kl": kl}
            for layer_ in range(job.layer + 1, LAYERS + 1)
        ]
        found["perplexities"].append(
            {"step": s, "own_length": 27.0 + s / 30, "log_perplexity_solutions": 0.2, "log_perplexity_own": 0.13}
        )
    return found
