"""An analysis on the terminal: a table of layers with stage marks, the boundary layer, and where the files are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from internal_policy.analysis.remarks import other_lens_sentence, plus_stderr, positions_line, remarks
from internal_policy.analysis.results import REPORT, Analysis
from internal_policy.utils.console import console as open_console
from internal_policy.utils.console import few_prompts
from internal_policy.utils.output import written
from internal_policy.utils.palette import BOUNDARY_SIGN, STAGES


def show(analysis: Analysis) -> None:
    """Print an analysis on standard output.

    Args:
        analysis: the analysis.
    """
    console = open_console()
    console.print(layer_table(analysis))
    first, *others = remarks(analysis)
    console.print(first)
    if analysis.positions is not None:
        console.print(positions_line(analysis.positions))
    for remark in others:
        console.print(remark)
    where = "none" if analysis.boundary_layer is None else str(analysis.boundary_layer)
    console.print(Text.assemble((f"boundary layer: {where}", "bold"), f"  {analysis.selection.reason}"))
    for line in (few_prompts(analysis.n_prompts), other_lens_sentence(analysis)):
        if line is not None:
            console.print(line)
    if analysis.path is not None:
        list_files("analysis", files_of(analysis.path))


def layer_table(analysis: Analysis) -> Table:
    """Lay out the layers, one row each, with means in nats and standard errors.

    Args:
        analysis: the analysis.

    Returns:
        A rich table.
    """
    table = Table(
        title=f"{analysis.name}: {analysis.extent}, lens {analysis.lens}",
        caption=f"means over tokens, nats ± standard error clustered by prompt; {BOUNDARY_SIGN} boundary layer",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("layer", "H layer", "ΔH layer", "ΔH ATTN", "ΔH FFN"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    sites = {
        site: analysis.layers[analysis.layers["site"] == site].set_index("layer") for site in ("layer", "attn", "ffn")
    }
    for layer, stage in enumerate(analysis.stages, start=1):
        rows = [sites[site].loc[layer] for site in ("layer", "attn", "ffn")]
        sign = f" {BOUNDARY_SIGN}" if layer == analysis.boundary_layer else ""
        table.add_row(
            str(layer),
            f"{rows[0]['entropy_out']:.3f}",
            *(f"{row['change']:+.3f}{plus_stderr(row['change_stderr'])}" for row in rows),
            Text(f"{STAGES[stage].sign} {stage}{sign}", style=STAGES[stage].terminal),
        )
    return table


def files_of(directory: Path) -> list[Path]:
    """List the files of a result.

    Args:
        directory: of the result.

    Returns:
        The files in it, but its page, which is drawn after them: told by itself, whether or not there was one before.
    """
    return sorted(p for p in directory.iterdir() if p.is_file() and p.name != REPORT and not p.name.startswith("."))


def list_files(what: str, paths: Sequence[Path]) -> None:
    """Print where files are.

    Args:
        what: what the files are.
        paths: the files, of one directory.
    """
    written(what, paths)
    names = ", ".join(p.name for p in paths)
    open_console().print(f"{what}: {paths[0].parent}/ ({names})", soft_wrap=True)
