"""One palette for figures, pages and the terminal, and one name for the boundary layer."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import pytest
from documents import ROOT
from rich.console import Console
from synthetic_analyses import make, progressive

from internal_policy.cli.display import layer_table
from internal_policy.plotting import analysis as figures
from internal_policy.plotting import style
from internal_policy.report.charts import change_chart, series_look
from internal_policy.utils import palette

PACKAGE = ROOT / "internal_policy"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_figures_and_pages_use_the_same_module_styles():
    analysis = make(progressive(6), prompts=4)
    spec = change_chart(analysis).spec()
    page = {trace["name"]: trace for trace in spec["traces"] if trace.get("hoverinfo") != "skip"}
    for site, name in (("attn", "ATTN"), ("ffn", "FFN")):
        look = palette.LOOKS[site]
        (line,) = (line for line in figures.plot_entropy_change(analysis, site).lines if line.get_label() == name)
        assert line.get_color() == look.light
        assert line.get_marker() == style.MARKERS[look.marker]
        drawn = page[name]
        assert (drawn["line"]["color"], drawn["line"]["dash"]) == (f"var(--{site})", look.dash)
        assert drawn["marker"]["symbol"] == look.marker
        assert f"--{site}: {look.light};" in palette.stylesheet()
    boundary = [shape["line"]["dash"] for shape in spec["layout"]["shapes"] if shape["type"] == "line"]
    assert palette.LOOKS["boundary"].dash in boundary


def test_the_terminal_uses_the_stage_symbols_of_the_page():
    analysis = make(progressive(6), prompts=4)
    console = Console(file=io.StringIO(), width=120)
    console.print(layer_table(analysis))
    for stage in set(analysis.stages):
        assert f"{palette.STAGES[stage].sign} {stage}" in console.file.getvalue()
    assert palette.BOUNDARY_SIGN in console.file.getvalue()
    shaded = {patch.get_label(): patch.get_facecolor() for patch in figures.plot_entropy_change(analysis).patches}
    assert len(shaded) == len(set(analysis.stages))


def test_series_are_distinguishable_and_adjacent_ones_without_colour():
    looks = [palette.series(i) for i in range(palette.N_SERIES)]
    assert len({(look.light, look.dash) for look in looks}) == palette.N_SERIES
    assert all(a.dash != b.dash and a.marker != b.marker for a, b in pairwise(looks))
    assert [series_look(i)["dash"] for i in range(palette.N_SERIES)] == [look.dash for look in looks]


@pytest.mark.parametrize("look", [*palette.LOOKS.values(), *(palette.series(i) for i in range(palette.N_COLOURS))])
def test_every_line_has_contrast_with_its_page(look):
    # WCAG 2.2, 1.4.11: graphics need 3:1.
    assert 1.05 / (luminance(look.light) + 0.05) >= 3
    assert (luminance(look.dark) + 0.05) / (luminance("#1c1c1c") + 0.05) >= 3


def test_colours_are_defined_only_in_the_palette():
    found = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"[\"\']#[0-9a-fA-F]{6}[\"\']", path.read_text())}
    assert found == {"palette.py"}


def test_the_boundary_layer_has_one_name_everywhere():
    # The paper calls BuPO's layer its target; each page that uses this term explains once that it is the boundary.
    places = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.j2"), *PACKAGE.rglob("*.js"), *(ROOT / "docs").rglob("*.md")]
    # The page of the command line is generated from the help texts, which are checked here.
    written = {path for path in (*places, ROOT / "README.md") if path.name != "cli.md"}
    texts = {path: path.read_text(encoding="utf-8") for path in written}
    for path, text in texts.items():
        for paragraph in re.split(r"\n\s*\n", text):
            if re.search(r"target[\s-]+layer", paragraph, re.IGNORECASE):
                assert re.search("boundary layer|exploration stage", paragraph), f"{path}: {paragraph}"
