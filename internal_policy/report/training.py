"""The page of a training run: reward, entropy and length over the steps, figure 5's measures, and evaluations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from internal_policy.analysis.figure_data import FIRST_STEP, SMOOTH, trailing_mean, window_for
from internal_policy.bupo.config import ALIGNMENT
from internal_policy.bupo.run import last_alignment_step, why_no_dynamics
from internal_policy.report.charts import Chart, look, series_look, shade
from internal_policy.report.page import clean, interval, number, render, settings_tables
from internal_policy.report.reproduce import training_commands
from internal_policy.utils.errors import counted

if TYPE_CHECKING:
    from internal_policy.bupo.run import Run

_HISTORY = (
    ("reward", "Reward", "Reward", ".3f", ""),
    ("policy_entropy", "Policy entropy", "H(π_θ) (nats)", ".3f", " nats"),
    ("length", "Response length", "Length (tokens)", ".1f", " tokens"),
)
_DYNAMICS = (
    ("change", "Entropy change of the layer", "ΔH (nats)", "+.3f", " nats"),
    ("perplexity", "Perplexity of the policy", "Perplexity", ".3f", ""),
)
_SITES = {"layer": "", "attn": "attention", "ffn": "FFN"}
_PERCENT = ".2f"


def page(run: Run) -> str:
    """Return the page of a training run as HTML."""
    history = {f"h{i}": chart for i, chart in enumerate(_history(run), start=1)}
    dynamics = {f"d{i}": chart for i, chart in enumerate(_dynamics(run), start=1)}
    evaluated = _evaluated(run)
    charts = {**history, **dynamics}
    if evaluated is not None and evaluated["chart"] is not None:
        charts["e1"] = evaluated["chart"]
    failed = ", ".join(f"{n} {clean(kind)}" for kind, n in run.failures.items() if n)
    return render(
        "training.html.j2",
        title=f"Training of {run.name}: {run.label}",
        charts=charts,
        name=clean(run.name),
        label=clean(run.label),
        summary=summary(run, evaluated),
        layer=None if run.layer is None else str(run.layer),
        layer_reason=clean(run.layer_reason),
        site=_site(run),
        aligned=run.ipa_steps > 0,
        ipa_steps=counted(run.ipa_steps, "step"),
        ipa_reason=clean(run.ipa_reason),
        phases=_phases(run),
        window=window_for(len(run.history), SMOOTH),
        last_layer=clean(why_no_dynamics(run) or ""),
        history=history,
        dynamics=dynamics,
        evaluated=evaluated,
        failed=failed,
        settings=settings_tables(run),
        again=training_commands(run),
    )


def summary(run: Run, evaluated: dict[str, Any] | None) -> str:
    """Summarise the run in sentences that can be quoted; `evaluated` is the result of `_evaluated`."""
    first = f"{clean(run.name)} was trained for {counted(len(run.history), 'step')} with {clean(run.label)}"
    if run.layer is not None and len(run.history):
        first += f": {_course(run)}"
    sentences = [f"{first}."]
    if len(run.history) > 1:
        sentences.append(_rewards(run))
    if evaluated is not None and evaluated["sentence"]:
        sentences.append(evaluated["sentence"])
    return " ".join(sentences)


def _course(run: Run) -> str:
    """Return what was optimised, phase by phase."""
    site = f"the {_site(run)} in " if _site(run) else ""
    aligned = f"internal policy alignment of {site}layer {run.layer}"
    phases = [
        f"{aligned if phase == ALIGNMENT else clean(phase).upper()} for {counted(len(own), 'step')}"
        for phase, own in run.history.groupby("phase", sort=False)
    ]
    return ", then ".join(phases) if run.ipa_steps else f"no {aligned}, {phases[0]}"


def _site(run: Run) -> str:
    """Return the module of the layer that was aligned; nothing if it was the layer itself."""
    return _SITES[run.config["site"]]


def _rewards(run: Run) -> str:
    """Describe the reward at the start and the end, over a tenth of the steps each, since one batch is noisy."""
    n = max(1, len(run.history) // 10)
    start, end = (number(rewards.mean()) for rewards in (run.history["reward"][:n], run.history["reward"][-n:]))
    if n == 1:
        return f"The mean reward went from {start} in the first step to {end} in the last."
    return f"The mean reward went from {start} over the first {n} steps to {end} over the last {n}."


def _phases(run: Run) -> list[dict[str, str]]:
    if run.history.empty:
        return []
    rows = []
    for phase, own in run.history.groupby("phase", sort=False):
        row = {"phase": clean(phase), "steps": f"{own['step'].iloc[0]}–{own['step'].iloc[-1]}"}
        for column, _, _, form, _ in _HISTORY:
            known = column in own
            row[column] = " → ".join(number(own[column].iloc[i], form) for i in (0, -1)) if known else number(None)
        rows.append(row)
    return rows


def _history(run: Run) -> list[Chart]:
    table = run.history
    window = window_for(len(table), SMOOTH)
    charts = []
    for column, title, y, form, unit in _HISTORY:
        if column not in table or table[column].isna().all():
            continue
        described = f"{title} over the steps of the training, with its phases."
        chart = Chart(title, "Step", y, described, single=window == 1)
        _shade_phases(chart, run, 0.5)
        values = table.set_index("step")[column].astype(float).sort_index()
        marked = {"markers": len(table) <= 60, "format": form, "unit": unit}
        thin = {"width": 0.7} if window > 1 else {}
        name = "each step" if window > 1 else column.replace("_", " ")
        chart.curve(name, list(values.index), values, **{**series_look(0), **marked, **thin})
        if window > 1:
            # Step 1 was sampled before any update; it is no part of a mean.
            means = trailing_mean(values, window).loc[FIRST_STEP + 1 :]
            name = f"mean of the last {window} steps"
            chart.curve(name, list(means.index), means, **{**series_look(0), **marked, "markers": False}, width=3)
        _step_axis(chart, table["step"])
        charts.append(chart)
    return charts


def _dynamics(run: Run) -> list[Chart]:
    table = run.dynamics
    if table.empty:
        return []
    table = table.sort_values("step")
    layer = int(table["layer"].iloc[0])
    charts = []
    for column, title, y, form, unit in _DYNAMICS:
        described = f"{title} on fixed responses, over the steps of the training."
        chart = Chart(title, "Step", y, described, single=True)
        _shade_phases(chart, run, 0.0)
        chart.curve(title, table["step"], table[column], format=form, unit=unit, **look("stream"))
        charts.append(chart)
    title = f"Divergence of layer {layer} from later layers"
    chart = Chart(title, "Step", "KL (nats)", f"{title} on fixed responses, over the steps of the training.")
    _shade_phases(chart, run, 0.0)
    values = [float(v) for v in table["policy_kl"]]
    later = [] if run.dynamics_layers.empty else sorted(run.dynamics_layers["layer"].unique())
    if later:
        values += [float(v) for v in table["kl_mean"]]
        name = "mean of later layers" if len(later) > 1 else f"layer {later[0]}"
        chart.curve(name, table["step"], table["kl_mean"], **look("stream"))
    chart.curve("policy π_θ", table["step"], table["policy_kl"], **look("policy"))
    positive = [v for v in values if v > 0]
    if len(positive) == len(values) and max(values) > 20 * min(values):
        chart.figure.update_yaxes(type="log", dtick=1)
    charts.append(chart)
    for chart in charts:
        _step_axis(chart, table["step"])
    if later:
        charts.append(_similarity(run, layer, later))
    return charts


def _similarity(run: Run, layer: int, later: list[Any]) -> Chart:
    """Draw a line at the start, at the end of alignment and of training; of one later layer, one over the steps."""
    rows = run.dynamics_layers.sort_values(["step", "layer"])
    if len(later) == 1:
        title = f"Similarity of layer {layer} to layer {later[0]}"
        chart = Chart(title, "Step", "Cosine", f"{title}: cosine of their states, over the steps.", single=True)
        _shade_phases(chart, run, 0.0)
        chart.curve(title, rows["step"], rows["cosine"], unit="", **look("stream"))
        _step_axis(chart, rows["step"])
        return chart
    title = f"Similarity of layer {layer} to later layers"
    chart = Chart(title, "Later layer", "Cosine", f"{title}: cosine of their states, a line a measurement.")
    switch, steps = last_alignment_step(run), sorted(rows["step"].unique())
    chosen = list(dict.fromkeys([steps[0], *([max(s for s in steps if s <= switch)] if switch else []), steps[-1]]))
    for place, step in enumerate(chosen):
        own = rows[rows["step"] == step]
        chart.curve(f"step {step}", own["layer"], own["cosine"], color=shade(place, len(chosen)), unit="")
    ticks = {"dtick": 1} if len(later) <= 10 else {"nticks": 8}
    chart.set_x_axis(tickformat="d", hoverformat="d", **ticks)
    return chart


def _shade_phases(chart: Chart, run: Run, after: float) -> None:
    switch = last_alignment_step(run)
    if len(run.history) and (run.history["phase"] == ALIGNMENT).any():
        end = float(switch if switch is not None else run.history["step"].max()) + after
        chart.shade(-0.5 + after, end, "var(--switch)", 0.15)
        if switch is not None:
            chart.mark(end, "end of alignment", "switch")


def _step_axis(chart: Chart, steps: Any) -> None:
    first, last = float(min(steps)), float(max(steps))
    room = max(0.5, 0.02 * (last - first))
    ticks = {"dtick": 1, "tick0": first} if last - first <= 10 else {"nticks": 8}
    chart.set_x_axis(range=[first - room, last + room], tickformat="d", hoverformat="d", **ticks)


def _evaluated(run: Run) -> dict[str, Any] | None:
    from internal_policy.data.benchmarks import title
    from internal_policy.evaluation import compare

    start, trained = run.evaluation_start, run.evaluation
    known = {name: e for name, e in (("start", start), ("trained", trained)) if e is not None}
    if not known:
        return None
    rows = [_rate(name, e.avg["mean"], e.avg["low"], e.avg["high"], "") for name, e in known.items()]
    last = next(reversed(known.values()))
    facts: dict[str, Any] = {
        "title": clean(title(last.benchmark)),
        "n_problems": last.n_problems,
        "n_samples": last.n_samples,
    }
    sentence = change_text = None
    if start is not None and trained is not None:
        change = compare(trained, start)
        rows.append(_rate("difference", change.difference, change.low, change.high, "+"))
        p = "below 0.0001" if change.p_permutation < 1e-4 else f"{change.p_permutation:.2g}"
        change_text = (
            f"better on {counted(change.n_better, 'problem')}, worse on {change.n_worse}, equal on {change.n_equal}; "
            f"p {p} (sign flips)"
        )
        ends = interval(100 * change.low, 100 * change.high, f"+{_PERCENT}")
        sentence = (
            f"On {counted(facts['n_problems'], 'problem')} of {facts['title']} Avg@{facts['n_samples']} went from "
            f"{number(100 * start.avg['mean'], '.1f')}% to {number(100 * trained.avg['mean'], '.1f')}% "
            f"({number(100 * change.difference, '+.1f')} points{f', 95% interval {ends}' if ends else ''})."
        )
    chart = _pass_chart(known) if all(len(e.pass_at_k) > 1 for e in known.values()) else None
    return {**facts, "rows": rows, "change": change_text, "sentence": sentence, "chart": chart}


def _rate(name: str, mean: float, low: float, high: float, sign: str) -> dict[str, str]:
    form = f"{sign}{_PERCENT}"
    known = not math.isnan(low)
    return {
        "name": name,
        "value": number(100 * mean, form),
        "interval": interval(100 * low, 100 * high, form) if known else "",
    }


def _pass_chart(evaluations: dict[str, Any]) -> Chart:
    chart = Chart("Pass@K", "K", "Pass@K", "Pass at K before and after the training, over K.")
    for place, (name, evaluation) in enumerate(evaluations.items()):
        table = evaluation.pass_at_k
        ends = (table["low"], table["high"])
        chart.curve(name, table["k"], table["value"], ends, unit="", **series_look(place))
    ks = sorted({int(k) for e in evaluations.values() for k in e.pass_at_k["k"]})
    chart.set_x_axis(type="log", tickvals=ks, ticktext=[str(k) for k in ks], hoverformat="d")
    return chart
