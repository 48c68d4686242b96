"""The command `internal-policy analyze`: models, sweeps over checkpoints, and the cross-model study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import EMBEDDED, AnalyzeConfig, AnalyzeOptions
from internal_policy.analysis.finished import find_finished
from internal_policy.analysis.rewards_needed import require_rewards
from internal_policy.cli import report
from internal_policy.cli.command import ResumeOptions, require_key, require_packages, require_paths, to_json
from internal_policy.cli.compare import compare_sweep
from internal_policy.comparison.study_presets import STUDIES, Preset
from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import DEFAULT_LENS, LENSES, lens_name
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing, status
from internal_policy.utils.options import option
from internal_policy.utils.output import print_json
from internal_policy.utils.shell import figure_name, is_main_process, world_size

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis

DATA = Path("data/analyses")
STUDY_DATA = Path("data/studies")


@dataclass(frozen=True, kw_only=True)
class AnalyzeCommand(AnalyzeOptions, ResumeOptions):
    """Measure entropies of the internal policies of one or more models, find the boundary layer, draw the figures."""

    model: tuple[str, ...] = option((), completions=EMBEDDED)
    """Hub id, local directory, testbed/qwen3 or testbed/llama; repeat for several. Default: testbed/qwen3, or none
    with --checkpoints or --preset."""
    revision: tuple[str, ...] = ()
    """Branch, tag or commit on the hub; repeat to sweep over several of one model."""
    checkpoints: tuple[str, ...] = ()
    """Sweep over a training run's directory, a checkpoint, or a quoted glob such as 'RUN/checkpoint-*'; repeat for
    several. With --model, the model that the training began with comes first."""
    own_responses: bool = False
    """In a sweep, let each checkpoint sample its own responses instead of reading those of the first."""
    preset: Preset | None = None
    """Cross-model study: paper (twelve models, up to 7168 tokens a response), small (0.6B-1.7B), testbed (embedded, no
    network)."""
    template: str | None = option(None, choices=TEMPLATES)
    """How a prompt is put to the model. Default: chat, the tokenizer's own template, and with --preset that of each
    model."""
    lens: tuple[str, ...] = option((), completions=LENSES)
    """policy (no final norm, as in the paper), logit-lens (with the final norm), unit-norm (every state at root mean
    square 1), or the directory of a trained lens; repeat for several, on the same responses. Default: policy."""
    extra: tuple[str, ...] = option((), positional=True)

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        require_packages(self.backend, self.quantization)
        if self.extra and not self.checkpoints:
            raise UserError(f"unexpected extra argument ({self.extra[0]}). See internal-policy analyze --help")
        lenses = self.lenses
        swept = bool(self.checkpoints) or len(self.revision) > 1
        if len(lenses) > 1 and (swept or self.preset is not None):
            raise UserError(
                f"got {len(lenses)} lenses for {'a sweep' if swept else 'a preset'}, which has one; run it once for "
                "each, with the same --output"
            )
        if self.preset is not None:
            self._refuse_with_preset()
            _study(self, self.preset)
            return
        if self.own_responses and not swept:
            raise UserError(
                "--own-responses was given without a sweep; give --checkpoints, or --revision several times"
            )
        if swept:
            if len(self.model) > 1:
                raise UserError(f"got {len(self.model)} models in a sweep; a sweep is over the checkpoints of one")
            _sweep(self)
            return
        if self.revision and not self.model:
            revision = self.revision[0]
            raise UserError(f"--revision {revision} was given without --model; name the hub model that it is of")
        _models(self)

    @property
    def lenses(self) -> tuple[str, ...]:
        """The lenses, each once."""
        return tuple(dict.fromkeys(self.lens)) or (DEFAULT_LENS,)

    @property
    def writes(self) -> dict[str, Any]:
        """How results are written."""
        return {"overwrite": self.overwrite, "wait": self.wait}

    def settings(self) -> dict[str, Any]:
        """The keywords of ``analyze`` that apply to every model of the command."""
        settings = {each.name: getattr(self, each.name) for each in fields(AnalyzeOptions)}
        if self.preset is None:
            settings["template"] = AnalyzeConfig().template if self.template is None else self.template
        if self.responses is not None and (found := expanded(self.responses) / "responses.jsonl").is_file():
            settings["responses"] = str(found)
        return settings

    def _refuse_with_preset(self) -> None:
        for name in ("model", "revision", "checkpoints", "template", "responses"):
            if getattr(self, name):
                raise UserError(f"both --preset and --{name} were given; a preset has its models and their templates")
        if self.own_responses:
            raise UserError(
                "both --preset and --own-responses were given; the models of a preset sample their own anyway: "
                "leave it out"
            )


def _models(command: AnalyzeCommand) -> None:
    names, lenses, options = command.model or (AnalyzeConfig().model,), command.lenses, command.settings()
    options["revision"] = command.revision[0] if command.revision else None
    # Bad settings are refused before anything heavy is imported, a bad model before another one is analysed.
    configs = [AnalyzeConfig(model=name, lens=lens, **options) for name in names for lens in lenses]
    if len(configs) > 1:
        from internal_policy.analysis.sweep_targets import require_distinct_outputs

        require_distinct_outputs(configs)
    first = configs[0]
    require_paths(names, first.revision, first.prompts, first.responses)
    require_rewards(first.by, first.prompts, first.responses, first.max_responses)
    root, figures = command.place(DATA)
    may_reuse = not command.overwrite and world_size() == 1
    finished = {}
    for name in names:
        own = [config for config in configs if config.model == name]
        finished[name] = find_finished(own, root, follow=first.responses is None) if may_reuse else None
    if None in finished.values():
        with importing():
            from internal_policy import models
            from internal_policy.analysis.pipeline import analyze_lenses

        require_key(first.remote)
        for config in configs:
            if finished[config.model] is None:
                with status(f"looking up {config.model}"):
                    models.check(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    from internal_policy.cli.display import show_analysis

    state = None
    if world_size() > 1:
        from internal_policy.utils.distributed import launched_processes

        state = launched_processes()

    analyses, new = [], []
    # All are locked from the start, so that a directory in use is refused before another model is analysed.
    with locked(*(root / config.slug for config in configs), wait=command.wait, state=state):
        for name in names:
            # All lenses of a model first, so that each can show what the others give.
            reused = finished[name]
            if reused is None:
                found = analyze_lenses(name, lenses, output=root, **command.writes, **options)
                new += found
            else:
                found = reused
            if is_main_process():
                for analysis in found:
                    show_analysis(analysis)
                    report.write_reports([analysis], keep=reused is not None)
            analyses += found
    if is_main_process():
        report.redraw_other_lenses(new)
        draw(analyses, figures)
        print_json({"command": "analyze", "analyses": [_to_json(a) for a in analyses]})


def _to_json(analysis: Analysis) -> dict[str, Any]:
    """An analysis in a JSON document, with what the same responses give by direction alone and under other lenses."""
    from internal_policy.analysis.layer_selection import DIRECTION

    return {
        **to_json(analysis),
        "length_share": analysis.length_share,
        "boundary_layer_by_direction": analysis.selection.sensitivity.get(DIRECTION),
        "other_lenses": [vars(other) for other in analysis.other_lenses],
    }


def _sweep(command: AnalyzeCommand) -> None:
    settings = {**command.settings(), "lens": command.lenses[0]}
    # Bad settings are refused before anything heavy is imported.
    AnalyzeConfig(**settings)
    from internal_policy.analysis.sweep_targets import list_targets, require_distinct_outputs

    start = command.model[0] if command.model else None
    # Without quotes the shell has expanded the glob into many words.
    checkpoints = [*command.checkpoints, *command.extra]
    # Missing paths are refused before torch is imported.
    found = list_targets(start, command.revision, checkpoints)
    require_paths([start] if start else [], None, settings["prompts"], settings["responses"])
    require_rewards(settings["by"], settings["prompts"], settings["responses"], settings["max_responses"])
    root, figures = command.place(DATA)
    configs = [AnalyzeConfig(model=t.model, revision=t.revision, **settings) for t in found]
    require_distinct_outputs(configs)
    own = command.own_responses
    may_reuse = not command.overwrite and world_size() == 1 and not (own and command.responses)
    known = find_finished(configs, root, follow=not own) if may_reuse else None
    if known is not None:
        analyses = known
        for analysis in analyses:
            report.show_and_report(analysis, keep=True)
    else:
        with importing():
            from internal_policy.analysis.sweep import sweep

        analyses = sweep(
            start,
            revisions=command.revision,
            checkpoints=checkpoints,
            own_responses=own,
            output=root,
            each=report.show_and_report if is_main_process() else None,
            **command.writes,
            **settings,
        )
    if not is_main_process():
        return
    comparison = None
    if len(analyses) > 1:
        comparison = compare_sweep(analyses, figures)
    else:
        draw(analyses, figures)
    print_json({"command": "analyze", "analyses": [_to_json(a) for a in analyses], "comparison": comparison})


def _study(command: AnalyzeCommand, preset: Preset) -> None:
    settings = {**command.settings(), "lens": command.lenses[0]}
    AnalyzeConfig(model=STUDIES[preset][0].model, **settings)
    del settings["responses"]
    require_paths([], None, command.prompts)
    require_rewards(command.by, command.prompts, None)
    with importing():
        from internal_policy.cli.display import list_files, show_study
        from internal_policy.comparison.study import study
        from internal_policy.plotting.study import save_study

    require_key(command.remote)
    root, figures = command.place(STUDY_DATA / preset)
    each = report.show_and_report if is_main_process() else None
    done = study(preset, output=root, each=each, **command.writes, **settings)
    if not is_main_process():
        return
    show_study(f"study {preset}: {counted(len(done.analyses), 'model')}", done.table, done.convergence)
    directory = figures / figure_name([(f"study-{preset}", lens_name(command.lenses[0]))])
    with writing(directory):
        paths = save_study(done, directory)
    list_files("figures", paths)
    if done.comparison is not None:
        report.write_reports([done.comparison], directory)
    print_json(
        {
            "command": "analyze",
            "analyses": [_to_json(a) for a in done.analyses],
            "models": done.table,
            "convergence": done.convergence,
            "failures": done.failures,
        }
    )
    if done.failures:
        n, all_of_them = len(done.failures), len(done.failures) + len(done.analyses)
        alike: dict[str, list[str]] = {}
        for name, why in done.failures.items():
            alike.setdefault(why, []).append(name)
        reasons = "; ".join(f"{', '.join(names)}: {why}" for why, names in alike.items())
        raise UserError(
            f"{n} of {counted(all_of_them, 'model')} failed, and the figures show the others ({reasons}). "
            "The same command without --overwrite tries these again and keeps what is finished"
        )


def draw(analyses: Sequence[Analysis], root: Path) -> None:
    """Draw the figures of analyses and of their additions into a directory below `root` that is named by them."""
    from internal_policy.cli.display import list_files
    from internal_policy.plotting import analysis as figures
    from internal_policy.plotting.divergences import save_divergence_figures

    directory = root / figure_name([(a.path.resolve().name if a.path else a.name, a.lens) for a in analyses])
    with writing(directory):
        paths = figures.save_analysis_figures(analyses, directory)
        paths += save_divergence_figures(analyses, directory)
    list_files("figures", paths)
