"""How far alignment agrees with GRPO, on the terminal."""

from __future__ import annotations

from rich.table import Table

from internal_policy.bupo.transfer_results import Transfer
from internal_policy.utils.console import console, number, table
from internal_policy.utils.errors import counted


def show_transfer(result: Transfer) -> None:
    """Print the agreement of each layer, and one sentence about it, on standard output."""
    screen = console()
    screen.print(transfer_table(result))
    screen.print(result.summary)


def transfer_table(result: Transfer) -> Table:
    """Lay out the columns of a `Transfer`, one row per layer."""
    shown = table(
        f"{result.name}: gradient of alignment against that of GRPO",
        f"{counted(result.n_prompts, 'prompt')}, of which {result.n_informative} have different rewards; mean reward "
        f"{number(result.mean_reward)}. Last three columns: between two halves of the prompts",
        *("layer", "cosine", "95% interval", "across", "ceiling", "own ceiling"),
        min_width=64,
    )
    for row in result.table.to_dict("records"):
        low, high = (number(row[name], "+.2f") for name in ("low", "high"))
        cells = [number(row[name], "+.3f") for name in ("across", "ceiling", "own_ceiling")]
        shown.add_row(str(int(row["layer"])), number(row["cosine"], "+.3f"), f"{low} to {high}", *cells)
    return shown
