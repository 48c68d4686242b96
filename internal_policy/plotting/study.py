"""Figures 2, 3, 12, 13 and 14 of a cross-model study (arXiv 2512.19673v3), with its tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from internal_policy.comparison.study_results import Study
from internal_policy.plotting import analysis, comparison, style
from internal_policy.utils.io import write_atomically
from internal_policy.utils.table_io import to_cells

__all__ = ["save_study"]

PAPER_FIGURES: tuple[tuple[str, int, Callable[..., Figure]], ...] = (
    ("fig2_entropy_flow", 2, analysis.entropy_flow),
    ("fig3_entropy_change", 3, analysis.entropy_change),
    ("fig12_residual_cosine", 12, analysis.residual_cosine),
    ("fig13_entropy_flow", 13, analysis.entropy_flow),
    ("fig14_entropy_change", 14, analysis.entropy_change),
)
"""Name on disk, number and function of each of the paper's figures."""


def save_study(study: Study, directory: str | Path) -> list[Path]:
    """Write the figures as PNG and PDF and the tables as CSV. The same analyses give the same bytes.

    Args:
        study: The study.
        directory: Where to write; made if it is missing. Files of the same names are replaced.

    Returns:
        The paths written. A figure shows the models whose rows name it; without any there is no such figure.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    shown = {stem: (draw, study.of_figure(number)) for stem, number, draw in PAPER_FIGURES}
    drawings: dict[str, Callable[[], Figure]] = {
        k: partial(draw, models) for k, (draw, models) in shown.items() if models
    }
    tables = {"models": study.table, "convergence": study.convergence}
    if study.comparison is not None:
        tables["layers"] = study.comparison.layers
        drawings["depth_overlay"] = partial(comparison.depth_overlay, study.comparison)
        drawings["convergence"] = partial(comparison.entropy_fall, study.comparison)
    # What an earlier study left under these names is of other models.
    stale = [
        f"{stem}.{kind}" for stem in {*shown, "depth_overlay", "convergence"} - {*drawings} for kind in ("png", "pdf")
    ]
    for name in stale if "layers" in tables else [*stale, "layers.csv"]:
        (target / name).unlink(missing_ok=True)
    paths = style.save_figures(target, drawings)
    for name, table in tables.items():
        write_atomically(target / f"{name}.csv", partial(to_cells(table).to_csv, index=False))
        paths.append(target / f"{name}.csv")
    return paths
