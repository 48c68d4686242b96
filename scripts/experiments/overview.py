"""The tables with which docs/results.md begins: what was run, when alignment helped, what came of the predictions."""

from __future__ import annotations

import dose
import pandas as pd
from cells import NOTHING, Found, markdown_table, pick, rate_text, seed_counts, verdict
from jobs import E1_LAYERS, E1_RATES, E2_DOSES, E2_RATES, MODELS
from mechanism import LOSS
from predictions import NO, NOT_RUN, UNDECIDED, YES

_SHORT = {
    "P1": "the cosine of H^l with later layers rises (step 30)",
    "P2": "KL to later layers falls, then rises by more than 5%",
    "P3": "the perplexity on the start's responses rises",
    "P4": "responses become longer",
    "P4c": "P4, less the control's lengths (added later)",
    "P5": "the reward rises, then falls by 10 points or more",
    "P5c": "P5, less the control's rewards (added later)",
    "P6": "layer 2 ends below layer 7",
    "P7": "at equal total steps BuPO is at most 1 point above GRPO",
    "P8": "at equal GRPO steps BuPO (dose 12, 24, 48) is above GRPO",
    "P9": "Pass@16 does not differ (the interval contains 0)",
    "P9e": "P9 as an interval within 1 point of 0 (added later)",
    "P10": "at 3e-4 the dose that costs least is at most 12",
    "P11": "Avg@1 rises with the layer (Spearman above 0.5)",
    "P12": "dH_FFN predicts Avg@1 no better than the layer's number",
}
NEGLIGIBLE, NEGLIGIBLE_IN_PAIRS = 0.05, 0.02
"""An effect within five points of zero is called nothing, and one within two where both sides are measured alike."""


def completeness(found: Found) -> str:
    """What was run of each part, and the command that runs the rest."""
    rows = []
    for row in found["completeness"].to_dict("records"):
        left = row["planned"] - row["done"]
        hours = "none" if not left else "not known" if pd.isna(row["hours"]) else f"{row['hours']:.1f}"
        command = f"`make experiment PART={row['part']}`" if left else ""
        name = row["part"] if row["part"] == "methods" else row["part"].upper()
        rows.append([name, f"{row['done']} of {row['planned']}", str(row["whole"]), hours, command])
    return markdown_table(["part", "runs", "whole seeds", "hours of one core for the rest", "command"], rows)


def conditions_alone(found: Found) -> str:
    """Under which conditions alignment alone helped or harmed, against the start."""
    table = found["e1_outcomes"]
    rows = []
    for model in MODELS:
        for layer in E1_LAYERS:
            own = [pick(table, method="bupo", model=model, layer=layer, rate=rate, measure="avg") for rate in E1_RATES]
            cells = [verdict(end and {**end, "value": end["gain"]}, LOSS, NEGLIGIBLE) for end in own]
            rows.append([f"`{model}`", f"layer {layer} aligned", *cells, seed_counts(*own)])
        own = [pick(found["e1_means"], model=model, rate=rate) for rate in E1_RATES]
        cells = [verdict(end, LOSS, NEGLIGIBLE) for end in own]
        rows.append([f"`{model}`", "a layer aligned, mean of the four", *cells, seed_counts(*own)])
        plain = pick(table, method="grpo", model=model, measure="avg")
        cells = [verdict(plain and {**plain, "value": plain["gain"]}, LOSS, NEGLIGIBLE), "-", "-"]
        rows.append([f"`{model}`", "GRPO", *cells, seed_counts(plain)])
    heads = [f"at {rate_text(rate)}" for rate in E1_RATES]
    return markdown_table(["model", "60 steps of", *heads, "seeds"], rows)


def conditions_first(found: Found) -> str:
    """Under which conditions aligning before GRPO helped or harmed, against GRPO."""
    ends, curves = found["e2_differences"], found["e2_along"]
    rows = []
    for model in MODELS:
        for steps in E2_DOSES:
            for rate in E2_RATES:
                setting = {"model": model, "rate": rate, "dose": str(steps)}
                own = [
                    pick(table, **setting, **quantity, comparison=comparison)
                    for comparison in (dose.TOTAL, dose.OPTIMISED)
                    for table, quantity in ((curves, {"step": "mean"}), (ends, {"measure": "avg"}))
                ]
                if any(row is not None for row in own):
                    cells = [verdict(row, 0.0, NEGLIGIBLE_IN_PAIRS) if row is not None else "-" for row in own]
                    rows.append([f"`{model}`", str(steps), rate_text(rate), *cells, seed_counts(*own)])
    heads = [f"{c}: {when}" for c in (dose.TOTAL, dose.OPTIMISED) for when in ("along the run", "at the end")]
    return markdown_table(["model", "dose", "rate", *heads, "seeds"], rows) if rows else NOTHING


def prediction_counts(found: Found) -> str:
    """In how many settings each prediction holds."""
    rows = [
        [row["prediction"], _SHORT[str(row["prediction"])], str(row["settings"])]
        + [str(row[verdict]) for verdict in (YES, NO, UNDECIDED, NOT_RUN)]
        # An interval that contains zero is no matter of its value.
        + ["-" if row["prediction"] == "P9" else str(row["agrees"]), str(row["seeds"]) or "-"]
        for row in found["prediction_counts"].to_dict("records")
    ]
    return markdown_table(
        ["", "prediction", "settings", "holds", "fails", "undecided", "not run", "value agrees", "seeds"], rows
    )
