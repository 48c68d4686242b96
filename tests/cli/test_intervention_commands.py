"""The commands ablate and patch: what they print, write, draw and reuse."""

from __future__ import annotations

import io
import json

import pytest
from command_line import run, save
from rich.console import Console
from synthetic_interventions import make_ablation, make_patching, make_together
from tiny import ragged_responses, tiny_model

from internal_policy import Ablation, Patching
from internal_policy.cli.display_interventions import effect_table, show_patching


@pytest.fixture
def place(tmp_path):
    save(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "answers").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in ragged_responses())
    (tmp_path / "answers" / "responses.jsonl").write_text(lines)
    return tmp_path


def text_of(table, width=100):
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


@pytest.mark.slow
def test_an_ablation_is_printed_written_and_reused(place):
    words = ("ablate", "--model", "model", "--responses", "answers", "--layers", "2-3", "--how", "zero,mean")
    done = run(*words, "-o", "out", cwd=place, code=0)
    ablation = Ablation.load(place / "out")
    first = ablation.table.iloc[0]
    assert f"{first['kl']:.3f}±{first['kl_stderr']:.3f}" in done.stdout
    assert "5 prompts only" in done.stdout
    (drawn,) = (place / "out" / "figures").iterdir()
    assert {path.name for path in drawn.glob("*.png")} == {
        f"ablation_{name}.png" for name in ("map", "bars_attn", "bars_ffn")
    }
    assert "PNG" in str((drawn / "ablation_map.png").read_bytes()[:4])
    again = run(*words, "-o", "out", "--json", cwd=place, code=0)
    assert "already complete; nothing to do" in again.stderr
    found = json.loads(again.stdout)["ablation"]
    assert [row["kl"] for row in found["table"]] == pytest.approx(ablation.table["kl"].tolist())
    # The responses of an ablation are those of another one.
    run("ablate", "--model", "model", "--responses", ablation.path, "--layers", "1", "-o", "next", cwd=place, code=0)
    assert Ablation.load(place / "next").n_tokens == ablation.n_tokens


@pytest.mark.slow
def test_a_patching_is_printed_written_and_numbered(place):
    words = ("patch", "--model", "model", "--clean", "w3 w4 w5", "--corrupted", "w3 w9 w5", "--template", "plain")
    done = run(*words, "--answer", "w7", "--wrong", "w8", "-o", "out", cwd=place, code=0)
    assert "w4→w9" in done.stdout
    # Another question about the same prompt has another directory, and the same one the same.
    for answer, expected in (("w11", 2), ("w11", 2), ("w12", 3)):
        done = run(*words, "--answer", answer, "--wrong", "w8", "-o", "out", "--json", cwd=place, code=0)
        assert len(list((place / "out").glob("*/patching.json"))) == expected
    found = json.loads(done.stdout)
    patching = Patching.load(place / found["patching"]["path"])
    assert [row["value"] for row in found["values"]] == pytest.approx(patching.values["value"].tolist())
    assert patching.metric["answer_token"] == "w12"


def test_tables_of_many_interventions_show_the_largest():
    ablation = make_ablation(n_layers=10, heads=8, samples=True)
    text = text_of(effect_table(ablation))
    assert "the 60 of 80 with the largest KL" in " ".join(text.split())
    smallest, largest = (ablation.table.loc[i] for i in (ablation.table["kl"].idxmin(), ablation.table["kl"].idxmax()))
    assert f"{largest['kl']:.3f}±" in text
    assert f"{smallest['kl']:.3f}±{smallest['kl_stderr']:.3f}" not in text
    assert f"{100 * largest['accuracy']:.1f}%" in text


@pytest.mark.parametrize("width", [72, 80, 120])
@pytest.mark.parametrize(
    "case",
    [
        {"heads": 12, "n_layers": 12, "hows": ("zero", "mean", "resample"), "samples": True},
        {"heads": 4, "hows": ("zero", "mean")},
        {"sites": ("attn", "ffn"), "hows": ("zero", "resample"), "samples": True},
        {},
    ],
    ids=["all", "heads", "sites", "plain"],
)
def test_tables_are_not_wider_than_the_terminal_and_cut_no_number(case, width):
    ablation = make_ablation(**case)
    text = text_of(effect_table(ablation, width), width)
    assert "…" not in text
    words = text.replace("±", " ±").split()
    rows = ablation.table.nlargest(60, "kl")
    for name, form in (("kl", ".3f"), ("entropy_change", "+.3f"), ("log_prob_change", "+.3f")):
        assert {f"{value:{form}}" for value in rows[name]} <= set(words)
        assert {f"±{value:.3f}" for value in rows[f"{name}_stderr"]} <= set(words)
    assert {f"{100 * value:.1f}%" for value in rows["flips"]} <= set(words)
    if "accuracy" in rows:
        assert {f"±{100 * value:.1f}" for value in rows["accuracy_stderr"]} <= set(words)
    if width == 120:
        assert text.count("\n") < 1.5 * len(rows) + 10
    assert ("site" in words) is ("head" not in words)


def test_layers_that_are_changed_together_share_a_column():
    ablation = make_ablation(n_layers=1, sites=("attn+ffn",), hows=("zero", "resample"), samples=True)
    ablation.table.insert(1, "last_layer", 12)
    words = text_of(effect_table(ablation, 72), 72).split()
    assert "layers" in words
    # In each row, and in the title.
    assert words.count("1-12") == 3
    assert "…" not in words


def test_heads_that_are_changed_together_are_named():
    text = text_of(effect_table(make_together((3, 4, 8), heads=(1, 2, 4))))
    assert "writes of heads 1-2,4 of layers 3-4,8 set to zero" in " ".join(text.split())
    (row,) = [line.split() for line in text.splitlines() if line.split()[:1] == ["3-4,8"]]
    assert row[1] == "1-2,4"


def test_the_largest_recoveries_are_shown(capsys):
    patching = make_patching()
    show_patching(patching)
    out = capsys.readouterr().out
    best = patching.values.loc[patching.values["recovery"].abs().idxmax()]
    assert f"{best['recovery']:+.3f}" in out
    assert "logit of 22 less that of 21" in out
