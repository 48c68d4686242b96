"""Write the summaries of the experiments from their stored tables: seconds, no model.

python scripts/experiments/summaries.py     # data/experiments/summaries
"""

from __future__ import annotations

from pathlib import Path

import dose
import layers
import mechanism
import pandas as pd
from predictions import counted, predictions
from store import DATA
from tables import completeness, joined, over_seeds, read_part

from internal_policy.bupo.run import write_table

SUMMARIES = DATA / "summaries"
EVIDENCE = "e4_evidence"
"""The stored measurements of every layer, which are no summary."""
_DIGITS = 6


def summaries(data: Path = DATA) -> dict[str, pd.DataFrame]:
    """Compute everything that the page of results shows.

    Args:
        data: where the parts are.

    Returns:
        The tables by name.
    """
    e1, e2, e4, others = (read_part(part, data) for part in ("e1", "e2", "e4", "methods"))
    evidence = layers.read_evidence(data / "e4" / layers.EVIDENCE.name)
    every_layer, with_methods = joined(e4, e2), joined(others, e2)
    judged = predictions(e1, e2, every_layer, evidence)
    changes = mechanism.changes(e1)
    named = changes.melt(["run", *mechanism.BY, "seed"], var_name="quantity") if len(changes) else changes
    return {
        EVIDENCE: evidence,
        "completeness": completeness(data=data),
        "predictions": judged,
        "prediction_counts": counted(judged),
        "e1_outcomes": mechanism.outcomes(e1),
        "e1_changes": over_seeds(named, [*mechanism.BY, "quantity"]),
        "e1_rule": mechanism.rule(e1),
        "e2_doses": dose.doses(e2),
        "e2_differences": dose.differences(e2),
        "e2_auto": dose.auto(e2),
        "e2_power": dose.power(e2),
        "e4_outcomes": layers.outcomes(every_layer),
        "e4_correlations": layers.correlations(every_layer, evidence),
        "methods": dose.methods(with_methods),
    }


def rounded(table: pd.DataFrame) -> pd.DataFrame:
    """Round numbers to ``_DIGITS`` significant digits, so that the last bits of a machine do not change a file."""
    return table.map(lambda value: float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value)


def main() -> None:
    """Write the tables."""
    SUMMARIES.mkdir(parents=True, exist_ok=True)
    found = summaries()
    for name, table in found.items():
        if name == EVIDENCE:
            continue
        write_table(SUMMARIES / f"{name}.csv", rounded(table))
    print(found["prediction_counts"].to_string(index=False))
    print(found["completeness"].round(1).to_string(index=False))


if __name__ == "__main__":
    main()
