"""The command `internal-policy analyze`: models, sweeps over checkpoints, and the cross-model study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast, get_args

import typer

from internal_policy.analysis.config import AnalyzeConfig
from internal_policy.analysis.finished import find_finished
from internal_policy.cli import common
from internal_policy.cli import report as cli_report
from internal_policy.cli.compare import compare_sweep
from internal_policy.comparison.study_presets import STUDIES, Preset
from internal_policy.data.prompts import TEMPLATES
from internal_policy.models.options import Lens
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing, status
from internal_policy.utils.output import document
from internal_policy.utils.shell import figure_name, is_main_process, world_size

if TYPE_CHECKING:
    from internal_policy.analysis.results import Analysis
    from internal_policy.comparison.study_results import Study

DATA = Path("data/analyses")
STUDY_DATA = Path("data/studies")
FIGURES = Path("figures")
DEFAULTS = AnalyzeConfig()


def analyze(
    context: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub id, local directory, testbed/qwen3 or testbed/llama; repeat for several. "
            f"[default: {DEFAULTS.model}; none with --checkpoints or --preset]",
            autocompletion=common.completing(common.EMBEDDED),
        ),
    ] = None,
    revision: Annotated[
        list[str] | None,
        typer.Option(help="Branch, tag or commit on the hub; repeat to sweep over several of one model."),
    ] = None,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            help="Sweep over a training run's directory, a checkpoint, or a quoted glob such as 'RUN/checkpoint-*'; "
            "repeat for several. With --model the model that the training began with comes first."
        ),
    ] = None,
    own_responses: Annotated[
        bool,
        typer.Option(
            "--own-responses", help="In a sweep let each checkpoint sample its own, not read the first one's responses."
        ),
    ] = False,
    preset: Annotated[
        Preset | None,
        typer.Option(
            help="Cross-model study: paper (twelve models), small (0.6B-1.7B), testbed (embedded, no network)."
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Hub data set id, or a parquet, jsonl or json file. [default: MATH-500; testbed for an embedded model]"
        ),
    ] = None,
    prompts_split: Annotated[
        str | None, typer.Option(help="Split of a hub data set. [default: test if there is one, else the first]")
    ] = None,
    responses: Annotated[
        str | None,
        typer.Option(
            help="Ready responses (jsonl, json, parquet), or an analysis' directory, to analyse instead of sampling."
        ),
    ] = None,
    max_responses: Annotated[
        int | None, typer.Option(help="At most so many responses. [default: 256 sampled, or all that are given]")
    ] = DEFAULTS.max_responses,
    samples_per_prompt: Annotated[
        int, typer.Option(help="Responses sampled per prompt.")
    ] = DEFAULTS.samples_per_prompt,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="At most so many tokens a response. [default: 7168 for --preset paper; else what the checkpoint says, "
            "else 1024]"
        ),
    ] = DEFAULTS.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = DEFAULTS.temperature,
    template: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(TEMPLATES)}. [default: {DEFAULTS.template}; a preset has each model's own]",
            autocompletion=common.completing(TEMPLATES),
        ),
    ] = None,
    generator: common.Generator = DEFAULTS.generator,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            help="policy (without the final norm) or logit-lens (with it); repeat for both, on the same responses. "
            f"[default: {DEFAULTS.lens}]",
            autocompletion=common.completing(get_args(Lens)),
        ),
    ] = None,
    backend: common.Backend = DEFAULTS.backend,
    remote: common.Remote = False,
    batch_size: Annotated[int, typer.Option(help="Sequences run together.")] = DEFAULTS.batch_size,
    dtype: common.Dtype = DEFAULTS.dtype,
    device: common.Device = DEFAULTS.device,
    device_map: common.DeviceMap = DEFAULTS.device_map,
    quantization: common.Quantization = DEFAULTS.quantization,
    seed: Annotated[int, typer.Option(help="Seed of sampling and bootstrap.")] = DEFAULTS.seed,
    keep_tokens: Annotated[
        int, typer.Option(help="Keep every token's values for so many responses.")
    ] = DEFAULTS.keep_tokens,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Analyse positions chosen at random, until every entropy change is known to so many nats either way "
            "(95%), such as 0.02. [default: every position]"
        ),
    ] = DEFAULTS.tolerance,
    random_baseline: Annotated[
        bool,
        typer.Option(
            "--random-baseline",
            help="Analyse the same responses also with random weights of the same architecture, shown in grey.",
        ),
    ] = DEFAULTS.random_baseline,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=f"Directory for results. [default: {DATA}, of a preset {STUDY_DATA}/NAME; figures in {FIGURES}]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a used output directory.")] = False,
    wait: common.Wait = False,
    trust_remote_code: common.TrustRemoteCode = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Measure entropies of the internal policies of one or more models, find the boundary layer, draw the figures."""
    options: dict[str, Any] = {
        "prompts_split": prompts_split,
        "max_responses": max_responses,
        "samples_per_prompt": samples_per_prompt,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "generator": generator,
        "backend": backend,
        "remote": remote,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "device_map": device_map,
        "quantization": quantization,
        "seed": seed,
        "keep_tokens": keep_tokens,
        "tolerance": tolerance,
        "random_baseline": random_baseline,
        "trust_remote_code": trust_remote_code,
    }
    common.require_packages(backend, quantization)
    writes: dict[str, Any] = {"overwrite": overwrite, "wait": wait}
    names, revisions, patterns = list(model or ()), list(revision or ()), list(checkpoints or ())
    if context.args and not patterns:
        raise typer.BadParameter(f"Got unexpected extra argument ({context.args[0]}).")
    # A shell that was given no quotes has turned the glob into many words.
    patterns += context.args
    swept = bool(patterns) or len(revisions) > 1
    # Whether each is one, the settings check.
    lenses = cast("list[Lens]", list(dict.fromkeys(lens or [DEFAULTS.lens])))
    if len(lenses) > 1 and (swept or preset is not None):
        raise UserError(
            f"got {len(lenses)} lenses for {'a sweep' if swept else 'a preset'}, which has one; run it once for each, "
            "with the same --output"
        )
    if preset is not None:
        told = {"model": names, "revision": revisions, "checkpoints": patterns, "template": template}
        if other := next((name for name, value in (*told.items(), ("responses", responses)) if value), None):
            raise UserError(f"both --preset and --{other} were given; a preset has its models and their templates")
        if own_responses:
            raise UserError(
                "both --preset and --own-responses were given; the models of a preset sample their own anyway: "
                "leave it out"
            )
        _study(preset, prompts, output, {**writes, **options, "lens": lenses[0]})
        return
    if own_responses and not swept:
        raise UserError("--own-responses was given without a sweep; give --checkpoints, or --revision several times")
    options["template"] = DEFAULTS.template if template is None else template
    if responses is not None and (found := expanded(responses) / "responses.jsonl").is_file():
        responses = str(found)
    sources = {"prompts": prompts, "responses": responses}
    if swept:
        if len(names) > 1:
            raise UserError(f"got {len(names)} models in a sweep; a sweep is over the checkpoints of one")
        start = names[0] if names else None
        options |= {"revisions": revisions, "checkpoints": patterns, "own_responses": own_responses, "lens": lenses[0]}
        _sweep(start, output, {**writes, **sources, **options})
        return
    if not names and revisions:
        raise UserError(f"--revision {revisions[0]} was given without --model; name the hub model that it is of")
    options["revision"] = revisions[0] if revisions else None
    _models(names or [DEFAULTS.model], lenses, output, writes, {**sources, **options})


def _models(
    names: list[str], lenses: list[Lens], output: Path | None, writes: dict[str, Any], options: dict[str, Any]
) -> None:
    # A bad setting is told before anything heavy is imported, a bad model before another one is analysed.
    configs = [AnalyzeConfig(model=name, lens=lens, **options) for name in names for lens in lenses]
    if len(configs) > 1:
        from internal_policy.analysis.checkpoints import refuse_one_place

        refuse_one_place(configs)
    first = configs[0]
    common.require_there(names, first.revision, first.prompts, first.responses)
    root = DATA if output is None else expanded(output)
    alone = not writes["overwrite"] and world_size() == 1
    each = {name: [c for c in configs if c.model == name] for name in names}
    done = {name: find_finished(each[name], root, follow=first.responses is None) if alone else None for name in each}
    if None in done.values():
        with importing():
            from internal_policy import models
            from internal_policy.analysis import sweep as sweeps

        common.require_key(first.remote)
        for config in configs:
            if done[config.model] is None:
                with status(f"looking up {config.model}"):
                    models.check(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    from internal_policy.cli import display as terminal

    state = None
    if world_size() > 1:
        from internal_policy.utils.distributed import launched_processes

        state = launched_processes()

    analyses, new = [], []
    # All of them from the start: a directory in use is told before another model is analysed.
    with locked(*(root / config.slug for config in configs), wait=writes["wait"], state=state):
        for name in names:
            # All lenses of a model first, so that each can show what the others give.
            known = done[name]
            if known is not None:
                found = known
            else:
                found = sweeps.analyze_lenses(name, lenses, output=root, **writes, **options)
                new += found
            if is_main_process():
                for analysis in found:
                    terminal.show(analysis)
                    cli_report.write_reports([analysis], keep=known is not None)
            analyses += found
    if is_main_process():
        cli_report.redraw_other_lenses(new)
        draw(analyses, FIGURES if output is None else root / "figures")
        document({"command": "analyze", "analyses": [_told(a) for a in analyses]})


def _told(analysis: Analysis) -> dict[str, Any]:
    """An analysis in a JSON document, with what the same responses give under the other lens."""
    from internal_policy.analysis.results import find_other_lens

    other = find_other_lens(analysis)
    return {**common.told(analysis), "other_lens": None if other is None else vars(other)}


def _sweep(start: str | None, output: Path | None, options: dict[str, Any]) -> None:
    own = {"revisions", "checkpoints", "own_responses", "overwrite", "wait"}
    settings = {name: value for name, value in options.items() if name not in own}
    AnalyzeConfig(**settings)
    from internal_policy.analysis.checkpoints import refuse_one_place, targets

    # What is not there is told before torch is imported.
    found = targets(start, options["revisions"], options["checkpoints"])
    common.require_there([start] if start else [], None, options["prompts"], options["responses"])
    root = DATA if output is None else expanded(output)
    configs = [AnalyzeConfig(model=t.model, revision=t.revision, **settings) for t in found]
    refuse_one_place(configs)
    own_responses = options["own_responses"]
    alone = not options["overwrite"] and world_size() == 1 and not (own_responses and options["responses"])
    known = find_finished(configs, root, follow=not own_responses) if alone else None
    if known is not None:
        analyses = known
        for analysis in analyses:
            cli_report.show_and_report(analysis, keep=True)
    else:
        with importing():
            from internal_policy.analysis.sweep import sweep

        each = cli_report.show_and_report if is_main_process() else None
        analyses = sweep(start, output=root, each=each, **options)
    if not is_main_process():
        return
    figures = FIGURES if output is None else root / "figures"
    comparison = None
    if len(analyses) > 1:
        comparison = compare_sweep(analyses, figures)
    else:
        draw(analyses, figures)
    document({"command": "analyze", "analyses": [_told(a) for a in analyses], "comparison": comparison})


def _study(preset: Preset, prompts: str | None, output: Path | None, options: dict[str, Any]) -> None:
    settings = {name: value for name, value in options.items() if name not in ("overwrite", "wait")}
    AnalyzeConfig(model=STUDIES[preset][0].model, prompts=prompts, **settings)
    common.require_there([], None, prompts)
    with importing():
        from internal_policy.cli import display as terminal
        from internal_policy.cli import summary
        from internal_policy.comparison.study import study
        from internal_policy.plotting.study import save_study

    common.require_key(options["remote"])
    root = STUDY_DATA / preset if output is None else expanded(output)
    each = cli_report.show_and_report if is_main_process() else None
    done = study(preset, prompts=prompts, output=root, each=each, **options)
    if not is_main_process():
        return
    summary.show_summary(f"study {preset}: {counted(len(done.analyses), 'model')}", done.table, done.convergence)
    directory = (FIGURES if output is None else root / "figures") / figure_name([(f"study-{preset}", options["lens"])])
    with writing(directory):
        paths = save_study(done, directory)
    terminal.list_files("figures", paths)
    if done.comparison is not None:
        cli_report.write_reports([done.comparison], directory)
    document(
        {
            "command": "analyze",
            "analyses": [_told(a) for a in done.analyses],
            "models": done.table,
            "convergence": done.convergence,
            "failures": done.failures,
        }
    )
    if done.failures:
        _tell_failures(done)


def _tell_failures(done: Study) -> NoReturn:
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
    """Draw figures 2, 3 and 12, and list the files.

    Args:
        analyses: what is drawn.
        root: below it a directory named by the analyses is written.

    Raises:
        UserError: it cannot be written.
    """
    from internal_policy.cli import display as terminal
    from internal_policy.plotting import analysis as figures

    directory = root / figure_name([(a.path.resolve().name if a.path else a.name, a.lens) for a in analyses])
    with writing(directory):
        paths = figures.save_analysis_figures(analyses, directory)
    terminal.list_files("figures", paths)
