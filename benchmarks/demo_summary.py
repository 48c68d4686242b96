"""The closing output of `make demo`: a summary, the pages to open, and the table of the trainings as text."""

from __future__ import annotations

import textwrap
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from internal_policy import Analysis
from internal_policy.analysis.results import MANIFEST, REPORT
from internal_policy.bupo import Run
from internal_policy.report import write_report

ANALYSES = Path("data/analyses")
"""Where `internal-policy analyze` leaves its results."""
WIDTH = 100


def shown(runs: pd.DataFrame) -> str:
    """Write the table of the trainings for reading.

    Args:
        runs: a row per run: model, method, layer, ipa_steps, lift, entropy_end and seconds; one of them is GRPO's.

    Returns:
        Lines of text.
    """
    plain = runs.loc[runs["method"] == "grpo", "lift"].iloc[0]
    against = [("" if row.method == "grpo" else f"{100 * (row.lift - plain):+.1f}") for row in runs.itertuples()]
    table = pd.DataFrame(
        {
            "model": runs["model"],
            "method": [_method(row) for row in runs.to_dict("records")],
            "gain, points": runs["lift"].map(lambda value: f"{100 * value:+.1f}"),
            "against GRPO, points": against,
            "entropy at the end, nats": runs["entropy_end"].map("{:.3f}".format),
            "training, s": runs["seconds"].map("{:.0f}".format),
        }
    )
    return table.to_string(index=False)


def _method(row: Mapping[Hashable, Any]) -> str:
    if row["method"] != "bupo":
        return str(row["method"]).upper()
    steps = f"{row['ipa_steps']} step{'s' if row['ipa_steps'] != 1 else ''}"
    return f"BuPO, layer {row['layer']:.0f}, {steps}"


def paragraph(analyses: Sequence[Analysis], runs: Sequence[Run]) -> str:
    """Summarise what the demo has shown and what it has not.

    Args:
        analyses: those that the demo made.
        runs: the training by GRPO and the one by BuPO, both evaluated on the same problems.

    Returns:
        One paragraph.
    """
    by_method = {run.method: run for run in runs}
    grpo, bupo = by_method["grpo"], by_method["bupo"]
    start = grpo.evaluation_start
    assert start is not None
    assert grpo.evaluation is not None
    assert bupo.evaluation is not None
    before, plain, aligned = (100 * found.avg["mean"] for found in (start, grpo.evaluation, bupo.evaluation))
    told = [_analysed(analyses)] if analyses else []
    told.append(
        f"{grpo.name} was then trained for {len(grpo.history)} steps in two ways: with GRPO, and with BuPO, which "
        f"first aligned layer {bupo.layer} ({bupo.ipa_steps} step{'s' if bupo.ipa_steps != 1 else ''}). On "
        f"{start.n_problems} held-out problems the start solves {before:.1f}%, GRPO {plain:.1f}% and BuPO "
        f"{aligned:.1f}%."
    )
    gap = round(aligned - plain, 1)
    ahead = "the two are level" if gap == 0 else f"{'BuPO' if gap > 0 else 'GRPO'} is ahead by {abs(gap):.1f} points"
    told.append(
        f"Here {ahead}, but a run this short with a single seed proves nothing about either method: "
        "docs/results.md has longer experiments, with intervals."
    )
    return " ".join(told)


def _analysed(analyses: Sequence[Analysis]) -> str:
    found = [
        f"{'none' if a.boundary_layer is None else f'layer {a.boundary_layer} of {a.n_layers}'} in {a.name}"
        for a in analyses
    ]
    return (
        f"{' and '.join(a.name for a in analyses)} answered arithmetic problems, and the entropy of every internal "
        "policy was measured at each token of the answers. The boundary layer, the last one whose FFN still explores, "
        f"is {' and '.join(found)}."
    )


def end(models: Sequence[str], runs: Sequence[Run], analyses: Path = ANALYSES) -> str:
    """Write the pages of the runs, and return a summary and the pages to open next.

    Args:
        models: that the demo analyses; those without an analysis are left out.
        runs: the training by GRPO and the one by BuPO.
        analyses: where the analyses are.

    Returns:
        A paragraph and the paths.
    """
    places = [analyses / model.replace("/", "--") for model in models]
    done = [Analysis.load(place) for place in places if (place / MANIFEST).is_file()]
    pages = {run.method: write_report(run) for run in runs}
    paths = [(a.path / REPORT, f"the analysis of {a.name}") for a in done if a.path is not None]
    paths.append((pages["bupo"], "the training with BuPO"))
    width = max(len(str(path)) for path, _ in paths)
    lines = [f"  {str(path).ljust(width)}  {what}" for path, what in paths]
    return "\n".join(["", textwrap.fill(paragraph(done, runs), WIDTH), "", "Open next:", *lines])
