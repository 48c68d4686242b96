"""The benchmark of the fused kernel: what it says of its measurements, and that it runs in triton's interpreter."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import benchmark_kernel as benchmark
import pytest
import torch


def test_the_factors_reach_both_ends():
    factors = benchmark.other_lengths(torch.empty(5, 3))
    assert factors[[0, -1]].tolist() == pytest.approx(benchmark.LENGTHS)
    ratios = factors[1:] / factors[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(4))


def test_the_cost_of_a_second_length_is_a_ratio_of_times():
    errors = {"kernel": 1e-6, "two lengths": 2e-6}
    rate = {"product": 600.0, "kernel": 480.0, "two lengths": 400.0, "blocks": 100.0}
    memory = {"kernel": 4.0, "two lengths": 8.0, "blocks": 128.0}
    written = benchmark.line(4096, errors, rate, memory)
    # At 5/6 of the rate the same product takes 6/5 of the time.
    assert "two lengths 400 (1.20 of the time for one, 8.0 MiB)" in written
    assert "kernel 480 (0.80 of it, 4.0 MiB)" in written
    assert written.endswith("largest error 1.0e-06 nats, at two lengths 2.0e-06")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is for Linux only")
def test_both_kernels_agree_with_the_definition_in_the_interpreter():
    # The interpreter is chosen for a whole process.
    command = [sys.executable, str(Path(benchmark.__file__)), "--interpret"]
    written = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    one, two = map(float, re.search(r"largest error (\S+) nats, at two lengths (\S+) \(interpreted", written).groups())
    assert 0 < one < 1e-5
    assert 0 < two < 1e-4
