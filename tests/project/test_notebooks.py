"""The notebooks: stored with the outputs of one complete run, short, and running offline in a fresh kernel."""

from __future__ import annotations

import re
import resource
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = (
    *("01_analyse_a_model", "02_compare_models", "03_checkpoints_through_rl", "04_target_layer_to_bupo"),
    *("05_paper_figures", "06_inside_one_answer", "07_length_or_direction", "08_does_the_target_layer_matter"),
)
MOST_LINES, MOST_BYTES, SECONDS = 10, 600_000, 180
SECTION_6 = ("1c", "2", "3", "4", "5", "6", "7", "12", "13", "14", "15")
# A home directory, a temporary one, an address in memory, an environment's place.
PERSONAL = re.compile(r"/(?:home|root|tmp|work|Users|private|var)/\w|[A-Z]:\\|\bat 0x[0-9a-f]{6,}|site-packages")

sys.path.insert(0, str(FOLDER))

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def texts(output):
    """What an output shows as text."""
    yield output.get("text", "")
    yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def pictures(cell):
    return [output for output in cell.outputs if "image/png" in output.get("data", {})]


def test_all_notebooks_exist():
    assert [path.stem for path in NOTEBOOKS] == list(NAMES)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.ipynb)" in readme for name in NAMES)


@each
def test_notebooks_are_stored_with_the_outputs_of_one_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error" or output.get("name")]
    assert sum(len(pictures(cell)) for cell in code(notebook)) >= 3
    assert path.stat().st_size < MOST_BYTES


@each
def test_notebooks_are_short_with_one_cell_to_switch_the_model(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in code(notebook):
        assert len([line for line in cell.source.splitlines() if line.strip()]) <= MOST_LINES, cell.source
        assert not re.search(r"^\s*(?:def|class|for .*:$|while)\b", cell.source, re.MULTILINE), "a function is missing"
    tagged = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0] <= 4, "near the top"
    source = notebook.cells[tagged[0]].source
    assert "testbed/" in source
    assert re.search(r"Qwen/|meta-llama/", source), "says what a hub model needs"
    # Nothing after that cell knows which models these are.
    assert not [c.source for c in code(notebook)[1:] if c.source != source and "testbed/" in c.source]


@each
def test_notebooks_contain_nothing_about_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    shown = [cell.source for cell in notebook.cells]
    shown += [text for output in outputs(notebook) for text in texts(output)]
    assert not [found.group() for text in shown for found in PERSONAL.finditer(text)]
    assert not [cell for cell in notebook.cells if "execution" in cell.metadata]


def test_every_figure_of_the_paper_is_drawn():
    notebook = nbformat.read(FOLDER / "05_paper_figures.ipynb", as_version=4)
    headed, drawn = {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (heading := re.match(r"## Figures? (.+)", cell.source)):
            drawn = re.findall(r"\d+c?", heading.group(1).split(":")[0])
            headed.update(dict.fromkeys(drawn, 0))
        elif cell.cell_type == "code" and drawn:
            headed.update({number: headed[number] + len(pictures(cell)) for number in drawn})
    assert set(headed) == set(SECTION_6)
    assert all(headed.values()), headed


@pytest.mark.slow
@each
def test_a_notebook_runs_offline_in_a_fresh_kernel(path, tmp_path, monkeypatch):
    from execute import execute

    # As in a new checkout: only the folders that it reads.
    for name in ("notebooks", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "analyses", "runs"))
    shutil.copytree(ROOT / "data" / "experiments", tmp_path / "data" / "experiments", dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "no_hub"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    # Started in the folder of the notebooks and at the root, by turns.
    place = tmp_path / "notebooks" if NOTEBOOKS.index(path) % 2 else tmp_path
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    notebook = execute(tmp_path / "notebooks" / path.name, place, limit=4 * SECONDS)
    # Processor time, since other tests run at the same time.
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime < SECONDS
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    stored = nbformat.read(path, as_version=4)
    assert [len(pictures(cell)) for cell in code(notebook)] == [len(pictures(cell)) for cell in code(stored)]
    changed = [file for file, data in before.items() if file.read_bytes() != data]
    assert not changed, "a notebook writes into no tracked folder"
    new = {file.relative_to(tmp_path) for file in tmp_path.rglob("*") if file.is_file()}
    new -= {file.relative_to(tmp_path) for file in before}
    assert not [file for file in new if file.parts[0] not in {"build", "no_hub"}]
