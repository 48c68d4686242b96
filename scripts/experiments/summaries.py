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
from store import DATA, rounded
from tables import completeness, joined, over_seeds, read_part, shared_steps

from internal_policy.bupo.run import read_table, write_table

SUMMARIES = DATA / "summaries"
EVIDENCE = "e4_evidence"
"""The stored measurements of every layer, which are no summary."""
GATE = "e3_gate"
_CONDITIONS = ("pass_at_1", "pass_at_k", "worked_at_k", "greedy", "entropy", "boundary_layer")


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
        "shared_steps": shared_steps(joined(e1, e2, e4, others)),
        "predictions": judged,
        "prediction_counts": counted(judged),
        "e1_outcomes": mechanism.outcomes(e1),
        "e1_means": mechanism.means_of_layers(e1),
        "e1_changes": over_seeds(named, [*mechanism.BY, "quantity"]),
        "e1_rule": mechanism.rule(e1),
        "e1_rule_counts": mechanism.rule_counts(e1),
        "e2_doses": dose.doses(e2),
        "e2_curves": dose.curves(e2),
        "e2_along": dose.along(e2),
        "e2_differences": dose.differences(e2),
        "e2_auto": dose.auto(e2),
        "e2_power": dose.power(e2),
        GATE: gate(read_table(data / "e3" / "gate.csv")),
        "e4_outcomes": layers.outcomes(every_layer),
        "e4_along": layers.along(every_layer),
        "e4_over_boundary": layers.over_boundary(every_layer),
        "e4_correlations": layers.correlations(every_layer, evidence),
        "methods": dose.methods(with_methods),
    }


def gate(looks: pd.DataFrame) -> pd.DataFrame:
    """Summarise the search for a start of E3.

    Args:
        looks: ``gate.csv`` of scripts/testbed/headroom.py, a row for each kept step that was looked at.

    Returns:
        A row per candidate: looks; measured, those of which everything was; passes, those that meet all conditions;
        but_worked, those that meet all but that answers are worked out; and of the measured look that fails the fewest
        conditions (of equals the one with the highest worked_at_k) its step and numbers.
    """
    rows = []
    for name, own in looks.groupby("candidate") if len(looks) else ():
        whole = own[own["pass_at_k"].notna()]
        row = {"candidate": name, "looks": len(own), "measured": len(whole), "passes": int(own["passes"].sum())}
        row["but_worked"] = int((whole["failed"] == "worked_at_k").sum())
        if len(whole):
            failed = whole["failed"].fillna("").str.count(r"\S+")
            nearest = whole.assign(n=failed).sort_values(["n", "worked_at_k"], ascending=[True, False]).iloc[0]
            row |= {column: nearest[column] for column in ("step", *_CONDITIONS, "failed")}
        rows.append(row)
    first = ["candidate", "looks", "measured", "passes", "but_worked", "step", *_CONDITIONS, "failed"]
    return pd.DataFrame(rows).reindex(columns=first)


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
