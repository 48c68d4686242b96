"""The measurements of ``benchmark_analysis.py`` as tables and as a figure."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from internal_policy.plotting.style import ATTENTION, FEED_FORWARD, NEUTRAL, figure_legend, panel_grid, paper_style
from internal_policy.utils.io import write_atomically, write_text

ROOT = Path(__file__).resolve().parents[1]
DATA, FIGURES, PAGE = ROOT / "data/benchmarks", ROOT / "figures/benchmarks", ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- analysis: begin -->", "<!-- analysis: end -->"
"""This module writes the text between these markers of the page."""

NAMES = {
    "ours": "ours, exact",
    "tolerance": "ours, `tolerance=0.05`",
    "paper": "the paper's procedure",
    "transformer-lens": "TransformerLens, `run_with_cache`",
    "floor": "floor: forward pass and bare products",
}
TITLES = {
    "embedded": "testbed/qwen3 (L = 8, d = 96, V = 42), its own responses",
    "large": "The shape of Qwen3-0.6B (L = 28, d = 1024, V = 151936), random weights, one response",
    "long": "The same shape, a longer response",
}
AXES = {"tokens": "response tokens", "num_hidden_layers": "layers", "vocab_size": "vocabulary"}
"""What the scaling part varies, and how its axis is called."""
_LINES = {
    "ours": ("ours", ATTENTION, "-"),
    "paper": ("the paper's procedure", FEED_FORWARD, "-"),
    "floor": ("floor", NEUTRAL, "--"),
}
_MIB = 2**20
_DPI = 150


def read_results() -> dict[str, dict[str, Any]]:
    """Read what was measured.

    Returns:
        The content of each machine's file, by the file's name without its end.
    """
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(DATA.glob("analysis-*.json"))}


def runs(part: dict[str, Any]) -> pd.DataFrame:
    """Every single measurement of a part.

    Args:
        part: of a machine's results.

    Returns:
        One row per contender, repeat and job: seconds, peak_mib, and the contender's own facts.
    """
    frame = pd.DataFrame(part["runs"])
    frame["peak_mib"] = frame["peak_bytes"].astype(float) / _MIB
    return frame


def summary(part: dict[str, Any]) -> pd.DataFrame:
    """Medians over the repeats; ratios are taken repeat by repeat, so that a busy machine slows both sides alike.

    Args:
        part: of a machine's results, not the scaling.

    Returns:
        One row per contender: seconds, peak_mib, faster (the paper's seconds over its own), over_floor
        if the floor was measured.
    """
    frame = runs(part)
    seconds = frame.pivot_table(index="repeat", columns="contender", values="seconds")
    medians = frame.groupby("contender")[["seconds", "peak_mib"]].median()
    medians["faster"] = seconds.rdiv(seconds["paper"], axis=0).median()
    if "floor" in seconds:
        medians["over_floor"] = seconds.div(seconds["floor"], axis=0).median()
    return medians.loc[[name for name in NAMES if name in medians.index]]


def scaling_data(part: dict[str, Any]) -> pd.DataFrame:
    """What the figure shows.

    Args:
        part: the scaling part of a machine's results.

    Returns:
        One row per contender, axis and value: the medians of seconds and peak_mib.
    """
    frame = runs(part)
    return frame.groupby(["contender", "axis", "value"], as_index=False)[["seconds", "peak_mib"]].median()


def scaling_figure(part: dict[str, Any]) -> Figure:
    """Draw cost against tokens, layers and vocabulary.

    Args:
        part: the scaling part of a machine's results.

    Returns:
        Seconds in the upper panels, peak memory above the model in the lower.
    """
    data = scaling_data(part)
    figure, columns = panel_grid(len(AXES), 2)
    with paper_style():
        for (axis, label), (upper, lower) in zip(AXES.items(), columns, strict=True):
            rows = data[data["axis"] == axis]
            for name, (text, colour, dashes) in _LINES.items():
                own = rows[rows["contender"] == name].sort_values("value")
                for panel, quantity in ((upper, "seconds"), (lower, "peak_mib")):
                    style: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": text, "marker": "o"}
                    panel.plot(own["value"], own[quantity], **style)
            for panel, first, quantity in ((upper, 0, "seconds"), (lower, 1, "peak_mib")):
                _set_axis(panel, sorted(rows["value"].unique()), data[quantity])
                panel.tick_params(labelleft=panel is columns[0][first])
            lower.set_xlabel(label)
        columns[0][0].set_ylabel("seconds")
        columns[0][1].set_ylabel("peak memory, MiB")
        figure_legend(figure, [columns[0][0]], [text for text, _, _ in _LINES.values()])
    return figure


def _set_axis(panel: Axes, values: list[int], shown: pd.Series[float]) -> None:
    """Log axes with the measured sizes as ticks; the vertical range is shared by all panels of a row."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(0.7 * max(float(shown.min()), 0.01), 1.4 * float(shown.max()))
    panel.set_xticks(values, [f"{v // 1024}k" if v >= 4096 else str(v) for v in values])
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()


def tables(results: dict[str, dict[str, Any]]) -> str:
    """The text of the page between its markers.

    Args:
        results: of ``read_results``.

    Returns:
        Markdown.
    """
    blocks: list[str] = []
    for name, found in results.items():
        machine, parts = found["machine"], found["parts"]
        blocks.append(f"## {machine['name']}, {machine['cores']} cores, {machine['memory_gib']} GiB")
        blocks += [_needed(parts)] if "large" in parts else []
        blocks += [_part(title, parts[key]) for key, title in TITLES.items() if key in parts]
        blocks += [_sampled(parts["sampled"], parts["long"])] if {"long", "sampled"} <= parts.keys() else []
        blocks += [_scaling(name, parts["scaling"])] if "scaling" in parts else []
        blocks += [_options(parts["options"])] if "options" in parts else []
        blocks += [_training(parts["training"])] if "training" in parts else []
    return "\n\n".join(blocks)


def _made(part: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    return f"{part['date']}, {versions}"


def _threads(part: dict[str, Any]) -> str:
    return "1 thread" if part["threads"] == 1 else f"{part['threads']} threads"


def _part(title: str, part: dict[str, Any]) -> str:
    head = f"{part['tokens']} response tokens, float32, {_threads(part)}, {_repeats(part)}; {_made(part)}."
    lines = [
        "| | seconds | speed, the paper's = 1 | time, floor = 1 | peak memory, MiB | largest difference, nats |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in _figures(part).items():
        over_floor = f"{row['over_floor']:.3f}" if "over_floor" in row else ""
        figures = (f"{row['seconds']:.2f}", f"{row['faster']:.2f}", over_floor, _mib(row["peak_mib"]))
        lines.append(f"| {NAMES[name]} | {' | '.join(figures)} | {_difference(name, part)} |")
    return "\n".join([f"### {title}", "", head, "", *lines, *_tolerance(part)])


def _repeats(part: dict[str, Any]) -> str:
    return "one run each" if part["repeats"] == 1 else f"medians of {part['repeats']} runs each"


def _mib(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.0f}"


def _difference(name: str, part: dict[str, Any]) -> str:
    found = part["agreement"].get(name)
    return "" if found is None else f"{found['mean']:.1e} ({found['token']:.1e})"


def _tolerance(part: dict[str, Any]) -> list[str]:
    found = part.get("tolerance")
    if not found:
        return []
    held = f"{found['within']} of {found['changes']} changes lie within theirs of the exact figure."
    return ["", f"{_positions(found)}; {held} {_stages(found)}"]


def _positions(found: dict[str, Any]) -> str:
    """The number of positions that a tolerance needed."""
    return (
        f"With the tolerance {found['analysed']:.0f} of {found['total']:.0f} positions were analysed "
        f"({found['total'] / found['analysed']:.1f} x fewer), in {found['rounds']:.0f} "
        f"round{'' if found['rounds'] == 1 else 's'}; the largest half-width "
        f"reached is {found['half_width']:.4f} nats"
    )


def _stages(found: dict[str, Any]) -> str:
    """The stages that took the time of an analysis with a tolerance."""
    return (
        f"Of the {found['seconds']:.2f} s of the whole `analyze`, {found['capture_seconds']:.2f} s are states and "
        "entropies; the rest is the digest of the weights, statistics and tables."
    )


def _sampled(part: dict[str, Any], long: dict[str, Any]) -> str:
    n, memory = part["responses"], _mib((part["peak_bytes"] or math.nan) / _MIB)
    return (
        f"### The same shape, {n} responses with a tolerance\n\n"
        f"{part['tokens']} response tokens, float32, {_threads(part)}, one run; {_made(part)}.\n\n"
        f"{_positions(part)}. {_stages(part)} Peak memory: {memory} MiB. The paper's procedure does one response at a "
        f"time, and all alike: {n} x the {_seconds(long, 'paper'):.1f} s of the table above make "
        f"{_sampled_ratio(part, long):.1f} times as long. How many positions a tolerance takes depends on how much the "
        "changes differ from token to token, not on how many tokens there are: the more tokens, the larger the ratio, "
        "and of a trained model testbed/qwen3 says more than random weights."
    )


def _seconds(part: dict[str, Any], contender: str) -> float:
    return _figures(part)[contender]["seconds"]


def _sampled_ratio(part: dict[str, Any], long: dict[str, Any]) -> float:
    """The time ratio of the paper's procedure, if each response is as long as the measured one."""
    return float(part["responses"] * _seconds(long, "paper") / part["seconds"])


def _needed(parts: dict[str, Any]) -> str:
    ours, rows = _figures(parts["large"])["ours"], []
    rows.append(("ours against the paper's procedure", "≥ 1.8 x", f"{ours['faster']:.2f} x"))
    rows.append(("ours against the floor", "≤ 1.15 x", f"{ours['over_floor']:.3f} x"))
    if "accuracy" in parts:
        errors, n = parts["accuracy"]["errors"], parts["accuracy"]["tokens"]
        told = f"{errors['ours']['mean']:.0e} (the paper's procedure: {errors['paper']['mean']:.0e})"
        rows.append((f"ours: difference from float64, means of {n} tokens, nats", "≤ 1e-4", told))
    if "long" in parts:
        long, n = _figures(parts["long"]), parts["long"]["tokens"]
        smaller = long["paper"]["peak_mib"] / long["ours"]["peak_mib"]
        memory = "unknown" if math.isnan(smaller) else f"1/{smaller:.1f}"
        rows.append((f"ours: peak memory, of the paper's procedure ({n} tokens)", "≤ 1/10", memory))
    if {"long", "sampled"} <= parts.keys():
        faster, n = _sampled_ratio(parts["sampled"], parts["long"]), parts["sampled"]["tokens"]
        rows.append((f"tolerance 0.05 against the paper's procedure ({n} tokens)", "≥ 10 x", f"{faster:.1f} x"))
    lines = [f"| {what} | {needed} | {measured} |" for what, needed, measured in rows]
    return "\n".join(["| at the shape of Qwen3-0.6B | needed | measured |", "| --- | --- | --- |", *lines])


def _figures(part: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Rows of ``summary`` by their contender."""
    table = summary(part)
    columns = {name: dict(zip(table.index, values.astype(float), strict=True)) for name, values in table.items()}
    return {row: {str(name): values[row] for name, values in columns.items()} for row in table.index}


def _scaling(name: str, part: dict[str, Any]) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in part["shape"].items())
    return (
        "### Cost against tokens, layers and vocabulary\n\n"
        f"![cost against tokens, layers and vocabulary](../figures/benchmarks/{name}.png)\n\n"
        f"At a width that takes minutes, where nothing else is varied: {sizes}, {part['tokens']} tokens. Float32, "
        f"{_threads(part)}, {_repeats(part)}; {_made(part)}."
    )


def option_costs(part: dict[str, Any]) -> pd.DataFrame:
    """What each option adds to an analysis; ratios are taken repeat by repeat.

    Args:
        part: one shape of the options part of a machine's results.

    Returns:
        One row per contender: the medians of seconds, of peak_mib, and of the ratio of its time to that of what it adds
        to: the states and entropies alone for the parts of a change, the whole ``analyze`` for options.
    """
    frame = runs(part)
    seconds = frame.pivot_table(index="repeat", columns="contender", values="seconds")
    table = frame.groupby("contender")[["seconds", "peak_mib"]].median()
    plain = {name: "without-parts" if name in ("ours", "without-parts") else "analyze" for name in table.index}
    table["ratio"] = [float((seconds[name] / seconds[plain[name]]).median()) for name in table.index]
    order = ("without-parts", "ours", "analyze")
    return table.loc[[*order, *(name for name in frame["contender"].unique() if name not in order)]]


def _options(part: dict[str, Any]) -> str:
    shapes = {"embedded": "testbed/qwen3", "small": "d = 384, L = 8, V = 32768, random weights"}
    names = {"without-parts": "states and entropies, without length and direction", "ours": "with them (the default)"}
    names |= {"analyze": "`analyze` as a whole, plain"}
    blocks = ["### What each option costs"]
    for shape, title in shapes.items():
        own = part[shape]
        lines = ["| | seconds | ratio | peak memory, MiB |", "| --- | --- | --- | --- |"]
        for name, row in option_costs(own).iterrows():
            figures = (f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", _mib(row["peak_mib"]))
            lines.append(f"| {names.get(str(name), f'`{name}`')} | {' | '.join(figures)} |")
        head = f"{title}: {own['tokens']} response tokens, float32, {_threads(own)}, {_repeats(own)}; {_made(part)}."
        blocks += [head, "\n".join(lines)]
    return "\n\n".join(blocks)


def _training(part: dict[str, Any]) -> str:
    share = part["analysis_seconds"] / part["training_seconds"]
    return (
        "### Analysis against training\n\n"
        f"{part['model']}: `analyze` samples and analyses {part['responses']} responses in "
        f"{part['analysis_seconds']:.1f} s, {part['steps']} steps of BuPO take {part['training_seconds']:.1f} s: "
        f"{100 * share:.1f}% ({_made(part)}). The paper reports 209 s against 13.22 h for Qwen3-4B, "
        f"{100 * 209 / 13.22 / 3600:.2f}% (table 7). The share is larger here because the training is shorter: its "
        "steps have 128 responses of up to 44 tokens, there 300 steps have 1024 of up to 7168."
    )


def write_report() -> None:
    """Write the tables into the page, and a figure for each machine."""
    results = read_results()
    text = PAGE.read_text("utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(PAGE, f"{before}{BEGIN}\n\n{tables(results)}\n\n{END}{after}")
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, found in results.items():
        if "scaling" in found["parts"]:
            figure = scaling_figure(found["parts"]["scaling"])
            write_atomically(FIGURES / f"{name}.png", partial(figure.savefig, format="png", dpi=_DPI, metadata={}))
