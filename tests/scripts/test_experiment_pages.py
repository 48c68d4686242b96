"""The page of results and the figures: what they show is what is stored, whichever runs there are."""

from __future__ import annotations

import re
import shutil

import cells
import draw
import made_up_experiments as made_up
import mechanism
import numpy as np
import pages
import pandas as pd
import pytest
import stored_results
import summaries
import tables
from documents import ROOT
from plotting_fixtures import assert_legible, drawn

# Summaries of made-up and stored runs, again and again: half a minute.
pytestmark = pytest.mark.slow

PAGE = ROOT / pages.PAGE
INTERVAL = re.compile(r"[+-]?\d+\.\d+ \([+-]?\d+\.\d+ to [+-]?\d+\.\d+\)")


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    """Three seeds of E1, E2 and E4, none of methods."""
    data = tmp_path_factory.mktemp("data")
    made_up.write(data, "e1", range(3))
    made_up.write(data, "e2", range(3))
    made_up.write(data, "e4", range(3))
    made_up.evidence().to_csv(data / "e4" / "evidence.csv", index=False)
    return data


@pytest.fixture(scope="module")
def found(incomplete):
    return summaries.summaries(incomplete)


@pytest.fixture(scope="module")
def stored():
    return summaries.summaries(ROOT / "data" / "experiments")


def test_the_page_has_the_tables_of_the_stored_results(stored):
    text = PAGE.read_text(encoding="utf-8")
    assert pages.filled(text, stored) == text, "run: python scripts/experiments/pages.py"
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == set(pages.TABLES)


def test_the_stored_summaries_are_those_of_the_stored_runs(stored):
    for name, table in stored.items():
        if name == summaries.EVIDENCE:
            continue
        assert_stored(name, table, ROOT / summaries.SUMMARIES / f"{name}.csv")


def assert_stored(name, table, path):
    """Numbers are those of the file to six digits, and text and verdicts exactly."""
    kept, ours = tables.read_table(path), summaries.rounded(table)
    assert len(kept) == len(ours), name
    if not len(ours):
        return
    assert list(kept.columns) == list(ours.columns), name
    # As they stand in the file: read as text, an empty field is no NaN, and a dose of 4 no number.
    written = pd.read_csv(path, dtype=str, keep_default_na=False)
    for column in ours.columns:
        # To pandas a boolean is no number.
        if pd.api.types.is_numeric_dtype(ours[column]) and not pd.api.types.is_bool_dtype(ours[column]):
            # Both are rounded to six digits; the last may differ between machines.
            np.testing.assert_allclose(kept[column], ours[column], rtol=2e-6, atol=1e-9, err_msg=f"{name} {column}")
        else:
            told = ["" if pd.isna(value) else str(value) for value in ours[column]]
            assert written[column].to_list() == told, f"{name} {column}"


@pytest.mark.parametrize(
    ("column", "stale"),
    [("holds", "no"), ("holds", None), ("agrees", False), ("value", 0.3001), ("model", "testbed/llama"), ("dose", "5")],
)
def test_a_stale_summary_is_noticed(tmp_path, column, stale):
    table = pd.DataFrame(
        {
            **{"model": ["testbed/qwen3"] * 2, "dose": ["4", "auto"], "value": [0.3, np.nan]},
            **{"holds": ["yes", np.nan], "agrees": [True, False]},
        }
    )
    changed = table.astype({column: object} if stale is None else {})
    changed.loc[0, column] = stale
    path = tmp_path / "kept.csv"
    table.to_csv(path, index=False)
    assert_stored("made up", table, path)
    changed.to_csv(path, index=False)
    with pytest.raises(AssertionError, match=f"made up {column}"):
        assert_stored("made up", table, path)


@pytest.mark.parametrize("name", ["README.md", "docs/results.md", "docs/transfer.md"])
def test_intervals_in_prose_are_those_of_a_table(name):
    text = PAGE.read_text(encoding="utf-8")
    known = {
        match
        for table in re.findall(r"<!-- table: .*?<!-- end of table -->", text, re.S)
        for match in INTERVAL.findall(table)
    }
    document = (ROOT / name).read_text(encoding="utf-8")
    section = document if name.startswith("docs") else document[document.index("**On the embedded models") :]
    prose = re.sub(r"<!-- table: .*?<!-- end of table -->", "", section, flags=re.S)
    assert not set(INTERVAL.findall(" ".join(prose.split()))) - known


def test_every_figure_of_the_page_is_stored():
    pictures = re.findall(r"!\[[^\]]*\]\((\S+)\)", PAGE.read_text(encoding="utf-8"))
    assert all((PAGE.parent / picture).is_file() for picture in pictures)


def test_tables_say_how_many_seeds_and_what_is_missing(found):
    shown = {name: table(found) for name, table in pages.TABLES.items()}
    assert shown["methods"] == pages.NOTHING
    assert "| E1 | 84 of 84 | 3 |" in shown["completeness"]
    assert "| methods | 0 of 18 | 0 | 0.9 | `make experiment PART=methods` |" in shown["completeness"]
    assert "nan" not in "".join(shown.values())
    row = next(line for line in shown["e2_differences"].splitlines() if "qwen3` | 1e-4 | 24 |" in line)
    end = found["e2_differences"].query(
        "model == 'testbed/qwen3' and rate == 1e-4 and dose == '24' and measure == 'avg'"
    )
    value, low, high = 100 * end.iloc[0][["value", "low", "high"]].astype(float)
    assert f"| {value:+.1f} ({low:+.1f} to {high:+.1f}) |" in row
    assert row.endswith("| 3 |")


def test_conditions_name_an_effect_only_where_the_interval_excludes_zero(found):
    lines = pages.conditions_alone(found).splitlines()
    row = next(line for line in lines if "qwen3` | layer 4 aligned" in line)
    ends = found["e1_outcomes"].query("model == 'testbed/qwen3' and layer == 4 and measure == 'avg'").set_index("rate")
    # The made-up noise of the seeds is wider than the effect at the lowest rate, and narrower at the highest.
    assert ends.loc[1e-4, "low"] < 0 < ends.loc[1e-4, "high"]
    assert ends.loc[5e-4, "high"] < 0
    assert f"| not decided: {100 * ends.loc[1e-4, 'gain']:+.1f} (" in row
    assert f"| **harmed**: {100 * ends.loc[5e-4, 'gain']:+.1f} (" in row
    assert sum("| GRPO | **helped**: +30.1 (" in line for line in lines) == 2
    # 48 steps of alignment are worth 24 of GRPO, so that 72 more end above GRPO after 72.
    lines = pages.conditions_first(found).splitlines()
    assert any("| 48 | 1e-4 |" in line and "**harmed**" in line and "**helped**: +10.1" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "low", "high", "said"),
    [
        (0.1, 0.05, 0.15, "**helped**: +10.0 (+5.0 to +15.0)"),
        (-0.1, -0.15, -0.05, "**harmed**: -10.0 (-15.0 to -5.0)"),
        (0.1, -0.05, 0.25, "not decided: +10.0 (-5.0 to +25.0)"),
        # Its interval excludes zero, but the measurement of the start may be off by as much.
        (0.015, 0.01, 0.02, "nothing: +1.5 (+1.0 to +2.0)"),
        (0.0, -0.04, 0.04, "nothing: +0.0 (-4.0 to +4.0)"),
        (0.05, 0.05, 0.05, "**helped**: +5.0 (all seeds)"),
    ],
)
def test_verdicts_say_what_an_interval_says(value, low, high, said):
    row = {"value": value, "low": low, "high": high, "seeds": 3}
    assert cells.verdict(row, small=0.02, negligible=0.05) == said
    # Two seeds that happen to agree make the narrowest intervals.
    assert cells.verdict({**row, "seeds": 2}, small=0.02, negligible=0.05) == f"two seeds: {said.split(': ')[1]}"
    one = {"value": value, "low": np.nan, "high": np.nan, "seeds": 1}
    assert cells.verdict(one, small=0.02, negligible=0.05) == f"one seed: {100 * value:+.1f}"
    assert cells.verdict(None, small=0.02, negligible=0.05) == "not run"


def test_a_single_seed_has_no_interval(tmp_path):
    made_up.write(tmp_path, "e1", range(1))
    alone = summaries.summaries(tmp_path)
    assert not INTERVAL.search(pages.e1_behaviour(alone))
    assert not INTERVAL.search(pages.conditions_alone(alone))
    assert "| 1 |" in pages.e1_behaviour(alone)
    counts = alone["prediction_counts"].set_index("prediction")
    assert counts.loc["P1", ["undecided", "not run"]].to_list() == [24, 0]
    assert counts.loc["P7", "not run"] == 16


def test_filling_replaces_what_is_between_the_markers_only(found):
    text = "before\n\n<!-- table: e2_auto -->\nold\n<!-- end of table -->\nafter"
    once = pages.filled(text, found)
    assert once.startswith("before\n")
    assert once.endswith("\nafter")
    assert "old" not in once
    assert pages.filled(once, found) == once


def test_figures_are_legible_and_show_the_means(incomplete):
    e1, e2, e4, others = (tables.read_part(part, incomplete) for part in ("e1", "e2", "e4", "methods"))
    both = tables.joined(e4, e2)
    for figure in (
        *(draw.alignment(e1, "testbed/qwen3", shown) for shown in (draw.ROLLOUTS, draw.STATES)),
        *(draw.dose_curves(e2), draw.dose_differences(e2)),
        draw.every_layer(both, made_up.evidence()),
    ):
        assert_legible(figure)
    figure = draw.alignment(e1, "testbed/qwen3", draw.STATES)
    steps, values = drawn(figure.axes[0], "layer 4")
    means = tables.over_seeds(mechanism.quantities(e1), [*mechanism.BY, "quantity", "step"])
    means = means.query("model == 'testbed/qwen3' and layer == 4 and rate == 1e-4")
    means = means[means["quantity"] == "cosine"].sort_values("step")
    np.testing.assert_array_equal(steps, means["step"])
    np.testing.assert_array_equal(values, means["value"])
    assert len(others["runs"]) == 0


def test_rewards_are_averaged_over_steps_within_a_run():
    table = pd.DataFrame(
        {"run": ["a"] * 6 + ["b"] * 6, "quantity": "reward", "step": [*range(6)] * 2, "value": [*range(6)] + [10.0] * 6}
    )
    smooth = draw._smoothed(table)
    assert smooth.groupby("run")["value"].apply(list).to_dict() == {"a": [2.0, 3.0], "b": [10.0, 10.0]}
    assert smooth["step"].tolist() == [4, 5, 4, 5]


def test_only_parts_with_runs_are_drawn(incomplete, tmp_path, monkeypatch):
    monkeypatch.setattr(draw.style, "save_figure", lambda figure, stem: [stem])
    names = {path.stem for path in draw.draw(tmp_path, incomplete)}
    assert names == {
        *(f"{figure}_alignment_{model}" for figure in ("fig4", "fig5") for model in ("qwen3", "llama")),
        *("dose_curves", "dose_differences", "every_layer"),
    }


def test_results_are_stored_from_the_main_runs_only_if_all_are_there(tmp_path):
    wanted = stored_results.main_jobs()
    assert {job.name for job in wanted if job.seed == 0} == {
        *("qwen3-grpo-t120-seed0", "qwen3-bupo-l7-s12-lr0.0001-t120-seed0"),
        *("llama-grpo-t120-seed0", "llama-bupo-l6-s12-lr0.0001-t120-seed0"),
    }
    assert {job.name for job in stored_results.watched_jobs()} == {
        f"{model}-bupo-l{layer}-s60-lr0.0001-t60-seed0" for model in ("qwen3", "llama") for layer in (2, 4, 6, 7)
    }
    work, target = tmp_path / "work", tmp_path / "runs"
    whole = ROOT / "data" / "experiments" / "runs" / "qwen3-grpo-t120-seed0"
    for job in wanted[:3]:
        path = work / job.part / job.name
        shutil.copytree(whole, path)
        (path / "model").mkdir()
        (path / "checkpoint.bin").write_text(job.name)
    (work / wanted[1].part / wanted[1].name / "model").rmdir()
    # Another attempt began in the place of a run, and was cut off.
    (work / wanted[2].part / wanted[2].name / "history.csv").write_text("step\n1\n")
    assert stored_results.missing(wanted, work) == wanted[1:]
    (target / "old").mkdir(parents=True)
    stored_results.keep_runs(wanted[:1], target, work)
    kept = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    tables_of_run = ("run.json", "history.csv", "dynamics.csv", "dynamics_layers.csv")
    assert kept == {f"{wanted[0].name}/{name}" for name in tables_of_run}


def test_the_gate_counts_starts_that_only_guess():
    looks = pd.DataFrame(
        [
            {"candidate": "a", "step": 1, "passes": 0, "failed": "worked_at_k", "pass_at_k": 0.9, "worked_at_k": 0.02},
            {"candidate": "a", "step": 2, "passes": 0, "failed": "worked_at_k", "pass_at_k": 0.9, "worked_at_k": 0.04},
            {
                "candidate": "a",
                "step": 3,
                "passes": 0,
                "failed": "greedy entropy",
                "pass_at_k": 0.9,
                "worked_at_k": 0.6,
            },
            {"candidate": "b", "step": 1, "passes": 0, "failed": "pass_at_k worked_at_k", "pass_at_k": None},
        ]
    ).reindex(columns=["candidate", "step", "passes", "failed", *summaries._CONDITIONS])
    first, second = summaries.gate(looks).to_dict("records")
    assert [first[name] for name in ("looks", "measured", "passes", "but_worked", "step")] == [3, 3, 0, 2, 2]
    assert [second[name] for name in ("looks", "measured", "passes", "but_worked")] == [1, 0, 0, 0]
    assert np.isnan(second["step"])
