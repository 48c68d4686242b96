"""The command `internal-policy train`: the words of `bupo.train` as options, a summary and the figures of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internal_policy.bupo.config import AGGREGATIONS, AUTO, DATA, METHODS, PRESETS, VERIFIERS, Site, require_layer
from internal_policy.cli.common import Debug, Json, Model, Quiet, Wait, completing, require_there, told
from internal_policy.cli.report import write_reports
from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import DTYPES, Lens
from internal_policy.utils.errors import UserError
from internal_policy.utils.imports import require_package
from internal_policy.utils.locks import writing
from internal_policy.utils.logging import importing
from internal_policy.utils.output import document
from internal_policy.utils.shell import is_number, world_size

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run

FIGURES = Path("figures")

_WORDS = {"method": METHODS, "preset": (*PRESETS,), "aggregation": AGGREGATIONS, "template": TEMPLATES, "dtype": DTYPES}
_NOT_OF_THE_RUN = ("set_", "as_json", "quiet", "debug")
_FROM_PYTHON_ONLY = ("tokenizer", "peft_config", "callbacks")


def train(
    model: Annotated[str, Model] = "testbed/qwen3",
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Hub data set id, or a parquet, jsonl or json file, with answers. [default: zwhe99/DeepMath-103K; "
            "fresh problems of testbed for an embedded model]"
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer whose policy is optimised first, from 1; auto: the model's own responses are analysed; or the "
            "directory of an analysis. [default: auto]"
        ),
    ] = None,
    ipa_steps: Annotated[
        str | None,
        typer.Option(help="Steps of that first phase, or auto. [default: the preset's share of the run, else 20/300]"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(METHODS)}. [default: bupo]", autocompletion=completing(METHODS)),
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(VERIFIERS)}, or module:function. [default: math; exact for testbed]",
            autocompletion=completing(VERIFIERS),
        ),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps in all, each a batch of rollouts with all updates on it. [default: preset's]"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=f"Directory of the run. [default: {DATA}/<model>--<method>...]"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"Settings by name: {', '.join(PRESETS)}. [default: testbed for an embedded model]",
            autocompletion=completing(PRESETS),
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything. [default: 0]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: preset's, else 1e-6]")] = None,
    ipa_learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the first phase. [default: --learning-rate]")
    ] = None,
    prompts_per_step: Annotated[
        int | None, typer.Option(min=1, help="Prompts in a batch of rollouts. [default: preset's, else 128]")
    ] = None,
    num_generations: Annotated[
        int | None, typer.Option(min=2, help="Responses sampled to each prompt. [default: 8]")
    ] = None,
    mini_batches: Annotated[
        int | None, typer.Option(min=1, help="Updates on a batch of rollouts. [default: preset's, else 4]")
    ] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1, help="At most so many tokens a response.")] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Prompts of more tokens are left out. [default: 1024]")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(TEMPLATES)}. [default: chat]", autocompletion=completing(TEMPLATES)),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature. [default: 1.0]")] = None,
    site: Annotated[Site | None, typer.Option(help="Whose policy of the layer comes first. [default: layer]")] = None,
    lens: Annotated[Lens | None, typer.Option(help="Without or with the final norm. [default: policy]")] = None,
    aggregation: Annotated[
        str | None, typer.Option(help=f"Mean of the loss: {' or '.join(AGGREGATIONS)}. [default: {AGGREGATIONS[0]}]")
    ] = None,
    freeze_layers: Annotated[
        int | None, typer.Option(min=0, help="No update of layers 1..n and of an untied embedding. [default: 0]")
    ] = None,
    upper_lr_scale: Annotated[
        float | None, typer.Option(help="Factor on the learning rate of layers above --layer. [default: 1]")
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(min=0, help="Train LoRA adapters of this rank (needs peft). [default: all weights]")
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="Evaluate start and result on it. [default: the embedded tasks for testbed]")
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(min=0, help="Responses sampled per problem; 0 leaves it out.")
    ] = None,
    eval_problems: Annotated[int | None, typer.Option(min=1, help="At most so many problems of it.")] = None,
    dynamics_every: Annotated[
        int | None, typer.Option(min=0, help="Measure figure 5 every so many steps; 0 never. [default: 10 times]")
    ] = None,
    dynamics_responses: Annotated[
        int | None, typer.Option(min=1, help="Fixed responses that it is measured on. [default: 32]")
    ] = None,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = None,
    report_to: Annotated[str | None, typer.Option(help="wandb, tensorboard and what else transformers knows.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Of the weights: one of {', '.join(DTYPES)}.", autocompletion=completing(DTYPES)),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the hub.")] = None,
    prompts_split: Annotated[str | None, typer.Option(help="Split of a hub data set.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a used output directory.")] = False,
    wait: Wait = False,
    trust_remote_code: Annotated[
        bool | None, typer.Option("--trust-remote-code", help="Run the checkpoint's code.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="name=value: any other option of BuPOConfig and trl.GRPOConfig; repeat for more."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model with Bottom-up Policy Optimization (or GRPO, RLOO, REINFORCE++), evaluate it, draw the figures."""
    # What was not given is left to the preset.
    given = {name: value for name, value in locals().items() if value is not None and name not in _NOT_OF_THE_RUN}
    options = _with_settings(given, set_ or [])
    require_package("trl", "training", "train")
    _check(options)
    require_there([model], revision, prompts, benchmark)
    if layer is not None:
        require_layer(layer)
    from internal_policy.bupo.config import TrainConfig
    from internal_policy.bupo.run import find_finished

    config = TrainConfig.from_keywords(**options)
    known = None if config.overwrite or world_size() > 1 else find_finished(config)
    if known is not None:
        run, is_main_process = known, True
    else:
        with importing():
            from internal_policy.bupo.training import train as run_training
        run = run_training(**options)
        from accelerate import PartialState

        is_main_process = PartialState().is_main_process
    if is_main_process:
        from internal_policy.cli.display_training import show

        show(run)
        write_reports([run], keep=known is not None)
        draw([run], FIGURES / run.path.resolve().name if output is None else run.path / "figures")
        document({"command": "train", "run": _fields(run)})


def _with_settings(given: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    options = dict(given)
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name.isidentifier():
            raise UserError(f"--set is {setting!r}; needed is name=value, as in --set epsilon_high=0.28")
        if name in _FROM_PYTHON_ONLY:
            raise UserError(f"--set {name} takes an object, which a command cannot give; call bupo.train from Python")
        # A switch that is off was not given.
        if options.get(name) not in (None, False):
            raise UserError(f"{name} was given twice; leave out {setting!r} or what else gives it")
        try:
            options[name] = json.loads(text)
        except (ValueError, RecursionError):
            options[name] = text
    return options


def _check(options: dict[str, Any]) -> None:
    """Refuse what can be told without the libraries, whose import takes seconds."""
    for name, choices in _WORDS.items():
        if name in options and options[name] not in choices:
            raise UserError(f"{_flag(name)} is {options[name]!r}; needed is one of {', '.join(choices)}")
    steps = str(options.get("ipa_steps", AUTO)).strip()
    if steps != AUTO and not (is_number(steps) and int(steps) >= 0):
        raise UserError(f"--ipa-steps is {steps}; needed is a number of steps of at least 0, or auto")
    total = options.get("max_steps")
    if steps != AUTO and isinstance(total, int) and int(steps) > total:
        raise UserError(f"--ipa-steps is {steps} and --max-steps {total}; needed is at most --max-steps, or auto")


def _fields(run: Run) -> dict[str, Any]:
    """Tell a run in a JSON document."""
    ends = {"start": run.evaluation_start, "trained": run.evaluation}
    evaluations = {name: None if found is None else told(found) for name, found in ends.items()}
    return {**told(run), "label": run.label, "model_dir": run.model_dir, "evaluations": evaluations}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def draw(runs: list[Run], directory: Path) -> None:
    """Draw figures 4, 5 and 7, and tell where they are.

    Args:
        runs: the runs.
        directory: made where it does not exist.

    Raises:
        UserError: it cannot be written.
    """
    from internal_policy.cli import display as terminal
    from internal_policy.plotting import training as training_figures

    with writing(directory):
        paths = training_figures.save_training_figures(runs, directory)
    terminal.list_files("figures", paths)
