"""Damaged, truncated or edited results: read as they were written, or refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_results import save_one_of_each
from synthetic_run import make as make_run

from internal_policy import Ablation, Analysis, AnalysisComparison, Patching, Study, UserError
from internal_policy.analysis.results import ANALYSIS
from internal_policy.bupo import Run
from internal_policy.evaluation import Evaluation
from internal_policy.inspection.results import Inspection
from internal_policy.utils.result_format import ResultFormat
from internal_policy.utils.table_io import from_cells, to_cells

KINDS = {
    "analyses/007": Analysis,
    "comparison": AnalysisComparison,
    "evaluation": Evaluation,
    "inspection": Inspection,
    "ablation": Ablation,
    "patching": Patching,
    "run": Run,
    "analyses": Study,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = save_one_of_each(tmp_path_factory.mktemp("saved"))
    make_run(root / "run")
    return root


@pytest.fixture(scope="module")
def files(place):
    """Every file that a result is read of, with its kind of result."""
    found = []
    for name, cls in KINDS.items():
        own = [p for p in sorted((place / name).iterdir()) if p.is_file() and not p.name.startswith(".")]
        found += [(cls, place / name, p) for p in own]
    assert len(found) > 20
    return found


def state(result):
    """The content of a result in a comparable form."""
    if isinstance(result, Study):
        return result.models, result.failures, [state(a) for a in result.analyses]
    fields = {name: getattr(result, name) for name in result.__dataclass_fields__}
    return {k: v.to_json(double_precision=15) if isinstance(v, pd.DataFrame) else repr(v) for k, v in fields.items()}


def damaged(content, kind, place, value):
    at = place % max(1, len(content))
    match kind:
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 + value % 255)]) + content[at + 1 :]
        case "truncate":
            return content[:at]
        case "insert":
            return content[:at] + bytes([value]) + content[at:]
        case "zero":
            return content[:at] + bytes(len(content) - at)
        case "swap":
            return content[at:] + content[:at]


DAMAGE = st.tuples(
    st.sampled_from(["flip", "truncate", "insert", "zero", "swap"]), st.integers(0, 10**6), st.integers(0, 255)
)


def check(files, which, damage):
    cls, directory, path = files[which % len(files)]
    before, content = state(cls.load(directory)), path.read_bytes()
    try:
        path.write_bytes(damaged(content, *damage))
        try:
            found, message = cls.load(directory), ""
        except UserError as error:
            found, message = None, str(error)
        assert "\n" not in message
        assert len(message) < 1000
        # Another space between two fields of the manifest is no other result.
        assert found is None or state(found) == before
    finally:
        path.write_bytes(content)


@settings(max_examples=40, deadline=None)
@given(which=st.integers(0, 1000), damage=DAMAGE)
def test_a_damaged_result_is_refused_or_unchanged(files, which, damage):
    check(files, which, damage)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(which=st.integers(0, 1000), damage=DAMAGE)
def test_a_result_with_any_damage_is_refused_or_unchanged(files, which, damage):
    check(files, which, damage)


@pytest.mark.parametrize("name", KINDS)
def test_the_file_that_was_edited_is_named(place, tmp_path, name):
    directory = Path(shutil.copytree(place / name, tmp_path / "copy"))
    cls = KINDS[name]
    for path in sorted(directory.glob("*.csv")):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1", b"2"))
        if path.read_bytes() == content:
            continue
        with pytest.raises(UserError, match=rf"{path.name} is not what was written there \(damaged, or edited\)"):
            cls.load(directory)
        path.unlink()
        with pytest.raises(UserError, match=r"broken .* \(FileNotFoundError"):
            cls.load(directory)
        path.write_bytes(content)
    manifest = next(directory.glob("*.json"))
    fields = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**fields, "notes": ["mine"]}))
    with pytest.raises(UserError, match=f"{manifest.name} is not what was written there"):
        cls.load(directory)
    manifest.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"broken .* \(RecursionError"):
        cls.load(directory)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("layers.csv", lambda t: t.drop(columns="change"), "layers has no column change"),
        ("layers.csv", lambda t: t.assign(change="much"), "layers has a column change that does not hold numbers"),
        ("layers.csv", lambda t: t.iloc[:-1], "disagree about layers and sites"),
        ("layers.csv", lambda t: pd.concat([t, t.iloc[:1]]), "disagree about rows of layers"),
        ("layers.csv", lambda t: t.assign(n_tokens=7), "disagree about tokens"),
        ("responses.parquet", lambda t: t[t["response"] == 1], "disagree about responses with means"),
        ("responses.parquet", lambda t: t.rename(columns={"site": "place"}), "responses has no column site"),
    ],
)
def test_tables_that_disagree_with_the_manifest_are_refused(place, tmp_path, table, change, message):
    directory = Path(shutil.copytree(place / "analyses" / "007", tmp_path / "copy"))
    path = directory / table
    if path.suffix == ".csv":
        change(pd.read_csv(path)).to_csv(path, index=False)
    else:
        change(pd.read_parquet(path)).to_parquet(path)
    # As another program that writes results would do.
    fields = json.loads((directory / "analysis.json").read_text())
    del fields["seal"], fields["sha256"]
    replace(ANALYSIS, files=(table,)).write_manifest(directory, fields)
    with pytest.raises(UserError, match=rf"broken analysis \(ValueError: .*{message}"):
        Analysis.load(directory)


def test_a_manifest_has_the_digests_of_its_files(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"x\n1\n")
    result = ResultFormat("table", "tables", "make", "make", "m.json", 1, ("a.csv", "absent.csv"))
    result.write_manifest(tmp_path, {"é": [1.5, None], "n": 3})
    fields = json.loads((tmp_path / "m.json").read_text())
    assert list(fields["sha256"]) == ["a.csv"]
    assert result.changed_file(tmp_path, fields) is None
    assert result.changed_file(tmp_path, {**fields, "n": 4}) == "m.json"
    (tmp_path / "a.csv").write_bytes(b"x\n2\n")
    assert result.changed_file(tmp_path, fields) == "a.csv"


@given(st.lists(st.text(alphabet="=+-@'\t\r1.ea"), min_size=1))
def test_formulas_are_escaped_in_csv_and_restored(texts):
    table = pd.DataFrame({"text": texts, "n": range(len(texts))})
    cells = to_cells(table)
    for cell in cells["text"]:
        assert len(cell) < 2 or cell[0] not in "=@\t\r" or pd.to_numeric(cell, errors="coerce") == float(cell)
    pd.testing.assert_frame_equal(from_cells(cells), table)


def test_a_name_that_is_a_formula_is_text_in_every_csv(tmp_path):
    run = "=cmd|' /C calc'!A0"
    table = to_cells(pd.DataFrame({"label": [run, "-5", "=", "-", "+1e3", "@SUM(1)", "+1+1", None]}))
    assert table["label"].tolist()[:7] == ["'" + run, "-5", "=", "-", "+1e3", "'@SUM(1)", "'+1+1"]
