"""What users of the ecosystem expect: one-line loading, figures that leave a session alone, notebooks, scripts."""

from __future__ import annotations

import inspect as python
import json
import logging
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
from command_line import run
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rated import rated
from shapes import make, progressive, training
from test_inspection_figure import made as make_inspection
from test_training_figures import make_run
from training import command

import internal_policy
from internal_policy import (
    Analysis,
    AnalysisComparison,
    AnalyzeConfig,
    Evaluation,
    Inspection,
    Study,
    UserError,
    alignment_figures,
    compare,
    evaluation_figures,
    figures,
    notebook,
    output,
    training_figures,
)
from internal_policy.bupo import Run
from internal_policy.comparison import figures as comparison_figures
from internal_policy.comparison import terminal as comparison_terminal
from internal_policy.comparison.analyses import TABLES
from internal_policy.inspection import figure as inspection_figure
from internal_policy.progress import progress, status
from internal_policy.study_models import StudyModel

COMMAND = Path(sys.executable).with_name("internal-policy")
STORED_RUN = Path(__file__).parents[1] / "data" / "experiments" / "runs" / "qwen3-bupo-l7-s3-seed2"
HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>`$x$"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("habits")
    made = (make(progressive(6), name, prompts=4, seed=seed) for seed, name in enumerate(("some/007", "some/NA")))
    one, two = (replace(analysis, config={**analysis.config, "template": "chat"}) for analysis in made)
    one.save(root / "analyses" / "007")
    two.save(root / "analyses" / "NA")
    compare(root / "analyses").save(root / "comparison")
    rated([3, 9, 16]).save(root / "evaluation")
    make_inspection(n_layers=3, n_tokens=12, prompt=5).save(root / "inspection")
    rows = tuple(StudyModel(name, "chat", "main") for name in ("some/007", "some/NA"))
    Study(rows, tuple(Analysis.load_all(root / "analyses")), {"other": "why"}).record(root / "analyses")
    return root


@pytest.fixture(scope="module")
def comparison(place):
    return compare(place / "analyses")


# One line


def test_every_result_is_loaded_by_its_class_and_in_no_other_way(place):
    kinds = {"analyses/007": Analysis, "comparison": AnalysisComparison, "evaluation": Evaluation}
    for where, kind in {**kinds, "inspection": Inspection, "analyses": Study, STORED_RUN: Run}.items():
        assert isinstance(kind.load(str(place / where)), kind)
        with pytest.raises(UserError):
            kind.load(place / "nowhere")
    public = [*internal_policy.__all__, *internal_policy.bupo.__all__, *internal_policy.evaluation.__all__]
    assert not [name for name in public if name.startswith("load")]


def test_a_directory_of_analyses_is_loaded_in_the_order_of_its_steps(tmp_path):
    for analysis, step in zip(training(3, n_layers=4, prompts=4), (5, 10, 100), strict=True):
        replace(analysis, name=f"run/checkpoint-{step}").save(tmp_path / f"run--checkpoint-{step}")
    assert [a.path.name.rsplit("-")[-1] for a in Analysis.load_all(tmp_path)] == ["5", "10", "100"]
    with pytest.raises(UserError, match="no finished analysis"):
        Analysis.load_all(tmp_path / "nowhere")


def test_a_comparison_comes_back_as_it_was(place, comparison):
    loaded = AnalysisComparison.load(place)
    assert loaded.labels == ("007", "NA")
    for name in TABLES:
        table = getattr(comparison, name)
        if len(table):
            pd.testing.assert_frame_equal(getattr(loaded, name), table, check_exact=True)
    for name in ("baseline", "steps", "paired", "differing", "notes", "sources", "no_trends", "one_architecture"):
        assert getattr(loaded, name) == getattr(comparison, name)
    assert loaded.path == place / "comparison"


def test_a_study_comes_back_with_its_failures(place):
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
    rates, stepped = rated([3, 9, 16]), compare(training(3, n_layers=6, prompts=4))
    other = compare(make(progressive(6), "a", prompts=4), make(progressive(8), "b", prompts=4))
    return {
        **dict.fromkeys((figures.plot_entropy_change, figures.plot_entropy_flow), (analysis,)),
        **{f: ([analysis],) for f in (figures.entropy_change, figures.entropy_flow, figures.residual_cosine)},
        figures.plot_residual_cosine: (analysis,),
        figures.stage_sketch: ([analysis],),
        **{f: ([run],) for f in (training_figures.training_curves, training_figures.policy_entropy_curves)},
        alignment_figures.alignment_dynamics: (run,),
        **{f: ([rates],) for f in (evaluation_figures.pass_at_k, evaluation_figures.pass_at_k_by_benchmark)},
        evaluation_figures.plot_pass_at_k: ([rates],),
        **dict.fromkeys((inspection_figure.inspection_map, inspection_figure.plot_inspection), (look,)),
        **dict.fromkeys((comparison_figures.heat_maps, comparison_figures.layer_lines), (stepped,)),
        **dict.fromkeys((comparison_figures.depth_overlay, comparison_figures.entropy_fall), (comparison,)),
        comparison_figures.layer_differences: (comparison,),
        comparison_figures.depth_differences: (other,),
    }


MODULES = (*(figures, training_figures, alignment_figures, evaluation_figures, comparison_figures, inspection_figure),)


def public_figures():
    """Every public function that gives a figure or axes."""
    found = set()
    for module in MODULES:
        for name, function in vars(module).items():
            returned = getattr(function, "__annotations__", {}).get("return") if python.isfunction(function) else None
            if function.__module__ == module.__name__ and not name.startswith("_") if returned else False:
                found |= {function} if returned in ("Figure", "Axes") else set()
    return found


def test_no_figure_touches_the_users_session(comparison):
    cases = drawings(comparison)
    assert {f.__qualname__ for f in public_figures() - set(cases)} == set()
    with mpl.rc_context({"axes.facecolor": "#eaeaf2", "font.size": 19.0, "axes.grid": True}):
        before = dict(mpl.rcParams)
        for function, arguments in cases.items():
            made = function(*arguments)
            assert isinstance(made, (Figure, Axes)), function
            assert {k: v for k, v in mpl.rcParams.items() if before[k] != v} == {}, function
            assert plt.get_fignums() == [], function
            figure = made if isinstance(made, Figure) else made.figure
            assert figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0), function
            words = python.signature(function).parameters
            assert {"ax", "axes"} & set(words), function
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
    yield replace(rated([3, 9, 16]), name=HOSTILE)
    yield replace(run, name=HOSTILE, layer_reason=HOSTILE, evaluation_paths={})
    yield replace(look, name=HOSTILE)
    yield replace(Analysis.load(place / "analyses" / "NA").selection, reason=HOSTILE)
    yield replace(Study.load(place), failures={HOSTILE: "why"})


def test_a_notebook_shows_a_table_and_a_figure_and_no_markup_of_others(place, monkeypatch):
    monkeypatch.setattr(notebook, "picture", lambda figure, told: f"<img alt='{len(figure.axes)}'>")
    for result in hostile(place):
        page = Tags(result._repr_html_())
        kinds = {tag for tag, _ in page.tags}
        assert kinds <= {"div", "b", "table", "thead", "tbody", "tr", "th", "td", "img"}
        assert "table" in kinds
        assert all(names in ([], ["style"], ["alt"]) for _, names in page.tags)
        assert ("img" in kinds) == (type(result).__name__ != "Selection")
        assert "<script>alert('x')</script>" in page.text
        # Colours are the notebook's own, so that a dark one can be read as well as a light one.
        assert "color:#" not in result._repr_html_().replace("background:#fff", "")


def test_a_long_table_tells_how_much_it_leaves_out():
    rows = notebook.Rows(("n",), [[i] for i in range(notebook.MOST_ROWS + 3)])
    page = Tags(notebook.card("Kind", "x" * 500, table=rows))
    assert "and 3 more rows" in page.text
    assert page.text.count("x") < 200
    assert len([tag for tag, _ in page.tags if tag == "tr"]) == 1 + notebook.MOST_ROWS


def test_plain_reprs_are_short(place, comparison):
    study = Study.load(place)
    results = (*study.analyses, study, comparison, Run.load(STORED_RUN), rated([3]), make_inspection(3, 12, 5))
    for result in results:
        assert len(repr(result)) < 220
        assert "\n" not in repr(result)
    assert "BuPO, layer 7, 3 steps; 30 steps, reward" in repr(Run.load(STORED_RUN))


@pytest.mark.slow
def test_a_library_user_hears_nothing_and_needs_no_torch(place):
    code = (
        "import sys, logging\nfrom internal_policy import Analysis\n"
        f"page = Analysis.load({str(place / 'analyses' / 'NA')!r})._repr_html_()\n"
        "assert 'src=\"data:image/png;base64,' in page\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "log = logging.getLogger('internal_policy')\n"
        "assert log.handlers == [] and log.level == logging.NOTSET and log.propagate\n"
        "log.info('not heard'); log.warning('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "heard\n")


# Scripts


def told(monkeypatch, capsys, *arguments):
    """The one JSON document on standard output."""
    code, out, err = command(monkeypatch, capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes most of the time, and is tested elsewhere."""
    for module, name in ((comparison_figures, "save_all_comparisons"), (figures, "save_all")):
        monkeypatch.setattr(module, name, lambda results, directory: [directory / "figure.png"])
    monkeypatch.setattr("internal_policy.report.write_report", lambda thing, place=None: place / "report.html")


def test_json_is_one_document_with_what_was_written(place, tmp_path, monkeypatch, capsys, undrawn):
    found = told(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path)
    assert found["command"] == "compare"
    assert set(found["tables"]) == set(TABLES)
    assert found["tables"]["trends"] == []
    written = [Path(path) for path in found["files"]["comparison"]]
    assert {p.name for p in written} == {p.name for p in Path(found["path"]).iterdir()}
    assert all(p.is_file() for p in written)
    (Path(found["path"]) / "report.html").touch()
    assert told(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path)["files"] == found["files"]
    found = told(monkeypatch, capsys, "figures", place / "analyses" / "NA", "-o", tmp_path)
    assert found == {"command": "figures", "files": {"figures": [str(tmp_path / "NA" / "figure.png")]}}


def test_json_of_an_analysis_has_the_target_layer_and_its_confidence(tmp_path, monkeypatch, capsys, undrawn):
    words = ("--max-responses", "2", "--max-new-tokens", "4", "-o", tmp_path)
    found = told(monkeypatch, capsys, "analyze", *words)
    (analysis,) = found["analyses"]
    # Without a model it is the one that AnalyzeConfig has, and that train begins with.
    assert analysis["name"] == AnalyzeConfig().model == "testbed/qwen3"
    loaded = Analysis.load(analysis["path"])
    assert analysis["boundary_layer"] == loaded.boundary_layer
    assert analysis["selection"]["confidence"] == loaded.selection.confidence
    assert analysis["stages"] == list(loaded.stages)
    assert set(found["files"]) == {"analysis", "figures", "report"}
    # A page of the first run is beside the results by now, and told in its own place all the same.
    (tmp_path / "testbed--qwen3" / "report.html").touch()
    assert told(monkeypatch, capsys, "analyze", *words, "--quiet")["files"] == found["files"]
    found = told(monkeypatch, capsys, "models")
    assert set(found) == {"command", "families", "files"}
    assert found["families"]["llama"]["layers"] == "model.layers"


@pytest.mark.slow
def test_what_is_said_beside_it_goes_to_standard_error(tmp_path, monkeypatch, capsys, undrawn):
    words = ("--model", "testbed/llama", "--max-responses", "2", "--max-new-tokens", "4", "-o", tmp_path)
    (analysis,) = told(monkeypatch, capsys, "analyze", *words)["analyses"]
    code, out, err = command(monkeypatch, capsys, "analyze", *words, "--json")
    assert (code, json.loads(out)["analyses"][0]["path"]) == (0, analysis["path"])
    assert err.endswith("already complete; nothing to do (--overwrite starts over)\n")
    assert command(monkeypatch, capsys, "analyze", *words, "--quiet") == (0, "", "")


@pytest.mark.slow
def test_json_of_the_commands_that_need_a_model(tmp_path, monkeypatch, capsys):
    words = ("--prompt", "a=3;a?", "--max-new-tokens", "2", "-o", tmp_path / "i")
    found = told(monkeypatch, capsys, "inspect", "-m", "testbed/llama", *words)
    assert found["inspection"]["n_tokens"] == len({row["position"] for row in found["values"]})
    words = ("--max-problems", "2", "--samples", "2", "-o", tmp_path / "e")
    found = told(monkeypatch, capsys, "evaluate", "-m", "testbed/llama", "-m", "testbed/qwen3", *words)
    assert [e["name"] for e in found["evaluations"]] == ["testbed/llama", "testbed/qwen3"]
    assert found["comparisons"][0]["n_problems"] == 2
    words = ("--layer", "2", "--ipa-steps", "1", "--max-steps", "2", "--prompts-per-step", "2", "--mini-batches", "1")
    more = ("--num-generations", "4", "--eval-problems", "2", "--max-completion-length", "8", "-o", tmp_path / "r")
    found = told(monkeypatch, capsys, "train", *words, *more)
    assert found["run"]["layer"] == 2
    assert found["run"]["evaluations"]["trained"]["avg"]["mean"] == Run.load(tmp_path / "r").evaluation.avg["mean"]


def test_quiet_writes_all_the_same(place, tmp_path, monkeypatch, capsys, undrawn):
    before = sys.stdout
    assert command(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path, "-q") == (0, "", "")
    assert AnalysisComparison.load(tmp_path).labels == ("007", "NA")
    assert sys.stdout is before
    assert not output.is_quiet()
    _, out, _ = command(monkeypatch, capsys, "compare", place / "analyses", "-o", tmp_path)
    assert "2 analyses, lens policy" in " ".join(out.split())


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_an_error_is_one_line_all_the_same(tmp_path, monkeypatch, capsys, option):
    code, out, err = command(monkeypatch, capsys, "compare", tmp_path / "nowhere", option)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    code, out, err = command(monkeypatch, capsys, "compare", tmp_path / "nowhere", option, "--debug")
    assert (code, out) == (2, "")
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "words",
    [
        ["analyze", "--json", "--max-responses", "x"],
        ["compare", "-q"],
        ["models", "--json", "extra"],
        ["analyze", "--json", "stray"],
        ["compare", "nowhere", "--json", "-q"],
    ],
    ids=" ".join,
)
def test_after_an_error_a_session_prints_again(words, capsys):
    before = sys.stdout
    with pytest.raises((UserError, internal_policy.cli.UsageError)):
        internal_policy.cli.app(words, standalone_mode=False)
    assert sys.stdout is before
    assert not output.is_quiet()


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_help_is_printed_all_the_same(monkeypatch, capsys, option):
    code, out, _ = command(monkeypatch, capsys, "compare", option, "--help")
    assert code == 0
    assert "Compare two or more analyses" in out


NOISE = """
import ctypes, os, subprocess, sys
from internal_policy import output

def noise(by):
    print(f"print {by}")
    print(f"sys {by}", file=sys.__stdout__)
    os.write(1, f"descriptor {by}\\n".encode())
    subprocess.run(["echo", f"child {by}"], check=True)
    # Into C's buffer, which is written when it is full or the process ends.
    ctypes.CDLL(None).puts(f"compiled {by}".encode())

print("before")
with output.chosen(json="json" in sys.argv, quiet="quiet" in sys.argv):
    noise("meanwhile")
    output.document({"a": 1})
    noise("later")
print("after")
"""


@pytest.mark.skipif(os.name == "nt", reason="takes C's puts from the process itself; run it on Linux or macOS")
def test_nobody_else_writes_into_the_document():
    # Buffers are what is to be emptied in time.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    def heard(*words):
        command = [sys.executable, "-c", NOISE, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout, set(done.stderr.split("\n")) - {""}

    document = json.dumps({"a": 1, "files": {}}, indent=2)
    beside = {f"{who} {by}" for who in ("sys", "descriptor", "child", "compiled") for by in ("meanwhile", "later")}
    assert heard("json") == (f"before\n{document}\nafter\n", beside)
    assert heard("json", "quiet") == (f"before\n{document}\nafter\n", set())
    assert heard("quiet") == ("before\nafter\n", set())


@pytest.mark.slow
def test_a_reward_that_prints_does_not_spoil_the_document(tmp_path):
    (tmp_path / "loud.py").write_text(
        "import os, subprocess\n\n\ndef reward(prompts, completions, **columns):\n"
        "    subprocess.run(['echo', 'from a child'], check=True)\n    os.write(1, b'from here')\n"
        "    return [float(i % 2) for i, _ in enumerate(completions)]\n"
    )
    small = ("--layer", "2", "--ipa-steps", "1", "--max-steps", "1", "--prompts-per-step", "2", "--mini-batches", "1")
    more = ("--num-generations", "2", "--eval-samples", "0", "--max-completion-length", "4", "--dynamics-every", "0")
    words = ("train", "--reward", "loud:reward", *small, *more, "-o", "run", "--json")
    done = run(*words, cwd=tmp_path, code=0, PYTHONPATH=str(tmp_path))
    assert json.loads(done.stdout)["run"]["layer"] == 2
    assert "from a child" in done.stderr


def test_what_json_does_not_have_is_null():
    odd = {"a": float("nan"), "b": [float("inf"), pd.NA], "c": Path("x"), "t": pd.DataFrame({"n": [1.5, None]})}
    assert output.plain(odd) == {"a": None, "b": [None, None], "c": "x", "t": [{"n": 1.5}, {"n": None}]}


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color"}, True),
        ({"TERM": "dumb"}, False),
    ],
)
def test_no_control_characters_where_nobody_looks(comparison, monkeypatch, capsys, environment, coloured):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    comparison_terminal.show_comparison(comparison)
    with progress("x", 2) as advance, status("y"):
        advance(1)
    told = capsys.readouterr()
    assert ("\x1b[33m" in told.out) == coloured
    assert ("\x1b" in told.out) == ("FORCE_COLOR" in environment)
    # A bar that moves would spoil a log, in colours or not.
    assert told.err == ""


def shell(words, **environment):
    known = {"env": {**os.environ, **environment}, "stdin": subprocess.DEVNULL}
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, check=True, **known).stdout


def test_completion_is_of_the_shell_that_is_named():
    assert "#compdef internal-policy" in shell(["--show-completion", "zsh"])


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("analyze --model te", ["testbed/qwen3", "testbed/llama"]),
        ("train --preset q", ["qwen", "qwen3-8b"]),
    ],
)
def test_values_are_completed(words, found):
    asked = {"COMP_WORDS": f"internal-policy {words}", "COMP_CWORD": "3"}
    assert shell([], _INTERNAL_POLICY_COMPLETE="complete_bash", **asked).split() == found


def test_nothing_of_the_hubs_own_settings_is_overridden():
    from internal_policy.shell import quiet_libraries

    ours = {k: v for k, v in os.environ.items() if k.startswith("HF_")}
    quiet_libraries(debug=False)
    assert all(os.environ[name] == value for name, value in ours.items())
    sources = "\n".join(p.read_text() for p in Path(internal_policy.__file__).parent.rglob("*.py"))
    assert not any(f"{word}=" in sources for word in ("cache_dir", "local_files_only", "HF_HOME", "HF_HUB_CACHE"))
    assert logging.getLogger("huggingface_hub").level == logging.ERROR
