"""What the site needs beside its pages: the repository's figures, links out of docs/, formulas without a script."""

from __future__ import annotations

import html
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Only what git keeps: beside these, figures/ holds what the commands of whoever builds the site drew.
FIGURES = ("figures/readme", "figures/experiments", "figures/benchmarks")

# Below "mkdocs." a warning counts, and ends a strict build.
logger = logging.getLogger("mkdocs.hooks")

_FENCE = re.compile(r"^( *)(`{3,}).*?^\1\2`* *$", flags=re.S | re.M)
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((\.\./[^()\s]*)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.S)
_IN_DOCSTRING = re.compile(r"<p>\.\. math::\s+(.*?)</p>", flags=re.S)
_TAG = re.compile(r"\\tag\{(.*?)\}")
_ELSEWHERE = re.compile(
    r"""<(?:script|img|iframe|source|link(?![^>]*canonical))\b[^>]*(?:src|href)=["']?(https?:)?//"""
)


def on_files(files: Files, config: Any) -> Files:
    """Put the committed figures into the site, at their path in the repository, and the list of changes.

    Args:
        files: the pages and what else is in docs/.
        config: the configuration of mkdocs.

    Returns:
        The same, with these.
    """
    files.append(File.generated(config, "changelog.md", abs_src_path=str(ROOT / "CHANGELOG.md")))
    for directory in FIGURES:
        for path in sorted((ROOT / directory).rglob("*.png")):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make links that leave docs/, which hold on GitHub, hold in the site too.

    A figure is linked where the site has it; what else the repository holds is named by its path.

    Args:
        markdown: the page as it is written.
        page: the page.
        config: the configuration of mkdocs.
        files: what the site holds.

    Returns:
        The page with links of the site.
    """
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        target, _, _anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(here, target))
        if not place.startswith("../"):
            return match[0]
        place = place.removeprefix("../")
        if not (ROOT / place).exists():
            logger.warning("%s: links to %s, which is not in the repository", page.file.src_uri, place)
        if files.get_file_from_path(place):
            return f"{image}[{text}]({posixpath.relpath(place, here or '.')})"
        return text if place in text else f"{text} (`{place}`)"

    # Fenced code is copied as it is.
    parts, start = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(link, markdown[start : fence.start()]), fence[0]]
        start = fence.end()
    return "".join([*parts, _LINK.sub(link, markdown[start:])])


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Turn formulas into MathML, which browsers draw by themselves.

    Args:
        content: the page as HTML, with the formulas that arithmatex found.
        page: the page.
        config: the configuration of mkdocs.
        files: what the site holds.

    Returns:
        The page with MathML.
    """

    def formula(match: re.Match[str]) -> str:
        text = html.unescape(match[3])
        return str(convert(text, display="inline")) if match[2] == "(" else _displayed(text)

    content = _FORMULA.sub(formula, content)
    # Docstrings mark theirs as Sphinx does.
    return _IN_DOCSTRING.sub(lambda match: _displayed(html.unescape(match[1])), content)


def _displayed(text: str) -> str:
    number = _TAG.search(text)
    told = f"<span>({number[1]})</span>" if number else ""
    return f'<div class="formula">{convert(_TAG.sub("", text), display="block")}{told}</div>'


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would ask a network for anything.

    Args:
        output: the whole page.
        page: the page.
        config: the configuration of mkdocs.

    Returns:
        The same.
    """
    if found := _ELSEWHERE.search(output):
        logger.warning("%s: asks a network for %s", page.file.src_uri, found[0])
    return output


@event_priority(-100)
def on_post_build(config: Any) -> None:
    """Write the search's index as a script too, which is how the theme reads it in pages opened from the disk.

    Args:
        config: the configuration of mkdocs.
    """
    index = Path(config.site_dir) / "search" / "search_index.json"
    text = index.read_text(encoding="utf-8")
    index.with_suffix(".js").write_text(f"var __index = {text}", encoding="utf-8")
