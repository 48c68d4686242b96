"""`internal-policy compare`: files, terminal, JSON, and what is refused in one line."""

from __future__ import annotations

import json
import shlex

import pytest
from synthetic_analyses import abrupt, make, progressive, training

from internal_policy.cli.main import run as run_command
from internal_policy.comparison.results import TABLES
from internal_policy.utils.errors import UserError

FIGURES = {"compare_depth_overlay", "compare_entropy_fall", "compare_heat_maps", "compare_layer_lines"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three checkpoints of one training, on disk, and another model."""
    root = tmp_path_factory.mktemp("place")
    for analysis in training(3, 6, prompts=4):
        analysis.save(root / "analyses" / analysis.name.replace("/", "--"))
    make(abrupt(5), "a/llama", prompts=4, vocab=1000, noise=0.1, data_seed=3).save(root / "llama")
    return root


@pytest.fixture
def compared(monkeypatch, capsys):
    """The output of the command; its errors are raised here."""
    monkeypatch.setenv("COLUMNS", "100")

    def compare(*arguments):
        run_command(["compare", *map(str, arguments)])
        return capsys.readouterr().out

    return compare


@pytest.fixture
def skip_drawing(monkeypatch):
    """Skip the drawing, which takes most of the time."""
    directories = []
    monkeypatch.setattr(
        "internal_policy.plotting.comparison.save_comparison_figures",
        lambda comparison, directory: directories.append(directory) or [directory / "figure.png"],
    )
    return directories


NAME = "compare--run--checkpoint-0--run--checkpoint-10--run--checkpoint-20"


@pytest.mark.slow
def test_every_figure_of_a_training_is_drawn(place, tmp_path, compared):
    compared(place / "analyses", "-o", tmp_path)
    drawn = {p.name for p in (tmp_path / "figures" / NAME).iterdir()}
    assert drawn == {f"{stem}.{kind}" for stem in (*FIGURES, "compare_layer_differences") for kind in ("png", "pdf")}


def test_a_directory_of_checkpoints_is_compared(place, tmp_path, skip_drawing, compared):
    out = compared(place / "analyses", "-o", tmp_path)
    written = {p.name for p in (tmp_path / NAME).iterdir()}
    assert written == {"comparison.json", "report.html", *(f"{t}.csv" for t in TABLES)}
    assert skip_drawing == [tmp_path / "figures" / NAME]
    assert "≠" not in out
    for expected in ("3 analyses, lens policy, baseline checkpoint-0", "reading", "over 3 checkpoints", "ΔH FFN"):
        assert expected in out
    manifest = json.loads((tmp_path / NAME / "comparison.json").read_text())
    assert [a["step"] for a in manifest["analyses"]] == [0.0, 10.0, 20.0]


def test_the_start_model_given_with_its_checkpoints_is_the_baseline(place, tmp_path, skip_drawing, compared):
    start = make(progressive(6), "testbed/qwen3", prompts=4, seed=9).save(tmp_path / "start")
    after = [place / "analyses" / f"run--checkpoint-{k}" for k in (10, 20)]
    out = compared(*after, start, after[0], "-o", tmp_path)
    assert "baseline qwen3" in " ".join(out.split())
    assert "no trends: two analyses are of the same step" in " ".join(out.split())
    assert "are the same analysis" in " ".join(out.split())
    out = compared(*after, start, "-o", tmp_path, "--baseline", "2", "--label", "x", "--label", "y", "--label", "s")
    # The second of those that are shown.
    assert "baseline x" in out
    assert out.index("\n s ") < out.index("\n x ") < out.index("\n y ")


def test_models_without_steps_have_no_trends_with_a_note(place, tmp_path, skip_drawing, compared):
    for name in "abc":
        make(progressive(4), f"m/{name}", prompts=4).save(tmp_path / "in" / name)
    out = " ".join(compared(tmp_path / "in", "-o", tmp_path / "out").split())
    assert "no steps, so no trends: a, b, c have none in the name" in out
    assert "per 100" not in out


def test_options_and_json(place, tmp_path, skip_drawing, compared):
    labels = [part for label in ("x", "y", "z", "w") for part in ("--label", label)]
    steps = [part for step in (1, 2, 3, 4) for part in ("--step", step)]
    out = compared(place / "analyses", place / "llama", "-o", tmp_path, *labels, *steps, "--baseline", "4", "--json")
    found = json.loads(out)
    assert found["baseline"] == "w"
    assert [(a["label"], a["step"], a["paired"]) for a in found["analyses"]] == [
        *(("x", 1.0, False), ("y", 2.0, False), ("z", 3.0, False), ("w", 4.0, True))
    ]
    assert found["steps_from"] == "given"
    assert found["tables"]["differences"] == []
    assert {row["label"] for row in found["tables"]["depths"]} == {"x", "y", "z"}
    assert any("5" in note and "6 layers" in note for note in found["notes"])
    assert len(skip_drawing) == 1
    out = compared(place / "analyses", "-o", tmp_path, "--baseline", "checkpoint-20")
    assert "baseline checkpoint-20" in out


def test_other_models_are_marked(place, tmp_path, skip_drawing, compared):
    out = compared(place / "analyses" / "run--checkpoint-0", place / "llama", "-o", tmp_path)
    assert "llama ≠" in out
    assert "≠ other responses than the baseline" in out
    assert "no differences per layer" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "got 1 analysis to compare"),
        (["llama", "nothing"], "no finished analysis here"),
        (["analyses", "--baseline", "9"], "--baseline is 9; needed is a place from 1 to 3"),
        (["analyses", "--baseline", "0"], "--baseline is 0; needed is a place from 1 to 3"),
        (["analyses", "--baseline", "mine"], "no analysis is called 'mine'"),
        (["analyses", "--label", "a"], "got 1 labels for 3 analyses"),
        (["analyses", "--step", "1"], "got 1 steps for 3 analyses"),
        (["analyses", "--seed", "-1"], "--seed is -1"),
    ],
)
def test_invalid_comparisons_are_refused(place, tmp_path, arguments, message, compared):
    places = [str(place / a) if a in ("analyses", "llama", "nothing") else a for a in arguments]
    with pytest.raises(UserError, match=message):
        compared(*places, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def other_lens(tmp_path):
    return make(progressive(6), "other", lens="logit-lens", prompts=4).save(tmp_path / "other")


def test_another_lens_is_refused(place, other_lens, tmp_path, compared):
    with pytest.raises(UserError, match="llama was analysed with the lens policy and other with logit-lens"):
        compared(place / "llama", other_lens, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_lens_is_refused_in_one_line_on_the_real_command_line(place, other_lens, tmp_path):
    from command_line import run_subprocess

    done = run_subprocess("compare", place / "llama", other_lens, cwd=tmp_path)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: llama was analysed with the lens policy and other with logit-lens")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ((), "{0}/run--checkpoint-0 {0}/run--checkpoint-10 {0}/run--checkpoint-20"),
        (
            ("--label", "a", "--label", "b", "--label", "the end", "--baseline", "2"),
            "{0}/run--checkpoint-0 {0}/run--checkpoint-10 {0}/run--checkpoint-20 "
            "--label a --label b --label 'the end' --baseline b",
        ),
        (
            ("--step", "0", "--step", "5", "--step", "12.5"),
            "{0}/run--checkpoint-0 {0}/run--checkpoint-10 {0}/run--checkpoint-20 --step 0 --step 5 --step 12.5",
        ),
    ],
)
@pytest.mark.slow
def test_figures_command_on_a_comparison_names_the_compare_command(
    place, tmp_path, skip_drawing, options, command, compared
):
    compared(place / "analyses", "-o", tmp_path, *options)
    stored = (tmp_path / NAME / "comparison.json").read_bytes()
    for named in (tmp_path, tmp_path / NAME):
        with pytest.raises(UserError, match="a comparison is drawn from its analyses") as caught:
            run_command(["figures", str(named)])
        printed = str(caught.value).split("draw it by internal-policy compare ")[1]
        assert printed == command.format(place / "analyses")
    # The printed command works.
    compared(*shlex.split(printed), "-o", tmp_path)
    assert (tmp_path / NAME / "comparison.json").read_bytes() == stored


def test_figures_of_a_directory_of_analyses_show_all_of_them(place, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(
        "internal_policy.plotting.analysis.save_analysis_figures",
        lambda analyses, directory: drawn.append([a.name for a in analyses]) or [directory / "figure.png"],
    )
    run_command(["figures", str(place / "analyses"), "-o", str(tmp_path)])
    assert drawn == [["run/checkpoint-0", "run/checkpoint-10", "run/checkpoint-20"]]
    assert (
        "holds 3 analyses, drawn together: run/checkpoint-0, run/checkpoint-10, run/checkpoint-20"
        in capsys.readouterr().out
    )


def test_an_unwritable_directory_is_reported(place, tmp_path, compared):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        compared(place / "analyses", "-o", tmp_path / "file")
