"""Delay in steps of a run that begins with alignment behind GRPO alone, from the stored training curves.

python benchmarks/alignment_delay.py             # reads data/experiments/bupo; a second, no model
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy import stats

DATA = Path(__file__).resolve().parents[1] / "data" / "experiments" / "bupo"
BOUNDARY = {"testbed/qwen3": 7, "testbed/llama": 6}
DEGREE = 2
"""Degree of the polynomial that smooths GRPO's mean curve; degree 3 changes no delay by more than half a step."""
_SHIFTS = np.round(np.arange(-5, 30, 0.1), 1)

Curve = NDArray[np.float64]


def delay(aligned: Curve, plain: Curve, expected: Polynomial, ipa_steps: int) -> float:
    """The shift that maps GRPO's curve to that of a run with alignment after the alignment phase.

    Both runs of a seed read the same prompts at the same step, so how hard a batch is cancels in their difference d(t).
    With f the expected curve of GRPO, the delay is the k for which f(t - k) - f(t) is nearest to d(t) in the least
    squares. Before step 1 nothing is learnt, so f is f(1) there.

    Args:
        aligned: [T] reward of the run with alignment at steps 1..T.
        plain: [T] reward of GRPO with the same seed.
        expected: f, of the step.
        ipa_steps: steps of alignment, which are left out.

    Returns:
        Steps, in tenths; positive if the run with alignment is behind.
    """
    steps = np.arange(1, len(plain) + 1)[ipa_steps:]
    found = (aligned - plain)[ipa_steps:]
    shifted = expected(np.maximum(steps - _SHIFTS[:, None], 1)) - expected(steps)
    return float(_SHIFTS[((shifted - found) ** 2).sum(axis=1).argmin()])


def delays(runs: pd.DataFrame, histories: pd.DataFrame) -> pd.DataFrame:
    """The delays of the runs that align the boundary layer for 1, 3, 6 and 15 steps.

    Args:
        runs: ``runs.csv`` of the experiment.
        histories: ``histories.csv``, one row per run and step.

    Returns:
        One row per model and number of alignment steps: the mean delay over seeds in steps, and its 95% t-interval.
    """
    usual = runs["site"].eq("layer") & runs["lens"].eq("policy") & runs["ipa_learning_rate"].isna()
    rows = []
    for model, boundary in BOUNDARY.items():
        own = runs[usual & runs["model"].eq(model)]
        plain = _curves(own[own["method"].eq("grpo")], histories)
        steps = plain.columns.to_numpy(dtype=np.float64)
        expected = Polynomial.fit(steps, plain.mean().to_numpy(), DEGREE)
        at_boundary = own[own["method"].eq("bupo") & own["layer"].eq(boundary)]
        for ipa_steps, group in at_boundary.groupby("ipa_steps"):
            aligned = _curves(group, histories)
            found = [
                delay(aligned.loc[seed].to_numpy(), plain.loc[seed].to_numpy(), expected, int(str(ipa_steps)))
                for seed in aligned.index
            ]
            low, high = stats.t.interval(0.95, len(found) - 1, np.mean(found), stats.sem(found))
            mean = float(np.mean(found))
            rows.append(
                {"model": model, "ipa_steps": ipa_steps, "seeds": len(found), "delay": mean, "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def _curves(runs: pd.DataFrame, histories: pd.DataFrame) -> pd.DataFrame:
    """Reward with one row per seed and one column per step."""
    return histories[histories["run"].isin(runs["run"])].pivot_table(index="seed", columns="step", values="reward")


if __name__ == "__main__":
    print(delays(pd.read_csv(DATA / "runs.csv"), pd.read_csv(DATA / "histories.csv")).round(1).to_string(index=False))
