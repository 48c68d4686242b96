"""A training run on disk and in memory.

A directory holds one run. ``run.json`` is written last: a directory without it holds a run that has not ended, whose
``history.csv`` and ``dynamics.csv`` grow while it lasts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from internal_policy.bupo.words import ALIGNMENT, AUTO, after_alignment
from internal_policy.errors import UserError
from internal_policy.files import write_atomically, write_text

if TYPE_CHECKING:
    from internal_policy.evaluation import Evaluation

SCHEMA_VERSION = 1
MANIFEST = "run.json"
HISTORY = "history.csv"
DYNAMICS = "dynamics.csv"
DYNAMICS_LAYERS = "dynamics_layers.csv"
MODEL = "model"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Run:
    """A finished training run. Layers and steps count from 1; a step is a batch of rollouts with all its updates."""

    name: str
    """What the model was called."""
    method: str
    """bupo, grpo, rloo or reinforce++."""
    layer: int | None
    """The layer whose policy was optimised first."""
    layer_reason: str
    """Why that layer."""
    ipa_steps: int
    """Steps of the first phase that were taken."""
    ipa_reason: str
    """Why the first phase ended there."""
    config: dict[str, Any]
    """The settings, with digests of weights and prompts."""
    history: pd.DataFrame
    """A row a step: phase, reward, policy_entropy and entropy (nats), length (tokens), loss, seconds and more."""
    dynamics: pd.DataFrame
    """A row a measurement on fixed responses: change, perplexity, KL to later layers (figure 5)."""
    dynamics_layers: pd.DataFrame
    """A row a measurement and later layer: cosine and KL (figure 5)."""
    path: Path
    """Where it is on disk."""
    evaluation_paths: dict[str, str] = field(default_factory=dict)
    """Where, below ``path``, the evaluations of ``start`` and ``trained`` are."""
    failures: dict[str, int] = field(default_factory=dict)
    """Rewards that crashed or took too long, and were counted as zero."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each stage."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""

    @property
    def model_dir(self) -> Path:
        """The trained model, as transformers loads it."""
        return self.path / MODEL

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The trained model on held-out problems; None where none were asked for."""
        return self._evaluation("trained")

    @cached_property
    def evaluation_start(self) -> Evaluation | None:
        """The model as it was given, on the same problems."""
        return self._evaluation("start")

    def _evaluation(self, which: str) -> Evaluation | None:
        from internal_policy.evaluation import load_evaluation

        return load_evaluation(self.path / self.evaluation_paths[which]) if which in self.evaluation_paths else None

    @property
    def label(self) -> str:
        """What figures call it."""
        trainer = self.config["trainer"]
        if self.method != "bupo" or self.layer is None:
            parts = [{"grpo": "GRPO", "bupo": "GRPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}[self.method]]
        else:
            site = {"layer": "layer", "attn": "attention", "ffn": "FFN"}[str(trainer["site"])]
            asked = trainer["ipa_steps"]
            steps = asked if asked == AUTO else f"{self.ipa_steps} step{'s' if self.ipa_steps != 1 else ''}"
            parts = ["BuPO", f"{site} {self.layer}", steps]
        parts += [text.format(trainer[name]) for name, text in _TOLD.items() if trainer.get(name) not in _USUAL[name]]
        if self.config["plan"].get("lora_rank"):
            parts.append(f"LoRA {self.config['plan']['lora_rank']}")
        return ", ".join(parts)

    @property
    def setting(self) -> dict[str, Any]:
        """What was asked for, seed and prompts apart: runs that agree in it differ in their seed only."""
        flat = {**self.config, **self.config["plan"], **self.config["trainer"]}
        return {key: value for key, value in flat.items() if key not in _NO_SETTING}

    def save(self) -> None:
        """Write tables and manifest; the manifest last."""
        for name, table in (
            (HISTORY, self.history),
            (DYNAMICS, self.dynamics),
            (DYNAMICS_LAYERS, self.dynamics_layers),
        ):
            write_table(self.path / name, table)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(self, name) for name in _PLAIN},
        }
        write_text(self.path / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# What a label says beside method, layer and steps, and the values that go without saying.
_TOLD = {
    "lens": "{}",
    "ipa_learning_rate": "first at {:g}",
    "freeze_layers": "layers 1-{} frozen",
    "upper_lr_scale": "{:g}x above",
    "aggregation": "{}",
}
_USUAL: dict[str, tuple[Any, ...]] = {
    "lens": (None, "policy"),
    "ipa_learning_rate": (None,),
    "freeze_layers": (None, 0),
    "upper_lr_scale": (None, 1.0),
    "aggregation": (None, "sequence-mean"),
}
_NO_SETTING = {
    *("plan", "trainer", "seed", "prompts", "dynamics_every", "dynamics_responses", "benchmark", "save_steps"),
    *("save_total_limit", "report_to", "entropy_sequences"),
}

_PLAIN = (
    *("name", "method", "layer", "layer_reason", "ipa_steps", "ipa_reason", "config", "failures", "timings"),
    *("versions", "evaluation_paths"),
)


# Before pandas 3.1 the default may miss a float's last digit; from then on it does not, and the choice is deprecated.
_EXACT: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}
)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table as csv, whole or not at all.

    Args:
        path: the file.
        table: its rows.
    """
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))


def read_table(path: Path) -> pd.DataFrame:
    """Read a table that ``write_table`` wrote.

    Args:
        path: the file.

    Returns:
        Its rows; none where it is not there or has no columns.
    """
    try:
        # pandas' own parser may be off in the last digit: a resumed run shall end with the same numbers.
        table: pd.DataFrame = pd.read_csv(path, **_EXACT)
        return table
    except (FileNotFoundError, pd.errors.EmptyDataError):
        return pd.DataFrame()


def load_run(directory: str | Path) -> Run:
    """Load a training run from disk, without its model.

    Args:
        directory: what ``train`` wrote.

    Returns:
        The run.

    Raises:
        UserError: not a run, not finished, or of another schema version.
    """
    path = Path(directory).expanduser()
    manifest = path / MANIFEST
    if not manifest.is_file():
        state = "holds a run that has not ended" if (path / CHECKPOINTS).is_dir() else "is not a training run"
        raise UserError(f"{path}: {state} (no {MANIFEST}); give a directory that `internal-policy train` finished")
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        version = data.pop("schema_version")
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{manifest}: cannot be read ({error}); train again with --overwrite") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{manifest}: schema version {version}; this version reads {SCHEMA_VERSION}; train again")
    if missing := sorted(set(_PLAIN) - data.keys()):
        raise UserError(f"{manifest}: lacks {missing[0]}; train again with --overwrite")
    return Run(
        **{name: data[name] for name in _PLAIN},
        history=read_table(path / HISTORY),
        dynamics=read_table(path / DYNAMICS),
        dynamics_layers=read_table(path / DYNAMICS_LAYERS),
        path=path,
    )


def history_of(log: list[dict[str, Any]], updates_per_step: int, method: str, alignment_lr: float) -> pd.DataFrame:
    """Turn the trainer's log into a table.

    Args:
        log: ``trainer.state.log_history``.
        updates_per_step: updates in a step.
        method: the name of the second phase.
        alignment_lr: the first phase's learning rate as a multiple of the second's.

    Returns:
        A row a step.
    """
    rows = []
    for entry in log:
        if "reward" not in entry:
            continue
        aligns = entry.get("aligns", 0.0) > 0.5
        rates = entry.get("learning_rate")
        row: dict[str, Any] = {
            "step": entry["step"] // updates_per_step,
            "phase": ALIGNMENT if aligns else after_alignment(method),
            **{name: entry.get(source) for name, source in _COLUMNS.items()},
            "learning_rate": None if rates is None else rates * (alignment_lr if aligns else 1.0),
        }
        if entry.get("step_time") is not None:
            row["seconds"] = entry["step_time"] * updates_per_step
        row.update({key: value for key, value in entry.items() if key.startswith("rewards/") and "/mean" in key})
        failed = [value for key, value in entry.items() if key.startswith(FAILURES)]
        row["reward_failures"] = int(sum(failed)) if failed else None
        rows.append(row)
    return pd.DataFrame(rows)


_COLUMNS = {
    "reward": "reward",
    "reward_std": "reward_std",
    "policy_entropy": "policy_entropy",
    "entropy": "entropy",
    "length": "completions/mean_length",
    "truncated": "completions/clipped_ratio",
    "clip_ratio": "clip_ratio/region_mean",
    "groups_without_signal": "frac_reward_zero_std",
    "grad_norm": "grad_norm",
    "loss": "loss",
}
FAILURES = "reward_failures/"
"""Before the kinds of failures in the trainer's log."""
