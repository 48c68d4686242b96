"""The command `internal-policy push`: a trained model with its card, on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from internal_policy.cli.common import Debug, Json, Quiet
from internal_policy.utils.output import document


def push(
    run: Annotated[Path, typer.Argument(help="Directory of a finished training run.")],
    repo: Annotated[str, typer.Option("--repo", help="Repository on the hub: NAME or OWNER/NAME.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private, if it is made; it is public else.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; made if it is not there.", show_default="main")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Upload a trained model with a filled model card to the hub (the token in HF_TOKEN, or of `hf auth login`).

    Look at the card, RUN/model/README.md, before you publish: the repository is made public unless --private is given.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from internal_policy.bupo.hub import push_to_hub
    from internal_policy.bupo.run import Run
    from internal_policy.utils.console import say

    found = Run.load(run)
    # Its own progress is shown, and the libraries' bars would stand between it and the result.
    disable_progress_bars()
    url = push_to_hub(found, repo, private=private, revision=revision)
    say(f"pushed: {url}")
    document({"command": "push", "url": url, "model_dir": found.model_dir})
