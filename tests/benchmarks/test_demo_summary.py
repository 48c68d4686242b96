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

import demo_summary
import demo_training

QWEN = "testbed/qwen3"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    bupo = make(root / "bupo", name=QWEN)
    grpo = replace(make(root / "grpo", name=QWEN), method="grpo", layer=None, ipa_steps=0)
    # The synthetic runs end with equal results; here GRPO is the one that has not changed.
    return [replace(grpo, evaluation_paths={**grpo.evaluation_paths, "trained": "evaluations/start"}), bupo]


def test_the_table_has_integer_layers_plain_headings_and_the_difference_from_grpo():
    rows = [
        {**vars(job), "model": QWEN, "lift": 0.2 - 0.03 * (job.method == "bupo"), "entropy_end": 0.08, "seconds": 15.7}
        for job in demo_training.JOBS
    ]
    grpo, bupo = demo_summary.shown(pd.DataFrame(rows)).splitlines()[1:]
    assert not [bad for bad in ("NaN", "nan", " 7.0", "None") if bad in grpo + bupo]
    assert grpo.split() == [QWEN, "GRPO", "+20.0", "0.080", "16"]
    assert bupo.split(maxsplit=1)[1].split("  ")[0].strip() == "BuPO, layer 7, 1 step"
    assert bupo.split()[-4:] == ["+17.0", "-3.0", "0.080", "16"]


def test_runs_have_the_names_of_their_setting():
    assert [job.name for job in demo_training.JOBS] == ["qwen3-grpo-seed0", "qwen3-bupo-l7-s1-seed0"]


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
