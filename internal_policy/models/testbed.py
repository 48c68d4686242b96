"""The embedded models: two small language models that ship with the package.

Importing this module loads neither torch nor transformers, so that a command can name its default quickly.
"""

from __future__ import annotations

from pathlib import Path

from internal_policy.utils.errors import UserError

NAMES = ("testbed/qwen3", "testbed/llama")


def path(name: str) -> Path:
    """Find the directory of a testbed model: inside the installed package, else in ``data/testbed`` of the repository.

    Raises:
        UserError: there is no such model, or it was not trained yet.
    """
    if name not in NAMES:
        raise UserError(f"no testbed model is called {name!r}; there are {' and '.join(NAMES)}: use one of these")
    short = name.removeprefix("testbed/")
    package = Path(__file__).resolve().parents[1]
    places = (package / "models" / "weights" / short, package.parent / "data" / "testbed" / short)
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"{name} is not on this disk: {' and '.join(map(str, places))} hold no config.json; "
        "train it with `make testbed`"
    )
