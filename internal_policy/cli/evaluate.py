"""The command `internal-policy evaluate`: Avg@K and Pass@K of models on benchmarks, compared and drawn."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from internal_policy.cli import common
from internal_policy.data.benchmarks import BENCHMARKS, label
from internal_policy.data.prompts import TESTBED
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.evaluation.scoring import Scorer
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing, status
from internal_policy.utils.output import document
from internal_policy.utils.shell import figure_name

if TYPE_CHECKING:
    from internal_policy.evaluation.paired_tests import Comparison
    from internal_policy.evaluation.results import Evaluation

DATA = Path("data/evaluations")
FIGURES = Path("figures")
DEFAULTS = EvaluateConfig(model="testbed/qwen3", benchmark=TESTBED)


def evaluate(
    model: Annotated[
        list[str],
        common.Models,
    ],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(BENCHMARKS)}, a parquet, jsonl or json file, or a hub data set id; repeat for "
            "several.",
            show_default="math500; testbed for embedded models",
            autocompletion=common.completing(BENCHMARKS),
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = DEFAULTS.revision,
    samples: Annotated[
        int | None,
        typer.Option(help="Responses sampled per problem.", show_default="16; 32 for AIME; 1 at temperature 0"),
    ] = None,
    max_problems: Annotated[
        int | None, typer.Option(help="At most so many problems.", show_default="all")
    ] = DEFAULTS.max_problems,
    k: Annotated[
        list[int] | None,
        typer.Option(help="K of Pass@K; repeat for several.", show_default="1, 4, 16, 64, 256 up to --samples, and it"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="At most so many tokens a response.", show_default="what the checkpoint says, else 1024"),
    ] = DEFAULTS.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")] = DEFAULTS.temperature,
    generator: common.Generator = DEFAULTS.generator,
    template: common.Template = DEFAULTS.template,
    reward: Annotated[
        str | None, typer.Option(help="math, exact, or module:function.", show_default="math; exact for testbed")
    ] = DEFAULTS.reward,
    batch_size: Annotated[int, typer.Option(help="Responses sampled together.")] = DEFAULTS.batch_size,
    dtype: common.Dtype = DEFAULTS.dtype,
    device: common.Device = DEFAULTS.device,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = DEFAULTS.seed,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Directory of a stored evaluation of the same problems to compare with; repeat for several."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory for results.", show_default=f"{DATA}, figures in {FIGURES}"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over in a used output directory.")] = False,
    wait: common.Wait = False,
    trust_remote_code: common.TrustRemoteCode = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    debug: common.Debug = False,
) -> None:
    """Evaluate one or more models on benchmarks: Avg@K, Pass@K, paired comparison, figures."""
    options: dict[str, Any] = {
        "samples": samples,
        "max_problems": max_problems,
        "k": tuple(k) if k else None,
        "revision": revision,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "generator": generator,
        "template": template,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "reward": reward,
        "trust_remote_code": trust_remote_code,
    }
    embedded = all(name.startswith("testbed/") for name in model)
    sources = list(dict.fromkeys(benchmark or [TESTBED if embedded else "math500"]))
    names = list(dict.fromkeys(model))
    # A bad setting is told before anything heavy is imported, a bad model before another one is evaluated.
    slugs: dict[str, str] = {}
    configs: dict[tuple[str, str], EvaluateConfig] = {}
    for name in names:
        for source in sources:
            configs[name, source] = config = EvaluateConfig(model=name, benchmark=label(source), **options)
            slug = config.slug
            if slug in slugs:
                raise UserError(
                    f"{slugs[slug]} and {name} on {source} would both be written to {slug}; "
                    "evaluate them one by one, each with its own --output"
                )
            slugs[slug] = f"{name} on {source}"
    common.require_there(names, revision, *sources)
    for source in sources:
        Scorer(reward, exact=source == TESTBED)
    stored = _stored(against or [], sources, max_problems)
    root = DATA if output is None else expanded(output)
    from internal_policy.evaluation.results import find_finished

    ready = {(n, s): None if overwrite else find_finished(config, s, root) for (n, s), config in configs.items()}
    left = [name for name in names if None in (ready[name, source] for source in sources)]
    if left:
        with importing():
            from internal_policy import models
            from internal_policy.evaluation.pipeline import evaluate as run
    for name in left:
        with status(f"looking up {name}"):
            models.check(name, revision=revision, trust_remote_code=trust_remote_code)
    from internal_policy.cli import display_evaluation

    done = []
    # All of them from the start: a directory in use is told before another model is evaluated.
    with locked(*(root / slug for slug in slugs), wait=wait):
        for name in names:
            for source in sources:
                evaluation = ready[name, source]
                if evaluation is None:
                    evaluation = run(name, source, output=root, overwrite=overwrite, wait=wait, **options)
                display_evaluation.show(evaluation)
                done.append(evaluation)
    compared = _compare(done, stored)
    # The same model may have been stored before it was trained further: a figure has each name once.
    known = {(e.name, e.benchmark) for e in done}
    drawn = [*done, *(e for e in stored if (e.name, e.benchmark) not in known)]
    if len(drawn) > 1:
        display_evaluation.show_summary(drawn)
    draw(drawn, FIGURES if output is None else root / "figures")
    evaluations = [{**common.told(e), "intervals": e.pass_at_k} for e in done]
    document({"command": "evaluate", "evaluations": evaluations, "comparisons": [asdict(c) for c in compared]})


def _stored(directories: list[Path], sources: list[str], max_problems: int | None) -> list[Evaluation]:
    """The evaluations to compare with; refused before the work where none of the benchmarks has their problems."""
    if not directories:
        return []
    from internal_policy.data import benchmarks
    from internal_policy.evaluation.results import Evaluation

    problems = {s: [(p.problem, p.answer or "") for p in benchmarks.read_benchmark(s, max_problems)] for s in sources}
    digests = {benchmarks.digest(pairs) for pairs in problems.values()}
    stored = [Evaluation.load(path) for path in directories]
    for evaluation in stored:
        if evaluation.digest() not in digests:
            asked = ", ".join(f"the {len(pairs)} of {source}" for source, pairs in problems.items())
            raise UserError(
                f"{evaluation.path}: was evaluated on {counted(evaluation.n_problems, 'problem')} of "
                f"{evaluation.benchmark}, and asked for are {asked}; give the same --benchmark and --max-problems"
            )
    return stored


def _compare(done: list[Evaluation], stored: list[Evaluation]) -> list[Comparison]:
    """Print the first of two models less the second, and every model less each stored one, where problems agree."""
    from internal_policy.cli import display_evaluation
    from internal_policy.evaluation.paired_tests import compare

    names = list(dict.fromkeys(e.name for e in done))
    pairs = [(a, b) for a in done for b in stored]
    if len(names) == 2:
        pairs += [(a, b) for a in done for b in done if (a.name, b.name) == tuple(names)]
    compared = [compare(a, b) for a, b in pairs if a.digest() == b.digest()]
    for comparison in compared:
        display_evaluation.show_comparison(comparison)
    return compared


def draw(evaluations: list[Evaluation], root: Path) -> None:
    """Draw figures 6 and 15, and list the files.

    Args:
        evaluations: what is drawn.
        root: below it a directory named by models and benchmarks is written.

    Raises:
        UserError: it cannot be written.
    """
    from internal_policy.cli import display
    from internal_policy.data.benchmarks import slug
    from internal_policy.plotting import evaluation as evaluation_figures

    models = dict.fromkeys(slug(e.name) for e in evaluations)
    benchmarks = dict.fromkeys(slug(e.benchmark) for e in evaluations)
    directory = root / figure_name([(name, "policy") for name in (*models, *benchmarks)])
    with writing(directory):
        paths = evaluation_figures.save_evaluation_figures(evaluations, directory)
    display.list_files("figures", paths)
