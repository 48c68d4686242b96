"""Where in its training a checkpoint is, as its trainer's state tells it.

TRL numbers checkpoints by optimiser updates, and a step is a batch of rollouts with all updates on it. Trainings by
`bupo` write into each checkpoint how many updates a step has; checkpoints of others do not tell.
"""

from __future__ import annotations

import json
from pathlib import Path

from internal_policy.utils.io import expanded

STATE = "trainer_state.json"
RECORD = "StepCallback"
"""Below ``stateful_callbacks`` in the trainer's state: the name of the callback that writes it."""


def training_record(model: str | Path) -> dict[str, int] | None:
    """Read how far the training of a checkpoint was.

    Args:
        model: a checkpoint's directory; anything else has no record.

    Returns:
        ``updates`` so far and ``updates_per_step``; None where the checkpoint does not tell both.
    """
    try:
        state = json.loads((expanded(model) / STATE).read_text(encoding="utf-8"))
        per_step = state["stateful_callbacks"][RECORD]["args"]["updates_per_step"]
        return {"updates": int(state["global_step"]), "updates_per_step": int(per_step)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
