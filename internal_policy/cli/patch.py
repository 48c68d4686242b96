"""The command `internal-policy patch`: which states carry what differs between two prompts."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.cli.command import OutputOptions, require_packages, require_paths
from internal_policy.interventions.config import PatchConfig
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing
from internal_policy.utils.output import print_json

if TYPE_CHECKING:
    from internal_policy.interventions.patching_results import Patching

DATA = Path("data/patchings")


@dataclass(frozen=True, kw_only=True)
class PatchCommand(PatchConfig, OutputOptions):
    """Put each state of the run on a clean prompt into the run on a corrupted one, and show what it recovers.

    The recovery of a layer and token is (patched - corrupted) / (clean - corrupted), of the logit of the clean answer
    less that of the corrupted one.
    """

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        require_packages(self.backend, self.quantization)
        require_paths([self.model], self.revision)
        with importing():
            from internal_policy.cli.display_interventions import show_patching
            from internal_policy.interventions.patching import patch
            from internal_policy.interventions.patching_results import PATCHING
            from internal_policy.utils.workspace import Workspace

        root, figures = self.place(DATA)
        Workspace(root / self.slug, PATCHING).check()
        patching = patch(**{each.name: getattr(self, each.name) for each in fields(PatchConfig)})
        # No other command may choose the same free name.
        with locked(root, wait=True):
            name = PATCHING.free_name(root, self.slug, {"model": patching.model, "config": patching.config})
            directory = root / name
            with writing(directory):
                patching = replace(patching, path=patching.save(directory))
        show_patching(patching)
        draw_patching(patching, figures / name)
        values = patching.values
        print_json({"command": "patch", "patching": {**patching.manifest(), "path": directory}, "values": values})


def draw_patching(patching: Patching, directory: Path) -> None:
    """Draw the maps of a result of patching, and list the files."""
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import interventions as figure

    with writing(directory):
        paths = figure.save_patching_figures(patching, directory)
    list_files("figures", paths)
