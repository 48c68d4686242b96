"""Conventions of the ecosystem: one-line loading, figures without side effects, notebook representations."""

from __future__ import annotations

import inspect as python
import os
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plotting_fixtures import make_inspection, make_run
from saved_results import save_one_of_each
from synthetic_analyses import make, progressive, training
from synthetic_evaluations import evaluation_of_counts
from synthetic_interventions import make_ablation, make_patching

import internal_policy
from internal_policy import (
    Ablation,
    Analysis,
    AnalysisComparison,
    Evaluation,
    Inspection,
    Patching,
    Study,
    UserError,
    compare,
    load_analyses,
)
from internal_policy.bupo import Run
from internal_policy.comparison.results import TABLES
from internal_policy.plotting import (
    analysis as figures,
)
from internal_policy.plotting import comparison as comparison_figures
from internal_policy.plotting import (
    evaluation as evaluation_figures,
)
from internal_policy.plotting import inspection as inspection_figure
from internal_policy.plotting import interventions as intervention_figures
from internal_policy.plotting import parts as parts_figure
from internal_policy.plotting import (
    training as training_figures,
)
from internal_policy.utils import html as notebook

STORED_RUN = Path(__file__).parents[2] / "data" / "experiments" / "runs" / "qwen3-bupo-l7-s12-lr0.0001-t120-seed0"
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>`$x$"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return save_one_of_each(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def comparison(place):
    return compare(place / "analyses")


# One line


def test_every_result_is_loaded_only_by_its_class(place):
    kinds = {"analyses/007": Analysis, "comparison": AnalysisComparison, "evaluation": Evaluation}
    kinds |= {"inspection": Inspection, "ablation": Ablation, "patching": Patching, "analyses": Study, STORED_RUN: Run}
    for where, kind in kinds.items():
        assert isinstance(kind.load(str(place / where)), kind)
        with pytest.raises(UserError):
            kind.load(place / "nowhere")
    public = [*internal_policy.__all__, *internal_policy.bupo.__all__, *internal_policy.evaluation.__all__]
    # Several at once have a function: a class has no place for the order that steps give them.
    assert [name for name in public if name.startswith("load")] == ["load_analyses"]


def test_a_directory_of_analyses_is_loaded_in_the_order_of_its_steps(tmp_path):
    for analysis, step in zip(training(3, n_layers=4, prompts=4), (5, 10, 100), strict=True):
        replace(analysis, name=f"run/checkpoint-{step}").save(tmp_path / f"run--checkpoint-{step}")
    assert [a.path.name.rsplit("-")[-1] for a in load_analyses(tmp_path)] == ["5", "10", "100"]
    with pytest.raises(UserError, match="no finished analysis"):
        load_analyses(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["bupo", "data", "evaluation", "models", "plotting", "report"])
def test_documented_imports_are_public_names_of_the_package(name, monkeypatch):
    # As it is where nothing has imported it yet.
    monkeypatch.delitem(vars(internal_policy), name, raising=False)
    assert getattr(internal_policy, name) is sys.modules[f"internal_policy.{name}"]


def test_unknown_curves_are_refused_with_the_available_ones():
    analysis = make(progressive(4), prompts=2)
    assert list(analysis.curve("ffn").index) == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"site is 'mlp'; needed is one of layer, attn, ffn$"):
        analysis.curve("mlp", "entropy_out")
    with pytest.raises(UserError, match=r"value is 'entropy'; needed is one of .*entropy_in.*change_stderr"):
        analysis.curve("ffn", "entropy")


def test_a_comparison_survives_saving_and_loading(place, comparison):
    loaded = AnalysisComparison.load(place)
    assert loaded.labels == ("007", "NA")
    for name in TABLES:
        table = getattr(comparison, name)
        if len(table):
            pd.testing.assert_frame_equal(getattr(loaded, name), table, check_exact=True)
    for name in ("baseline", "steps", "paired", "differing", "notes", "sources", "no_trends", "one_architecture"):
        assert getattr(loaded, name) == getattr(comparison, name)
    assert loaded.path == place / "comparison"


def test_a_study_survives_saving_and_loading_with_its_failures(place):
    study = Study.load(place)
    assert [a.name for a in study.analyses] == ["some/007", "some/NA"]
    assert study.failures == {"other": "why"}
    assert repr(study) == "Study(2 models: 007, NA; 1 failed)"


def test_every_stored_table_is_read_by_plain_pandas(place):
    empty = {"trends.csv", "tokens.parquet"}
    files = [p for p in place.rglob("*") if p.suffix in {".csv", ".parquet"} and p.name not in empty]
    assert {p.name for p in files} >= {"layers.csv", "responses.parquet", "tokens.csv", "problems.csv", "pass_at_k.csv"}
    for path in files:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        assert len(table.columns) > 1, path
    one = Analysis.load(place / "analyses" / "007")
    pd.testing.assert_frame_equal(pd.read_csv(one.path / "layers.csv"), one.layers)
    pd.testing.assert_frame_equal(pd.read_parquet(one.path / "responses.parquet"), one.responses)
    assert list(pd.read_json(place / "evaluation" / "samples.jsonl", lines=True)["n_tokens"]) == [3]


# Figures


def drawings(comparison):
    analysis, run, look = make(progressive(6), prompts=4), make_run(steps=12, ipa_steps=4), make_inspection(3, 12, 5)
    rates, stepped = evaluation_of_counts([3, 9, 16]), compare(training(3, n_layers=6, prompts=4))
    other = compare(make(progressive(6), "a", prompts=4), make(progressive(8), "b", prompts=4))
    return {
        **dict.fromkeys((figures.plot_entropy_change, figures.plot_entropy_flow), (analysis,)),
        **{f: ([analysis],) for f in (figures.entropy_change, figures.entropy_flow, figures.residual_cosine)},
        figures.plot_residual_cosine: (analysis,),
        **{parts_figure.plot_change_parts: (analysis,), parts_figure.change_parts: ([analysis],)},
        figures.stage_sketch: ([analysis],),
        **{f: ([run],) for f in (training_figures.training_curves, training_figures.policy_entropy_curves)},
        training_figures.alignment_dynamics: (run,),
        **{f: ([rates],) for f in (evaluation_figures.pass_at_k, evaluation_figures.pass_at_k_by_benchmark)},
        evaluation_figures.plot_pass_at_k: ([rates],),
        **dict.fromkeys((inspection_figure.inspection_map, inspection_figure.plot_inspection), (look,)),
        **dict.fromkeys((comparison_figures.heat_maps, comparison_figures.layer_lines), (stepped,)),
        **dict.fromkeys((comparison_figures.depth_overlay, comparison_figures.entropy_fall), (comparison,)),
        comparison_figures.layer_differences: (comparison,),
        comparison_figures.depth_differences: (other,),
        **dict.fromkeys((intervention_figures.ablation_map, intervention_figures.ablation_bars), (make_ablation(),)),
        intervention_figures.patching_map: (make_patching(),),
    }


MODULES = (
    *(figures, parts_figure, training_figures, evaluation_figures, comparison_figures, inspection_figure),
    intervention_figures,
)


def public_figures():
    """Every public function that gives a figure or axes."""
    found = set()
    for module in MODULES:
        for name, function in vars(module).items():
            returned = getattr(function, "__annotations__", {}).get("return") if python.isfunction(function) else None
            if function.__module__ == module.__name__ and not name.startswith("_") if returned else False:
                found |= {function} if returned in ("Figure", "Axes") else set()
    return found


@pytest.mark.slow
def test_figures_do_not_change_the_users_session(comparison):
    cases = drawings(comparison)
    assert {f.__qualname__ for f in public_figures() - set(cases)} == set()
    with mpl.rc_context({"axes.facecolor": "#eaeaf2", "font.size": 19.0, "axes.grid": True}):
        before = dict(mpl.rcParams)
        for function, arguments in cases.items():
            drawn = function(*arguments)
            assert isinstance(drawn, (Figure, Axes)), function
            assert {k: v for k, v in mpl.rcParams.items() if before[k] != v} == {}, function
            assert plt.get_fignums() == [], function
            figure = drawn if isinstance(drawn, Figure) else drawn.figure
            assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0), function
            words = python.signature(function).parameters
            assert {"ax", "label", "color"} <= set(words), function
        figures.entropy_flow(cases[figures.entropy_flow][0]).savefig(os.devnull, format="png")
        assert dict(mpl.rcParams) == before


def test_one_panel_is_drawn_on_the_users_axes():
    figure = Figure()
    ax = figure.subplots()
    assert figures.plot_entropy_change(make(progressive(6), prompts=4), "ffn", ax=ax) is ax
    assert ax.lines
    assert plt.get_fignums() == []


# Notebooks


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, sorted(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += data


def hostile(place):
    run = Run.load(STORED_RUN)
    look = make_inspection(3, 12, 5, words=[HOSTILE, "<b>", "&lt;"])
    look = replace(look, **{"values": look.values.assign(next_probability=0.5)})  # noqa: PD011
    yield replace(Analysis.load(place / "analyses" / "NA"), name=HOSTILE)
    yield compare(place / "analyses", labels=[HOSTILE, "other"])
    yield replace(evaluation_of_counts([3, 9, 16]), name=HOSTILE)
    yield replace(run, name=HOSTILE, layer_reason=HOSTILE, evaluation_paths={})
    yield replace(look, name=HOSTILE)
    yield replace(make_ablation(), name=HOSTILE)
    yield replace(make_patching(words=[HOSTILE, "<b>", "&lt;", "a"]), name=HOSTILE)
    yield replace(Analysis.load(place / "analyses" / "NA").selection, reason=HOSTILE)
    yield replace(Study.load(place), failures={HOSTILE: "why"})


def test_html_representation_is_an_escaped_table(place):
    for result in hostile(place):
        page = Tags(result._repr_html_())
        assert (
            {"b", "table"} <= {tag for tag, _ in page.tags} <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}
        )
        assert {name for _, names in page.tags for name in names} <= {"style", "border", "class"}
        assert "<script>alert('x')</script>" in page.text
        # Colours are the notebook's own, so that a dark one can be read as well as a light one.
        assert "color" not in result._repr_html_()


def test_a_long_table_shows_its_ends_and_its_size():
    table = pd.DataFrame({"n": [f"{i}<" for i in range(notebook.MOST_ROWS + 3)], "text": "y" * 999})
    html = notebook.card("Kind", "x" * 500, table=table, note="nats")
    page = Tags(html)
    assert f"{len(table)} rows" in page.text
    assert page.text.count("x") <= 201
    assert page.text.count("y") <= 200 * notebook.MOST_ROWS
    # The first rows, the last rows, a placeholder row, and the headings.
    assert len([tag for tag, _ in page.tags if tag == "tr"]) == notebook.MOST_ROWS + 2
    assert "0<" in page.text
    assert "0<" not in html
    assert "table" not in {tag for tag, _ in Tags(notebook.card("Kind", "x", table=table[:0])).tags}


def test_plain_reprs_are_short(place, comparison):
    study = Study.load(place)
    results = (
        *study.analyses,
        study,
        comparison,
        Run.load(STORED_RUN),
        evaluation_of_counts([3]),
        make_inspection(3, 12, 5),
        make_ablation(),
        make_patching(),
    )
    for result in results:
        assert len(repr(result)) < 220
        assert "\n" not in repr(result)
    assert "BuPO, layer 7, 12 steps, first at 0.0001; 120 steps, reward" in repr(Run.load(STORED_RUN))


@pytest.mark.slow
def test_importing_the_library_is_silent_and_needs_no_torch(place):
    code = (
        "import sys, logging\nfrom internal_policy import Analysis\n"
        f"page = Analysis.load({str(place / 'analyses' / 'NA')!r})._repr_html_()\n"
        "assert '<table' in page\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
        "log = logging.getLogger('internal_policy')\n"
        "assert log.handlers == [] and log.level == logging.NOTSET and log.propagate\n"
        "log.info('not heard'); log.warning('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "heard\n")
