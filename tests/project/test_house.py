"""Project rules: imports, start-up time, the wheel and the documents."""

from __future__ import annotations

import ast
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from documents import ROOT, python_blocks, run_python

from internal_policy import AnalyzeConfig
from internal_policy.bupo.config import TrainConfig
from internal_policy.cli.parser import COMMANDS, command_class
from internal_policy.evaluation.config import EvaluateConfig
from internal_policy.inspection.config import InspectConfig
from internal_policy.interventions.config import AblateConfig, PatchConfig
from internal_policy.utils.options import options_of

README = ROOT / "README.md"
PACKAGE = ROOT / "internal_policy"

HEAVY = ("torch", "transformers", "trl", "nnsight", "transformer_lens", "pandas", "matplotlib", "datasets")


def modules():
    """The modules of the package and the imports in each, lazy and typing-only ones too."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found = {}
    for name, path in paths.items():
        targets = set()
        # A package's own names come from its modules, on first use.
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "__init__.py" else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "internal_policy":
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                targets |= {each if each in paths else node.module for each in whole}
        found[name] = targets - {name}
    return found


def test_there_are_no_circular_imports():
    # What is left when modules that import nothing left are taken away again and again.
    left = modules()
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_few_modules_are_outside_the_packages():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def lint_imports(root):
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--config",
        str(root / "pyproject.toml"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("utils/errors.py", "from internal_policy.models import load\n"),
        ("analysis/results.py", "def later():\n    from internal_policy.plotting import entropy_change\n"),
        ("rewards/functions.py", "if TYPE_CHECKING:\n    from internal_policy.bupo.run import Run\n"),
        ("evaluation/results.py", "def later():\n    from internal_policy.inspection.results import Inspection\n"),
    ],
    ids=["at the top", "lazy", "typing only", "sideways"],
)
def test_upward_imports_are_refused(tmp_path, module, line):
    """The import-linter contracts that ``make check`` runs reject an upward import."""
    shutil.copytree(PACKAGE, tmp_path / "internal_policy", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "internal_policy" / module).open("a") as file:
        file.write(f"\n\n{line}")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Imports point down BROKEN" in done.stdout


def test_an_import_loads_nothing_heavy():
    code = "import sys, internal_policy, internal_policy.cli.main, internal_policy.models.testbed; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & set(HEAVY)


def test_figures_and_results_need_no_torch():
    code = (
        "import sys, internal_policy.plotting.analysis, internal_policy.analysis.results;"
        "import internal_policy.report.analysis;"
        "print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" not in loaded


HELP = f"""
from internal_policy.cli.main import main
try:
    main()
finally:
    print("loaded", *{{*{HEAVY!r}}} & {{*sys.modules}}, file=sys.stderr)
"""


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_is_fast_and_loads_nothing_heavy(name):
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        words = ["--help"] if name is None else [name, "--help"]
        code = f"import sys; sys.argv[1:] = {words!r}\n{HELP}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stderr == "loaded\n"
        assert done.stdout.startswith(f"usage: internal-policy {name or 'COMMAND'} [OPTIONS]")
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Processor time, and the best of several: what the command costs, not what else the machine is doing.
    assert any(seconds() < 0.4 for _ in range(5))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("analyze", AnalyzeConfig),
        ("evaluate", EvaluateConfig),
        ("inspect", InspectConfig),
        ("ablate", AblateConfig),
        ("patch", PatchConfig),
        ("train", TrainConfig),
    ],
)
def test_every_option_of_a_configuration_is_on_the_command_line(name, config):
    assert options_of(config).keys() <= options_of(command_class(name)).keys()


def test_figure_names_of_many_models_are_valid_file_names():
    from internal_policy.utils.shell import figure_name

    paper = [(f"some-organisation--some-model-{i}B-Instruct-2507", "policy") for i in range(12)]
    assert figure_name(paper[:1]) == paper[0][0]
    assert len(figure_name(paper)) < 255
    assert figure_name(paper) != figure_name(paper[:11])
    assert figure_name([("m", "policy"), ("m", "logit-lens")]) == "m--m--logit-lens"
    assert figure_name([("m--logit-lens", "logit-lens")]) == "m--logit-lens"


def test_every_public_name_can_be_imported():
    import internal_policy

    for name in internal_policy.__all__:
        assert getattr(internal_policy, name) is not None
    with pytest.raises(AttributeError):
        internal_policy.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"line {block.line}") for block in python_blocks(README)],
)
@pytest.mark.slow
def test_the_readmes_python_runs(block, tmp_path):
    # Each is run separately, because readers copy single blocks.
    run_python(README, [block], tmp_path, timeout=300)


@pytest.mark.slow
def test_the_wheel_contains_the_embedded_models_and_runs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for model in ("qwen3", "llama"):
        assert f"internal_policy/models/weights/{model}/model.safetensors" in names
    assert "internal_policy/py.typed" in names
    assets = (PACKAGE / "report" / "assets").iterdir()
    assert {f"internal_policy/report/assets/{path.name}" for path in assets} <= set(names)
    assert sum(f.stat().st_size for f in (tmp_path / "site").rglob("weights/**/*") if f.is_file()) <= 12 * 2**20
    code = (
        "import internal_policy, json; from internal_policy import analyze; "
        "from internal_policy.models import testbed; "
        "a = analyze('testbed/llama', max_responses=4); "
        "print(json.dumps([internal_policy.__file__, str(testbed.path('testbed/llama')), a.n_responses]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    package, weights, n = json.loads(done.stdout.splitlines()[-1])
    assert package.startswith(str(tmp_path))
    assert weights.startswith(str(tmp_path))
    assert n == 4
