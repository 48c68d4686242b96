"""The runs of the experiments on BuPO, by part: what is trained, in which setting, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

BOUNDARY = {"testbed/qwen3": 7, "testbed/llama": 6}
"""The boundary layer of each embedded model, as measured by `internal-policy analyze`."""
MODELS = tuple(BOUNDARY)
LAYERS = 8
BATCH: Mapping[str, Any] = {
    "prompts_per_step": 8,
    "num_generations": 8,
    "mini_batches": 2,
    "learning_rate": 1e-4,
    "entropy_sequences": 32,
}
"""Settings that all runs on the embedded models share."""
LEARNING_RATE = float(BATCH["learning_rate"])

E1_STEPS, E1_LAYERS, E1_RATES, E1_SEEDS = 60, (2, 4, 6, 7), (1e-4, 3e-4, 5e-4), range(3)
CONTROL_RATE, CONTROL_LAYER = 0.0, 7
"""E1's control changes no weight: what varies along it is the prompts of the steps and the sampling."""
E2_STEPS, E2_DOSES, E2_RATES, E2_SEEDS = 120, (4, 12, 24, 48), (1e-4, 3e-4), range(5)
AUTO_SEEDS = range(3)
E4_DOSE = 24
METHODS_SEEDS = range(3)


@dataclass(frozen=True)
class Job:
    """One training run."""

    part: str
    """e1, e2, e4 or methods."""
    model: str
    method: str = "grpo"
    layer: int | None = None
    ipa_steps: int | str = 0
    """Alignment steps (the dose), or auto."""
    rate: float = LEARNING_RATE
    """Learning rate of the alignment."""
    steps: int = E2_STEPS
    seed: int = 0

    @property
    def name(self) -> str:
        """A directory's name, unique over all parts."""
        short = self.model.rstrip("/").split("/")[-1]
        middle = self.method.replace("+", "p")
        if self.method == "bupo":
            middle += f"-l{self.layer}-s{self.ipa_steps}-lr{self.rate:g}"
        return f"{short}-{middle}-t{self.steps}-seed{self.seed}"


def jobs(part: str) -> list[Job]:
    """List the runs of a part, seed by seed, so that an interrupted part has whole repetitions.

    Args:
        part: e1, e2, e4 or methods.

    Returns:
        The jobs. A run that two parts need belongs to the first of them.
    """
    return _PARTS[part]()


def _e1() -> list[Job]:
    found = []
    for seed in E1_SEEDS:
        for model in MODELS:
            control = Job("e1", model, "bupo", CONTROL_LAYER, E1_STEPS, CONTROL_RATE, E1_STEPS, seed)
            # What the same steps are worth to GRPO.
            found += [control, Job("e1", model, steps=E1_STEPS, seed=seed)]
        found += [
            Job("e1", model, "bupo", layer, E1_STEPS, rate, E1_STEPS, seed)
            for rate in E1_RATES
            for layer in E1_LAYERS
            for model in MODELS
        ]
    return found


def _e2() -> list[Job]:
    found = []
    for seed in E2_SEEDS:
        for model, layer in BOUNDARY.items():
            found.append(Job("e2", model, seed=seed))
            aligned = Job("e2", model, "bupo", layer, seed=seed)
            found += [replace(aligned, ipa_steps=dose, rate=rate) for dose in E2_DOSES for rate in E2_RATES]
    autos = [
        Job("e2", model, "bupo", layer, "auto", rate, seed=seed)
        for seed in AUTO_SEEDS
        for rate in E2_RATES
        for model, layer in BOUNDARY.items()
    ]
    return found + autos


def _e4() -> list[Job]:
    return [
        Job("e4", model, "bupo", layer, E4_DOSE, seed=seed)
        for seed in E2_SEEDS
        for layer in range(1, LAYERS + 1)
        for model, boundary in BOUNDARY.items()
        if layer != boundary
    ]


def _methods() -> list[Job]:
    return [
        Job("methods", model, method, seed=seed)
        for seed in METHODS_SEEDS
        for method in ("ppo", "rloo", "reinforce++")
        for model in MODELS
    ]


_PARTS = {"e1": _e1, "e2": _e2, "e4": _e4, "methods": _methods}
PARTS = tuple(_PARTS)
