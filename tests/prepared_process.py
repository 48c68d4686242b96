"""Waits with everything imported, and forks a process for each command line that it is told: imports are paid once.

Standard input has a JSON object a line, {"arguments", "cwd", "stdout", "stderr"}; for each, standard output gives the
process id, and then its exit code.
"""

from __future__ import annotations

import gc
import json
import os
import sys

import pandas  # noqa: F401  (like the others: imported here so that no command has to)
import pyarrow  # noqa: F401
import torch  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import internal_policy.analysis.pipeline  # noqa: F401
from internal_policy.cli.main import main


def become(job: dict) -> None:
    os.setsid()
    os.chdir(job["cwd"])
    for name, number in (("stdout", 1), ("stderr", 2)):
        opened = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.argv = ["internal-policy", *job["arguments"]]
    main()


def serve() -> None:
    gc.freeze()
    # Beside standard output, which a child has as its own.
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        if not (child := os.fork()):
            answers.detach()
            become(json.loads(line))
            return
        print(child, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    serve()
