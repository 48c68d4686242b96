"""README, CONTRIBUTING and CHANGELOG: their links hold, the module tree is that of the package, the version is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "internal_policy"


def text_of(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_every_relative_link_points_at_something(document):
    prose = re.sub(r"^ *```.*?^ *```", "", text_of(ROOT / document), flags=re.S | re.M)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]
    for target in targets:
        path, _, anchor = target.partition("#")
        place = ROOT / (path or document)
        assert place.exists(), f"{document} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(place), flags=re.M)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{document} links to {target}"


def test_the_module_tree_has_every_module_and_no_other():
    tree = re.search(r"^internal_policy/\n(.*?)^\S", text_of(ROOT / "CONTRIBUTING.md"), flags=re.S | re.M)[1]
    named, folder = [], PACKAGE
    for line in tree.splitlines():
        # Names of the top level stand at two spaces; what is deeper goes on telling of the line above.
        entries, _, told = line.strip().partition("   ")
        if line.startswith("   "):
            entries, told = "", line
        for entry in entries.split():
            assert list(PACKAGE.glob(entry.rstrip("/"))), f"there is no {entry}"
            folder = PACKAGE / entry if entry.endswith("/") else PACKAGE
            named.append(entry.rstrip("/"))
        for module in re.findall(r"\w+\.py\b", told):
            assert (folder / module).is_file(), f"{folder.name} has no {module}"
    modules = {path.name for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    for module in modules - {"__init__.py"}:
        assert any(Path(module).match(pattern) for pattern in named), f"{module} is not in the tree of CONTRIBUTING.md"


def test_the_version_is_the_same_everywhere():
    from internal_policy import __version__

    for document, pattern in (("pyproject.toml", r'^version = "(.*)"$'), ("CITATION.cff", r"^version: (.*)$")):
        assert re.search(pattern, text_of(ROOT / document), flags=re.M)[1] == __version__, document
