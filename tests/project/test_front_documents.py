"""README, CONTRIBUTING and CHANGELOG: links resolve, the module tree matches the package, versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "internal_policy"


def text_of(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_resolve(document):
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


def test_the_module_tree_lists_exactly_the_packages():
    tree = re.search(r"^internal_policy/\n(.*?)^```", text_of(ROOT / "CONTRIBUTING.md"), flags=re.S | re.M)[1]
    named = re.findall(r"^  (\w+(?:/|\.py))  ", tree, flags=re.M)
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(named) == sorted(folders | {path.name for path in PACKAGE.glob("*.py")})
    # It fits a screen.
    assert len(tree.splitlines()) < 40
    for entries in re.findall(r"^(\w+/(?:\w+/)?(?:  \w+/)?) ", tree, flags=re.M):
        assert all((ROOT / entry).is_dir() for entry in entries.split())


def test_the_version_is_the_same_everywhere():
    from internal_policy import __version__

    for document, pattern in (("pyproject.toml", r'^version = "(.*)"$'), ("CITATION.cff", r"^version: (.*)$")):
        assert re.search(pattern, text_of(ROOT / document), flags=re.M)[1] == __version__, document


# Items of arXiv 2512.19673v3, each with a word that must occur near references to it.
PLACES = {
    "section 3.2": "entrop|stage|H_Layer|response tokens",
    "section 5": "Avg@K|Pass@K|evaluation|PAPER_K",
    "appendix A.2": "template",
    "appendix A.5": r"Avg@K|Pass@K|PAPER_K|C\(n|critic",
    "appendix B.2": "baseline",
    "appendix B.5": "cosine",
    "table 1": "AIME25",
    "table 4": "model|twelve",
    "table 7": "209|analysis against",
    "table 8": "update|setting|temperature|response",
    "table 9": "Olympiad|lm-evaluation-harness|other abilities",
    "table 10": "AIME25",
}


def test_references_to_the_paper_exist_in_the_paper():
    reference = re.compile(r"\b(section|appendix|tables?)\s+([AB]\.\d|\d+(?:\.\d)?(?:-\d+)?)")
    others = re.compile(r"Techniques|Sampling|Expansion|arXiv (?!2512)|Contributor")
    found = set()
    for folder in ("internal_policy", "docs", "benchmarks", "notebooks", "README.md"):
        root = ROOT / folder
        for path in [root] if root.is_file() else sorted({*root.rglob("*.py"), *root.rglob("*.md")}):
            text = text_of(path)
            for match in reference.finditer(text):
                before, around = (
                    text[max(match.start() - 150, 0) : match.start()],
                    text[max(match.start() - 300, 0) :][:500],
                )
                if not re.search("paper|2512.19673|the baseline of", around) or others.search(before):
                    continue
                place = f"{match[1]} {match[2]}"
                assert place in PLACES, f"{path.relative_to(ROOT)}: {place}"
                assert re.search(PLACES[place], around), f"{path.relative_to(ROOT)}: {place}"
                found.add(place)
    assert {"section 5", "appendix A.2", "appendix A.5", "table 8"} <= found
