"""The figures of ``gpu_checks.py`` as tables, on the terminal and in ``docs/benchmarks.md``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "data/benchmarks", ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- gpu: begin -->", "<!-- gpu: end -->"
"""This module writes the text between these markers of the page."""
NOTHING = (
    "No figures from a GPU are stored. The fused kernel has been compiled for sm_80 and sm_90 and run in triton's "
    "interpreter; it has not been launched on a GPU, and the tests that need one were skipped."
)
_NONE = "-"


@dataclass(frozen=True)
class Table:
    """Figures under a heading."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def read_results() -> dict[str, dict[str, Any]]:
    """Read what was measured.

    Returns:
        The content of each card's file, by the file's name without its end.
    """
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(DATA.glob("gpu-*.json"))}


def number(value: Any, digits: int = 3) -> str:
    """A figure with so many digits that count; a dash if there is none."""
    if value is None:
        return _NONE
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def error(value: Any) -> str:
    """A difference in nats; a dash if there is none."""
    return _NONE if value is None else f"{value:.1e}"


def figures(results: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The figures of a part by their step; none if it did not run."""
    found: dict[str, Any] = results["parts"].get(part, {}).get("figures", {})
    return found


def tables(results: Mapping[str, Any]) -> list[Table]:
    """Arrange the figures of a run.

    Args:
        results: the content of a file.

    Returns:
        One table per kind of measurement of which there are figures.
    """
    found = [_kernel(results), _analysis(results), _update(results), _rest(results)]
    return [table for table in found if table.rows]


def _kernel(results: Mapping[str, Any]) -> Table:
    header = ["operands", "N", "product", "kernel", "of the product", "two lengths, time of one", "blocks"]
    header += ["memory: kernel", "two lengths", "blocks", "error", "two lengths"]
    rows: list[list[str]] = []
    for dtype in ("bfloat16", "float32"):
        for name, row in figures(results, f"kernel-{dtype}").items():
            errors = row.get("errors_nats")
            if errors is None:
                continue
            rate, memory = row["rates_tflops"] or {}, row["memory_mib"] or {}
            told = [number(rate.get("product")), number(rate.get("kernel"))]
            told += (
                _ratio(rate.get("kernel"), rate.get("product")),
                _ratio(rate.get("kernel"), rate.get("two lengths")),
            )
            told += [number(rate.get("blocks")), *(number(memory.get(n)) for n in ("kernel", "two lengths", "blocks"))]
            told += [error(errors.get("kernel")), error(errors.get("two lengths"))]
            rows.append([dtype + (" (TF32)" if "TF32" in name else ""), str(row["tokens"]), *told])
    note = (
        "V = 151936, d = 2560. Rates in TFLOP/s count the operations of one product for all ways, medians of repeats "
        'in turn; working memory in MiB; errors in nats are the largest of 16 rows against float64. "blocks" is the '
        'torch implementation, "two lengths" the kernel that takes a second entropy from the same product.'
    )
    return Table("The fused kernel against one bare product", header, rows, note)


def _ratio(one: float | None, other: float | None) -> str:
    return _NONE if not one or not other else f"{one / other:.2f}"


def _analysis(results: Mapping[str, Any]) -> Table:
    header = ["dtype", "sequences", "tokens", "tokens/s", "s", "forward alone, s", "bare products, s", "over both"]
    header += ["peak, GiB", "weights, GiB", "error, nats", "fused kernel"]
    rows: list[list[str]] = []
    for dtype in ("bfloat16", "float32"):
        found = figures(results, f"analysis-{dtype}")
        if (row := found.get("throughput")) is None:
            continue
        seconds = row["seconds"]
        told = [number(row["tokens_per_second"]), number(seconds["whole"]), number(seconds["forward"])]
        told += [number(seconds["products"]), f"{row['over_floor']:.3f}", number(row.get("peak_gib"))]
        told += [number(row["weights_gib"]), error(found.get("entropies against float64", {}).get("error_nats"))]
        used = "yes" if row["kernel"] else "no"
        rows.append([dtype, f"{row['sequences']} x {row['length']}", str(row["tokens"]), *told, used])
    note = (
        "The shape of Qwen3-4B (36 layers, d = 2560, V = 151936), random weights; states and all entropies of every "
        "layer, length and direction included, against the decoder's forward pass and the products of the states with "
        "E_u in the model's dtype and nothing else. The error is the largest difference of an entropy from float64."
    )
    return Table("An analysis", header, rows, note)


def _update(results: Mapping[str, Any]) -> Table:
    header = [
        "policy",
        "sequences",
        "s",
        "of pi_theta",
        "forward",
        "backward",
        "optimiser",
        "peak, GiB",
        "checkpointing",
    ]
    found = {name: row for name, row in figures(results, "update").items() if "phases" in row}
    whole = found.get("pi_theta", {})
    rows: list[list[str]] = []
    for name, row in found.items():
        same = row["sequences"] == whole.get("sequences") and row["checkpointing"] == whole.get("checkpointing")
        told = [number(row["seconds"]), _ratio(row["seconds"], whole.get("seconds") if same else None)]
        told += [number(row["phases"][phase]) for phase in ("forward", "backward", "optimizer")]
        told += [number(row.get("peak_gib")), "yes" if row["checkpointing"] else "no"]
        rows.append([name, f"{row['sequences']} x {row['length']}", *told])
    note = (
        "One update of pi^l in bfloat16 (weights and AdamW's moments), log-probabilities by our streamed head, at the "
        "shape of Qwen3-4B; seconds, medians. The peak includes the weights of the whole model. No sampling."
    )
    return Table("An update of an internal policy", header, rows, note)


def _rest(results: Mapping[str, Any]) -> Table:
    rows: list[list[str]] = []
    for dtype in ("bfloat16", "float32"):
        for name, row in figures(results, f"kernel-{dtype}").items():
            if "error_nats" in row:
                tile = f"; {row['tile']}" if row["tile"] else ""
                rows.append(
                    [f"{dtype}, {name}", f"{error(row['error_nats'])} nats, the largest of {row['rows']} rows{tile}"]
                )
        if proof := figures(results, f"analysis-{dtype}").get("proof of eq. 4"):
            rows.append([f"{dtype}, proof of eq. 4", f"{proof['rounding_units']:.2f} units of rounding"])
    if tests := figures(results, "tests").get("tests"):
        told = ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "errors", "skipped") if tests[name])
        rows.append(["tests that need CUDA", told or "none ran"])
        rows += [["failed", f"{name}: {_last_line(text)}"] for name, text in tests["failures"].items()]
    for name, row in figures(results, "train").items():
        if name == "bupo.train":
            steps = ", ".join(f"{s:.1f} s ({p})" for s, p in zip(row["update_seconds"], row["phases"], strict=True))
            sizes = f"{row['responses']} responses of up to {row['response_tokens']} tokens, layer {row['layer']}"
            rows.append([name, f"{steps}; {sizes}; peak {number(row.get('peak_gib'))} GiB"])
    for part, found in results["parts"].items():
        rows += [[part, f"failed: {name}: {text}"] for name, text in found["errors"].items()]
        rows += [[part, f"not measured: {name}: {text}"] for name, text in found["skipped"].items()]
    return Table("Checks, tests, steps of training, and what is missing", ("", ""), rows)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("E ")), lines[-1] if lines else "")[:200]


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of the page between its markers.

    Args:
        results: of ``read_results``.

    Returns:
        Markdown; a sentence that says so if nothing was measured.
    """
    blocks: list[str] = []
    for found in results.values():
        blocks.append(f"### {found['card']}\n\n{_made(found)}")
        for table in tables(found):
            lines = [_line(table.header), _line("---" for _ in table.header), *(_line(row) for row in table.rows)]
            blocks += [f"#### {table.title}", *([table.note] if table.note else []), "\n".join(lines)]
    return "\n\n".join(blocks) or NOTHING


def _made(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    busy = f"; load {found['load']:.1f} on {found['processors']} processors" if found.get("load") is not None else ""
    if found.get("conditions"):
        # It says more than the load did before the first part.
        busy = f". Meanwhile: {found['conditions']}"
    driver = f"driver {found['driver']}, " if found["driver"] else ""
    return f"{found['date'][:10]}, {driver}Python {found['python']}, {versions}; {found['seconds']:.0f} s in all{busy}."


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def write_page() -> None:
    """Write the tables of all files into the page."""
    from internal_policy.utils.io import write_text

    text = PAGE.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n\n{markdown(read_results())}\n\n{END}{after}")


def print_tables(results: Mapping[str, Any]) -> None:
    """Print the figures of a run; without rich, as in the page."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text
    except ImportError:
        print(markdown({"": results}))
        return
    # A pipe has no width of its own.
    console = Console() if Console().is_terminal else Console(width=160)
    for table in tables(results):
        grid = Grid(title=table.title, box=box.SIMPLE, caption=table.note or None)
        for name in table.header:
            grid.add_column(Text(name))
        for row in table.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
