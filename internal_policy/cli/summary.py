"""Several analyses in one table: a row each, as a DataFrame and on the terminal."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.table import Table

from internal_policy.analysis.layer_selection import STAGES
from internal_policy.analysis.results import Analysis
from internal_policy.utils.console import console as open_console


def show_line(analysis: Analysis) -> None:
    """Print in one line what an analysis among several found, on standard output.

    Args:
        analysis: the analysis.
    """
    boundary = "no boundary layer" if analysis.boundary_layer is None else f"boundary layer {analysis.boundary_layer}"
    where = "" if analysis.path is None else f"  ({analysis.path}/)"
    open_console().print(
        f"{analysis.name}: {analysis.extent}, H(π_θ) {analysis.policy_entropy['mean']:.4f} nats, {boundary}{where}",
        soft_wrap=True,
    )


def show_summary(title: str, table: pd.DataFrame, convergence: pd.DataFrame) -> None:
    """Print what each analysis found and how its entropy falls, on standard output.

    Args:
        title: what they are.
        table: of `summary_table`.
        convergence: of ``convergence_table``, in the same order.
    """
    columns = ["reading", "half_drop_depth", "last_three_share"]
    rows = pd.concat([table, convergence[columns].reset_index(drop=True)], axis=1)
    shown = Table(
        title=title,
        caption="H(π_θ) in nats; E/I/C: layers of exploration, integration, convergence;\n"
        "falls: how the entropy falls; half: depth by which half of it has fallen;\n"
        "last 3: share of the drop in the last three layers",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        min_width=72,
    )
    # Names give way last: a row that cannot be told from another is of no use.
    shown.add_column("", overflow="fold", min_width=min(22, max(len(str(label)) for label in table["label"])))
    for heading in ("H(π_θ)", "boundary", "E/I/C", "falls", "half", "last 3"):
        shown.add_column(heading, justify="left" if heading == "falls" else "right", no_wrap=True)
    for row in rows.to_dict("records"):
        boundary = row["boundary_layer"]
        shown.add_row(
            str(row["label"]),
            f"{row['policy_entropy']:.3f}",
            "none" if pd.isna(boundary) else f"{boundary}/{row['n_layers']}",
            "/".join(str(row[stage]) for stage in STAGES),
            "-" if row["reading"] == "none" else str(row["reading"]),
            _number(row["half_drop_depth"], ".2f"),
            _number(row["last_three_share"], ".0%"),
        )
    open_console().print(shown)


def _number(value: float, form: str) -> str:
    return "-" if pd.isna(value) else f"{value:{form}}"
