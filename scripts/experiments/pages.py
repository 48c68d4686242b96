"""Write the tables of docs/results.md from the stored results: seconds, no model.

python scripts/experiments/pages.py             # writes them between their markers
python scripts/experiments/pages.py --check     # says whether the page has them
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import dose
import mechanism
import pandas as pd
from cells import NOTHING, Found, cell, markdown_table, pick, rate_text, seed_counts
from jobs import E1_LAYERS, E1_RATES, E2_DOSES, E2_RATES, E2_STEPS, MODELS
from layer_tables import e4_correlations, e4_evidence, e4_layers, e4_optimised, e4_over_boundary
from overview import completeness, conditions_alone, conditions_first, prediction_counts
from summaries import GATE, summaries

PAGE = Path("docs/results.md")
_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)
_METHODS = {"grpo": "GRPO", "ppo": "PPO", "rloo": "RLOO", "reinforce++": "REINFORCE++"}
_DYNAMICS = (
    ("cosine_30", "cosine, step 30", 3, 1.0),
    ("kl_fall", "lowest KL, nats", 2, 1.0),
    ("kl_rise", "KL at the end over its lowest, %", 0, 100.0),
    ("perplexity_60", "log-perplexity: start's responses", 3, 1.0),
    ("solutions_60", "right solutions", 3, 1.0),
    ("own_60", "own samples", 3, 1.0),
)
_BEHAVIOUR = (
    ("length_over_control", "length of rollouts, tokens", 1, 1.0),
    ("own_length", "length on the same problems", 1, 1.0),
    ("rise_over_control", "reward: best, points", 1, 100.0),
    ("fall_over_control", "reward: best over last, points", 1, 100.0),
)


def _e1(found: Found, shown: Sequence[tuple[str, str, int, float]], outcomes: bool) -> str:
    changes, ends = found["e1_changes"], found["e1_outcomes"]
    if changes.empty:
        return NOTHING
    rows = []
    for model in MODELS:
        for rate in E1_RATES:
            for layer in E1_LAYERS:
                own = [pick(changes, model=model, layer=layer, rate=rate, quantity=name) for name, *_ in shown]
                if own[0] is None:
                    continue
                cells = [cell(row, "", digits, scale) for row, (_, _, digits, scale) in zip(own, shown, strict=True)]
                if outcomes:
                    for measure in ("avg", "pass16"):
                        end = pick(ends, method="bupo", model=model, layer=layer, rate=rate, measure=measure)
                        cells.append(cell(end and {**end, "value": end["gain"]}))
                        cells += [cell(end, "over_grpo")] if measure == "avg" else []
                rows.append([f"`{model}`", rate_text(rate), str(layer), *cells, seed_counts(*own)])
    heads = ["model", "rate", "layer", *(head for _, head, *_ in shown)]
    heads += ["Avg@1, points", "Avg@1 minus GRPO's", "Pass@16, points"] if outcomes else []
    return markdown_table([*heads, "seeds"], rows)


def e1_dynamics(found: Found) -> str:
    """How the states and the perplexity changed."""
    return _e1(found, _DYNAMICS, outcomes=False)


def e1_behaviour(found: Found) -> str:
    """How length, reward and held-out accuracy changed."""
    return _e1(found, _BEHAVIOUR, outcomes=True)


def e1_rule(found: Found) -> str:
    """Where the rule would have stopped."""
    table = found["e1_rule"]
    if table.empty:
        return NOTHING
    rows = []
    for _, own in table.groupby(["model", "rate", "layer"]):
        model, rate, layer = own.iloc[0][["model", "rate", "layer"]]
        stops = [
            "never" if pd.isna(stop) else f"{stop:.0f} ({sign})"
            for stop, sign in zip(own["stop"], own["sign"], strict=True)
        ]
        falls = ["none" if pd.isna(fall) else f"{fall:g}" for fall in own["fall"]]
        peaks = ", ".join(f"{peak:g}" for peak in own["peak"])
        late = ", ".join(f"{late:+g}" for late in own["late"])
        rows.append([f"`{model}`", rate_text(rate), f"{layer:.0f}", ", ".join(stops), peaks, ", ".join(falls), late])
    return markdown_table(["model", "rate", "layer", "stops at", "highest reward at", "falls from", "late by"], rows)


def e1_rule_counts(found: Found) -> str:
    """How often the rule would have stopped, and when."""
    table = found["e1_rule_counts"]
    if table.empty:
        return NOTHING
    upper = [layer for layer in E1_LAYERS if layer >= mechanism.UPPER]
    lower = [layer for layer in E1_LAYERS if layer < mechanism.UPPER]
    layers = {name: " and ".join(map(str, of)) for name, of in (("lower", lower), ("upper", upper))}
    rows = [
        [rate_text(row["rate"]), layers[row["layers"]]]
        + [str(row[name]) for name in ("runs", "stopped", "lost", "in_time", "gained", "early")]
        for row in table.to_dict("records")
    ]
    heads = ["rate", "layers", "runs", "stopped by the rule", "lost more than 2 points", "of these, stopped in time"]
    return markdown_table([*heads, "gained more than 2 points", "of these, stopped before the best reward"], rows)


def e2_doses(found: Found) -> str:
    """What each dose ends with."""
    table = found["e2_doses"]
    if table.empty:
        return NOTHING
    measures = (("avg", 1, 100.0), ("pass16", 1, 100.0), ("truncated", 1, 100.0), ("entropy_end", 3, 1.0))
    rows = []
    for model in MODELS:
        own = table[table["model"] == model]
        for value in ("0", *map(str, E2_DOSES), dose.AUTO):
            for rate in E2_RATES[:1] if value == "0" else E2_RATES:
                ends = [pick(own, dose=value, rate=rate, measure=name) for name, *_ in measures]
                if ends[0] is None:
                    continue
                cells = [
                    cell(row, "", digits, scale, sign=False)
                    for row, (_, digits, scale) in zip(ends, measures, strict=True)
                ]
                name = "GRPO" if value == "0" else f"BuPO, {value}"
                rows.append([f"`{model}`", name, "" if value == "0" else rate_text(rate), *cells, seed_counts(ends[0])])
    heads = ["model", "method, dose", "rate", "Avg@1, %", "Pass@16, %", "truncated, %", "entropy, nats", "seeds"]
    return markdown_table(heads, rows)


def e2_curves(found: Found) -> str:
    """Held-out accuracy along the runs."""
    table = found["e2_curves"]
    if table.empty:
        return NOTHING
    shown = range(0, E2_STEPS + 1, dose.AREA_EVERY)
    rows = []
    for model in MODELS:
        for value in ("0", *map(str, E2_DOSES), dose.AUTO):
            for rate in E2_RATES[:1] if value == "0" else E2_RATES:
                own = [pick(table, model=model, dose=value, rate=rate, step=step) for step in shown]
                if own[-1] is not None:
                    name = "GRPO" if value == "0" else f"BuPO, {value}"
                    cells = [cell(row, "", sign=False) for row in own]
                    rows.append(
                        [f"`{model}`", name, "" if value == "0" else rate_text(rate), *cells, seed_counts(own[-1])]
                    )
    return markdown_table(["model", "method, dose", "rate", *(f"step {step}" for step in shown), "seeds"], rows)


def e2_differences(found: Found) -> str:
    """BuPO minus GRPO at equal total and equal GRPO steps."""
    table = found["e2_differences"]
    if table.empty:
        return NOTHING
    columns = [(measure, comparison) for measure in dose.MEASURES for comparison in (dose.TOTAL, dose.OPTIMISED)]
    rows = []
    for model in MODELS:
        for rate in E2_RATES:
            for value in (*map(str, E2_DOSES), dose.AUTO):
                own = [pick(table, model=model, rate=rate, dose=value, measure=m, comparison=c) for m, c in columns]
                if any(row is not None for row in own):
                    rows.append([f"`{model}`", rate_text(rate), value, *map(cell, own), seed_counts(*own)])
    names = {"avg": "Avg@1", "pass16": "Pass@16"}
    return markdown_table(["model", "rate", "dose", *(f"{names[m]}, {c}" for m, c in columns), "seeds"], rows)


def e2_along(found: Found) -> str:
    """BuPO minus GRPO along the runs."""
    table = found["e2_along"]
    if table.empty:
        return NOTHING
    steps = [*map(str, range(dose.AREA_EVERY, E2_STEPS, dose.AREA_EVERY)), "mean"]
    rows = []
    for model in MODELS:
        for comparison in (dose.TOTAL, dose.OPTIMISED):
            for value in (*map(str, E2_DOSES), dose.AUTO):
                for rate in E2_RATES:
                    setting = {"model": model, "rate": rate, "dose": value, "comparison": comparison}
                    own = [pick(table, **setting, step=step) for step in steps]
                    if any(row is not None for row in own):
                        first = [f"`{model}`", comparison, value, rate_text(rate)]
                        rows.append([*first, *map(cell, own), seed_counts(*own)])
    heads = [*(f"step {step}" for step in steps[:-1]), "mean"]
    return markdown_table(["model", "comparison", "dose", "rate", *heads, "seeds"], rows)


def e2_auto(found: Found) -> str:
    """What the rule chose, and what came of it."""
    table, along = found["e2_auto"], found["e2_along"]
    if table.empty:
        return NOTHING
    curve = {"dose": dose.AUTO, "comparison": dose.TOTAL, "step": "mean"}
    rows = [
        [
            *(
                f"`{row['model']}`",
                rate_text(float(row["rate"])),
                row["stops"].replace(" ", ", "),
                cell(row, "over_grpo"),
                cell(pick(along, model=row["model"], rate=row["rate"], **curve)),
            ),
            *(str(row["best"]) or "-", cell(row, "over_best"), str(row["seeds"])),
        ]
        for row in table.to_dict("records")
    ]
    return markdown_table(
        ["model", "rate", "stopped after", "minus GRPO", "along the run", "best dose", "minus best dose", "seeds"], rows
    )


def e2_power(found: Found) -> str:
    """What six seeds would detect."""
    table = found["e2_power"]
    if table.empty:
        return NOTHING
    names = {"avg": "Avg@1 at the end", "pass16": "Pass@16 at the end"}
    rows = [
        [
            *(f"`{row['model']}`", rate_text(float(row["rate"]))),
            *(names.get(row["measure"], str(row["measure"]).replace("avg", "Avg@1")), cell(row, "spread", sign=False)),
            *(f"{100 * row['detectable']:.1f}", str(row["seeds"])),
        ]
        for row in table.to_dict("records")
    ]
    heads = ["model", "rate", "measure", "spread over seeds, points", "detectable with 6 seeds, points"]
    return markdown_table([*heads, "seeds measured"], rows)


def e3_gate(found: Found) -> str:
    """How near each candidate for a start of E3 came to its gate."""
    table = found[GATE]
    if table.empty:
        return NOTHING
    rows = []
    for row in table.to_dict("records"):
        numbers = ["-"] * 7
        if not pd.isna(row["step"]):
            shares = [f"{100 * row[name]:.1f}" for name in ("pass_at_1", "pass_at_k", "worked_at_k", "greedy")]
            layer = "none" if pd.isna(row["boundary_layer"]) else f"{row['boundary_layer']:.0f} of 16"
            numbers = [f"{row['step']:.0f}", *shares, f"{row['entropy']:.2f}", layer]
        counts = [str(row[name]) for name in ("looks", "measured", "but_worked", "passes")]
        rows.append([f"`{row['candidate']}`", *counts, *numbers])
    heads = ["candidate", "looks", "measured in full", "pass but for worked-out answers", "pass", "nearest: step"]
    heads += ["pass@1, %", "Pass@64, %", "worked-out Pass@64, %", "greedy, %", "entropy, nats", "boundary layer"]
    return markdown_table(heads, rows)


def methods(found: Found) -> str:
    """PPO, RLOO and REINFORCE++ beside GRPO."""
    table = found["methods"]
    if set(table["method"]) <= {"grpo"}:
        return NOTHING
    rows = []
    for model in MODELS:
        for method, label in _METHODS.items():
            own = {
                m: pick(table, model=model, method=method, measure=m)
                for m in ("avg", "pass16", "along", "entropy_end", "explained")
            }
            if own["avg"] is None:
                continue
            cells = [cell(own[name], "", 1, 100.0, sign=False) for name in ("avg", "pass16")]
            cells += [cell(own["avg"], "over_grpo"), cell(own["along"], "over_grpo")]
            cells += [cell(own["entropy_end"], "", 3, 1.0, sign=False), cell(own["explained"], "", 2, 1.0)]
            rows.append([f"`{model}`", label, *cells, seed_counts(own["avg"])])
    return markdown_table(
        [
            *("model", "method", "Avg@1, %", "Pass@16, %", "Avg@1 minus GRPO", "along the run", "entropy, nats"),
            *("critic's explained variance", "seeds"),
        ],
        rows,
    )


TABLES: Mapping[str, Callable[[Found], str]] = {
    each.__name__: each
    for each in (
        *(
            conditions_alone,
            conditions_first,
            completeness,
            prediction_counts,
            e1_dynamics,
            e1_behaviour,
            e1_rule,
            e1_rule_counts,
        ),
        *(
            e2_doses,
            e2_curves,
            e2_along,
            e2_differences,
            e2_auto,
            e2_power,
            e3_gate,
            e4_layers,
            e4_optimised,
            e4_evidence,
            e4_over_boundary,
            e4_correlations,
            methods,
        ),
    )
}


def filled(text: str, found: Found) -> str:
    """Put the tables between their markers.

    Args:
        text: of the page.
        found: of `summaries`.

    Returns:
        The text; the same if its tables are those of the results.
    """
    return _MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](found)}\n\n{match[3]}", text)


def main() -> None:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table differs")
    args = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    wanted = filled(text, summaries())
    if args.check:
        raise SystemExit(0 if wanted == text else f"{PAGE}: a table differs from the results; run pages.py")
    PAGE.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
