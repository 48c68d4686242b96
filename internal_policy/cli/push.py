"""The command `internal-policy push`: a trained model with its card, on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from internal_policy.cli.command import ConsoleOptions
from internal_policy.utils.options import option
from internal_policy.utils.output import print_json


@dataclass(frozen=True, kw_only=True)
class PushCommand(ConsoleOptions):
    """Upload a trained model with a filled model card to the hub (the token in HF_TOKEN, or of `hf auth login`).

    Look at the card, RUN/model/README.md, before you publish: the repository is made public unless --private is given.
    """

    directory: Path = option(positional=True)
    """Directory of a finished training run."""
    repo: str
    """Repository on the hub: NAME or OWNER/NAME."""
    private: bool = False
    """Make a new repository private; otherwise it is public."""
    revision: str | None = None
    """Branch to upload to, made if it does not exist. Default: main."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        from huggingface_hub.utils.tqdm import disable_progress_bars

        from internal_policy.bupo.hub import push_to_hub
        from internal_policy.bupo.run import Run
        from internal_policy.utils.console import say

        found = Run.load(self.directory)
        # The command shows its own progress, which the libraries' bars would interrupt.
        disable_progress_bars()
        url = push_to_hub(found, self.repo, private=self.private, revision=self.revision)
        say(f"pushed: {url}")
        print_json({"command": "push", "url": url, "model_dir": found.model_dir})
