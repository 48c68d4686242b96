"""The command `internal-policy figures`: figures drawn again from disk, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from internal_policy.cli.command import FIGURES, ConsoleOptions
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import expanded
from internal_policy.utils.options import option
from internal_policy.utils.output import print_json
from internal_policy.utils.shell import figure_name

if TYPE_CHECKING:
    from internal_policy.inspection.results import Inspection
    from internal_policy.interventions.patching_results import Patching
    from internal_policy.interventions.results import Ablation


_Result = TypeVar("_Result", "Inspection", "Ablation", "Patching")


@dataclass(frozen=True, kw_only=True)
class FiguresCommand(ConsoleOptions):
    """Redraw the figures of analyses, training runs and all other results from disk, without a model."""

    directories: tuple[Path, ...] = option(positional=True)
    """What analyze, train, evaluate, inspect, ablate, patch or transfer wrote, also mixed; a directory of several
    includes all of them."""
    output: Path = FIGURES
    """Directory for the figures."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        from internal_policy.analysis.sources import collect_analyses
        from internal_policy.bupo.run import Run
        from internal_policy.bupo.transfer_results import TRANSFER, Transfer
        from internal_policy.cli import ablate, analyze, evaluate, inspect, patch, train, transfer
        from internal_policy.cli.compare import redraw_command
        from internal_policy.cli.report import kind_of
        from internal_policy.evaluation.results import EVALUATION, Evaluation
        from internal_policy.inspection.results import INSPECTION, Inspection
        from internal_policy.interventions.patching_results import PATCHING, Patching
        from internal_policy.interventions.results import ABLATION, Ablation
        from internal_policy.utils.console import say

        kinds = [(kind_of(path), path) for path in map(expanded, self.directories)]
        # All are read before any is drawn, so that a bad one is refused at once.
        held = [(path, collect_analyses([path])) for kind, path in kinds if kind == "analysis"]
        analyses = [analysis for _, found in held for analysis in found]
        runs = [Run.load(path) for kind, path in kinds if kind == "run"]
        evaluations = [
            Evaluation.load(each) for kind, path in kinds if kind == "evaluation" for each in EVALUATION.below(path)
        ]
        looks = [
            Inspection.load(each) for kind, path in kinds if kind == "inspection" for each in INSPECTION.below(path)
        ]
        ablations = [Ablation.load(each) for kind, path in kinds if kind == "ablation" for each in ABLATION.below(path)]
        patchings = [Patching.load(each) for kind, path in kinds if kind == "patching" for each in PATCHING.below(path)]
        transfers = [Transfer.load(each) for kind, path in kinds if kind == "transfer" for each in TRANSFER.below(path)]
        if compared := next((path for kind, path in kinds if kind == "comparison"), None):
            raise UserError(
                f"{compared}: a comparison is drawn from its analyses; draw it by {redraw_command(compared)}"
            )
        root = expanded(self.output)
        for path, found in held:
            if len(found) > 1:
                say(f"{path}: holds {len(found)} analyses, drawn together: {', '.join(a.name for a in found)}")
        if analyses:
            analyze.draw(analyses, root)
        if runs:
            train.draw(runs, root / figure_name([(run.path.resolve().name, "policy") for run in runs]))
        if evaluations:
            evaluate.draw(evaluations, root)
        for look, directory in _places(looks, root):
            inspect.draw(look, directory)
        for ablation, directory in _places(ablations, root):
            ablate.draw_ablation(ablation, directory)
        for patching, directory in _places(patchings, root):
            patch.draw_patching(patching, directory)
        if transfers:
            transfer.draw(transfers, root)
        print_json({"command": "figures"})


def _places(results: Sequence[_Result], root: Path) -> list[tuple[_Result, Path]]:
    """Each result once, with a directory for its figures below `root`.

    It is named like the result's own, preceded by as many of the directories above as results of equal names need.
    """
    from internal_policy.analysis.sources import labels_from

    found = {(result.path or root).resolve(): result for result in results}
    names = [path.name for path in found]
    labels = labels_from(names, list(found)) if len(set(names)) < len(names) else names
    places = [root / figure_name([(label.replace("/", "--"), "policy")]) for label in labels]
    return list(zip(found.values(), places, strict=True))
