"""A training run on the terminal: its phases, layer and evaluation, and where its files are."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from internal_policy.bupo.run import Run
from internal_policy.cli.display import files_of, list_files
from internal_policy.utils.console import console as open_console
from internal_policy.utils.console import percent_span, table
from internal_policy.utils.errors import counted


def show(run: Run) -> None:
    """Print a run on standard output.

    Args:
        run: the run.
    """
    console = open_console()
    phases = table(
        f"{run.name}: {run.label}",
        "first and last step of each phase; rewards are means over its rollouts",
        *("phase", "steps", "reward", "H(π_θ), nats", "tokens"),
        left=("phase",),
    )
    for phase, rows in _phases(run):
        ends = rows.iloc[[0, -1]]
        spans = [_pair(ends, name, digits) for name, digits in (("reward", 3), ("policy_entropy", 3), ("length", 1))]
        phases.add_row(phase, f"{ends['step'].iloc[0]}-{ends['step'].iloc[1]}", *spans)
    console.print(phases)
    if run.layer is not None:
        console.print(Text.assemble((f"layer {run.layer}", "bold"), f": {run.layer_reason}"))
        console.print(f"internal policy alignment ended after {counted(run.ipa_steps, 'step')}: {run.ipa_reason}")
    _show_evaluation(run, console)
    if failed := ", ".join(f"{n} {kind}" for kind, n in run.failures.items() if n):
        console.print(Text(f"the reward failed on some responses, which count as 0: {failed}", style="yellow"))
    console.print(f"model: {run.model_dir}/", soft_wrap=True)
    list_files("run", files_of(run.path))


def _phases(run: Run) -> list[tuple[str, Any]]:
    if run.history.empty:
        return []
    return [(str(name), rows) for name, rows in run.history.groupby("phase", sort=False)]


def _pair(ends: Any, column: str, digits: int) -> str:
    if column not in ends:
        return "-"
    first, last = ends[column]
    return f"{first:.{digits}f} → {last:.{digits}f}"


def _show_evaluation(run: Run, console: Console) -> None:
    start, trained = run.evaluation_start, run.evaluation
    if trained is None:
        console.print("not evaluated; --benchmark evaluates start and result, `internal-policy evaluate` any model")
    if start is None or trained is None:
        return
    from internal_policy.data.benchmarks import title
    from internal_policy.evaluation import compare

    change = compare(trained, start)
    shown = table(
        f"{title(trained.benchmark)}: {counted(trained.n_problems, 'problem')} x "
        f"{counted(trained.n_samples, 'sample')}",
        "percent, with 95% intervals over problems; the difference is paired by problem",
        *("", f"Avg@{trained.n_samples}", "95% interval"),
        left=("",),
        min_width=64,
    )
    for name, avg in (("start", start.avg), ("trained", trained.avg)):
        shown.add_row(name, f"{100 * avg['mean']:.2f}", percent_span(avg["low"], avg["high"]))
    shown.add_row("difference", f"{100 * change.difference:+.2f}", percent_span(change.low, change.high, "+"))
    console.print(shown)
    p = change.p_permutation
    console.print(
        f"better on {counted(change.n_better, 'problem')}, worse on {change.n_worse}, equal on {change.n_equal}; "
        f"p {'below 0.0001' if p < 1e-4 else f'{p:.2g}'} (sign flips)"
    )
