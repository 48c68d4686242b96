"""The report: its values match the result, untrusted text is escaped, and it loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_analyses import make, progressive

from internal_policy import Analysis, AnalyzeConfig, UserError, analyze, compare, select_layer
from internal_policy.analysis.change_parts import boundary_texts, length_sentence
from internal_policy.bupo.run import Run
from internal_policy.cli.compare import redraw_command
from internal_policy.cli.main import run as run_command
from internal_policy.cli.report import write_reports
from internal_policy.comparison import AnalysisComparison, measure_convergence
from internal_policy.comparison.figure_data import shown_names
from internal_policy.plotting import analysis as figures
from internal_policy.report import analysis as analysis_pages
from internal_policy.report import analysis_report, comparison_report, training_report, write_report
from internal_policy.report.charts import fall_chart
from internal_policy.report.page import number
from internal_policy.report.reproduce import analysis_commands, training_commands
from internal_policy.utils.citation import bibtex

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "data" / "experiments"
HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>window.ran = 1</script>",
    '<img src=x onerror="window.ran = 1">',
    "' onmouseover='window.ran = 1",
    "<!--<script>",
    "{{ 7 * 7 }}",
    "half \ud83d, \0, \u2028, &lt;b&gt;",
)


class Page(HTMLParser):
    """A parsed page: its elements, their texts and its data."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.styles, self.open = [], [], [], []
        self.text, self.parts, self.heads = "", {}, []
        self.feed(html)
        self.close()
        (data,) = [text for kind, text in self.scripts if kind == "application/json"]
        self.data = json.loads(data)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag in {"meta", "link", "br", "input"}:
            return
        self.open.append((tag, attributes))
        if tag == "th" and attributes.get("scope") == "row":
            self.heads.append("")
        if tag == "script":
            self.scripts.append((attributes.get("type", ""), ""))

    def handle_endtag(self, tag):
        if any(name == tag for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data):
        tag = self.open[-1][0] if self.open else ""
        if tag == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif tag == "style":
            self.styles.append(data)
        else:
            self.text += data
            for name, own in self.open:
                if part := own.get("data-part"):
                    self.parts[part] = self.parts.get(part, "") + data
                if name == "th" and own.get("scope") == "row":
                    self.heads[-1] += data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    return analyze("testbed/qwen3", max_responses=6, keep_tokens=3, max_new_tokens=16, output=root)


@pytest.fixture(scope="module")
def page(saved):
    return Page(analysis_report(saved))


def unpack(response, n_layers):
    """The values of a response as the page's script reads them, nats."""
    values = np.frombuffer(base64.b64decode(response["values"]), "<i2") / 1000
    n = len(response["ids"])
    return values[: 6 * n_layers * n].reshape(3, 2, n_layers, n), values[6 * n_layers * n :]


def line(spec, name):
    return next(trace for trace in spec["traces"] if trace["name"] == name and trace.get("hoverinfo") != "skip")


def test_summary_has_the_numbers_of_the_analysis(saved, page):
    chosen, fall = saved.selection, measure_convergence(saved)
    summary_text = page.parts["summary"]
    assert f"testbed/qwen3 has {saved.n_layers} layers" in summary_text
    assert f"on 6 responses ({saved.n_tokens} tokens)" in summary_text
    assert f"boundary layer is {chosen.boundary_layer} ({chosen.agreement})" in summary_text
    assert chosen.agreement.startswith("all 1000 resamples of the 6 prompts give layer 7; ")
    assert "100.0% of" not in page.text
    adverb = {"abrupt": "abruptly", "progressive": "progressively"}[fall.reading]
    assert f"converges {adverb}: half of the drop of {fall.total_drop:.2f} nats" in summary_text
    assert page.parts["target"] == str(chosen.boundary_layer)
    assert chosen.reason in page.text
    for reading in ("As measured", "By direction alone", "By the paper's literal words"):
        assert reading in page.text
    # The same text as on the terminal.
    assert f"olicy entropy H(π_θ) {saved.policy_entropy['mean']:.4f}±" in page.text
    assert "6 prompts only: intervals and shares of resamples can be relied on from about 40 prompts on" in page.text


def test_an_analysis_reports_its_model_size(saved):
    # Shared embedding and unembedding are counted once.
    assert 0.6e6 < saved.n_parameters < 0.7e6
    assert figures.plot_residual_cosine(saved).get_title() == f"{saved.name} (0.67 M parameters)"


def test_a_model_without_a_boundary_layer_says_why(saved):
    none = select_layer([0.3] * 8, stderr=[0.001] * 8)
    page = Page(analysis_report(replace(saved, selection=none)))
    why = "dH_FFN still explores at the last layer, 8 (+0.3 nats; +0.3 on average from layer 1 on), so it never turns"
    assert none.reason == why
    given = "all 1000 resamples give no boundary layer; by the paper's literal words there is none either"
    assert f"it has no boundary layer, for {why} ({given})" in page.parts["summary"]
    assert page.parts["target"] == "none"
    assert page.data["tokens"]["a1-tokens"]["target"] is None


def test_curves_intervals_and_table_are_those_of_the_analysis(saved, page):
    flow, change = page.data["charts"]["a1-flow"], page.data["charts"]["a1-change"]
    for spec, name, site, column in (
        (flow, "layer output", "layer", "entropy_out"),
        (flow, "layer input", "layer", "entropy_in"),
        (flow, "ATTN output", "attn", "entropy_out"),
        (flow, "ATTN input", "attn", "entropy_in"),
        (flow, "FFN output", "ffn", "entropy_out"),
        (flow, "FFN input", "ffn", "entropy_in"),
        (change, "layer", "layer", "change"),
        (change, "ATTN", "attn", "change"),
        (change, "FFN", "ffn", "change"),
    ):
        drawn = line(spec, name)
        np.testing.assert_allclose(drawn["y"], saved.curve(site, column), atol=1e-6)
        ends = np.column_stack([saved.curve(site, f"{column}_{end}") for end in ("low", "high")])
        np.testing.assert_allclose(drawn["customdata"], ends, atol=1e-6)
        assert drawn["x"] == list(range(1, 9))
    layer = next(part for tag, part in page.elements if tag == "li" and "target" in part.get("class", ""))
    assert layer["title"].startswith(f"layer {saved.boundary_layer}:")
    # Its stage is available to screen readers.
    for n, stage in enumerate(saved.stages, start=1):
        assert f" {n}: {stage}{', boundary layer' if n == saved.boundary_layer else ''}\n" in page.text
    # Each layer once, in both tables and in the strip of stages.
    assert [head for head in page.heads if head[0].isdigit()] == [*map(str, range(1, 7)), "7 ◀", "8"] * 2
    assert sum(tag == "li" and "layer " in part.get("title", "") for tag, part in page.elements) == 8
    for value in saved.curve("ffn"):
        assert number(value, "+.3f") in page.parts["layers"]


def test_the_parts_of_the_changes_are_those_of_the_analysis(saved, page):
    for site in ("ffn", "attn"):
        spec = page.data["charts"][f"a1-parts_{site}"]
        assert spec["layout"]["barmode"] == "relative"
        for name, column in (("direction part", "change_direction"), ("length part", "change_scale")):
            bars, values = line(spec, name), saved.curve(site, column).to_numpy()
            ends = np.column_stack([saved.curve(site, f"{column}_{end}") for end in ("low", "high")])
            assert (bars["type"], bars["x"]) == ("bar", list(range(1, 9)))
            np.testing.assert_allclose(bars["y"], values, atol=1e-6)
            np.testing.assert_allclose(bars["customdata"], ends, atol=1e-6)
            np.testing.assert_allclose(bars["error_y"]["array"], ends[:, 1] - values, atol=2e-6)
            np.testing.assert_allclose(bars["error_y"]["arrayminus"], values - ends[:, 0], atol=2e-6)
            for value in values:
                assert number(value, "+.3f") in page.parts["parts"]
        np.testing.assert_allclose(line(spec, "whole change")["y"], saved.curve(site), atol=1e-6)
    sentence = length_sentence(saved.layers, saved.selection, saved.lens)
    assert page.parts["length"] == f"{sentence[0].upper()}{sentence[1:]}."
    share, _, _ = sentence.partition("; ")
    assert f"{share}. Its entropy converges" in page.parts["summary"]
    measured, by_direction = saved.boundary_layer, saved.selection.sensitivity["direction"]
    lines = [shape["x0"] for shape in page.data["charts"]["a1-parts_ffn"]["layout"]["shapes"] if shape["x0"] > 0]
    assert lines == list(dict.fromkeys([measured, by_direction]))
    (note,) = page.data["charts"]["a1-parts_ffn"]["layout"]["annotations"]
    assert note["text"] == boundary_texts(measured, by_direction)[0]


def test_a_report_of_an_analysis_from_before_the_parts_or_without_length_says_so(saved):
    lacking = [column for column in saved.layers if column.startswith(("change_direction", "change_scale", "rms"))]
    old = Page(analysis_report(replace(saved, layers=saved.layers.drop(columns=lacking))))
    assert "a1-parts_ffn" not in old.data["charts"]
    assert not {"parts", "length"} & set(old.parts)
    assert "is length" not in old.text
    normed = Page(analysis_report(replace(saved, config={**saved.config, "lens": "unit-norm"})))
    assert normed.parts["length"].startswith("The lens unit-norm undoes the length of a state, so ")
    assert "is length" not in normed.parts["summary"]


def test_the_final_policy_is_drawn_after_the_layers_with_its_own_title(page):
    spec = page.data["charts"]["a1-flow"]
    axis, drawn = spec["layout"]["xaxis2"], line(spec, "policy π_θ")
    assert drawn["xaxis"] == "x2"
    assert drawn["x"][0] > 8
    assert dict(zip(axis["tickvals"], axis["ticktext"], strict=True)) == {drawn["x"][0]: "final policy"}
    assert (axis["overlaying"], axis["matches"], axis["showticklabels"]) == ("x", "x", False)
    assert [trace["name"] for trace in spec["traces"] if "xaxis" in trace] == ["policy π_θ"]


def test_a_single_layer_model_has_no_uniform_drop_line():
    one = make(progressive(1), prompts=4, noise=0.05)
    convergence = measure_convergence(one)
    assert " has 1 layer; on " in analysis_pages.summary(one, convergence)
    assert [entry["name"] for entry in fall_chart(convergence).spec()["key"]] == ["fallen"]


def test_tokens_are_the_stored_ones_with_their_values(saved, page):
    view = page.data["tokens"]["a1-tokens"]
    assert [r["number"] for r in view["responses"]] == [1, 2, 3]
    for response, shown in enumerate(view["responses"]):
        rows = saved.tokens[saved.tokens["response"] == response]
        values, policy = unpack(shown, 8)
        for i, site in enumerate(("layer", "attn", "ffn")):
            for q, column in enumerate(("entropy_out", "change")):
                wanted = rows[rows["site"] == site].pivot_table(index="layer", columns="token", values=column)
                np.testing.assert_allclose(values[i, q], wanted, atol=5.1e-4)
        np.testing.assert_allclose(policy, rows[rows["site"] == "policy"]["entropy_out"], atol=5.1e-4)
        sequence = saved.sequences.iloc[response]
        assert shown["ids"] == sequence["input_ids"][sequence["prompt_length"] :]
        assert "".join(shown["texts"]).removesuffix("<eos>").replace("·", " ") == sequence["response"]


def test_an_analysis_without_token_texts_shows_ids(saved):
    older = replace(saved, tokens=saved.tokens.drop(columns="token_text"))
    page = Page(analysis_report(older))
    shown = page.data["tokens"]["a1-tokens"]["responses"][0]
    assert shown["texts"] == [f"#{i}" for i in shown["ids"]]
    assert "stores no texts of single tokens" in page.text


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        (None, ""),
        (float("nan"), ""),
        ([{"role": "user"}, {"content": "four"}], "user: \n\n: four"),
        ([{"role": "tool", "content": None}], "tool: "),
    ],
)
def test_incomplete_prompts_are_shown_partially(saved, prompt, shown):
    sequences = saved.sequences.assign(prompt=pd.Series([prompt] * len(saved.sequences), dtype=object))
    view = analysis_pages.token_view(replace(saved, sequences=sequences))
    assert view["data"]["responses"][0]["prompt"] == shown


def hostile(saved):
    """The analysis with untrusted text in every name and string."""
    tokens = saved.tokens.copy()
    texts = [HOSTILE[i % len(HOSTILE)] for i in tokens["token"]]
    tokens["token_text"] = pd.Series(texts, index=tokens.index, dtype=object)
    sequences = saved.sequences.copy()
    sequences["response"] = pd.Series([" ".join(HOSTILE)] * len(sequences), index=sequences.index, dtype=object)
    sequences["prompt"] = [[{"role": HOSTILE[0], "content": HOSTILE[1]}]] * len(sequences)
    name = "".join(HOSTILE)
    return replace(
        saved,
        name=name,
        model={**saved.model, "id": name, "family": HOSTILE[2], "dtype": HOSTILE[0]},
        config={**saved.config, "model": name, "revision": HOSTILE[1], HOSTILE[0]: HOSTILE[2], "prompts": HOSTILE[3]},
        selection=replace(saved.selection, reason=f"because {HOSTILE[0]}"),
        tokens=tokens,
        sequences=sequences,
        path=Path("data") / HOSTILE[0],
    )


def test_untrusted_text_is_escaped_everywhere(saved, page):
    analysis = hostile(saved)
    found = Page(analysis_report([analysis, analysis]))
    single = {tag for tag, _ in page.elements}
    assert {tag for tag, _ in found.elements} <= single | {"nav", "ul"}
    assert len(found.scripts) == len(page.scripts)
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    for text in HOSTILE[:5]:
        assert text in found.text
    assert "49" not in found.parts["summary"].split("has")[0]
    shown = found.data["tokens"]["a1-tokens"]["responses"][0]
    assert shown["texts"][:6] == list(HOSTILE[:6])
    assert shown["texts"][6] == "half ?, \ufffd, \u2028, &lt;b&gt;"
    assert HOSTILE[1] in shown["prompt"]
    # The command is valid in a shell for any name.
    command = analysis_commands(analysis).shell
    assert command is None or len(shlex.split(command)) >= 4


def test_names_are_escaped_in_figures_and_keep_their_colours(saved, tmp_path):
    names = ['<b>"it\'s"</b>', "$attn"]
    compared = compare(saved, saved, labels=names)
    found = Page(comparison_report(compared))
    traces = [trace for spec in found.data["charts"].values() for trace in spec["traces"]]
    assert {trace["name"] for trace in traces} == {'&lt;b&gt;"it\'s"&lt;/b&gt;', "$attn", "boundary layer"}
    assert names[0] in found.text
    assert not [tag for tag, _ in found.elements if tag == "b"]


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            if name in attributes and tag != "a":
                assert attributes[name] == "data:,"
        if tag == "a":
            assert attributes["href"] == "https://arxiv.org/abs/2512.19673"
        assert "url(" not in attributes.get("style", "")
    for style in page.styles:
        assert "url(" not in style
        assert "@import" not in style
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    run = [text for kind, text in page.scripts if not kind]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert re.findall(r"sha256-([^']+)", policy) == digests
    assert "plotly.js v" in run[1][:200]
    assert "unsafe-eval" not in policy
    assert len(run) == 5


def test_plotly_accepts_every_figure(page):
    from plotly import graph_objects

    run = Run.load(next(iter(sorted((STORED / "runs").glob("*bupo*")))))
    specs = [page, Page(training_report(run)), Page(comparison_report(AnalysisComparison.load(STORED / "sweep")))]
    for name, spec in ((name, spec) for found in specs for name, spec in found.data["charts"].items()):
        figure = graph_objects.Figure(spec["traces"], spec["layout"])
        assert len(figure.data) >= 1, name
        places = [i for entry in spec["key"] for i in entry["traces"]]
        assert sorted(places) == list(range(len(figure.data)))


def test_long_responses_and_many_layers_are_truncated_with_a_note(saved, monkeypatch):
    monkeypatch.setattr(analysis_pages, "MAX_TOKENS", 5)
    view = analysis_pages.token_view(saved)
    assert [len(r["ids"]) for r in view["data"]["responses"]] == [5, 5, 5]
    assert "3 responses are cut after 5 tokens" in view["notes"][0]
    np.testing.assert_allclose(
        unpack(view["data"]["responses"][0], 8)[0][0, 0, 7],
        saved.tokens.query("response == 0 and site == 'layer' and layer == 8")["entropy_out"][:5],
        atol=5.1e-4,
    )
    monkeypatch.setattr(analysis_pages, "MAX_VALUES", 7 * (6 * 8 + 1))
    view = analysis_pages.token_view(saved)
    assert [len(r["ids"]) for r in view["data"]["responses"]] == [5, 2]
    assert "1 kept response left out" in " ".join(view["notes"])


def test_positions_sampled_by_tolerance_are_reported_and_shown_in_place(saved):
    some = saved.tokens[saved.tokens["token"] % 3 == 0]
    positions = {"tolerance": 0.1, "analysed": 20, "total": 60, "rounds": 2, "half_width": 0.09, "layer": 3}
    positions |= {"few": 0, "changes": 24}
    found = Page(analysis_report(replace(saved, tokens=some, positions={**positions, "site": "ffn"})))
    assert "Chosen by tolerance: analysed 20 of 60 positions (33.3%)" in found.text
    shown = found.data["tokens"]["a1-tokens"]["responses"][0]
    assert shown["places"][:3] == [1, 4, 7]
    assert "gaps are marked" in found.text
    without = Page(analysis_report(replace(saved, tokens=saved.tokens[:0])))
    assert without.data["tokens"] == {}


def test_the_shown_command_and_call_reproduce_the_analysis(saved, monkeypatch):
    again = analysis_commands(saved)
    words = shlex.split(again.shell)
    commands = []
    monkeypatch.setattr("internal_policy.cli.analyze._models", commands.append)
    run_command(words[1:])
    (command,) = commands
    assert (command.model, command.lenses, command.output) == (("testbed/qwen3",), ("policy",), saved.path.parent)
    config = AnalyzeConfig(model=command.model[0], **command.settings())
    assert {k: v for k, v in config.cache_key().items() if saved.config[k] != v} == {}
    # In a new directory, so that the finished analysis is not reused.
    found = {}
    exec(
        again.python.replace("\nanalyze(", "\nanalysis = analyze(").replace(
            str(saved.path.parent), str(saved.path.parent / "again")
        ),
        found,
    )
    pd.testing.assert_frame_equal(found["analysis"].layers, saved.layers)


def test_given_responses_are_reproduced_from_their_file(saved, tmp_path):
    given = analyze("testbed/qwen3", responses=saved.sequences, output=tmp_path, keep_tokens=0)
    again = analysis_commands(given)
    words = shlex.split(again.shell)
    assert words[: words.index("--output")] == [
        *("internal-policy", "analyze", "--model", "testbed/qwen3"),
        *("--keep-tokens", "0", "--responses", str(given.path / "responses.jsonl")),
    ]
    assert "given from Python" in again.notes[1]
    found = analyze("testbed/qwen3", responses=given.path / "responses.jsonl", keep_tokens=0)
    pd.testing.assert_frame_equal(found.layers, given.layers)


def test_a_report_is_written_atomically_next_to_its_result(saved, tmp_path):
    path = write_report(saved)
    assert path == saved.path / "report.html"
    assert path.read_bytes() == write_report(Analysis.load(saved.path), tmp_path).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="in memory only"):
        write_report(replace(saved, path=None))
    with pytest.raises(UserError, match="needed is an analysis, a comparison or a run"):
        write_report("data/analyses")
    with pytest.raises(UserError, match="give at least one"):
        analysis_report([])


def test_a_comparison_report_needs_no_analyses():
    stored = AnalysisComparison.load(STORED / "sweep")
    page = Page(comparison_report(stored))
    for row in stored.convergence.to_dict("records"):
        assert number(row["total_drop"]) in page.parts["convergence"]
    for row in stored.boundaries.to_dict("records"):
        assert row["label"] in page.parts["boundaries"]
    spec = page.data["charts"]["c5"]
    frame = stored.differences.query("site == 'attn' and quantity == 'change'")
    for label, rows in frame.groupby("label"):
        drawn = line(spec, shown_names(stored)[label])
        np.testing.assert_allclose(drawn["y"], rows["difference"], atol=1e-6)
    (command,) = [text for text in re.findall(r"internal-policy compare [^\n]+", page.text) if "checkpoint-6" in text]
    assert command.strip() == redraw_command(STORED / "sweep")


def test_a_loaded_comparison_gives_the_same_report(saved, tmp_path):
    other = replace(saved, name="another")
    comparison = compare(saved, other, labels=["NA", "007"], seed=3)
    read = AnalysisComparison.load(comparison.save(tmp_path))
    assert comparison_report(read) == comparison_report(replace(comparison, path=tmp_path))
    assert read.labels == ("NA", "007")
    assert (read.seed, read.path) == (3, tmp_path)


@pytest.fixture(scope="module")
def run():
    """A stored run, as if it had been trained without callbacks, which no command has."""
    found = Run.load(STORED / "runs" / "qwen3-bupo-l7-s12-lr0.0001-t120-seed0")
    return replace(found, call={**found.call, "objects": []})


def test_training_report_has_curves_phases_and_command(run):
    page = Page(training_report(run))
    for name, column in (("h1", "reward"), ("h2", "policy_entropy"), ("h3", "length")):
        chart = page.data["charts"][name]
        np.testing.assert_allclose(line(chart, "each step")["y"], run.history[column], atol=1e-6)
        # Step 1 was sampled before any update: no mean reaches back to it.
        means = line(chart, "mean of the last 5 steps")
        wanted = run.history[column][1:].rolling(5, min_periods=1).mean()
        assert means["x"] == list(run.history["step"][1:])
        np.testing.assert_allclose(means["y"], wanted, atol=1e-6)
        assert means["line"]["width"] > 2 > line(chart, "each step")["line"]["width"]
        areas = [s for s in chart["layout"]["shapes"] if s["type"] == "rect"]
        assert [area["x1"] for area in areas] == [run.ipa_steps + 0.5]
    assert page.parts["target"] == str(run.layer)
    words = shlex.split(training_commands(run).shell)
    assert words[:2] == ["internal-policy", "train"]
    assert words[words.index("--layer") + 1] == str(run.layer)
    assert words[words.index("--max-steps") + 1] == str(run.config["max_steps"])


def test_a_short_training_is_drawn_without_smoothing(run):
    (trace,) = Page(training_report(replace(run, history=run.history[:6]))).data["charts"]["h2"]["traces"]
    assert (trace["name"], len(trace["x"])) == ("policy entropy", 6)


def test_dynamics_with_no_or_one_later_layer():
    run = Run.load(STORED / "alignment" / "qwen3-bupo-l6-s60-lr0.0001-t60-seed0")
    last = Page(training_report(replace(run, layer=8, dynamics_layers=run.dynamics_layers[:0])))
    assert "it compares a layer with the layers above it, and layer 8 is the model's last." in last.text
    one = run.dynamics_layers[run.dynamics_layers["layer"] == 8]
    charts = Page(training_report(replace(run, dynamics_layers=one))).data["charts"]
    similarity = list(charts.values())[-1]["traces"]
    assert [trace["x"] for trace in similarity] == [list(one["step"])]


def test_a_recorded_call_is_reproduced(run, tmp_path):
    call = {"options": {"model": "a b", "reward": "mod:f", "beta": 0.1, "report_to": "none"}, "objects": []}
    again = training_commands(replace(run, call=call))
    assert shlex.split(again.shell)[2:] == [
        *("--model", "a b", "--reward", "mod:f", "--report-to", "none", "--set", "beta=0.1")
    ]
    objects = training_commands(replace(run, call={**call, "objects": ["peft_config"]}))
    assert objects.shell is None
    assert "peft_config=peft_config" in objects.python


def test_report_command_writes_pages_and_refuses_missing_results(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments):
        run_command(["report", *map(str, arguments)])
        return capsys.readouterr().out

    saved.save(tmp_path / "data" / "one")
    compare(saved, saved).save(tmp_path / "data" / "compare--both")
    done = command(tmp_path / "data")
    assert sorted(p.parent.name for p in tmp_path.rglob("report.html")) == ["compare--both", "one"]
    assert done.count("(report.html)") == 2
    (tmp_path / "empty").mkdir()
    evaluation = next((STORED / "evaluations").rglob("evaluation.json")).parent
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "analysis.json").write_text("{")
    for place, message in (
        (tmp_path / "empty", "no finished analysis here"),
        (tmp_path / "nowhere", "no finished analysis here"),
        (evaluation, "holds an evaluation, of which there is no report"),
        (broken, "broken analysis"),
    ):
        (tmp_path / "data" / "one" / "report.html").unlink(missing_ok=True)
        with pytest.raises(UserError, match=message):
            command(tmp_path / "data", place)
        # An invalid input is reported before any page is written.
        assert not (tmp_path / "data" / "one" / "report.html").exists()


def test_a_failed_report_keeps_results_and_leaves_no_stale_page(saved, tmp_path, monkeypatch, caplog):
    place = saved.save(tmp_path / "a")
    (place / "report.html").write_text("of another analysis")

    def fail(thing):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr("internal_policy.report.analysis_report", fail)
    write_reports([Analysis.load(place)])
    assert not (place / "report.html").exists()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no report.html could be written (RuntimeError: no room at all); the results are complete" in message
    assert Analysis.load(place).n_responses == 6


def test_a_stale_page_that_cannot_be_removed_is_reported(saved, tmp_path, caplog):
    place = saved.save(tmp_path / "a")
    # Cannot be replaced or removed even by root.
    (place / "report.html").mkdir()
    write_reports([Analysis.load(place)])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "no report.html could be written (IsADirectoryError" in message
    assert "), and the page there is of earlier results; the results are complete" in message


def test_bibtex_matches_the_citation_file():
    facts, entries = (ROOT / "CITATION.cff").read_text(), bibtex()
    for title in re.findall(r'title: "([^"]+)"', facts):
        assert title in entries
    for family, given in re.findall(r"family-names: (\w+), given-names: (\w+)", facts):
        assert f"{family}, {given}" in " ".join(entries.split())
    assert f"version = {{{re.search(r'version: (0.*)', facts)[1]}}}" in entries
    assert "eprint        = {2512.19673}" in entries
