"""The delay of a run that begins with alignment: recovered from known data, and equal to the documented values."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from documents import ROOT
from numpy.polynomial import Polynomial

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import alignment_delay


def test_a_known_delay_is_recovered_under_shared_noise():
    expected = Polynomial([0.4, 0.03, -0.0005])
    steps, batches = np.arange(1, 31), np.random.default_rng(0).normal(0, 0.1, 30)
    plain = expected(steps) + batches
    for shift in (0, 3, 7):
        aligned = expected(np.maximum(steps - shift, 1)) + batches
        # What happens during alignment is left out.
        aligned[:3] = 0
        assert alignment_delay.delay(aligned, plain, expected, ipa_steps=3) == shift
        assert alignment_delay.delay(plain, plain, expected, ipa_steps=3) == 0


@pytest.fixture(scope="module")
def stored():
    return [pd.read_csv(alignment_delay.DATA / f"{name}.csv") for name in ("runs", "histories")]


def test_documented_delays_match_the_stored_runs(stored):
    found = alignment_delay.delays(*stored)
    rows = re.findall(r"^\| (\d+), (\d) seeds \| (.*) \| (.*) \|$", (ROOT / "docs/results.md").read_text("utf-8"), re.M)
    written = {
        (model, int(steps)): (int(seeds), interval)
        for steps, seeds, *both in rows
        for model, interval in zip(("testbed/qwen3", "testbed/llama"), both, strict=True)
    }
    assert len(written) == len(found) == 8
    for row in found.itertuples():
        interval = f"{row.delay:.1f} ({row.low:.1f} to {row.high:.1f})"
        assert written[row.model, row.ipa_steps] == (row.seeds, interval)
    qwen3, llama = (written[model, 3][1] for model in ("testbed/qwen3", "testbed/llama"))
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"by {qwen3.replace('(', 'steps (95%: ')} on `testbed/qwen3` and {llama} on `testbed/llama`" in readme


def test_delays_do_not_depend_on_the_smoothing(stored, monkeypatch):
    usual = alignment_delay.delays(*stored)
    monkeypatch.setattr(alignment_delay, "DEGREE", 3)
    assert (alignment_delay.delays(*stored)["delay"] - usual["delay"]).abs().max() <= 0.5
