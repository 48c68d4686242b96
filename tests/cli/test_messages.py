"""Messages of commands and results: complete, with correct singular and plural, and naming the right command."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from documents import ROOT

from internal_policy import Analysis, UserError, bupo
from internal_policy.bupo import TrainConfig, training
from internal_policy.cli import display
from internal_policy.cli import main as cli
from internal_policy.comparison import study as studies
from internal_policy.utils.errors import as_user_error, counted


def test_singular_and_plural_counts():
    assert [counted(n, "response") for n in (0, 1, 2)] == ["0 responses", "1 response", "2 responses"]
    assert (counted(1, "analysis"), counted(3, "analysis")) == ("1 analysis", "3 analyses")


@pytest.fixture(scope="module")
def analysis():
    return Analysis.load(ROOT / "data" / "experiments" / "analyses" / "qwen3-start")


def test_results_use_singular_and_plural_correctly(analysis):
    one = replace(analysis, sequences=analysis.sequences[:1])
    for text in (repr(one), display.layer_table(one).title):
        assert "1 response, " in text


def test_sampled_positions_are_reported_as_a_sample(analysis):
    positions = {"analysed": 428, "total": analysis.n_tokens, "rounds": 1, "tolerance": 0.05}
    positions |= {"half_width": 0.048, "layer": 3, "site": "ffn", "few": 0, "changes": 24}
    some = replace(analysis, positions=positions)
    part = f"428 of {analysis.n_tokens} tokens"
    for text in (repr(some), display.layer_table(some).title):
        assert part in text
    # There are two kinds of errors, and each is named.
    text = display.positions_line(positions)
    assert "largest half-width of a 95% interval from that choice 0.048 nats (layer 3, FFN)" in text
    assert text.endswith("± is the standard error over prompts")


def test_the_list_of_commands_is_not_truncated(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    cli.run(["--help"])
    text = capsys.readouterr().out
    assert "find the boundary layer, draw the figures." in " ".join(text.split())
    assert max(map(len, text.partition("commands:")[2].partition("options:")[0].splitlines())) <= 80


@pytest.mark.parametrize(
    ("words", "end"),
    [
        (["analyze", "--nope"], "internal-policy analyze --help"),
        (["train", "--max-steps", "x"], "internal-policy train --help"),
        (["nope"], "internal-policy --help"),
    ],
)
def test_a_usage_error_names_the_help_of_its_command(words, end, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["internal-policy", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.endswith(f". See {end}\n")


def test_layers_are_numbers_in_names_and_calls(monkeypatch):
    assert TrainConfig(ipa_steps=6).directory.name == "testbed--qwen3--bupo-auto-s6-seed0"
    assert TrainConfig(ipa_steps=6, layer=" 7").directory.name == "testbed--qwen3--bupo-l7-s6-seed0"
    seen = []
    monkeypatch.setattr(training, "_train", lambda config, call, *_: seen.append((config.layer, call["options"])))
    bupo.train("testbed/qwen3", layer=" 7", max_steps=2)
    ((layer, options),) = seen
    assert (layer, options["layer"]) == (7, 7)


def test_a_missing_network_is_reported_once(monkeypatch, caplog, tmp_path):
    def offline(model, **options):
        with as_user_error(model, "its config.json"):
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    real = studies.models.check
    monkeypatch.setattr(studies.models, "check", offline)
    with pytest.raises(UserError, match=r"no network, and the hub's cache has none of the 5 models: .*testbed"):
        studies.study("small", output=tmp_path)
    assert caplog.messages == []
    # Local models are analysed nevertheless.
    monkeypatch.setattr(studies.models, "check", lambda m, **o: real(m, **o) if m.startswith("testbed") else offline(m))
    monkeypatch.setattr(studies, "analyze", lambda model, **options: pytest.fail("analysed"))
    rows = (*studies.STUDIES["small"], *studies.STUDIES["testbed"])
    with pytest.raises(pytest.fail.Exception):
        studies.study(rows, output=tmp_path)
    (text,) = caplog.messages
    assert text.startswith("no network, and the hub's cache does not have meta-llama/Llama-3.2-1B-Instruct, ")
