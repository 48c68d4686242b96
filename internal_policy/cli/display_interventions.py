"""Ablations and activation patching on the terminal."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import pandas as pd
from rich.table import Table

from internal_policy.cli.display import files_of, list_files
from internal_policy.interventions.figure_data import (
    TITLES,
    ablation_data,
    describe_how,
    describe_writes,
    layers_changed,
)
from internal_policy.interventions.patching_results import Patching
from internal_policy.interventions.results import Ablation
from internal_policy.utils.console import console as open_console
from internal_policy.utils.console import few_prompts, number, percent_span, plus_minus, table
from internal_policy.utils.errors import counted

_MOST_ROWS = 60
"""Interventions of a table; of more, those with the largest divergence are shown."""
_BEST = 12
_UNLIMITED = 1000
"""Columns in which every table fits."""


def show_ablation(ablation: Ablation) -> None:
    """Print an ablation on standard output."""
    console = open_console()
    console.print(effect_table(ablation, console.width))
    clean = ablation.clean
    line = f"without a change: H(π_θ) {clean['entropy']:.3f}, log-probability {clean['log_prob']:.3f}"
    if "accuracy" in clean:
        span = percent_span(clean["accuracy_low"], clean["accuracy_high"])
        line += f", accuracy {100 * clean['accuracy']:.1f}% ({span})"
    console.print(line)
    if ablation.failures:
        failures = "; ".join(
            f"{_name_intervention(ablation, number)} {', '.join(f'{n} {kind}' for kind, n in failed.items())}"
            for number, failed in ablation.failures.items()
        )
        console.print(f"the verifier failed on some responses, which count as wrong: {failures}")
    if (few := few_prompts(ablation.n_prompts)) is not None:
        console.print(few)
    if ablation.path is not None:
        list_files("ablation", files_of(ablation.path))


def _name_intervention(ablation: Ablation, number: int) -> str:
    """Name an intervention, from 1, by layer and what was changed there; 0 is the model without a change."""
    if number == 0:
        return "without a change:"
    row = ablation_data(ablation, ["kl"]).iloc[number - 1]
    together = layers_changed(ablation)
    layers = f"layer {row['layer']}" if together is None else f"layers {together}"
    return f"{layers}, {row['name']}:"


def effect_table(ablation: Ablation, width: int = 80) -> Table:
    """Lay out the interventions, one row each, with standard errors.

    Where a row does not fit, the columns are put closer together, and then the errors below what they belong to.

    Args:
        ablation: The ablation.
        width: Columns of the terminal.

    Returns:
        The table, which is at most as wide.
    """
    console = open_console()
    unlimited = console.options.update(width=_UNLIMITED)
    for stacked, close in ((False, False), (False, True), (True, False)):
        laid_out = _lay_out(ablation, stacked=stacked, close=close)
        if console.measure(laid_out, options=unlimited).maximum <= width:
            return laid_out
    return _lay_out(ablation, stacked=True, close=True)


def _lay_out(ablation: Ablation, *, stacked: bool, close: bool) -> Table:
    rows = ablation.table
    shown = rows
    if len(rows) > _MOST_ROWS:
        shown = rows.loc[rows["kl"].nlargest(_MOST_ROWS).index.sort_values()]
    part = next((part for part in ("head", "expert") if part in ablation.keys), None)
    together = layers_changed(ablation)
    # Layers that are changed together share a column, and parts are all of one site.
    hidden = {"last_layer", *(("site",) if part is not None else ()), *(() if len(set(rows["how"])) > 1 else ("how",))}
    keys = [key for key in ablation.keys if key not in hidden]
    note = f"; the {_MOST_ROWS} of {len(rows)} with the largest KL" if len(rows) > _MOST_ROWS else ""
    sampled = ("accuracy",) if "accuracy" in rows else ()
    laid_out = table(
        f"{ablation.name}: {describe_writes(ablation)} {describe_how(ablation)}; "
        f"{counted(ablation.n_responses, 'response')}, {counted(ablation.n_tokens, 'token')}",
        f"KL(π_θ || π_θ'), changes in nats; means over tokens {'and, below, ' if stacked else ''}± standard error "
        f"clustered by prompt{note}",
        *("layers" if key == "layer" and together is not None else key for key in keys),
        *("KL", "ΔH", "Δ log p", "flips", *sampled),
        left=("site", "how"),
    )
    laid_out.collapse_padding = close
    between = "\n" if stacked else ""
    for row in shown.to_dict("records"):
        cells = [
            f"{row[name]:{form}}{between}{plus_minus(row[f'{name}_stderr'])}"
            for name, form in (("kl", ".3f"), ("entropy_change", "+.3f"), ("log_prob_change", "+.3f"))
        ]
        cells.append(f"{100 * row['flips']:.1f}%")
        if sampled:
            cells.append(f"{100 * row['accuracy']:.1f}%{between}{plus_minus(100 * row['accuracy_stderr'], '.1f')}")
        laid_out.add_row(*(_key(key, row, together) for key in keys), *cells)
    return laid_out


def _key(name: str, row: Mapping[Hashable, Any], together: str | None) -> str:
    if name == "site":
        return "+".join(TITLES.get(site, site) for site in str(row["site"]).split("+"))
    return together if name == "layer" and together is not None else str(row[name])


def show_patching(patching: Patching) -> None:
    """Print what the states with the largest recoveries recover, on standard output."""
    console = open_console()
    metric, labels = patching.metric, patching.labels()
    values: pd.DataFrame = patching.values  # noqa: PD011
    best = values.loc[values["recovery"].abs().nlargest(_BEST).index]
    laid_out = table(
        f"{patching.name}: {patching.describe_metric()}, {metric['clean']:.3f} clean, {metric['corrupted']:.3f} "
        "corrupted",
        f"the {len(best)} largest of {len(values)} recoveries: 0 is nothing, 1 all of the difference",
        *("layer", "site", "position", "token", "recovery"),
        left=("site",),
        fold=("token",),
    )
    for row in best.to_dict("records"):
        cells = (str(row["layer"]), TITLES[row["site"]], str(row["position"]), labels[row["position"]])
        laid_out.add_row(*cells, number(row["recovery"], "+.3f"))
    console.print(laid_out)
    if patching.path is not None:
        list_files("patching", files_of(patching.path))
