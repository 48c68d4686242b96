"""Evaluations and comparisons on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from internal_policy.cli.display import files_of, list_files
from internal_policy.data.benchmarks import title
from internal_policy.evaluation.paired_tests import Comparison
from internal_policy.evaluation.results import Evaluation
from internal_policy.utils.console import console as open_console
from internal_policy.utils.console import percent_span, plus_minus, table
from internal_policy.utils.errors import counted


def show(evaluation: Evaluation) -> None:
    """Print an evaluation on standard output.

    Args:
        evaluation: the evaluation.
    """
    console = open_console()
    console.print(rate_table(evaluation))
    total = evaluation.n_problems * evaluation.n_samples
    console.print(f"mean length {evaluation.mean_length:.1f} tokens")
    if evaluation.n_truncated:
        console.print(
            f"{evaluation.n_truncated} of {counted(total, 'response')} reached the limit of tokens before they ended "
            "(--max-new-tokens)"
        )
    if evaluation.failures:
        told = ", ".join(f"{n} {kind}" for kind, n in evaluation.failures.items())
        console.print(f"the verifier failed on some responses, which count as wrong: {told}")
    if evaluation.path is not None:
        list_files("evaluation", files_of(evaluation.path))


def rate_table(evaluation: Evaluation) -> Table:
    """Lay out Avg@K and Pass@K, in percent with 95% intervals.

    Args:
        evaluation: the evaluation.

    Returns:
        A rich table.
    """
    shown = table(
        f"{evaluation.name} on {title(evaluation.benchmark)}: "
        f"{counted(evaluation.n_problems, 'problem')} x {counted(evaluation.n_samples, 'sample')}",
        "percent, with 95% intervals over problems",
        *("", "%", "95% interval"),
        min_width=64,
    )
    avg = evaluation.avg
    shown.add_row(f"Avg@{evaluation.n_samples}", f"{100 * avg['mean']:.2f}", percent_span(avg["low"], avg["high"]))
    for row in evaluation.pass_at_k.to_dict("records"):
        shown.add_row(f"Pass@{row['k']}", f"{100 * row['value']:.2f}", percent_span(row["low"], row["high"]))
    return shown


def show_comparison(comparison: Comparison) -> None:
    """Print a comparison on standard output.

    Args:
        comparison: the comparison.
    """
    console = open_console()
    console.print(difference_table(comparison))
    c = comparison
    console.print(
        f"{c.first} is better on {c.n_better} of {counted(c.n_problems, 'problem')}, worse on {c.n_worse}, "
        f"equal on {c.n_equal}; p {_p(c.p_value)} (paired t), {_p(c.p_permutation)} (sign flips)"
    )
    if c.differing:
        told = ", ".join(f"{name} {one} against {other}" for name, (one, other) in c.differing.items())
        console.print(Text(f"settings differ too: {told}", style="yellow"))


def difference_table(comparison: Comparison) -> Table:
    """Lay out the differences, in percentage points with 95% intervals.

    Args:
        comparison: the comparison.

    Returns:
        A rich table.
    """
    shown = table(
        f"{comparison.first} less {comparison.second} on {title(comparison.benchmark)}",
        "percentage points, paired by problem, with 95% intervals",
        *("", "difference", "95% interval"),
        min_width=64,
    )
    shown.add_row("Avg@K", f"{100 * comparison.difference:+.2f}", percent_span(comparison.low, comparison.high, "+"))
    for row in comparison.pass_at_k.to_dict("records"):
        shown.add_row(f"Pass@{row['k']}", f"{100 * row['difference']:+.2f}", percent_span(row["low"], row["high"], "+"))
    return shown


def show_summary(evaluations: Sequence[Evaluation]) -> None:
    """Print Avg@K of several models and benchmarks, a row a model.

    Args:
        evaluations: the evaluations.
    """
    benchmarks = list(dict.fromkeys(e.benchmark for e in evaluations))
    averaged = ("average",) if len(benchmarks) > 1 else ()
    shown = table(
        "Avg@K, percent ± standard error",
        None,
        *("model", *(title(name) for name in benchmarks), *averaged),
        fold=("model",),
        min_width=64,
    )
    for model in dict.fromkeys(e.name for e in evaluations):
        own = {e.benchmark: e.avg for e in evaluations if e.name == model}
        cells = [f"{100 * own[b]['mean']:.2f}{plus_minus(100 * own[b]['stderr'], '.2f')}" for b in benchmarks]
        if averaged:
            mean = sum(a["mean"] for a in own.values()) / len(own)
            stderr = math.sqrt(sum(a["stderr"] ** 2 for a in own.values())) / len(own)
            cells.append(f"{100 * mean:.2f}{plus_minus(100 * stderr, '.2f')}")
        shown.add_row(model, *cells)
    open_console().print(shown)


def _p(p: float) -> str:
    return "not defined" if math.isnan(p) else "below 0.0001" if p < 1e-4 else f"{p:.2g}"
