"""The command `internal-policy ablate`: what becomes of the final policy when writes are changed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from internal_policy.cli.command import ResumeOptions, require_packages, require_paths, to_json
from internal_policy.interventions.config import AblateConfig
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing, status
from internal_policy.utils.output import print_json

if TYPE_CHECKING:
    from internal_policy.interventions.results import Ablation

DATA = Path("data/ablations")


@dataclass(frozen=True, kw_only=True)
class AblateCommand(AblateConfig, ResumeOptions):
    """Replace or scale what layers, attentions, FFNs, heads or experts write, and measure what the final policy does.

    For every intervention: KL(pi_theta || pi_theta') on the response tokens, the change of the entropy and of the
    log-probability of what was sampled, how often the top token is another one, and with --samples the accuracy of
    responses that are sampled under it.
    """

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        require_packages(self.backend, self.quantization)
        settings = {each.name: getattr(self, each.name) for each in fields(AblateConfig)}
        if self.responses is not None and (found := expanded(self.responses) / "responses.jsonl").is_file():
            settings["responses"] = str(found)
        config = AblateConfig(**settings)
        require_paths([self.model], self.revision, config.prompts, config.responses)
        from internal_policy.interventions.results import find_finished

        root, figures = self.place(DATA)
        ablation = None if self.overwrite else find_finished(config, root)
        if ablation is None:
            with importing():
                from internal_policy import models
                from internal_policy.interventions.ablation import ablate

            with status(f"looking up {self.model}"):
                models.check(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
            with locked(root / config.slug, wait=self.wait):
                ablation = ablate(**settings, output=root, overwrite=self.overwrite, wait=self.wait)
        ablation = replace(ablation, path=root / config.slug)
        from internal_policy.cli.display_interventions import show_ablation

        show_ablation(ablation)
        draw_ablation(ablation, figures / config.slug)
        print_json({"command": "ablate", "ablation": {**to_json(ablation), "table": ablation.table}})


def draw_ablation(ablation: Ablation, directory: Path) -> None:
    """Draw the map and the bars of an ablation, and list the files."""
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import interventions as figure

    with writing(directory):
        paths = figure.save_ablation_figures(ablation, directory)
    list_files("figures", paths)
