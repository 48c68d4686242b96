"""The documentation: its code runs, its commands exist, its reference matches the code and every page is linked."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from documents import (
    DOCS,
    PAGES,
    ROOT,
    bash_lines,
    blocks,
    command_arguments,
    command_lines,
    reason_not_run,
    run_blocks,
    shortened,
)

from internal_policy import UserError
from internal_policy.cli.parser import COMMANDS, command_class, flags_of, parse
from internal_policy.utils.options import options_of

SHOWN = [ROOT / "README.md", *PAGES]
LANGUAGES = {"python", "bash", "json", "yaml", "text", "bibtex"}


def name(path):
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory):
    """A directory in which the commands of `make demo` have run."""
    place = tmp_path_factory.mktemp("demo")
    recipe = re.search(r"^demo: setup\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    starts = {
        "$(BIN)/internal-policy ": f"{sys.executable} -m internal_policy.cli ",
        "$(BIN)/python benchmarks/": f"{sys.executable} {ROOT}/benchmarks/",
    }
    for line in recipe.strip().splitlines():
        known, started = next((start, new) for start, new in starts.items() if line.strip().startswith(start))
        command = started + line.strip().removeprefix(known)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        subprocess.run(shlex.split(command), cwd=place, env=environment, check=True, capture_output=True)
    return place


def runnable(page):
    """The blocks of a page of which something runs, in their order."""
    return [
        block
        for block in blocks(page)
        if (block.language == "python" and block.not_run is None)
        or (block.language == "bash" and any(reason_not_run(line) is None for _, line in bash_lines(block)))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in SHOWN if runnable(page)], ids=name)
def test_pages_run_from_top_to_bottom_after_the_demo(page, after_the_demo, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(after_the_demo, work)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    run_blocks(page, runnable(page), scratch, work, timeout=1200)


def test_every_skipped_command_has_a_reason():
    reasons = {reason_not_run(line) for page in SHOWN for _, line in command_lines(page)}
    assert {"needs the hub", "needs several GPUs or processes", "makes the reader's environment", None} <= reasons
    for line in ("figures data/analyses/* data/runs/*", "analyze  # seconds", "train --layer 7 --max-steps 60"):
        assert reason_not_run(f"internal-policy {line}") is None
    assert reason_not_run("internal-policy analyze --model Qwen/Qwen3-4B --tolerance 0.02") == "needs the hub"


def test_long_commands_are_shortened_and_others_are_not():
    for line, run in {
        "evaluate --samples 4 --max-problems 128 --site ffn  # all": "evaluate --site ffn --samples 2 --max-problems 8",
        "ablate --max-responses 64": "ablate --max-responses 16",
        "train --max-steps 60 --ipa-steps 6": "train --ipa-steps 6 --max-steps 6",
    }.items():
        assert shortened(f"internal-policy {line}").split() == ["internal-policy", *run.split()]
    for line in ("internal-policy analyze --max-responses 128  # seconds", "echo train --max-steps 60"):
        assert shortened(line) == line
    # What is shortened is accepted by the command.
    for page in SHOWN:
        for _, line in command_lines(page):
            if reason_not_run(line) is None and (arguments := command_arguments(shortened(line))):
                assert complaint(arguments) is None, line


@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_every_block_is_run_or_marked_as_not_run(page):
    for block in blocks(page):
        where = f"{name(page)}, line {block.line}"
        # What is Python under another name would not be run.
        assert block.language in LANGUAGES, f"{where}: a block of {block.language!r}"
        if block.language == "python":
            assert block.not_run != "", f"{where}: says that it is not run, but not why"
            compile(block.code, where, "exec")
    text = page.read_text(encoding="utf-8")
    # A marker must precede a block that would otherwise run.
    markers = len(re.findall(r"<!-- not run:", text))
    assert markers == sum(block.not_run is not None and block.language == "python" for block in blocks(page))
    assert text.count("```") == 2 * len(blocks(page)), f"{name(page)}: a fence that was not understood"


def complaint(arguments):
    """The usage error for arguments; None if they are accepted. Nothing is run."""
    if not arguments or arguments == ["--help"]:
        return None
    name, *words = arguments
    try:
        parse(name, words)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", SHOWN, ids=name)
def test_every_command_that_is_shown_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for number, line in command_lines(page):
        where = f"{name(page)}, line {number}: {line}"
        if (arguments := command_arguments(line)) is not None:
            assert (texts := complaint(arguments)) is None, f"{where}: {texts}"
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, where
        for found in re.findall(r"(?:internal-policy|\.)\[([a-z,]+)\]", line):
            assert set(found.split(",")) <= extras, where
        for script in re.findall(r"\bpython ((?:benchmarks|docs|tests)/\S+\.py)", line):
            assert (ROOT / script).is_file(), where


def test_unknown_commands_are_detected():
    assert complaint(["analyze", "--model", "testbed/qwen3", "--tolerance", "0.05"]) is None
    assert "--no-such" in complaint(["analyze", "--no-such", "1"])
    assert "analyse" in complaint(["analyse"])
    assert complaint(["analyze", "--max-responses", "many"]) is not None
    line = "accelerate launch -m internal_policy.cli train --layer 7  # the boundary layer"
    assert command_arguments(line) == ["train", "--layer", "7"]
    assert command_arguments("KEY=1 internal-policy models") == ["models"]
    assert command_arguments("pip install internal-policy-tools") is None
    assert command_arguments("make demo  # starts internal-policy analyze") is None


def test_the_command_reference_matches_the_commands(monkeypatch):
    spec = importlib.util.spec_from_file_location("command_line_reference", DOCS / "command_line.py")
    reference = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, reference)
    spec.loader.exec_module(reference)
    page = reference.page()
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == page, "run python docs/command_line.py"
    assert reference.escape("RUN/*_<x> [a|b] `c`") == r"RUN/\*\_&lt;x&gt; \[a&#124;b\] \`c\`"


def test_the_reference_has_every_option_of_every_command():
    sections = dict(re.findall(r"^## ([a-z]+)\n(.*?)(?=^## |\Z)", (DOCS / "cli.md").read_text(), flags=re.S | re.M))
    assert list(sections) == list(COMMANDS)
    for name, section in sections.items():
        options = options_of(command_class(name)).values()
        shown = set(re.findall(r"`(--?[a-z][a-z0-9-]*)`", section))
        assert shown == {flag for option in options if not option.positional for flag in flags_of(option)}, name
        # What has no help is not shown: the words that a shell makes of a glob.
        assert all(option.help for option in options if not option.positional), name


def nav_pages(entry):
    if isinstance(entry, str):
        yield entry
    else:
        for each in entry if isinstance(entry, list) else entry.values():
            yield from nav_pages(each)


def test_the_navigation_lists_every_page_once():
    nav = list(nav_pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    # docs/hooks.py adds the list of changes, which is not kept in docs/.
    assert sorted(nav) == sorted(["changelog.md", *(page.relative_to(DOCS).as_posix() for page in PAGES)])


def test_every_public_name_is_in_the_python_reference():
    import internal_policy
    from internal_policy import bupo, evaluation

    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: (\S+)", text, flags=re.M)
    assert len(shown) == len(set(shown)), "an object that is described twice"
    names = {path.rpartition(".")[2] for path in shown}
    for package in (internal_policy, bupo, evaluation):
        assert set(package.__all__) - {"__version__", "bupo", "plotting"} <= names, package.__name__


def strings(path):
    """The strings of a module, with ... in place of formatted values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_explained_message_exists_in_the_code():
    texts = [text for path in (ROOT / "internal_policy").rglob("*.py") for text in strings(path)]
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page.partition("## Messages")[2], flags=re.M)
    assert len(messages) > 20
    for message in messages:
        # "A ... B" matches A, any text, and B.
        parts = [part.strip() for part in message.split("...")]
        assert any(all(part in text for part in parts) for text in texts), message
