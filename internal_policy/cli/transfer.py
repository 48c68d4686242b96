"""The command `internal-policy transfer`: at which layers alignment moves the parameters as GRPO does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.bupo.transfer_config import TransferConfig
from internal_policy.cli.command import ResumeOptions, require_paths, to_json
from internal_policy.utils.imports import require_package
from internal_policy.utils.locks import writing
from internal_policy.utils.logging import importing
from internal_policy.utils.output import print_json
from internal_policy.utils.shell import figure_name

if TYPE_CHECKING:
    from internal_policy.bupo.transfer_results import Transfer

DATA = Path("data/transfers")


@dataclass(frozen=True, kw_only=True)
class TransferCommand(TransferConfig, ResumeOptions):
    """Measure at which layers internal policy alignment moves the parameters as GRPO does, without a training."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        require_package("trl", "transfer", "train")
        require_paths([self.model], self.revision, self.prompts)
        root, figures = self.place(DATA)
        with importing():
            from internal_policy.bupo.gradient_transfer import transfer
            from internal_policy.cli.display import files_of, list_files
            from internal_policy.cli.display_transfer import show_transfer

        options = {each.name: getattr(self, each.name) for each in fields(TransferConfig)}
        result = transfer(**options, output=root, overwrite=self.overwrite, wait=self.wait)
        show_transfer(result)
        if result.path is not None:
            list_files("transfer", files_of(result.path))
        draw([result], figures)
        print_json({"command": "transfer", "transfer": {**to_json(result), "layers": result.table}})


def draw(results: Sequence[Transfer], root: Path) -> None:
    """Draw the figure into a directory below `root` named by the models, and list the files."""
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import transfer as figure

    directory = root / figure_name([((each.path or root).resolve().name, "policy") for each in results])
    with writing(directory):
        paths = figure.save_transfer_figures(results, directory)
    list_files("figures", paths)
