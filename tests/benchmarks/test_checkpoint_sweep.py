"""From the trainer's checkpoints to the tables and figures of their comparison, by the script of the experiment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from internal_policy import Analysis, analyze

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "checkpoint_sweep.py"


def run(directory):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--short"], cwd=directory, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
def test_a_short_training_is_swept_compared_and_resumed(tmp_path):
    output = run(tmp_path)
    root = tmp_path / "build" / "sweep_short"
    data = root / "data"
    manifest = json.loads((data / "comparison.json").read_text(encoding="utf-8"))
    assert [a["step"] for a in manifest["analyses"]] == [0, 1, 2, 3, 4, 5]
    assert all(a["paired"] for a in manifest["analyses"])
    assert len({a["weights"] for a in manifest["analyses"]}) == 6, "every checkpoint is another model"

    layers = pd.read_csv(data / "layers.csv")
    differences = pd.read_csv(data / "differences.csv")
    assert (differences["paired"]).all()
    # Independently: the slope over the steps, fitted here from the table of layers.
    trends = pd.read_csv(data / "trends.csv").set_index(["layer", "site", "quantity"])
    for layer in range(1, 9):
        rows = layers[(layers["site"] == "layer") & (layers["layer"] == layer)]
        slope, _ = np.polyfit(rows["step"], rows["entropy_out"], 1)
        trend = trends.loc[(layer, "layer", "entropy_out")]
        # Sums of six values in float64.
        np.testing.assert_allclose(trend["slope"], slope, rtol=0, atol=1e-12)
        assert trend["n_checkpoints"] == 6
    assert (trends["slope"] != 0).any()

    # The run's final model is its last checkpoint again.
    start = Analysis.load(root / "runs" / "analyses" / "testbed--qwen3")
    last = analyze(str(root / "runs" / "qwen3-bupo" / "model"), responses=start.sequences, keep_tokens=0)
    ours = layers[layers["step"] == 5].sort_values(["layer", "site"])["entropy_out"].to_numpy()
    theirs = last.layers.sort_values(["layer", "site"])["entropy_out"].to_numpy()
    # Equal weights and tokens.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)

    pictures = sorted((root / "figures").iterdir())
    assert [p.name for p in pictures] == ["entropy_fall.png", "heat_maps.png", "layer_differences.png"]
    for picture in pictures:
        assert picture.stat().st_size < 300_000
        with Image.open(picture) as image:
            colours = image.convert("RGB").getcolors(image.width * image.height)
        assert len(colours) > 50, f"{picture.name} is nearly empty"

    before = {p.name: p.read_bytes() for p in data.iterdir()}
    modified = {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*.safetensors")}
    assert run(tmp_path) == output
    assert {p.name: p.read_bytes() for p in data.iterdir()} == before
    assert {p: p.stat().st_mtime_ns for p in (root / "runs").rglob("*.safetensors")} == modified
