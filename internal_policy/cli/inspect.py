"""The command `internal-policy inspect`: what every internal policy predicts at every token of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.cli.command import OutputOptions, require_packages, require_paths
from internal_policy.inspection.config import InspectConfig, Site, check_choice
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing
from internal_policy.utils.output import print_json

if TYPE_CHECKING:
    from internal_policy.inspection.results import Inspection

DATA = Path("data/inspections")


@dataclass(frozen=True, kw_only=True)
class InspectCommand(InspectConfig, OutputOptions):
    """Look into one prompt: entropy and top token of every internal policy at every token, as a heat map."""

    tokens: str | None = None
    """Show the tokens FIRST:LAST, from 1; 5: from the 5th on, : all."""
    last: int | None = None
    """Show this number of tokens at the end. Default: 24."""
    site: Site = "layer"
    """The policies that the terminal shows; all are drawn."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        check_choice(self.tokens, self.last)
        require_packages(self.backend, self.quantization)
        require_paths([self.model], self.revision)
        with importing():
            from internal_policy.cli.display import list_files
            from internal_policy.cli.display_runs import show_inspection
            from internal_policy.inspection import results
            from internal_policy.inspection.figure_data import inspection_data
            from internal_policy.inspection.inspect import inspect
            from internal_policy.utils.workspace import Workspace

        root, figures = self.place(DATA)
        Workspace(root / self.slug, results.INSPECTION).check()
        look = inspect(**{each.name: getattr(self, each.name) for each in fields(InspectConfig)})
        # Nothing is written if the requested tokens do not exist.
        look.positions(self.tokens, self.last)
        # No other inspection may choose the same free name.
        with locked(root, wait=True):
            name = look.place(root, self.slug)
            directory = root / name
            with writing(directory):
                look.save(directory)
        # It is shown after it is saved, because quitting a pager ends the command.
        show_inspection(look, self.site, tokens=self.tokens, last=self.last)
        list_files("inspection", [directory / file for file in (*results.INSPECTION.files, results.MANIFEST)])
        draw(look, figures / name, tokens=self.tokens, last=self.last)
        shown = inspection_data(look, [self.site], tokens=self.tokens, last=self.last)
        inspection = {**look.manifest(), "path": directory}
        print_json({"command": "inspect", "inspection": inspection, "site": self.site, "values": shown})


def draw(look: Inspection, directory: Path, *, tokens: str | None = None, last: int | None = None) -> None:
    """Draw the heat maps, and list the files.

    `tokens` selects tokens, from 1; `last` a number of them at the end, 24 if neither is given.
    """
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import inspection as figure

    with writing(directory):
        paths = figure.save_inspection_figures(look, directory, tokens=tokens, last=last)
    list_files("figures", paths)
