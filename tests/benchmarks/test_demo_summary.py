"""The end of `make demo`: a table and a summary, the pages to open next, and a card with the evaluation."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from synthetic_run import make

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bupo_experiment
import demo_summary

QWEN = "testbed/qwen3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    bupo = make(root / "bupo", name=QWEN)
    grpo = replace(make(root / "grpo", name=QWEN), method="grpo", layer=None, ipa_steps=0)
    # The synthetic runs end with equal results; here GRPO is the one that has not changed.
    return [replace(grpo, evaluation_paths={**grpo.evaluation_paths, "trained": "evaluations/start"}), bupo]


@pytest.mark.parametrize("seeds", [1, 2])
def test_summary_table_has_integer_layers_plain_headings_and_no_empty_column(seeds):
    jobs = [bupo_experiment.Job("main", QWEN), bupo_experiment.Job("main", QWEN, "bupo", 7, 1)]
    rows = [
        {**vars(job), "seed": seed, "lift": 0.2 - 0.03 * (job.method == "bupo") + 0.01 * seed, "entropy_end": 0.08}
        for job in jobs
        for seed in range(seeds)
    ]
    summary = bupo_experiment.summary(pd.DataFrame(rows).assign(seconds=15.7))
    printed = demo_summary.shown(summary)
    assert not [bad for bad in ("NaN", "nan", " 7.0", "over_grpo", "None") if bad in printed]
    assert "BuPO, layer 7, 1 step" in printed
    assert f"{-3.0:+.1f}" in printed
    assert ("95% over seeds" in printed) == (seeds > 1)


def test_the_closing_summary_compares_methods_with_caveats_and_lists_pages(runs, tmp_path, monkeypatch):
    place = tmp_path / "testbed--qwen3"
    place.mkdir()
    (place / demo_summary.MANIFEST).write_text("{}")
    analysis = SimpleNamespace(name=QWEN, boundary_layer=7, n_layers=8, path=place)
    monkeypatch.setattr(demo_summary.Analysis, "load", lambda path: analysis)
    closing = demo_summary.end([QWEN, "testbed/llama"], runs, tmp_path)
    words = " ".join(closing.split())
    assert "is layer 7 of 8 in testbed/qwen3." in words
    assert "BuPO is ahead by 4.7 points" in words
    assert "proves nothing" in words
    assert "docs/results.md" in words
    assert f"{place}/report.html" in closing
    assert f"{runs[1].path}/report.html" in closing
    assert all((run.path / "report.html").is_file() for run in runs)
    swapped = [replace(runs[0], method="bupo", layer=7), replace(runs[1], method="grpo")]
    assert "GRPO is ahead by 4.7 points" in demo_summary.paragraph([], swapped)
    level = [runs[1], replace(runs[1], method="grpo")]
    assert "the two are level" in demo_summary.paragraph([], level)
