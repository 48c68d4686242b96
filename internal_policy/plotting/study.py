"""Figures 2, 3, 12, 13 and 14 of a cross-model study (arXiv 2512.19673v3), with its tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from internal_policy.comparison.study_results import Study
from internal_policy.plotting import analysis as figures
from internal_policy.plotting import comparison as comparison_figures
from internal_policy.plotting import style
from internal_policy.utils.io import write_atomically
from internal_policy.utils.table_io import to_cells

PAPER_FIGURES: tuple[tuple[str, int, Callable[..., Figure]], ...] = (
    ("fig2_entropy_flow", 2, figures.entropy_flow),
    ("fig3_entropy_change", 3, figures.entropy_change),
    ("fig12_residual_cosine", 12, figures.residual_cosine),
    ("fig13_entropy_flow", 13, figures.entropy_flow),
    ("fig14_entropy_change", 14, figures.entropy_change),
)
"""What each of the paper's figures is called on disk, its number, and what draws it."""


def save_study(study: Study, directory: str | Path) -> list[Path]:
    """Write the figures as PNG and PDF and the tables as CSV. The same analyses give the same bytes.

    Args:
        study: the study.
        directory: made where it does not exist; files of the same names are replaced.

    Returns:
        The paths written. A figure shows the models whose rows name it; there is none where no row does.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[], Figure] | None] = {}
    for stem, number, draw_figure in PAPER_FIGURES:
        shown = study.of_figure(number)
        drawings[stem] = partial(draw_figure, shown) if shown else None
    drawings |= {"depth_overlay": None, "convergence": None}
    tables = {"models": study.table, "convergence": study.convergence}
    if study.comparison is not None:
        tables["layers"] = study.comparison.layers
        drawings["depth_overlay"] = partial(comparison_figures.depth_overlay, study.comparison)
        drawings["convergence"] = partial(comparison_figures.entropy_fall, study.comparison)
    else:
        (target / "layers.csv").unlink(missing_ok=True)
    paths = []
    for stem, draw in drawings.items():
        if draw is not None:
            paths += style.save_figure(draw(), target / stem)
        else:
            # What an earlier study left under this name is of other models.
            for kind in ("png", "pdf"):
                (target / f"{stem}.{kind}").unlink(missing_ok=True)
    for name, table in tables.items():
        write_atomically(target / f"{name}.csv", partial(to_cells(table).to_csv, index=False))
        paths.append(target / f"{name}.csv")
    return paths
