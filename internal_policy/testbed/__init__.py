"""The embedded default: two small language models and the arithmetic that they solve.

Importing this package loads neither torch nor transformers, so that a command can name its default cheaply.
"""

from __future__ import annotations

from pathlib import Path

from internal_policy.errors import UserError

NAMES = ("testbed/qwen3", "testbed/llama")


def path(name: str) -> Path:
    """Find the directory of a testbed model.

    Args:
        name: One of `NAMES`.

    Returns:
        A directory that ``from_pretrained`` of transformers loads: the one inside the installed package, else the
        one in ``data/testbed`` of the repository.
    """
    if name not in NAMES:
        raise UserError(f"no testbed model is called {name!r}; there are {' and '.join(NAMES)}: use one of these")
    short = name.removeprefix("testbed/")
    here = Path(__file__).resolve().parent
    places = (here / "weights" / short, here.parents[1] / "data" / "testbed" / short)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{name} is not on this disk: {' and '.join(map(str, places))} hold no config.json; "
        "train it with `python -m internal_policy.testbed.make`"
    )
