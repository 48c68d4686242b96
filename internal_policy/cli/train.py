"""The command `internal-policy train`: a training run, its summary and its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.bupo.config import TrainConfig, require_layer
from internal_policy.cli.command import FIGURES, ConsoleOptions, require_paths, to_json
from internal_policy.cli.report import write_reports
from internal_policy.utils.errors import UserError
from internal_policy.utils.imports import require_package
from internal_policy.utils.locks import writing
from internal_policy.utils.logging import importing
from internal_policy.utils.output import print_json
from internal_policy.utils.shell import world_size

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run

_FROM_PYTHON_ONLY = ("tokenizer", "peft_config", "callbacks", "trl_options")


@dataclass(frozen=True, kw_only=True)
class SetOptions(ConsoleOptions):
    """How options of TRL are given."""

    set: tuple[str, ...] = ()
    """name=value: any other option of trl.GRPOConfig; repeat for more."""


@dataclass(frozen=True)
class TrainCommand(TrainConfig, SetOptions):
    """Train a model with Bottom-up Policy Optimization (or GRPO, RLOO, REINFORCE++, PPO), evaluate it, draw figures."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        given = {each.name: getattr(self, each.name) for each in fields(TrainConfig) if each.name != "trl_options"}
        defaults = {each.name: each.default for each in fields(TrainConfig)}
        options = _with_settings({n: v for n, v in given.items() if v != defaults[n]}, self.set)
        require_package("trl", "training", "train")
        config = TrainConfig.from_keywords(**options)
        # Whether the steps fit is known without the libraries, whose import takes seconds.
        config.with_preset()
        require_paths([config.model], config.revision, config.prompts, config.benchmark)
        if config.layer is not None:
            require_layer(str(config.layer))
        from internal_policy.bupo.run import find_finished

        known = None if config.overwrite or world_size() > 1 else find_finished(config)
        if known is not None:
            run, is_main_process = known, True
        else:
            with importing():
                from internal_policy.bupo.training import train
            run = train(**options)
            from accelerate import PartialState

            is_main_process = PartialState().is_main_process
        if is_main_process:
            from internal_policy.cli.display_runs import show_run

            show_run(run)
            write_reports([run], keep=known is not None)
            figures = FIGURES / run.path.resolve().name if config.output is None else run.path / "figures"
            draw([run], figures)
            print_json({"command": "train", "run": _to_json(run)})


def _with_settings(given: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The options with those of ``--set``, whose values are parsed as JSON if possible."""
    options = dict(given)
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name.isidentifier():
            raise UserError(f"--set is {setting!r}; needed is name=value, as in --set epsilon_high=0.28")
        if name in _FROM_PYTHON_ONLY:
            raise UserError(f"--set {name} takes an object, which a command cannot give; call bupo.train from Python")
        if name in options:
            raise UserError(f"{name} was given twice; leave out {setting!r} or what else gives it")
        try:
            options[name] = json.loads(text)
        except (ValueError, RecursionError):
            options[name] = text
    return options


def _to_json(run: Run) -> dict[str, Any]:
    """A run in a JSON document."""
    ends = {"start": run.evaluation_start, "trained": run.evaluation}
    evaluations = {name: None if found is None else to_json(found) for name, found in ends.items()}
    return {**to_json(run), "label": run.label, "model_dir": run.model_dir, "evaluations": evaluations}


def draw(runs: list[Run], directory: Path) -> None:
    """Draw figures 4, 5 and 7, and the accuracy of a layer if it was measured; list the files."""
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import training as figures
    from internal_policy.plotting.depth import layer_accuracy
    from internal_policy.plotting.style import save_figure

    watched = [run for run in runs if not run.layer_accuracy.empty]
    with writing(directory):
        paths = figures.save_training_figures(runs, directory)
        if watched:
            paths += save_figure(layer_accuracy(watched), directory / "layer_accuracy")
    list_files("figures", paths)
