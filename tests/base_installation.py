"""Commands in a subprocess without the packages of the extras."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from documents import ROOT

# Modules and distributions that the extras train, backends and quantized install, with their dependencies.
ABSENT = "trl,peft,math_verify,latex2sympy2_extended,transformer_lens,nnsight,bitsandbytes,kernels,vllm"
EACH = """
import shlex, sys
from internal_policy.cli.main import main
for line in sys.argv[1:]:
    sys.argv[1:] = shlex.split(line)
    print("#", line, file=sys.stderr)
    try:
        main()
    except (SystemExit, ImportError) as end:
        print(end, *{"torch", "transformers", "trl", "datasets"} & {*sys.modules}, file=sys.stderr)
"""
"""Runs each argument as a command, and prints its exit code and which of the heavy libraries it has imported."""


def run_base(code, *arguments, cwd, absent=ABSENT):
    path = os.pathsep.join([str(Path(__file__).parent / "absent"), str(ROOT)])
    environment = {**os.environ, "ABSENT": absent, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)
