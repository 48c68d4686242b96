"""Inspections as figures and on the terminal: drawn values and legibility."""

from __future__ import annotations

import io
import math
import warnings
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from plotting_fixtures import VOCAB, make_inspection
from rich.cells import cell_len
from rich.console import Console

from internal_policy import UserError
from internal_policy.cli.display_runs import blocks, show_inspection
from internal_policy.inspection.figure_data import decision_data
from internal_policy.plotting import style
from internal_policy.plotting.inspection import (
    cell_colors,
    drawable,
    fit,
    inspection_data,
    inspection_map,
    plot_inspection,
    save_inspection_figures,
)


def drawn(figure):
    """Draw with no glyph missing."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.draw()
    return canvas.get_renderer()


def plain(it, width=80, **options):
    out = io.StringIO()
    show_inspection(it, console=Console(file=out, width=width), **options)
    return out.getvalue()


def test_figure_data_has_the_values_of_the_selected_tokens():
    it = make_inspection()
    data = inspection_data(it, ["ffn"], tokens="19:22")
    assert data["position"].unique().tolist() == [19, 20, 21, 22]
    assert set(data["site"]) == {"ffn", "policy"}
    assert len(data) == 4 * (8 + 1)
    values = it.values.set_index(["position", "layer", "site"])  # noqa: PD011
    for row in data.itertuples():
        source = values.loc[(row.position, row.layer, row.site)]
        assert (row.entropy, row.top1_token) == (source["entropy"], source["top1_token"])
        assert (row.token, row.next_token) == tuple(it.tokens["token"][row.position - 1 : row.position + 1])
        assert row.hit == (row.top1_id == it.tokens["id"][row.position])
    assert data.drop_duplicates("position")["part"].tolist() == ["prompt", "prompt", "response", "response"]
    last = inspection_data(it, last=1)
    assert (last["next_token"] == "").all()
    assert not last["hit"].any()
    assert 0 not in set(last["layer"])
    with pytest.raises(UserError, match="--site is 'mlp'"):
        inspection_data(it, ["mlp"])


def test_a_token_is_decided_once_all_later_layers_agree():
    it = make_inspection(n_layers=6, n_tokens=200, prompt=2, words=["x", "y"])
    table = decision_data(it).set_index("position")
    values = it.values.set_index(["position", "layer", "site"])  # noqa: PD011
    for position in range(1, 201):
        final = values.loc[(position, 6, "policy")]
        expected = None
        for layer in range(6, 0, -1):
            if values.loc[(position, layer, "layer")]["top1_id"] != final["top1_id"]:
                break
            expected = layer
        row = table.loc[position]
        assert (None if pd.isna(row["decided_layer"]) else row["decided_layer"]) == expected
        assert (row["entropy"], row["top_token"]) == (final["entropy"], final["top1_token"])
        assert row["hit"] == (position < 200 and it.tokens["id"][position] == final["top1_id"])
        assert (row["token"], row["part"]) == tuple(it.tokens.loc[position - 1, ["token", "part"]])
    # The data are random: each outcome must have occurred.
    assert set(table["decided_layer"].dropna()) == {1, 2, 3, 4, 5, 6}
    assert table["decided_layer"].isna().any()
    assert table["next_token"].tolist() == [*table["token"][1:], ""]


def test_every_cell_has_its_colour_its_token_and_its_frame():
    it = make_inspection(n_layers=5, n_tokens=6, prompt=2)
    figure = inspection_map(it, ["attn"])
    drawn(figure)
    ax = figure.axes[0]
    data = inspection_data(it, ["attn"])
    cells, frames = ax.collections
    texts = {text.get_position(): text for text in ax.texts}
    assert len(texts) == len(data) == len(cells.get_facecolors())
    scale = mpl.colors.Normalize(0, math.log(VOCAB))
    for row, colour in zip(data.itertuples(), cells.get_facecolors(), strict=True):
        y = row.layer if row.site == "attn" else pytest.approx(5 + 1.35)
        (text,) = [t for (x, at), t in texts.items() if x == row.position - 1 and at == y]
        whole = drawable(row.top1_token, row.top1_id)
        assert whole.startswith(text.get_text().removesuffix("…"))
        assert not text.get_parse_math()
        np.testing.assert_allclose(colour[:3], mpl.colormaps["viridis"](scale(row.entropy))[:3])
    assert len(frames.get_paths()) == data["hit"].sum() > 0
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    assert labels == ["1", "2", "3", "4", "5", "$\\pi_\\theta$"]
    bar = figure.axes[-1]
    assert bar.get_ylim() == pytest.approx((0, math.log(VOCAB)))
    assert bar.get_yticklabels()[-1].get_text() == "$\\ln V$"


@pytest.mark.parametrize(("n_layers", "site"), [(8, "layer"), pytest.param(36, "ffn", marks=pytest.mark.slow)])
def test_nothing_overlaps_at_24_tokens(n_layers, site):
    it = make_inspection(n_layers=n_layers, n_tokens=40, prompt=28)
    figure = inspection_map(it, [site])
    renderer = drawn(figure)
    ax = figure.axes[0]
    corner, other = ax.transData.transform([(0, 1), (1, 2)])
    width, height = other - corner
    for text in ax.texts:
        box = text.get_window_extent(renderer)
        assert box.width <= width, text.get_text()
        # A line's box has room for descenders below and accents above, which few tokens have at once.
        assert box.height <= 1.25 * height, text.get_text()
        assert text.get_fontsize() >= style.MIN_FONT_SIZE
    boxes = [t.get_window_extent(renderer) for t in ax.get_xticklabels() if t.get_text()]
    assert len(boxes) == 24
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    inside = figure.bbox.padded(1)
    assert inside.contains(*ax.get_tightbbox(renderer).min)
    assert inside.contains(*figure.axes[-1].get_tightbbox(renderer).max)
    greys = [t.get_color() for t in ax.get_xticklabels()]
    assert greys == ["0.45"] * 12 + ["black"] * 12


def test_cell_text_has_enough_contrast_on_every_colour():
    rgb, ink = cell_colors(np.linspace(0, math.log(VOCAB), 200), VOCAB)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    contrast = np.where(ink == "black", (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05))
    # WCAG 2.2, success criterion 1.4.3, level AA.
    assert contrast.min() >= 4.5
    assert set(ink) == {"black", "white"}


def test_tokens_without_glyphs_are_shown_as_ids():
    assert drawable("\U000e0041", 77) == "#77"
    assert drawable("$_^", 77) == "$_^"
    assert fit("internationalization", 1e3, 5.0) == "internationalization"
    short = fit("internationalization", 20.0, 5.0)
    assert short.endswith("…")
    assert "internationalization".startswith(short[:-1])


def test_panels_draw_on_given_axes_and_name_the_lens():
    it = make_inspection(n_layers=3, n_tokens=4, lens="logit-lens")
    figure, _ = style.panel_grid(1)
    ax = plot_inspection(it, "layer", figure.axes[0])
    assert ax is figure.axes[0]
    assert "logit lens" in ax.get_title()
    named = inspection_map(it, "ffn", label="ours", color="magma")
    assert named.axes[0].get_title().startswith("ours, FFN policies")
    assert named.axes[-1].collections[-1].get_cmap().name == "magma"
    with pytest.raises(UserError, match="got 2 axes in ax; needed are 1: one for each site"):
        inspection_map(it, "ffn", ax=figure.axes[:1] * 2)
    stacked = inspection_map(it, ["layer", "ffn"])
    assert [a.get_title() for a in stacked.axes[:2]][1] == "FFN policies"
    drawn(stacked)


def test_many_tokens_are_split_into_pages_and_old_pages_are_removed(tmp_path, monkeypatch):
    it, pages = make_inspection(n_layers=1, n_tokens=25), []

    def save(figure, stem):
        pages.append((stem.name, figure.axes[0].get_title().split("tokens ")[1]))
        return [stem.with_suffix(".png")]

    monkeypatch.setattr(style, "save_figure", save)
    for name in ("inspect_layer_9.png", "inspect_notes.txt", "other.png"):
        (tmp_path / name).touch()
    save_inspection_figures(it, tmp_path, tokens=":")
    spans = ["1 to 13 of 25", "14 to 25 of 25"]
    assert pages == [(f"inspect_{s}_{k}", spans[k - 1]) for s in ("layer", "attn", "ffn") for k in (1, 2)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inspect_notes.txt", "other.png"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_table_is_complete_without_colours(width):
    it = make_inspection(n_layers=3)
    lines = plain(it, width, site="attn").splitlines()
    assert not any("\x1b" in line for line in lines)
    assert max(cell_len(line) for line in lines) <= width
    data = inspection_data(it, ["attn"])
    for name, rows in (
        ("π_θ", data[data["site"] == "policy"]),
        ("2", data[(data["layer"] == 2) & (data["site"] == "attn")]),
    ):
        row_text = "".join(line for line in lines if line.split()[:1] == [name])
        for row in rows.itertuples():
            number = f"{row.entropy:.2f}" if row.entropy < 9.995 else f"{row.entropy:.1f}"
            assert row.top1_token[:5] in row_text
            assert ("✓" if row.hit else " ") + number in row_text
    assert (
        len({cell_len(line.rstrip("\n")) for block in blocks(it, width=width) for line in map(str, block[1:-1])}) <= 2
    )
    assert sum("│" in line for line in lines) == 3 + 4 + 1


def test_a_colour_terminal_uses_the_figure_colours_unless_disabled(monkeypatch):
    it = make_inspection(n_layers=2, n_tokens=3)

    def shown():
        out = io.StringIO()
        show_inspection(it, console=Console(file=out, force_terminal=True, color_system="truecolor", width=80))
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    data = inspection_data(it, ["layer"])
    rgb, _ = cell_colors(data["entropy"].to_numpy(), VOCAB)
    red, green, blue = (int(255 * part) for part in rgb[0])
    assert f"48;2;{red};{green};{blue}m" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2" not in shown()


def test_right_to_left_text_stays_in_its_cell():
    it = make_inspection(n_layers=1, n_tokens=2, words=["שלום"])
    (block,) = blocks(it)
    assert all("\u2068שלום\u2069" in str(line) for line in block[2:])
