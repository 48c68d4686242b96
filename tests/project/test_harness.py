"""Out-of-domain evaluation: the harness has the documented tasks and agrees with `evaluate`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import DOCS, ROOT

from internal_policy.evaluation import evaluate
from internal_policy.models import testbed

PAGE = (DOCS / "how-to" / "out-of-domain.md").read_text(encoding="utf-8")
LOCAL = ROOT / "tests" / "harness"
TASK = "chained_arithmetic"
FOUND = importlib.util.find_spec("lm_eval")
needs_harness = pytest.mark.skipif(FOUND is None, reason="needs lm-eval: pip install 'lm-eval>=0.4.13,<0.5'")


def test_the_documented_task_is_the_one_that_is_run():
    assert f"```yaml\n{(LOCAL / f'{TASK}.yaml').read_text(encoding='utf-8')}```\n" in PAGE


@needs_harness
def test_the_harness_has_every_task_of_the_page():
    named = set(re.search(r"--tasks (\S+,\S+)", PAGE)[1].split(","))
    named |= set(re.findall(r"`((?:mmlu|gpqa|arc|bbh|humaneval|minerva_math)\w*)`", PAGE))
    assert len(named) >= 9
    # Read as text: importing the harness takes longer than all else here.
    written = "\n".join(p.read_text(encoding="utf-8") for p in (Path(FOUND.origin).parent / "tasks").rglob("*.yaml"))
    assert named <= set(re.findall(r"^(?:task|group): (\w+)$", written, re.M))
    assert "olympiadbench" not in written.lower()


@needs_harness
@pytest.mark.slow
def test_the_harness_agrees_with_evaluate(tmp_path):
    for file in LOCAL.iterdir():
        shutil.copy(file, tmp_path)
    model = testbed.path("testbed/qwen3")
    shown = re.search(rf"lm_eval (run [^`]*--tasks {TASK}[^`]*?)\n```", PAGE)[1].replace("\\\n", " ")
    words = shown.replace("data/runs/my-run/model", str(model)).replace("data/harness/my-run", "out").split()
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, **offline, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text(encoding="utf-8"))["results"][TASK]
    ours = evaluate(
        "testbed/qwen3",
        str(tmp_path / "problems.jsonl"),
        temperature=0,
        reward="exact",
        max_new_tokens=44,
        batch_size=1,
    )
    assert found["sample_len"] == 16
    assert found["exact_match,boxed"] == ours.avg["mean"]
    assert 0.2 < ours.avg["mean"] < 0.9
