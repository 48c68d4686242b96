"""The command `internal-policy evaluate`: Avg@K and Pass@K of models or their layers, compared and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.config import EMBEDDED, PromptOptions
from internal_policy.cli.command import ResumeOptions, require_paths, to_json
from internal_policy.data.benchmarks import BENCHMARKS, label
from internal_policy.data.prompts import TESTBED
from internal_policy.evaluation.config import EvaluateConfig, EvaluateOptions
from internal_policy.models.options import DEFAULT_LENS
from internal_policy.utils.errors import UserError, counted
from internal_policy.utils.io import expanded
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
    """Evaluate models, or their internal policies, on benchmarks: Avg@K, Pass@K, paired comparison, figures."""

    model: tuple[str, ...] = option(completions=EMBEDDED)
    """Hub id, local directory, testbed/qwen3 or testbed/llama; repeat for several."""
    benchmark: tuple[str, ...] = option((), completions=BENCHMARKS)
    """math500, amc23, aime24, aime25, testbed, a parquet, jsonl or json file, or a hub data set id; repeat for several.
    Default: math500, or testbed for embedded models."""
    k: tuple[int, ...] = ()
    """K of Pass@K; repeat for several. Default: 1, 4, 16, 64, 256 up to --samples, and --samples itself."""
    layer: int | None = option(None, least=1)
    """Sample from the internal policy of this layer, counted from 1, with no layer above it running. Default: from the
    model's own policy."""
    layers: str | None = option(None, completions=("all",))
    """The same for several layers, one after the other, with a table and a figure over depth: all, or numbers and
    ranges such as 2,4-6."""
    against: tuple[Path, ...] = ()
    """Directory of a stored evaluation of the same problems to compare with; repeat for several."""

    def run(self) -> None:
        """Run the command; options that contradict each other and bad input raise a `UserError`."""
        names, sources, options = self.models, self.benchmarks, self.settings()
        # Bad settings are refused before anything heavy is imported, a bad model before another one is evaluated.
        slugs: dict[str, str] = {}
        single: dict[tuple[str, str], EvaluateConfig] = {}
        for name in names:
            for source in sources:
                # With --layers the settings are checked with any layer first.
                layer = self.layer if self.layers is None else 1
                single[name, source] = config = EvaluateConfig(
                    model=name, benchmark=label(source), layer=layer, **options
                )
                slug = config.slug
                if slug in slugs:
                    raise UserError(
                        f"{slugs[slug]} and {name} on {source} would both be written to {slug}; "
                        "evaluate them one by one, each with its own --output"
                    )
                slugs[slug] = f"{name} on {source}"
        require_paths(names, self.revision, *sources)
        configs = self._with_layers(single)
        from internal_policy.rewards.scoring import Scorer

        for source in sources:
            Scorer(self.reward, exact=source == TESTBED)
        stored = _stored(self.against, sources, self.max_problems)
        root, figures = self.place(DATA)
        from internal_policy.evaluation.results import find_finished

        ready = {
            (name, source): [None if self.overwrite else find_finished(each, source, root) for each in own]
            for (name, source), own in configs.items()
        }
        left = [name for name in names if any(None in ready[name, source] for source in sources)]
        if left:
            with importing():
                from internal_policy import models
                from internal_policy.evaluation.pipeline import evaluate, evaluate_layers
        for name in left:
            with status(f"looking up {name}"):
                models.check(name, revision=self.revision, trust_remote_code=self.trust_remote_code)
        from internal_policy.cli.display_runs import show_depth, show_evaluation, show_evaluations

        done: list[Evaluation] = []
        place: dict[str, Any] = {"output": root, "overwrite": self.overwrite, "wait": self.wait}
        # All are locked from the start, so that a directory in use is refused before another model is evaluated.
        with locked(*(root / each.slug for own in configs.values() for each in own), wait=self.wait):
            for (name, source), own in configs.items():
                found = [evaluation for evaluation in ready[name, source] if evaluation is not None]
                if self.layers is None:
                    found = found or [evaluate(name, source, layer=self.layer, **place, **options)]
                    show_evaluation(found[0])
                else:
                    missing = [c.layer or 0 for c, e in zip(own, ready[name, source], strict=True) if e is None]
                    if missing:
                        found += evaluate_layers(name, source, layers=missing, **place, **options)
                    found.sort(key=lambda evaluation: evaluation.layer or 0)
                    show_depth(found)
                done += found
        compared = _compare(done, stored, self.seed)
        # A model may have been stored before it was trained further, and a figure shows each name once.
        known = {(e.name, e.benchmark) for e in done}
        drawn = [*done, *(e for e in stored if (e.name, e.benchmark) not in known)]
        if len(drawn) > 1 and self.layers is None:
            show_evaluations(drawn)
        draw(drawn, figures)
        evaluations = [{**to_json(e), "intervals": e.pass_at_k} for e in done]
        document: dict[str, Any] = {"evaluations": evaluations, "comparisons": [asdict(c) for c in compared]}
        if self.layer is not None or self.layers is not None:
            from internal_policy.evaluation.depth import depth_table

            document["depth"] = depth_table(done)
        print_json({"command": "evaluate", **document})

    def _with_layers(
        self, single: dict[tuple[str, str], EvaluateConfig]
    ) -> dict[tuple[str, str], list[EvaluateConfig]]:
        """The settings of each evaluation: one for each model and benchmark, or one for each of its layers."""
        if self.layer is None and self.layers is None:
            return {key: [config] for key, config in single.items()}
        if self.layer is not None and self.layers is not None:
            raise UserError(f"both --layer {self.layer} and --layers {self.layers} were given; give one of them")
        from internal_policy.evaluation.depth import choose_layers, require_layer

        found = {}
        for key, config in single.items():
            if self.layer is not None:
                require_layer(self.layer, config)
            chosen = [self.layer] if self.layers is None else choose_layers(self.layers, config)
            found[key] = [replace(config, layer=layer) for layer in chosen]
        return found

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
    """Load the evaluations to compare with.

    They are refused if no benchmark has the same problems, or if two cannot be told apart in the tables and figures.
    """
    if not directories:
        return []
    from internal_policy.data import benchmarks
    from internal_policy.evaluation.results import EVALUATION, Evaluation

    problems = {s: [(p.problem, p.answer or "") for p in benchmarks.read_benchmark(s, max_problems)] for s in sources}
    digests = {benchmarks.digest(pairs) for pairs in problems.values()}
    # The same directory may be written in several ways.
    stored = list({EVALUATION.find(expanded(path)).resolve(): Evaluation.load(path) for path in directories}.values())
    known: dict[tuple[str, str], Evaluation] = {}
    for evaluation in stored:
        first = known.setdefault((evaluation.name, evaluation.benchmark), evaluation)
        if first is not evaluation:
            raise UserError(
                f"--against names two evaluations of {evaluation.name} on {evaluation.benchmark}, {first.path} and "
                f"{evaluation.path}, which would have one name; give one of them, and the other in a second command"
            )
        if evaluation.digest() not in digests:
            asked = ", ".join(f"the {len(pairs)} of {source}" for source, pairs in problems.items())
            raise UserError(
                f"{evaluation.path}: was evaluated on {counted(evaluation.n_problems, 'problem')} of "
                f"{evaluation.benchmark}, but this command uses {asked}; give the same --benchmark and --max-problems"
            )
    return stored


def _compare(done: list[Evaluation], stored: list[Evaluation], seed: int) -> list[Comparison]:
    """Compare two models, and each model with each stored evaluation, if they have the same problems; print all."""
    from internal_policy.cli.display_runs import show_paired_difference
    from internal_policy.evaluation.paired_tests import compare

    names = list(dict.fromkeys(e.name for e in done))
    pairs = [(a, b) for a in done for b in stored]
    if len(names) == 2:
        pairs += [(a, b) for a in done for b in done if (a.name, b.name) == tuple(names)]
    compared = [compare(a, b, seed=seed) for a, b in pairs if a.digest() == b.digest()]
    for comparison in compared:
        show_paired_difference(comparison)
    return compared


def draw(evaluations: list[Evaluation], root: Path) -> None:
    """Draw figures 6 and 15, of several layers accuracy over depth, and list the files.

    They are written into a directory below `root` that is named by models and benchmarks, of layers also by site and
    lens.
    """
    from internal_policy.cli.display import list_files
    from internal_policy.data.benchmarks import slug
    from internal_policy.plotting.depth import save_depth_figures
    from internal_policy.plotting.evaluation import save_evaluation_figures

    internal = [e for e in evaluations if e.layer is not None]
    over_depth = len(internal) > 1
    usual = [e for e in evaluations if e.layer is None] if over_depth else evaluations
    parts: list[tuple[Any, list[Evaluation], list[str], list[str]]] = []
    if usual:
        parts.append((save_evaluation_figures, usual, [e.name for e in usual], []))
    if over_depth:
        sites = ["layers" if e.site == "layer" else str(e.site) for e in internal]
        lenses = [str(e.lens) for e in internal if e.lens != DEFAULT_LENS]
        parts.append((save_depth_figures, evaluations, [e.model_name for e in internal], [*sites, *lenses]))
    for save, drawn, models, policies in parts:
        names = [*map(slug, models), *(slug(e.benchmark) for e in drawn), *policies]
        directory = root / figure_name([(name, "policy") for name in dict.fromkeys(names)])
        with writing(directory):
            paths = save(drawn, directory)
        list_files("figures", paths)
