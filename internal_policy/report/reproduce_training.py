"""How to make a training run again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from internal_policy.bupo.config import TrainConfig
from internal_policy.report.page import clean
from internal_policy.report.reproduce import Commands, call
from internal_policy.utils.options import options_of, words_of

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run

FLAGS = frozenset(options_of(TrainConfig))
"""Options of ``internal-policy train``; what else was set is given with --set."""


def training_commands(run: Run) -> Commands:
    """Say which command made a run, from what was written down of its call, or else from its settings.

    Args:
        run: the run.

    Returns:
        The command and the call.
    """
    notes = [
        "Where this run is finished in the output directory, it is read and nothing is trained; where it is not, it "
        "goes on. To train it again, choose another output, or add --overwrite (overwrite=True in Python), which "
        "replaces it."
    ]
    words, objects = run.call["options"], run.call["objects"]
    notes.append("A GPU, or another number of processes, adds up in another order: the same to rounding, not to bits.")
    names = ", ".join(f"{name}={name}" for name in objects)
    python = "from internal_policy import bupo\n\n"
    if objects:
        python += f"# given as objects then: {', '.join(objects)}\n"
        notes.append(f"Given as objects from Python: {', '.join(objects)}. A command cannot give them.")
    python += call("bupo.train", [], words, names)
    shell = None if objects else shlex.join(["internal-policy", "train", *_words(words)])
    return Commands(shell and clean(shell), clean(python), tuple(notes))


def _words(told: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in told.items():
        if name in FLAGS:
            found += words_of(name, value)
        else:
            found += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return found
