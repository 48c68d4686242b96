"""The command `internal-policy evaluate`: Avg@K and Pass@K of models on benchmarks, compared and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import EMBEDDED, PromptOptions
from internal_policy.cli.command import ResumeOptions, require_paths, to_json
from internal_policy.data.benchmarks import BENCHMARKS, label
from internal_policy.data.prompts import TESTBED
from internal_policy.evaluation.config import EvaluateConfig, EvaluateOptions
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.locks import locked, writing
from internal_policy.utils.logging import importing, status
from internal_policy.utils.options import option
from internal_policy.utils.output import print_json
from internal_policy.utils.shell import figure_name

if TYPE_CHECKING:
    from internal_policy.evaluation.paired_tests import Comparison
    from internal_policy.evaluation.results import Evaluation

DATA = Path("data/evaluations")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluateOptions, PromptOptions, ResumeOptions):
    """Evaluate one or more models on benchmarks: Avg@K, Pass@K, paired comparison, figures."""

    model: tuple[str, ...] = option(completions=EMBEDDED)
    """Hub id, local directory, testbed/qwen3 or testbed/llama; repeat for several."""
    benchmark: tuple[str, ...] = option((), completions=BENCHMARKS)
    """math500, amc23, aime24, aime25, testbed, a parquet, jsonl or json file, or a hub data set id; repeat for several.
    Default: math500, or testbed for embedded models."""
    k: tuple[int, ...] = ()
    """K of Pass@K; repeat for several. Default: 1, 4, 16, 64, 256 up to --samples, and --samples itself."""
    against: tuple[Path, ...] = ()
    """Directory of a stored evaluation of the same problems to compare with; repeat for several."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        names, sources, options = self.models, self.benchmarks, self.settings()
        # Bad settings are refused before anything heavy is imported, a bad model before another one is evaluated.
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
        require_paths(names, self.revision, *sources)
        from internal_policy.rewards.scoring import Scorer

        for source in sources:
            Scorer(self.reward, exact=source == TESTBED)
        stored = _stored(self.against, sources, self.max_problems)
        root, figures = self.place(DATA)
        from internal_policy.evaluation.results import find_finished

        fresh = self.overwrite
        ready = {(n, s): None if fresh else find_finished(config, s, root) for (n, s), config in configs.items()}
        left = [name for name in names if None in (ready[name, source] for source in sources)]
        if left:
            with importing():
                from internal_policy import models
                from internal_policy.evaluation.pipeline import evaluate
        for name in left:
            with status(f"looking up {name}"):
                models.check(name, revision=self.revision, trust_remote_code=self.trust_remote_code)
        from internal_policy.cli.display_runs import show_evaluation, show_evaluations

        done = []
        # All are locked from the start, so that a directory in use is refused before another model is evaluated.
        with locked(*(root / slug for slug in slugs), wait=self.wait):
            for name in names:
                for source in sources:
                    evaluation = ready[name, source]
                    if evaluation is None:
                        evaluation = evaluate(
                            name, source, output=root, overwrite=self.overwrite, wait=self.wait, **options
                        )
                    show_evaluation(evaluation)
                    done.append(evaluation)
        compared = _compare(done, stored)
        # A model may have been stored before it was trained further, and a figure shows each name once.
        known = {(e.name, e.benchmark) for e in done}
        drawn = [*done, *(e for e in stored if (e.name, e.benchmark) not in known)]
        if len(drawn) > 1:
            show_evaluations(drawn)
        draw(drawn, figures)
        evaluations = [{**to_json(e), "intervals": e.pass_at_k} for e in done]
        print_json({"command": "evaluate", "evaluations": evaluations, "comparisons": [asdict(c) for c in compared]})

    @property
    def models(self) -> list[str]:
        """The models, each once."""
        return list(dict.fromkeys(self.model))

    @property
    def benchmarks(self) -> list[str]:
        """The benchmarks, each once, whether given or the default."""
        embedded = all(name.startswith("testbed/") for name in self.model)
        return list(dict.fromkeys(self.benchmark)) or [TESTBED if embedded else "math500"]

    def settings(self) -> dict[str, Any]:
        """The keywords of ``evaluate`` that apply to every model and benchmark of the command."""
        names = [each.name for config in (EvaluateOptions, PromptOptions) for each in fields(config)]
        return {**{name: getattr(self, name) for name in names}, "k": self.k or None}


def _stored(directories: Sequence[Path], sources: list[str], max_problems: int | None) -> list[Evaluation]:
    """Load the evaluations to compare with; they are refused if no benchmark has the same problems."""
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
                f"{evaluation.benchmark}, but this command uses {asked}; give the same --benchmark and --max-problems"
            )
    return stored


def _compare(done: list[Evaluation], stored: list[Evaluation]) -> list[Comparison]:
    """Compare two models, and each model with each stored evaluation, if they have the same problems; print all."""
    from internal_policy.cli.display_runs import show_paired_difference
    from internal_policy.evaluation.paired_tests import compare

    names = list(dict.fromkeys(e.name for e in done))
    pairs = [(a, b) for a in done for b in stored]
    if len(names) == 2:
        pairs += [(a, b) for a in done for b in done if (a.name, b.name) == tuple(names)]
    compared = [compare(a, b) for a, b in pairs if a.digest() == b.digest()]
    for comparison in compared:
        show_paired_difference(comparison)
    return compared


def draw(evaluations: list[Evaluation], root: Path) -> None:
    """Draw figures 6 and 15 into a directory below `root` named by models and benchmarks, and list the files."""
    from internal_policy.cli.display import list_files
    from internal_policy.data.benchmarks import slug
    from internal_policy.plotting import evaluation as evaluation_figures

    models = dict.fromkeys(slug(e.name) for e in evaluations)
    benchmarks = dict.fromkeys(slug(e.benchmark) for e in evaluations)
    directory = root / figure_name([(name, "policy") for name in (*models, *benchmarks)])
    with writing(directory):
        paths = evaluation_figures.save_evaluation_figures(evaluations, directory)
    list_files("figures", paths)
