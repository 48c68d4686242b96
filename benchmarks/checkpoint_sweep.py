"""The checkpoints of one BuPO training of testbed/qwen3, analysed on the same responses and compared with its start.

python benchmarks/checkpoint_sweep.py             # ten checkpoints of thirty steps, ten minutes on two cores; resumable
python benchmarks/checkpoint_sweep.py --short     # five checkpoints of five steps on few prompts, a minute

The run and the analyses are kept in ``build/sweep``; the tables go to ``data/experiments/sweep`` and the figures to
``figures/experiments/sweep``. With --short all three are in ``build/sweep_short``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from internal_policy import bupo, compare, sweep
from internal_policy.comparison.results import AnalysisComparison
from internal_policy.plotting import comparison as drawings
from internal_policy.utils.errors import UserError
from internal_policy.utils.io import write_atomically

MODEL, LAYER = "testbed/qwen3", 7
"""The trained model, and its boundary layer as found by `internal-policy analyze`."""
TRAINING: dict[str, Any] = {
    "ipa_steps": 10,
    "max_steps": 30,
    "prompts_per_step": 8,
    "save_steps": 3,
    "eval_problems": 64,
}
SHORT: dict[str, Any] = {
    "ipa_steps": 2,
    "max_steps": 5,
    "prompts_per_step": 4,
    "num_generations": 4,
    "mini_batches": 1,
    "save_steps": 1,
    "eval_problems": 8,
}
RESPONSES, SHORT_RESPONSES = 256, 16
FIGURES: dict[str, Callable[[AnalysisComparison], Figure]] = {
    "heat_maps": drawings.heat_maps,
    "layer_differences": drawings.layer_differences,
    "entropy_fall": drawings.entropy_fall,
}
"""Figures that show changes of about 0.03 nats, and the drop. As levels, eleven models would coincide."""
DPI = 150
SHOWN = {"layer": "entropy_out", "attn": "change", "ffn": "change"}
"""Site and quantity of the slopes that are printed."""


def trained(root: Path, setting: dict[str, Any]) -> bupo.Run:
    """Train, or read the stored run.

    Args:
        root: where runs are kept.
        setting: options of `bupo.train`.

    Returns:
        The run.
    """
    return bupo.train(MODEL, layer=LAYER, dynamics_every=0, output=root / "qwen3-bupo", **setting)


def compared(run: bupo.Run, output: Path, responses: int) -> AnalysisComparison:
    """Analyse the start and every checkpoint on the responses that the start sampled.

    Args:
        run: the training.
        output: where the analyses are kept.
        responses: how many.

    Returns:
        The comparison with the start.
    """
    analyses = sweep(
        MODEL,
        checkpoints=run.path,
        max_responses=responses,
        keep_tokens=0,
        output=output,
        each=lambda analysis: print(f"{analysis.name}: boundary layer {analysis.boundary_layer}", flush=True),
    )
    return compare(analyses)


def draw(comparison: AnalysisComparison, directory: Path) -> list[Path]:
    """Draw what moves over the checkpoints, as PNG alone: these are for reading on a screen.

    Args:
        comparison: the comparison.
        directory: where the figures go.

    Returns:
        The files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in FIGURES.items():
        path = directory / f"{name}.png"
        write_atomically(path, partial(figure(comparison).savefig, format="png", dpi=DPI, metadata={}))
        written.append(path)
    return written


def slopes(comparison: AnalysisComparison) -> pd.DataFrame:
    """The steepest trends of the layers' entropies and of the changes by the modules.

    Args:
        comparison: the comparison.

    Returns:
        Three rows a site: layer, slope per 100 steps with its 95% interval and the move from first to last, nats.
    """
    parts = []
    for site, quantity in SHOWN.items():
        trends = comparison.trends
        rows = trends[(trends["site"] == site) & (trends["quantity"] == quantity)]
        rows = rows.loc[rows["slope"].abs().sort_values(ascending=False).index[:3]]
        per_100 = rows[["slope", "low", "high"]].mul(100)
        parts.append(pd.concat([rows[["site", "quantity", "layer"]], per_100, rows[["total_move"]]], axis=1))
    return pd.concat(parts, ignore_index=True)


def main() -> None:
    """Train and analyse what is missing, and write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="five steps on few prompts, a checkpoint each")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; small models gain nothing from more")
    args = parser.parse_args()
    # Stored runs are recognised by their line of results.
    logging.getLogger("internal_policy").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    setting, responses = TRAINING, RESPONSES
    root, data, figures = Path("build/sweep"), Path("data/experiments/sweep"), Path("figures/experiments/sweep")
    if args.short:
        setting, responses = SHORT, SHORT_RESPONSES
        root, data, figures = (Path("build/sweep_short") / name for name in ("runs", "data", "figures"))
    try:
        comparison = compared(trained(root, setting), root / "analyses", responses)
    except UserError as error:
        raise SystemExit(str(error)) from error
    comparison.save(data)
    for path in [*sorted(data.iterdir()), *draw(comparison, figures)]:
        print(path)
    print(slopes(comparison).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
