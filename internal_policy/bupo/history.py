"""The trainer's log as a table: a row a step."""

from __future__ import annotations

from typing import Any

import pandas as pd

from internal_policy.bupo.config import ALIGNMENT, second_phase


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
            "phase": ALIGNMENT if aligns else second_phase(method),
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
