"""The checks of a GPU: every part ends with figures or a reason, whatever happens in it, and the page shows them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module

import gpu_checks as checks
import gpu_parts
import gpu_report as report
import gpu_update
import pytest
import torch
from gpu_model import QUICK_SHAPE, build, responses
from gpu_parts import TESTS
from gpu_recorder import Recorder

from internal_policy.bupo import training

fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")


def recorder(tmp_path, seconds=60.0):
    return Recorder(tmp_path / "part.json", "cpu", True, time.monotonic() + seconds)


def written(tmp_path):
    return json.loads((tmp_path / "part.json").read_text())


def test_a_step_that_fails_is_kept_as_its_reason_and_the_next_runs(tmp_path):
    record = recorder(tmp_path)
    assert record.step("broken", lambda: 1 / 0) is None
    assert record.step("whole", lambda: {"value": 2}) == {"value": 2}
    found = written(tmp_path)
    assert found["errors"] == {"broken": "ZeroDivisionError: division by zero"}
    assert found["figures"]["whole"]["value"] == 2


def test_a_size_without_memory_is_followed_by_a_smaller_one_and_another_error_is_not(tmp_path):
    record = recorder(tmp_path)
    tried = []

    def run(size):
        tried.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return {"size": size}

    assert record.largest("fits", [8, 4, 2, 1], run) == {"size": 2}
    assert tried == [8, 4, 2]
    found = written(tmp_path)
    assert list(found["errors"]) == ["fits, 8", "fits, 4"]
    assert record.largest("broken", [8, 4], lambda size: size / 0) is None
    assert list(written(tmp_path)["errors"])[2:] == ["broken, 8"]


def test_without_time_a_step_is_skipped_and_named(tmp_path):
    record = recorder(tmp_path, seconds=5.0)
    assert record.step("long", lambda: {"value": 1}, needs=30.0) is None
    assert record.step("short", lambda: {"value": 1}, needs=1.0)
    found = written(tmp_path)
    assert list(found["figures"]) == ["short"]
    assert "it takes about 30 s" in found["skipped"]["long"]


def test_repeats_end_with_the_time(tmp_path):
    record = recorder(tmp_path, seconds=0.05)
    assert len(record.seconds(lambda: time.sleep(0.06), repeats=50)) == 1


def test_the_peak_of_a_gpu_is_given_in_all_and_as_what_was_added(tmp_path, monkeypatch):
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**30)
    record = Recorder(tmp_path / "part.json", "cuda", True, time.monotonic() + 9)
    figures = {}
    with record.peak(figures):
        pass
    assert figures == {"peak_gib": 7.0, "added_gib": 2.0}


@pytest.mark.parametrize(
    ("left", "shares", "seconds"),
    [
        *((200, [0.25, 0.25, 0.5], 50), (400, [0.25, 0.25, 0.5], 100), (200, [0.25, 0.5], 200 / 3), (30, [0.1], 30)),
        *((30, [0.1, 0.9], checks.LEAST), (11, [0.1], None), (-3, [0.1], None)),
    ],
)
def test_a_part_gets_its_share_of_what_is_left_or_is_not_begun(left, shares, seconds):
    assert checks.allotted(left, shares) == pytest.approx(seconds)


def test_the_shares_of_the_default_budget_are_longer_than_what_was_measured():
    assert sum(part.share for part in checks.PARTS) == pytest.approx(1.0)
    assert checks.BUDGET <= 560
    share = {part.name: part.share for part in checks.PARTS}
    whole = [
        (name, part["seconds"])
        for results in report.read_results().values()
        for name, part in results["parts"].items()
        if part["figures"] and not part["errors"] and not part["skipped"]
    ]
    assert {"kernel-bfloat16", "tests", "analysis-bfloat16", "update"} <= {name for name, _ in whole}
    # Another card, or one that has other work, may take half as long again.
    assert [name for name, seconds in whole if share[name] * checks.BUDGET < 1.5 * seconds] == []


def test_a_size_that_would_take_longer_than_is_left_is_not_begun(tmp_path, monkeypatch):
    found = {"rows": 1, "seconds_per_token": 0.05}
    monkeypatch.setattr(gpu_parts, "one_product", lambda *_: found)
    monkeypatch.setattr(gpu_parts, "against_float64", lambda _: {})
    monkeypatch.setattr(gpu_parts, "throughput", lambda *_: pytest.fail("begun"))
    gpu_parts.analysis(recorder(tmp_path), "float32")
    # 4 products in each of 4 layers and 2 more, of 2 x 12 tokens: 4.5 x 18 x 24 x 0.05 s and 3 s.
    (reason,) = written(tmp_path)["skipped"].values()
    assert "it takes about 100 s" in reason


@pytest.mark.slow
def test_steps_of_training_are_kept_before_the_model_is_saved_and_no_checkpoint_is(tmp_path, monkeypatch):
    seen = []

    def save(trainer, tokenizer, directory):
        seen.extend(directory.rglob("checkpoint-*"))
        raise OSError("no space left on device")

    monkeypatch.setattr(training, "_save_model", save)
    gpu_update.train(recorder(tmp_path))
    found = written(tmp_path)
    assert found["figures"]["bupo.train"]["phases"] == ["ipa", "grpo"]
    assert min(found["figures"]["bupo.train"]["update_seconds"]) > 0
    assert len(found["figures"]["bupo.train"]["update_seconds"]) == 2
    assert seen == []
    assert any("no space left" in reason for reason in found["errors"].values())


def well(record):
    record.step("first", lambda: {"value": 1}, needs=0.0)


def crashing(record):
    well(record)
    os.kill(os.getpid(), signal.SIGKILL)


def hanging(record):
    well(record)
    time.sleep(60)


def failing(record):
    well(record)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@fork
@pytest.mark.slow
def test_a_part_that_crashes_or_hangs_ends_alone_with_its_figures(tmp_path, monkeypatch, capsys):
    # The second gets a twelfth of 8 s.
    shares = {crashing: 1.0, hanging: 0.2, failing: 1.0, well: 1.0}
    parts = [checks.Part(f.__name__, f"{__name__}:{f.__name__}", share) for f, share in shares.items()]
    monkeypatch.setattr(checks, "PARTS", parts)
    options = checks.parse(["--device", "cpu", "--quick", "--start", "fork", "--budget", "8"])
    options.parts = [part.name for part in parts]
    results = {"started": time.monotonic(), "parts": {}}
    checks.run_all(options, results, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert [list(part["figures"]) for part in found.values()] == [["first"]] * 4
    assert found["crashing"]["errors"] == {"process": "the process ended with -9"}
    assert found["hanging"]["errors"] == {"process": "ended after 1 s"}
    assert "illegal memory access" in found["failing"]["errors"]["part"]
    assert found["well"]["errors"] == found["well"]["skipped"] == {}
    assert "hanging: " in capsys.readouterr().out


@fork
def test_when_the_budget_is_spent_the_remaining_parts_are_skipped_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "PARTS", [checks.Part("late", f"{__name__}:well", 5)])
    options = checks.parse(["--device", "cpu", "--quick", "--start", "fork", "--budget", "20"])
    options.parts = ["late"]
    results = {"started": time.monotonic() - 30, "parts": {}}
    checks.run_all(options, results, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["parts"]["late"]
    assert found["figures"] == {}
    assert found["skipped"]["part"] == "0 s of 20 s were left"


def test_sizes_of_a_gpu_are_refused_on_a_cpu(capsys):
    with pytest.raises(SystemExit):
        checks.parse(["--device", "cpu"])
    assert "--quick" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="no GPU here"):
        checks.machine("cuda")


@pytest.mark.parametrize("layer", [1, None])
def test_an_update_reaches_the_layers_up_to_its_own(tmp_path, layer):
    record, model = recorder(tmp_path), build("bfloat16", "cpu", True)
    plain = gpu_update._of_layer(record, model, layer)((2, False))
    recomputed = gpu_update._of_layer(record, model, layer)((2, True))
    assert plain["highest_layer_reached"] == (layer or QUICK_SHAPE["num_hidden_layers"])
    assert plain["gradient_norm_of_embedding"] > 0
    # Computed again, an activation is the same; the learning rate is too small for bfloat16 weights to move far.
    assert recomputed["gradient_norm_of_embedding"] == pytest.approx(plain["gradient_norm_of_embedding"], rel=0.02)
    assert recomputed["trained_parameters"] == plain["trained_parameters"]
    assert (plain["checkpointing"], recomputed["checkpointing"]) == (False, True)


def test_random_responses_are_the_same_each_time():
    first, second = (responses(2, 24, 509) for _ in range(2))
    assert [r.input_ids for r in first] == [r.input_ids for r in second]
    assert {len(r.input_ids) for r in first} == {24}


RESULTS = {
    "date": "2026-11-27T12:00:00+00:00",
    "card": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "python": "3.12.3",
    "versions": {"torch": "2.11.0"},
    "processors": 16,
    "load": 12.0,
    "seconds": 201.4,
    "parts": {
        "kernel-bfloat16": {
            "figures": {
                "4096 tokens": {
                    "tokens": 4096,
                    "errors_nats": {"kernel": 1e-6, "two lengths": 2e-6},
                    "rates_tflops": {"product": 600.0, "kernel": 480.0, "two lengths": 400.0, "blocks": 40.0},
                    "memory_mib": {"kernel": 4.0, "two lengths": 8.0, "blocks": 128.0},
                }
            },
            "errors": {},
            "skipped": {},
        },
        "tests": {
            "figures": {
                "tests": {
                    "passed": 9,
                    "failed": 1,
                    "errors": 0,
                    "skipped": 2,
                    "failures": {"tests/a.py::test_b": "def test_b\nE   assert 1 == 2\n\ntests/a.py:3: AssertionError"},
                }
            },
            "errors": {},
            "skipped": {},
        },
        "train": {"figures": {}, "errors": {}, "skipped": {"bupo.train": "trl is not installed here"}},
    },
}


def test_the_tables_show_ratios_failures_and_what_is_missing():
    text = report.markdown({"gpu-nvidia-h100": RESULTS})
    assert "### NVIDIA H100 80GB HBM3" in text
    assert "2026-11-27, driver 580.1, Python 3.12.3, torch 2.11.0; 201 s in all; load 12.0 on 16 processors." in text
    # At 5/6 of the rate the same product takes 6/5 of the time.
    assert "| bfloat16 | 4096 | 600 | 480 | 0.80 | 1.20 | 40 | 4 | 8 | 128 | 1.0e-06 | 2.0e-06 |" in text
    assert "| tests that need CUDA | 9 passed, 1 failed, 2 skipped |" in text
    assert "tests/a.py::test_b: E   assert 1 == 2" in text
    assert "| train | not measured: bupo.train: trl is not installed here |" in text


def test_the_page_shows_the_stored_figures_or_says_that_there_are_none():
    shown = report.PAGE.read_text("utf-8").split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == report.markdown(report.read_results()).strip()
    assert report.markdown({}) == report.NOTHING


@pytest.mark.slow
def test_every_part_runs_at_tiny_sizes_on_a_cpu(tmp_path):
    place = tmp_path / "found.json"
    command = [sys.executable, checks.__file__, "--device", "cpu", "--quick", "--output", str(place)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(place.read_text())
    parts = found["parts"]
    assert list(parts) == [part.name for part in checks.PARTS]
    assert {name: part["errors"] for name, part in parts.items() if part["errors"]} == {}
    for dtype in ("bfloat16", "float32"):
        kernels = parts[f"kernel-{dtype}"]["figures"]
        assert 0 < kernels["two lengths against float64"]["error_nats"] < 1e-4
        analysis = parts[f"analysis-{dtype}"]["figures"]
        assert 0 < analysis["entropies against float64"]["error_nats"] < 1e-5
        assert analysis["throughput"]["tokens_per_second"] > 0
    assert {"layer 1", "layer 2", "layer 4", "pi_theta"} < parts["update"]["figures"].keys()
    tests = parts["tests"]["figures"]["tests"]
    assert tests["collected"] == tests["skipped"] > 8
    assert parts["train"]["figures"]["bupo.train"]["phases"] == ["ipa", "grpo"]
    assert "An update of an internal policy" in done.stdout


def test_parts_are_found_where_they_are_said_to_be():
    names = [part.function.partition(":") for part in checks.PARTS]
    assert all(callable(getattr(import_module(module), function)) for module, _, function in names)
    assert all((report.ROOT / file).is_file() for file in TESTS)
