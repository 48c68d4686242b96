"""An analysis on the terminal: a table of layers with stage marks, the boundary layer, and where the files are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from internal_policy import lenses
from internal_policy.output import written
from internal_policy.palette import BOUNDARY_SIGN, STAGES
from internal_policy.printing import console as open_console
from internal_policy.printing import few_prompts
from internal_policy.results import REPORT, Analysis
from internal_policy.wording import counted


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
    for line in (few_prompts(analysis.n_prompts), lenses.sentence(analysis)):
        if line is not None:
            console.print(line)
    if analysis.path is not None:
        list_files("analysis", files_of(analysis.path))


def remarks(analysis: Analysis) -> list[str]:
    """Say what is to be said beside the layers and the boundary layer.

    Args:
        analysis: the analysis.

    Returns:
        The policy's entropy, then responses that were cut, the mean reward, and the baseline, each where there is one.
    """
    entropy = analysis.policy_entropy
    found = [
        f"policy entropy H(π_θ) {entropy['mean']:.4f}{_error(entropy['stderr'], 4)} nats; "
        f"H(H^L) without the final norm {entropy['final_state_mean']:.4f}"
    ]
    if analysis.n_truncated:
        found.append(
            f"{analysis.n_truncated} of {counted(analysis.n_responses, 'response')} reached the limit of tokens "
            "before they ended (--max-new-tokens)"
        )
    rewards = analysis.sequences["reward"].dropna()
    if len(rewards):
        found.append(f"mean reward {float(rewards.mean()):.3f} over {counted(len(rewards), 'response')}")
    if analysis.baseline is not None and analysis.baseline_model is not None:
        random, boundary = analysis.baseline_model, analysis.baseline_model["boundary_layer"]
        changes = analysis.baseline.loc[analysis.baseline["site"] == "ffn", "change"]
        found.append(
            f"random weights of the same architecture (seed {random['seed']}): policy entropy "
            f"{random['policy_entropy']['mean']:.4f} nats, ΔH FFN from {changes.min():+.3f} to {changes.max():+.3f}, "
            f"{'no boundary layer' if boundary is None else f'boundary layer {boundary}'}"
        )
    return found


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
            *(f"{row['change']:+.3f}{_error(row['change_stderr'])}" for row in rows),
            Text(f"{STAGES[stage].sign} {stage}{sign}", style=STAGES[stage].terminal),
        )
    return table


def positions_line(positions: Mapping[str, Any]) -> str:
    """Say how many positions were analysed and what that costs in certainty.

    Args:
        positions: of an Analysis with a tolerance.

    Returns:
        One line.
    """
    analysed, total, rounds = positions["analysed"], positions["total"], positions["rounds"]
    in_rounds = f"in {counted(rounds, 'round')}"
    if analysed == total:
        return f"analysed all {total} positions {in_rounds}; tolerance {positions['tolerance']:g} nats needs them all"
    site = {"attn": ", ATTN", "ffn": ", FFN"}.get(positions["site"], "")
    few = ""
    if positions["few"]:
        few = (
            f"; {positions['few']} of the {positions['changes']} half-widths rest on a few positions with large values "
            "and may miss more often than one time in 20"
        )
    return (
        f"analysed {analysed} of {total} positions ({analysed / total:.1%}) {in_rounds}; largest half-width of a 95% "
        f"interval from that choice {positions['half_width']:.3f} nats (layer {positions['layer']}{site}); tolerance "
        f"{positions['tolerance']:g}; ± is the standard error over prompts{few}"
    )


def _error(stderr: Any, digits: int = 3) -> str:
    """A single prompt has no standard error."""
    return "" if math.isnan(stderr) else f"±{stderr:.{digits}f}"


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
