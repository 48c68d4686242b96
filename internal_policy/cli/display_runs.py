"""Evaluations, training runs and inspections on the terminal.

An inspection shows the most probable token and the entropy of each policy, coloured by entropy. Without colours
(``NO_COLOR``, a file, a pipe) the same text says the same.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from internal_policy.bupo.run import Run
from internal_policy.cli.display import files_of, list_files
from internal_policy.data.benchmarks import title
from internal_policy.evaluation.config import SITE_NAMES
from internal_policy.evaluation.depth import depth_table
from internal_policy.evaluation.paired_tests import Comparison
from internal_policy.evaluation.paired_tests import compare as compare_evaluations
from internal_policy.evaluation.results import Evaluation
from internal_policy.inspection.config import Site, Span
from internal_policy.inspection.figure_data import inspection_data
from internal_policy.inspection.results import Inspection
from internal_policy.plotting.inspection import TITLES, cell_colors
from internal_policy.utils.console import console as open_console
from internal_policy.utils.console import percent_span, plus_minus, table
from internal_policy.utils.errors import counted

_MAX_TOKEN_WIDTH, _MIN_TOKEN_WIDTH = 9, 3
_NUMBER_WIDTH = 4
_HIT, _BORDER = "✓", "│"
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"
_POLICY, _NEXT, _READ = "π_θ", "next", "read"


def show_evaluation(evaluation: Evaluation) -> None:
    """Print an evaluation on standard output."""
    console = open_console()
    console.print(rate_table(evaluation))
    total = evaluation.n_problems * evaluation.n_samples
    console.print(f"mean length {evaluation.mean_length:.1f} tokens")
    if evaluation.n_truncated:
        console.print(
            f"{evaluation.n_truncated} of {counted(total, 'response')} reached the limit of tokens before they ended "
            "(--max-new-tokens)"
        )
    if evaluation.layer is not None:
        console.print(_agreement_text(evaluation))
    if evaluation.failures:
        failures = ", ".join(f"{n} {kind}" for kind, n in evaluation.failures.items())
        console.print(f"the verifier failed on some responses, which count as wrong: {failures}")
    if evaluation.path is not None:
        list_files("evaluation", files_of(evaluation.path))


def _agreement_text(evaluation: Evaluation) -> str:
    rows: Any = depth_table(evaluation).set_index("quantity")
    same = rows.loc["agreement"]
    kl, own, final = rows.loc[["kl", "log_prob", "policy_log_prob"], "value"]
    return (
        f"the most probable token is that of π_θ at {100 * same['value']:.2f}% of the tokens "
        f"({percent_span(same['low'], same['high'])}); KL to π_θ {kl:.3f} nats; log-probability of the tokens "
        f"{own:.3f} nats under {evaluation.policy_label}, {final:.3f} under π_θ"
    )


def show_depth(evaluations: Sequence[Evaluation]) -> None:
    """Print evaluations of the layers of one model on one benchmark as one table, and list their directories."""
    first = evaluations[0]
    site = "" if first.site == "layer" else f", {SITE_NAMES[str(first.site)]}"
    shown = table(
        f"{first.model_name} on {title(first.benchmark)}{site}: "
        f"{counted(first.n_problems, 'problem')} x {counted(first.n_samples, 'sample')} of each layer",
        "percent and tokens, with 95% intervals over problems; agreement: share of tokens at which the most probable "
        "token is that of π_θ",
        *("layer", f"Avg@{first.n_samples}", f"Pass@{int(first.pass_at_k['k'].iloc[-1])}", "truncated", "tokens"),
        "agreement",
    )
    frame = depth_table(evaluations)
    names = ("avg", f"pass@{int(first.pass_at_k['k'].iloc[-1])}", "truncated", "length", "agreement")
    for layer, rows in frame.groupby("layer"):
        own: Any = rows.set_index("quantity")
        shown.add_row(str(layer), *(_with_span(own.loc[name], 1 if name == "length" else 100) for name in names))
    console = open_console()
    console.print(shown)
    for evaluation in evaluations:
        if evaluation.path is not None:
            list_files("evaluation", files_of(evaluation.path))


def _with_span(row: Any, scale: int) -> str:
    """A mean with the ends of its interval, such as ``71.9 62-80``: five of them fit in 80 columns."""
    ends = "" if math.isnan(row["low"]) else f" {scale * row['low']:.0f}-{scale * row['high']:.0f}"
    return f"{scale * row['value']:.1f}{ends}"


def rate_table(evaluation: Evaluation) -> Table:
    """Lay out Avg@K and Pass@K, in percent with 95% intervals."""
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


def show_paired_difference(comparison: Comparison) -> None:
    """Print a comparison of two evaluations on standard output."""
    console = open_console()
    console.print(paired_difference_table(comparison))
    c = comparison
    console.print(
        f"{c.first} is better on {c.n_better} of {counted(c.n_problems, 'problem')}, worse on {c.n_worse}, "
        f"equal on {c.n_equal}; p {_format_p(c.p_value)} (paired t), {_format_p(c.p_permutation)} (sign flips)"
    )
    if c.differing:
        pairs = ", ".join(f"{name} {one} against {other}" for name, (one, other) in c.differing.items())
        console.print(Text(f"settings differ too: {pairs}", style="yellow"))


def paired_difference_table(comparison: Comparison) -> Table:
    """Lay out the differences, in percentage points with 95% intervals."""
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


def show_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """Print Avg@K of several models and benchmarks, one row per model.

    The average is over the benchmarks that all models have; there is none where these are fewer than two.
    """
    benchmarks = list(dict.fromkeys(e.benchmark for e in evaluations))
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for e in evaluations:
        rates.setdefault(e.name, {})[e.benchmark] = e.avg
    shared = [b for b in benchmarks if all(b in own for own in rates.values())]
    averaged = len(shared) > 1
    partly = averaged and len(shared) < len(benchmarks)
    shown = table(
        "Avg@K, percent ± standard error",
        f"average: of {', '.join(map(title, shared))}, on which all models were evaluated" if partly else None,
        *("model", *map(title, benchmarks), *(("average",) if averaged else ())),
        fold=("model",),
        min_width=64,
    )
    for model, own in rates.items():
        cells = [_percent(own[b]["mean"], own[b]["stderr"]) if b in own else "-" for b in benchmarks]
        if averaged:
            mean = sum(own[b]["mean"] for b in shared) / len(shared)
            stderr = math.sqrt(sum(own[b]["stderr"] ** 2 for b in shared)) / len(shared)
            cells.append(_percent(mean, stderr))
        shown.add_row(model, *cells)
    open_console().print(shown)


def _percent(mean: float, stderr: float) -> str:
    return f"{100 * mean:.2f}{plus_minus(100 * stderr, '.2f')}"


def _format_p(p: float) -> str:
    return "not defined" if math.isnan(p) else "below 0.0001" if p < 1e-4 else f"{p:.2g}"


def show_run(run: Run) -> None:
    """Print a training run on standard output."""
    console = open_console()
    phases = table(
        f"{run.name}: {run.label}",
        "first and last step of each phase; rewards are means over its rollouts",
        *("phase", "steps", "reward", "H(π_θ), nats", "tokens"),
        left=("phase",),
    )
    for phase, rows in run.history.groupby("phase", sort=False) if len(run.history) else ():
        ends = rows.iloc[[0, -1]]
        spans = [
            _first_to_last(ends, name, digits) for name, digits in (("reward", 3), ("policy_entropy", 3), ("length", 1))
        ]
        phases.add_row(str(phase), f"{ends['step'].iloc[0]}-{ends['step'].iloc[1]}", *spans)
    console.print(phases)
    if run.layer is not None:
        console.print(Text.assemble((f"layer {run.layer}", "bold"), f": {run.layer_reason}"))
        console.print(f"internal policy alignment ended after {counted(run.ipa_steps, 'step')}: {run.ipa_reason}")
    _show_evaluation(run, console)
    if failed := ", ".join(f"{n} {kind}" for kind, n in run.failures.items() if n):
        console.print(Text(f"the reward failed on some responses, which count as 0: {failed}", style="yellow"))
    console.print(f"model: {run.model_dir}/", soft_wrap=True)
    list_files("run", files_of(run.path))


def _first_to_last(ends: Any, column: str, digits: int) -> str:
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
    change = compare_evaluations(trained, start)
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
        f"p {_format_p(p)} (sign flips)"
    )


def show_inspection(
    inspection: Inspection,
    site: Site = "layer",
    *,
    tokens: Span | None = None,
    last: int | None = None,
    console: Console | None = None,
) -> None:
    """Print one site's policies: one row per layer, one column per token, as many as fit the width of the terminal.

    `tokens` selects tokens, from 1; `last` a number of them at the end, 24 if neither is given.
    """
    console = console or open_console()
    lens = "" if inspection.lens == "policy" else f", lens {inspection.lens}"
    places = inspection.positions(tokens, last)
    span = f"tokens {places[0]} to {places[-1]} of {inspection.n_tokens}, {inspection.prompt_length} in the prompt"
    _print(console, Text(f"{inspection.name}: {TITLES[site]} policies{lens}; {span}", style="bold"))
    for block in blocks(inspection, site, tokens=tokens, last=last, width=console.width):
        for line in block:
            _print(console, line)
        _print(console, Text())
    _print(
        console,
        Text(
            f"cells: top token and entropy in nats (ln V = {math.log(inspection.vocab_size):.2f}); "
            f"{_HIT} it came next; {_BORDER} the response begins"
        ),
        wrap=True,
    )


def blocks(
    inspection: Inspection,
    site: Site = "layer",
    *,
    tokens: Span | None = None,
    last: int | None = None,
    width: int = 80,
) -> Iterator[list[Text]]:
    """Lay out one site's policies in blocks of columns for a terminal of some width; arguments as `show_inspection`.

    Yields:
        The lines of each block: positions, next tokens, the final policy, layers from L to 1, tokens read.
    """
    frame = inspection_data(inspection, [site], tokens=tokens, last=last)
    label = max(len(str(inspection.n_layers)), cell_len(_NEXT)) + 1
    widest = max(cell_len(text) for text in frame["top1_token"])
    word = min(max(widest, _MIN_TOKEN_WIDTH), _MAX_TOKEN_WIDTH, max(1, width - label - _NUMBER_WIDTH - 2))
    # A border or a space, the token, the mark of a hit or a space, and the number.
    cell = word + _NUMBER_WIDTH + 2
    columns = frame.drop_duplicates("position").reset_index(drop=True)
    room = max(1, (width - label) // cell)
    for start in range(0, len(columns), room):
        shown = columns.iloc[start : start + room]
        own = frame[frame["position"].isin(shown["position"])]
        borders = [_BORDER if p == inspection.prompt_length + 1 else " " for p in shown["position"]]
        yield list(_block(own, shown, borders, label, word, inspection))


def _block(
    own: pd.DataFrame, shown: pd.DataFrame, borders: Sequence[str], label: int, word: int, inspection: Inspection
) -> Iterator[Text]:
    def heading(name: str, texts: Sequence[str], shift: int) -> Text:
        line = Text(name.rjust(label - 1) + " ")
        for position, text, border in zip(shown["position"], texts, borders, strict=True):
            style = "dim" if position + shift <= inspection.prompt_length else "bold"
            line.append(border).append(_fit_width(text, word + _NUMBER_WIDTH + 1), style=style)
        return line

    yield heading("", [str(p) for p in shown["position"]], 0)
    yield heading(_NEXT, list(shown["next_token"]), 1)
    for site, layer in (("policy", inspection.n_layers), *((None, n) for n in range(inspection.n_layers, 0, -1))):
        rows = own[(own["layer"] == layer) & ((own["site"] == "policy") == (site == "policy"))]
        line = Text((_POLICY if site else str(layer)).rjust(label - 1) + " ")
        rgb, ink = cell_colors(rows["entropy"].to_numpy(), inspection.vocab_size)
        cells = zip(borders, rows["top1_token"], rows["hit"], rows["entropy"], rgb, ink, strict=True)
        for border, text, hit, entropy, colour, pen in cells:
            background = Color.from_rgb(*(255 * colour))
            written = f"{_fit_width(text, word)}{_HIT if hit else ' '}{_entropy(entropy)}"
            line.append(border).append(written, style=Style(color=str(pen), bgcolor=background))
        yield line
    yield heading(_READ, list(shown["token"]), 0)


def _entropy(entropy: float) -> str:
    """Four characters, from 0.00 to 12.3."""
    return f"{entropy:.2f}" if entropy < 9.995 else f"{entropy:.1f}"


def _fit_width(text: str, width: int) -> str:
    """Fit a token into a number of columns; text written from the right stays in its own cell."""
    short = text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip(" ") + "…"
    padding = " " * (width - cell_len(short))
    if any(unicodedata.bidirectional(character) in {"R", "AL"} for character in short):
        short = f"{_ISOLATE}{short}{_END_ISOLATE}"
    return short + padding


def _print(console: Console, line: Text, *, wrap: bool = False) -> None:
    console.print(line, no_wrap=not wrap, overflow="fold" if wrap else "crop", crop=not wrap)
